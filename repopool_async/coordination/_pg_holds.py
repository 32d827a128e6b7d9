"""Which holds this process knows of, and giving back those that only the database believes to be its.

A server that takes another's place may have lost the last commits: that a hold had ended, or was never wanted. For a
session that goes on living nobody else would ever take back such a slot, or such a lock.
"""

import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from repopool_async.coordination._pg_database import Database
from repopool_async.coordination._pg_debts import Debt
from repopool_async.coordination._pg_rows import letting_go

_OUR_SLOTS: Final = "SELECT slot_id, pool, hold_id FROM repopool.slot WHERE session_id = $1"
_OUR_LOCKS: Final = "SELECT name, hold_id FROM repopool.named_lock WHERE session_id = $1"
_LEAVE_LOCK: Final = """
    UPDATE repopool.named_lock SET session_id = gen_random_uuid(), hold_id = NULL
    WHERE name = $1 AND hold_id = $2
"""


class Held(Protocol):
    """Something that the database knows to be held, by an id that this process chose."""

    @property
    def hold_id(self) -> uuid.UUID:
        """The id."""

    @property
    def is_held(self) -> bool:
        """Whether it has not been let go of; says nothing of whether it was taken away."""


class KnownHolds:
    """The ids of holds from before they are asked for until they have ended."""

    def __init__(self) -> None:
        self._asked_for: set[uuid.UUID] = set()
        self._held: weakref.WeakValueDictionary[uuid.UUID, Held] = weakref.WeakValueDictionary()

    @contextmanager
    def asked_for(self, hold_id: uuid.UUID) -> Iterator[None]:
        """Know of a hold for as long as the block runs, whether there will be one or not."""
        self._asked_for.add(hold_id)
        try:
            yield
        finally:
            self._asked_for.discard(hold_id)

    def add(self, held: Held) -> None:
        """Know of a hold until it has ended or nothing refers to it any more."""
        self._held[held.hold_id] = held

    def __contains__(self, hold_id: object) -> bool:
        if hold_id in self._asked_for:
            return True
        held = self._held.get(hold_id) if isinstance(hold_id, uuid.UUID) else None
        return held is not None and held.is_held


def leaving_lock(name: str, hold_id: uuid.UUID) -> Debt:
    """Return what gives up a lock by name as if its holder's session had ended, which its next holder is told."""
    return Debt(hold_id, _LEAVE_LOCK, (name, hold_id))


async def give_back_unknown(database: Database, known: KnownHolds, session_id: uuid.UUID) -> None:
    """Let go of what a session holds and its process knows nothing of: slots are left to recovery, locks as by a death.

    Raises:
        CoordinatorUnavailableError, StoreError: it could not be asked.
    """
    slots = await database.fetch("ask what this process holds", _OUR_SLOTS, session_id)
    locks = await database.fetch("ask what this process has locked", _OUR_LOCKS, session_id)
    # Only now: what was asked for before the answers is known by now, if only as something that has ended.
    debts = [letting_go(row["slot_id"], row["pool"], row["hold_id"]) for row in slots]
    debts += [leaving_lock(row["name"], row["hold_id"]) for row in locks]
    for debt in debts:
        if debt.hold_id not in known:
            database.debts.owe(debt)
