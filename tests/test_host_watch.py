"""Hosts that stop answering, are drained, parked and removed: what becomes of claims, leases and slots."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from repopool_async import (
    ConfigError,
    HostNotFoundError,
    HostSpec,
    HostUnreachableError,
    LeaseLostError,
    PoolConfig,
    PoolManager,
    SlotAllocationError,
    SlotInUseError,
    SlotState,
    host_registry,
)
from tests._switched import SwitchedHost
from tests.test_janitor import Watcher

ONE, TWO = "workspace-web-slot1", "workspace-web-slot2"


@pytest.fixture
def switched() -> dict[str, SwitchedHost]:
    return {name: SwitchedHost(name) for name in "ab"}


@pytest.fixture
def hosts(tmp_path: Path, switched: dict[str, SwitchedHost]) -> list[HostSpec]:
    return [HostSpec(n, address="local", workspaces_dir=str(tmp_path / n), host=host) for n, host in switched.items()]


@pytest.fixture
async def manager(tmp_path: Path, hosts: list[HostSpec]) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600), hosts=hosts) as manager:
        yield manager


@pytest.fixture
async def told(manager: PoolManager) -> AsyncIterator[Watcher]:
    watcher = Watcher(manager)
    await asyncio.sleep(0)
    yield watcher
    await watcher.end()


async def condition(manager: PoolManager, name: str) -> str:
    return next(host.condition for host in await manager.list_hosts() if host.host_id == name)


async def test_a_claim_goes_to_another_host_when_one_does_not_answer(
    manager: PoolManager, told: Watcher, switched: dict[str, SwitchedHost], origin: Path
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    switched["a"].is_up = False
    async with pool.lease(timeout=30) as slot:
        assert slot.host_id == "b"
        await told.first("host.parked")
        status = await manager.get_slot_status(ONE)
        assert (status.state, status.error) == (SlotState.ERROR, "host unreachable")
        assert await condition(manager, "a") == "unreachable"
        assert await manager.allocate_slot("web") is None


async def test_leases_on_a_host_that_does_not_answer_are_lost_and_its_slots_come_back_with_it(
    manager: PoolManager, told: Watcher, switched: dict[str, SwitchedHost], origin: Path, tmp_path: Path
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=1, hosts=["a"])
    slot = await manager.allocate_slot("web")
    assert slot is not None
    (slot.path / "unpushed.txt").write_text("work\n")
    switched["a"].is_up = False
    with pytest.raises(HostUnreachableError, match="none of its hosts"):
        await pool.allocate(timeout=None)
    await told.first("host.parked")
    async with asyncio.timeout(30):
        await slot.lost.wait()
    with pytest.raises(LeaseLostError):
        await manager.release_slot(slot)
    switched["a"].is_up = True
    await told.first("host.resumed")
    await told.first("slot.available")
    assert await condition(manager, "a") == "active"
    (record,) = await manager.list_salvage()
    assert record.untracked == 1
    async with pool.lease(timeout=30) as slot:
        assert not (slot.path / "unpushed.txt").exists()


async def test_a_claim_does_not_wait_for_a_host_that_goes_silent(
    manager: PoolManager,
    switched: dict[str, SwitchedHost],
    origin: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    monkeypatch.setattr(host_registry, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(host_registry, "_PROBE_SECONDS", 0.2)
    switched["a"].is_up, switched["a"].is_silent = False, True
    async with pool.lease(timeout=30) as slot:
        assert slot.host_id == "b"
    switched["a"].is_silent = False


async def test_a_slip_of_the_network_parks_nothing(
    manager: PoolManager, switched: dict[str, SwitchedHost], origin: Path
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=1, hosts=["a"])
    async with pool.lease() as slot:
        error = switched["a"]._unreachable()
        manager._shared.hosts.suspect(error)
        assert manager._shared.hosts.is_out("a")
        while manager._shared.hosts.is_out("a"):
            await asyncio.sleep(0)
        assert await condition(manager, "a") == "active"
        assert not slot.lost.is_set()


async def test_a_drained_host_keeps_its_leases_and_gets_no_new_ones(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    async with pool.lease() as one, pool.lease() as other:
        on_a = one if one.host_id == "a" else other
        await manager.drain_host("a", "maintenance")
        assert (await on_a.run("true")).exit_code == 0
    await manager.wait_clean()
    async with pool.lease() as slot:
        assert slot.host_id == "b"
        assert (await manager.allocate_slot("web")) is None
    assert (await manager.add_slot("web")).host_id == "b"
    await manager.drain_host("b")
    with pytest.raises(SlotAllocationError, match="its host a is draining"):
        await manager.allocate_slot("web")
    await manager.resume_host("a")
    async with pool.lease() as slot:
        assert slot.host_id == "a"


async def test_who_waits_already_is_not_given_a_slot_on_a_host_that_is_drained_meanwhile(
    manager: PoolManager, origin: Path
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    held = {slot.host_id: slot for slot in [await pool.allocate(), await pool.allocate()] if slot is not None}
    waiter = asyncio.get_running_loop().create_task(pool.allocate(timeout=60))
    while not pool.stats()["waiting"]:
        await asyncio.sleep(0)
    await manager.drain_host("a")
    await manager.release_slot(held["a"])
    await manager.release_slot(held["b"])
    slot = await waiter
    assert slot is not None
    assert slot.host_id == "b"
    await manager.release_slot(slot)  # closing would wait for it


async def test_who_waits_already_is_given_a_slot_on_a_host_that_is_back(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    await manager.drain_host("a")
    held = await pool.allocate()
    assert held is not None
    waiter = asyncio.get_running_loop().create_task(pool.allocate(timeout=60))
    while not pool.stats()["waiting"]:
        await asyncio.sleep(0)
    await manager.resume_host("a")
    slot = await waiter
    assert slot is not None
    assert slot.host_id == "a"
    for leased in (held, slot):
        await manager.release_slot(leased)  # closing would wait for them


async def test_other_processes_see_what_becomes_of_a_host(
    manager: PoolManager, hosts: list[HostSpec], origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin), num_slots=1, hosts=["a"])
    async with PoolManager(PoolConfig(tmp_path / "pools"), hosts=hosts) as other:
        slot = await manager.allocate_slot("web")
        assert slot is not None
        await other.park_host("a", "smoke")
        async with asyncio.timeout(30):
            await slot.lost.wait()
        with pytest.raises((HostUnreachableError, SlotAllocationError)):
            await manager.allocate_slot("web")
    states = {host.host_id: (host.condition, host.reason) for host in await manager.list_hosts()}
    assert states == {"local": ("active", ""), "a": ("parked", "smoke"), "b": ("active", "")}


async def test_a_host_is_added_and_removed_while_managers_run(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin), num_slots=1, hosts=["a"])
    await manager.add_host("c", "local", workspaces_dir=str(tmp_path / "c"), labels=["big"])
    with pytest.raises(ConfigError, match="there is a host of that name"):
        await manager.add_host("c", "local", workspaces_dir=str(tmp_path / "d"))
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["a", "big"])
    assert [slot.host_id for slot in await manager.list_slots("web")] == ["a", "c"]
    leased = [await manager.allocate_slot("web") for _ in range(2)]
    with pytest.raises(SlotInUseError, match="its host c is drained and not removed yet"):
        await manager.remove_host("c")
    for slot in leased:
        assert slot is not None
        await manager.release_slot(slot)
    await manager.remove_host("c")
    assert [slot.host_id for slot in await manager.list_slots("web")] == ["a", "a"]
    assert [host.host_id for host in await manager.list_hosts()] == ["local", "a", "b"]
    assert pool.options.hosts == ("a", "big")


async def test_a_host_that_does_not_answer_is_removed_by_force_and_swept_when_it_is_back(
    manager: PoolManager, told: Watcher, switched: dict[str, SwitchedHost], origin: Path, tmp_path: Path
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    switched["b"].is_up = False
    await manager.park_host("b")
    await manager.remove_host("b", force=True)
    assert [slot.host_id for slot in await manager.list_slots("web")] == ["a", "a"]
    switched["b"].is_up = True
    await manager.resume_host("b")
    assert await pool.keeper.chores.discard_strays() == [str(tmp_path / "b/web/slots/slot2")]


async def test_what_cannot_be_done_to_a_host_is_refused(manager: PoolManager) -> None:
    with pytest.raises(HostNotFoundError, match="no host 'x'"):
        await manager.drain_host("x")
    for verb in (manager.park_host, manager.remove_host):
        with pytest.raises(ConfigError, match="the manager's own machine"):
            await verb("local")
