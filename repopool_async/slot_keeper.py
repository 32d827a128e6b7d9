"""Keeps a pool's slots: makes them, brings them back after a lease, mends and removes them.

Every slot it works on is held (its lock is ours) from before the first step until its record says AVAILABLE, ERROR or
nothing; interrupted anywhere it leaves a slot without a lock that is not AVAILABLE, which is what recovery looks for.
Who waits for slots is not its business; it only says that something changed.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Final

import attrs

from repopool_async._aio import Deadline, TaskSet, shielded, together
from repopool_async._clock import boottime, now
from repopool_async.components import PoolContext
from repopool_async.coordination.base import Hold
from repopool_async.disk_full import is_passing
from repopool_async.exceptions import (
    CleanupError,
    ConfigError,
    CoordinatorUnavailableError,
    FencedError,
    GitOperationError,
    HostUnreachableError,
    LeaseLostError,
    PoolManagerError,
    SlotInUseError,
    SlotNotFoundError,
    StoreError,
)
from repopool_async.fencing import guard_of, leave, leave_and
from repopool_async.host_chores import HostChores
from repopool_async.hosts.upkeep import upkeep
from repopool_async.models import CleanupResult, LeaseEnd, Slot, SlotState
from repopool_async.open_leases import describe_holder
from repopool_async.slot_allocator import available, broken
from repopool_async.slot_cleaner import Left, SlotCleaner
from repopool_async.slot_maker import Site, SlotMaker, standing
from repopool_async.workspaces.base import Checkout

_log: Final = logging.getLogger("repopool")

_RETRY_SECONDS: Final = 0.1
_WATCH_SECONDS: Final = 0.1
"""How often a cleaner looks whether its slot was taken away."""

_Work = Callable[[Checkout, Left | None], Awaitable[CleanupResult]]
"""What is to be done to a slot that shall show something then, given what was seen of it already."""


class SlotKeeper:
    """The upkeep of one pool's slots."""

    def __init__(self, context: PoolContext) -> None:
        self.last_recovery = float("-inf")
        self.chores: Final = HostChores(context)
        self._pool = context
        self._maker = SlotMaker(context)
        self._returning: dict[str, asyncio.Task[None]] = {}
        self._holds: dict[str, Hold] = {}
        self._unclean: list[tuple[Hold, Slot]] = []
        self._target: int | None = None
        self._makers = 0
        self._tasks = TaskSet(f"pool-{context.name}", on_error=self._task_failed)

    @property
    def returning(self) -> Mapping[str, "asyncio.Task[None]"]:
        """The slots this process is cleaning, by id."""
        return self._returning

    async def wait_clean(self) -> None:
        """Wait until no slot is being cleaned by this process."""
        while self._returning:
            await asyncio.wait(list(self._returning.values()))

    async def stop(self) -> None:
        """Interrupt every cleaning; what is unfinished is left, unlocked, to recovery."""
        await self._tasks.cancel()
        abandon = self._pool.parts.coordinator.abandon_hold
        left = list(self._holds.values())  # of tasks cancelled before their first step
        await shielded(together(*[partial(abandon, hold) for hold in left]), name="abandon")
        self._holds.clear()
        self._unclean.clear()
        self._returning.clear()

    # -- the way back to AVAILABLE -------------------------------------------------------------------------------

    def clean_later(self, hold: Hold, slot: Slot) -> None:
        """Clean a held slot in the background and make it AVAILABLE (or quarantine it)."""

        def clean(checkout: Checkout, left: Left | None) -> Awaitable[CleanupResult]:
            return self._cleaner(slot).cleanup_after_release(slot, checkout, left=left)

        self._settle_later(hold, slot, clean, looks=not self._is_due(slot.unsaved))  # what is to be saved comes first

    def recover_later(self, hold: Hold, slot: Slot) -> None:
        """Clean a held slot whose owner died, or was lost, in the background; its work is saved first."""
        self._settle_later(hold, slot, lambda checkout, _: self._cleaner(slot).recover(slot, checkout))

    def clean_when_wanted(self, hold: Hold, slot: Slot) -> None:
        """Keep a held slot as it was given back until somebody waits for a slot (`clean_on_release: false`)."""
        if self._target is not None:
            self.clean_later(hold, slot)  # it may be one that goes
            return
        self._holds[slot.slot_id] = hold
        self._unclean.append((hold, slot))

    def clean_wanted(self) -> bool:
        """Begin to clean what was kept back; return whether there was any."""
        kept_back, self._unclean = self._unclean, []
        for hold, slot in kept_back:
            self.clean_later(hold, slot)
        return bool(kept_back)

    def _settle_later(self, hold: Hold, slot: Slot, work: _Work, *, looks: bool = False) -> None:
        self._holds[slot.slot_id] = hold
        task = self._tasks.spawn(self._settle(hold, slot, work, looks=looks), name=f"clean-{slot.slot_id}")
        self._returning[slot.slot_id] = task

    async def _settle(self, hold: Hold, slot: Slot, work: _Work, *, looks: bool = False) -> None:
        """Clean, make or repair a held slot and record what became of it; interrupted, leave it to recovery.

        Args:
            looks: whether to end its lease, and to look at what that left, together with leaving the slot on its host.
        """
        left: Left | None = None
        try:
            async with self._pool.hosts.expected_to_answer(slot.host_id):
                parts = self._pool.parts.of(slot)
                if parts.is_here:
                    # Before its turn: who still runs is found out once for all slots that come back together, and one
                    # that is slow to end keeps no other slot waiting.
                    slot, left = await self._leave(hold, ends=slot if looks else None)
                async with parts.cleaning:
                    if not parts.is_here:  # where asking costs more than looking, the tree is looked at as well
                        slot, left = await self._leave(hold, ends=slot if looks else None, looks=True)
                    await self._pool.require_fit(slot.host_id)
                    with upkeep(guard_of(slot)):
                        slot, result = await self._do(hold, slot, work, left)
            if slot.slot_id in await self._surplus():  # only now: nothing of its lease runs, what was to be saved is
                with upkeep(guard_of(slot)):
                    await self._remove_held(hold)
                return
            assert result.seal is not None
            await self._pool.parts.coordinator.finish(hold, available(slot, result.seal, now()))
            self._pool.parts.emit("slot.available", {"slot_id": slot.slot_id, "seconds": result.duration_seconds})
        except (PoolManagerError, OSError, TimeoutError) as error:
            # Fenced off, the slot is somebody else's; or its host was started anew, and wants it entered again. That
            # its host has no such user (any more) says nothing of the slot.
            is_elsewhere = isinstance(error, HostUnreachableError | FencedError)
            if is_passing(error) or is_elsewhere or self._pool.refusal(slot.host_id) is not None:
                await self._postpone(hold, slot, error)
            else:
                await self.quarantine(hold, slot, error)
        except BaseException:
            await shielded(self._pool.parts.coordinator.abandon_hold(hold), name=f"abandon-{slot.slot_id}")
            raise
        finally:
            # Where the slot was taken away, another task of ours may be at it by now.
            if self._returning.get(slot.slot_id) is asyncio.current_task():
                self._returning.pop(slot.slot_id)
            if self._holds.get(slot.slot_id) is hold:
                self._holds.pop(slot.slot_id)
            self._pool.changed.set()

    async def _leave(self, hold: Hold, *, ends: Slot | None = None, looks: bool = False) -> tuple[Slot, Left | None]:
        parts = self._pool.parts.of(hold.slot)
        if ends is None:
            return await leave(parts.host, self._pool.parts.coordinator, hold), None
        ending = await parts.cleaner.ending(ends, looks=looks)
        slot, left = await leave_and(parts.host, self._pool.parts.coordinator, hold, ending)
        return slot, None if self._is_due(slot.unsaved) else left

    async def _do(self, hold: Hold, slot: Slot, work: _Work, left: Left | None) -> tuple[Slot, CleanupResult]:
        async with self._while_it_stands(hold):
            slot, work = await self._save_work(hold, slot, work)
            async with asyncio.timeout(self._pool.options.cleanup_timeout):
                return slot, await work(await standing(self._pool, slot), left)

    @asynccontextmanager
    async def _while_it_stands(self, hold: Hold) -> AsyncIterator[None]:
        """Interrupt the block, with `LeaseLostError`, where the slot is taken away: whoever did is in the tree now."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                watcher = self._tasks.spawn(self._watch(hold, limit), name=f"watch-{hold.slot.slot_id}")
                try:
                    yield
                finally:
                    watcher.cancel()
        except TimeoutError:
            if not limit.expired():
                raise
            raise LeaseLostError(
                f"{hold.slot.slot_id}: was taken away while being cleaned",
                slot_id=hold.slot.slot_id,
                repo_name=self._pool.name,
            ) from None

    async def _watch(self, hold: Hold, limit: asyncio.Timeout) -> None:
        held = Hold(hold.slot, hold.token, hold.lock)  # no longer a lease, which a grant is asked for
        coordinator = self._pool.parts.coordinator
        while True:
            await asyncio.sleep(max(_WATCH_SECONDS, coordinator.poll_seconds[0]))
            with suppress(CoordinatorUnavailableError):  # whoever takes it away meanwhile has to enter it on its host
                if not await coordinator.is_held(held):
                    limit.reschedule(0)
                    return

    async def interrupt(self, slot_id: str) -> None:
        """End this process's cleaning of a slot that was taken away."""
        task = self._returning.get(slot_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _save_work(self, hold: Hold, slot: Slot, work: _Work) -> tuple[Slot, _Work]:
        """Save what the last lease left, where that is due, and return what to go on with.

        What cannot be saved is moved aside as it is, and the tree made anew: neither is work lost nor the slot blocked.
        """
        if not self._is_due(slot.unsaved):
            return slot, work
        salvage = self._pool.parts.of(slot).salvage
        about = {"slot_id": slot.slot_id, "lease_id": slot.lease.lease_id if slot.lease else None}
        try:
            async with asyncio.timeout(self._pool.options.cleanup_timeout):
                await self._cleaner(slot).end_lease(slot)
                record = await salvage.save(slot, limit_bytes=self._pool.options.salvage_limit)
        except HostUnreachableError:
            raise  # nothing was lost, and all of it is there when the host is
        except Exception as error:  # noqa: BLE001 - whatever it is, the work must be kept and the slot must go on
            # Where the slot was taken away, this raises: the tree is another's now.
            await self._pool.parts.coordinator.update(hold, slot)
            path = await salvage.set_aside(slot, error)
            self._pool.parts.emit(
                "slot.salvage_failed", {**about, "error": str(error) or type(error).__name__, "path": path}
            )
            work = self._making_anew(slot)
        else:
            if record is not None:
                self._pool.parts.emit(
                    "slot.salvaged", {**about, "salvage_id": record.salvage_id, "skipped": record.skipped}
                )
        return await self._pool.parts.coordinator.update(hold, attrs.evolve(slot, unsaved=None)), work

    def _is_due(self, unsaved: str | None) -> bool:
        match self._pool.options.salvage:
            case "never":
                return False
            case "always":
                return unsaved is not None
            case _:
                return unsaved not in (None, LeaseEnd.RETURNED)

    def _cleaner(self, slot: Slot) -> SlotCleaner:
        return self._pool.parts.of(slot).cleaner

    def _making_anew(self, slot: Slot) -> _Work:
        return lambda checkout, _: self._cleaner(slot).repair_slot(slot, checkout)

    async def quarantine(self, hold: Hold, slot: Slot, error: BaseException) -> None:
        """Isolate a held slot with the reason (9.5) and let go of it."""
        reason = str(error) or f"not finished within {self._pool.options.cleanup_timeout:g} s (cleanup_timeout)"
        try:
            # The token may have been raised since the record was read.
            slot = attrs.evolve(slot, token=hold.token)
            await self._pool.parts.coordinator.finish(hold, broken(slot, reason))
        except LeaseLostError:
            _log.warning("%s: was taken away while being cleaned", slot.slot_id)
        except StoreError as failure:
            await self._postpone(hold, slot, failure)
        else:
            self._pool.parts.emit("slot.quarantined", {"slot_id": slot.slot_id, "reason": reason})

    async def _postpone(self, hold: Hold, slot: Slot, error: BaseException) -> None:
        """Let go of a slot that cannot be cleaned or recorded now; recovery tries again, by whomever."""
        _log.warning("%s: left to recovery: %s", slot.slot_id, error)
        self._pool.parts.emit("slot.postponed", {"slot_id": slot.slot_id, "reason": str(error)})
        await shielded(self._pool.parts.coordinator.abandon_hold(hold), name=f"postpone-{slot.slot_id}")

    # -- making, mending, removing -------------------------------------------------------------------------------

    async def resize(self, num_slots: int) -> None:
        """Add or remove slots until there are `num_slots`; raises `SlotInUseError` where too many are leased."""
        slots = await self._pool.parts.coordinator.list_slots(self._pool.name)
        free_first = sorted(slots, key=lambda slot: (slot.state is SlotState.ALLOCATED, -slot.number))
        for slot in free_first[: max(0, len(slots) - num_slots)]:
            with suppress(SlotNotFoundError):  # another process was faster
                await self.remove_slot(slot.slot_id)
        await self.fill(num_slots)

    async def shrink_to(self, num_slots: int) -> None:
        """Remove the slots beyond the first `num_slots`; those that are busy go when they come back.

        Which ones these are follows from their numbers alone, so several processes may do this at once.
        """
        self._target = num_slots
        await self.trim()

    def keep_all(self) -> None:
        """Let the slots stay that `shrink_to` has not removed yet."""
        self._target = None

    @property
    def is_shrinking(self) -> bool:
        """Whether slots that `shrink_to` shall remove are still there."""
        return self._target is not None

    async def trim(self) -> list[str]:
        """Remove those of the slots that `shrink_to` left because they were busy and that are not any more."""
        removed = []
        for slot_id in await self._surplus():
            with suppress(SlotNotFoundError):  # another process was faster
                hold = await self._pool.parts.coordinator.take(
                    slot_id, states=frozenset(SlotState) - {SlotState.ALLOCATED}, becomes=SlotState.CLEANING
                )
                if hold is not None:
                    await self._save_and_remove(hold)
                    removed.append(slot_id)
        await self._surplus()  # which notes when none is left
        return removed

    async def _surplus(self) -> list[str]:
        if not self.is_shrinking:
            return []
        slots = await self._pool.parts.coordinator.list_slots(self._pool.name)
        target = self._target  # only now: it may have changed meanwhile
        surplus = [slot.slot_id for slot in slots[target:]] if target is not None else []
        if not surplus:
            self._target = None
        return surplus

    async def check(self) -> dict[str, list[str]]:
        """Verify the mirror and every AVAILABLE slot by looking at all of it, and repair what something is wrong with.

        What stood on a mirror that had to be made anew counts as wrong too.
        """
        found = await self.chores.check_mirrors()
        for slot in await self._pool.parts.coordinator.list_slots(self._pool.name):
            problems = [] if self._pool.is_out(slot.host_id) else await self._check_slot(slot.slot_id)
            if problems:
                found[slot.slot_id] = problems
        return found

    async def taken_among(self, slot_ids: Collection[str]) -> set[str]:
        """Return those of the slots that somebody alive works on, or has leased."""
        return await self._pool.parts.coordinator.taken_among(slot_ids)

    async def _check_slot(self, slot_id: str) -> list[str]:
        hold = await self._take(slot_id, SlotState.AVAILABLE)
        if hold is None:
            return []
        problems: list[str] = []
        try:
            problems += await self._verify(hold.slot)
            if problems:
                await self._pool.parts.coordinator.update(hold, attrs.evolve(hold.slot, state=SlotState.CLEANING))
                await self._repair(hold)
        except (CleanupError, GitOperationError) as error:  # the others still want to be looked at
            problems.append(str(error))
        finally:
            await shielded(self._pool.parts.coordinator.abandon_hold(hold), name=f"check-{slot_id}")
        return problems

    async def _verify(self, slot: Slot) -> Sequence[str]:
        """Look at a free slot as whoever cleaned it last; one that nobody had yet has no fence."""
        with upkeep(guard_of(slot)) if slot.token else nullcontext():
            try:
                return await self._cleaner(slot).verify_slot_integrity(slot)
            except FencedError as error:  # somebody was there of whom the records do not tell, or the host was rebooted
                return [str(error)]

    async def drain(self) -> None:
        """Make the trees of all unleased slots anew."""
        for slot in await self._pool.parts.coordinator.list_slots(self._pool.name):
            if slot.state is not SlotState.ALLOCATED and not self._pool.is_out(slot.host_id):
                with suppress(SlotInUseError, SlotNotFoundError):  # it has just been leased or removed
                    await self.repair_slot(slot.slot_id)

    async def fill(self, num_slots: int) -> None:
        """Make the slots that are missing, side by side; raises the first failure.

        Those of a host that stops answering meanwhile are made on the others.
        """
        with self.making_slots():
            while missing := num_slots - len(await self._pool.parts.coordinator.list_slots(self._pool.name)):
                if missing < 0:
                    return
                sites = await self._maker.sites(missing)
                await self.chores.make_mirrors({site.host_id for site in sites})
                await together(*[partial(self._make_if_reached, site) for site in sites])

    @property
    def is_making_slots(self) -> bool:
        """Whether this process makes the pool have more slots now."""
        return self._makers > 0

    @contextmanager
    def making_slots(self) -> Iterator[None]:
        """Have whoever finds no slot wait for those that come during the block."""
        self._makers += 1
        try:
            yield
        finally:
            self._makers -= 1
            self._pool.changed.set()

    async def _make_if_reached(self, site: Site) -> None:
        try:
            await self._maker.make(site)
        except (HostUnreachableError, ConfigError) as error:
            is_known = isinstance(error, HostUnreachableError) or self._pool.refusal(site.host_id) is not None
            if not is_known:  # otherwise its host is suspect or unfit now, so that no site will be there
                raise

    async def add_slot(self) -> Slot:
        """Make one more slot (7.1, 7.2) and return it AVAILABLE.

        Raises:
            GitOperationError, CleanupError, OSError: it could not be made; nothing of it is left.
            HostUnreachableError: the host where it was to be does not answer (any more). SlotAllocationError: the hosts
            cannot hold more.
        """
        (site,) = await self._maker.sites(1)
        await self.chores.make_mirrors([site.host_id])
        return await self._maker.make(site)

    async def remove_slot(self, slot_id: str, *, saves_work: bool = True) -> None:
        """Delete an unleased slot, directory and all (7.3 to 7.5).

        Args:
            saves_work: whether what a lessee that ended badly left there is saved first.

        Raises:
            SlotInUseError: it is leased (7.4). SlotNotFoundError: there is none. TimeoutError: it was busy too long.
        """
        hold = await self._hold(slot_id)
        await (self._save_and_remove(hold) if saves_work else self._remove_held(hold))

    async def _save_and_remove(self, hold: Hold) -> None:
        """Delete a held slot, once what a lessee that ended badly left there is saved; the saver may have died."""
        try:
            slot = await self._left(hold)
            with upkeep(guard_of(slot)):
                await self._save_work(hold, slot, self._making_anew(slot))
        except BaseException:
            await shielded(self._pool.parts.coordinator.abandon_hold(hold), name=f"abandon-{hold.slot.slot_id}")
            raise
        with upkeep(guard_of(slot)):
            await self._remove_held(hold)

    async def _left(self, hold: Hold) -> Slot:
        """Leave a held slot on its host, where that answers; what lies on another is deleted when it does."""
        if not self._pool.hosts.is_out(hold.slot.host_id):
            with suppress(HostUnreachableError):
                return (await self._leave(hold))[0]
        return hold.slot

    async def _remove_held(self, hold: Hold) -> None:
        slot_id = hold.slot.slot_id
        await shielded(self._maker.unmake(hold), name=f"remove-{slot_id}")
        self._pool.parts.emit("slot.removed", {"slot_id": slot_id})
        self._pool.changed.set()

    async def repair_slot(self, slot_id: str) -> CleanupResult:
        """Make a slot's tree anew, whatever state it is in, unless it is leased (9.5).

        Raises:
            SlotInUseError: it is leased. CleanupError: it is beyond repair and stays quarantined.
        """
        return await self._repair(await self._hold(slot_id))

    async def repair_later(self, slot_id: str) -> bool:
        """Begin to repair a quarantined slot in the background; False where it is not quarantined or busy."""
        hold = await self._take(slot_id, SlotState.ERROR, becomes=SlotState.CLEANING)
        if hold is None:
            return False
        slot = attrs.evolve(hold.slot, error=None)
        self._settle_later(hold, slot, self._making_anew(slot))
        return True

    async def drop_quarantined_trees(self) -> list[str]:
        """Delete the trees of quarantined slots, which a repair makes anew; return the slots' ids.

        One with work in it that has not been saved stays.
        """
        dropped = []
        for slot in await self._pool.parts.coordinator.list_slots(self._pool.name):
            if self._pool.hosts.is_out(slot.host_id):
                continue
            hold = await self._take(slot.slot_id, SlotState.ERROR)
            if hold is None:
                continue
            try:
                left, _ = await self._leave(hold)
                if not self._is_due(left.unsaved):
                    with upkeep(guard_of(left)):
                        await self._pool.parts.of(slot).host.remove_tree(slot.path)
                    dropped.append(slot.slot_id)
            finally:
                await shielded(self._pool.parts.coordinator.abandon_hold(hold), name=f"drop-{slot.slot_id}")
        return dropped

    async def _repair(self, hold: Hold) -> CleanupResult:
        outcome: list[CleanupResult] = []

        async def repair(checkout: Checkout, _: Left | None) -> CleanupResult:
            outcome.append(await self._cleaner(hold.slot).repair_slot(hold.slot, checkout))
            return outcome[0]

        await self._settle(hold, hold.slot, repair)
        if not outcome:
            slot = await self._pool.parts.coordinator.get_slot(hold.slot.slot_id)
            reason = slot.error or self._pool.refusal(slot.host_id)
            raise CleanupError(
                f"{slot.slot_id}: could not be repaired: {reason}", slot_id=slot.slot_id, repo_name=self._pool.name
            )
        return outcome[0]

    async def _take(self, slot_id: str, state: SlotState, *, becomes: SlotState | None = None) -> Hold | None:
        """Take a slot in a state; None where it is in another, busy, or has just been removed."""
        with suppress(SlotNotFoundError):
            return await self._pool.parts.coordinator.take(slot_id, states={state}, becomes=becomes)
        return None

    async def _hold(self, slot_id: str) -> Hold:
        """Take an unleased slot for maintenance, waiting for a cleaning under way."""
        deadline = Deadline.after(self._pool.options.lock_timeout)
        while True:
            slot = await self._pool.parts.coordinator.get_slot(slot_id)
            if slot.state is SlotState.ALLOCATED:
                raise SlotInUseError(
                    f"{slot_id}: is leased; {describe_holder(slot)}", slot_id=slot_id, repo_name=self._pool.name
                )
            task = self._returning.get(slot_id)
            if task is not None:
                async with deadline.limit():
                    await asyncio.wait([task])
            hold = await self._pool.parts.coordinator.take(
                slot_id, states=frozenset(SlotState) - {SlotState.ALLOCATED}, becomes=SlotState.CLEANING
            )
            if hold is not None:
                return hold
            async with deadline.limit():
                await asyncio.sleep(_RETRY_SECONDS * random.random())  # noqa: S311 - jitter of a poll

    async def recover(self) -> list[str]:
        """Take over slots whose owner died, clean them in the background, and return their ids."""
        self.last_recovery = boottime()
        recovered = []
        for orphan in await self._pool.parts.coordinator.orphans(self._pool.name):
            if self._pool.is_out(orphan.host_id):
                continue  # it could not be cleaned there
            hold = None
            with suppress(SlotNotFoundError):  # somebody else has just finished deleting it
                hold = await self._pool.parts.coordinator.recover_orphan(orphan.slot_id)
            if hold is not None:
                recovered.append(orphan.slot_id)
                self._pool.parts.emit(
                    "slot.recovered", {"slot_id": orphan.slot_id, "lease": orphan.lease and orphan.lease.lease_id}
                )
                self.recover_later(hold, hold.slot)
        return recovered

    def _task_failed(self, name: str, error: BaseException) -> None:
        _log.error("%s: background task %s failed", self._pool.name, name, exc_info=error)
        self._pool.parts.emit("pool.task_failed", {"repo_name": self._pool.name, "task": name, "error": str(error)})
