"""Where coordinators meet: a directory, or a database; the tests of the contract run in both."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import attrs
import pytest

from repopool_async import HostSpec, PoolConfig, PoolManager
from repopool_async._clock import boottime, now
from repopool_async.config_coordination import Coordination
from repopool_async.coordination.base import Coordinator
from repopool_async.coordination.files import FileCoordinator
from repopool_async.coordination.postgres import PostgresCoordinator
from repopool_async.lock_manager import LockManager
from repopool_async.models import Pool, Slot
from repopool_async.shared_state import Locks, PoolRecords
from repopool_async.slot_store import SlotStore
from tests._postgres import Server
from tests._switched import SwitchedHost
from tests._workers import REPO, make_slot, settle

DATABASE = "shared"
TABLES = ("waiter", "slot", "pool", "history", "named_lock", "session", "incarnation", "host")
TTL = 2.0
"""Seconds of silence after which a manager of a fleet is taken for dead."""
TAKEOVER_SECONDS = 30.0
Events = list[tuple[str, dict[str, object]]]


class Clock:
    """A boot-time clock that stands still until told otherwise."""

    def __init__(self) -> None:
        self.seconds = boottime()

    def __call__(self) -> float:
        return self.seconds


class Place(Protocol):
    """Where coordinators meet."""

    records: PoolRecords
    silence_seconds: float

    async def coordinator(self, on_event: Callable[[str, Any], None] | None = None) -> Coordinator:
        """Return one as another process would have it."""

    async def locks(self) -> Locks:
        """Return named locks as another process would have them."""

    async def advance(self, seconds: float) -> None:
        """Let time pass for everything that is recorded."""

    def now(self) -> float:
        """Return the boot-time clock, as leases tell it."""

    async def is_locked(self, slot_id: str) -> bool:
        """Return whether anybody works on a slot."""

    def slot(self, number: int) -> Slot:
        """Return the record of a slot to be made."""


class FilesPlace:
    silence_seconds = 2.0

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._clock = Clock()
        self._store = SlotStore(directory)
        self.records: PoolRecords = self._store

    async def coordinator(self, on_event: Callable[[str, Any], None] | None = None) -> Coordinator:
        return FileCoordinator(
            SlotStore(self._directory), LockManager(self._store.locks_directory), on_event, clock=self._clock
        )

    async def locks(self) -> Locks:
        return LockManager(self._store.locks_directory)

    async def advance(self, seconds: float) -> None:
        self._clock.seconds += seconds

    def now(self) -> float:
        return self._clock.seconds

    async def is_locked(self, slot_id: str) -> bool:
        return await LockManager(self._store.locks_directory).is_locked(slot_id)

    def slot(self, number: int) -> Slot:
        return make_slot(self._store, number)


class PostgresPlace:
    silence_seconds = 5.0

    def __init__(self, server: Server, database: str, stack: AsyncExitStack) -> None:
        self.server = server
        self.database = database
        self.dsn = server.dsn(database)
        self._stack = stack
        self._passed = 0.0
        self.records: PoolRecords

    async def coordinator(
        self, on_event: Callable[[str, Any], None] | None = None, **options: Any
    ) -> PostgresCoordinator:
        made = PostgresCoordinator(options.pop("dsn", self.dsn), on_event=on_event, **{"max_connections": 4, **options})
        return await self._stack.enter_async_context(made)

    async def locks(self) -> Locks:
        return (await self.coordinator()).locks

    async def advance(self, seconds: float) -> None:
        self._passed += seconds
        async with self.server.admin(self.database) as connection:
            for table, columns in {"slot": ("leased_at", "expires_at"), "waiter": ("asked_at", "created_at")}.items():
                moves = ", ".join(f"{column} = {column} - make_interval(secs => {seconds})" for column in columns)
                await connection.execute(f"UPDATE repopool.{table} SET {moves}")

    def now(self) -> float:
        return boottime() + self._passed

    async def is_locked(self, slot_id: str) -> bool:
        query = "SELECT session_id IS NOT NULL FROM repopool.slot WHERE slot_id = $1"
        return bool(await self.ask(query, slot_id))

    def slot(self, number: int) -> Slot:
        return make_slot(SlotStore("/nowhere"), number)

    async def pool(self, num_slots: int, **options: Any) -> PostgresCoordinator:
        """Return a coordinator after it made a pool of AVAILABLE slots."""
        made = await self.coordinator(**options)
        await made.records.save_pool(Pool(repo_name=REPO, repo_url="u", num_slots=num_slots, created_at=now()))
        for _ in range(num_slots):
            await settle(made, await made.create(self.slot(await made.next_slot_number(REPO))))
        return made

    async def ask(self, query: str, *arguments: object) -> Any:
        """Return the first value of a query, past every coordinator."""
        async with self.server.admin(self.database) as connection:
            return await connection.fetchval(query, *arguments)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Server]:
    """A PostgreSQL that does not run, with a database that has the schema: to be copied."""
    made = Server.make()
    try:
        made.start()
        asyncio.run(made.make_database(DATABASE))
        made.stop()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="session")
def server(cluster: Server) -> Iterator[Server]:
    """A PostgreSQL for all tests of this process that leave it alone."""
    yield from _copy(cluster)


@pytest.fixture
def own_server(cluster: Server) -> Iterator[Server]:
    """A PostgreSQL for one test, to be ill-treated."""
    yield from _copy(cluster)


def _copy(cluster: Server) -> Iterator[Server]:
    made = cluster.copy()
    try:
        made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture
async def postgres(server: Server) -> AsyncIterator[PostgresPlace]:
    """A database, empty but for its schema, in which coordinators meet; they are closed afterwards."""
    async with server.admin(DATABASE) as connection:  # a database for each test takes five times as long
        await connection.execute("".join(f"DELETE FROM repopool.{table};" for table in TABLES))
    async with AsyncExitStack() as stack:
        place = PostgresPlace(server, DATABASE, stack)
        place.records = (await place.coordinator()).records
        yield place


@pytest.fixture(params=["files", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where coordinators meet."""
    if request.param == "files":
        return FilesPlace(tmp_path)
    found: PostgresPlace = request.getfixturevalue("postgres")
    return found


@pytest.fixture
def events() -> Events:
    return []


@attrs.define
class Fleet:
    """Two hosts, one database, and as many managers as a test wants; they are closed afterwards."""

    directory: Path
    dsn: str
    stack: AsyncExitStack

    def config(self, number: int, **options: Any) -> PoolConfig:
        coordination = Coordination(
            dsn=options.pop("dsn", self.dsn),
            listen_dsn=options.pop("listen_dsn", None),
            session_ttl=options.pop("ttl", TTL),
        )
        options = {"janitor_interval": 3600, "close_timeout": 5, **options}
        return PoolConfig(self.directory / f"manager{number}", coordination=coordination, **options)

    def hosts(self, **switched: SwitchedHost) -> list[HostSpec]:
        return [
            HostSpec(name, address="local", workspaces_dir=str(self.directory / name), host=switched.get(name))
            for name in ("a", "b")
        ]

    async def manager(self, number: int, hosts: list[HostSpec] | None = None, **options: Any) -> PoolManager:
        manager = PoolManager(self.config(number, **options), hosts=self.hosts() if hosts is None else hosts)
        return await self.stack.enter_async_context(manager)


@pytest.fixture
async def fleet(postgres: PostgresPlace, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(tmp_path, postgres.dsn, stack)


@pytest.fixture
async def own_fleet(own_server: Server, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(tmp_path, own_server.dsn(DATABASE), stack)
