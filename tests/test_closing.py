"""Closing with leases open, waiters queued and cleaners busy: once, twice, from elsewhere, and while opening."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from repopool_async import Event, LeasedSlot, ManagerClosedError, PoolConfig, PoolManager, Slot, SlotState
from tests import _children


@pytest.fixture
async def manager(tmp_path: Path, origin: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600)) as manager:
        await manager.create_pool("web", str(origin), num_slots=2)
        yield manager


def spawn(work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    return asyncio.get_running_loop().create_task(work)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _begin() -> None:
    _children.begin()


def nothing_is_left() -> bool:
    """Whether no task, lock or child of a manager is alive in this process."""
    tasks = [task for task in asyncio.all_tasks() if task.get_name().startswith("repopool:")]
    locks = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            locks += [path for path in [os.readlink(f"/proc/self/fd/{name}")] if path.endswith(".lock")]
    assert (tasks, locks, _children.left()) == ([], [], set())
    return True


async def hold(manager: PoolManager, until_told: asyncio.Event, began: asyncio.Event) -> None:
    async with manager.lease("web"):
        began.set()
        await until_told.wait()


async def holder(manager: PoolManager) -> tuple["asyncio.Task[None]", asyncio.Event]:
    told, began = asyncio.Event(), asyncio.Event()
    task = spawn(hold(manager, told, began))
    await began.wait()
    return task, told


async def test_a_second_close_waits_for_the_first(manager: PoolManager) -> None:
    task, told = await holder(manager)
    first = spawn(manager.close(timeout=None))
    second = spawn(manager.close())
    await until(lambda: manager.closed)
    await asyncio.sleep(0)
    assert not second.done()
    told.set()
    await asyncio.gather(first, second, task)
    assert nothing_is_left()
    await manager.close()


async def test_closing_twice_in_a_row_is_no_error(manager: PoolManager) -> None:
    await manager.close()
    await manager.close()
    assert nothing_is_left()


async def test_closing_from_another_task_ends_everybody(manager: PoolManager) -> None:
    holders = [await holder(manager) for _ in range(2)]
    waiters = [spawn(hold(manager, asyncio.Event(), asyncio.Event())) for _ in range(3)]
    await until(lambda: manager.get_stats()["web"]["waiting"] == 3)
    closing = spawn(manager.close(timeout=30))
    async with asyncio.timeout(10):
        for outcome in await asyncio.gather(*waiters, return_exceptions=True):
            assert isinstance(outcome, ManagerClosedError)
    assert not closing.done()
    for _, told in holders:
        told.set()
    await asyncio.gather(closing, *(task for task, _ in holders))
    assert nothing_is_left()


async def test_holders_that_do_not_end_in_time_are_cut_off(manager: PoolManager, tmp_path: Path, origin: Path) -> None:
    slot = await manager.allocate_slot("web")
    assert slot is not None
    await manager.close(timeout=0)
    assert slot.lost.is_set()
    assert slot.is_released
    assert nothing_is_left()
    async with PoolManager(PoolConfig(tmp_path / "pools")) as second:
        assert await second.recover() == [slot.slot_id]
        assert await second.available_count("web") == 2


async def test_closing_inside_a_lease_ends_it(manager: PoolManager) -> None:
    async with manager.lease("web") as slot:
        await manager.close(timeout=0)
        assert slot.is_released
    assert nothing_is_left()


async def test_busy_cleaners_are_waited_for(tmp_path: Path, origin: Path) -> None:
    cleaning, go_on = asyncio.Event(), asyncio.Event()

    async def reset(slot: Slot) -> None:
        cleaning.set()
        await go_on.wait()

    manager = PoolManager(PoolConfig(tmp_path / "pools"), reset=reset)
    await manager.open()
    await manager.create_pool("web", str(origin))
    async with manager.lease("web"):
        pass
    await cleaning.wait()
    closing = spawn(manager.close(timeout=None))
    await until(lambda: manager.closed)
    go_on.set()
    await closing
    assert nothing_is_left()
    async with PoolManager(PoolConfig(tmp_path / "pools")) as second:
        assert await second.recover() == []
        assert await second.available_count("web") == 1


async def test_cleaners_that_take_too_long_are_interrupted_and_recovered(tmp_path: Path, origin: Path) -> None:
    cleaning = asyncio.Event()

    async def reset(slot: Slot) -> None:
        cleaning.set()
        await asyncio.Event().wait()

    manager = PoolManager(PoolConfig(tmp_path / "pools"), reset=reset)
    await manager.open()
    await manager.create_pool("web", str(origin))
    async with manager.lease("web") as slot:
        pass
    await cleaning.wait()
    await manager.close(timeout=0)
    assert nothing_is_left()
    async with PoolManager(PoolConfig(tmp_path / "pools")) as second:
        assert await second.recover() == [slot.slot_id]
        assert await second.available_count("web") == 1


async def test_everything_at_once_and_the_close_cancelled(manager: PoolManager) -> None:
    tasks = [(await holder(manager))[0] for _ in range(2)]
    waiters = [spawn(hold(manager, asyncio.Event(), asyncio.Event())) for _ in range(2)]
    await until(lambda: manager.get_stats()["web"]["waiting"] == 2)
    closing = spawn(manager.close(timeout=None))
    await asyncio.wait(waiters)
    closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    assert manager.closed
    assert nothing_is_left()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_closing_while_it_opens_closes_it_afterwards(tmp_path: Path) -> None:
    manager = PoolManager(PoolConfig(tmp_path / "pools"))
    opening = spawn(manager.open())
    await asyncio.sleep(0)
    closing = spawn(manager.close())
    await asyncio.gather(opening, closing)
    assert manager.closed
    assert nothing_is_left()
    with pytest.raises(ManagerClosedError):
        await manager.list_pools()


async def test_an_opening_that_is_cancelled_lets_a_close_return(tmp_path: Path) -> None:
    manager = PoolManager(PoolConfig(tmp_path / "pools"))
    opening = spawn(manager.open())
    await asyncio.sleep(0)
    closing = spawn(manager.close())
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait([opening, closing], timeout=30)
    assert opening.cancelled()
    assert closing.done()
    assert nothing_is_left()


async def test_one_that_never_opened_is_closed(tmp_path: Path) -> None:
    manager = PoolManager(PoolConfig(tmp_path / "pools"))
    await manager.close()
    with pytest.raises(ManagerClosedError):
        await manager.open()


async def test_listeners_end_also_where_opening_fails(tmp_path: Path) -> None:
    (tmp_path / "pools").write_text("a file")
    manager = PoolManager(PoolConfig(tmp_path / "pools"))

    async def listen() -> list[Event]:
        return [event async for event in manager.events()]

    listening = spawn(listen())
    await asyncio.sleep(0)
    with pytest.raises(Exception, match="cannot be used"):
        await manager.open()
    async with asyncio.timeout(10):
        assert await listening == []


async def blocked(tmp_path: Path, origin: Path) -> tuple[PoolManager, asyncio.Event]:
    """Return a manager whose every new slot waits in its `configure` callback, and what says that one does."""
    waiting = asyncio.Event()

    async def configure(slot: Slot) -> None:
        waiting.set()
        await asyncio.Event().wait()

    manager = PoolManager(PoolConfig(tmp_path / "pools"), configure=configure)
    await manager.open()
    return manager, waiting


async def test_a_pool_being_made_is_unmade(tmp_path: Path, origin: Path) -> None:
    manager, waiting = await blocked(tmp_path, origin)
    making = spawn(manager.create_pool("web", str(origin), num_slots=3))
    await waiting.wait()
    await manager.close()
    assert making.done()
    with pytest.raises(ManagerClosedError, match="closed meanwhile"):
        await making
    assert nothing_is_left()
    assert not (tmp_path / "pools/web").exists()


async def test_a_slot_being_added_is_unmade(tmp_path: Path, origin: Path) -> None:
    async with PoolManager(PoolConfig(tmp_path / "pools")) as first:
        await first.create_pool("web", str(origin))
    manager, waiting = await blocked(tmp_path, origin)
    adding = spawn(manager.add_slot("web"))
    await waiting.wait()
    await manager.close()
    with pytest.raises(ManagerClosedError):
        await adding
    assert nothing_is_left()
    async with PoolManager(PoolConfig(tmp_path / "pools")) as second:
        assert [slot.state for slot in await second.list_slots("web")] == [SlotState.AVAILABLE]


async def test_a_lease_that_was_about_to_begin_never_does(tmp_path: Path, origin: Path) -> None:
    checking = asyncio.Event()

    async def check(slot: Slot) -> None:
        checking.set()
        await asyncio.Event().wait()

    manager = PoolManager(PoolConfig(tmp_path / "pools"), check=check)
    await manager.open()
    await manager.create_pool("web", str(origin))
    leasing = spawn(manager.allocate_slot("web", timeout=None))
    await checking.wait()
    await manager.close()
    assert leasing.done()
    with pytest.raises(ManagerClosedError):
        await leasing
    assert nothing_is_left()
    async with PoolManager(PoolConfig(tmp_path / "pools")) as second, second.lease("web", timeout=30):
        pass


async def test_a_slot_given_back_after_closing_is_no_error(manager: PoolManager) -> None:
    held: list[LeasedSlot] = []
    async with contextlib.AsyncExitStack() as stack:
        held.append(await stack.enter_async_context(manager.lease("web")))
        await manager.close(timeout=0)
    assert held[0].is_released
    assert nothing_is_left()
