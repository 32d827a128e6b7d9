"""Which slot a lease gets, what a slot's record becomes, and how allocating went.

Choosing and the transitions between states are plain functions of records: no I/O, no clock, no lock. `SlotAllocator`
is the thin awaitable around them. Whoever calls a verb that writes holds the slot's lock (`lock_manager`,
`coordination`); nothing is cleaned here.
"""

from collections import Counter, deque
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import attrs

from repopool_async._clock import now as present
from repopool_async.exceptions import SlotAllocationError
from repopool_async.models import AllocationMetrics, Lease, Seal, Slot, SlotState
from repopool_async.slot_store import SlotStore

RECENT_WAITS: Final = 1024
"""How many of the last waits the percentiles are of."""


def order_candidates(slots: Sequence[Slot], *, commit: str | None, branch: str | None) -> list[Slot]:
    """Return the slots that may be leased, the best first.

    Those sealed at the wanted commit come first (first of all those with the wanted branch checked out as well), then
    those that showed the branch last, then the rest; among equals those on the least loaded host, then the most
    recently used (10.2), then the lowest number.

    Args:
        slots: all of one pool, so that it shows how loaded each host is.
        commit: the full id that is wanted, None for any. branch: None for a detached HEAD.
    """
    loads, free = _loads(slots), SlotState.AVAILABLE
    ranked = [  # numbers differ within a pool, so that no two records are ever compared
        (_distance(slot.seal, slot, commit, branch), loads.get(slot.host_id, 0.0), slot.idle_rank, slot)
        for slot in slots
        if slot.state is free and slot.seal is not None
    ]
    return [entry[3] for entry in sorted(ranked)]


def _loads(slots: Sequence[Slot]) -> dict[str, float]:
    """Return by host which part of its slots is in use; nothing where all are on one host."""
    first = slots[0].host_id if slots else ""
    if all(slot.host_id == first for slot in slots):
        return {}
    there = Counter(slot.host_id for slot in slots)
    free = Counter(slot.host_id for slot in slots if slot.state is SlotState.AVAILABLE)
    return {host_id: 1.0 - free[host_id] / count for host_id, count in there.items()}


def allocated(slot: Slot, lease: Lease, now: datetime) -> Slot:
    """Return the record of an AVAILABLE slot once it is leased. The seal stays: it says what the lease began from.

    Raises:
        SlotAllocationError: the slot is not AVAILABLE, or the lease's token is not newer than the slot's.
    """
    if slot.state is not SlotState.AVAILABLE or slot.seal is None:
        raise SlotAllocationError(
            f"{slot.slot_id}: is {slot.state}, so it cannot be leased; take another slot or wait",
            repo_name=slot.repo_name,
            slot_id=slot.slot_id,
        )
    if lease.token <= slot.token:
        raise SlotAllocationError(
            f"{slot.slot_id}: token {lease.token} is not newer than {slot.token}; read the slot anew and try again",
            repo_name=slot.repo_name,
            slot_id=slot.slot_id,
        )
    return attrs.evolve(
        slot,
        state=SlotState.ALLOCATED,
        token=lease.token,
        lease=lease,
        error=None,
        last_used_at=now,
        last_branch=lease.branch,
        allocation_count=slot.allocation_count + 1,
    )


def cleaning(slot: Slot) -> Slot:
    """Return the record of a slot once its lease has ended; the lease and the seal it began from stay readable."""
    return attrs.evolve(slot, state=SlotState.CLEANING, error=None)


def available(slot: Slot, seal: Seal, now: datetime) -> Slot:
    """Return the record of a slot that was verified clean."""
    last_used_at = slot.last_used_at if slot.lease is None else now
    return attrs.evolve(
        slot,
        state=SlotState.AVAILABLE,
        lease=None,
        seal=seal,
        error=None,
        last_used_at=last_used_at,
        unsaved=None,
        settled_token=slot.token,
    )


def broken(slot: Slot, reason: str) -> Slot:
    """Return the record of a quarantined slot (9.5). The seal stays: it says what a repair shall restore.

    So does a lease whose work is unsaved: it says under which id, and whose it is.
    """
    lease = slot.lease if slot.unsaved else None
    return attrs.evolve(slot, state=SlotState.ERROR, lease=lease, error=reason)


class SlotAllocator:
    """Finds slots, records what became of them, and counts.

    Cancelled, a verb that writes has either happened or not. The counting verbs are plain calls; they are of this
    process and start at nothing.
    """

    def __init__(self, store: SlotStore) -> None:
        self._store = store
        self._used: dict[str, datetime] = {}
        self._counts: dict[str, _Counts] = {}

    async def find_available_slot(
        self, repo_name: str, *, commit: str | None = None, branch: str | None = None
    ) -> Slot | None:
        """Return the slot that a lease would best be given, None where none is free. Nothing is taken by this.

        Raises:
            ConfigError: that can be no pool's name. StoreError: its records cannot be read.
        """
        slots = [self._with_use(slot) for slot in await self._store.list_slots(repo_name)]
        candidates = order_candidates(slots, commit=commit, branch=branch)
        return candidates[0] if candidates else None

    async def mark_allocated(self, slot: Slot, lease: Lease) -> Slot:
        """Write that a slot is leased, and return the record.

        Raises:
            SlotAllocationError: it is not AVAILABLE, or the token is not newer. StoreError: it cannot be written.
        """
        taken = allocated(slot, lease, present())
        await self._store.save_slot(taken)
        self.update_lru_cache(slot.slot_id)
        return taken

    async def mark_available(self, slot: Slot, seal: Seal) -> Slot:
        """Write that a slot was verified clean, and return the record.

        Raises:
            StoreError: it cannot be written.
        """
        free = available(slot, seal, present())
        await self._store.save_slot(free)
        return free

    def update_lru_cache(self, slot_id: str) -> None:
        """Note that a slot is used now, ahead of what its record says, so that it is preferred next time (10.2)."""
        self._used[slot_id] = present()

    # Counting

    def get_allocation_metrics(self, repo_name: str) -> AllocationMetrics:
        """Return how allocating went in a pool since this object was made (10.5)."""
        return self._of(repo_name).metrics()

    def record_request(self, repo_name: str) -> None:
        """Count a lease asked for."""
        self._of(repo_name).requests += 1

    def record_allocation(self, repo_name: str, wait_seconds: float, *, warm: bool = False) -> None:
        """Count a lease given.

        Args:
            wait_seconds: from asking to holding. warm: whether nothing had to be checked out.
        """
        self._of(repo_name).add_wait(wait_seconds, warm=warm)

    def record_release(self, repo_name: str, use_seconds: float) -> None:
        """Count a lease given back, `use_seconds` after it was given."""
        counts = self._of(repo_name)
        counts.releases += 1
        counts.used_seconds += use_seconds

    def record_timeout(self, repo_name: str) -> None:
        """Count a lease that was not given in time."""
        self._of(repo_name).timeouts += 1

    def record_rejection(self, repo_name: str) -> None:
        """Count a lease refused because the queue was full."""
        self._of(repo_name).rejections += 1

    def record_failure(self, repo_name: str) -> None:
        """Count a lease that was not given for any other reason."""
        self._of(repo_name).failures += 1

    # Inside

    def _with_use(self, slot: Slot) -> Slot:
        used = self._used.get(slot.slot_id)
        if used is None or (slot.last_used_at is not None and slot.last_used_at >= used):
            return slot
        return attrs.evolve(slot, last_used_at=used)

    def _of(self, repo_name: str) -> "_Counts":
        return self._counts.setdefault(repo_name, _Counts())


@attrs.define
class _Counts:
    requests: int = 0
    allocations: int = 0
    warm: int = 0
    timeouts: int = 0
    rejections: int = 0
    failures: int = 0
    releases: int = 0
    waited_seconds: float = 0.0
    longest_seconds: float = 0.0
    used_seconds: float = 0.0
    waits: deque[float] = attrs.field(factory=lambda: deque(maxlen=RECENT_WAITS))

    def add_wait(self, seconds: float, *, warm: bool) -> None:
        self.allocations += 1
        self.warm += warm
        self.waited_seconds += seconds
        self.longest_seconds = max(self.longest_seconds, seconds)
        self.waits.append(seconds)

    def metrics(self) -> AllocationMetrics:
        waits = sorted(self.waits)
        return AllocationMetrics(
            requests=self.requests,
            allocations=self.allocations,
            warm=self.warm,
            timeouts=self.timeouts,
            rejections=self.rejections,
            failures=self.failures,
            releases=self.releases,
            average_wait_seconds=self.waited_seconds / self.allocations if self.allocations else 0.0,
            p50_wait_seconds=_percentile(waits, 50),
            p99_wait_seconds=_percentile(waits, 99),
            max_wait_seconds=self.longest_seconds,
            average_use_seconds=self.used_seconds / self.releases if self.releases else 0.0,
        )


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """Return the smallest value that `percent` of all do not exceed."""
    return ordered[-(-len(ordered) * percent // 100) - 1] if ordered else 0.0


def _distance(seal: Seal, slot: Slot, commit: str | None, branch: str | None) -> int:
    """Return how much is to be done until the slot shows what is wanted, from 0 for nothing to 3."""
    if commit is not None and seal.commit == commit:
        return 0 if seal.branch == branch else 1
    return 2 if branch is not None and branch in (seal.branch, slot.last_branch) else 3
