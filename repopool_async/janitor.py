"""Puts right what nobody else will: slots of dead owners, leases taken away, trash.

One background loop per manager, and the same sweep on demand (`PoolManager.recover`). Everything it does is reported as
an event. It decides nothing about a single slot; pools and coordinators do.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from repopool_async._aio import TaskSet
from repopool_async._clock import now
from repopool_async.exceptions import PoolManagerError
from repopool_async.hosts.base import Host
from repopool_async.models import SlotState
from repopool_async.repo_pool import RepoPool
from repopool_async.slot_store import SlotStore

_log: Final = logging.getLogger("repopool")

_LEASE_CHECK_SECONDS: Final = 1.0


class Janitor:
    """Sweeps the pools of one manager.

    Args:
        pools: returns the pools as they are now. interval_seconds: between two sweeps.
    """

    def __init__(
        self,
        pools: Callable[[], Iterable[RepoPool]],
        *,
        host: Host,
        store: SlotStore,
        emit: Callable[[str, Mapping[str, Any]], None],
        interval_seconds: float,
    ) -> None:
        self._pools = pools
        self._host = host
        self._store = store
        self._emit = emit
        self._interval_seconds = interval_seconds
        self._tasks = TaskSet("janitor")
        self._turn = asyncio.Lock()
        self._unreported: dict[str, None] = {}
        self._warned: set[str] = set()
        self._has_trash = asyncio.Event()

    async def start(self) -> None:
        """Take over what dead owners left, and go on sweeping in the background."""
        for pool in self._pools():
            self._unreported |= dict.fromkeys(await pool.keeper.recover())
        self._tasks.spawn(self._sweep_for_ever(), name="sweep")
        self._tasks.spawn(self._watch_leases_for_ever(), name="watch-leases")
        self._tasks.spawn(self._empty_trash_for_ever(), name="empty-trash")

    def note_trash(self) -> None:
        """Have the trash emptied soon."""
        self._has_trash.set()

    async def stop(self) -> None:
        """End the background work; a sweep under way is interrupted where it may be."""
        await self._tasks.cancel()

    async def sweep(self) -> list[str]:
        """Take over what dead owners left, expire saved work, have the trash emptied.

        Returns:
            The ids of the slots whose recovery was begun since this was last asked.
        """
        async with self._turn:
            await self._sweep()
        recovered, self._unreported = list(self._unreported), {}
        return recovered

    async def _sweep(self) -> None:
        for pool in self._pools():
            self._unreported |= dict.fromkeys(await pool.keeper.recover())
            await pool.keeper.tidy_salvage()
            await self._warn_of_long_leases(pool)
        self.note_trash()

    async def empty_trash(self) -> None:
        """Delete what cleanings moved aside; another process doing the same is no matter."""
        for pool in self._pools():
            await self._empty_trash(pool)

    async def _warn_of_long_leases(self, pool: RepoPool) -> None:
        """Tell once of every lease that is older than the pool's `stale_lock_hours` (9.3)."""
        for slot in await pool.list_slots():
            lease = slot.lease
            if slot.state is not SlotState.ALLOCATED or lease is None or lease.lease_id in self._warned:
                continue
            hours = (now() - lease.acquired_at).total_seconds() / 3600
            if hours >= pool.options.stale_lock_hours:
                self._warned.add(lease.lease_id)
                self._emit("lease.long", {"slot_id": slot.slot_id, "lease_id": lease.lease_id, "hours": hours})

    async def _empty_trash(self, pool: RepoPool) -> None:
        trash = str(self._store.trash_path(pool.name))
        for name in await self._host.list_directory(trash):
            try:
                await self._host.remove_tree(f"{trash}/{name}")
            except OSError as error:
                _log.warning("%s: cannot delete %s/%s: %s", pool.name, trash, name, error)

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                async with self._turn:
                    await self._sweep()
            except (PoolManagerError, OSError):
                _log.exception("the sweep failed; it is tried again in %g s", self._interval_seconds)
            await asyncio.sleep(self._interval_seconds)

    async def _empty_trash_for_ever(self) -> None:
        while True:
            await self._has_trash.wait()
            self._has_trash.clear()
            await self.empty_trash()

    async def _watch_leases_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_LEASE_CHECK_SECONDS)
            for pool in self._pools():
                try:
                    await pool.notice_lost_leases()
                    await pool.reap_expired_leases()
                except (PoolManagerError, OSError):
                    _log.exception("%s: cannot check its leases; tried again in %g s", pool.name, _LEASE_CHECK_SECONDS)
