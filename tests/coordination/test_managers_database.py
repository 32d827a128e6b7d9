"""Managers whose database fails over and loses its last commits, or lies behind a pooler."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from repopool_async import (
    CoordinatorUnavailableError,
    FencedError,
    LeasedSlot,
    LeaseLostError,
    PoolManager,
    SlotState,
)
from repopool_async.coordination import _pg_link
from repopool_async.coordination.postgres import PostgresCoordinator
from tests._postgres import Server, caught_up, cut_off, eventually, pgbouncer, promote
from tests.coordination.conftest import DATABASE, TAKEOVER_SECONDS, Fleet


def coordinator_of(manager: PoolManager) -> PostgresCoordinator:
    coordinator = manager._shared.coordinator
    assert isinstance(coordinator, PostgresCoordinator)
    return coordinator


async def leased(manager: PoolManager, timeout: float = 60) -> LeasedSlot:
    slot = await manager.allocate_slot("web", timeout=timeout)
    assert slot is not None
    return slot


# -- failover ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def standby(own_server: Server) -> AsyncIterator[Server]:
    """A server that follows `own_server`."""
    await asyncio.to_thread(own_server.stop)
    made = own_server.standby()
    try:
        for each in (own_server, made):
            await asyncio.to_thread(each.start)
        yield made
    finally:
        made.remove()


@pytest.fixture
async def replicated(own_server: Server, standby: Server, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A fleet that knows both servers."""
    dsn = own_server.dsn(DATABASE).replace("/" + DATABASE, f",127.0.0.1:{standby.port}/{DATABASE}")
    async with AsyncExitStack() as stack:
        yield Fleet(tmp_path, dsn, stack)


async def test_a_failover_that_loses_commits_gives_no_slot_twice_and_loses_none(
    replicated: Fleet, own_server: Server, standby: Server, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pg_link, "_SWEEP_SECONDS", 0.0)
    one, two = await replicated.manager(1), await replicated.manager(2)
    await one.create_pool("web", str(origin), num_slots=4, hosts=["a", "b"])
    kept, returned = await leased(one), await leased(two)
    await caught_up(standby, own_server)
    await cut_off(standby)
    lost = await leased(one)
    (lost.path / "dirt").write_text("of a lease that nobody knows any more")
    await two.release_slot(returned)
    lock = await coordinator_of(two).locks.try_acquire("pool-web")
    assert lock is not None

    own_server.stop(signal.SIGQUIT)
    await promote(standby)

    async with asyncio.timeout(TAKEOVER_SECONDS):
        await lost.lost.wait()
    assert not kept.lost.is_set()
    assert (await kept.run("echo", "still here")).text == "still here\n"
    # What was returned is taken for leased, until its manager finds that it knows nothing of it.
    others = [await leased(two) for _ in range(3)]
    assert sorted(slot.slot_id for slot in [kept, *others]) == [f"workspace-web-slot{n}" for n in range(1, 5)]
    assert [(await slot.run("git", "status", "--short", "--ignored")).text for slot in others] == ["", "", ""]
    (saved,) = await two.list_salvage("web")
    await two.restore_salvage(saved.salvage_id, others[0])
    assert (others[0].path / "dirt").read_text() == "of a lease that nobody knows any more"
    with pytest.raises((FencedError, LeaseLostError)):
        await lost.run("true")
    with pytest.raises(LeaseLostError):
        await one.release_slot(lost)
    assert await one.allocate_slot("web") is None
    await lock.release()
    await one.release_slot(kept)
    for slot in others:
        await two.release_slot(slot)
    assert [slot.state for slot in await two.list_slots("web")] == [SlotState.AVAILABLE] * 4
    async with coordinator_of(one).locks.acquire_slot_lock("pool-web", timeout=0):
        pass


Upkeep = Callable[[PoolManager, str], Awaitable[object]]


async def drop_quarantined(manager: PoolManager, slot_id: str) -> None:
    """Free disk space, and repair afterwards."""
    await (await manager.get_pool("web")).keeper.drop_quarantined_trees()
    await manager.repair_slot(slot_id)


@pytest.mark.parametrize(
    ("state", "upkeep"),
    [
        ("available", lambda manager, _: manager.drain("web")),
        ("available", lambda manager, slot_id: manager.remove_slot(slot_id)),
        ("error", drop_quarantined),
    ],
    ids=["drain", "remove", "drop"],
)
async def test_what_a_lease_left_that_the_records_have_lost_is_saved(
    fleet: Fleet, server: Server, origin: Path, state: str, upkeep: Upkeep
) -> None:
    one, two = await fleet.manager(1), await fleet.manager(2)
    await one.create_pool("web", str(origin), num_slots=1, hosts=["a"])
    async with server.admin(DATABASE) as connection:
        await connection.execute("CREATE TEMPORARY TABLE before AS SELECT * FROM repopool.slot")
        await connection.execute(
            "UPDATE before SET state = $1::text, record = record || jsonb_build_object('state', $1::text)", state
        )
        lost = await leased(one)
        (lost.path / "dirt").write_text("of a lease that nobody knows any more")
        await connection.execute("DELETE FROM repopool.slot")
        await connection.execute("INSERT INTO repopool.slot SELECT * FROM before")

    await upkeep(two, lost.slot_id)

    (saved,) = await two.list_salvage("web")
    assert (saved.slot_id, saved.reason, saved.untracked) == (lost.slot_id, "crashed", 1)
    with pytest.raises((FencedError, LeaseLostError)):
        await lost.run("true")


async def test_a_name_whose_release_a_failover_lost_is_free_again(
    replicated: Fleet, own_server: Server, standby: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pg_link, "_SWEEP_SECONDS", 0.0)
    one, two = await replicated.manager(1), await replicated.manager(2)
    lock = await coordinator_of(one).locks.try_acquire("pool-web")
    assert lock is not None
    await caught_up(standby, own_server)
    await cut_off(standby)
    await lock.release()

    own_server.stop(signal.SIGQUIT)
    await promote(standby)

    await eventually(lambda: _answers(two), TAKEOVER_SECONDS)
    async with coordinator_of(two).locks.acquire_slot_lock("pool-web", timeout=TAKEOVER_SECONDS) as held:
        assert held.was_left


async def _answers(manager: PoolManager) -> bool:
    try:
        return await manager.list_pools() == []
    except CoordinatorUnavailableError:
        return False


# -- a pooler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_told", [True, False], ids=["listen_dsn", "polling"])
async def test_managers_behind_a_pooler_share_a_pool(
    fleet: Fleet, server: Server, origin: Path, *, is_told: bool
) -> None:
    async with pgbouncer(server.port, DATABASE) as port, AsyncExitStack() as stack:
        behind = Fleet(fleet.directory, server.dsn(DATABASE, port=port), stack)
        listen_dsn = fleet.dsn if is_told else None
        one, two = [await behind.manager(number, listen_dsn=listen_dsn) for number in (1, 2)]
        await one.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
        mine, others = await leased(one), await leased(two)
        assert {mine.host_id, others.host_id} == {"a", "b"}
        waiting = asyncio.create_task(leased(two))
        async with asyncio.timeout(TAKEOVER_SECONDS):
            while (await two.get_pool("web")).stats()["waiting"] == 0:
                await asyncio.sleep(0)
        if is_told:
            await eventually(lambda: asyncio.sleep(0, coordinator_of(two).has_push), TAKEOVER_SECONDS)
        await one.release_slot(mine)
        third = await waiting
        assert (third.slot_id, third.token) == (mine.slot_id, mine.token + 1)
        assert coordinator_of(two).has_push is is_told
        assert (await third.run("git", "rev-parse", "HEAD")).text.strip() == third.commit
        await asyncio.gather(two.release_slot(others), two.release_slot(third))
        assert await one.available_count("web") == 2


async def test_a_manager_whose_pooler_goes_away_keeps_its_leases(fleet: Fleet, server: Server, origin: Path) -> None:
    async with AsyncExitStack() as stack:
        async with pgbouncer(server.port, DATABASE) as port:
            behind = Fleet(fleet.directory, server.dsn(DATABASE, port=port), stack)
            one = await behind.manager(1)
            await one.create_pool("web", str(origin), num_slots=1, hosts=["a"])
            slot = await leased(one)
        with pytest.raises(CoordinatorUnavailableError):
            await one.get_slot_status(slot.slot_id)
        assert (await slot.run("echo", "still here")).text == "still here\n"
        async with pgbouncer(server.port, DATABASE, port=port):
            await one.release_slot(slot)
            assert await one.available_count("web") == 1
            await stack.aclose()
