"""Connections of one process to a database: how many, which next, and what becomes of those that nobody needs."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from repopool_async.coordination import _pg_connections
from repopool_async.coordination._pg_connections import Connections
from tests._postgres import Server
from tests.coordination.conftest import DATABASE


@pytest.fixture
async def connections(server: Server) -> AsyncIterator[Connections]:
    """At most two."""
    made = Connections(lambda: asyncpg.connect(server.dsn(DATABASE)), limit=2)
    yield made
    made.terminate()


async def pid_of(connection: Any) -> int:
    return int(await connection.fetchval("SELECT pg_backend_pid()"))


async def test_the_most_recently_used_is_taken_next(connections: Connections) -> None:
    one, two = await connections.take(), await connections.take()
    assert await pid_of(one) != await pid_of(two)
    for connection in (two, one):
        connections.put(connection)
    assert await connections.take() is one
    connections.put(one)


async def test_who_finds_no_room_waits_for_one_to_be_put_back(connections: Connections) -> None:
    one, two = await connections.take(), await connections.take()
    given_up, waiting = asyncio.create_task(connections.take()), asyncio.create_task(connections.take())
    await asyncio.sleep(0)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert not waiting.done()
    connections.put(one)
    assert await waiting is one
    for connection in (one, two):
        connections.put(connection)


async def test_one_that_broke_is_replaced(connections: Connections) -> None:
    broken = await connections.take()
    broken.terminate()
    connections.put(broken)
    other = await connections.take()
    assert other is not broken
    connections.put(other)
    other.terminate()  # while nobody has it, as a server does that restarts
    assert await connections.take() is not other


async def test_a_failure_to_connect_takes_no_room(server: Server) -> None:
    nowhere = Connections(lambda: asyncpg.connect(server.dsn("nothing")), limit=1)
    for _ in range(2):
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            await nowhere.take()


async def test_what_nobody_needed_for_long_is_ended(connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = await connections.take(), await connections.take()
    connections.put(one)
    monkeypatch.setattr(_pg_connections, "_IDLE_SECONDS", -1.0)
    connections.put(two)
    assert one.is_closed()
    assert two.is_closed()


async def test_once_ended_there_are_none(connections: Connections) -> None:
    used, idle = await connections.take(), await connections.take()
    connections.put(idle)
    connections.terminate()
    assert used.is_closed()
    assert idle.is_closed()
    with pytest.raises(ConnectionError):
        await connections.take()
    connections.put(used)
