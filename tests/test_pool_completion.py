"""Pools whose maker was killed before all their slots were there: whoever runs, or comes next, makes the rest."""

import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from repopool_async import HostSpec, LockManager, PoolConfig, PoolManager, Slot, SlotAllocationError, SlotState
from repopool_async import pool_completion as completion_module

DYING = """
import asyncio, os, signal, sys
from repopool_async import PoolConfig, PoolManager
from repopool_async.slot_maker import SlotMaker

root, url, present, wanted = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
make = SlotMaker.make

async def make_or_die(self, site):
    if site.number > present:
        os.kill(os.getpid(), signal.SIGKILL)
    return await make(self, site)

async def main():
    async with PoolManager(PoolConfig(root, janitor_interval=3600)) as manager:
        if present:
            await manager.create_pool("web", url, num_slots=present)
        SlotMaker.make = make_or_die
        await manager.create_pool("web", url, num_slots=wanted)

asyncio.run(main())
"""


DYING_DELETING = """
import asyncio, os, signal, sys
from repopool_async import PoolConfig, PoolManager

async def main():
    async with PoolManager(PoolConfig(sys.argv[1], janitor_interval=3600)) as manager:
        pool = await manager.create_pool("web", sys.argv[2], num_slots=2)
        remove_slot = pool.keeper.remove_slot
        async def remove_and_die(slot_id, **options):
            await remove_slot(slot_id, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        pool.keeper.remove_slot = remove_and_die
        await manager.delete_pool("web")

asyncio.run(main())
"""


def run_until_killed(*argv: str) -> None:
    done = subprocess.run([sys.executable, "-c", *argv], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def die_making(tmp_path: Path, origin: Path, *, present: int = 0, wanted: int = 2) -> None:
    """Have a process make a pool that has so many slots already, and be killed before it makes the first new one."""
    run_until_killed(DYING, str(tmp_path / "pools"), str(origin), str(present), str(wanted))


@pytest.fixture
def config(tmp_path: Path) -> PoolConfig:
    return PoolConfig(tmp_path / "pools", janitor_interval=3600)


@pytest.fixture
async def manager(config: PoolConfig) -> AsyncIterator[PoolManager]:
    async with PoolManager(config) as manager:
        yield manager


async def states(manager: PoolManager) -> list[SlotState]:
    return [slot.state for slot in await manager.list_slots("web")]


@pytest.mark.parametrize("present", [0, 1])
async def test_who_runs_already_makes_what_is_missing(
    manager: PoolManager, tmp_path: Path, origin: Path, present: int
) -> None:
    die_making(tmp_path, origin, present=present, wanted=3)
    assert await states(manager) == [SlotState.AVAILABLE] * present
    assert (await manager.recover()).completing == ["web"]
    assert await states(manager) == [SlotState.AVAILABLE] * 3
    assert (await manager.recover()).completing == []


async def test_who_comes_next_can_lease_at_once(config: PoolConfig, tmp_path: Path, origin: Path) -> None:
    die_making(tmp_path, origin)
    async with PoolManager(config) as manager, manager.lease("web", timeout=60) as one:
        async with manager.lease("web", timeout=60) as other:
            assert one.slot_id != other.slot_id
        assert (one.path / "README.md").exists()


async def test_a_pool_that_somebody_is_making_is_left_to_whoever_does(
    manager: PoolManager, tmp_path: Path, origin: Path
) -> None:
    die_making(tmp_path, origin)
    async with LockManager(tmp_path / "pools/locks").acquire_slot_lock("pool-web"):
        assert await states(manager) == []
        assert (await manager.recover()).completing == []
        with pytest.raises(SlotAllocationError, match=r"it has none.*create_pool"):
            await manager.allocate_slot("web")
    assert (await manager.recover()).completing == ["web"]


async def test_one_that_cannot_be_completed_is_tried_again_after_a_growing_pause(
    tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_making(tmp_path, origin)
    is_refusing = True

    def configure(slot: Slot) -> None:
        if is_refusing:
            raise RuntimeError(f"not {slot.slot_id}")

    now = 0.0
    monkeypatch.setattr(completion_module, "boottime", lambda: now)
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600), configure=configure) as manager:
        completion, pool = manager._completion, await manager.get_pool("web")
        await completion.settled()
        for at, is_begun in ((59.0, False), (61.0, True), (180.0, False), (182.0, True)):
            now = at
            assert await completion.begin(pool, False) is is_begun
            await completion.settled()
            assert await states(manager) == []
        is_refusing = False
        assert await completion.begin(pool, True)
        await completion.settled()
        assert await states(manager) == [SlotState.AVAILABLE] * 2
        assert not await completion.begin(pool, True)


async def test_a_pool_half_deleted_is_whole_again_until_it_is_deleted(
    manager: PoolManager, tmp_path: Path, origin: Path
) -> None:
    run_until_killed(DYING_DELETING, str(tmp_path / "pools"), str(origin))
    assert await states(manager) == [SlotState.AVAILABLE]
    assert (await manager.recover()).completing == ["web"]
    assert await states(manager) == [SlotState.AVAILABLE] * 2
    await manager.delete_pool("web")
    assert await manager.list_pools() == []


async def test_closing_interrupts_it_and_leaves_it_to_the_next(
    config: PoolConfig, tmp_path: Path, origin: Path
) -> None:
    die_making(tmp_path, origin)
    async with PoolManager(config):
        pass
    async with PoolManager(config) as manager:
        await manager.recover()
        assert await states(manager) == [SlotState.AVAILABLE] * 2


async def test_slots_that_found_no_room_when_their_host_was_removed_are_made_once_there_is_some(
    tmp_path: Path, origin: Path
) -> None:
    hosts = [
        HostSpec(name, address="local", workspaces_dir=str(tmp_path / name), capacity=1, labels=["x"])  # type: ignore[arg-type]
        for name in "ab"
    ]
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600), hosts=hosts) as manager:
        await manager.create_pool("web", str(origin), num_slots=2, hosts=["x"])
        await manager.remove_host("b")
        assert await states(manager) == [SlotState.AVAILABLE]
        await manager.add_host("c", "local", workspaces_dir=str(tmp_path / "c"), labels=["x"])
        assert (await manager.recover()).completing == ["web"]
        assert [slot.host_id for slot in await manager.list_slots("web")] == ["a", "c"]
