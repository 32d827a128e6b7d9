"""Puts right what nobody else will: slots of dead owners, leases taken away or too long, damaged slots, rubbish.

One background loop per manager, and the same sweep on demand (`PoolManager.recover`). Taking over what dead owners left
is every manager's work. What only this machine can do is done by one janitor at a time of those that share its
directory, the rest by one among all processes, which holds the lock `janitor`. Everything it does is reported as an
event. It decides nothing about a single slot; pools and coordinators do.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

from repopool_async._aio import TaskSet, in_thread
from repopool_async._clock import boottime, now
from repopool_async._identity import boot_id
from repopool_async.exceptions import CoordinatorUnavailableError, LockTimeoutError, PoolManagerError
from repopool_async.host_admission import Manager
from repopool_async.housekeeping import LeftOver, left_overs, remove
from repopool_async.mirror import MIRROR_LOCKS
from repopool_async.models import SlotState, StaleLock
from repopool_async.repo_pool import RepoPool
from repopool_async.salvage import SALVAGE_LOCKS
from repopool_async.shared_state import Locks

_log: Final = logging.getLogger("repopool")

_LEASE_CHECK_SECONDS: Final = 1.0
_LOCK_ID: Final = "janitor"
_LOCK_SECONDS: Final = 10.0
"""How long a sweep on demand waits for another process's."""
_REPAIR_SECONDS: Final = (60.0, 3600.0)
"""The first and the longest pause between attempts to repair a slot that does not stay repaired."""
_DISK_CHECK_SECONDS: Final = 300.0


class SweepReport(list[str]):
    """What a sweep did: the ids of the slots that it took over from dead owners, and as attributes all else.

    Attributes:
        stale_locks: of which the signatures of dead holders were erased. removed: paths of left-overs deleted.
        repairing: quarantined slots whose repair was begun. completing: pools whose maker died before all their slots
            were there, which are being made. expired: slots whose lease had lasted too long.
        over_limit: pools that use more disk than they may, even after what may go has gone.
        is_janitor: False where another process was sweeping, which then did the rest (for this machine, or for all).
    """

    def __init__(self, recovered: Iterable[str] = ()) -> None:
        super().__init__(recovered)
        self.stale_locks: list[StaleLock] = []
        self.removed: list[str] = []
        self.repairing: list[str] = []
        self.completing: list[str] = []
        self.expired: list[str] = []
        self.over_limit: list[str] = []
        self.is_janitor = True

    def fields(self) -> dict[str, Any]:
        """Return everything it did, for an event; empty where that is nothing."""
        done = {
            "recovered": list(self),
            "stale_locks": [lock.slot_id for lock in self.stale_locks],
            "removed": self.removed,
            "repairing": self.repairing,
            "completing": self.completing,
            "expired": self.expired,
            "over_limit": self.over_limit,
        }
        return {name: value for name, value in done.items() if value}


class Janitor:
    """Sweeps the pools of one manager.

    Args:
        pools: returns the pools as they are now. workspaces_dir: the manager's own.
        complete: begins to make the slots that a pool lacks because their maker died, and returns whether it lacks
            any; told whether that is asked for.
        interval_seconds: between two sweeps.
    """

    def __init__(
        self,
        pools: Callable[[], Iterable[RepoPool]],
        *,
        workspaces_dir: str,
        locks: Locks,
        emit: Callable[[str, Mapping[str, Any]], None],
        complete: Callable[[RepoPool, bool], Awaitable[bool]],
        interval_seconds: float,
    ) -> None:
        self._pools = pools
        self._workspaces_dir = workspaces_dir
        self._locks = locks
        self._emit = emit
        self._complete = complete
        self.interval_seconds = interval_seconds
        self._tasks = TaskSet("janitor")
        self._turn = asyncio.Lock()
        self._taken_over: list[str] = []
        self._completing: list[str] = []
        self._warned: set[str] = set()
        self._repairs: dict[str, tuple[int, float]] = {}
        self._measured: dict[str, float] = {}
        self._over_limit: set[str] = set()
        self._has_trash = asyncio.Event()

    async def start(self) -> None:
        """Take over what dead owners left, and go on sweeping in the background."""
        for pool in self._pools():
            self._taken_over += await pool.keeper.recover()
            if await self._complete(pool, False):
                self._completing.append(pool.name)
        self._tasks.spawn(self._sweep_for_ever(), name="sweep")
        self._tasks.spawn(self._watch_leases_for_ever(), name="watch-leases")
        self._tasks.spawn(self._empty_trash_for_ever(), name="empty-trash")

    def note_trash(self) -> None:
        """Have the trash emptied soon."""
        self._has_trash.set()

    async def stop(self) -> None:
        """End the background work; a sweep under way is interrupted where it may be."""
        await self._tasks.cancel()

    async def sweep(self, *, is_asked: bool = True) -> SweepReport:
        """Take over what dead owners left, begin all else that is to be put right, and return what was done.

        What was taken over, and begun to be completed, in the background since the last call is among it.

        Args:
            is_asked: wait for another process's janitor, and do at once what otherwise is done now and then.
        """
        async with self._turn:
            return await self._sweep(is_asked=is_asked)

    async def _sweep(self, *, is_asked: bool) -> SweepReport:
        taken_over, self._taken_over = self._taken_over, []
        report = SweepReport(taken_over)
        report.completing, self._completing = self._completing, []
        for pool in list(self._pools()):
            report += await pool.keeper.recover()
            if pool.name not in self._over_limit and await self._complete(pool, is_asked):
                report.completing.append(pool.name)
        for chores, lock_id in ((self._do_own_chores, await self._own_lock_id()), (self._do_common_chores, _LOCK_ID)):
            try:
                async with self._locks.acquire_slot_lock(lock_id, timeout=_LOCK_SECONDS if is_asked else 0):
                    await chores(report, is_asked)
            except LockTimeoutError:
                report.is_janitor = False
        self.note_trash()
        if done := report.fields():
            self._emit("janitor.swept", done)
        return report

    async def _own_lock_id(self) -> str:
        return f"{_LOCK_ID}-{(await Manager.of(self._workspaces_dir)).identity}"

    async def _do_own_chores(self, report: SweepReport, _is_asked: bool) -> None:
        async def chores(pool: RepoPool) -> None:
            report.expired += await self._end_too_long_leases(pool)
            report.removed += await self._remove_left_overs(pool)

        await self._in_each_pool(chores)

    async def _do_common_chores(self, report: SweepReport, is_asked: bool) -> None:
        async def chores(pool: RepoPool) -> None:
            await pool.keeper.chores.tidy_salvage()
            await self._warn_of_long_leases(pool)
            report.removed += await pool.keeper.chores.discard_strays()
            if await self._keep_to_disk_limit(pool, is_asked=is_asked):
                report.over_limit.append(pool.name)
            report.repairing += await self._repair_damaged(pool, is_asked=is_asked)

        report.stale_locks = await self._locks.cleanup_stale_locks(spared_prefix=(MIRROR_LOCKS, SALVAGE_LOCKS))
        await self._in_each_pool(chores)

    async def _in_each_pool(self, chores: Callable[[RepoPool], Awaitable[None]]) -> None:
        for pool in list(self._pools()):
            try:
                await chores(pool)
            except (PoolManagerError, OSError) as error:
                # One damaged pool must not keep the others dirty.
                self._emit("janitor.failed", {"repo_name": pool.name, "error": str(error)})

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

    async def _end_too_long_leases(self, pool: RepoPool) -> list[str]:
        """End leases older than `max_lease_seconds` whose own process does not: it may be stopped, or detached."""
        longest = pool.options.max_lease_seconds
        if longest is None:
            return []
        expired = []
        for slot in await pool.list_slots():
            lease = slot.lease if slot.state is SlotState.ALLOCATED else None
            is_ours = lease is not None and lease.owner.boot_id == boot_id()
            if lease is not None and is_ours and boottime() - lease.acquired_boottime >= longest + _LEASE_CHECK_SECONDS:
                expired += [slot.slot_id] if await pool.watch.expire(slot) else []
        return expired

    async def _remove_left_overs(self, pool: RepoPool) -> list[str]:
        """Delete abandoned temporary files and trees, and records set aside long ago."""
        removed = []
        found = await in_thread(left_overs, self._workspaces_dir, pool.name)
        taken = await pool.keeper.taken_among(
            {left_over.lock_id for left_over in found if left_over.lock_id is not None}
        )
        for left_over in found:
            if left_over.lock_id is None:
                removed += await self._remove(left_over)
                continue
            if left_over.lock_id in taken:
                continue
            held = await self._locks.try_acquire(left_over.lock_id)
            if held is None:
                continue  # somebody is making it
            try:
                removed += await self._remove(left_over)
            finally:
                await held.release()
        return removed

    async def _remove(self, left_over: LeftOver) -> list[str]:
        try:
            await in_thread(remove, left_over)
        except OSError as error:
            _log.warning("cannot delete %s: %s", left_over.path, error)
            return []
        fields = {"path": left_over.path, "what": left_over.kind, "age_seconds": left_over.age_seconds}
        self._emit("janitor.removed", fields)
        return [left_over.path]

    async def _repair_damaged(self, pool: RepoPool, *, is_asked: bool) -> list[str]:
        """Begin to repair quarantined slots (9.2, 9.5), each after a pause that doubles while it does not last."""
        if not pool.options.auto_repair or pool.name in self._over_limit:
            return []
        repairing = []
        for slot in await pool.list_slots():
            tries, not_before = self._repairs.get(slot.slot_id, (0, 0.0))
            if slot.state is not SlotState.ERROR:
                if boottime() > not_before + _REPAIR_SECONDS[1]:
                    self._repairs.pop(slot.slot_id, None)
                continue
            if not pool.can_be_reached(slot):
                continue
            if (is_asked or boottime() >= not_before) and await pool.keeper.repair_later(slot.slot_id):
                pause = min(_REPAIR_SECONDS[0] * 2**tries, _REPAIR_SECONDS[1])
                self._repairs[slot.slot_id] = (tries + 1, boottime() + pause)
                fields = {"slot_id": slot.slot_id, "attempt": tries + 1, "reason": slot.error}
                self._emit("slot.repairing", fields)
                repairing.append(slot.slot_id)
        return repairing

    async def _keep_to_disk_limit(self, pool: RepoPool, *, is_asked: bool) -> bool:
        """Free what may go where a pool uses more disk than `disk_limit`; return whether it still does.

        First the trash goes, then the trees of quarantined slots, then surplus slots; a leased slot never.
        """
        limit = pool.options.disk_limit
        is_due = boottime() - self._measured.get(pool.name, float("-inf")) >= _DISK_CHECK_SECONDS
        if limit is None:
            self._over_limit.discard(pool.name)
            return False
        if not (is_asked or is_due):
            return pool.name in self._over_limit
        used = found = await pool.keeper.chores.disk_usage()
        self._measured[pool.name] = boottime()
        for free in (self._empty_trash, _drop_quarantined_trees, _trim):
            if used > limit:
                await free(pool)
                used = await pool.keeper.chores.disk_usage()
        if found > limit:
            fields = {"repo_name": pool.name, "bytes": found, "limit": limit, "bytes_after": used}
            self._emit("pool.over_disk_limit", fields)
        is_over = used > limit
        (self._over_limit.add if is_over else self._over_limit.discard)(pool.name)
        return is_over

    async def _empty_trash(self, pool: RepoPool) -> None:
        for failure in await pool.keeper.chores.empty_trash():
            _log.warning("%s: %s", pool.name, failure)

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                report = await self.sweep(is_asked=False)
                self._taken_over, self._completing = list(report), report.completing
            except CoordinatorUnavailableError as error:
                _log.warning("the sweep failed: %s", error)
            except (PoolManagerError, OSError):
                _log.exception("the sweep failed; it is tried again in %g s", self.interval_seconds)
            # Managers that swept in step would leave the lock to the same one every time.
            await asyncio.sleep(self.interval_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    async def _empty_trash_for_ever(self) -> None:
        while True:
            await self._has_trash.wait()
            self._has_trash.clear()
            try:
                await self.empty_trash()
            except CoordinatorUnavailableError as error:
                _log.warning("cannot empty the trash: %s", error)  # the next sweep asks for it again

    async def _watch_leases_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_LEASE_CHECK_SECONDS)
            for pool in self._pools():
                try:
                    await pool.watch.notice_lost()
                    await pool.watch.reap_expired()
                    await pool.watch.check_ages()
                    await pool.keeper.trim()
                except CoordinatorUnavailableError as error:
                    _log.warning("%s: cannot check its leases: %s", pool.name, error)
                except (PoolManagerError, OSError):
                    _log.exception("%s: cannot check its leases; tried again in %g s", pool.name, _LEASE_CHECK_SECONDS)


async def _drop_quarantined_trees(pool: RepoPool) -> None:
    await pool.keeper.drop_quarantined_trees()


async def _trim(pool: RepoPool) -> None:
    await pool.keeper.trim()
