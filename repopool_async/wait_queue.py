"""Who is next: a bounded queue, first come first served within a priority.

Only the head of the queue looks for a free slot; everybody behind it sleeps. A turn is handed over as a future, and a
waiter that is cancelled in the instant it is called passes the turn on, so none is ever lost. Slots are not known here.
"""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs


@attrs.define(order=True)
class _Place:
    rank: int
    number: int
    turn: "asyncio.Future[None]" = attrs.field(order=False)


class WaitQueue:
    """Turns for the waiters of one pool in this process. Bound to one event loop; state changes never await."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._numbers = itertools.count()
        self._is_taken = False
        self._refusal: BaseException | None = None

    def __len__(self) -> int:
        """How many wait, the one whose turn it is included."""
        return len(self._places) + self._is_taken

    @asynccontextmanager
    async def turn(self, priority: int = 0) -> AsyncIterator[None]:
        """Wait for the turn; leaving the block calls the next.

        Args:
            priority: the higher goes first; equals in order of arrival.

        Raises:
            the error given to `refuse`, for those waiting then and coming later.
        """
        await self._arrive(priority)
        try:
            yield
        finally:
            self._call_next()

    def refuse(self, error: BaseException) -> None:
        """Fail everybody who waits, and everybody who comes."""
        self._refusal = error
        for place in self._places:
            if not place.turn.done():
                place.turn.set_exception(error)
        self._places.clear()

    def accept(self) -> None:
        """Let everybody queue again after `refuse`."""
        self._refusal = None

    async def _arrive(self, priority: int) -> None:
        if self._refusal is not None:
            raise self._refusal
        if not self._is_taken:
            self._is_taken = True
            return
        place = _Place(-priority, next(self._numbers), asyncio.get_running_loop().create_future())
        heapq.heappush(self._places, place)
        try:
            await place.turn
        except BaseException:
            if place.turn.done() and not place.turn.cancelled() and place.turn.exception() is None:
                self._call_next()  # called in the same instant as cancelled
            elif place in self._places:
                self._places.remove(place)
                heapq.heapify(self._places)
            raise

    def _call_next(self) -> None:
        while self._places:
            place = heapq.heappop(self._places)
            if not place.turn.done():
                place.turn.set_result(None)
                return
        self._is_taken = False
