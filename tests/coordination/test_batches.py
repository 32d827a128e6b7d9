"""Calls that become one statement: which do, how each of them ends, and what of them nobody is to wait for."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from repopool_async.coordination._pg_batches import AT_ONCE, MOST, Batched
from repopool_async.coordination._pg_database import Database
from repopool_async.coordination.postgres import PostgresCoordinator
from repopool_async.exceptions import CoordinatorUnavailableError, LeaseLostError, StoreError
from tests._postgres import Proxy, Server, eventually
from tests._workers import COMMIT, REPO, settle
from tests.coordination.conftest import DATABASE, PostgresPlace

GATE = 1789
HUNDRED_BY = Batched(f"""
    WITH asked AS MATERIALIZED (
        SELECT a.*, pg_advisory_xact_lock_shared({GATE}) FROM unnest($1::bigint[]) WITH ORDINALITY a (number, place)
    ), noted AS (
        INSERT INTO public.asked_for SELECT number FROM asked
    )
    SELECT place, 100 / number AS result, txid_current() AS transaction FROM asked WHERE number <> 100
""")
"""Waits for the gate; refuses to divide by 0, and gives no answer to 100."""


class Gate:
    """What all of these statements wait for while it is closed."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def close(self) -> None:
        await self._connection.execute("SELECT pg_advisory_lock($1)", GATE)

    async def open(self) -> None:
        await self._connection.execute("SELECT pg_advisory_unlock($1)", GATE)

    async def has_waiting(self, count: int) -> None:
        """Wait until so many statements do."""
        query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = $1 AND NOT granted"

        async def has() -> bool:
            return bool(await self._connection.fetchval(query, GATE) == count)

        await eventually(has)

    async def asked_for(self) -> list[int]:
        """Return what was ever asked for with effect."""
        rows = await self._connection.fetch("SELECT number FROM public.asked_for ORDER BY number")
        return [row["number"] for row in rows]


@pytest.fixture
async def gate(server: Server) -> AsyncIterator[Gate]:
    async with server.admin(DATABASE) as connection:
        await connection.execute("CREATE TABLE public.asked_for (number bigint)")
        await connection.execute("GRANT ALL ON public.asked_for TO repopool")
        try:
            yield Gate(connection)
        finally:
            await connection.execute("DROP TABLE public.asked_for")


@pytest.fixture
async def database(server: Server, gate: Gate) -> AsyncIterator[Database]:
    made = Database(server.dsn(DATABASE), max_connections=4)
    await made.open()
    yield made
    await made.close()


def asking(database: Database, number: int) -> "asyncio.Task[Any]":
    return asyncio.create_task(database.fetch_row(f"divide by {number}", HUNDRED_BY, number))


async def all_at_work(database: Database, gate: Gate) -> "list[asyncio.Task[Any]]":
    """Close the gate, and ask until all wait at it that may at once."""
    await gate.close()
    tasks = []
    for number in range(1, AT_ONCE + 1):
        tasks.append(asking(database, number))
        await gate.has_waiting(number)
    return tasks


async def test_what_is_asked_for_meanwhile_is_one_statement(database: Database, gate: Gate) -> None:
    first = await all_at_work(database, gate)
    others = [asking(database, number) for number in range(10, 20)]
    await gate.open()
    rows = await asyncio.gather(*first, *others)

    assert [row["result"] for row in rows] == [100, 50, 10, 9, 8, 7, 7, 6, 6, 5, 5, 5]
    transactions = [row["transaction"] for row in rows]
    assert len(set(transactions[:AT_ONCE])) == AT_ONCE, "who asks while nothing is under way does not wait"
    assert len(set(transactions[AT_ONCE:])) == 1


async def test_a_statement_has_only_so_many_calls(database: Database, gate: Gate) -> None:
    first = await all_at_work(database, gate)
    others = [asking(database, number) for number in range(3, MOST + 6)]
    await gate.open()
    await asyncio.gather(*first)
    transactions = [row["transaction"] for row in await asyncio.gather(*others) if row is not None]

    assert max(map(transactions.count, transactions)) <= MOST
    assert len(set(transactions)) == 2


async def test_a_call_without_an_answer_has_none(database: Database) -> None:
    rows = await asyncio.gather(*(asking(database, number) for number in (100, 1)))

    assert (rows[0], rows[1]["result"]) == (None, 100)


async def test_a_call_that_is_refused_spoils_no_other(database: Database, gate: Gate) -> None:
    first = await all_at_work(database, gate)
    others = [asking(database, number) for number in (5, 0, 10)]
    await gate.open()
    await asyncio.gather(*first)
    ends = await asyncio.gather(*others, return_exceptions=True)

    assert (ends[0]["result"], ends[2]["result"]) == (20, 10)  # type: ignore[index]
    assert isinstance(ends[1], StoreError)
    assert "cannot divide by 0" in str(ends[1])
    assert await gate.asked_for() == [1, 2, 5, 10]


async def test_who_is_cancelled_before_anything_was_sent_goes_at_once(database: Database, gate: Gate) -> None:
    first = await all_at_work(database, gate)
    given_up, waiting = asking(database, 5), asking(database, 10)
    await asyncio.sleep(0)
    given_up.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert given_up.cancelled(), "while the gate is closed, and with no moment of grace"
    await gate.open()
    await asyncio.gather(*first, waiting)

    assert await gate.asked_for() == [1, 2, 10]


async def test_who_is_cancelled_later_leaves_the_others_alone(database: Database, gate: Gate) -> None:
    first = await all_at_work(database, gate)
    first[0].cancel()
    waiting = asking(database, 10)
    with pytest.raises(asyncio.CancelledError):
        await first[0]
    await gate.open()

    assert [row["result"] for row in await asyncio.gather(*first[1:], waiting)] == [50, 10]


async def test_who_waits_has_no_more_time_than_who_is_at_work(database: Database, gate: Gate) -> None:
    database.call_seconds = 0.5
    calls = [*await all_at_work(database, gate), asking(database, 10)]
    ends = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(end) for end in ends] == [CoordinatorUnavailableError] * 3
    assert "cannot divide by 10" in str(ends[2])
    await gate.open()
    database.call_seconds = 10
    assert (await asking(database, 20))["result"] == 5


async def test_all_calls_end_when_the_database_is_closed(database: Database, gate: Gate) -> None:
    calls = [*await all_at_work(database, gate), asking(database, 10)]
    await asyncio.sleep(0)
    await database.close()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    late = await asyncio.gather(asking(database, 20), return_exceptions=True)

    assert [type(end) for end in [*ends, *late]] == [CoordinatorUnavailableError] * 4
    await gate.open()


# Of leases


async def claims(coordinator: Any, count: int) -> list[Any]:
    """Claim so many slots at once."""
    return await asyncio.gather(
        *(coordinator.claim(REPO, commit=COMMIT, branch="main", lease_id=f"lease-{number}") for number in range(count))
    )


async def warmed_up(coordinator: Any) -> list[Any]:
    """Have all statements prepared on the only connection; return what claims of all slots get."""
    for _ in range(2):
        grants = await claims(coordinator, 6)
        await asyncio.gather(*(coordinator.begin_return(grant) for grant in grants))
        await asyncio.gather(*(settle(coordinator, grant) for grant in grants))
    return await claims(coordinator, 6)


async def test_many_leases_at_once_are_each_its_own(postgres: PostgresPlace) -> None:
    coordinator = await postgres.pool(6)
    claimed = await claims(coordinator, 8)
    grants = [grant for grant in claimed if grant is not None]

    assert all(grant is None or grant.lease.lease_id == f"lease-{place}" for place, grant in enumerate(claimed))
    assert len({grant.slot.slot_id for grant in grants}) == 6
    slots = await asyncio.gather(*(coordinator.begin_return(grant) for grant in grants))
    assert [slot.slot_id for slot in slots] == [grant.slot.slot_id for grant in grants]
    released = await asyncio.gather(*(settle(coordinator, grant) for grant in grants))
    assert [await coordinator.get_slot(slot.slot_id) for slot in released] == released


async def test_of_many_releases_only_those_fail_whose_lease_was_taken_away(postgres: PostgresPlace) -> None:
    coordinator, other = await postgres.pool(6), await postgres.coordinator()
    grants = await claims(coordinator, 6)
    await other.force_unlock(grants[1].slot.slot_id)
    returns = await asyncio.gather(*(coordinator.begin_return(grant) for grant in grants), return_exceptions=True)
    await other.force_unlock(grants[4].slot.slot_id)
    releases = await asyncio.gather(*(settle(coordinator, grant) for grant in grants), return_exceptions=True)

    assert [place for place, end in enumerate(returns) if isinstance(end, LeaseLostError)] == [1]
    assert [place for place, end in enumerate(releases) if isinstance(end, LeaseLostError)] == [1, 4]
    assert await postgres.ask("SELECT count(*) FROM repopool.slot WHERE state = 'available'") == 4


async def test_a_lease_whose_row_is_locked_holds_up_no_other(postgres: PostgresPlace) -> None:
    coordinator = await postgres.pool(6)
    grants = await claims(coordinator, 6)
    assert None not in grants
    for step in (coordinator.begin_return, lambda grant: settle(coordinator, grant)):
        async with postgres.server.admin(postgres.database) as connection, connection.transaction():
            await connection.execute("SELECT FROM repopool.slot WHERE slot_id = $1 FOR UPDATE", grants[2].slot.slot_id)
            tasks = [asyncio.create_task(step(grant)) for grant in grants]
            await asyncio.gather(*tasks[:2], *tasks[3:])
            assert not tasks[2].done()
        await tasks[2]


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    async with Proxy(server.port) as made:
        yield made


async def far_away(place: PostgresPlace, proxy: Proxy) -> PostgresCoordinator:
    """Return a coordinator with one connection, through the proxy, on which all statements are prepared."""
    await place.pool(6)
    far = await place.coordinator(dsn=place.server.dsn(DATABASE, port=proxy.port), max_connections=1)
    for _ in range(2):
        grants = await claims(far, 6)
        await asyncio.gather(*(far.begin_return(grant) for grant in grants))
        await asyncio.gather(*(settle(far, grant) for grant in grants))
    return far


async def lose_reply(place: PostgresPlace, proxy: Proxy, condition: str) -> None:
    """Let all six slots become like that, and the connection end without having told of it."""

    async def is_so() -> bool:
        query = f"SELECT count(*) FROM repopool.slot WHERE {condition}"
        return bool(await place.ask(query) == 6)

    await eventually(is_so)
    proxy.swallow_replies(False)
    proxy.cut()


async def test_many_claims_whose_reply_is_lost_are_all_given_back(postgres: PostgresPlace, proxy: Proxy) -> None:
    far = await far_away(postgres, proxy)
    proxy.swallow_replies()
    claiming = asyncio.create_task(claims(far, 6))
    await lose_reply(postgres, proxy, "state = 'allocated'")
    with pytest.raises(CoordinatorUnavailableError):
        await claiming

    async def are_free() -> bool:
        query = "SELECT count(*) FROM repopool.slot WHERE state = 'available' AND session_id IS NULL"
        return bool(await postgres.ask(query) == 6)

    await eventually(are_free)


async def test_many_leases_whose_end_had_no_reply_are_ended_once(postgres: PostgresPlace, proxy: Proxy) -> None:
    far = await far_away(postgres, proxy)
    grants = await claims(far, 6)
    proxy.swallow_replies()
    ending = asyncio.gather(*(far.begin_return(grant) for grant in grants))
    await lose_reply(postgres, proxy, "state = 'cleaning'")

    assert await ending == [await far.get_slot(grant.slot.slot_id) for grant in grants]
    history = "SELECT count(*) FROM repopool.history WHERE event = 'released'"
    assert await postgres.ask(history) == 18, "six leases, three times"


async def test_many_releases_that_had_no_reply_are_repeated(postgres: PostgresPlace, proxy: Proxy) -> None:
    far = await far_away(postgres, proxy)
    grants = await claims(far, 6)
    await asyncio.gather(*(far.begin_return(grant) for grant in grants))
    proxy.swallow_replies()
    releasing = asyncio.gather(*(settle(far, grant) for grant in grants))
    await lose_reply(postgres, proxy, "state = 'available'")

    assert await releasing == [await far.get_slot(grant.slot.slot_id) for grant in grants]
