"""An event loop whose clock jumps: minutes of a fleet pass as fast as their events can be worked off.

Nothing waits for the real clock, nothing comes from outside and no thread runs, so that what happens is decided by
the program and its seed alone.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class StandstillError(RuntimeError):
    """Everybody waits and nobody is due: nothing would ever happen again."""


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting moves the clock to where the wait would have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StandstillError("every task waits for another and no timer is set")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that begins at second 0 and never waits."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Return the seconds that have passed on the virtual clock."""
        return self._clock.now


def run_virtually(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on a loop of its own whose time is virtual, and return its result.

    Raises:
        StandstillError: nothing is left to happen, and it has not ended.
    """
    with asyncio.Runner(loop_factory=VirtualLoop, debug=False) as runner:
        return runner.run(main())
