"""Into which of several directories a path leads: a look at each of thousands of paths has to cost little.

Names only: no file system is asked, and what a path was read from is not known here.
"""

from collections.abc import Iterable, Sequence
from os.path import commonprefix
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_ENDS: Final = ("", "/")


class Places(Generic[T]):
    """What belongs to directories, by paths in them. However many directories there are, a look takes the same time.

    Paths are compared as the kernel lists them, a newline as three octal digits, so it matters not where one was read.
    """

    def __init__(self, places: Iterable[tuple[str, T]]) -> None:
        """Take absolute paths, and what belongs to each; the same path may come more than once."""
        self._by_length: dict[int, dict[str, list[T]]] = {}
        for path, value in places:
            start = _as_listed(path.rstrip("/"))
            self._by_length.setdefault(len(start), {}).setdefault(start, []).append(value)
        # Most paths lead elsewhere altogether, and are done with at once.
        starts = [start for starts in self._by_length.values() for start in starts]
        self._common = commonprefix(starts)  # noqa: RUF071 - of texts

    def of(self, path: str) -> Sequence[T]:
        """Return what belongs to the directories that a path is or leads into."""
        path = _as_listed(path)
        if not path.startswith(self._common):
            return ()
        found: list[T] = []
        for length, places in self._by_length.items():
            start = path[:length]
            if start in places and path[length : length + 1] in _ENDS:
                found += places[start]
        return found


def _as_listed(path: str) -> str:
    return path.replace("\n", r"\012")
