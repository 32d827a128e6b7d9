"""Takes slots for lessees: resolve the ref, wait for the turn, claim a slot, prepare it, hand it out.

One deadline covers it all, and whatever interrupts it, the slot goes back. Which slot is free is the coordinator's
business, what preparing one takes the cleaner's.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, NoReturn, TypeVar

import attrs

from repopool_async import origins
from repopool_async._aio import Deadline, Interruptions, shielded
from repopool_async._clock import boottime
from repopool_async._git_arguments import validate_branch_name
from repopool_async._identity import new_lease_id
from repopool_async.components import HostParts, PoolContext
from repopool_async.coordination.base import Grant, Want
from repopool_async.deadlocks import Deadlocks
from repopool_async.disk_full import is_passing, passing_told
from repopool_async.exceptions import (
    CleanupError,
    CoordinatorUnavailableError,
    HostUnreachableError,
    LeaseLostError,
    ManagerClosedError,
    PoolNotFoundError,
    PoolTimeoutError,
    SlotAllocationError,
    TooManyRequestsError,
    UnkillableError,
)
from repopool_async.fencing import UntoldLeaseError, enter_sealed, guard_of
from repopool_async.hosts.upkeep import upkeep
from repopool_async.mirror import Mirror
from repopool_async.models import ResolvedRef, Slot, SlotState
from repopool_async.open_leases import OpenLease, OpenLeases
from repopool_async.origins import Origin
from repopool_async.refs import RefsSnapshot
from repopool_async.releasing import Releaser
from repopool_async.slot_keeper import SlotKeeper
from repopool_async.wait_queue import WaitQueue
from repopool_async.workspaces.base import Checkout

T = TypeVar("T")

_STALE_WAIT_SECONDS: Final = 1.0
"""After waiting longer than this for a slot, the remote is asked again, so that a lessee gets what is new by then."""
_AGAIN_SECONDS: Final = 1.0
"""How long to wait before a coordinator that does not answer is asked again."""
_RECOVERY_SECONDS: Final = 1.0
"""How often the head of the queue looks for slots of dead owners while it waits."""


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
    resolved_by: Mirror | None = None
    seen: RefsSnapshot | None = None
    is_deadlock_told: bool = False
    unavailable: CoordinatorUnavailableError | None = None
    phase: str = "fetch"
    started: float = attrs.field(factory=boottime)
    deadline: Deadline = attrs.field(init=False)

    retry_priority: Final[int] = 1 << 30

    def __attrs_post_init__(self) -> None:
        # A timeout of 0 means one try: no waiting for a slot, but the try itself may take what it takes.
        self.deadline = Deadline.after(self.timeout or None)


class Acquirer:
    """Takes the slots of one pool, one request after the other."""

    def __init__(self, context: PoolContext, leases: OpenLeases, keeper: SlotKeeper, releaser: Releaser) -> None:
        self._pool = context
        self._leases = leases
        self._keeper = keeper
        self._releaser = releaser
        self._queue = WaitQueue()
        self._deadlocks = Deadlocks(leases)
        self._attempts = Interruptions()
        self._is_closing = False
        self._is_retired = False

    @property
    def waiting(self) -> int:
        """How many requests of this process wait for a slot."""
        return len(self._queue)

    async def acquire(
        self,
        *,
        ref: str | None,
        timeout: float | None,
        new_branch: str | None,
        metadata: Mapping[str, Any],
        priority: int,
        waits_for_cleaning: bool = False,
        ttl: float | None = None,
    ) -> OpenLease:
        """Take a slot and make it a lease; see `RepoPool.lease` and `RepoPool.allocate` for what is raised."""
        if new_branch is not None:
            validate_branch_name(new_branch)
        self._refuse_if_closing()
        wanted = ref if ref is not None else self._pool.options.default_ref
        attempt = _Attempt(wanted, new_branch, metadata, priority, timeout, waits_for_cleaning, ttl)
        attempt.origin = origins.here(is_whole=self._pool.options.leak_warning is not None)
        self._pool.parts.allocator.record_request(self._pool.name)
        try:
            with passing_told(self._pool.name):
                async with self._attempts.allowed(attempt.deadline.remaining(), _closed(self._pool.name)):
                    return await self._try(attempt)
        except PoolTimeoutError:
            self._pool.parts.allocator.record_timeout(self._pool.name)
            raise
        except TimeoutError:
            self._pool.parts.allocator.record_timeout(self._pool.name)
            raise await self._timed_out(attempt) from None

    async def _try(self, attempt: _Attempt) -> OpenLease:
        resolved = await self._patiently(attempt, partial(self._resolve, attempt))
        while True:
            attempt.phase = "queue"
            grant = await self._claim_in_turn(attempt, resolved)
            try:
                attempt.phase = "fetch"
                if boottime() - attempt.started > _STALE_WAIT_SECONDS:
                    resolved = await self._patiently(attempt, partial(self._resolve, attempt))
                attempt.phase = "checkout"
                opened = await self._hand_out(attempt, grant, resolved)
            except BaseException as error:
                await shielded(self._releaser.take_back(grant, error), name=f"take-back-{grant.slot.slot_id}")
                if not self._is_worth_another_slot(error, grant.slot):
                    raise
                attempt.priority = attempt.retry_priority  # the lessee never sees a bad slot, nor queues again for it
                attempt.waits_for_cleaning |= isinstance(error, UntoldLeaseError)  # it is free, once it is clean
            else:
                return opened

    def _is_worth_another_slot(self, error: BaseException, slot: Slot) -> bool:
        """Return whether a slot, or its host, is to blame for what went wrong before the lessee had it."""
        if isinstance(error, HostUnreachableError) or self._pool.refusal(slot.host_id) is not None:
            return True
        if isinstance(error, LeaseLostError):
            return self._pool.hosts.is_out(slot.host_id)  # parked meanwhile, by whomever
        return isinstance(error, CleanupError | UnkillableError) and not is_passing(error)

    async def _resolve(self, attempt: _Attempt) -> ResolvedRef:
        """Say what a ref means, by the mirror on the first of the pool's hosts that answers."""
        while True:
            reference = await self._reference()
            with suppress(HostUnreachableError):  # it is suspect now, so that another is the reference
                async with self._pool.hosts.expected_to_answer(reference.host_id):
                    resolved = await self._resolve_by(reference.mirror, attempt.ref)
                    attempt.resolved_by, attempt.seen = reference.mirror, reference.mirror.seen
                    return resolved

    async def _reference(self) -> HostParts:
        try:
            return self._pool.reference
        except HostUnreachableError:
            if not await self._pool.hosts.settled():
                raise
        return self._pool.reference

    async def _resolve_by(self, mirror: Mirror, ref: str | None) -> ResolvedRef:
        fetched = False
        if self._pool.options.fetch_on_allocate:
            fetched = await mirror.refresh(max_age=self._pool.options.fetch_max_age)
        try:
            return await mirror.resolve(ref)
        except LookupError:
            if fetched or not self._pool.options.fetch_on_allocate:
                raise
            await mirror.fetch()  # what we served from may be older than the ref
            return await mirror.resolve(ref)

    async def _claim_in_turn(self, attempt: _Attempt, resolved: ResolvedRef) -> Grant:
        self._refuse_if_too_many()
        async with self._deadlocks.noted_as_waiting(), self._queue.turn(attempt.priority):
            return await self._patiently(attempt, partial(self._claim_or_wait, attempt, resolved))

    async def _patiently(self, attempt: _Attempt, step: Callable[[], Awaitable[T]]) -> T:
        """Take a step, again and again while the coordinator does not answer and the attempt may wait."""
        while True:
            try:
                result = await step()
            except CoordinatorUnavailableError as error:
                if attempt.timeout == 0:
                    raise
                attempt.unavailable = error
            else:
                attempt.unavailable = None
                return result
            self._refuse_if_closing()
            await asyncio.sleep(_AGAIN_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    async def _claim_or_wait(self, attempt: _Attempt, resolved: ResolvedRef) -> Grant:
        grant = await self._claim(attempt, resolved)
        if grant is not None:
            return grant
        if self._keeper.clean_wanted():
            attempt.waits_for_cleaning = True  # even one try: the slot is free, it only was not cleaned yet
        elif self._pool.options.max_waiting == 0:
            self._too_many()
        return await self._claim_when_free(attempt, resolved)

    async def _claim_when_free(self, attempt: _Attempt, resolved: ResolvedRef) -> Grant:
        """Wait for other processes' releases (our own wake us), in order of the processes' tickets."""
        while True:
            grant = await self._claim_while_hosts_stay(attempt, resolved)
            if grant is not None:
                return grant

    async def _claim_while_hosts_stay(self, attempt: _Attempt, resolved: ResolvedRef) -> Grant | None:
        """Wait with one ticket; None where other hosts can be used now than when it was drawn: it excludes the rest."""
        coordinator, changed = self._pool.parts.coordinator, self._pool.changed
        delay, longest = coordinator.poll_seconds
        want = Want(self._pool.name, **self._asked(attempt, resolved))
        async with coordinator.ticket(self._pool.name, want, on_change=changed.set) as ticket:
            while self._pool.unusable == want.exclude_hosts:
                self._refuse_if_closing()
                changed.clear()
                grant = await ticket.claim()
                if grant is not None:
                    return grant
                await self._look_around(attempt)
                await self._wait_for_change(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                delay = min(delay * 2, longest)
        return None

    async def _claim(self, attempt: _Attempt, resolved: ResolvedRef) -> Grant | None:
        asked = self._asked(attempt, resolved)
        return await self._pool.parts.coordinator.claim(self._pool.name, **asked, stand_back=True)

    def _asked(self, attempt: _Attempt, resolved: ResolvedRef) -> dict[str, Any]:
        """Return what is asked of the coordinator, now or in turn."""
        return {
            "lease_id": new_lease_id(),
            "commit": resolved.commit,
            "branch": resolved.branch,
            "ref": resolved.asked,
            "metadata": attempt.metadata,
            "exclude_hosts": self._pool.unusable,
            "detached_ttl": attempt.ttl,
            "wait_seconds": boottime() - attempt.started,
        }

    async def _look_around(self, attempt: _Attempt) -> None:
        """While nothing is free: recover what dead owners left, and give up where waiting cannot help."""
        if boottime() - self._keeper.last_recovery > _RECOVERY_SECONDS:
            await self._keeper.recover()
        slots = await self._pool.parts.coordinator.list_slots(self._pool.name)
        unusable = self._pool.unusable
        is_hopeless = all(slot.state is SlotState.ERROR or self._pool.is_closed(slot.host_id) for slot in slots)
        if is_hopeless and not self._keeper.is_making_slots:
            raise self._nothing_to_lease(slots)
        self._tell_deadlock(attempt, slots)
        # A cleaning may have ended since the claim found nothing: then the next claim will find it.
        coming = (SlotState.CLEANING, SlotState.AVAILABLE)
        is_cleaning = any(slot.state in coming and slot.host_id not in unusable for slot in slots)
        if attempt.timeout == 0 and not (attempt.waits_for_cleaning and (is_cleaning or self._keeper.returning)):
            raise await self._timed_out(attempt, slots)

    def _nothing_to_lease(self, slots: list[Slot]) -> SlotAllocationError:
        reasons = "; ".join(self._why_not(slot) for slot in slots) or "it has none"
        remedy = "repair_slot makes one usable again" if slots else "create_pool or add_slot makes some"
        if any(self._pool.hosts.is_closed(slot.host_id) for slot in slots):
            remedy = "`repopool hosts list` says more"
        return SlotAllocationError(
            f"{self._pool.name}: no slot can be leased ({reasons}); {remedy}", repo_name=self._pool.name
        )

    def _why_not(self, slot: Slot) -> str:
        if slot.state is SlotState.ERROR:
            return f"{slot.slot_id}: {slot.error}"
        if (refusal := self._pool.refusal(slot.host_id)) is not None:
            return f"{slot.slot_id}: {refusal}"
        return f"{slot.slot_id}: its host {slot.host_id} is {self._pool.hosts.state(slot.host_id).condition}"

    async def _wait_for_change(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._pool.changed.wait()
        except TimeoutError:
            return

    async def _hand_out(self, attempt: _Attempt, grant: Grant, resolved: ResolvedRef) -> OpenLease:
        checkout = Checkout(
            commit=resolved.commit,
            branch=attempt.new_branch or resolved.branch,
            is_tracking=attempt.new_branch is None,
        )
        self._pool.hosts.require_usable(grant.slot.host_id)  # it may have changed since the ticket was drawn
        parts = self._pool.parts.of(grant.slot)
        async with self._pool.hosts.expected_to_answer(grant.slot.host_id):
            await self._pool.require_fit(grant.slot.host_id)  # before anything can run in it
            session = self._session(attempt, parts)
            grant.slot = await enter_sealed(parts.host, self._pool.parts.coordinator, grant, session)
            if attempt.seen is not None and attempt.resolved_by is not parts.mirror:
                await parts.mirror.catch_up(attempt.seen, resolved)
            with upkeep(guard_of(grant.slot)):
                if await parts.cleaner.is_setup_due(grant.slot, checkout):
                    # Should this lessee not wait for the end of it, the slot is set up all the same, for the next one.
                    lease = attrs.evolve(grant.lease, commit=checkout.commit)
                    wanted = attrs.evolve(grant.slot, lease=lease, last_branch=resolved.branch)
                    grant.slot = await self._pool.parts.coordinator.update(grant, wanted)
                result = await parts.cleaner.cleanup_before_allocation(grant.slot, checkout)
            inherited = None if parts.is_here else await parts.host.login_environment()
        lease = attrs.evolve(grant.lease, ref=resolved.asked, commit=checkout.commit, branch=checkout.branch)
        if (lease, result.seal) != (grant.lease, grant.slot.seal):
            slot = attrs.evolve(grant.slot, lease=lease, seal=result.seal, last_branch=resolved.branch)
            grant.slot = await self._pool.parts.coordinator.update(grant, slot)
            grant.lease = lease
        if attempt.ttl is not None:
            lease = await self._pool.parts.coordinator.detach(grant)
        waited = boottime() - attempt.started
        self._pool.parts.allocator.record_allocation(self._pool.name, waited, warm="warm" in result.steps)
        self._pool.parts.emit(
            "slot.allocated", {"slot_id": grant.slot.slot_id, "lease_id": lease.lease_id, "wait_seconds": waited}
        )
        return self._leases.open(grant, attempt.origin, inherited)

    def _session(self, attempt: _Attempt, parts: HostParts) -> str | None:
        """Return in whose name a lease enters its slot: one that outlives this process is not this process's."""
        return None if parts.is_here or attempt.ttl is not None else self._pool.hosts.session

    async def _timed_out(self, attempt: _Attempt, slots: list[Slot] | None = None) -> PoolTimeoutError:
        if slots is None:
            slots = await self._slots_where_told(attempt)
        holders = tuple(self._leases.describe_holder(slot) for slot in slots)
        deadlock = self._deadlocks.reason(slots) if attempt.phase == "queue" else ""
        waited = "at once" if attempt.timeout == 0 else f"within {attempt.timeout:g} s"
        what = {
            "queue": "no slot became free; raise the timeout or num_slots, or return slots sooner",
            "fetch": "the remote had not answered; raise the timeout or check the network",
            "checkout": "the check-out, or the pool's setup, was not finished; raise the timeout",
        }[attempt.phase]
        what = deadlock or (str(attempt.unavailable) if attempt.unavailable else what)
        listing = "".join(f"\n  {line}" for line in holders)
        return PoolTimeoutError(
            f"{self._pool.name}: no lease {waited}: {what}{listing}",
            repo_name=self._pool.name,
            timeout_seconds=attempt.timeout,
            phase=attempt.phase,
            holders=holders,
            is_self_wait=bool(deadlock),
        )

    async def _slots_where_told(self, attempt: _Attempt) -> list[Slot]:
        """Return the pool's slots; none where the coordinator does not answer, which the attempt then knows."""
        if attempt.unavailable is None:
            try:
                return await self._pool.parts.coordinator.list_slots(self._pool.name)
            except CoordinatorUnavailableError as error:
                attempt.unavailable = error
        return []

    def _tell_deadlock(self, attempt: _Attempt, slots: list[Slot]) -> None:
        """Tell at once of a wait that no time-out ends."""
        if attempt.timeout is not None or attempt.is_deadlock_told:
            return
        deadlock = self._deadlocks.reason(slots) if self._deadlocks.do_all_holders_wait(slots) else ""
        if deadlock:
            attempt.is_deadlock_told = True
            self._pool.parts.emit("lease.deadlock", {"repo_name": self._pool.name, "reason": deadlock})

    # -- whom to refuse -------------------------------------------------------------------------------------------

    def _refuse_if_closing(self) -> None:
        if self._is_closing:
            raise _closed(self._pool.name)
        if self._is_retired:
            raise _retired(self._pool.name)

    def _refuse_if_too_many(self) -> None:
        bound = self._pool.options.max_waiting
        if bound is None:
            return
        in_use = len(self._leases) + len(self._keeper.returning)
        if len(self._queue) >= bound + max(0, self._pool.record.num_slots - in_use):
            self._too_many()

    def _too_many(self) -> NoReturn:
        name, bound = self._pool.name, self._pool.options.max_waiting
        self._pool.parts.allocator.record_rejection(name)
        raise TooManyRequestsError(
            f"{name}: {len(self._queue)} requests wait already (max_waiting: {bound}); try later", repo_name=name
        )

    def retire(self) -> None:
        """Give no more leases, to nobody who waits either; leases under way go on, and slots stay."""
        self._is_retired = True
        self._queue.refuse(_retired(self._pool.name))
        self._pool.changed.set()

    def reinstate(self) -> None:
        """Give leases again after `retire`."""
        if self._is_retired and not self._is_closing:
            self._is_retired = False
            self._queue.accept()

    def refuse(self) -> None:
        """Fail all waiters at once and let nobody queue any more."""
        self._is_closing = True
        self._attempts.begin()
        self._queue.refuse(_closed(self._pool.name))
        self._pool.changed.set()

    async def interrupt(self) -> None:
        """End every request under way with `ManagerClosedError`, and wait until they have ended."""
        await self._attempts.interrupt()


def _closed(name: str) -> ManagerClosedError:
    return ManagerClosedError(f"{name}: the pool is closed; open a new PoolManager", repo_name=name)


def _retired(name: str) -> PoolNotFoundError:
    return PoolNotFoundError(
        f"{name}: was removed from the configuration, so no slot of it is leased any more; put it back there, or call "
        f"create_pool; delete_pool deletes it",
        repo_name=name,
    )
