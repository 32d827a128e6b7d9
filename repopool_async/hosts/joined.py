"""Pieces of work on one host that are asked for in one go, and done in the order in which they were asked.

On this machine one follows the other, as if each had been awaited. Where asking takes a round trip, `_ssh_joined` sends
together what the pieces begin with. What the pieces do is not known here.
"""

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Joined:
    """A block at whose end the pieces that were handed over in it are done.

        async with host.joined() as joined:
            root = joined(host.stat(path))
            joined(host.apply(steps))
        root.result()

    The first piece that fails ends them: its error leaves the block, and those after it are not done. A piece asks the
    host once, or several things at once; what it asks when it has had an answer is refused with `RuntimeError` where
    others have been answered since. Cancelled, the block ends as the piece does that is under way.
    """

    def __init__(self) -> None:
        self._work: list[tuple[Coroutine[Any, Any, Any], asyncio.Future[Any]]] = []

    def __call__(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Hand over a piece, and return where its outcome will be once the block has ended without an error."""
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._work.append((work, outcome))
        return outcome

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self._finish()
        finally:
            for work, _ in self._work:
                work.close()  # which does nothing to one that has run

    async def _finish(self) -> None:
        for work, outcome in self._work:
            outcome.set_result(await work)
