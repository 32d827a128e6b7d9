"""What is looked for among the processes of this machine: as much as those who go through them need to know of it."""

from typing import Self

import attrs


@attrs.define(eq=False)
class Search:
    """A question that one asks, and one pass over all processes answers. A block within which the answer holds.

    Attributes:
        is_over: whether it has been answered. failure: why it could not be. is_left: whether its block has ended.
    """

    is_over: bool = attrs.field(default=False, init=False)
    failure: Exception | None = attrs.field(default=None, init=False)
    is_left: bool = attrs.field(default=False, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_left = True
        self.clear()

    def clear(self) -> None:
        """Let go of what was found."""
        raise NotImplementedError
