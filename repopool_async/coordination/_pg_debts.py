"""What must still be told to the database, tried again for ever: what was or may have been taken, and nobody wants.

A debt may be paid twice without harm. At the end of the process what is left goes with its session.
"""

import asyncio
import random
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

import attrs

from repopool_async._aio import TaskSet
from repopool_async.coordination._pg_errors import SessionExpiredError
from repopool_async.exceptions import PoolManagerError

_PAUSES: Final = (0.05, 5.0)


@attrs.frozen(eq=False)
class Debt:
    """One statement that is to be executed once nobody knows better.

    Attributes:
        hold_id: what it gives back.
    """

    hold_id: uuid.UUID
    statement: str
    arguments: tuple[object, ...]


class Debts:
    """Pays debts in the background.

    Args:
        pay: executes one; fails where that must be tried again.
    """

    def __init__(self, pay: Callable[[Debt], Coroutine[Any, Any, object]]) -> None:
        self._pay = pay
        self._open: dict[Debt, asyncio.Event] = {}
        self._has_some = asyncio.Event()
        self._tasks = TaskSet("settle")
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Pay from now on."""
        self._tasks.spawn(self._pay_for_ever(), name="pay")

    async def stop(self) -> None:
        """Pay no more."""
        await self._tasks.cancel()

    def owe(self, debt: Debt) -> None:
        """Pay soon, and until it is known to have been received."""
        self._open.setdefault(debt, asyncio.Event())
        self._has_some.set()

    def owe_from_anywhere(self, debt: Debt) -> None:
        """Do as `owe`, from any thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it the session that held it
            self._loop.call_soon_threadsafe(self.owe, debt)

    async def paid(self, debt: Debt) -> None:
        """Wait until it was paid; where it is not owed, return at once."""
        event = self._open.get(debt)
        if event is not None:
            await event.wait()

    async def _pay_for_ever(self) -> None:
        pause = _PAUSES[0]
        while True:
            await self._has_some.wait()
            self._has_some.clear()
            for debt in list(self._open):
                await self._try_to_pay(debt)
            if self._open:
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                self._has_some.set()
            pause = min(2 * pause, _PAUSES[1]) if self._open else _PAUSES[0]

    async def _try_to_pay(self, debt: Debt) -> None:
        try:
            await self._pay(debt)
        except (PoolManagerError, SessionExpiredError):
            return
        self._open.pop(debt).set()
