"""A pool on a host over SSH, through asyncssh's own server: the same promises, and how many executions a lease is."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from repopool_async import (
    CleanupError,
    CommandFailedError,
    FencedError,
    Guard,
    HostSpec,
    LeasedSlot,
    LeaseLostError,
    PoolConfig,
    PoolManager,
    RepoPool,
    Slot,
    SlotElsewhereError,
    SlotState,
    SshHost,
    host_registry,
)
from repopool_async.hosts._proc import read
from repopool_async.hosts._scripts import fence_mark
from repopool_async.hosts._ssh_connection import SshOptions
from tests.hosts import sshd
from tests.hosts.sshd import Server


@pytest.fixture(scope="module", params=["asyncssh"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with sshd.serving(request.param, tmp_path_factory.mktemp("keys")) as server:
        yield server


on_both = pytest.mark.parametrize("server", ["asyncssh", "openssh"], indirect=True)


@pytest.fixture
async def box(server: Server, tmp_path: Path) -> AsyncIterator[SshHost]:
    options = SshOptions(config=(str(server.config),))
    async with SshHost("box", options=options, sessions_directory=str(tmp_path / "sessions")) as host:
        yield host


@pytest.fixture
async def manager(tmp_path: Path, box: SshHost) -> AsyncIterator[PoolManager]:
    spec = HostSpec("box", workspaces_dir=str(tmp_path / "there"), host=box)
    async with PoolManager(PoolConfig(tmp_path / "here", janitor_interval=3600), hosts=[spec]) as manager:
        yield manager


async def test_a_lease_on_another_machine(
    manager: PoolManager, box: SshHost, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANAGERS_SECRET", "hidden")
    leave_alone(manager, monkeypatch)
    pool = await manager.create_pool("web", str(origin), num_slots=1, hosts=["box"], fetch_max_age=3600)
    async with pool.lease(new_branch="agent/x") as slot:
        assert (slot.host_id, str(slot.path)) == ("box", str(tmp_path / "there/web/slots/slot1/tree"))
        assert (await slot.run("git", "rev-parse", "HEAD")).text.strip() == slot.commit
        assert await slot.get_current_branch() == "agent/x"
        assert "MANAGERS_SECRET" not in (await slot.run("env")).text
        with pytest.raises(SlotElsewhereError, match="a path on host box"):
            os.fspath(slot)
        with pytest.raises(CommandFailedError):
            await slot.run("false")
        await slot.run("sh", "-c", "echo dirt >untracked; rm README.md")
    await manager.wait_clean()
    async with pool.lease() as slot:
        assert (await slot.run("git", "status", "--porcelain", "--ignored")).text == ""
    await manager.wait_clean()
    before = box.exec_count
    async with pool.lease():
        assert box.exec_count - before == 2
    await manager.delete_pool("web")
    assert os.listdir(tmp_path / "there") == [".managers"]


_CHANGES = {
    "nothing": ("true", 2),
    "files changed, removed and made": ("echo x >>README.md; rm src/app.py; mkdir -p new/deep; echo >new/deep/file", 3),
    "something committed": ("echo x >>README.md; git -c user.name=a -c user.email=a@b commit -qam x", 3),
    "odd things": ("mkfifo src/fifo; git init -q nested; chmod 700 src; ln README.md again; ln -s / root", 3),
}


def leave_alone(manager: PoolManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing else be asked of the host now and then, which would be counted as well."""
    monkeypatch.setattr(manager._janitor, "note_trash", lambda: None)
    monkeypatch.setattr(host_registry, "_PATIENCE_SECONDS", 3600.0)


# OpenSSH starts a session's processes for each of them: there the worst that there is to clean stands for all.
@pytest.mark.parametrize(
    ("server", "change"),
    [*(("asyncssh", change) for change in _CHANGES), ("openssh", "odd things")],
    indirect=["server"],
)
async def test_how_many_executions_a_cleaning_is(
    manager: PoolManager, box: SshHost, origin: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """What ends the lease and looks at the tree is one, what only git can tell is another, the rest is the last."""
    script, executions = _CHANGES[change]
    leave_alone(manager, monkeypatch)
    pool = await manager.create_pool("web", str(origin), num_slots=1, hosts=["box"], fetch_max_age=3600)
    assert await executions_of_a_cleaning(manager, pool, box, script) == executions
    async with pool.lease() as slot:
        assert (await slot.run("git", "status", "--porcelain", "--ignored")).text == ""
        assert (await slot.run("git", "rev-parse", "HEAD", "origin/main")).text.split() == [slot.commit] * 2
        assert (await slot.run("git", "ls-files", "--stage")).text.count("\n") > 1
        assert (await slot.run("git", "fsck", "--strict")).exit_code == 0


@pytest.mark.parametrize("change", _CHANGES)
async def test_how_many_executions_making_a_tree_anew_is(
    manager: PoolManager, box: SshHost, origin: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """What ends the lease is one, a tree beside the slot's another, and the last puts it in its place."""
    leave_alone(manager, monkeypatch)
    options = {"hosts": ["box"], "fetch_max_age": 3600, "rebuild_always": True}
    pool = await manager.create_pool("web", str(origin), num_slots=1, **options)
    assert await executions_of_a_cleaning(manager, pool, box, _CHANGES[change][0]) == 3
    async with pool.lease() as slot:
        assert (await slot.run("git", "status", "--porcelain", "--ignored")).text == ""
        assert (await slot.run("git", "fsck", "--strict")).exit_code == 0


async def executions_of_a_cleaning(manager: PoolManager, pool: RepoPool, box: SshHost, script: str) -> int:
    """Return how many the second of two cleanings was: the first asks what is known of the commit afterwards."""
    counted = 0
    for _ in range(2):
        async with pool.lease() as slot:
            await slot.run("sh", "-c", script)
            before = box.exec_count
        await manager.wait_clean()
        counted = box.exec_count - before
    return counted


async def test_what_a_lease_left_running_ends_and_its_token_is_refused(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=1, hosts=["box"])
    slot = await manager.allocate_slot("web")
    assert slot is not None
    async with slot.open_process("sh", "-c", "echo $$; exec sleep 300") as process:
        pid = int(await process.read())
        await pool.watch.force_unlock(slot.slot_id)
        await manager.wait_clean()
        assert await process.wait() != 0
        assert not os.path.exists(f"/proc/{pid}")
    assert slot.lost.is_set()
    with pytest.raises(FencedError):
        await slot.run("true")
    with pytest.raises(LeaseLostError):
        await manager.release_slot(slot)
    async with pool.lease() as other:
        assert (await other.run("true")).exit_code == 0


async def test_a_host_is_reached_as_the_users_ssh_configuration_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/config").write_text(server.config.read_text())
    monkeypatch.setenv("HOME", str(tmp_path))
    hosts = [HostSpec("box", workspaces_dir=str(tmp_path)), HostSpec("other", address="nowhere", workspaces_dir="/x")]
    async with PoolManager(PoolConfig(tmp_path / "here"), hosts=hosts) as manager:
        assert await manager._shared.hosts.probe("box") is None
        assert "nowhere" in (await manager._shared.hosts.probe("other") or "")


async def test_a_cleaning_goes_no_further_once_its_slot_was_taken_over(
    box: SshHost, origin: Path, tmp_path: Path
) -> None:
    """As where this manager was paused amid it, and another found it dead and cleaned the slot itself."""

    taken_over: list[str] = []

    async def take_over(slot: Slot) -> None:
        if slot.allocation_count == 1 and not taken_over:
            taken_over.append(slot.slot_id)
            await box.leave(slot.path.rpartition("/")[0], slot.token + 5)

    spec = HostSpec("box", workspaces_dir=str(tmp_path / "there"), host=box)
    config = PoolConfig(tmp_path / "here", janitor_interval=3600)
    async with PoolManager(config, hosts=[spec], reset=take_over) as manager:
        pool = await manager.create_pool("web", str(origin), num_slots=1, hosts=["box"])
        async with pool.lease():
            pass
        await manager.wait_clean()
        status = await manager.get_slot_status("workspace-web-slot1")
        assert (status.state, status.error) == (SlotState.CLEANING, None)
        async with pool.lease() as slot:  # recovers it: nobody else is at it really
            assert slot.token > 6


@pytest.mark.parametrize(
    ("server", "left_on", "brought_to"),
    [("asyncssh", "box", "local"), ("asyncssh", "local", "box"), ("asyncssh", "box", "box"), ("openssh", "box", "box")],
    indirect=["server"],
)
async def test_saved_work_is_brought_back_on_whichever_host(
    manager: PoolManager, origin: Path, left_on: str, brought_to: str
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["box", "local"], fetch_max_age=3600)
    slots = {slot.host_id: slot for slot in [await leased(manager), await leased(manager)]}
    script = (
        "git config user.name a; git config user.email a@b; echo stashed >README.md; git stash push -qm kept;"
        "echo x >committed; git add -A; git commit -qm one; git branch side; echo changed >>src/app.py; echo >untracked"
    )
    await slots[left_on].run("sh", "-c", script)
    head = (await slots[left_on].run("git", "rev-parse", "HEAD")).text
    await pool.watch.force_unlock(slots[left_on].slot_id)
    await manager.wait_clean()
    (record,) = await manager.list_salvage()
    del slots[left_on]
    slot = slots.get(brought_to) or await leased(manager)
    restored = await manager.restore_salvage(record.salvage_id, slot)
    assert restored.is_checked_out
    again = await manager.restore_salvage(record.salvage_id, slot)
    assert (again.branch, again.is_checked_out) == (restored.branch, False)
    assert (await slot.run("git", "rev-parse", "HEAD")).text == head
    assert (await slot.run("git", "status", "--porcelain")).text == " M src/app.py\n?? untracked\n"
    assert (await slot.run("git", "show", "stash@{0}:README.md")).text == "stashed\n"
    assert (await slot.run("git", "fsck", "--connectivity-only")).exit_code == 0
    for one in {one.slot_id: one for one in (*slots.values(), slot)}.values():
        await manager.release_slot(one)


async def leased(manager: PoolManager) -> LeasedSlot:
    slot = await manager.allocate_slot("web", timeout=30)
    assert slot is not None
    return slot


@on_both
async def test_kept_paths_stay_on_another_machine_and_are_set_up_there(
    manager: PoolManager, box: SshHost, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_alone(manager, monkeypatch)
    monkeypatch.setenv("MANAGERS_SECRET", "hidden")
    setup = ["sh", "-c", "mkdir -p web/cache; echo made >web/cache/lib; echo ${MANAGERS_SECRET-none} >web/cache/secret"]
    pool = await manager.create_pool(
        "web", str(origin), num_slots=1, hosts=["box"], keep=["web/cache", "build"], setup=setup, fetch_max_age=3600
    )
    tree = tmp_path / "there/web/slots/slot1/tree"
    async with pool.lease() as slot:
        assert (tree / "web/cache/lib").read_text() == "made\n"
        assert (tree / "web/cache/secret").read_text() == "none\n"
        dirt = "mkdir build; echo x >>README.md; echo >web/new; ln -s / x"
        await slot.run("sh", "-c", f"echo more >>web/cache/lib; {dirt}")
    await manager.wait_clean()
    async with pool.lease() as slot:
        assert (tree / "web/cache/lib").read_text() == "made\nmore\n"
        assert (await slot.run("git", "status", "--porcelain")).text == "?? web/\n"
        assert sorted(os.listdir(tree / "web")) == ["cache"]
        inode = (tree / "web/cache").stat().st_ino
        await slot.run("sh", "-c", "echo again >>web/cache/lib; rm -r build; ln -s /tmp build")
    await manager.wait_clean()
    assert (await manager.check("web")) == {}
    async with pool.lease() as slot:
        assert (tree / "web/cache/lib").read_text() == "made\nmore\nagain\n"
        assert (tree / "web/cache").stat().st_ino == inode
        assert not (tree / "build").is_symlink()
        before = box.exec_count
    await manager.wait_clean()
    assert box.exec_count - before == 4  # two of them ask whether the setup is due
    assert (await manager.get_cleanup_log("workspace-web-slot1"))[-1].steps == ("untouched",)


async def stray(box: SshHost, directory: str, token: int, scratch: Path) -> int:
    """Have a process run in a slot under a token of which no record tells; returns its pid."""
    await box.enter(directory, token, None)
    guard = Guard(directory, token)
    script = f"setsid sleep 300 >/dev/null 2>&1 & echo $! >{scratch}/pid"
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", script), env={**os.environ, **dict([fence_mark(guard).split("=")])}
    )
    await process.wait()
    return int((scratch / "pid").read_text())


def is_running(pid: int) -> bool:
    return b"sleep" in read(f"/proc/{pid}/cmdline")


async def test_dropping_and_removing_ends_who_the_records_do_not_know(
    box: SshHost, origin: Path, tmp_path: Path
) -> None:
    def reject(slot: Slot) -> None:
        if slot.allocation_count:
            raise CleanupError("not to my liking")

    spec = HostSpec("box", workspaces_dir=str(tmp_path / "there"), host=box)
    config = PoolConfig(tmp_path / "here", janitor_interval=3600)
    async with PoolManager(config, hosts=[spec], reset=reject) as manager:
        pool = await manager.create_pool("web", str(origin), num_slots=1, hosts=["box"])
        async with pool.lease() as slot:
            directory = str(slot.path.parent)
        await manager.wait_clean()
        pid = await stray(box, directory, 100, tmp_path)
        assert await pool.keeper.drop_quarantined_trees() == [], "what its unknown lessee left is not saved yet"
        assert not is_running(pid)
        assert sorted(os.listdir(directory)) == ["fence", "pristine", "run", "tree"]
        pid = await stray(box, directory, 200, tmp_path)
        await manager.remove_slot("workspace-web-slot1")
        assert not is_running(pid)
        assert not os.path.exists(directory)


async def test_a_check_goes_by_the_hosts_word(manager: PoolManager, box: SshHost, origin: Path, tmp_path: Path) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2, hosts=["box"], fetch_max_age=3600)
    async with pool.lease() as slot:
        slot_id, directory = slot.slot_id, str(slot.path.parent)
    await manager.wait_clean()
    assert await manager.check("web") == {}  # the other slot has no fence yet
    pid = await stray(box, directory, 100, tmp_path)
    problems = await manager.check("web")
    assert list(problems) == [slot_id]
    assert "token 100 has entered since" in problems[slot_id][0]
    assert not is_running(pid)
    assert await manager.check("web") == {}
