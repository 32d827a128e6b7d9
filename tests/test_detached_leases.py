"""Leases that outlive their process: held by a token, renewed, expired, taken away; in real processes."""

import asyncio
import time
import types
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from repopool_async import (
    LeaseLostError,
    LeaseReleasedError,
    PoolConfig,
    PoolManager,
    Slot,
    SlotInUseError,
    SlotState,
    _clock,
)
from tests._lessees import lessee

SLOT = "workspace-web-slot1"


@pytest.fixture
async def manager(tmp_path: Path, origin: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools", janitor_interval=3600)) as manager:
        await manager.create_pool("web", str(origin))
        yield manager


async def state(manager: PoolManager) -> SlotState:
    return (await manager.get_slot_status(SLOT)).state


def set_clock_ahead(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let time have passed for this process; others go on as before."""
    shifted = types.SimpleNamespace(
        clock_gettime=lambda clock: time.clock_gettime(clock) + seconds,
        clock_gettime_ns=time.clock_gettime_ns,
        time_ns=time.time_ns,
    )
    monkeypatch.setattr(_clock, "time", shifted)


async def until_recovered(manager: PoolManager, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while await state(manager) is not SlotState.AVAILABLE:
            await asyncio.sleep(0.05)


async def test_a_detached_lease_survives_its_process_and_another_releases_it(
    manager: PoolManager, tmp_path: Path
) -> None:
    with lessee("detach", tmp_path / "pools", 600) as worker:
        slot_id, token = worker.expect("detached").split()
        assert worker.close() == 0
    await manager.recover()
    status = await manager.get_slot_status(slot_id)
    assert status.state is SlotState.ALLOCATED
    assert Path(status.path, "from-the-lessee").read_text() == "work"
    assert await manager.allocate_slot("web") is None
    with lessee("release", tmp_path / "pools", slot_id, token) as other:
        other.expect("released")
    assert await state(manager) is SlotState.AVAILABLE
    assert not Path(status.path, "from-the-lessee").exists()
    assert await manager.list_salvage() == []
    await manager.release_slot(slot_id, token=int(token))  # a second time: nothing


async def test_a_detached_lease_survives_the_kill_of_its_process(manager: PoolManager, tmp_path: Path) -> None:
    with lessee("detach", tmp_path / "pools", 600) as worker:
        slot_id, token = worker.expect("detached").split()
        worker.kill()
    await manager.recover()
    assert await state(manager) is SlotState.ALLOCATED
    lease = await manager.renew_slot(slot_id, int(token))
    assert lease.is_detached


async def test_release_and_renewal_by_anyone_but_the_holder_are_refused(manager: PoolManager, tmp_path: Path) -> None:
    pools = tmp_path / "pools"
    with lessee("detach", pools, 600) as worker:
        slot_id, token = worker.expect("detached").split()
        wrong = str(int(token) + 1)
        with lessee("release", pools, slot_id, wrong) as other:
            other.expect("lost")
        with lessee("release", pools, slot_id, 0) as other:
            other.expect("refused")
        with lessee("renew", pools, slot_id, wrong, 5) as other:
            other.expect("lost")
        with pytest.raises(SlotInUseError, match="who knows its token"):
            await manager.release_slot(slot_id)
        assert await state(manager) is SlotState.ALLOCATED
        worker.tell()
        worker.expect("held")


async def test_an_unrenewed_lease_expires_and_its_work_is_saved(
    manager: PoolManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lessee("detach", tmp_path / "pools", 600) as worker:
        slot_id, token = worker.expect("detached").split()
        set_clock_ahead(monkeypatch, 1000)
        await until_recovered(manager)
        with pytest.raises(LeaseLostError):
            await manager.renew_slot(slot_id, int(token), 60)
        with pytest.raises(LeaseLostError):
            await manager.release_slot(slot_id, token=int(token))
        (record,) = await manager.list_salvage()
        assert (record.reason, record.untracked) == ("expired", 1)
        history = await manager.get_allocation_history(slot_id)
        assert [entry.event for entry in history] == ["allocated", "expired"]


async def test_a_renewed_lease_lives_on_in_whichever_process_renews_it(
    manager: PoolManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = tmp_path / "pools"
    with lessee("detach", pools, 600) as worker:
        slot_id, token = worker.expect("detached").split()
        with lessee("renew", pools, slot_id, token, 6000) as other:
            other.expect("renewed")
        set_clock_ahead(monkeypatch, 1000)  # past the first expiry
        await manager.recover()
        assert await state(manager) is SlotState.ALLOCATED
        worker.tell()
        worker.expect("held")
        await manager.renew_slot(slot_id, int(token), 0.001)
        await until_recovered(manager)


async def test_the_holder_is_told_when_its_lease_is_taken_away(manager: PoolManager, tmp_path: Path) -> None:
    slot = await manager.allocate_slot("web", detached=True, ttl=600)
    assert slot is not None
    (slot.path / "note").write_text("n")
    async with PoolManager(manager.config) as other:
        await other.force_unlock(slot.slot_id)
        async with asyncio.timeout(30):
            await slot.lost.wait()
        with pytest.raises(LeaseLostError):
            await slot.renew(60)
        with pytest.raises(LeaseLostError):
            await manager.release_slot(slot)
        with pytest.raises(LeaseReleasedError):
            await slot.run("true")
        await other.wait_clean()
        await until_recovered(manager)
        assert [record.reason for record in await manager.list_salvage()] == ["forced"]


async def test_the_holder_is_told_when_its_lease_expires(manager: PoolManager, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = await manager.allocate_slot("web", detached=True, ttl=600)
    assert slot is not None
    set_clock_ahead(monkeypatch, 1000)
    async with asyncio.timeout(30):
        await slot.lost.wait()
    await until_recovered(manager)
    second = await manager.allocate_slot("web", timeout=30)
    assert second is not None
    assert second.token > slot.token
    with pytest.raises(LeaseLostError):
        await manager.release_slot(slot)
    assert await state(manager) is SlotState.ALLOCATED
    await manager.release_slot(second)


async def test_a_lease_bound_to_a_living_process_can_be_taken_away(manager: PoolManager, tmp_path: Path) -> None:
    pools = tmp_path / "pools"
    with lessee("work", pools, "echo mine > note") as worker:
        slot_id = worker.expect("working").split()[0]
        with pytest.raises(SlotInUseError, match="the process that took the lease"):
            await manager.release_slot(slot_id)
        before = await manager.get_slot_status(slot_id)
        after = await manager.force_unlock(slot_id)
        assert before.lease is not None
        assert after.token > before.lease.token
        await manager.wait_clean()
        assert await state(manager) is SlotState.AVAILABLE
        async with manager.lease("web", timeout=30) as slot:
            assert not (slot.path / "note").exists()
            worker.tell()  # the robbed one gives back what is not its own any more
            worker.process.wait(30)
            assert slot.path.exists()
            assert not slot.lost.is_set()
    assert [record.reason for record in await manager.list_salvage()] == ["forced"]


@pytest.mark.parametrize("is_another", [True, False], ids=["another manager", "its own manager"])
async def test_a_cleaner_whose_slot_is_taken_away_stops(tmp_path: Path, origin: Path, is_another: bool) -> None:
    """Otherwise it would go on in the tree of whoever gets the slot next."""
    is_cleaning, has_stopped = asyncio.Event(), asyncio.Event()

    async def reset(_slot: Slot) -> None:
        if not is_cleaning.is_set():
            is_cleaning.set()
            try:
                await asyncio.Event().wait()
            finally:
                has_stopped.set()

    config = PoolConfig(workspaces_dir=tmp_path / "pools", janitor_interval=3600)
    async with PoolManager(config, reset=reset) as cleaner, PoolManager(config) as another:
        await cleaner.create_pool("web", str(origin))
        async with cleaner.lease("web", timeout=30):
            pass
        await is_cleaning.wait()
        await (another if is_another else cleaner).force_unlock(SLOT)
        async with asyncio.timeout(30):
            await has_stopped.wait()
        await until_recovered(another)
        await cleaner.wait_clean()


async def test_closing_leaves_detached_leases_alone(manager: PoolManager) -> None:
    slot = await manager.allocate_slot("web", detached=True)
    assert slot is not None
    token = slot.token
    await manager.close(None)  # which waits for holders as long as it takes, and not for this one
    assert not slot.lost.is_set()
    async with PoolManager(manager.config) as second:
        await second.recover()
        assert await state(second) is SlotState.ALLOCATED
        await second.release_slot(SLOT, token=token)
        assert await state(second) is SlotState.AVAILABLE


async def test_the_same_process_releases_its_detached_lease_like_any_other(manager: PoolManager) -> None:
    slot = await manager.allocate_slot("web", detached=True, ttl=60)
    assert slot is not None
    await slot.renew(120)
    await manager.release_slot(slot)
    await manager.release_slot(slot)
    assert await state(manager) is SlotState.AVAILABLE


async def test_a_cancelled_request_for_a_detached_lease_leaves_no_lease(manager: PoolManager) -> None:
    for milliseconds in range(0, 60, 6):
        request = asyncio.create_task(manager.allocate_slot("web", detached=True, ttl=600, timeout=30))
        await asyncio.sleep(milliseconds / 1000)
        request.cancel()
        await asyncio.wait([request])
        if not request.cancelled():
            slot = request.result()
            assert slot is not None
            await manager.release_slot(slot)
        await manager.wait_clean()
        await until_recovered(manager)


@pytest.mark.parametrize("ttl", [0, -1, float("inf"), float("nan")])
async def test_a_ttl_that_is_none_is_refused(manager: PoolManager, ttl: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        await manager.allocate_slot("web", detached=True, ttl=ttl)
    assert await state(manager) is SlotState.AVAILABLE


async def test_a_ttl_without_detached_is_refused(manager: PoolManager) -> None:
    with pytest.raises(ValueError, match="detached=True"):
        await manager.allocate_slot("web", ttl=5)


async def test_deleting_by_force_tells_the_holder_of_a_detached_lease(manager: PoolManager) -> None:
    slot = await manager.allocate_slot("web", detached=True)
    assert slot is not None
    await manager.delete_pool("web", force=True)
    assert slot.lost.is_set()
