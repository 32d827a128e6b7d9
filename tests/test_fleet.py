"""One pool over several hosts: where slots and mirrors lie, and that everything done to a slot is done on its host."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from repopool_async import ConfigError, HostSpec, PoolConfig, PoolManager, Slot, SlotAllocationError
from repopool_async._clock import now
from repopool_async._codec import dumps, loads


def host(directory: Path, name: str, **options: object) -> HostSpec:
    return HostSpec(name, address="local", workspaces_dir=str(directory / name), **options)  # type: ignore[arg-type]


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    hosts = [host(tmp_path, "a", labels=["big"]), host(tmp_path, "b", labels=["big"])]
    async with PoolManager(PoolConfig(tmp_path / "pools"), hosts=hosts) as manager:
        yield manager


async def test_slots_are_spread_over_the_hosts_and_leased_there(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=3, hosts=["big"])
    slots = await manager.list_slots("web")
    assert [(slot.slot_id, slot.host_id) for slot in slots] == [
        ("workspace-web-slot1", "a"),
        ("workspace-web-slot2", "b"),
        ("workspace-web-slot3", "a"),
    ]
    assert slots[1].path == str(tmp_path / "b/web/slots/slot2/tree")
    assert not (tmp_path / "pools/web/mirror.git").exists()
    async with pool.lease(timeout=30) as one, pool.lease(timeout=30) as other:
        assert {one.path.parents[3].name, other.path.parents[3].name} == {"a", "b"}
        assert (await other.run("git", "rev-parse", "HEAD")).text.strip() == other.commit


async def test_removed_slots_and_pools_leave_nothing_on_the_hosts(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    await manager.remove_slot("workspace-web-slot2")
    assert os.listdir(tmp_path / "b/web/slots") == []
    await manager.delete_pool("web")
    assert os.listdir(tmp_path / "a") == os.listdir(tmp_path / "b") == [".managers"]


async def test_a_pool_that_grows_keeps_its_slots_where_they_are(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin), num_slots=1)
    await manager.create_pool("web", str(origin), num_slots=3, hosts=["b", "local"])
    assert [slot.host_id for slot in await manager.list_slots("web")] == ["local", "b", "b"]
    await manager.resize("web", 2)
    assert (await manager.add_slot("web")).host_id == "b"


async def test_hosts_do_not_take_more_than_their_capacity(origin: Path, tmp_path: Path) -> None:
    async with PoolManager(PoolConfig(tmp_path / "pools"), hosts=[host(tmp_path, "a", capacity=2)]) as manager:
        await manager.create_pool("web", str(origin), num_slots=1, hosts=["a"])
        await manager.create_pool("api", str(origin), num_slots=1, hosts=["a"])
        with pytest.raises(SlotAllocationError, match="raise their capacity"):
            await manager.add_slot("web")


async def test_another_managers_host_is_refused(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin), hosts=["a"])
    async with PoolManager(PoolConfig(tmp_path / "others"), hosts=[host(tmp_path, "a")]) as other:
        with pytest.raises(ConfigError, match=r"another manager's .*coordination: postgresql://"):
            await other.create_pool("api", str(origin), hosts=["a"])
    assert await manager.available_count("web") == 1


async def test_an_unknown_host_is_refused(manager: PoolManager, origin: Path) -> None:
    with pytest.raises(ConfigError, match=r"hosts\[0\]: expected the name or a label of a host \(.*big.*\)"):
        await manager.create_pool("web", str(origin), hosts=["nowhere"])


def test_records_of_before_there_were_hosts_are_of_the_managers_machine() -> None:
    record = dumps(Slot("workspace-web-slot1", "web", "/r", "/p", now()))
    assert b'"host_id":"local"' in record
    assert loads(Slot, record.replace(b'"host_id":"local",', b"")).host_id == "local"
