"""Who waits for whom: waits that nothing ends, because those who hold the slots wait for slots themselves.

Only tasks of this process are known; what other processes' lessees wait for is not. Telling it, and giving up, is
`acquiring`'s business.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from repopool_async.models import Slot
from repopool_async.open_leases import OpenLeases


class Deadlocks:
    """Finds deadlocks among the tasks that wait for a slot of one pool."""

    def __init__(self, leases: OpenLeases) -> None:
        self._leases = leases
        self._waiting: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def noted_as_waiting(self) -> AsyncIterator[None]:
        """Count the present task among those that wait, for the block."""
        task = asyncio.current_task()
        if task is None or task in self._waiting:
            yield
            return
        self._waiting.add(task)
        try:
            yield
        finally:
            self._waiting.discard(task)

    def reason(self, slots: list[Slot]) -> str:
        """Say why waiting is in vain, where the waiting task holds a slot or the holders of all slots wait too."""
        mine = [opened for opened in self._leases if opened.origin.is_of(asyncio.current_task())]
        if mine:
            held = ", ".join(f"{opened.leased.slot_id} (taken at {opened.origin.where})" for opened in mine)
            return (
                f"this task already holds {held}: it waits for itself; give that back first, take both at once in "
                f"another pool, or raise num_slots"
            )
        if self.do_all_holders_wait(slots):
            return (
                "every slot is held by a task that itself waits for another slot of this pool: they wait for each "
                "other; let each take one slot, or raise num_slots"
            )
        return ""

    def do_all_holders_wait(self, slots: list[Slot]) -> bool:
        """Return whether every slot is held by a task of this process that waits for another one."""
        opened = [self._leases.of(slot) for slot in slots if slot.lease is not None]
        return len(opened) == len(slots) > 0 and all(
            one is not None and any(one.origin.is_of(task) for task in self._waiting) for one in opened
        )
