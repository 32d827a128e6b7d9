"""Lessees that run as another user: what they can do, and what they cannot. Only root can try that."""

import asyncio
import os
import platform
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from repopool_async import ConfigError, HostSpec, LeasedSlot, PoolConfig, PoolManager, SlotState, SshHost
from repopool_async._users import look_here, private_group, start_as
from repopool_async.hosts._ssh_connection import SshOptions
from tests.hosts import sshd
from tests.hosts.sshd import Server

USER = "nobody"
SLOT = "workspace-web-slot1"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run commands as another user")

IDENTITY = {
    "GIT_AUTHOR_NAME": "Lessee",
    "GIT_AUTHOR_EMAIL": "lessee@example.com",
    "GIT_COMMITTER_NAME": "Lessee",
    "GIT_COMMITTER_EMAIL": "lessee@example.com",
}


@pytest.fixture
def place(origin: Path) -> Iterator[Path]:
    """A directory that any user may enter (pytest's own are closed), with the origin in it."""
    directory = Path(tempfile.mkdtemp(prefix="run-as-"))
    directory.chmod(0o755)
    shutil.copytree(origin, directory / "origin.git")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server | None]:
    """Where the pool lies: on this machine, or on one that is reached over SSH, as root, and is this one as well."""
    if request.param == "local":
        yield None
        return
    with sshd.serving(request.param, tmp_path_factory.mktemp("keys")) as server:
        yield server


here = pytest.mark.parametrize("server", ["local"], indirect=True)
here_and_there = pytest.mark.parametrize("server", ["local", "asyncssh"], indirect=True)
everywhere = pytest.mark.parametrize("server", ["local", "asyncssh", "openssh"], indirect=True)


@pytest.fixture
async def manager(place: Path, server: Server | None) -> AsyncIterator[PoolManager]:
    if server is None:
        async with PoolManager(PoolConfig(workspaces_dir=place / "pools")) as manager:
            yield manager
        return
    options = SshOptions(config=(str(server.config),))
    async with SshHost("box", options=options, sessions_directory=str(place / "pools/.sessions")) as box:
        spec = HostSpec("box", workspaces_dir=str(place / "pools"), host=box)
        async with PoolManager(PoolConfig(workspaces_dir=place / "here"), hosts=[spec]) as manager:
            yield manager


async def make_pool(manager: PoolManager, place: Path, **options: Any) -> None:
    elsewhere = {"hosts": ["box"]} if "box" in manager._shared.hosts.specs else {}
    await manager.create_pool("web", str(place / "origin.git"), **{"run_as": USER, **elsewhere, **options})


def git(path: Path, *args: str) -> str:
    command = ["git", "-c", "safe.directory=*", "-C", str(path), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


async def shell(slot: LeasedSlot, script: str) -> str:
    done = await slot.run("sh", "-c", script, check=False)
    return (done.stdout + done.stderr).decode().strip()


async def is_refused(slot: LeasedSlot, script: str) -> bool:
    return (await slot.run("sh", "-c", script, check=False)).exit_code != 0


async def assert_clean(manager: PoolManager, place: Path) -> None:
    await manager.wait_clean()
    assert (await manager.get_slot_status(SLOT)).state is SlotState.AVAILABLE
    async with manager.lease("web", ref="main") as slot:
        assert await shell(slot, "git status --porcelain --ignored && git stash list && git branch") == "* main"
        assert await shell(slot, "git rev-parse HEAD") == git(place / "origin.git", "rev-parse", "main")
        assert await shell(slot, "git fsck --full") == ""
        assert (slot.path / "README.md").read_bytes() == b"# A small repository\n"
    await manager.wait_clean()


@everywhere
async def test_commands_run_as_the_user_with_its_groups_and_home(manager: PoolManager, place: Path) -> None:
    await make_pool(manager, place)
    user = pwd.getpwnam(USER)
    async with manager.lease("web") as slot:
        assert await shell(slot, "id -u; id -g; id -ru; id -rg") == "\n".join([str(user.pw_uid), str(user.pw_gid)] * 2)
        groups = {int(group) for group in (await shell(slot, "id -G")).split()}
        assert groups == {*os.getgrouplist(USER, user.pw_gid), private_group(str(slot.path))}
        assert await shell(slot, 'echo "$HOME $USER $LOGNAME"') == f"{user.pw_dir} {USER} {USER}"
        assert await shell(slot, "pwd") == str(slot.path)
        status = await shell(slot, "grep Cap /proc/self/status")
        assert all(line.split()[1] == "0" * 16 for line in status.splitlines() if not line.startswith("CapBnd"))
        async with slot.open_process("id", "-u") as process:
            assert (await process.read()).decode().strip() == str(user.pw_uid)
        with pytest.raises(FileNotFoundError):
            await slot.run("no-such-command")


@here_and_there
async def test_roots_environment_stays_with_root(
    manager: PoolManager, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPLOY_TOKEN", "secret")
    await make_pool(manager, place)
    async with manager.lease("web") as slot:
        assert "secret" not in await shell(slot, "env")
        assert await shell(slot, "cat /proc/$PPID/environ 2>&1 | tr -d '\\0' | grep -c secret") == "0"
        given = await slot.run("env", env={"MINE": "yes"})
        assert "MINE=yes" in given.text


@here_and_there
async def test_a_lessee_works_in_its_slot_as_in_any_clone(manager: PoolManager, place: Path) -> None:
    await make_pool(manager, place)
    (place / "origin.git").chmod(0o755)
    async with manager.lease("web", new_branch="agent/x") as slot:
        assert await slot.is_clean_working_tree()
        assert await slot.get_current_branch() == "agent/x"
        done = await slot.run(
            "sh", "-c", "echo more >> README.md && git commit -qam more && git log -1 --format=%s", env=IDENTITY
        )
        assert done.text.strip() == "more"
        git(place / "origin.git", "branch", "later", "main")
        await slot.fetch_all()
        assert "origin/later" in await slot.list_remote_branches()
        await slot.checkout("feature/x")
        assert (await slot.run("git", "status", "--porcelain")).text == ""
        await slot.run("touch", "made")
        assert os.stat(slot.path / "made").st_uid == pwd.getpwnam(USER).pw_uid
        await slot.clean()
        await slot.reset_hard()
        assert await shell(slot, "git fsck --full --no-dangling") == ""
    await assert_clean(manager, place)


@here_and_there
async def test_a_fresh_slot_needs_no_refreshing(manager: PoolManager, place: Path) -> None:
    await make_pool(manager, place)
    for ref in ("main", "feature/x", "main"):
        async with manager.lease("web", ref=ref) as slot:
            assert await shell(slot, "git diff-files; git diff-index HEAD") == ""
            owners = {os.lstat(path).st_uid for path in [slot.path, *slot.path.rglob("*")]}
            assert owners == {pwd.getpwnam(USER).pw_uid}
        await manager.wait_clean()
    log = await manager.get_cleanup_log(SLOT)
    assert all(entry.success and entry.rung is None for entry in log), log


@pytest.mark.parametrize(
    ("server", "isolation"), [("local", "shared"), ("local", "full"), ("asyncssh", "full")], indirect=["server"]
)
async def test_a_lessee_writes_nowhere_but_in_its_tree(manager: PoolManager, place: Path, isolation: str) -> None:
    await make_pool(manager, place, num_slots=2, isolation=isolation)
    pool = place / "pools/web"
    async with manager.lease("web") as slot, manager.lease("web") as other:
        own = slot.path.parent
        locks = list((place / "pools/locks").glob("*"))  # they are where the manager is
        assert bool(locks) is (slot.host_id == "local")
        for path in (
            *(pool, pool / "slots", pool / "mirror.git", pool / "mirror.git/objects", pool / "trash", pool / "tickets"),
            *(place / "pools", place / "pools/locks", own, own / "pristine", own / "pristine/git", other.path),
            *(other.path / ".git", other.path.parent, other.path.parent / "pristine"),
        ):
            assert await is_refused(slot, f"touch {path}/planted"), path
        for path in (
            *(own / "slot.json", own / "history.jsonl", own / "cleanup.jsonl", own / "gitconfig", pool / "pool.json"),
            *(pool / "mirror.git/packed-refs", pool / "mirror.git/repopool/state.json", own / "pristine/git/index"),
            *(other.path / "README.md", other.path.parent / "slot.json"),
            *((pool / "mirror.git/objects").rglob("*")),
            *locks,
        ):
            if path.is_file():
                before = path.read_bytes()
                assert await is_refused(slot, f"echo planted >> {path}"), path
                assert await is_refused(slot, f"rm -f {path}"), path
                assert await is_refused(slot, f"chmod 777 {path}"), path
                assert path.read_bytes() == before
        for move in (f"mv {slot.path} {slot.path}.gone", f"mv {own} {own}.gone", f"ln -s / {own}/tree2"):
            assert await is_refused(slot, move), move
        assert await is_refused(slot, f"ls {other.path}")
        assert await is_refused(slot, f"cat {other.path}/README.md")
        # Locks must be out of reach even of reading: whoever can open a file can lock it.
        for lock in locks:
            assert await is_refused(slot, f"cat {lock}")
        assert await is_refused(slot, f"cat {own}/slot.json")
    await manager.wait_clean()
    assert await manager.check() == {}


MESSES = {
    "files": "echo x > README.md; echo y > new; mkdir -p build/a/b; chmod 000 build/a; rm src/app.py",
    "hooks": "printf '#!/bin/sh\\ntouch {canary}\\n' > .git/hooks/post-checkout 2>/dev/null || mkdir .git/hooks; "
    "printf '#!/bin/sh\\ntouch {canary}\\n' > .git/hooks/post-checkout; chmod +x .git/hooks/post-checkout; "
    "git config core.fsmonitor 'touch {canary}'; git config filter.evil.smudge 'touch {canary}'; "
    "echo '* filter=evil' > .git/info/attributes",
    "links": "rm -rf src && ln -s /etc src; rm README.md; ln -s /etc/passwd README.md; rm -rf .git; ln -s /root .git",
    "git gone": "rm -rf .git *",
    "tree closed": "chmod 000 .",
    "specials": "mkfifo fifo; rm README.md; mkfifo README.md; git init -q nested",
    "stash": "echo x > README.md; git stash -q; git checkout -q -b own; git commit -q --allow-empty -m own; git tag t",
    "index": "echo garbage > .git/index; echo garbage > .git/HEAD; touch .git/index.lock",
    "objects": "for f in .git/objects/pack/*; do chmod u+w $f; echo garbage > $f; done; mkdir -p .git/objects/aa",
    "times": "touch -d 2001-01-01 README.md; echo x > README.md; touch -d 2001-01-01 README.md",
}


@pytest.mark.sampled(one_in=2)
@pytest.mark.parametrize(
    ("server", "mess"),
    [
        *[("local", mess) for mess in sorted(MESSES)],
        *[("asyncssh", mess) for mess in ("hooks", "links", "tree closed")],
    ],
    indirect=["server"],
)
async def test_contamination_by_the_user_is_cleaned(manager: PoolManager, place: Path, mess: str) -> None:
    await make_pool(manager, place)
    canary = place / "canary"
    canary.mkdir()
    canary.chmod(0o777)
    async with manager.lease("web") as slot:
        script = MESSES[mess].replace("{canary}", str(canary / "sang"))
        await slot.run("sh", "-c", script, check=False, env=IDENTITY)
        inode = os.stat(slot.path).st_ino
    await manager.wait_clean()
    assert os.stat(place / "pools/web/slots/slot1/tree").st_ino != inode
    assert list(canary.iterdir()) == []
    await assert_clean(manager, place)
    assert list(canary.iterdir()) == []


@everywhere
async def test_whatever_a_lease_left_running_is_ended_marked_or_not(manager: PoolManager, place: Path) -> None:
    await make_pool(manager, place)
    shed = "setsid env -i PATH=/usr/bin:/bin sh -c 'cd /; echo $$; exec sleep 600' &"
    async with manager.lease("web") as slot:
        async with slot.open_process("sh", "-c", shed) as process:
            pid = int((await process.read()).decode())
            stat_line = Path(f"/proc/{pid}/status").read_text()
        assert f"Uid:\t{pwd.getpwnam(USER).pw_uid}" in stat_line
        assert b"REPOPOOL" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert Path(f"/proc/{pid}").exists()
    await manager.wait_clean()
    assert not _is_alive(pid)
    await assert_clean(manager, place)


@here_and_there
async def test_threads_whose_first_one_has_ended_are_ended_too(manager: PoolManager, place: Path) -> None:
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None or platform.machine() != "x86_64":
        pytest.skip("there is no Python that every user may run, or another system call ends a thread")
    code = (
        "import ctypes, os, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); "
        "print(os.getpid(), flush=True); ctypes.CDLL(None).syscall(60, 0)"
    )
    shed = f"cd /; setsid env -i {python} -ISc '{code}' &"
    await make_pool(manager, place)
    async with manager.lease("web") as slot:
        async with slot.open_process("sh", "-c", shed) as process:
            pid = int((await process.read()).decode())
        threads = Path(f"/proc/{pid}/task")
        assert len(list(threads.iterdir())) == 2
    await manager.wait_clean()
    assert not threads.exists() or len(list(threads.iterdir())) == 1


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@here_and_there
async def test_another_lease_of_the_same_user_is_left_running(manager: PoolManager, place: Path) -> None:
    await make_pool(manager, place, num_slots=2)
    async with manager.lease("web") as stays, stays.open_process("sleep", "600") as process:
        async with manager.lease("web") as goes:
            await goes.run("true")
        await manager.wait_clean()
        assert process.exit_code is None


@here_and_there
async def test_a_user_that_keeps_racing_reaches_nothing_outside(manager: PoolManager, place: Path) -> None:
    """Something of the lessee's, ended only in the middle of the return, swaps directories for links all the time."""
    await make_pool(manager, place)
    outside = place / "outside"
    outside.mkdir()
    (outside / "app.py").write_text("mine\n")
    swap = f"while :; do rm -rf src; ln -s {outside} src; rm -f src; mkdir src; done"
    for _ in range(3):
        async with manager.lease("web") as slot:
            await slot.run("sh", "-c", f"setsid sh -c '{swap}' >/dev/null 2>&1 & sleep 0.1")
        await manager.wait_clean()
        assert (outside / "app.py").read_text() == "mine\n"
        assert sorted(os.listdir(outside)) == ["app.py"]
        assert os.stat(outside / "app.py").st_uid == 0
    await assert_clean(manager, place)


@here_and_there
async def test_records_and_trees_have_the_owners_they_should(manager: PoolManager, place: Path) -> None:
    await make_pool(manager, place)
    slot = place / "pools/web/slots/slot1"
    status = os.stat(slot)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, private_group(f"{slot}/tree"), 0o710)
    assert stat.S_IMODE(os.stat(slot / "pristine").st_mode) == 0o700
    if (place / "pools/locks").exists():  # they are where the manager is
        assert stat.S_IMODE(os.stat(place / "pools/locks").st_mode) == 0o700
    assert os.stat(slot / "tree/.git/index").st_uid == pwd.getpwnam(USER).pw_uid


@here_and_there
async def test_a_user_that_cannot_be_is_refused_before_anything_is_made(manager: PoolManager, place: Path) -> None:
    for name, words in [("no-such-user", "there is no user"), ("root", "ordinary")]:
        with pytest.raises(ConfigError, match=words):
            await manager.create_pool("web", str(place / "origin.git"), run_as=name)
    assert await manager.list_pools() == []
    (place / "closed").mkdir(mode=0o700)
    async with PoolManager(PoolConfig(workspaces_dir=place / "closed/pools")) as closed:
        with pytest.raises(ConfigError, match=r"cannot be entered by 'nobody'.*chmod o\+x"):
            await closed.create_pool("web", str(place / "origin.git"), run_as=USER)


async def test_an_ordinary_manager_is_refused(place: Path) -> None:
    """The manager itself runs as `nobody` here."""
    program = (
        "import asyncio, sys\n"
        "from repopool_async import PoolManager, PoolConfig, ConfigError\n"
        "async def main():\n"
        "    async with PoolManager(PoolConfig(workspaces_dir=sys.argv[1] + '/theirs')) as manager:\n"
        "        try:\n"
        "            await manager.create_pool('web', sys.argv[1] + '/origin.git', run_as='daemon')\n"
        "        except ConfigError as error:\n"
        "            print(error)\n"
        "asyncio.run(main())\n"
    )
    (place / "theirs").mkdir()
    os.chown(place / "theirs", pwd.getpwnam(USER).pw_uid, pwd.getpwnam(USER).pw_gid)
    prefix = start_as(look_here(USER), [])
    path = os.pathsep.join(entry for entry in sys.path if entry)

    async def run(code: str) -> "subprocess.CompletedProcess[str]":
        return await asyncio.to_thread(
            subprocess.run,
            [*prefix, sys.executable, "-c", code, str(place)],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": path, "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
        )

    if (await run("import attrs, repopool_async")).returncode != 0:
        pytest.skip(f"{USER} cannot read this Python or this checkout")
    done = await run(program)
    assert "only root can run lessees as 'daemon'" in done.stdout, done


@here_and_there
async def test_python_does_where_setpriv_is_missing(
    manager: PoolManager, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repopool_async._users.SYSTEM_PATH", "/nowhere")
    await make_pool(manager, place)
    async with manager.lease("web") as slot:
        assert await shell(slot, "id -un") == USER
        assert private_group(str(slot.path)) in {int(group) for group in (await shell(slot, "id -G")).split()}
        assert "CapEff:\t0000000000000000" in await shell(slot, "cat /proc/self/status")
        assert await is_refused(slot, f"touch {slot.path.parent}/planted")


@here
async def test_the_user_is_for_ever(manager: PoolManager, place: Path) -> None:
    await make_pool(manager, place)
    with pytest.raises(ConfigError, match="run_as is nobody and stays so"):
        await manager.create_pool("web", str(place / "origin.git"))


@here_and_there
async def test_work_that_was_not_pushed_is_saved_and_brought_back_as_the_users(
    manager: PoolManager, place: Path
) -> None:
    await make_pool(manager, place)
    pool = await manager.get_pool("web")
    slot = await manager.allocate_slot("web")
    assert slot is not None
    await slot.run(
        "sh", "-c", "echo x >one; git add one; git commit -qm one; echo y >>README.md; echo z >new", env=IDENTITY
    )
    commit = await slot.get_current_commit()
    await pool.watch.force_unlock(slot.slot_id)
    await manager.wait_clean()
    (record,) = await manager.list_salvage()
    async with manager.lease("web") as other:
        restored = await manager.restore_salvage(record.salvage_id, other)
        assert restored.is_checked_out
        assert await other.get_current_commit() == commit
        assert await shell(other, "git status --porcelain") == "M README.md\n?? new"
        owners = {os.lstat(path).st_uid for path in [other.path, *other.path.rglob("*")]}
        assert owners == {pwd.getpwnam(USER).pw_uid}
    await assert_clean(manager, place)
