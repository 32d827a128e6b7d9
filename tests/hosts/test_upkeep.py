"""The pool's own work on a slot of a host far away: refused once the slot was taken over, ended by whoever takes it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from repopool_async._identity import process_start_time
from repopool_async.exceptions import FencedError
from repopool_async.hosts.base import Command, Guard, Host, RemoveFile, Rename, WriteFile
from repopool_async.hosts.local import LocalHost
from repopool_async.hosts.ssh import SshHost
from repopool_async.hosts.upkeep import upkeep
from tests.hosts.conftest import reach
from tests.hosts.daemons import ENV, FOREVER, until


@pytest.fixture(params=["asyncssh", "openssh"])
async def host(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SshHost]:
    async with reach(request.getfixturevalue(f"{request.param}_server"), tmp_path) as remote:
        yield remote


@pytest.fixture
def slot(tmp_path: Path) -> str:
    path = tmp_path / "it's slot1"
    (path / "tree").mkdir(parents=True)
    return str(path)


async def test_work_is_done_under_the_present_token_and_after_it_was_left(host: SshHost, slot: str) -> None:
    await host.enter(slot, 3, None)
    with upkeep(Guard(slot, 3)):
        await host.apply([WriteFile(f"{slot}/tree/a", b"a")])
        await host.leave(slot, 3)
        await host.apply([WriteFile(f"{slot}/tree/b", b"b")])
        assert (await host.run(["ls", f"{slot}/tree"], env=ENV)).stdout == b"a\nb\n"
        assert (await host.run(["cat"], env=ENV, cwd=f"{slot}/tree", input=b"in")).stdout == b"in"
        done = await host.batch([Command(("ls", "tree"), env=ENV, cwd=slot), Command(("pwd",), env=ENV, cwd=slot)])
        assert [one.stdout for one in done] == [b"a\nb\n", slot.encode() + b"\n"]
        with pytest.raises(FileNotFoundError):
            await host.apply([RemoveFile(f"{slot}/tree/a"), WriteFile(f"{slot}/none/a", b"")])
    assert Path(slot, "tree/b").read_bytes() == b"b"
    assert not Path(slot, "tree/a").exists()


async def test_finished_steps_leave_nothing_registered(host: SshHost, slot: str) -> None:
    await host.enter(slot, 3, None)
    with upkeep(Guard(slot, 3)):
        await host.apply([WriteFile(f"{slot}/tree/a", b"a")])
        with pytest.raises(FileNotFoundError):
            await host.apply([WriteFile(f"{slot}/none/a", b"")])
        await host.run(["true"], env=ENV, cwd=slot)
    await host.leave(slot, 3)  # a command's own entry stays until then
    assert list(Path(slot, "run").iterdir()) == []


@pytest.mark.parametrize("has_left", [False, True])
async def test_work_is_refused_once_a_higher_token_has_come(host: SshHost, slot: str, has_left: bool) -> None:
    await host.enter(slot, 3, None)
    if has_left:
        await host.leave(slot, 4)
    else:
        await host.enter(slot, 4, None)
    with upkeep(Guard(slot, 3)):
        for work in (
            host.apply([WriteFile(f"{slot}/tree/a", b"a")]),
            host.run(["touch", "a"], env=ENV, cwd=f"{slot}/tree"),
            host.run(["tee", f"{slot}/tree/a"], env=ENV, input=b"a"),
            host.run(["sh", "-c", 'touch "$WHERE/a"'], env={**ENV, "WHERE": f"{slot}/tree"}),
            host.batch([Command(("touch", "a"), env=ENV, cwd=f"{slot}/tree")]),
            host.list_directory(f"{slot}/tree"),
            host.inspect_tree(f"{slot}/tree", since_ns=0),
            host.remove_entries(f"{slot}/tree", ["a"], trash=f"{slot}/trash"),
        ):
            with pytest.raises(FencedError) as raised:
                await work
            assert (raised.value.token, raised.value.top) == (3, 4)
    assert list(Path(slot, "tree").iterdir()) == []
    assert list(Path(slot, "run").iterdir()) == []


@pytest.mark.parametrize("has_left", [False, True])
async def test_work_is_refused_once_the_host_was_started_anew(host: SshHost, slot: str, has_left: bool) -> None:
    """What a crash of the host lost may have been a higher token's name."""
    await host.enter(slot, 3, None)
    if has_left:
        await host.leave(slot, 3)
    if has_left:
        (left,) = Path(slot, "fence").glob("*~left.*")
        left.rename(left.with_name(f"{3:020d}~left.another-boot"))
    Path(slot, "fence", f"{3:020d}", "boot").write_text("another-boot\n")
    with upkeep(Guard(slot, 3)):
        with pytest.raises(FencedError):
            await host.apply([WriteFile(f"{slot}/tree/a", b"a")])
        with pytest.raises(FencedError):
            await host.run(["touch", "a"], env=ENV, cwd=f"{slot}/tree")
    assert list(Path(slot, "tree").iterdir()) == []


async def test_work_is_refused_where_the_slot_is_gone(host: SshHost, slot: str) -> None:
    with upkeep(Guard(slot, 3)), pytest.raises(FencedError):
        await host.apply([WriteFile(f"{slot}/tree/a", b"a")])
    assert not Path(slot, "run").exists()


async def test_whoever_takes_the_slot_over_ends_the_work(host: SshHost, slot: str) -> None:
    await host.enter(slot, 3, None)
    await host.leave(slot, 3)
    script = f"echo $$ > pid; exec sleep {FOREVER}"

    async def work() -> None:
        with upkeep(Guard(slot, 3)):
            await host.run(["sh", "-c", script], env=ENV, cwd=slot)

    working = asyncio.create_task(work())
    pid_file = Path(slot, "pid")
    await until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
    pid = int(pid_file.read_text())
    await host.leave(slot, 4)
    assert process_start_time(pid) is None
    await working


async def test_work_elsewhere_is_nobodys(host: SshHost, slot: str, tmp_path: Path) -> None:
    await host.enter(slot, 4, None)
    with upkeep(Guard(slot, 3)):
        await host.apply([WriteFile(f"{tmp_path}/mirror", b"a")])
        assert (await host.run(["cat", f"{tmp_path}/mirror"], env=ENV)).stdout == b"a"


async def test_fences_themselves_are_moved_freely(host: SshHost, slot: str) -> None:
    await host.enter(slot, 4, None)
    with upkeep(Guard(slot, 3)):
        await host.enter(slot, 5, None)
        await host.leave(slot, 5)


async def test_this_machine_refuses_too(slot: str, tmp_path: Path) -> None:
    here: Host = LocalHost(sessions_directory=str(tmp_path / "sessions"))
    await here.enter(slot, 3, None)
    await here.leave(slot, 3)
    with upkeep(Guard(slot, 3)):
        await here.apply([WriteFile(f"{slot}/tree/a", b"a"), Rename(f"{slot}/tree/a", f"{slot}/tree/b")])
        assert (await here.run(["cat", "b"], env=ENV, cwd=f"{slot}/tree")).stdout == b"a"
        await here.enter(slot, 4, None)
        for work in (
            here.apply([Rename(f"{slot}/tree/b", f"{tmp_path}/b")]),
            here.run(["rm", "b"], env=ENV, cwd=f"{slot}/tree"),
            here.batch([Command(("rm", "b"), env=ENV, cwd=f"{slot}/tree")]),
            here.remove_entries(f"{slot}/tree", ["b"], trash=f"{tmp_path}/trash"),
            here.remove_tree(f"{slot}/tree"),
            here.move_directories(f"{slot}/tree", f"{tmp_path}/beside", ["b"]),
        ):
            with pytest.raises(FencedError, match="token 4 has entered since"):
                await work
        await here.apply([WriteFile(f"{tmp_path}/mirror", b"a")])
    assert Path(slot, "tree/b").read_bytes() == b"a"


async def test_this_machine_refuses_what_was_entered_before_another_boot(slot: str, tmp_path: Path) -> None:
    here: Host = LocalHost(sessions_directory=str(tmp_path / "sessions"))
    await here.enter(slot, 3, None)
    Path(slot, "fence", f"{3:020d}", "boot").write_text("another-boot\n")
    with upkeep(Guard(slot, 3)), pytest.raises(FencedError):
        await here.apply([WriteFile(f"{slot}/tree/a", b"a")])
