"""The schema: made once, by one process at a time, and refused where it is another version's."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from repopool_async.coordination import _pg_migrations
from repopool_async.coordination._pg_database import Database
from repopool_async.coordination._pg_migrations import Migration, migrate, migrations, status
from repopool_async.coordination.postgres import PostgresCoordinator
from repopool_async.exceptions import StoreError
from tests._postgres import Server


@pytest.fixture
async def empty(server: Server) -> AsyncIterator[str]:
    """The DSN of an empty database of our role."""
    name = f"empty_{uuid.uuid4().hex[:8]}"
    async with server.admin() as connection:
        await connection.execute(f"CREATE DATABASE {name} OWNER repopool")
    yield server.dsn(name)
    async with server.admin() as connection:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def database(empty: str) -> AsyncIterator[Database]:
    made = Database(empty)
    await made.open()
    yield made
    await made.close()


def test_migrations_are_numbered_from_one_without_gaps() -> None:
    assert [step.number for step in migrations()] == list(range(1, len(migrations()) + 1))


async def test_a_missing_schema_is_refused_made_once_and_then_accepted(empty: str, database: Database) -> None:
    with pytest.raises(StoreError, match=r"is missing.*repopool db migrate"):
        await PostgresCoordinator(empty).open()
    assert (await status(database)).version == 0
    applied = await asyncio.gather(*(migrate(database) for _ in range(4)))
    assert sorted(applied) == [[], [], [], [step.name for step in migrations()]]
    present = await status(database)
    assert present.version == present.wanted
    async with PostgresCoordinator(empty) as coordinator:
        assert await coordinator.list_slots("nothing") == []


async def test_those_who_wait_for_another_migrating_see_what_it_made(empty: str, database: Database) -> None:
    """Each has looked before, and remembers that there was nothing."""
    others = [Database(empty) for _ in range(8)]
    for other in others:
        await other.open()
        await status(other)
    try:
        applied = await asyncio.gather(*(migrate(one) for one in (database, *others)))
    finally:
        for other in others:
            await other.close()
    assert len([names for names in applied if names]) == 1


async def test_a_newer_schema_is_refused_and_left_alone(empty: str, database: Database) -> None:
    await migrate(database)
    await database.execute("age it", "INSERT INTO repopool.migration (number, name) VALUES (999, 'from the future')")
    for attempt in (PostgresCoordinator(empty).open(), migrate(database)):
        with pytest.raises(StoreError, match=r"version 999.*install the newer repopool"):
            await attempt


async def test_an_older_schema_is_refused_until_it_is_migrated(
    empty: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate(database)
    newer = [*migrations(), Migration(len(migrations()) + 1, "more.sql", "CREATE TABLE repopool.more (x integer)")]
    monkeypatch.setattr(_pg_migrations, "migrations", lambda: newer)
    with pytest.raises(StoreError, match=r"is at version \d+.*needs.*repopool db migrate"):
        await PostgresCoordinator(empty).open()
    assert await migrate(database) == ["more.sql"]
    async with PostgresCoordinator(empty):
        pass


async def test_a_migration_that_fails_leaves_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [*migrations(), Migration(99, "broken.sql", "CREATE TABLE repopool.half (x integer); SELECT 1 / 0")]
    monkeypatch.setattr(_pg_migrations, "migrations", lambda: broken)
    with pytest.raises(StoreError, match="division by zero"):
        await migrate(database)
    assert (await status(database)).version == 0


async def test_a_server_that_is_too_old_is_refused(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pg_migrations, "OLDEST_SERVER", 9999)
    with pytest.raises(StoreError, match="needs 9999 or newer"):
        await PostgresCoordinator(empty).open()
