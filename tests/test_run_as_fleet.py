"""Pools whose lessees run as another user, on hosts that can do that, cannot, or cannot any more. Only root can try."""

import asyncio
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from repopool_async import (
    ConfigError,
    FencedError,
    HostSpec,
    LeasedSlot,
    PoolConfig,
    PoolManager,
    SlotAllocationError,
    SlotState,
    SshHost,
)
from repopool_async._users import look_here, private_group, start_as
from repopool_async.hosts._ssh_connection import SshOptions
from tests.hosts import sshd
from tests.hosts.sshd import Keys, Server
from tests.test_fleet_ssh import executions_of_a_cleaning, leave_alone
from tests.test_janitor import Watcher

USER = "daemon"
NOT_ROOT = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c")
CLOSED = ("sh", "-c", 'umask 077; exec sh -c "$0"')
WITHOUT_USER = (
    *("unshare", "--mount", "sh", "-c"),
    f'if [ -e "$0" ]; then grep -v ^{USER}: /etc/passwd >"$0"; mount --bind "$0" /etc/passwd; fi; exec sh -c "$1"',
)
"""A machine of its own, as far as users are concerned, while there is a file that is named."""
WITH_GROUP = (*("unshare", "--mount", "sh", "-c"), 'mount --bind "$0" /etc/group && exec sh -c "$1"')

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run commands as another user")


@pytest.fixture(scope="module")
def absent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file: while it is there the host `lacking` has no such user."""
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no mount namespace can be made here")
    return tmp_path_factory.mktemp("machine") / "passwd"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, absent: Path) -> Iterator[dict[str, Server]]:
    groups = absent.with_name("group")
    groups.touch()
    shells = {
        "box": ("sh", "-c"),
        "taken": (*WITH_GROUP, str(groups)),
        "lacking": (*WITHOUT_USER, str(absent)),
        "not-root": NOT_ROOT,
        "closed": CLOSED,
    }
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(sshd.asyncssh_server(Keys.make(tmp_path_factory.mktemp("keys")), shell=shell))
            for name, shell in shells.items()
        }


@pytest.fixture
def place(origin: Path, absent: Path) -> Iterator[Path]:
    """A directory that any user may enter (pytest's own are closed), with the origin in it."""
    absent.touch()
    directory = Path(tempfile.mkdtemp(prefix="run-as-"))
    directory.chmod(0o755)
    shutil.copytree(origin, directory / "origin.git")
    yield directory
    shutil.rmtree(directory)


@asynccontextmanager
async def managing(place: Path, servers: dict[str, Server], *names: str) -> AsyncIterator[PoolManager]:
    """Have a manager of hosts, each in a directory of its own."""
    async with AsyncExitStack() as stack:
        specs = []
        for name in names:
            options = SshOptions(config=(str(servers[name].config),))
            sessions = str(place / name / ".sessions")
            host = await stack.enter_async_context(
                SshHost("box", host_id=name, options=options, sessions_directory=sessions)
            )
            directory = place / name
            directory.mkdir(exist_ok=True)
            if name == "not-root":
                os.chown(directory, 65534, 65534)
            specs.append(HostSpec(name, workspaces_dir=str(directory), host=host, labels=("fleet",)))
        config = PoolConfig(place / "here", janitor_interval=3600)
        yield await stack.enter_async_context(PoolManager(config, hosts=specs))


async def user_of(slot: LeasedSlot) -> str:
    return (await slot.run("id", "-un")).text.strip()


async def hosts_of(manager: PoolManager) -> list[str]:
    return [slot.host_id for slot in await manager.list_slots("web")]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lacking", rf"web: run_as, on host lacking: there is no user '{USER}'; make one"),
        ("not-root", r"web: run_as, on host not-root: only root can .* the SSH login there runs as user 65534; log in"),
        ("closed", r"web: run_as, on host closed: with the umask 077 .* set it to 022"),
    ],
)
async def test_a_pool_is_refused_where_no_host_can_run_its_lessees(
    servers: dict[str, Server], place: Path, name: str, words: str
) -> None:
    async with managing(place, servers, name) as manager:
        with pytest.raises(ConfigError, match=words):
            await manager.create_pool("web", str(place / "origin.git"), hosts=[name], run_as=USER)
        assert await manager.list_pools() == []


async def test_a_directory_that_the_user_cannot_enter_or_could_replace_is_refused(
    servers: dict[str, Server], place: Path
) -> None:
    (place / "box").mkdir(mode=0o700)
    async with managing(place, servers, "box") as manager:
        with pytest.raises(ConfigError, match=rf"on host box: {place}/box cannot be entered by '{USER}'.*chmod o\+x"):
            await manager.create_pool("web", str(place / "origin.git"), hosts=["box"], run_as=USER)
        (place / "box").chmod(0o711)
        os.chown(place / "box", pwd.getpwnam(USER).pw_uid, -1)
        with pytest.raises(ConfigError, match=rf"on host box: {place}/box, .* can be changed by '{USER}'.*chmod go-w"):
            await manager.create_pool("web", str(place / "origin.git"), hosts=["box"], run_as=USER)
        os.chown(place / "box", 0, -1)
        place.chmod(0o777)
        with pytest.raises(ConfigError, match=rf"or a directory above, can be changed by '{USER}'"):
            await manager.create_pool("web", str(place / "origin.git"), hosts=["box"], run_as=USER)
        place.chmod(0o1777)
        pool = await manager.create_pool("web", str(place / "origin.git"), hosts=["box"], run_as=USER)
        async with pool.lease() as slot:
            assert await user_of(slot) == USER


async def test_a_group_that_is_somebodys_is_no_private_one(
    servers: dict[str, Server], place: Path, absent: Path
) -> None:
    tree = f"{place}/taken/web/slots/slot1/tree"
    number = private_group(tree)
    absent.with_name("group").write_text(f"root:x:0:\ntheirs:x:{number}:\n")
    async with managing(place, servers, "taken") as manager:
        with pytest.raises(ConfigError, match=rf"{tree}: the group number {number} is taken by 'theirs'"):
            await manager.create_pool("web", str(place / "origin.git"), hosts=["taken"], run_as=USER)
        assert await manager.list_pools() == []


async def test_a_host_that_joins_later_without_the_user_gets_no_slot(servers: dict[str, Server], place: Path) -> None:
    async with managing(place, servers, "box", "lacking", "not-root") as manager:
        watcher = Watcher(manager)
        await asyncio.sleep(0)
        url = str(place / "origin.git")
        await manager.create_pool("web", url, num_slots=1, hosts=["box"], run_as=USER)
        pool = await manager.create_pool("web", url, num_slots=3, hosts=["fleet"], run_as=USER)
        assert await hosts_of(manager) == ["box"] * 3
        leases = [await manager.allocate_slot("web") for _ in range(3)]
        assert [await user_of(slot) for slot in leases if slot is not None] == [USER] * 3
        assert os.listdir(place / "lacking") == [".managers"]
        for slot in leases:
            assert slot is not None
            await manager.release_slot(slot)
        assert [slot.state for slot in await pool.list_slots()] == [SlotState.AVAILABLE] * 3
        await watcher.end()
        told = [event.fields for event in watcher.events if event.kind == "host.unfit"]
        assert sorted((fields["repo_name"], fields["host_id"]) for fields in told) == [
            ("web", "lacking"),
            ("web", "not-root"),
        ]


async def test_this_machine_and_others_in_one_pool(servers: dict[str, Server], place: Path) -> None:
    async with managing(place, servers, "box", "lacking") as manager:
        hosts = ["local", "lacking", "box"]
        pool = await manager.create_pool("web", str(place / "origin.git"), num_slots=2, hosts=hosts, run_as=USER)
        assert sorted(await hosts_of(manager)) == ["box", "local"]
        async with pool.lease() as one, pool.lease() as two:
            for slot, other in ((one, two), (two, one)):
                assert await user_of(slot) == USER
                assert str(private_group(str(slot.path))) in (await slot.run("id", "-G")).text.split()
                assert (await slot.run("ls", str(other.path), check=False)).exit_code != 0


async def test_a_host_is_asked_again_when_it_was_out_of_use(
    servers: dict[str, Server], place: Path, absent: Path
) -> None:
    absent.unlink()
    async with managing(place, servers, "lacking") as manager:
        pool = await manager.create_pool(
            "web", str(place / "origin.git"), num_slots=2, hosts=["lacking"], run_as=USER, acquire_timeout=20
        )
        async with pool.lease() as slot:
            assert await user_of(slot) == USER
        await manager.wait_clean()
        absent.touch()
        async with pool.lease() as slot:  # what is known stays known
            assert slot.host_id == "lacking"
            await manager.drain_host("lacking")
            await manager.resume_host("lacking")
        await manager.wait_clean()
        # The lease could only be given back to a host that has no such user any more.
        states = {one.state for one in await pool.list_slots()}
        assert states == {SlotState.CLEANING, SlotState.AVAILABLE}
        with pytest.raises((SlotAllocationError, ConfigError), match=f"there is no user '{USER}'"):
            await pool.lease().__aenter__()
        assert all(one.state is not SlotState.ERROR for one in await pool.list_slots())
        absent.unlink()
        await manager.drain_host("lacking")
        await manager.resume_host("lacking")
        async with pool.lease() as slot, pool.lease() as other:
            assert [await user_of(one) for one in (slot, other)] == [USER] * 2


async def test_what_a_command_is_given_decides_nothing_that_runs_as_root(
    servers: dict[str, Server], place: Path
) -> None:
    """Libraries and programs of the lessee's that its caller names are for the lessee's command only."""
    async with managing(place, servers, "box") as manager:
        for hosts in (["local"], ["box"]):
            pool = await manager.create_pool(hosts[0], str(place / "origin.git"), hosts=hosts, run_as=USER)
            async with pool.lease() as slot:
                given = {"LD_PRELOAD": str(slot.path / "planted.so"), "BASH_ENV": "x", "MINE": "yes"}
                await slot.run("cp", "README.md", "planted.so")
                done = await slot.run("env", env=given)
                assert {f"{name}={value}" for name, value in given.items()} <= set(done.text.splitlines())
                assert done.stderr.count(b"planted.so") == 1, done.stderr  # by the command's own loader
                await slot.run("sh", "-c", "printf '#!/bin/sh\necho ran\n' >odd=name; chmod +x odd=name")
                assert (await slot.run("./odd=name", env=given)).text == "ran\n"


async def test_a_program_of_the_lessees_is_not_run_as_root_to_refuse_it(
    servers: dict[str, Server], place: Path
) -> None:
    async with managing(place, servers, "box") as manager:
        for hosts in (["local"], ["box"]):
            pool = await manager.create_pool(
                hosts[0], str(place / "origin.git"), hosts=hosts, run_as=USER, salvage="never"
            )
            canary = place / f"canary-{hosts[0]}"
            planted = place / f"bin-{hosts[0]}"
            planted.mkdir()
            for name in ("rm", "mkdir", "cat", "printf", "id", "setpriv"):
                (planted / name).write_text(f"#!/bin/sh\necho {name} >>{canary}\n")
                (planted / name).chmod(0o755)
            slot = await manager.allocate_slot(hosts[0])
            assert slot is not None
            path = f"{planted}:{os.environ['PATH']}"
            assert (await slot.run("sh", "-c", "true", env={"PATH": path})).exit_code == 0
            await pool.watch.force_unlock(slot.slot_id)
            await manager.wait_clean()
            with pytest.raises(FencedError):
                await slot.run("sh", "-c", "true", env={"PATH": path})
            assert not canary.exists(), canary.read_text()


async def test_how_many_executions_a_cleaning_is_after_another_user(
    servers: dict[str, Server], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with managing(place, servers, "box") as manager:
        leave_alone(manager, monkeypatch)
        box = manager._shared.hosts.machine("box").host
        assert isinstance(box, SshHost)
        url = str(place / "origin.git")
        pool = await manager.create_pool("web", url, hosts=["box"], fetch_max_age=3600, run_as=USER)
        for script in ("true", "rm -rf README.md src; mkfifo README.md; echo x >new; setsid sleep 600 &"):
            assert await executions_of_a_cleaning(manager, pool, box, script) == 3
        before = box.exec_count
        async with pool.lease():
            assert box.exec_count - before <= 2


async def test_a_manager_need_not_be_root_where_the_login_on_the_host_is(
    servers: dict[str, Server], place: Path
) -> None:
    """The manager runs as `nobody` here; the pool's files on the host are root's, and lessees somebody else's."""
    program = """
import asyncio, sys
from repopool_async import ConfigError, HostSpec, PoolConfig, PoolManager, SshHost
from repopool_async.hosts._ssh_connection import SshOptions
async def main(place, config):
    async with SshHost("box", options=SshOptions(config=(config,)), sessions_directory=place + "/box/.sessions") as box:
        spec = HostSpec("box", workspaces_dir=place + "/box", host=box)
        async with PoolManager(PoolConfig(place + "/theirs"), hosts=[spec]) as manager:
            options = {"num_slots": 2, "hosts": ["local", "box"], "run_as": "daemon"}
            pool = await manager.create_pool("web", place + "/origin.git", **options)
            print(sorted(slot.host_id for slot in await pool.list_slots()))
            async with pool.lease() as slot:
                print((await slot.run("id", "-un")).text.strip())
            await manager.wait_clean()
            print([str(slot.state) for slot in await pool.list_slots()])
            try:
                await manager.create_pool("own", place + "/origin.git", run_as="daemon")
            except ConfigError as error:
                print(error)
asyncio.run(main(*sys.argv[1:]))
"""
    (place / "theirs").mkdir()
    keys = shutil.copytree(servers["box"].keys.directory, place / "keys", ignore=shutil.ignore_patterns("home"))
    for path in (place / "theirs", keys, *keys.iterdir()):
        shutil.chown(path, "nobody", "nogroup")
    server = servers["box"]
    config = keys / "config"
    config.write_text(server.config.read_text().replace(str(server.keys.directory), str(keys)))
    prefix = start_as(look_here("nobody"), [])
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1",
    }

    async def run(*argv: str) -> "subprocess.CompletedProcess[str]":
        command = [*prefix, sys.executable, "-c", *argv]
        return await asyncio.to_thread(subprocess.run, command, env=environment, capture_output=True, text=True)

    if (await run("import attrs, asyncssh, repopool_async")).returncode != 0:
        pytest.skip("nobody cannot read this Python or this checkout")
    done = await run(program, str(place), str(config))
    assert done.stdout.splitlines()[:3] == ["['box', 'box']", "daemon", "['available', 'available']"], done
    assert "only root can run lessees as 'daemon', and this process runs as user 65534" in done.stdout
