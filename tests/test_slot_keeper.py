"""Two managers that remove, lease and mend the same slots at once: who comes second minds neither."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from repopool_async import LeasedSlot, PoolConfig, PoolManager, SlotState
from repopool_async.slot_keeper import SlotKeeper


@pytest.fixture
async def manager(tmp_path: Path, origin: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600)) as manager:
        await manager.create_pool("web", str(origin), num_slots=3)
        yield manager


@pytest.fixture
async def other(manager: PoolManager) -> AsyncIterator[PoolManager]:
    async with PoolManager(manager.config) as other:
        yield other


def be_faster(
    monkeypatch: pytest.MonkeyPatch, keeper: SlotKeeper, verb: str, act: Callable[[str], Awaitable[object]]
) -> None:
    """Do something to a slot just before the keeper does what it has decided to do to it."""
    original = getattr(keeper, verb)

    async def second(slot_id: str, **options: Any) -> object:
        await act(slot_id)
        return await original(slot_id, **options)

    monkeypatch.setattr(keeper, verb, second)


async def slot_ids(manager: PoolManager) -> list[str]:
    return [slot.slot_id for slot in await manager.list_slots("web")]


async def test_slots_that_another_process_removes_meanwhile_are_gone_as_wanted(
    manager: PoolManager, other: PoolManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = (await manager.get_pool("web")).keeper
    be_faster(monkeypatch, keeper, "remove_slot", other.remove_slot)
    await manager.resize("web", 1)
    assert await slot_ids(manager) == ["workspace-web-slot1"]
    await manager.delete_pool("web")
    assert await manager.list_pools() == []


async def test_draining_passes_over_slots_that_are_leased_or_removed_meanwhile(
    manager: PoolManager, other: PoolManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = (await manager.get_pool("web")).keeper
    drained: list[str] = []
    leased: list[LeasedSlot] = []

    async def act(slot_id: str) -> None:
        drained.append(slot_id)
        if len(drained) == 1:
            await other.remove_slot(slot_id)
        while (slot := await other.allocate_slot("web")) is not None:
            leased.append(slot)

    be_faster(monkeypatch, keeper, "repair_slot", act)
    await manager.drain("web")
    assert len(drained) == 3
    assert [slot.state for slot in await manager.list_slots("web")] == [SlotState.ALLOCATED] * 2
    for slot in leased:
        await other.release_slot(slot)


async def test_looking_passes_over_slots_that_are_removed_meanwhile(
    manager: PoolManager, other: PoolManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = (await manager.get_pool("web")).keeper
    be_faster(monkeypatch, keeper, "_check_slot", other.remove_slot)
    assert await manager.check("web") == {}
    assert await slot_ids(manager) == []
