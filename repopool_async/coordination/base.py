"""The coordinator protocol: who holds which slot, and whose turn it is.

A coordinator owns slot records from the moment they exist: it alone writes them, and it alone says who may. Files on
one machine are the default (`coordination.files`), a database serves many (`coordination.postgres`). It never looks
into a tree, cleans nothing and does not wait: callers poll, in the order that tickets give, and may be told when to.

Three rules hold whatever the implementation. At most one live holder per slot. Tokens grow with every lease and every
taking-away, so a holder that was robbed, or slept through its expiry, finds out at its next step (`LeaseLostError`)
and writes nothing. What a dead holder leaves is found by `orphans` and never handed out before it was recovered.
"""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol, TypeVar

import attrs

from repopool_async.models import Lease, Slot, SlotState

HOST_UNREACHABLE: Final = "host unreachable"
"""The `Slot.error` of a parked slot: its host does not answer. Such a slot comes back with its host, not by repair."""

OnEvent = Callable[[str, Mapping[str, object]], None]
"""Told a kind and its fields, on the event loop; must not raise."""


def checked_ttl(ttl: float | None) -> float | None:
    """Return a detached lease's duration in seconds, or None, as it is.

    Raises:
        ValueError: it is not positive and finite.
    """
    if ttl is not None and not (ttl > 0 and math.isfinite(ttl)):
        raise ValueError(f"a detached lease lasts a positive, finite number of seconds, not {ttl}")
    return ttl


@attrs.frozen
class Want:
    """What a claim asks for; see `Coordinator.claim`.

    Raises:
        ValueError: `detached_ttl` is not a positive, finite number.
    """

    repo_name: str
    lease_id: str
    commit: str | None = None
    branch: str | None = None
    ref: str | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    prefer: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    exclude_hosts: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()
    detached_ttl: float | None = attrs.field(default=None, converter=checked_ttl)
    wait_seconds: float | None = None


@attrs.define(eq=False)
class Hold:
    """The right to work on a slot: nobody else may until it is finished or abandoned.

    One that nothing refers to any more is abandoned too, so that nothing can be lost by losing sight of it.

    Attributes:
        slot: the record as last written through this hold.
        token: the slot's token; where the record has another, the hold was taken away.
        lock: the coordinator's own.
        entered_token: the one with which the slot was entered on its host (`fencing`); None while it was not.
    """

    slot: Slot
    token: int
    lock: Any
    entered_token: int | None = attrs.field(default=None, init=False)

    def become(self, slot: Slot) -> None:
        """Note the record that was just written, with its token."""
        self.slot = slot
        self.token = slot.token


@attrs.define(eq=False)
class Grant(Hold):
    """A hold that came with a lease.

    Attributes:
        lease: as written. previous: the record before the claim.
        ttl: seconds that a detached lease was asked to last; None for one that lives with its process.
    """

    lease: Lease
    previous: Slot
    ttl: float | None = attrs.field(init=False)

    @ttl.default
    def _as_claimed(self) -> float | None:
        # Only now does the lease tell: renewing and detaching move its expiry, and when it was acquired stays.
        expires = self.lease.expires_boottime
        return None if expires is None else expires - self.lease.acquired_boottime

    def become(self, slot: Slot) -> None:
        """Note the record that was just written, with its token and its lease."""
        super().become(slot)
        if slot.lease is not None:
            self.lease = slot.lease


AnyHold = TypeVar("AnyHold", bound=Hold)


class Ticket(Protocol):
    """A process's place among the processes that wait for a slot of one pool."""

    async def is_first(self) -> bool:
        """Return whether no live ticket is older.

        To be asked as often as `Coordinator.poll_seconds` says: who stays silent is overtaken.
        """

    async def claim(self) -> Grant | None:
        """Lease what the ticket was drawn for, where it is its turn and something is free; None otherwise.

        A coordinator may hand a slot to a waiting ticket ahead of this call. What was granted here is the caller's;
        what was handed over and not fetched goes back when the ticket does. To be called as often as `is_first`.

        Raises:
            ValueError: the ticket was drawn for nothing.
        """


class Coordinator(Protocol):
    """Claims, keeps, gives back and recovers slots.

    Every verb may raise `StoreError` where records cannot be read or written, `SlotNotFoundError` for a slot that does
    not exist, and `LockTimeoutError` where another process is stuck in the middle of a step. With
    `CoordinatorUnavailableError` (a `StoreError`) it is not known whether the verb took effect; what it took goes back
    by itself. A cancelled verb has either happened or not, and never leaves a slot held by nobody who knows: what it
    took it has given back, or will where what keeps the records does not answer.
    """

    @property
    def poll_seconds(self) -> tuple[float, float]:
        """The first and the longest pause between two looks of one that waits; long where it is told of changes."""

    def hurry(self) -> None:
        """Fail from now on rather than wait or try again: the process ends, and what it held is given up with it."""

    # Claiming

    async def claim(
        self,
        repo_name: str,
        *,
        commit: str | None,
        branch: str | None,
        ref: str | None = None,
        lease_id: str,
        metadata: Mapping[str, Any] | None = None,
        prefer: frozenset[str] = frozenset(),
        exclude: frozenset[str] = frozenset(),
        exclude_hosts: frozenset[str] = frozenset(),
        labels: frozenset[str] = frozenset(),
        detached_ttl: float | None = None,
        wait_seconds: float | None = None,
        stand_back: bool = False,
    ) -> Grant | None:
        """Lease the best free slot of a pool, in one try.

        Cancelled, the slot is given back as it was, but for its token.

        Args:
            commit: what is wanted, None for anything. branch: to be checked out, None for a detached HEAD.
            ref: the lessee's words. lease_id: unique for ever. metadata: anything JSON can hold.
            prefer: slots to try first. exclude: slots not to try. exclude_hosts: hosts of which no slot is wanted.
            labels: what the slot must have, all of them.
            detached_ttl: seconds until a lease that outlives its process expires; None for one that does not.
            wait_seconds: how long the lessee has waited, for the history.
            stand_back: return None while any process that waits has a ticket.

        Returns:
            The grant, whose slot is ALLOCATED and nobody else's; None where nothing is free.

        Raises:
            ValueError: `detached_ttl` is not a positive, finite number.
        """

    async def detach(self, grant: Grant) -> Lease:
        """Let go of a detached lease's lock, so that any process may give it back; its time starts anew.

        Until then the lease is held by this process too. From then on `begin_return` takes the slot again.

        Raises:
            LeaseLostError: it was taken away. ValueError: the lease is not detached.
        """

    async def renew(self, slot_id: str, token: int, ttl: float | None) -> Lease:
        """Move a detached lease's expiry to `ttl` seconds from now, and return the lease as it stands.

        Args:
            ttl: None changes nothing. A lease that lives with its process has no expiry, and none is set.

        Raises:
            LeaseLostError: the token is not of the present lease, or that has expired.
        """

    async def is_held(self, hold: Hold) -> bool:
        """Return whether a hold still stands: neither taken away, nor expired, finished or abandoned."""

    async def lost_among(self, holds: Collection[AnyHold]) -> list[AnyHold]:
        """Return those that do not stand any more, as `is_held` would say of each; asks once for all."""

    async def taken_among(self, slot_ids: Collection[str]) -> set[str]:
        """Return those of the slots that somebody alive works on, or has leased for as long as that process lives."""

    async def raise_token(self, hold: Hold, above: int) -> int:
        """Give a hold, its slot and its lease a token higher than `above`, and return it.

        For a host that has seen a higher token than the slot's: the records have lost some of their last changes, as
        after a failover.

        Raises:
            LeaseLostError: the hold was taken away: somebody else has been given the slot meanwhile.
        """

    # Giving back

    async def begin_return(self, grant: Grant) -> Slot:
        """End a lease: the slot becomes CLEANING, still held. Usage is counted and history written.

        Raises:
            LeaseLostError: it was taken away; nothing was written.
        """

    async def release_detached(self, slot_id: str, token: int) -> Hold:
        """End a detached lease, from whichever process: as `begin_return`, but all that is needed is the token.

        Raises:
            LeaseLostError: the token is not of a detached lease, or that has expired; nothing was written.
        """

    async def update(self, hold: Hold, slot: Slot) -> Slot:
        """Write a held slot's record, and return it as written.

        An expiry that was renewed meanwhile stays.

        Raises:
            LeaseLostError: the hold was taken away; nothing was written.
            ValueError: it is another slot's record, or its token is not the hold's.
        """

    async def finish(self, hold: Hold, slot: Slot) -> Slot:
        """Write what became of a held slot and let go of it; where it cannot be written the hold still stands.

        Args:
            slot: AVAILABLE with a seal, or ERROR.

        Raises:
            LeaseLostError: the hold was taken away; nothing was written.
            ValueError: as `update`, or the state is neither.
        """

    async def abandon_hold(self, hold: Hold) -> None:
        """Let go of a slot and leave its record as it is: a slot that is not AVAILABLE is then an orphan."""

    # Maintenance

    async def take(
        self,
        slot_id: str,
        *,
        states: Collection[SlotState],
        raise_token: bool = False,
        becomes: SlotState | None = None,
    ) -> Hold | None:
        """Hold a slot without a lease, where its state is one of `states` and nobody holds it; None otherwise.

        Args:
            raise_token: make whatever an earlier holder still does stale.
            becomes: the state to write at once. Who is about to change an AVAILABLE slot's tree names CLEANING, so that
                it is never handed out half changed.
        """

    async def orphans(self, repo_name: str) -> list[Slot]:
        """Return the slots that are ALLOCATED or CLEANING and nobody's: their holder died or let go of them.

        A detached lease is somebody's until it expires or the machine is booted again.
        """

    async def recover_orphan(self, slot_id: str) -> Hold | None:
        """Take over an orphan, to be cleaned and finished; None where it is none, or none any more.

        The slot is CLEANING with a higher token, and its last lease stays in the record.
        """

    async def force_unlock(self, slot_id: str) -> Slot:
        """Take a slot away from whoever holds it, and return the record.

        It becomes CLEANING with a higher token and is an orphan from now on; the holder's next step fails. A
        quarantined slot stays so, and one that nobody holds as it is.
        """

    async def expire(self, slot_id: str, token: int) -> bool:
        """Take away the lease that has this token, because it has lasted too long; False where it has ended.

        As `force_unlock`: the slot becomes an orphan with a higher token, and the holder's next step fails.
        """

    async def park_host(self, host_id: str) -> list[str]:
        """Take every slot of a host that does not answer out of use, and return their ids.

        They are ERROR with `HOST_UNREACHABLE`; who held them has lost them. Quarantined ones keep their reason. A slot
        finished with that error is parked as well.
        """

    async def unpark_host(self, host_id: str) -> list[str]:
        """Make orphans of a host's parked slots, now that it answers again, and return their ids."""

    # Records

    async def list_slots(self, repo_name: str) -> list[Slot]:
        """Return a pool's slots by number; none where there is no such pool."""

    async def get_slot(self, slot_id: str) -> Slot:
        """Return a slot's record."""

    async def next_slot_number(self, repo_name: str) -> int:
        """Return a number that no slot of the pool has, had, or will be given again.

        Raises:
            PoolNotFoundError: there is no such pool.
        """

    async def create(self, slot: Slot) -> Hold:
        """Write a new slot's record, durably, and hold the slot. Cancelled, the record is gone again.

        Raises:
            ValueError: it is not CLEANING, or there is already such a slot.
        """

    async def delete(self, hold: Hold) -> None:
        """Delete a held slot, its directory and all, and let go of it.

        Raises:
            LeaseLostError: the hold was taken away; nothing was deleted.
        """

    # Turns

    def ticket(
        self, repo_name: str, want: Want | None = None, *, on_change: Callable[[], object] | None = None
    ) -> AbstractAsyncContextManager[Ticket]:
        """Return a context manager that holds this process's place in the queue for the block.

        Args:
            want: what `Ticket.claim` shall lease. None for a ticket that only tells whether it is its turn.
            on_change: called on the event loop when it may have become this ticket's turn. A hint: it may come in vain,
                and may not come at all.

        Raises:
            PoolNotFoundError: there is no such pool.
        """

    async def has_tickets(self, repo_name: str) -> bool:
        """Return whether any process waits. Who has no ticket then draws one instead of claiming."""
