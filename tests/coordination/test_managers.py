"""Managers of several machines with one database: who gets which slot, and what becomes of it when one fails."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from repopool_async import (
    ConfigError,
    CoordinatorUnavailableError,
    FencedError,
    HostSpec,
    HostUnreachableError,
    LeaseLostError,
    ManagerClosedError,
    PoolConfig,
    PoolManager,
    PoolTimeoutError,
    SshHost,
    StoreError,
)
from repopool_async.config_coordination import Coordination
from repopool_async.hosts._ssh_connection import SshOptions
from tests._postgres import Proxy, Server, eventually
from tests._switched import SwitchedHost
from tests.coordination.conftest import DATABASE, TAKEOVER_SECONDS, Fleet, PostgresPlace
from tests.hosts import sshd
from tests.test_fleet_ssh import is_running
from tests.test_janitor import Watcher

ROOT = Path(__file__).parents[2]


def crash(server: Server) -> None:
    server.stop(signal.SIGQUIT)


async def start(server: Server) -> None:
    await asyncio.to_thread(server.start)


# -- one pool ----------------------------------------------------------------------------------------------------


async def test_two_managers_share_the_slots_of_a_pool(fleet: Fleet, origin: Path) -> None:
    one, two = await fleet.manager(1), await fleet.manager(2)
    await one.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    async with one.lease("web") as mine, two.lease("web") as others:
        assert {mine.host_id, others.host_id} == {"a", "b"}
        assert await two.allocate_slot("web") is None
        status = await two.get_slot_status(mine.slot_id)
        assert status.is_locked
        assert status.lease is not None
        assert status.lease.token == mine.token
    await one.wait_clean()
    await two.wait_clean()
    assert await two.available_count("web") == 2
    assert [line.event for line in await two.get_allocation_history(mine.slot_id)] == ["allocated", "released"]
    assert len(await one.get_cleanup_log(others.slot_id)) >= 1


async def test_a_manager_waits_for_a_slot_that_another_gives_back(fleet: Fleet, origin: Path) -> None:
    one, two = await fleet.manager(1), await fleet.manager(2)
    await one.create_pool("web", str(origin), num_slots=1, hosts=["a"])
    slot = await one.allocate_slot("web")
    assert slot is not None
    waiting = asyncio.create_task(two.allocate_slot("web", timeout=60))
    async with asyncio.timeout(30):
        while (await two.get_pool("web")).stats()["waiting"] == 0:
            await asyncio.sleep(0)
    await one.release_slot(slot)
    other = await waiting
    assert other is not None
    assert (other.slot_id, other.token) == (slot.slot_id, slot.token + 1)
    await two.release_slot(other)  # closing would wait for it


async def test_deleting_a_pool_leaves_nothing_on_any_host(fleet: Fleet, origin: Path, tmp_path: Path) -> None:
    one, two = await fleet.manager(1), await fleet.manager(2)
    await one.create_pool("web", str(origin), num_slots=3, hosts=["a", "b", "local"])
    await two.remove_slot("workspace-web-slot2")
    assert os.listdir(tmp_path / "b/web/slots") == []
    await one.delete_pool("web")
    assert [os.listdir(tmp_path / name) for name in ("a", "b", "manager1")] == [[".managers"]] * 3
    assert await one.list_pools() == []


async def test_status_shows_the_slots_of_all_managers(fleet: Fleet, origin: Path, tmp_path: Path) -> None:
    one, two = await fleet.manager(1), await fleet.manager(2)
    await one.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    file = tmp_path / "pools.yaml"
    file.write_text(json.dumps({"workspaces_dir": "third", "coordination": {"type": "postgres"}}))
    argv = [sys.executable, "-m", "repopool_async.cli", "status", "--json", "--config", str(file)]
    async with one.lease("web", metadata={"for": "one"}), two.lease("web", metadata={"for": "two"}):
        done = await asyncio.to_thread(
            subprocess.run,
            argv,
            cwd=ROOT,
            env={**os.environ, "REPOPOOL_DSN": fleet.dsn},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stderr == ""
    (pool,) = json.loads(done.stdout)["pools"]
    assert {slot["lease"]["metadata"]["for"] for slot in pool["slots"]} == {"one", "two"}
    assert {(slot["host_id"], slot["is_locked"], slot["is_orphaned"]) for slot in pool["slots"]} == {
        ("a", True, False),
        ("b", True, False),
    }


# -- hosts -------------------------------------------------------------------------------------------------------


async def condition(manager: PoolManager, name: str) -> str:
    return next(host.condition for host in await manager.list_hosts() if host.host_id == name)


async def test_a_host_drained_by_one_manager_is_drained_for_the_other(fleet: Fleet, origin: Path) -> None:
    one, two = await fleet.manager(1), await fleet.manager(2)
    await one.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    await one.drain_host("a", "new disk")
    assert await condition(two, "a") == "draining"
    async with two.lease("web") as slot:
        assert slot.host_id == "b"
        assert await two.allocate_slot("web") is None
    await two.resume_host("a")
    async with one.lease("web", timeout=30), one.lease("web", timeout=30):
        pass
    assert await condition(one, "a") == "active"


async def test_a_host_parked_by_one_manager_ends_the_others_leases_there(fleet: Fleet, origin: Path) -> None:
    one, two = await fleet.manager(1), await fleet.manager(2)
    await one.create_pool("web", str(origin), num_slots=1, hosts=["a"])
    slot = await two.allocate_slot("web")
    assert slot is not None
    await one.park_host("a")
    async with asyncio.timeout(TAKEOVER_SECONDS):
        await slot.lost.wait()
    with pytest.raises(LeaseLostError):
        await two.release_slot(slot)
    await one.resume_host("a")
    assert await condition(two, "a") == "active"
    async with two.lease("web", timeout=60) as again:
        assert again.slot_id == slot.slot_id


async def test_a_host_that_one_manager_cannot_reach_is_used_by_the_other(fleet: Fleet, origin: Path) -> None:
    switched = SwitchedHost("a")
    one, two = await fleet.manager(1), await fleet.manager(2, fleet.hosts(a=switched))
    await one.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"], fetch_on_allocate=False)
    await one.drain_host("b")
    assert await condition(two, "b") == "draining"
    others = await two.allocate_slot("web", timeout=30)
    await one.resume_host("b")
    mine = await one.allocate_slot("web", timeout=30)
    assert others is not None
    assert mine is not None
    assert (others.host_id, mine.host_id) == ("a", "b")
    assert await condition(two, "b") == "active"
    watcher = Watcher(two)
    await asyncio.sleep(0)
    switched.is_up = False
    with pytest.raises(HostUnreachableError):
        await others.run("true")
    two._shared.hosts.suspect(HostUnreachableError("gone", host_id="a"))
    await watcher.first("host.parked")
    async with asyncio.timeout(TAKEOVER_SECONDS):
        await others.lost.wait()
    assert await condition(two, "a") == "unreachable"
    assert await condition(one, "a") == "active"
    taken_over = await one.allocate_slot("web", timeout=60)
    assert taken_over is not None
    assert (taken_over.slot_id, taken_over.host_id) == (others.slot_id, "a")
    assert not mine.lost.is_set()
    switched.is_up = True
    await watcher.first("host.resumed")
    await watcher.end()
    await one.release_slot(taken_over)
    again = await two.allocate_slot("web", timeout=60)
    assert again is not None
    assert again.host_id == "a"
    await two.release_slot(again)  # closing would wait for them
    await one.release_slot(mine)


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Server]:
    with sshd.asyncssh_server(sshd.Keys.make(tmp_path_factory.mktemp("keys"))) as server:
        yield server


async def test_managers_share_a_host_over_ssh_and_it_refuses_the_one_that_was_robbed(
    fleet: Fleet, ssh: sshd.Server, origin: Path, tmp_path: Path
) -> None:
    there = str(tmp_path / "there")
    managers = []
    for number in (1, 2):
        host = SshHost("box", options=SshOptions(config=(str(ssh.config),)), sessions_directory=f"{there}/.sessions")
        await fleet.stack.enter_async_context(host)
        managers.append(await fleet.manager(number, [HostSpec("box", workspaces_dir=there, host=host)]))
    one, two = managers
    await one.create_pool("web", str(origin), num_slots=1, hosts=["box"])
    slot = await one.allocate_slot("web")
    assert slot is not None
    async with slot.open_process("sh", "-c", "echo $$; exec sleep 300") as process:
        pid = int(await process.read())
        await two.force_unlock(slot.slot_id)
        taken = await two.allocate_slot("web", timeout=60)
        assert taken is not None
        assert await process.wait() != 0
    assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(FencedError):
        await slot.run("true")
    async with asyncio.timeout(TAKEOVER_SECONDS):
        await slot.lost.wait()
    assert (await taken.run("git", "rev-parse", "HEAD")).text.strip() == taken.commit
    await two.release_slot(taken)  # closing would wait for it


# -- what a name means -------------------------------------------------------------------------------------------


async def test_the_managers_own_machine_is_another_for_each_and_refused_where_it_is_taken(
    fleet: Fleet, origin: Path
) -> None:
    one, two = await fleet.manager(1), await fleet.manager(2)
    await one.create_pool("web", str(origin), num_slots=1)
    with pytest.raises(ConfigError, match=r"host local: .*another directory .*manager1.*one name under hosts"):
        await two.create_pool("api", str(origin), num_slots=1)
    assert await condition(two, "local") == "refused"
    with pytest.raises(HostUnreachableError, match=r"none of its hosts can be used now \(local\)"):
        await two.allocate_slot("web", timeout=1)
    async with one.lease("web") as slot:
        assert slot.host_id == "local"


async def test_several_managers_of_one_directory_are_one_machine(fleet: Fleet, origin: Path) -> None:
    one, two = await fleet.manager(1), await fleet.manager(1)
    await one.create_pool("web", str(origin), num_slots=1)
    async with two.lease("web") as slot:
        assert slot.host_id == "local"


async def test_one_directory_under_two_names_is_refused(fleet: Fleet, origin: Path, tmp_path: Path) -> None:
    one = await fleet.manager(1)
    await one.create_pool("web", str(origin), num_slots=1, hosts=["a"])
    other = [HostSpec("c", address="local", workspaces_dir=str(tmp_path / "a"))]
    two = await fleet.manager(2, other)
    with pytest.raises(ConfigError, match="is that of host a for the other managers of the database"):
        await two.create_pool("api", str(origin), num_slots=1, hosts=["c"])


async def test_a_host_whose_directory_was_emptied_is_refused_until_it_is_removed(
    fleet: Fleet, origin: Path, tmp_path: Path
) -> None:
    one = await fleet.manager(1)
    await one.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    shutil.rmtree(tmp_path / "a")
    two = await fleet.manager(2)
    await eventually(lambda: _is(two, "a", "refused"))
    async with two.lease("web", timeout=30) as slot:
        assert slot.host_id == "b"
    await two.remove_host("a", force=True)
    assert await condition(two, "a") == "draining"
    await two.resume_host("a")
    await eventually(lambda: _is(two, "a", "active"))
    pool = await two.create_pool("api", str(origin), num_slots=1, hosts=["a"])
    async with pool.lease() as slot:
        assert slot.host_id == "a"
    assert [slot.host_id for slot in await two.list_slots("web")] == ["b", "b"]


async def _is(manager: PoolManager, name: str, wanted: str) -> bool:
    return await condition(manager, name) == wanted


async def test_a_directory_whose_slots_are_recorded_in_files_is_refused(
    fleet: Fleet, origin: Path, tmp_path: Path
) -> None:
    async with PoolManager(PoolConfig(tmp_path / "manager1")) as manager:
        await manager.create_pool("old", str(origin), num_slots=1)
    one = await fleet.manager(1)
    with pytest.raises(ConfigError, match=r"holds pools that are recorded in files \(old\)"):
        await one.create_pool("web", str(origin), num_slots=1)


async def test_a_directory_that_belongs_to_a_database_is_refused_without_it(
    fleet: Fleet, origin: Path, tmp_path: Path
) -> None:
    one = await fleet.manager(1)
    await one.create_pool("web", str(origin), num_slots=1)
    with pytest.raises(ConfigError, match=r"the managers of the database .*set coordination: postgresql://"):
        await PoolManager(PoolConfig(tmp_path / "manager1")).open()


# -- the database ------------------------------------------------------------------------------------------------


async def test_a_database_without_the_schema_is_told_with_the_remedy(server: Server, tmp_path: Path) -> None:
    async with server.admin() as connection:
        await connection.execute("CREATE DATABASE bare OWNER repopool")
    try:
        config = PoolConfig(tmp_path, coordination=Coordination(dsn=server.dsn("bare")))
        with pytest.raises(StoreError, match=r"schema repopool is missing.*run `repopool db migrate`"):
            await PoolManager(config).open()
    finally:
        async with server.admin() as connection:
            await connection.execute("DROP DATABASE bare WITH (FORCE)")


async def test_leases_outlast_a_crash_of_the_database_and_who_waits_goes_on_waiting(
    own_fleet: Fleet, own_server: Server, origin: Path
) -> None:
    one, two = await own_fleet.manager(1), await own_fleet.manager(2)
    await one.create_pool("web", str(origin), num_slots=2, hosts=["a", "b"])
    mine, others = await one.allocate_slot("web"), await two.allocate_slot("web")
    assert mine is not None
    assert others is not None
    waiting = asyncio.create_task(two.allocate_slot("web", timeout=120))
    crash(own_server)
    assert (await mine.run("echo", "still here")).text == "still here\n"
    with pytest.raises(CoordinatorUnavailableError):
        await one.allocate_slot("web")
    await start(own_server)
    await eventually(lambda: _answers(one, mine.slot_id), TAKEOVER_SECONDS)
    assert not mine.lost.is_set()
    assert not others.lost.is_set()
    await one.release_slot(mine)
    third = await waiting
    assert third is not None
    assert (third.slot_id, third.token) == (mine.slot_id, mine.token + 1)
    await two.release_slot(third)
    await two.release_slot(others)
    assert await one.available_count("web") == 2


async def _answers(manager: PoolManager, slot_id: str) -> bool:
    try:
        return (await manager.get_slot_status(slot_id)).is_locked
    except CoordinatorUnavailableError:
        return False


async def test_who_waits_is_told_in_time_that_the_database_does_not_answer(
    own_fleet: Fleet, own_server: Server, origin: Path
) -> None:
    one = await own_fleet.manager(1)
    await one.create_pool("web", str(origin), num_slots=1, hosts=["a"])
    crash(own_server)
    with pytest.raises(PoolTimeoutError, match=r"the database .* (cannot be used now|has not confirmed)"):
        async with one.lease("web", timeout=1.5):
            pytest.fail("a lease that nobody knows of")


@pytest.mark.parametrize("how", ["gone", "silent"])
async def test_closing_ends_though_the_database_does_not_answer(
    own_fleet: Fleet, own_server: Server, origin: Path, how: str
) -> None:
    async with Proxy(own_server.port) as proxy:
        dsn = own_server.dsn(DATABASE, port=proxy.port)
        manager = await own_fleet.manager(1, dsn=dsn)
        await manager.create_pool("web", str(origin), num_slots=3, hosts=["a", "b"], fetch_on_allocate=False)
        slot = await manager.allocate_slot("web")
        assert slot is not None
        crash(own_server) if how == "gone" else proxy.freeze()
        waiting = asyncio.create_task(manager.allocate_slot("web", timeout=None))
        async with asyncio.timeout(30):  # without a bound it would be half a minute for each slot
            await manager.close(timeout=0.5)
        with pytest.raises(ManagerClosedError):
            await waiting
        assert slot.lost.is_set()
        assert manager.closed


async def test_the_example_of_a_fleet_runs_with_a_database(fleet: Fleet, origin: Path, tmp_path: Path) -> None:
    argv = [sys.executable, str(ROOT / "examples/fleet.py"), str(origin)]
    for _ in range(2):  # nothing of the first run may be in the way of the second
        environment = {**os.environ, "REPOPOOL_DSN": fleet.dsn, "PYTHONPATH": str(ROOT)}
        done = await asyncio.to_thread(
            subprocess.run, argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        assert "first: parked, 0 of 2 slots available" in done.stdout
        assert done.stdout.count("Change CHANGES.md") == 3


# -- lessees of another user -------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run commands as another user")
async def test_lessees_are_the_same_user_whichever_manager_reaches_the_host_in_whichever_way(
    postgres: PostgresPlace, origin: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The host is one manager's own machine, and reached over SSH by the other."""
    open_place = Path(tempfile.mkdtemp(prefix="run-as-"))
    open_place.chmod(0o755)
    shutil.copytree(origin, open_place / "origin.git")
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, open_place)
        server = stack.enter_context(sshd.asyncssh_server(sshd.Keys.make(tmp_path_factory.mktemp("keys"))))
        there = str(open_place / "a")
        options = SshOptions(config=(str(server.config),))
        box = SshHost("box", host_id="a", options=options, sessions_directory=f"{there}/.sessions")
        stack.push_async_callback(box.close)
        fleet = Fleet(open_place, postgres.dsn, stack)
        near = await fleet.manager(1, [HostSpec("a", address="local", workspaces_dir=there)])
        far = await fleet.manager(2, [HostSpec("a", workspaces_dir=there, host=box)])
        await near.create_pool("web", str(open_place / "origin.git"), hosts=["a"], run_as="nobody", salvage="never")
        for holder, taker in ((near, far), (far, near)):
            slot = await holder.allocate_slot("web", timeout=60)
            assert slot is not None
            assert (await slot.run("id", "-un")).text == "nobody\n"
            shed = "setsid env -i PATH=/usr/bin:/bin sh -c 'cd /; echo $$; exec sleep 600' &"
            async with slot.open_process("sh", "-c", shed) as process:
                pid = int(await process.read())
            assert is_running(pid)
            await (await taker.get_pool("web")).watch.force_unlock(slot.slot_id)
            async with taker.lease("web", timeout=60) as other:
                assert other.slot_id == slot.slot_id
                assert not is_running(pid)
                assert (await other.run("id", "-un")).text == "nobody\n"
                assert (await other.run("git", "status", "--porcelain")).text == ""
            await taker.wait_clean()
