"""Slots that come back together, and two managers that remove, lease and mend the same ones at once."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from repopool_async import LeasedSlot, PoolConfig, PoolManager, SlotState
from repopool_async.hosts.local import LocalHost
from repopool_async.slot_cleaner import LEASE_MARK
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


async def test_what_is_slow_to_end_in_one_slot_keeps_no_other_slot_waiting(
    manager: PoolManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalHost, "end_processes", partialmethod(LocalHost.end_processes, grace_seconds=60))
    slow, quick = [await manager.allocate_slot("web") for _ in range(2)]
    assert slow is not None
    assert quick is not None
    keeper = (await manager.get_pool("web")).keeper
    cleaning = keeper._pool.parts.of((await manager.list_slots("web"))[0]).cleaning
    while cleaning._value > 1:
        await cleaning.acquire()
    # The lease's, but not registered with it: asked to end, and not killed at once.
    argv = ["sh", "-c", "trap '' TERM; echo ready; read -r never"]
    environment = {**os.environ, LEASE_MARK: slow.lease_id}
    with subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        async with asyncio.TaskGroup() as group:
            slowly = group.create_task(manager.release_slot(slow))
            await asyncio.sleep(0)
            await manager.release_slot(quick)
            assert not slowly.done()
            stubborn.kill()
    assert [slot.state for slot in await manager.list_slots("web")] == [SlotState.AVAILABLE] * 3
