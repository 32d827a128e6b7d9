"""Pool records, logs and named locks: what files and a database both promise."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest

from repopool_async._clock import now
from repopool_async.coordination.base import Coordinator
from repopool_async.exceptions import LockTimeoutError, PoolNotFoundError, SlotNotFoundError, StoreError
from repopool_async.models import CleanupResult, Pool
from tests._postgres import eventually
from tests._workers import REPO, settle
from tests.coordination.conftest import Place, PostgresPlace

SLOT = "workspace-web-slot1"


def pool(name: str = REPO, **fields: Any) -> Pool:
    return Pool(**{"repo_name": name, "repo_url": "https://host/x", "num_slots": 2, "created_at": now(), **fields})


def cleanup(number: int, slot_id: str = SLOT) -> CleanupResult:
    return CleanupResult(
        slot_id=slot_id, operation="return", success=True, started_at=now(), duration_seconds=float(number)
    )


@pytest.fixture
async def coordinator(place: Place) -> Coordinator:
    """A pool of one AVAILABLE slot."""
    await place.records.save_pool(pool())
    made = await place.coordinator()
    await settle(made, await made.create(place.slot(await made.next_slot_number(REPO))))
    return made


# Pools


async def test_a_pool_is_read_as_it_was_written(place: Place) -> None:
    records = place.records
    assert await records.list_pools() == []
    first, second = pool("b", options={"keep": ["x"]}, is_drained=True), pool("A", extra={"colour": "red"})
    for each in (first, second):
        await records.save_pool(each)
    assert await records.load_pool("b") == first
    assert await records.load_pool("A") == second
    assert await records.list_pools() == ["A", "b"]
    await records.save_pool(attrs.evolve(first, num_slots=9, next_slot_number=5))
    assert (await records.load_pool("b")).num_slots == 9


async def test_what_is_not_there_is_not_found(place: Place) -> None:
    for attempt in (place.records.load_pool("nothing"), place.records.delete_pool("nothing")):
        with pytest.raises(PoolNotFoundError, match="nothing"):
            await attempt
    for late in (
        place.records.history("workspace-nothing-slot1"),
        place.records.cleanup_log("workspace-nothing-slot1"),
        place.records.append_cleanup(cleanup(1, "workspace-nothing-slot1")),
    ):
        with pytest.raises(SlotNotFoundError, match="workspace-nothing-slot1"):
            await late


async def test_a_deleted_pool_takes_its_slots_and_logs_with_it(coordinator: Coordinator, place: Place) -> None:
    await place.records.append_cleanup(cleanup(1))
    await place.records.delete_pool(REPO)
    assert await place.records.list_pools() == []
    assert await coordinator.list_slots(REPO) == []
    await place.records.save_pool(pool())
    with pytest.raises(SlotNotFoundError):
        await place.records.cleanup_log(SLOT)


@pytest.mark.usefixtures("coordinator")
async def test_logs_are_told_oldest_first_and_the_newest_of_them_where_few_are_wanted(place: Place) -> None:
    assert await place.records.cleanup_log(SLOT) == []
    assert await place.records.history(SLOT) == []
    written = [cleanup(number) for number in range(5)]
    for result in written:
        await place.records.append_cleanup(result)
    assert await place.records.cleanup_log(SLOT) == written
    assert await place.records.cleanup_log(SLOT, limit=2) == written[-2:]


async def test_what_json_cannot_hold_is_refused(place: Place) -> None:
    with pytest.raises(StoreError):
        await place.records.save_pool(pool(options={"x": object()}))
    assert await place.records.list_pools() == []


async def test_a_log_of_the_database_is_cut_to_its_last_lines_now_and_then(postgres: PostgresPlace) -> None:
    await postgres.pool(1)
    await postgres.ask(
        "INSERT INTO repopool.history (slot_id, kind, record) "
        "SELECT $1, 'cleanup', $2::jsonb || jsonb_build_object('removed', n) FROM generate_series(1, 2500) n",
        SLOT,
        '{"slot_id": "x", "operation": "return", "success": true, "duration_seconds": 1, '
        '"started_at": "2024-01-01T00:00:00+00:00"}',
    )
    log = await postgres.records.cleanup_log(SLOT)
    assert (len(log), log[0].removed, log[-1].removed) == (2000, 501, 2500)
    assert len(await postgres.records.history(SLOT)) == 0


# Locks


async def test_a_lock_is_held_by_one_at_a_time(place: Place) -> None:
    first, second = await place.locks(), await place.locks()
    assert not await first.is_locked("pool-web")
    async with first.acquire_slot_lock("pool-web") as held:
        assert not held.was_left
        assert await second.is_locked("pool-web")
        assert await second.try_acquire("pool-web") is None
        assert await first.try_acquire("pool-web") is None
        with pytest.raises(LockTimeoutError, match=r"pool-web.*process \d+"):
            async with second.acquire_slot_lock("pool-web", timeout=0):
                pass
        async with second.acquire_slot_lock("pool-other", timeout=0):
            pass
    taken = await second.try_acquire("pool-web")
    assert taken is not None
    await taken.release()
    await taken.release()
    assert not await first.is_locked("pool-web")


async def test_who_leaves_something_half_done_tells_the_next_holder(place: Place) -> None:
    first, second = await place.locks(), await place.locks()
    async with first.acquire_slot_lock("mirror-web") as held:
        held.leave()
    assert not await second.is_locked("mirror-web")
    async with second.acquire_slot_lock("mirror-web", timeout=0) as held:
        assert held.was_left
    async with first.acquire_slot_lock("mirror-web", timeout=0) as held:
        assert not held.was_left


async def test_who_waits_for_a_lock_gets_it(place: Place) -> None:
    first, second = await place.locks(), await place.locks()
    order: list[str] = []

    async def wait() -> None:
        async with second.acquire_slot_lock("mirror-web", timeout=30):
            order.append("second")

    async with asyncio.TaskGroup() as group, first.acquire_slot_lock("mirror-web"):
        group.create_task(wait())
        with pytest.raises(LockTimeoutError):
            async with second.acquire_slot_lock("mirror-web", timeout=0.05):
                pass
        order.append("first")
    assert order == ["first", "second"]


@pytest.mark.parametrize("turns", [0, 1, 3, 8])
async def test_a_cancelled_attempt_holds_no_lock(place: Place, turns: int) -> None:
    locks = await place.locks()
    await locks.is_locked("x")
    task = asyncio.create_task(locks.try_acquire("x"))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    try:
        held = await task
    except asyncio.CancelledError:
        held = None
    if held is not None:
        await held.release()
    assert not await locks.is_locked("x")


async def test_a_lock_ends_with_its_session_and_the_next_holder_is_told(postgres: PostgresPlace) -> None:
    dead, living = await postgres.coordinator(), await postgres.coordinator()
    left = [await dead.locks.try_acquire(name) for name in ("mirror-web", "pool-web")]
    assert all(left)
    # Its process is killed; somebody finds that out.
    await postgres.ask("DELETE FROM repopool.session WHERE session_id = $1", dead._link.session.session_id)
    assert not await living.locks.is_locked("mirror-web")
    (stale,) = await living.locks.cleanup_stale_locks(spared_prefix="mirror-")
    assert (stale.slot_id, stale.owner and stale.owner.pid) == ("pool-web", os.getpid())
    async with living.locks.acquire_slot_lock("mirror-web") as held:
        assert held.was_left
        assert left[0] is not None
        assert held.token == left[0].token + 1
        await left[0].release()
        assert await living.locks.is_locked("mirror-web"), "a holder that was taken for dead releases nothing"
    async with living.locks.acquire_slot_lock("pool-web") as held:
        assert not held.was_left


async def test_a_lock_whose_release_was_lost_in_a_failover_is_given_up_and_one_that_is_held_is_not(
    postgres: PostgresPlace,
) -> None:
    coordinator, other = await postgres.coordinator(), await postgres.coordinator()
    kept, released = await coordinator.locks.try_acquire("kept"), await coordinator.locks.try_acquire("released")
    assert kept is not None
    assert released is not None
    await released.release()
    # As a server that has lost the last commit has it.
    await postgres.ask(
        "UPDATE repopool.named_lock SET session_id = $1, hold_id = $2 WHERE name = 'released'",
        *(coordinator._link.session.session_id, released.hold_id),
    )
    assert await other.locks.is_locked("released")

    async def is_free() -> bool:
        return not await other.locks.is_locked("released")

    await coordinator.reap()
    await eventually(is_free)
    async with other.locks.acquire_slot_lock("released", timeout=0) as held:
        assert held.was_left, "nobody knows what the lost commits were about"
    assert await other.locks.is_locked("kept")
    await kept.release()
    assert not await other.locks.is_locked("kept")


async def test_a_lock_is_released_once_the_database_answers_again(postgres: PostgresPlace) -> None:
    coordinator = await postgres.coordinator(max_connections=1)
    held = await coordinator.locks.try_acquire("pool-web")
    assert held is not None
    await postgres.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'repopool'")
    await held.release()

    async def is_free() -> bool:
        return not await insist(lambda: coordinator.locks.is_locked("pool-web"))

    await eventually(is_free)


async def insist(call: Callable[[], Awaitable[Any]]) -> Any:
    async with asyncio.timeout(20):
        while True:
            try:
                return await call()
            except StoreError:
                await asyncio.sleep(0.02)
