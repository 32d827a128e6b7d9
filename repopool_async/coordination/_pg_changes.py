"""Changes of a slot that are rare enough to be decided here: look under the row's lock, decide, write.

What happens on the way of every lease is functions of the schema instead, at one round trip. What the verbs promise is
told by `coordination.base`; each function here decides for one of them.
"""

import uuid
from collections.abc import Callable, Collection
from typing import Final

import attrs

from repopool_async.coordination._pg_connections import Connection
from repopool_async.coordination._pg_debts import Debt
from repopool_async.coordination._pg_link import Link
from repopool_async.coordination._pg_rows import LOOK, Row, encoded, seal_of, state_of
from repopool_async.coordination.records import after_use, lost, with_token
from repopool_async.exceptions import SlotNotFoundError
from repopool_async.models import LeaseEnd, Slot, SlotState, parse_slot_id

_WRITE: Final = """
    UPDATE repopool.slot s SET record = $2::jsonb, state = $3, token = $4, sealed_commit = $5, sealed_branch = $6,
        session_id = $7, hold_id = $8, overwritten = NULL,
        leased_at = CASE WHEN $3 = 'allocated' THEN s.leased_at END,
        expires_at = CASE WHEN $3 = 'allocated' THEN s.expires_at END
    WHERE s.slot_id = $1
"""


@attrs.frozen
class Change:
    """What becomes of a slot.

    Attributes:
        slot: the record. hold_id: of our session, which holds it from then on; None for nobody.
        event: a line of the allocation history, with `held_seconds`.
    """

    slot: Slot
    hold_id: uuid.UUID | None
    event: str | None = None
    held_seconds: float | None = None


Decide = Callable[[Row], Change | None]


async def change_slot(link: Link, what: str, slot_id: str, decide: Decide, debt: Debt | None = None) -> Change | None:
    """Change a slot as is decided from its row, and return the change; None where nothing was to be changed.

    Args:
        decide: must be quick: the row is locked meanwhile. What it raises is raised, and nothing was changed.
        debt: is paid where it is not known whether the change took effect.

    Raises:
        SlotNotFoundError: there is no such slot. CoordinatorUnavailableError, StoreError: as `Database.call`.
    """
    session_id = link.session.session_id

    async def work(connection: Connection) -> Change | None:
        async with connection.transaction():
            found = await connection.fetchrow(LOOK + "WHERE s.slot_id = $1 FOR UPDATE OF s", slot_id)
            if found is None:
                raise no_slot(slot_id)
            change = decide(Row.of(found))
            if change is None:
                return None
            slot, record = change.slot, encoded(change.slot)
            holder = session_id if change.hold_id is not None else None
            await connection.execute(
                _WRITE, slot_id, record, state_of(slot), slot.token, *seal_of(slot), holder, change.hold_id
            )
            if change.event is not None:
                await connection.execute(
                    "SELECT repopool.remember($1, $2::jsonb, NULL, $3)", change.event, record, change.held_seconds
                )
        return change

    return await link.database.call(what, work, debt=debt)


def taking(
    hold_id: uuid.UUID, states: Collection[SlotState], *, raise_token: bool, becomes: SlotState | None
) -> Decide:
    """Decide for `take`."""

    def decide(row: Row) -> Change | None:
        slot = row.slot
        if slot.state not in states or row.state == "parked" or row.is_kept_by_record or row.is_held:
            return None
        return Change(attrs.evolve(slot, token=slot.token + raise_token, state=becomes or slot.state), hold_id)

    return decide


def recovering(hold_id: uuid.UUID) -> Decide:
    """Decide for `recover_orphan`."""

    def decide(row: Row) -> Change | None:
        if not row.is_orphan:
            return None
        end, event = (LeaseEnd.EXPIRED, "expired") if row.has_expired_lease else (LeaseEnd.CRASHED, "recovered")
        return _ended(row, end, event, hold_id)

    return decide


def releasing(hold_id: uuid.UUID, token: int) -> Decide:
    """Decide for `release_detached`."""

    def decide(row: Row) -> Change:
        if row.slot.token != token or not row.is_kept_by_record:
            raise lost(row.slot, token)
        slot = after_use(row.slot, row.held_seconds, LeaseEnd.RETURNED)
        return Change(slot, hold_id, event="released", held_seconds=row.held_seconds)

    return decide


def forcing(row: Row) -> Change | None:
    """Decide for `force_unlock`."""
    if row.slot.state is not SlotState.ALLOCATED and not row.is_held:
        return None
    return _ended(row, LeaseEnd.FORCED, "forced", None)


def expiring(token: int) -> Decide:
    """Decide for `expire`."""

    def decide(row: Row) -> Change | None:
        if row.slot.state is not SlotState.ALLOCATED or row.slot.token != token:
            return None
        return _ended(row, LeaseEnd.EXPIRED, "expired", None)

    return decide


def raising(hold_id: uuid.UUID, token: int, above: int) -> Decide:
    """Decide for `raise_token`."""

    def decide(row: Row) -> Change:
        if row.slot.token != token or row.hold_id != hold_id:
            raise lost(row.slot, token)
        return Change(with_token(row.slot, max(row.slot.token, above) + 1), hold_id)

    return decide


def _ended(row: Row, end: LeaseEnd, event: str, hold_id: uuid.UUID | None) -> Change:
    """Return what becomes of a slot that is taken from whoever had it."""
    held_seconds = row.held_seconds if row.slot.state is SlotState.ALLOCATED else None
    is_quarantined = row.slot.state is SlotState.ERROR
    after = row.slot if is_quarantined else after_use(row.slot, held_seconds or 0.0, end)
    slot = attrs.evolve(after, token=row.slot.token + 1)
    return Change(slot, hold_id, event=event, held_seconds=held_seconds)


def repo_name_of(slot_id: str) -> str:
    """Return the pool that a slot's id names.

    Raises:
        SlotNotFoundError: that can be no slot's id.
    """
    try:
        return parse_slot_id(slot_id)[0]
    except ValueError:
        raise no_slot(slot_id) from None


def no_slot(slot_id: str) -> SlotNotFoundError:
    """Return the error for a slot that does not exist."""
    return SlotNotFoundError(f"{slot_id}: there is no such slot; list_slots tells which there are", slot_id=slot_id)
