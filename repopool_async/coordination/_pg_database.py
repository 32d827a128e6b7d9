"""Calls to the database that end in time, whatever the server does and whoever is cancelled.

Every call runs in a task of its own, or in one together with others (`_pg_batches`), with a deadline. Who is cancelled
does not wait for the database: after a moment it goes, the call ends by itself, and what it brought about that nobody
learnt of becomes a debt (`_pg_debts`). What the statements mean is not known here; retrying is the callers' business.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

from repopool_async._aio import TaskSet, shielded
from repopool_async.coordination._pg_batches import Batched, Batches
from repopool_async.coordination._pg_connections import Connection, Connections
from repopool_async.coordination._pg_debts import Debt, Debts
from repopool_async.coordination._pg_errors import shown, translated
from repopool_async.exceptions import CoordinatorUnavailableError, PoolManagerError, StoreError

T = TypeVar("T")

CALL_SECONDS: Final = 10.0
"""How long one call may take, waiting for a connection included."""
GRACE_SECONDS: Final = 0.5
"""How long a cancelled caller waits for its call to end, so that nothing of it is under way afterwards."""
_POOLED_STATEMENTS: Final = 0
_STATEMENTS: Final = 100


class Database:
    """A bounded number of connections to one database, made when they are needed.

    Args:
        dsn: of PostgreSQL, or of a pooler before it. max_connections: at once.
        call_seconds: after which a call fails.
    """

    def __init__(self, dsn: str, *, max_connections: int = 8, call_seconds: float = CALL_SECONDS) -> None:
        self.where: Final = shown(dsn)
        self.call_seconds = call_seconds
        self.is_pooled = False
        self._dsn = dsn
        self._max_connections = max_connections
        self._connections: Connections | None = None
        self._batches: dict[Batched, Batches] = {}
        self.debts: Debts
        self._calls = TaskSet("database", on_error=lambda _name, _error: None)  # their callers are told

    async def open(self) -> None:
        """Connect once, to see whether that is possible and whether a pooler is between.

        Raises:
            CoordinatorUnavailableError, StoreError: it cannot be used.
        """
        with translated(self.where, "connect"):
            async with asyncio.timeout(self.call_seconds):
                connection = await self.connect()  # without prepared statements, which confuse poolers
                try:
                    # A pooler tells clients a process number of its own invention.
                    pid = await connection.fetchval("SELECT pg_backend_pid()")
                    self.is_pooled = pid != connection.get_server_pid()
                finally:
                    connection.terminate()
            self.debts = Debts(self._pay)
            self.debts.start()
            self._connections = Connections(self.connect, limit=self._max_connections)

    async def connect(self, dsn: str | None = None) -> Connection:
        """Return a connection outside the pool, to a primary; the caller bounds the time."""
        is_pooled = dsn is None and (self._connections is None or self.is_pooled)
        return await _asyncpg().connect(
            dsn or self._dsn,
            timeout=self.call_seconds,
            statement_cache_size=_POOLED_STATEMENTS if is_pooled else _STATEMENTS,
            target_session_attrs="read-write",
        )

    async def close(self) -> None:
        """Drop every connection at once; calls under way fail."""
        if self._connections is not None:
            await self.debts.stop()
            self._connections.terminate()
        await self._calls.cancel()

    async def call(self, what: str, work: Callable[[Connection], Awaitable[T]], *, debt: Debt | None = None) -> T:
        """Do some work on a connection.

        Args:
            what: it is, as in "cannot claim a slot". work: must do all it does through the connection.
            debt: is paid where nobody will ever know whether the work took effect, because it failed without an answer
                or because the caller was cancelled.

        Raises:
            asyncio.CancelledError: the caller was cancelled; the work has ended and the debt is paid, or both will be.
            CoordinatorUnavailableError: there was no answer; the work may have taken effect or not.
            StoreError: it was refused. SessionExpiredError: it was refused because our session has ended.
        """
        limit = asyncio.get_running_loop().time() + self.call_seconds
        task = self._calls.spawn(self._bounded(work, limit), name=what)
        return await self._answer(what, task, debt)

    async def fetch_row(self, what: str, statement: str | Batched, *arguments: object, debt: Debt | None = None) -> Any:
        """Execute one statement and return its first row, None where there is none; raises as `call`.

        A batched one may be executed together with what others ask for at that time.
        """
        if isinstance(statement, str):
            return await self.call(what, lambda connection: connection.fetchrow(statement, *arguments), debt=debt)
        batches = self._batches_of(statement)
        answer = batches.put(arguments)
        return await self._answer(what, answer, debt, withdraw=batches.withdraw)

    def _batches_of(self, batched: Batched) -> Batches:
        if batched not in self._batches:
            self._batches[batched] = Batches(
                batched,
                self._fetch_together,
                is_refusal=_is_refusal,
                start=lambda work: self._calls.spawn(work, name="batch"),
            )
        return self._batches[batched]

    async def _fetch_together(self, statement: str, arguments: tuple[object, ...], asked_at: float) -> list[Any]:
        limit = asked_at + self.call_seconds
        rows: list[Any] = await self._bounded(lambda connection: connection.fetch(statement, *arguments), limit)
        return rows

    async def fetch(self, what: str, statement: str, *arguments: object) -> list[Any]:
        """Execute one statement and return its rows; raises as `call`."""
        return await self.call(what, lambda connection: connection.fetch(statement, *arguments))

    async def execute(self, what: str, statement: str, *arguments: object, debt: Debt | None = None) -> None:
        """Execute one statement; raises as `call`."""
        await self.call(what, lambda connection: connection.execute(statement, *arguments), debt=debt)

    async def _answer(
        self,
        what: str,
        answer: "asyncio.Future[T]",
        debt: Debt | None,
        withdraw: Callable[["asyncio.Future[T]"], bool] = lambda _answer: False,
    ) -> T:
        try:
            await asyncio.wait([answer])
        except BaseException:
            if not withdraw(answer):
                if debt is not None:
                    answer.add_done_callback(lambda done: None if _was_refused(done) else self.debts.owe(debt))
                await shielded(self._leave(answer, debt), name="leave-call")
            raise
        if debt is not None and not _has_answer(answer):
            self.debts.owe(debt)
        if answer.cancelled():
            raise CoordinatorUnavailableError(f"cannot {what}: the connection to {self.where} was closed meanwhile")
        with translated(self.where, what):
            return answer.result()

    async def _leave(self, answer: "asyncio.Future[Any]", debt: Debt | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                await asyncio.wait([answer])
                if debt is not None:
                    await self.debts.paid(debt)

    async def _pay(self, debt: Debt) -> None:
        await self.execute("give back", debt.statement, *debt.arguments)

    async def _bounded(self, work: Callable[[Connection], Awaitable[T]], limit: float) -> T:
        if self._connections is None:
            raise StoreError(f"the database {self.where} is not open; open the coordinator first")
        async with asyncio.timeout_at(limit):
            connection = await self._connections.take()
            try:
                return await work(connection)
            except BaseException as error:
                if not _is_refusal(error) and not isinstance(error, PoolManagerError):
                    connection.terminate()  # what is under way on it is unknown, and to ask would take time
                raise
            finally:
                self._connections.put(connection)


def _has_answer(answer: "asyncio.Future[Any]") -> bool:
    return not answer.cancelled() and (answer.exception() is None or _was_refused(answer))


def _was_refused(answer: "asyncio.Future[Any]") -> bool:
    """Return whether the database, or this library before it was asked, said that nothing was done."""
    error = None if answer.cancelled() else answer.exception()
    return error is not None and (isinstance(error, PoolManagerError) or _is_refusal(error))


def _is_refusal(error: BaseException) -> bool:
    """Return whether a server told, in good order, that a statement failed; its connection is as good as before."""
    return isinstance(getattr(error, "sqlstate", None), str) and not str(error.sqlstate).startswith(("08", "57"))  # type: ignore[attr-defined]


def _asyncpg() -> Any:
    try:
        import asyncpg  # noqa: PLC0415 - optional
    except ImportError as error:
        raise StoreError(
            "coordination by PostgreSQL needs asyncpg; install it with: pip install 'repopool-async[postgres]'"
        ) from error
    return asyncpg
