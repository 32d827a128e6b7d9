"""What everything that this process keeps in the database shares: connections, session, debts, the reaper.

It knows how to ask, how to insist, and that nothing is begun by a process that may be taken for dead; it knows no slot,
lock or pool.
"""

import asyncio
import getpass
import logging
import random
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import attrs

from repopool_async._aio import Deadline, TaskSet, in_thread
from repopool_async._clock import boottime
from repopool_async._identity import this_process
from repopool_async.coordination._pg_batches import Batched
from repopool_async.coordination._pg_database import CALL_SECONDS, Database
from repopool_async.coordination._pg_debts import Debt
from repopool_async.coordination._pg_errors import SessionExpiredError
from repopool_async.coordination._pg_holds import KnownHolds, give_back_unknown
from repopool_async.coordination._pg_migrations import require_current
from repopool_async.coordination._pg_session import Session
from repopool_async.coordination.base import OnEvent
from repopool_async.exceptions import CoordinatorUnavailableError, PoolManagerError

TTL_SECONDS: Final = 30.0
_SWEEP_SECONDS: Final = 60.0
_RETRY_SECONDS: Final = (0.05, 1.0)
_GOODBYE_SECONDS: Final = 1.0
_HURRY_SECONDS: Final = 1.0
_GIVE_UP_SECONDS: Final = 1.0

_log: Final = logging.getLogger("repopool")


class Link:
    """This process's connection to one database; see `postgres.PostgresCoordinator` for the arguments."""

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
        self.database: Final = Database(dsn, max_connections=max_connections, call_seconds=call_seconds)
        self.session: Session
        self.holds: Final = KnownHolds()
        self.grace_seconds = ttl / 3
        self._listen_dsn = listen_dsn
        self._ttl = ttl
        self._on_event = on_event
        self._waiting: dict[str, Callable[[], object]] = {}
        self._tasks = TaskSet("reaper")
        self._is_open = False
        self._is_hurried = False

    async def open(self) -> None:
        """Connect, check the schema, and make this process known.

        Raises:
            CoordinatorUnavailableError: it cannot be used now, or is a standby. StoreError: it refuses, or its
                schema is of another version.
        """
        try:
            await self.database.open()
            await require_current(self.database)
            self.session = self._new_session()
            try:
                await self.session.start()
            except BaseException:
                await in_thread(self.session.stop)
                raise
        except BaseException:
            await self.database.close()
            raise
        self._is_open = True
        self._tasks.spawn(self._reap_for_ever(), name="reap")

    def hurry(self) -> None:
        """Have calls end soon from now on, and ask nothing twice."""
        self._is_hurried = True
        self.database.call_seconds = min(self.database.call_seconds, _HURRY_SECONDS)

    async def close(self) -> None:
        """Leave the database in good order, as far as it answers within a second; what is still held is given up."""
        if not self._is_open:
            return
        self._is_open = False
        await self._tasks.cancel()
        await in_thread(self.session.stop)
        with suppress(TimeoutError, PoolManagerError, SessionExpiredError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self.database.execute("end the session", "CALL repopool.end_session($1)", self.session.session_id)
        await self.database.close()

    def _new_session(self) -> Session:
        loop = asyncio.get_running_loop()
        # Through a pooler notifications do not arrive.
        can_listen = self._listen_dsn is not None or not self.database.is_pooled
        owner = this_process()
        return Session(
            self.database.connect,
            (lambda: self.database.connect(self._listen_dsn)) if can_listen else None,
            where=self.database.where,
            owner={**attrs.asdict(owner), "user": _user()},
            ttl=self._ttl,
            on_event=lambda kind, fields: loop.call_soon_threadsafe(self.tell, kind, fields),
            on_notice=lambda hold_id: loop.call_soon_threadsafe(self._noticed, hold_id),
        )

    # Telling

    def tell(self, kind: str, fields: Mapping[str, object]) -> None:
        """Tell whoever listens to events."""
        if self._on_event is not None:
            self._on_event(kind, fields)

    def listen_for(self, hold_id: uuid.UUID, on_change: Callable[[], object] | None) -> None:
        """Call back when there is news of a waiter; None to end that."""
        if on_change is None:
            self._waiting.pop(str(hold_id), None)
        else:
            self._waiting[str(hold_id)] = on_change
            self.session.listen()

    def _noticed(self, hold_id: str) -> None:
        on_change = self._waiting.get(hold_id)
        if on_change is not None:
            on_change()

    # Asking

    async def begin(self, what: str, statement: str | Batched, *arguments: object, debt: Debt) -> Any:
        """Ask for something that only a process known to be alive may have; the first row of the answer.

        Raises:
            CoordinatorUnavailableError: no answer, and the debt will be paid; or this process may be taken for dead.
        """
        self.session.require_trust()
        return await self.ask(what, statement, *arguments, debt=debt)

    async def ask(self, what: str, statement: str | Batched, *arguments: object, debt: Debt | None = None) -> Any:
        """Execute one statement; return its first row or None."""
        with self.session_expiry_told():
            return await self.database.fetch_row(what, statement, *arguments, debt=debt)

    async def insist(
        self, what: str, statement: str | Batched, *arguments: object, tells_repetition: bool = False
    ) -> Any:
        """Execute a statement until there is an answer, for one `ttl`; return its first row or None.

        Args:
            tells_repetition: give the statement one more argument: whether it may have been executed before.

        Raises:
            CoordinatorUnavailableError: there was no answer all that time.
        """
        deadline = Deadline.after(self._ttl)
        is_repeated = False
        pause = _RETRY_SECONDS[0]
        while True:
            try:
                return await self.ask(what, statement, *arguments, *([is_repeated] if tells_repetition else []))
            except CoordinatorUnavailableError:
                if deadline.is_expired or self._is_hurried or not self._is_open:
                    raise
            is_repeated = True
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause = min(2 * pause, _RETRY_SECONDS[1])

    async def give_up(self, debt: Debt) -> None:
        """Pay a debt: now, or as soon as the database answers; nobody waits for that longer than a moment."""
        with suppress(CoordinatorUnavailableError, TimeoutError):
            async with asyncio.timeout(_GIVE_UP_SECONDS):
                await self.database.execute("give back", debt.statement, *debt.arguments, debt=debt)

    @contextmanager
    def session_expiry_told(self) -> Iterator[None]:
        """Turn a `SessionExpiredError` of the block into an error for callers."""
        try:
            yield
        except SessionExpiredError as error:
            self.session.check_now()
            raise CoordinatorUnavailableError(
                f"the database {self.database.where} took this process for dead; it makes itself known again within "
                f"seconds: try again then"
            ) from error

    # Reaping

    async def _reap_for_ever(self) -> None:
        swept = float("-inf")
        while True:
            is_full = boottime() - swept >= _SWEEP_SECONDS
            with suppress(PoolManagerError, SessionExpiredError):
                # Who has just come back would take all others for dead that were cut off with it.
                if self.session.is_steady:
                    await self.reap(is_full=is_full)
                    swept = boottime() if is_full else swept
            await asyncio.sleep(self._ttl / 3 * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    async def reap(self, *, is_full: bool = True) -> int:
        """End the sessions of dead processes, and return how many; what they held are orphans, or free, from now on.

        Args:
            is_full: look also for what ended sessions left behind, and for what is held by ours and unknown to us.
        """
        if is_full:
            await give_back_unknown(self.database, self.holds, self.session.session_id)
        row = await self.database.fetch_row(
            "reap sessions",
            "CALL repopool.reap($1, $2, $3, NULL)",
            self.session.session_id,
            self.grace_seconds,
            is_full,
        )
        return int(row["p_reaped"])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
