"""One repository's life: its queue and its leases.

Follow one lease from `RepoPool.lease`: resolve the ref, wait for the turn, claim a slot, prepare it, hand it out; then
end the lease and hand the slot to the keeper, which cleans it. What a slot is made of, how it is cleaned and where its
state lives are the business of the floors below; names of pools, configuration and closing that of the manager above.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from enum import Enum
from typing import Any, Final, NoReturn

import attrs

from repopool_async import origins
from repopool_async._aio import Deadline, Interruptions, shielded
from repopool_async._clock import boottime
from repopool_async._git_arguments import validate_branch_name
from repopool_async._identity import boot_id, new_lease_id
from repopool_async.components import Components, PoolContext
from repopool_async.config import PoolOptions
from repopool_async.coordination.base import Grant
from repopool_async.disk_full import is_passing, passing_told
from repopool_async.exceptions import (
    CleanupError,
    LeaseLostError,
    ManagerClosedError,
    PoolInUseError,
    PoolManagerError,
    PoolNotFoundError,
    PoolTimeoutError,
    SlotAllocationError,
    SlotInUseError,
    SlotNotFoundError,
    StoreError,
    TooManyRequestsError,
)
from repopool_async.lease import LeasedSlot
from repopool_async.mirror import Mirror
from repopool_async.models import Lease, LeaseEnd, Pool, PoolSummary, ResolvedRef, Slot, SlotState
from repopool_async.origins import Origin
from repopool_async.salvage import Salvage
from repopool_async.slot_keeper import SlotKeeper, describe_holder
from repopool_async.wait_queue import WaitQueue
from repopool_async.workspaces.base import Checkout

_log: Final = logging.getLogger("repopool")

_POLL_SECONDS: Final = (0.002, 0.1)
_STALE_WAIT_SECONDS: Final = 1.0
"""After waiting longer than this for a slot, the remote is asked again, so that a lessee gets what is new by then."""
_RECOVERY_SECONDS: Final = 1.0
"""How often the head of the queue looks for slots of dead owners while it waits."""


class Unset(Enum):
    """Tells a time-out that was not given from None, which means no limit."""

    TIMEOUT = "the configured acquire_timeout"


@attrs.define(eq=False)
class _Open:
    """A lease of this process that has not ended."""

    grant: Grant
    leased: LeasedSlot
    started: float
    origin: Origin
    is_leak_told: bool = False


class RepoPool:
    """The slots of one repository. Made by `PoolManager`; see `PoolManager` for the verbs that name a pool."""

    def __init__(self, pool: Pool, options: PoolOptions, parts: Components) -> None:
        self._context = PoolContext(pool, options, parts)
        self._queue = WaitQueue()
        self._changed = self._context.changed
        self._open: dict[str, _Open] = {}
        self._giving = 0
        self.keeper: Final = SlotKeeper(self._context)
        self._is_closing = False
        self._is_retired = False
        self._waiting: set[asyncio.Task[Any]] = set()
        self._attempts = Interruptions()
        self._former: list[Mirror] = []

    @property
    def record(self) -> Pool:
        """What is stored of the pool."""
        return self._context.record

    @property
    def options(self) -> PoolOptions:
        """What is in force."""
        return self._context.options

    @property
    def _parts(self) -> Components:
        return self._context.parts

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.record.repo_name

    @property
    def salvage(self) -> Salvage:
        """What lessees that ended badly left unpushed."""
        return self._parts.salvage

    def __repr__(self) -> str:
        return (
            f"<RepoPool {self.name!r} [slots: {self.record.num_slots} | leased: {len(self._open)} here, "
            f"cleaning: {len(self.keeper.returning)} | waiting: {len(self._queue)}]>"
        )

    # -- leasing -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(
        self,
        *,
        ref: str | None = None,
        timeout: float | Unset | None = Unset.TIMEOUT,
        new_branch: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> AsyncIterator[LeasedSlot]:
        """Hold a clean slot at a ref while the block runs.

        Args:
            ref: a branch, tag, commit id or full name; the pool's `default_ref`, else the remote's, where missing.
            timeout: seconds for queueing, fetch and check-out together; the configured `acquire_timeout` where missing,
                None for no limit, 0 for one try.
            new_branch: make this local branch at the commit and check it out.
            metadata: anything JSON can hold; it shows in status and history.
            priority: the higher goes first.

        Raises:
            PoolTimeoutError: the time was not enough. TooManyRequestsError: `max_waiting` others wait already.
            UnknownRefError, RefError: there is no such ref. GitOperationError: the remote could not be asked.
            SlotAllocationError: every slot is quarantined. LeaseLostError: on leaving, where it had been taken away.

        Leaving the block ends the lease at once; the slot is cleaned in the background unless the pool says
        `cleanup: inline`. An error in the block never prevents that and is never hidden by it. Cancelled anywhere, the
        slot goes back.
        """
        seconds = self.options.acquire_timeout if timeout is Unset.TIMEOUT else timeout
        opened = await self._acquire(
            ref=ref, timeout=seconds, new_branch=new_branch, metadata=metadata or {}, priority=priority
        )
        try:
            yield opened.leased
        except BaseException as error:
            await self._give_back_after(opened, error)
            raise
        else:
            await self.give_back(opened.leased, inline=self.options.cleanup == "inline")

    async def allocate(
        self,
        *,
        ref: str | None = None,
        timeout: float | None = 0,
        metadata: Mapping[str, Any] | None = None,
        ttl: float | None = None,
    ) -> LeasedSlot | None:
        """Take a slot and keep it until `give_back`; None where none became free in time.

        Args:
            ttl: seconds until the lease expires unless renewed; it then outlives this process, and whoever knows slot
                id and token may renew and release it. None for a lease that lives with this process.

        A slot that is being cleaned right now is waited for, whatever the timeout. Raises as `lease` does, but for the
        time-out.
        """
        try:
            opened = await self._acquire(
                ref=ref,
                timeout=timeout,
                new_branch=None,
                metadata=metadata or {},
                priority=0,
                waits_for_cleaning=True,
                ttl=ttl,
            )
        except PoolTimeoutError as error:
            if error.phase == "queue":
                return None
            raise
        return opened.leased

    async def give_back(self, leased: LeasedSlot, *, inline: bool = True) -> None:
        """End a lease of this process; a second call does nothing.

        Args:
            inline: return only once the slot is clean and AVAILABLE (or quarantined).

        Raises:
            LeaseLostError: it had been taken away; nothing of the slot was touched.
        """
        self._giving += 1  # closing waits: between lease and cleaning the slot is in neither list
        try:
            await shielded(self._give_back(leased, inline=inline), name=f"return-{leased.slot_id}")
        finally:
            self._giving -= 1
            self._changed.set()

    async def _give_back(self, leased: LeasedSlot, *, inline: bool) -> None:
        opened = self._open.pop(leased.lease_id, None)
        if opened is not None:
            leased._end()  # noqa: SLF001 - the pool is the one caller
            slot = await self._begin_return(opened.grant)
            self._parts.allocator.record_release(self.name, boottime() - opened.started)
            self._parts.emit("slot.released", {"slot_id": leased.slot_id, "lease_id": leased.lease_id})
            if self.options.clean_on_release:
                self.keeper.clean_later(opened.grant, slot)
            else:
                self.keeper.clean_when_wanted(opened.grant, slot)
            self._changed.set()
        task = self.keeper.returning.get(leased.slot_id)
        if inline and task is not None:
            await asyncio.wait([task])

    async def _begin_return(self, grant: Grant) -> Slot:
        try:
            return await self._parts.coordinator.begin_return(grant)
        except SlotNotFoundError as error:
            slot_id = grant.slot.slot_id
            raise LeaseLostError(
                f"{slot_id}: was taken away and deleted while leased", slot_id=slot_id, repo_name=self.name
            ) from error
        except StoreError:
            # It cannot be written that the lease ended: without its lock the slot is an orphan, and recovered.
            await self._parts.coordinator.abandon_hold(grant)
            raise

    async def release(self, slot_id: str, *, token: int | None) -> None:
        """End the lease of a slot by id and clean it; where it is not leased (any more), do nothing.

        Raises:
            LeaseLostError: the token is not the present lease's.
            SlotInUseError: the lease is another living process's, which alone may end it.
        """
        for opened in self._open.values():
            if opened.leased.slot_id == slot_id and token in (None, opened.leased.token):
                await self.give_back(opened.leased)
                return
        slot = await self._parts.coordinator.get_slot(slot_id)
        if token is not None and token != slot.token:
            raise LeaseLostError(
                f"{slot_id}: token {token} is not the present lease's; the lease has ended or was taken away",
                slot_id=slot_id,
                repo_name=self.name,
            )
        if (
            slot.state is SlotState.ALLOCATED
            and token is not None
            and slot.lease is not None
            and slot.lease.is_detached
        ):
            await shielded(self._release_detached(slot_id, token), name=f"return-{slot_id}")
        elif slot.state is SlotState.ALLOCATED:
            is_detached = slot.lease is not None and slot.lease.is_detached
            who = "who knows its token" if is_detached else "the process that took the lease"
            raise SlotInUseError(
                f"{slot_id}: only {who} may end the lease; {describe_holder(slot)}",
                slot_id=slot_id,
                repo_name=self.name,
            )

    async def _release_detached(self, slot_id: str, token: int) -> None:
        hold = await self._parts.coordinator.release_detached(slot_id, token)
        lease_id = hold.slot.lease.lease_id if hold.slot.lease else None
        self._parts.emit("slot.released", {"slot_id": slot_id, "lease_id": lease_id})
        self.keeper.clean_later(hold, hold.slot)
        self._changed.set()
        task = self.keeper.returning.get(slot_id)
        if task is not None:
            await asyncio.wait([task])

    async def renew(self, slot_id: str, token: int, ttl: float | None) -> Lease:
        """Move a detached lease's expiry to `ttl` seconds from now; None only confirms the lease.

        Raises:
            LeaseLostError: the token is not the present lease's, or that has expired. ValueError: the ttl is none.
        """
        return await self._parts.coordinator.renew(slot_id, token, ttl)

    async def force_unlock(self, slot_id: str) -> Slot:
        """Take a slot away from whoever holds it, and have it recovered in the background.

        The holder's next step fails with `LeaseLostError`; here its `lost` is set at once, elsewhere within two
        seconds. What it left is saved unless `salvage` is `never`.
        """
        slot = await self._parts.coordinator.force_unlock(slot_id)
        await self.notice_lost_leases()
        await self.keeper.recover()
        self._changed.set()
        return slot

    async def reap_expired_leases(self) -> None:
        """Recover the slots of detached leases that nobody renewed in time."""
        slots = await self._parts.coordinator.list_slots(self.name)
        if any(_is_expired(slot) for slot in slots):
            await self.keeper.recover()

    async def notice_lost_leases(self) -> None:
        """Set `lost` of every lease of this process that was taken away."""
        for opened in list(self._open.values()):
            if not opened.leased.lost.is_set() and not await self._parts.coordinator.is_held(opened.grant):
                opened.leased.lost.set()
                self._changed.set()
                self._parts.emit("lease.lost", {"slot_id": opened.leased.slot_id, "lease_id": opened.leased.lease_id})

    async def _give_back_after(self, opened: _Open, error: BaseException) -> None:
        try:
            await self.give_back(opened.leased, inline=self.options.cleanup == "inline")
        except PoolManagerError as failure:
            error.add_note(f"while giving back {opened.leased.slot_id}: {failure}")

    # -- taking --------------------------------------------------------------------------------------------------

    async def _acquire(
        self,
        *,
        ref: str | None,
        timeout: float | None,
        new_branch: str | None,
        metadata: Mapping[str, Any],
        priority: int,
        waits_for_cleaning: bool = False,
        ttl: float | None = None,
    ) -> _Open:
        if new_branch is not None:
            validate_branch_name(new_branch)
        self._refuse_if_closing()
        wanted = ref if ref is not None else self.options.default_ref
        attempt = _Attempt(wanted, new_branch, metadata, priority, timeout, waits_for_cleaning, ttl)
        attempt.origin = origins.here(is_whole=self.options.leak_warning is not None)
        self._parts.allocator.record_request(self.name)
        try:
            with passing_told(self.name):
                async with self._attempts.allowed(attempt.deadline.remaining(), _closed(self.name)):
                    return await self._try(attempt)
        except PoolTimeoutError:
            self._parts.allocator.record_timeout(self.name)
            raise
        except TimeoutError:
            self._parts.allocator.record_timeout(self.name)
            raise await self._timed_out(attempt) from None

    async def _try(self, attempt: "_Attempt") -> _Open:
        resolved = await self._resolve(attempt.ref)
        while True:
            attempt.phase = "queue"
            grant = await self._claim_in_turn(attempt, resolved)
            try:
                attempt.phase = "fetch"
                if boottime() - attempt.started > _STALE_WAIT_SECONDS:
                    resolved = await self._resolve(attempt.ref)
                attempt.phase = "checkout"
                opened = await self._hand_out(attempt, grant, resolved)
            except BaseException as error:
                await shielded(self._take_back(grant, error), name=f"take-back-{grant.slot.slot_id}")
                if not isinstance(error, CleanupError) or is_passing(error):
                    raise
                attempt.priority = attempt.retry_priority  # the lessee never sees a bad slot, nor queues again for it
            else:
                return opened

    async def _resolve(self, ref: str | None) -> ResolvedRef:
        mirror = self._parts.mirror
        fetched = False
        if self.options.fetch_on_allocate:
            fetched = await mirror.refresh(max_age=self.options.fetch_max_age)
        try:
            return await mirror.resolve(ref)
        except LookupError:
            if fetched or not self.options.fetch_on_allocate:
                raise
            await mirror.fetch()  # what we served from may be older than the ref
            return await mirror.resolve(ref)

    async def _claim_in_turn(self, attempt: "_Attempt", resolved: ResolvedRef) -> Grant:
        self._refuse_if_too_many()
        async with self._noted_as_waiting(), self._queue.turn(attempt.priority):
            grant = await self._claim(attempt, resolved)
            if grant is not None:
                return grant
            if self.keeper.clean_wanted():
                attempt.waits_for_cleaning = True  # even one try: the slot is free, it only was not cleaned yet
            elif self.options.max_waiting == 0:
                self._too_many()
            return await self._claim_when_free(attempt, resolved)

    async def _claim_when_free(self, attempt: "_Attempt", resolved: ResolvedRef) -> Grant:
        """Poll for other processes' releases (our own wake us), in order of the processes' tickets."""
        delay = _POLL_SECONDS[0]
        async with self._parts.coordinator.ticket(self.name) as ticket:
            while True:
                self._refuse_if_closing()
                self._changed.clear()
                if await ticket.is_first():
                    grant = await self._claim(attempt, resolved, has_ticket=True)
                    if grant is not None:
                        return grant
                await self._look_around(attempt)
                await self._wait_for_change(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                delay = min(delay * 2, _POLL_SECONDS[1])

    async def _claim(self, attempt: "_Attempt", resolved: ResolvedRef, *, has_ticket: bool = False) -> Grant | None:
        return await self._parts.coordinator.claim(
            self.name,
            commit=resolved.commit,
            branch=resolved.branch,
            ref=resolved.asked,
            lease_id=new_lease_id(),
            metadata=attempt.metadata,
            detached_ttl=attempt.ttl,
            wait_seconds=boottime() - attempt.started,
            stand_back=not has_ticket,
        )

    async def _look_around(self, attempt: "_Attempt") -> None:
        """While nothing is free: recover what dead owners left, and give up where waiting cannot help."""
        if boottime() - self.keeper.last_recovery > _RECOVERY_SECONDS:
            await self.keeper.recover()
        slots = await self._parts.coordinator.list_slots(self.name)
        if all(slot.state is SlotState.ERROR for slot in slots):
            reasons = "; ".join(f"{slot.slot_id}: {slot.error}" for slot in slots) or "it has none"
            raise SlotAllocationError(
                f"{self.name}: no slot can be leased ({reasons}); repair_slot makes one usable again",
                repo_name=self.name,
            )
        self._tell_deadlock(attempt, slots)
        # A cleaning may have ended since the claim found nothing: then the next claim will find it.
        is_cleaning = any(slot.state in (SlotState.CLEANING, SlotState.AVAILABLE) for slot in slots)
        if attempt.timeout == 0 and not (attempt.waits_for_cleaning and (is_cleaning or self.keeper.returning)):
            raise await self._timed_out(attempt, slots)

    async def _wait_for_change(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _hand_out(self, attempt: "_Attempt", grant: Grant, resolved: ResolvedRef) -> _Open:
        checkout = Checkout(
            commit=resolved.commit,
            branch=attempt.new_branch or resolved.branch,
            is_tracking=attempt.new_branch is None,
        )
        result = await self._parts.cleaner.cleanup_before_allocation(grant.slot, checkout)
        lease = attrs.evolve(grant.lease, ref=resolved.asked, commit=checkout.commit, branch=checkout.branch)
        if (lease, result.seal) != (grant.lease, grant.slot.seal):
            slot = attrs.evolve(grant.slot, lease=lease, seal=result.seal, last_branch=resolved.branch)
            grant.slot = await self._parts.coordinator.update(grant, slot)
            grant.lease = lease
        if attempt.ttl is not None:
            lease = await self._parts.coordinator.detach(grant)
        waited = boottime() - attempt.started
        self._parts.allocator.record_allocation(self.name, waited, warm="warm" in result.steps)
        self._parts.emit(
            "slot.allocated", {"slot_id": grant.slot.slot_id, "lease_id": lease.lease_id, "wait_seconds": waited}
        )
        return self._opened(grant, attempt.origin)

    def _opened(self, grant: Grant, origin: Origin) -> _Open:
        async def renew(ttl: float | None) -> Lease:
            return await self._parts.coordinator.renew(grant.slot.slot_id, grant.lease.token, ttl)

        parts, run_as = self._parts, self._parts.run_as
        leased = LeasedSlot(
            grant.slot,
            grant.lease,
            host=parts.lessee_host if run_as is None else run_as.host_for(grant.slot),
            git=parts.lessee_git if run_as is None else run_as.git_for(grant.slot),
            renew=renew,
            inherited=None if run_as is None else run_as.environment(grant.slot),
        )
        opened = _Open(grant, leased, boottime(), origin)
        self._open[grant.lease.lease_id] = opened
        return opened

    async def _take_back(self, grant: Grant, error: BaseException) -> None:
        """Undo a claim that did not become a lease: quarantine the slot where it is to blame, else clean it."""
        if isinstance(error, LeaseLostError):
            return
        if isinstance(error, CleanupError) and not is_passing(error):
            await self.keeper.quarantine(grant, grant.slot, error)
            return
        slot = await self._begin_return(grant)
        self.keeper.clean_later(grant, slot)

    async def _timed_out(self, attempt: "_Attempt", slots: list[Slot] | None = None) -> PoolTimeoutError:
        slots = slots if slots is not None else await self._parts.coordinator.list_slots(self.name)
        holders = tuple(self._describe_holder(slot) for slot in slots)
        deadlock = self._deadlock(slots) if attempt.phase == "queue" else ""
        waited = "at once" if attempt.timeout == 0 else f"within {attempt.timeout:g} s"
        what = {
            "queue": "no slot became free; raise the timeout or num_slots, or return slots sooner",
            "fetch": "the remote had not answered; raise the timeout or check the network",
            "checkout": "the check-out was not finished; raise the timeout",
        }[attempt.phase]
        what = deadlock or what
        listing = "".join(f"\n  {line}" for line in holders)
        return PoolTimeoutError(
            f"{self.name}: no lease {waited}: {what}{listing}",
            repo_name=self.name,
            timeout_seconds=attempt.timeout,
            phase=attempt.phase,
            holders=holders,
            is_self_wait=bool(deadlock),
        )

    # -- who waits for whom ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _noted_as_waiting(self) -> AsyncIterator[None]:
        task = asyncio.current_task()
        if task is None or task in self._waiting:
            yield
            return
        self._waiting.add(task)
        try:
            yield
        finally:
            self._waiting.discard(task)

    def _describe_holder(self, slot: Slot) -> str:
        """Say in one line who has a slot, and of a lease of this process where it was taken."""
        line = describe_holder(slot)
        opened = self._open.get(slot.lease.lease_id) if slot.lease is not None else None
        if opened is None or slot.state is not SlotState.ALLOCATED:
            return line
        return f"{line}, {boottime() - opened.started:.1f} s ago {opened.origin}"

    def _deadlock(self, slots: list[Slot]) -> str:
        """Say why waiting is in vain, where the waiting task holds a slot or the holders of all slots wait too."""
        mine = [opened for opened in self._open.values() if opened.origin.is_of(asyncio.current_task())]
        if mine:
            held = ", ".join(f"{opened.leased.slot_id} (taken at {opened.origin.where})" for opened in mine)
            return (
                f"this task already holds {held}: it waits for itself; give that back first, take both at once in "
                f"another pool, or raise num_slots"
            )
        if self._do_all_holders_wait(slots):
            return (
                "every slot is held by a task that itself waits for another slot of this pool: they wait for each "
                "other; let each take one slot, or raise num_slots"
            )
        return ""

    def _do_all_holders_wait(self, slots: list[Slot]) -> bool:
        opened = [self._open.get(slot.lease.lease_id) for slot in slots if slot.lease is not None]
        return len(opened) == len(slots) > 0 and all(
            one is not None and any(one.origin.is_of(task) for task in self._waiting) for one in opened
        )

    def _tell_deadlock(self, attempt: "_Attempt", slots: list[Slot]) -> None:
        """Tell at once of a wait that no time-out ends."""
        if attempt.timeout is not None or attempt.is_deadlock_told:
            return
        deadlock = self._deadlock(slots) if self._do_all_holders_wait(slots) else ""
        if deadlock:
            attempt.is_deadlock_told = True
            self._parts.emit("lease.deadlock", {"repo_name": self.name, "reason": deadlock})

    async def check_ages(self) -> None:
        """Tell of leases older than `leak_warning`, and end those older than `max_lease_seconds`."""
        for opened in list(self._open.values()):
            age = boottime() - opened.started
            warning, longest = self.options.leak_warning, self.options.max_lease_seconds
            if warning is not None and age >= warning and not opened.is_leak_told:
                opened.is_leak_told = True
                self._tell_leak(opened, age)
            if longest is not None and age >= longest and not opened.leased.lost.is_set():
                await self.expire(opened.grant.slot)

    def _tell_leak(self, opened: _Open, age: float) -> None:
        stack = opened.origin.formatted_stack()
        slot_id, lease_id = opened.leased.slot_id, opened.leased.lease_id
        ended = "; that task has ended" if opened.origin.has_ended else ""
        _log.warning(
            "%s: lease %s is %.0f s old; it was taken %s%s:\n%s", slot_id, lease_id, age, opened.origin, ended, stack
        )
        fields = {"slot_id": slot_id, "lease_id": lease_id, "seconds": age, "task": opened.origin.task_name}
        self._parts.emit("lease.leak", {**fields, "where": opened.origin.where, "stack": stack})

    async def expire(self, slot: Slot) -> bool:
        """Take a lease away that has lasted too long, whoever has it, and recover its slot; False where it has ended.

        Its processes are ended before the slot is cleaned, and a lessee of this process finds `lost` set.
        """
        if slot.lease is None or not await self._parts.coordinator.expire(slot.slot_id, slot.lease.token):
            return False
        await self.notice_lost_leases()
        await self.keeper.recover()
        return True

    def _refuse_if_closing(self) -> None:
        if self._is_closing:
            raise _closed(self.name)
        if self._is_retired:
            raise _retired(self.name)

    def _refuse_if_too_many(self) -> None:
        bound = self.options.max_waiting
        if bound is None:
            return
        in_use = len(self._open) + len(self.keeper.returning)
        if len(self._queue) >= bound + max(0, self.record.num_slots - in_use):
            self._too_many()

    def _too_many(self) -> NoReturn:
        self._parts.allocator.record_rejection(self.name)
        raise TooManyRequestsError(
            f"{self.name}: {len(self._queue)} requests wait already (max_waiting: {self.options.max_waiting}); "
            f"try later",
            repo_name=self.name,
        )

    # -- telling and changing --------------------------------------------------------------------------------------

    def use(self, parts: Components) -> None:
        """Work with other components from now on; leases and cleanings under way keep what they began with."""
        self._former.append(self._parts.mirror)
        self._context.parts = parts

    def retire(self) -> None:
        """Give no more leases, to nobody who waits either; leases under way go on, and slots stay."""
        self._is_retired = True
        self._queue.refuse(_retired(self.name))
        self._changed.set()

    def reinstate(self) -> None:
        """Give leases again after `retire`."""
        if self._is_retired and not self._is_closing:
            self._is_retired = False
            self._queue.accept()

    def reconfigure(self, record: Pool, options: PoolOptions) -> None:
        """Take on other options; leases under way keep what they began with."""
        self._context.record = record
        self._context.options = options
        self._parts.cleaner.rebuild_always = options.rebuild_always

    async def list_slots(self) -> list[Slot]:
        """Return the records of the pool's slots, by number (1.5)."""
        return await self._parts.coordinator.list_slots(self.name)

    async def summary(self) -> PoolSummary:
        """Return the pool at a glance (5.5)."""
        slots = await self._parts.coordinator.list_slots(self.name)
        states = [slot.state for slot in slots]
        return PoolSummary(
            repo_name=self.name,
            repo_url=self.record.repo_url,
            total_slots=len(slots),
            available=states.count(SlotState.AVAILABLE),
            allocated=states.count(SlotState.ALLOCATED),
            cleaning=states.count(SlotState.CLEANING),
            error=states.count(SlotState.ERROR),
            waiting=len(self._queue),
            allocation_count=sum(slot.allocation_count for slot in slots),
            total_allocated_seconds=sum(slot.total_allocated_seconds for slot in slots),
            metrics=self._parts.allocator.get_allocation_metrics(self.name),
        )

    def stats(self) -> dict[str, int]:
        """Return counts of this process, without any I/O."""
        return {
            "leased": len(self._open),
            "returning": len(self.keeper.returning),
            "waiting": len(self._queue),
            "fetches": sum(mirror.fetch_count for mirror in (*self._former, self._parts.mirror)),
        }

    # -- ending --------------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Fail all waiters at once and let nobody queue any more."""
        self._is_closing = True
        self._attempts.begin()
        self._queue.refuse(_closed(self.name))
        self._changed.set()

    async def close(self, deadline: Deadline) -> None:
        """Give holders and cleanings until the deadline, then leave the rest to recovery.

        Afterwards nothing of this pool runs and no lock is held; slots that were not finished are CLEANING or
        ALLOCATED without a lock, which whoever opens the directory next recovers. Detached leases go on.
        """
        self.refuse()
        await self._attempts.interrupt()
        try:
            async with deadline.limit():
                while self._bound() or self._giving or self.keeper.returning:
                    self._changed.clear()
                    await self._changed.wait() if not self.keeper.returning else await self.keeper.wait_clean()
        except TimeoutError:
            _log.warning(
                "%s: closed with %d leases open and %d cleanings unfinished; recovery will finish them",
                self.name,
                len(self._bound()),
                len(self.keeper.returning),
            )
        await self.keeper.stop()
        for opened in list(self._open.values()):
            await self._cut_off(opened)
        for mirror in (*self._former, self._parts.mirror):
            await mirror.aclose()

    def _bound(self) -> list[_Open]:
        """Return the leases that end with this process, as far as they still stand."""
        opened = self._open.values()
        return [one for one in opened if not one.grant.lease.is_detached and not one.leased.lost.is_set()]

    async def _cut_off(self, opened: _Open) -> None:
        self._open.pop(opened.grant.lease.lease_id, None)
        opened.leased._end()  # noqa: SLF001 - the pool is the one caller
        if opened.grant.lease.is_detached:
            return
        opened.leased.lost.set()
        await shielded(self._abandon(opened.grant), name=f"abandon-{opened.grant.slot.slot_id}")

    async def _abandon(self, grant: Grant) -> None:
        """Let go of a leased slot, and say so for whoever recovers it."""
        try:
            await self._parts.coordinator.update(grant, attrs.evolve(grant.slot, unsaved=LeaseEnd.CLOSED))
        except LeaseLostError:
            _log.debug("%s: was taken away before", grant.slot.slot_id)
        except (PoolManagerError, OSError) as error:
            _log.warning("%s: that its pool was closed could not be noted: %s", grant.slot.slot_id, error)
        await self._parts.coordinator.abandon_hold(grant)

    async def delete(self, *, force: bool) -> None:
        """Delete every slot and the mirror.

        Raises:
            PoolInUseError: a slot is leased and `force` is not given; nothing has been deleted.
        """
        slots = await self._parts.coordinator.list_slots(self.name)
        leased = [slot for slot in slots if slot.state is SlotState.ALLOCATED]
        if leased and not force:
            raise PoolInUseError(
                f"{self.name}: is in use; {describe_holder(leased[0])}; return the slot, or delete with force=True",
                repo_name=self.name,
            )
        self.refuse()
        for slot in leased:
            await self._parts.coordinator.force_unlock(slot.slot_id)
        await self.notice_lost_leases()
        await self.close(Deadline.after(self.options.cleanup_timeout if not force else 0))
        for slot in slots:
            await self.keeper.remove_slot(slot.slot_id, saves_work=False)
        await self._parts.store.delete_pool(self.name)


@attrs.define
class _Attempt:
    """One request for a lease, while it is being served."""

    ref: str | None
    new_branch: str | None
    metadata: Mapping[str, Any]
    priority: int
    timeout: float | None
    waits_for_cleaning: bool
    ttl: float | None
    origin: Origin = attrs.field(init=False)
    is_deadlock_told: bool = False
    phase: str = "fetch"
    started: float = attrs.field(factory=boottime)
    deadline: Deadline = attrs.field(init=False)

    retry_priority: Final[int] = 1 << 30

    def __attrs_post_init__(self) -> None:
        # A timeout of 0 means one try: no waiting for a slot, but the try itself may take what it takes.
        self.deadline = Deadline.after(self.timeout or None)


def _closed(name: str) -> ManagerClosedError:
    return ManagerClosedError(f"{name}: the pool is closed; open a new PoolManager", repo_name=name)


def _is_expired(slot: Slot) -> bool:
    lease = slot.lease
    if slot.state is not SlotState.ALLOCATED or lease is None or lease.expires_boottime is None:
        return False
    return lease.owner.boot_id != boot_id() or lease.expires_boottime <= boottime()


def _retired(name: str) -> PoolNotFoundError:
    return PoolNotFoundError(
        f"{name}: was removed from the configuration, so no slot of it is leased any more; put it back there, or call "
        f"create_pool; delete_pool deletes it",
        repo_name=name,
    )
