"""The answers that were asked for last, at most so many, for what costs more to find out than to keep."""

from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Newest(OrderedDict[K, V]):
    """A mapping that forgets what nobody has got or set for the longest time; to look whether it has a key is neither.

    Args:
        limit: how many answers it keeps.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __getitem__(self, key: K) -> V:
        value = super().__getitem__(key)
        self.move_to_end(key)
        return value

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        if len(self) > self._limit:
            del self[next(iter(self))]
