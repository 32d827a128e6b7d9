"""Cancel anywhere, once or twice: what changes pools and leases runs to count its suspensions, then again for each.

After every cancellation no slot is lost, no lock held, no git alive, no task pending, and the next lease works.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from repopool_async import LeasedSlot, LeaseLostError, PoolConfig, PoolManager, RepoPool, SlotState
from repopool_async._process import run_process
from tests import _children
from tests._cancelling import (
    count_suspensions,
    covers,
    for_each_suspension,
    nothing_left,
    open_descriptors,
    run_cancelled,
    settling,
)

pytestmark = [pytest.mark.timeout(300), pytest.mark.endurance]


@pytest.fixture(autouse=True)
def _begin() -> None:
    _children.begin()


@pytest.fixture
async def manager(tmp_path: Path, origin: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools", janitor_interval=3600)) as manager:
        await manager.create_pool("app", str(origin), num_slots=2)
        await manager.recover()  # after which no sweep holds a lock
        yield manager


@covers("PoolManager.lease", "RepoPool.lease", "PoolManager.wait_clean")
@pytest.mark.parametrize("ref", ["main", "feature/x"])
async def test_lease(manager: PoolManager, ref: str) -> None:
    async def lease() -> None:
        async with manager.lease("app", ref=ref, timeout=60) as slot:
            (slot.path / "dirt").write_text("")
            await asyncio.sleep(0)

    assert await for_each_suspension(lease, settling(manager)) >= 5


async def test_inline_cleaning(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("app", str(origin), num_slots=2, cleanup="inline", fetch_on_allocate=False)

    async def lease() -> None:
        async with manager.lease("app", ref="v1.0", timeout=60) as slot:
            (slot.path / "dirt").write_text("")

    await for_each_suspension(lease, settling(manager))


@covers(
    "PoolManager.allocate_slot",
    "PoolManager.release_slot",
    "RepoPool.allocate",
    "RepoPool.release",
    "RepoPool.give_back",
)
async def test_allocate_and_release(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("app", str(origin), num_slots=2, fetch_on_allocate=False)
    held: list[Any] = []

    async def pair() -> None:
        slot = await manager.allocate_slot("app", timeout=60)
        held.append(slot)  # whoever allocates by hand gives back by hand, also when cancelled afterwards
        assert slot is not None
        await manager.release_slot(slot)

    settle = settling(manager)

    async def give_back_and_settle() -> None:
        for slot in held:
            await manager.release_slot(slot)
        held.clear()
        await settle()

    await for_each_suspension(pair, give_back_and_settle)


async def test_waiting_in_the_queue(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("app", str(origin), num_slots=2, fetch_on_allocate=False)

    async def wait_for_a_slot() -> None:
        async with pool.lease(), pool.lease():
            with contextlib.suppress(TimeoutError):
                async with pool.lease(timeout=0.05):
                    pass

    await for_each_suspension(wait_for_a_slot, settling(manager))


@covers("PoolManager.add_slot", "PoolManager.remove_slot")
async def test_add_and_remove_slot(manager: PoolManager) -> None:
    async def grow_and_shrink() -> None:
        slot = await manager.add_slot("app")
        await manager.remove_slot(slot.slot_id)

    kept = {slot.slot_id for slot in await manager.list_slots("app")}
    settle = settling(manager, slots=None)

    async def shrink_and_settle() -> None:
        await settle()
        for slot in await manager.list_slots("app"):
            assert slot.state is SlotState.AVAILABLE
            if slot.slot_id not in kept:
                await manager.remove_slot(slot.slot_id)

    await for_each_suspension(grow_and_shrink, shrink_and_settle)


@covers("PoolManager.create_pool")
async def test_create_pool(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    async def create() -> None:
        await manager.create_pool("other", str(origin), num_slots=1)

    settle = settling(manager)

    async def delete_and_settle() -> None:
        if "other" in await manager.list_pools():
            assert await manager.available_count("other") == 1
            await manager.delete_pool("other")
        assert not (tmp_path / "pools/other").exists()
        await settle()

    await for_each_suspension(create, delete_and_settle)


async def test_fetch_with_several_waiters(manager: PoolManager, origin: Path) -> None:
    """One is cancelled at each of its suspensions, the first or the last to ask; the others get what they asked for."""
    mirror = (await manager.get_pool("app"))._context.reference.mirror

    async def fetch() -> None:
        await mirror.fetch()

    for others_first in (False, True):
        count = await count_suspensions(fetch)
        for at in range(1, count + 2):
            for cancel_at in ((at,), (at, at + 1)):
                loop = asyncio.get_running_loop()
                others = [loop.create_task(mirror.fetch()) for _ in range(2)] if others_first else []
                cancelled = loop.create_task(run_cancelled(fetch, cancel_at))
                others = others or [loop.create_task(mirror.fetch()) for _ in range(2)]
                await asyncio.wait([cancelled, *others], timeout=60)
                for task in (cancelled, *others):
                    task.result()
                await nothing_left()


async def test_fetch_that_all_its_waiters_leave(manager: PoolManager, origin: Path) -> None:
    mirror = (await manager.get_pool("app"))._context.reference.mirror
    for turns in (0, 1, 3, 20):
        tasks = [asyncio.get_running_loop().create_task(mirror.fetch()) for _ in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=60)
        assert all(task.cancelled() for task in tasks)
        await settling(manager)()


@covers("PoolManager.close", "RepoPool.close")
@pytest.mark.parametrize("times", [1, 2])
async def test_close(tmp_path: Path, origin: Path, times: int) -> None:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        await manager.create_pool("app", str(origin), num_slots=1)
    at = 0
    was_cancelled = True
    while was_cancelled:
        at += 1
        manager = PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools", janitor_interval=3600))
        await manager.open()
        async with manager.lease("app") as slot:
            (slot.path / "dirt").write_text("")
        close = functools.partial(manager.close, 30)
        was_cancelled = await run_cancelled(close, tuple(range(at, at + times)))
        assert manager.closed
        assert open_descriptors() == set()
        assert _children.left() == set()
    assert at > 1
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        await manager.recover()
        assert await manager.available_count("app") == 1


@covers("PoolManager.open")
async def test_open(tmp_path: Path, origin: Path) -> None:
    """Cancelled, it leaves nothing open, and what it began to recover is recovered by the next."""
    config = PoolConfig(workspaces_dir=tmp_path / "pools", janitor_interval=3600)
    async with PoolManager(config) as manager:
        await manager.create_pool("app", str(origin), num_slots=1)
    at = 0
    was_cancelled = True
    while was_cancelled:
        at += 1
        await leave_an_orphan(config)
        manager = PoolManager(config)
        was_cancelled = await run_cancelled(manager.open, (at, at + 1))
        await manager.close()
        assert open_descriptors() == set()
        assert _children.left() == set()
    assert at > 1
    async with PoolManager(config) as manager:
        await settling(manager, slots=1)()


async def leave_an_orphan(config: PoolConfig) -> None:
    async with PoolManager(config) as manager:
        slot = await manager.allocate_slot("app", timeout=30)
        assert slot is not None
        (slot.path / "work").write_text(slot.lease_id)
        await manager.close(0)


@covers(
    "PoolManager.resize",
    "PoolManager.recover",
    "PoolManager.force_unlock",
    "PoolManager.delete_pool",
    "PoolManager.drain",
    "PoolManager.check",
    "RepoPool.delete",
    "RepoPool.erase",
)
@pytest.mark.parametrize(
    "verb",
    ["resize", "recover", "force_unlock", "delete_pool"]
    + [pytest.param(verb, marks=pytest.mark.soak) for verb in ("drain", "check")],
)
async def test_maintenance(manager: PoolManager, origin: Path, verb: str) -> None:
    """The pool has work to do each time: slots too few, an orphan with work to be saved, a slot to be taken away."""
    pool = await manager.create_pool("app", str(origin), num_slots=2, fetch_on_allocate=False)
    robbed: list[LeasedSlot] = []

    async def operate() -> None:
        match verb:
            case "resize":
                await manager.resize("app", 3)
                await manager.resize("app", 2)
            case "force_unlock":
                await manager.force_unlock("workspace-app-slot1")
            case "delete_pool":
                await manager.delete_pool("other")
            case _:
                await getattr(manager, verb)()

    async def make_ready() -> None:
        if verb in ("recover", "force_unlock"):
            slot = await manager.allocate_slot("app", timeout=30)
            assert slot is not None
            (slot.path / "work").write_text(slot.lease_id)
            if verb == "recover":
                await abandon(pool, slot)
            else:
                robbed.append(slot)
        elif verb == "delete_pool":
            await manager.create_pool("other", str(origin), num_slots=1)

    async def settle() -> None:
        while robbed:
            with contextlib.suppress(LeaseLostError):
                await manager.release_slot(robbed.pop())
        await manager.recover()
        for name in await manager.list_pools():
            slots = await manager.list_slots(name)
            assert all(slot.state is SlotState.AVAILABLE for slot in slots), slots
        await manager.resize("app", 2)
        await settling(manager)()
        await make_ready()

    await make_ready()
    await for_each_suspension(operate, settle)
    while robbed:
        await manager.release_slot(robbed.pop())


async def abandon(pool: RepoPool, slot: LeasedSlot) -> None:
    """Let go of a lease as the death of its process does."""
    opened = pool._leases.end(slot.lease_id)
    assert opened is not None
    await pool._parts.coordinator.abandon_hold(opened.grant)


@covers("LeasedSlot.run")
async def test_a_command_in_a_slot(manager: PoolManager) -> None:
    async def run() -> None:
        async with manager.lease("app", timeout=60) as slot:
            await slot.run("git", "status")

    await for_each_suspension(run, settling(manager))
    done = await run_process(["true"], env={})
    assert done.exit_code == 0
