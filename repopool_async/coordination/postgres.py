"""The coordinator on PostgreSQL, for pools whose managers run on many machines.

Slots, leases and waiters are rows; what changes them on the way of a lease is functions of the schema
(`migrations/*.sql`), one call and one round trip each, by the server's clock. A hold is an id that this side chooses,
so what may have been taken can be given back without an answer. A process is alive for as long as its session is
(`_pg_session`); whoever finds one dead takes what it held. Safety never rests on this alone: a slot's host checks the
token.

How calls end in time is `_pg_database`'s business, how errors are told `_pg_errors`'.
"""

import uuid
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any, Final, Self

import attrs

from repopool_async._aio import shielded
from repopool_async._identity import this_process
from repopool_async.coordination._pg_batches import Batched
from repopool_async.coordination._pg_changes import (
    Change,
    Decide,
    change_slot,
    expiring,
    forcing,
    raising,
    recovering,
    releasing,
    repo_name_of,
    taking,
)
from repopool_async.coordination._pg_database import CALL_SECONDS
from repopool_async.coordination._pg_debts import Debt
from repopool_async.coordination._pg_hosts import PostgresHosts
from repopool_async.coordination._pg_link import TTL_SECONDS, Link
from repopool_async.coordination._pg_locks import PostgresLocks
from repopool_async.coordination._pg_records import PostgresRecords
from repopool_async.coordination._pg_rows import (
    LOOK,
    HeldSlot,
    abandoning,
    before_claim,
    encoded,
    seal_of,
    slot_of,
    state_of,
    want_of,
)
from repopool_async.coordination._pg_slots import SlotTable
from repopool_async.coordination._pg_spread import Spread
from repopool_async.coordination._pg_ticket import PostgresTicket
from repopool_async.coordination.base import AnyHold, Grant, Hold, OnEvent, Want, checked_ttl
from repopool_async.coordination.records import lease_of, lost, require_new, require_own, require_settled
from repopool_async.exceptions import LeaseLostError
from repopool_async.models import Lease, Slot, SlotState
from repopool_async.slot_allocator import cleaning

_POLL_SECONDS: Final = (1.0, 2.0)

_CLAIM: Final = Batched("""
    SELECT a.place, c.record, c.overwritten
    FROM unnest($1::text[], $2::uuid[], $3::uuid[], $4::jsonb[], $5::boolean[])
        WITH ORDINALITY a (pool, session_id, hold_id, want, stands_back, place),
    LATERAL repopool.claim(a.pool, a.session_id, a.hold_id, a.want, a.stands_back) c
""")
_BEGIN_RETURN: Final = Batched("SELECT * FROM repopool.begin_return($1, $2, $3, $4)")
_FINISH: Final = Batched(
    "CALL repopool.finish($1, $2, $3, $4, $5, $6, $7, $8::jsonb[], $9, NULL)",
    lambda rows: dict(enumerate(rows[0]["p_done"])),
)

_ANNOUNCED: Final = ("forced", "expired")


class PostgresCoordinator:
    """Claims, keeps, gives back and recovers slots; see `coordination.base.Coordinator` for what each verb promises.

    To be opened before use and closed afterwards, or used as a context manager. Any number may work on one database.
    Leases are bound to this object's session: they end when it is closed, or when nothing was heard of it for `ttl`.

    Args:
        dsn: `postgresql://…`; may name several servers, of which the primary is used, or a pooler. What of it is secret
            appears nowhere.
        listen_dsn: of the server itself, where `dsn` is a pooler's, through which notifications do not arrive; without
            it those who wait poll.
        ttl: seconds without a heartbeat after which others may take this process for dead.
        on_event: told of `lease.forced`, `lease.expired` as by the file coordinator; of `lease.unconfirmed` and
            `lease.confirmed` (whether the database takes this process for alive is not known, is known again) and
            `session.lost` (it was taken for dead; everything held is lost), with `session_id`.
        max_connections: to the database at once, besides two for heartbeat and notifications. call_seconds: after which
            a call fails.

    Attributes:
        records: pool records and logs of the same database. locks: locks by name, for as long as the session lives.
        hosts: what is known of the machines that hold slots.
    """

    def __init__(
        self,
        dsn: str,
        *,
        listen_dsn: str | None = None,
        ttl: float = TTL_SECONDS,
        on_event: OnEvent | None = None,
        max_connections: int = 8,
        call_seconds: float = CALL_SECONDS,
    ) -> None:
        self._link: Final = Link(
            dsn,
            listen_dsn=listen_dsn,
            ttl=ttl,
            on_event=on_event,
            max_connections=max_connections,
            call_seconds=call_seconds,
        )
        self._slots = SlotTable(self._link)
        self._spread = Spread(self._link)
        self.records: Final = PostgresRecords(self._link)
        self.locks: Final = PostgresLocks(self._link)
        self.hosts: Final = PostgresHosts(self._link)

    async def open(self) -> None:
        """Connect and make this process known.

        Raises:
            CoordinatorUnavailableError: the database cannot be used now. StoreError: it refuses, is a standby, or its
                schema is of another version (`repopool db migrate`).
        """
        await self._link.open()

    def hurry(self) -> None:
        """See `Coordinator.hurry`."""
        self._link.hurry()

    async def close(self) -> None:
        """Give up what is still held and leave; within about two seconds, whether the database answers or not."""
        await shielded(self._link.close(), name="close-coordinator")

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def has_push(self) -> bool:
        """Whether notifications are known to arrive, so that who waits need not rely on polling."""
        return self._link.session.has_push

    @property
    def poll_seconds(self) -> tuple[float, float]:
        """See `Coordinator`."""
        return _POLL_SECONDS

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
        """See `Coordinator.claim`."""
        want = Want(
            repo_name=repo_name,
            lease_id=lease_id,
            commit=commit,
            branch=branch,
            ref=ref,
            metadata=metadata or {},
            prefer=prefer,
            exclude=exclude,
            exclude_hosts=exclude_hosts,
            labels=labels,
            detached_ttl=detached_ttl,
            wait_seconds=wait_seconds,
        )
        self._link.session.require_trust()
        host_id = await self._spread.host_for(repo_name, commit, exclude_hosts)
        hold_id = uuid.uuid4()
        with self._link.holds.asked_for(hold_id):
            row = await self._link.begin(
                f"claim a slot of {repo_name}",
                _CLAIM,
                repo_name,
                self._link.session.session_id,
                hold_id,
                want_of(want, this_process(), host_id=host_id),
                stand_back,
                debt=abandoning(repo_name, hold_id),
            )
            return None if row["record"] is None else self._granted(hold_id, row["record"], row["overwritten"])

    async def detach(self, grant: Grant) -> Lease:
        """See `Coordinator.detach`."""
        if grant.ttl is None:
            raise ValueError(f"{grant.slot.slot_id}: the lease is not detached; claim it with detached_ttl")
        lease = await self._renew(grant.slot.slot_id, grant.token, grant.ttl, lets_go=True)
        grant.lock.end()
        grant.slot = attrs.evolve(grant.slot, lease=lease)
        grant.lease = lease
        return lease

    async def renew(self, slot_id: str, token: int, ttl: float | None) -> Lease:
        """See `Coordinator.renew`."""
        return await self._renew(slot_id, token, checked_ttl(ttl), lets_go=False)

    async def _renew(self, slot_id: str, token: int, ttl: float | None, *, lets_go: bool) -> Lease:
        row = await self._link.insist(
            f"renew the lease of {slot_id}",
            "SELECT record FROM repopool.renew($1, $2, $3, $4)",
            slot_id,
            token,
            ttl,
            lets_go,
        )
        if row is None:
            raise lost(await self.get_slot(slot_id), token)
        return lease_of(slot_of(row["record"]))

    async def is_held(self, hold: Hold) -> bool:
        """See `Coordinator.is_held`."""
        return not await self.lost_among([hold])

    async def lost_among(self, holds: Collection[AnyHold]) -> list[AnyHold]:
        """See `Coordinator.lost_among`."""
        ids = [hold.slot.slot_id for hold in holds]
        rows = await self._link.database.fetch(
            "ask what is still held",
            "SELECT slot_id, token, hold_id, state = 'allocated' AND expires_at > clock_timestamp() AS is_kept "
            "FROM repopool.slot WHERE slot_id = ANY ($1)",
            ids,
        )
        found = {row["slot_id"]: row for row in rows}
        return [hold for hold in holds if not _stands(hold, found.get(hold.slot.slot_id))]

    async def taken_among(self, slot_ids: Collection[str]) -> set[str]:
        """See `Coordinator.taken_among`."""
        rows = await self._link.database.fetch(
            "ask who is at work",
            "SELECT slot_id FROM repopool.slot JOIN repopool.session USING (session_id) WHERE slot_id = ANY ($1)",
            list(slot_ids),
        )
        return {row["slot_id"] for row in rows}

    async def raise_token(self, hold: Hold, above: int) -> int:
        """See `Coordinator.raise_token`."""
        slot_id = hold.slot.slot_id
        decide = raising(hold.lock.hold_id, hold.token, above)
        change = await self._change(f"raise the token of {slot_id}", slot_id, decide)
        assert change is not None
        hold.become(change.slot)
        return hold.token

    # Giving back

    async def begin_return(self, grant: Grant) -> Slot:
        """See `Coordinator.begin_return`."""
        slot_id = grant.slot.slot_id
        if grant.lease.is_detached and not grant.lock.is_held:
            hold = await self.release_detached(slot_id, grant.token)
            grant.slot, grant.lock = hold.slot, hold.lock
            return grant.slot
        row = await self._link.insist(
            f"end the lease of {slot_id}",
            _BEGIN_RETURN,
            *(slot_id, grant.lock.hold_id, grant.token),
            tells_repetition=True,
        )
        if row is None:
            raise await self._lost(grant)
        grant.slot = attrs.evolve(
            cleaning(grant.slot), total_allocated_seconds=row["total_seconds"], unsaved=row["unsaved"]
        )
        return grant.slot

    async def release_detached(self, slot_id: str, token: int) -> Hold:
        """See `Coordinator.release_detached`."""
        hold = await self._hold(f"end the lease of {slot_id}", slot_id, lambda hold_id: releasing(hold_id, token))
        assert hold is not None
        return hold

    async def update(self, hold: Hold, slot: Slot) -> Slot:
        """See `Coordinator.update`."""
        require_own(hold, slot)
        if not hold.lock.is_held and not _is_detached(hold):
            raise await self._lost(hold)
        row = await self._link.insist(
            f"write the record of {slot.slot_id}",
            "SELECT record FROM repopool.write($1, $2, $3, $4, $5, $6, $7::jsonb)",
            *(slot.slot_id, hold.lock.hold_id, hold.token, state_of(slot), *seal_of(slot), encoded(slot)),
        )
        if row is None:
            raise await self._lost(hold)
        hold.slot = slot_of(row["record"])
        return hold.slot

    async def finish(self, hold: Hold, slot: Slot) -> Slot:
        """See `Coordinator.finish`."""
        require_own(hold, slot)
        require_settled(slot)
        if not hold.lock.is_held:
            raise await self._lost(hold)
        is_done = await self._link.insist(
            f"release {slot.slot_id}",
            _FINISH,
            *(slot.slot_id, slot.repo_name, hold.lock.hold_id, hold.token),
            *(state_of(slot), *seal_of(slot), encoded(slot)),
            tells_repetition=True,
        )
        if not is_done:
            raise await self._lost(hold)
        hold.lock.end()
        hold.slot = slot
        if slot.state is SlotState.AVAILABLE:
            self._spread.note_free(slot)
        return slot

    async def abandon_hold(self, hold: Hold) -> None:
        """See `Coordinator.abandon_hold`; where the database does not answer it is done as soon as it does."""
        if not hold.lock.is_held:
            return
        hold.lock.end()
        await self._link.give_up(hold.lock.debt)

    # Maintenance

    async def take(
        self,
        slot_id: str,
        *,
        states: Collection[SlotState],
        raise_token: bool = False,
        becomes: SlotState | None = None,
    ) -> Hold | None:
        """See `Coordinator.take`."""
        return await self._hold(
            f"take {slot_id}",
            slot_id,
            lambda hold_id: taking(hold_id, states, raise_token=raise_token, becomes=becomes),
        )

    async def orphans(self, repo_name: str) -> list[Slot]:
        """See `Coordinator.orphans`."""
        return await self._slots.orphans(repo_name)

    async def recover_orphan(self, slot_id: str) -> Hold | None:
        """See `Coordinator.recover_orphan`."""
        return await self._hold(f"recover {slot_id}", slot_id, recovering)

    async def force_unlock(self, slot_id: str) -> Slot:
        """See `Coordinator.force_unlock`."""
        change = await self._change(f"force {slot_id}", slot_id, forcing)
        return change.slot if change is not None else await self.get_slot(slot_id)

    async def expire(self, slot_id: str, token: int) -> bool:
        """See `Coordinator.expire`."""
        return await self._change(f"expire the lease of {slot_id}", slot_id, expiring(token)) is not None

    async def park_host(self, host_id: str) -> list[str]:
        """See `Coordinator.park_host`."""
        return await self._slots.park_host(host_id)

    async def unpark_host(self, host_id: str) -> list[str]:
        """See `Coordinator.unpark_host`."""
        return await self._slots.unpark_host(host_id)

    async def reap(self) -> int:
        """End the sessions of dead processes now instead of soon; return how many."""
        return await self._link.reap()

    # Records

    async def list_slots(self, repo_name: str) -> list[Slot]:
        """See `Coordinator.list_slots`."""
        return await self._slots.list_slots(repo_name)

    async def get_slot(self, slot_id: str) -> Slot:
        """See `Coordinator.get_slot`."""
        return await self._slots.get_slot(slot_id)

    async def next_slot_number(self, repo_name: str) -> int:
        """See `Coordinator.next_slot_number`."""
        return await self._slots.next_number(repo_name)

    async def create(self, slot: Slot) -> Hold:
        """See `Coordinator.create`."""
        require_new(slot)
        hold_id = uuid.uuid4()
        with self._link.holds.asked_for(hold_id):
            await self._slots.insert(slot, hold_id)
            return self._held(hold_id, slot)

    async def delete(self, hold: Hold) -> None:
        """See `Coordinator.delete`; whoever calls has removed the slot's files."""
        # Deleting takes long; a crash half-way must find something to recover.
        slot = await self.update(hold, cleaning(hold.slot))
        if not await self._slots.delete(slot.slot_id, hold.lock.hold_id):
            raise await self._lost(hold)
        hold.lock.end()

    # Turns

    def ticket(
        self, repo_name: str, want: Want | None = None, *, on_change: Callable[[], object] | None = None
    ) -> PostgresTicket:
        """See `Coordinator.ticket`."""

        def granted(hold_id: uuid.UUID, row: Any) -> Grant:
            return self._granted(hold_id, row["p_record"], row["p_overwritten"])

        return PostgresTicket(self._link, repo_name, want, on_change, granted)

    async def has_tickets(self, repo_name: str) -> bool:
        """See `Coordinator.has_tickets`."""
        row = await self._link.ask(
            f"ask who waits for {repo_name}", "SELECT repopool.has_waiters($1) AS has_waiters", repo_name
        )
        return bool(row["has_waiters"])

    # Inside

    async def _change(self, what: str, slot_id: str, decide: Decide, debt: Debt | None = None) -> Change | None:
        with self._link.session_expiry_told():
            change = await change_slot(self._link, what, slot_id, decide, debt)
        if change is not None and change.event in _ANNOUNCED:
            slot = change.slot
            lease_id = slot.lease.lease_id if slot.lease else None
            about = {"slot_id": slot_id, "repo_name": slot.repo_name, "lease_id": lease_id, "token": slot.token}
            self._link.tell(f"lease.{change.event}", about)
        return change

    async def _hold(self, what: str, slot_id: str, deciding: Callable[[uuid.UUID], Decide]) -> Hold | None:
        """Change a slot to one that we hold; should nobody learn of it, let go again."""
        self._link.session.require_trust()
        hold_id = uuid.uuid4()
        with self._link.holds.asked_for(hold_id):
            change = await self._change(what, slot_id, deciding(hold_id), abandoning(repo_name_of(slot_id), hold_id))
            return None if change is None else self._held(hold_id, change.slot)

    def _held(self, hold_id: uuid.UUID, slot: Slot) -> Hold:
        lock = HeldSlot(slot, hold_id, self._link.database.debts.owe_from_anywhere)
        self._link.holds.add(lock)
        return Hold(slot, slot.token, lock)

    def _granted(self, hold_id: uuid.UUID, record: str, overwritten: str | None) -> Grant:
        slot = slot_of(record)
        self._spread.note_taken(slot)
        hold = self._held(hold_id, slot)
        previous = before_claim(slot, overwritten)
        return Grant(slot=slot, token=slot.token, lock=hold.lock, lease=lease_of(slot), previous=previous)

    async def _lost(self, hold: Hold) -> LeaseLostError:
        """Return the error for whoever comes too late; a hold that was taken away is none any more."""
        slot_id = hold.slot.slot_id
        row = await self._link.ask(f"read {slot_id}", LOOK + "WHERE s.slot_id = $1", slot_id)
        if row is None:
            hold.lock.end()
            return LeaseLostError(
                f"{slot_id}: the lease was taken away and the slot deleted; take a new lease",
                repo_name=hold.slot.repo_name,
                slot_id=slot_id,
            )
        if row["hold_id"] != hold.lock.hold_id:
            hold.lock.end()
        return lost(slot_of(row["record"]), hold.token)


def _is_detached(hold: Hold) -> bool:
    return isinstance(hold, Grant) and hold.lease.is_detached


def _stands(hold: Hold, row: Any) -> bool:
    if row is None or row["token"] != hold.token:
        return False
    if _is_detached(hold):
        return bool(row["is_kept"])
    return bool(hold.lock.is_held) and row["hold_id"] == hold.lock.hold_id
