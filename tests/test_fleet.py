"""One pool over several hosts: where slots and mirrors lie, and that everything done to a slot is done on its host."""

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from repopool_async import ConfigError, FencedError, HostSpec, PoolConfig, PoolManager, Slot, SlotAllocationError
from repopool_async._clock import now
from repopool_async._codec import dumps, loads

MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]


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


# -- mirrors and refs --------------------------------------------------------------------------------------------


async def test_the_newest_commit_is_shown_on_whichever_host(
    manager: PoolManager, origin: Path, make_commit: MakeCommit
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    newest = make_commit(origin, "main", {"news.txt": b"new\n"})
    async with pool.lease(ref="main") as one, pool.lease(ref="main") as other:
        for slot in (one, other):
            assert slot.commit == newest
            assert (slot.path / "news.txt").read_bytes() == b"new\n"
            assert (await slot.run("git", "rev-parse", "origin/main")).text.strip() == newest


async def test_only_the_mirror_that_says_what_refs_mean_is_fetched_while_the_others_have_what_is_wanted(
    manager: PoolManager, origin: Path
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    async with pool.lease() as one, pool.lease() as other:
        assert {slot.host_id for slot in (one, other)} == {"a", "b"}
    counts = {name: pool._context.parts.hosts.on(name).mirror.fetch_count for name in "ab"}
    assert counts["a"] > 0
    assert counts["b"] == 0


async def test_a_host_fetches_from_anothers_mirror_where_it_is_told_to(
    origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    hosts = [host(tmp_path, "a"), host(tmp_path, "b", mirror_from="a"), host(tmp_path, "c", mirror_from="manager")]
    async with PoolManager(PoolConfig(tmp_path / "pools"), hosts=hosts) as manager:
        pool = await manager.create_pool("web", str(origin), num_slots=1, hosts=["b"])
        mirrors = {name: pool._context.parts.hosts.on(name).mirror for name in "abc"}
        newest = make_commit(origin, "main", {"news.txt": b"new\n"})
        async with pool.lease(ref="main") as slot:
            assert slot.commit == newest
        assert mirrors["a"].fetch_count == mirrors["b"].fetch_count == 1
        configured = (tmp_path / "b/web/mirror.git/config").read_text()
        assert str(origin) in configured
        hidden = make_commit(origin, "gone", {"x": b"x"})
        subprocess.run(["git", "-C", str(origin), "update-ref", "refs/pull/7/head", hidden], check=True)
        subprocess.run(["git", "-C", str(origin), "update-ref", "-d", "refs/heads/gone"], check=True)
        async with pool.lease(ref="refs/pull/7/head") as slot:
            assert slot.commit == hidden
        await mirrors["c"].ensure()
        assert (tmp_path / "pools/web/mirror.git").exists()
        assert await mirrors["c"].has(newest)


async def test_a_commit_that_no_branch_has_is_brought_to_the_host_that_needs_it(
    manager: PoolManager, origin: Path, make_commit: MakeCommit
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    hidden = make_commit(origin, "gone", {"x": b"x"})
    subprocess.run(["git", "-C", str(origin), "update-ref", "refs/pull/7/head", hidden], check=True)
    subprocess.run(["git", "-C", str(origin), "update-ref", "-d", "refs/heads/gone"], check=True)
    async with pool.lease(ref="refs/pull/7/head") as one, pool.lease(ref="refs/pull/7/head") as other:
        assert one.commit == other.commit == hidden
        assert {one.host_id, other.host_id} == {"a", "b"}


# -- the fence ---------------------------------------------------------------------------------------------------


async def test_a_slot_whose_records_lost_its_last_lease_is_recovered_before_anybody_gets_it(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=1, hosts=["a"])
    (tmp_path / "a/web/slots/slot1/run").mkdir(parents=True)
    (tmp_path / "a/web/slots/slot1/fence/00000000000000000041").mkdir(parents=True)
    (tmp_path / "a/web/slots/slot1/tree/work").write_text("of whoever had token 41")
    async with pool.lease(timeout=0) as slot:
        assert slot.token == 43
        assert (await slot.run("git", "status", "--short")).text == ""
        (salvage,) = await manager.list_salvage("web")
        await manager.restore_salvage(salvage.salvage_id, slot)
        assert (slot.path / "work").read_text() == "of whoever had token 41"


async def test_commands_of_a_lease_are_refused_once_its_slot_is_being_cleaned(
    manager: PoolManager, origin: Path
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=1)
    slot = await manager.allocate_slot("web", detached=True, ttl=60)
    assert slot is not None
    async with PoolManager(manager.config) as other:
        await other.release_slot(slot.slot_id, token=slot.token)
    with pytest.raises(FencedError, match="it has ended"):
        await slot.run("true")
    assert slot.lost.is_set()
    assert (await pool.summary()).available == 1
