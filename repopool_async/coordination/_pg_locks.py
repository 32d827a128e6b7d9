"""Locks by name in the database, for what one process at a time may do among all machines.

A lock is a row that names its holder's session: it ends with the session, not with a connection, so poolers and broken
connections are no matter, and a holder that was taken for dead has lost it. What must not be done by such a holder must
be refused where it is done, by the lock's token.
"""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from repopool_async._aio import Deadline
from repopool_async._codec import CodecError, loads
from repopool_async._identity import this_process
from repopool_async.coordination._pg_debts import Debt
from repopool_async.coordination._pg_holds import leaving_lock
from repopool_async.coordination._pg_link import Link
from repopool_async.coordination._pg_rows import encoded
from repopool_async.exceptions import LockTimeoutError
from repopool_async.models import Owner, StaleLock

DEFAULT_TIMEOUT_SECONDS: Final = 30.0
_POLL_SECONDS: Final = (0.02, 0.5)

_TAKE: Final = """
    WITH taken AS (
        INSERT INTO repopool.named_lock AS l (name, session_id, hold_id, owner, token, acquired_at)
        VALUES ($1, $2, $3, $4::jsonb, 1, clock_timestamp())
        ON CONFLICT (name) DO UPDATE SET session_id = excluded.session_id, hold_id = excluded.hold_id,
            owner = excluded.owner, token = l.token + 1, acquired_at = excluded.acquired_at
        WHERE l.session_id IS NULL
            OR NOT EXISTS (SELECT FROM repopool.session z WHERE z.session_id = l.session_id)
        RETURNING token
    )
    SELECT taken.token, before.session_id IS NOT NULL AS was_left
    FROM taken LEFT JOIN repopool.named_lock before ON before.name = $1
"""
_RELEASE: Final = """
    UPDATE repopool.named_lock SET session_id = NULL, hold_id = NULL, owner = NULL
    WHERE name = $1 AND hold_id = $2
"""
_FORGET_STALE: Final = """
    WITH stale AS (
        SELECT l.name, l.owner::text AS owner, repopool.seconds_since(l.acquired_at) AS age
        FROM repopool.named_lock l
        WHERE l.session_id IS NOT NULL
            AND NOT EXISTS (SELECT FROM repopool.session z WHERE z.session_id = l.session_id)
            AND NOT EXISTS (SELECT FROM unnest($1::text[]) spared WHERE starts_with(l.name, spared))
            AND ($2::float8 IS NULL OR l.acquired_at < clock_timestamp() - make_interval(secs => 3600 * $2))
        FOR UPDATE OF l
    )
    UPDATE repopool.named_lock l SET session_id = NULL, hold_id = NULL, owner = NULL
    FROM stale WHERE l.name = stale.name RETURNING stale.*
"""


class PostgresLock:
    """A lock of this process's session.

    Attributes:
        token: grows with every holder of the name. was_left: whether the last holder ended without releasing it.
    """

    def __init__(self, link: Link, name: str, debt: Debt, token: int, *, was_left: bool) -> None:
        self._link = link
        self._name = name
        self._debt: Debt | None = debt
        self.hold_id: Final = debt.hold_id
        self.token: Final = token
        self.was_left: Final = was_left

    @property
    def is_held(self) -> bool:
        """Whether it has not been released; says nothing of whether it was taken away."""
        return self._debt is not None

    def leave(self) -> None:
        """Have the next holder find `was_left`, though this one will release it."""
        if self._debt is not None:
            self._debt = leaving_lock(self._name, self.hold_id)

    async def release(self) -> None:
        """Give the lock up; where the database does not answer, as soon as it does. A second call does nothing."""
        debt, self._debt = self._debt, None
        if debt is not None:
            await self._link.give_up(debt)


class PostgresLocks:
    """See `shared_state.Locks`; every verb may also raise `CoordinatorUnavailableError` and `StoreError`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @asynccontextmanager
    async def acquire_slot_lock(
        self, slot_id: str, timeout: float | None = DEFAULT_TIMEOUT_SECONDS
    ) -> AsyncIterator[PostgresLock]:
        """See `Locks.acquire_slot_lock`."""
        lock = await self._wait_for(slot_id, timeout)
        try:
            yield lock
        finally:
            await lock.release()

    async def try_acquire(self, slot_id: str) -> PostgresLock | None:
        """See `Locks.try_acquire`."""
        hold_id = uuid.uuid4()
        debt = Debt(hold_id, _RELEASE, (slot_id, hold_id))
        owner = encoded(this_process())
        with self._link.holds.asked_for(hold_id):
            row = await self._link.begin(
                f"take the lock {slot_id}", _TAKE, slot_id, self._link.session.session_id, hold_id, owner, debt=debt
            )
            if row is None:
                return None
            lock = PostgresLock(self._link, slot_id, debt, row["token"], was_left=bool(row["was_left"]))
            self._link.holds.add(lock)
            return lock

    async def is_locked(self, slot_id: str) -> bool:
        """See `Locks.is_locked`."""
        row = await self._link.ask(
            f"look at the lock {slot_id}",
            "SELECT EXISTS (SELECT FROM repopool.named_lock l JOIN repopool.session z USING (session_id) "
            "WHERE l.name = $1) AS is_locked",
            slot_id,
        )
        return bool(row["is_locked"])

    async def cleanup_stale_locks(
        self, *, older_than_hours: float | None = None, spared_prefix: str | tuple[str, ...] = ()
    ) -> list[StaleLock]:
        """See `Locks.cleanup_stale_locks`."""
        rows = await self._link.database.fetch(
            "forget stale locks",
            _FORGET_STALE,
            [spared_prefix] if isinstance(spared_prefix, str) else list(spared_prefix),
            older_than_hours,
        )
        return [_stale_lock(row) for row in rows]

    async def _wait_for(self, name: str, timeout: float | None) -> PostgresLock:
        deadline = Deadline.after(timeout)
        pause = _POLL_SECONDS[0]
        while (lock := await self.try_acquire(name)) is None:
            if deadline.is_expired:
                raise await self._timed_out(name, timeout)
            remaining = deadline.remaining()
            delay = pause * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
            await asyncio.sleep(delay if remaining is None else min(delay, remaining))
            pause = min(2 * pause, _POLL_SECONDS[1])
        return lock

    async def _timed_out(self, name: str, timeout: float | None) -> LockTimeoutError:
        row = await self._link.ask(
            f"look at the lock {name}", "SELECT owner::text AS owner FROM repopool.named_lock WHERE name = $1", name
        )
        owner = _owner(row["owner"]) if row is not None else None
        who = f"process {owner.pid} on {owner.host}" if owner else "another process"
        waited = "" if timeout is None else f" within {timeout:g} s"
        return LockTimeoutError(
            f"{name}: its lock was not free{waited}; {who} holds it: wait longer, or end it", slot_id=name
        )


def _stale_lock(row: Any) -> StaleLock:
    return StaleLock(slot_id=row["name"], path="", owner=_owner(row["owner"]), age_seconds=row["age"])


def _owner(text: str | None) -> Owner | None:
    try:
        return loads(Owner, text.encode()) if text else None
    except CodecError:
        return None
