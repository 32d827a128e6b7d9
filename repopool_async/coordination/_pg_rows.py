"""Between a slot's record and its row: the record as JSON, beside it in columns what the protocol decides by.

What a row says of whose the slot is was found out by the server, by its own clock; here it is only carried.
"""

import json
import uuid
import weakref
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

import attrs

from repopool_async._clock import boottime, now
from repopool_async._codec import CodecError, dumps, loads
from repopool_async.coordination._pg_debts import Debt
from repopool_async.coordination.base import Want
from repopool_async.coordination.records import is_parked
from repopool_async.exceptions import StoreError
from repopool_async.models import Lease, Owner, Slot, SlotState

LOOK: Final = """
    SELECT s.record::text AS record, s.state, s.session_id, s.hold_id,
        EXISTS (SELECT FROM repopool.session z WHERE z.session_id = s.session_id) AS is_held,
        s.expires_at IS NOT NULL AS is_detached, coalesce(s.expires_at <= clock_timestamp(), false) AS is_expired,
        extract(epoch FROM least(clock_timestamp(), s.expires_at) - s.leased_at)::double precision AS held_seconds
    FROM repopool.slot s
"""

ABANDON: Final = "CALL repopool.abandon($1, $2, $3)"
LET_GO: Final = "CALL repopool.let_go($1, $2, $3)"


@attrs.frozen
class Row:
    """A slot as the database has it.

    Attributes:
        hold_id: whose work. is_held: somebody alive works on it. is_detached, is_expired: of its lease.
        held_seconds: how long the lease has lasted.
    """

    slot: Slot
    state: str
    hold_id: uuid.UUID | None
    is_held: bool
    is_detached: bool
    is_expired: bool
    held_seconds: float

    @classmethod
    def of(cls, row: Any) -> "Row":
        """Return what a row of `LOOK` says."""
        return cls(
            slot=slot_of(row["record"]),
            state=row["state"],
            hold_id=row["hold_id"],
            is_held=row["is_held"],
            is_detached=row["is_detached"],
            is_expired=row["is_expired"],
            held_seconds=row["held_seconds"] or 0.0,
        )

    @property
    def is_kept_by_record(self) -> bool:
        """Whether it is a detached lessee's, whoever works on it."""
        return self.slot.state is SlotState.ALLOCATED and self.is_detached and not self.is_expired

    @property
    def has_expired_lease(self) -> bool:
        """Whether it was a detached lessee's, and nobody has taken it over yet."""
        return self.slot.state is SlotState.ALLOCATED and self.is_detached and self.is_expired

    @property
    def is_orphan(self) -> bool:
        """Whether it must be cleaned before anybody gets it, and nobody is at that."""
        if self.slot.state is SlotState.ERROR or self.is_kept_by_record:
            return False
        if self.slot.state is SlotState.AVAILABLE and self.slot.seal is not None:
            return False
        return self.has_expired_lease or not self.is_held


class HeldSlot:
    """The `Hold.lock` of this coordinator: the id by which the database knows the hold.

    Args:
        on_lost_sight: given what lets go of the slot, should nothing refer to this any more; from any thread.
    """

    def __init__(self, slot: Slot, hold_id: uuid.UUID, on_lost_sight: Callable[[Debt], object]) -> None:
        self.hold_id: Final = hold_id
        self.debt: Final = letting_go(slot.slot_id, slot.repo_name, hold_id)
        self._finalizer = weakref.finalize(self, on_lost_sight, self.debt)
        self._finalizer.atexit = False

    @property
    def is_held(self) -> bool:
        """Whether it has not been let go of; says nothing of whether it was taken away."""
        return self._finalizer.alive

    def end(self) -> None:
        """Note that the slot has been let go of."""
        self._finalizer.detach()


def abandoning(repo_name: str, hold_id: uuid.UUID, *, is_new: bool = False) -> Debt:
    """Return what gives back a slot or a ticket that may have been got.

    Args:
        is_new: the slot was being made, and goes.
    """
    return Debt(hold_id, ABANDON, (repo_name, hold_id, is_new))


def letting_go(slot_id: str, repo_name: str, hold_id: uuid.UUID) -> Debt:
    """Return what leaves a held slot as it is."""
    return Debt(hold_id, LET_GO, (slot_id, repo_name, hold_id))


class Reader:
    """Decodes records, each only once for as long as it does not change."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, Slot]] = {}

    def read(self, slot_id: str, text: str) -> Slot:
        """Return the slot that a text says."""
        seen = self._seen.get(slot_id)
        if seen is not None and seen[0] == text:
            return seen[1]
        slot = slot_of(text)
        self._seen[slot_id] = (text, slot)
        return slot

    def forget(self, slot_id: str) -> None:
        """Note that a slot is gone."""
        self._seen.pop(slot_id, None)


def slot_of(text: str) -> Slot:
    """Return the slot that a record says.

    Raises:
        StoreError: it says none.
    """
    slot: Slot = decoded(Slot, text)
    return slot


def decoded(kind: type[Any], text: str) -> Any:
    """Return what a record says.

    Raises:
        StoreError: it is not of that kind.
    """
    try:
        return loads(kind, text.encode())
    except CodecError as error:
        raise StoreError(f"a record in the database is damaged: {error}; restore the database from a backup") from error


def encoded(record: object) -> str:
    """Return a record as JSON.

    Raises:
        StoreError: it holds what JSON cannot.
    """
    try:
        return dumps(record).decode()
    except CodecError as error:
        raise StoreError(str(error)) from error


def state_of(slot: Slot) -> str:
    """Return what the column `state` says of a record."""
    return "parked" if is_parked(slot) else str(slot.state)


def seal_of(slot: Slot) -> tuple[str | None, str | None]:
    """Return commit and branch of a slot that may be leased once it is AVAILABLE."""
    return (slot.seal.commit, slot.seal.branch) if slot.seal is not None else (None, None)


@attrs.frozen
class _Limits:
    """Which slots a claim takes, where not just any."""

    prefer: tuple[str, ...]
    exclude: tuple[str, ...]
    exclude_hosts: tuple[str, ...]
    labels: tuple[str, ...]


@attrs.frozen
class _Asked:
    """A `Want` as the database's functions read it."""

    lease: Lease
    limits: _Limits | None
    host: str | None
    ttl: float | None
    wait_seconds: float | None
    asked_boottime: float


def want_of(want: Want, owner: Owner, *, host_id: str | None = None) -> str:
    """Return what a claim asks for as JSON; the lease in it gets its token and times from the database.

    Args:
        host_id: the host to be preferred, where the slots of several are equally near to what is wanted.
    """
    lease = Lease(
        lease_id=want.lease_id,
        token=0,
        owner=owner,
        acquired_at=now(),
        acquired_boottime=0.0,
        is_detached=want.detached_ttl is not None,
        ref=want.ref,
        commit=want.commit,
        branch=want.branch,
        metadata=want.metadata,
    )
    return encoded(_Asked(lease, _limits_of(want), host_id, want.detached_ttl, want.wait_seconds, boottime()))


def _limits_of(want: Want) -> _Limits | None:
    if not (want.prefer or want.exclude or want.exclude_hosts or want.labels):
        return None
    return _Limits(tuple(want.prefer), tuple(want.exclude), tuple(want.exclude_hosts), tuple(want.labels))


def before_claim(slot: Slot, overwritten: str | None) -> Slot:
    """Return what a just claimed slot's record was."""
    fields = json.loads(overwritten or "{}")
    used = fields.get("last_used_at")
    return attrs.evolve(
        slot,
        state=SlotState.AVAILABLE,
        token=slot.token - 1,
        lease=None,
        last_used_at=datetime.fromisoformat(used) if used else None,
        last_branch=fields.get("last_branch"),
        allocation_count=slot.allocation_count - 1,
    )
