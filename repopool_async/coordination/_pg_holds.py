"""Which holds this process knows of, and giving back those that only the database believes to be its.

A server that takes another's place may have lost the last commits: that a hold had ended, or was never wanted. For a
session that goes on living nobody else would ever take such a slot back.
"""

import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from repopool_async.coordination._pg_database import Database
from repopool_async.coordination._pg_rows import HeldSlot, letting_go

_OURS: Final = "SELECT slot_id, pool, hold_id FROM repopool.slot WHERE session_id = $1"


class KnownHolds:
    """The ids of holds from before they are asked for until they have ended."""

    def __init__(self) -> None:
        self._asked_for: set[uuid.UUID] = set()
        self._held: weakref.WeakValueDictionary[uuid.UUID, HeldSlot] = weakref.WeakValueDictionary()

    @contextmanager
    def asked_for(self, hold_id: uuid.UUID) -> Iterator[None]:
        """Know of a hold for as long as the block runs, whether there will be one or not."""
        self._asked_for.add(hold_id)
        try:
            yield
        finally:
            self._asked_for.discard(hold_id)

    def add(self, lock: HeldSlot) -> None:
        """Know of a hold until it has ended or nothing refers to it any more."""
        self._held[lock.hold_id] = lock

    def __contains__(self, hold_id: object) -> bool:
        if hold_id in self._asked_for:
            return True
        lock = self._held.get(hold_id) if isinstance(hold_id, uuid.UUID) else None
        return lock is not None and lock.is_held


async def give_back_unknown(database: Database, known: KnownHolds, session_id: uuid.UUID) -> None:
    """Let go of the slots that a session holds and its process knows nothing of; they are left to recovery.

    Raises:
        CoordinatorUnavailableError, StoreError: it could not be asked.
    """
    rows = await database.fetch("ask what this process holds", _OURS, session_id)
    # Only now: what was asked for before the answer is known by now, if only as something that has ended.
    for row in rows:
        if row["hold_id"] not in known:
            database.debts.owe(letting_go(row["slot_id"], row["pool"], row["hold_id"]))
