import asyncio
import multiprocessing
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from repopool_async import _removal
from repopool_async._process import run_process
from repopool_async.exceptions import FencedError
from repopool_async.hosts import _entries, _fence, _tree
from repopool_async.hosts._scripts import fence_key, library, padded
from repopool_async.hosts.base import (
    Host,
)
from repopool_async.hosts.local import LocalHost
from tests.hosts.daemons import ENV, FOREVER, Daemons

NOBODY = 65534


@pytest.fixture
def host() -> Host:
    return LocalHost()


def as_nobody(work: Callable[[], None]) -> None:
    """Run in a forked child without the rights of root, to whom no mode forbids anything."""

    def run() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.fixture
def nobodys_directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="repopool-test-"))  # pytest's own are closed to others
    if os.getuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    yield path
    _removal.remove_tree(str(path))


def names_in(directory: str | Path) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


def make_deep(root: Path, depth: int, name: str) -> None:
    """Make a chain of directories whose path no system call would take."""
    descriptor = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=descriptor)
        below = os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)


class TestIdentity:
    def test_is_made_without_a_loop_and_named(self) -> None:
        assert LocalHost().id == "local"
        assert LocalHost("builder", max_processes=3).id == "builder"
        assert repr(LocalHost("builder", max_processes=3)) == "LocalHost('builder', max_processes=3)"


class TestCommands:
    async def test_only_so_many_run_at_once(self, tmp_path: Path) -> None:
        host = LocalHost(max_processes=2)
        script = 'mkdir "$1" && ls | wc -l && sleep 0.05 && rmdir "$1"'
        runs = [host.run(["sh", "-c", script, "sh", str(i)], env=ENV, cwd=str(tmp_path)) for i in range(8)]
        seen = [int(result.text) for result in await asyncio.gather(*runs)]
        assert max(seen) == 2

    async def test_a_cancelled_waiter_gives_its_place_to_the_next(self) -> None:
        host = LocalHost(max_processes=1)
        is_running = asyncio.Event()
        first = asyncio.create_task(
            host.run(["sh", "-c", f"echo; sleep {FOREVER}"], env=ENV, on_output=lambda *_: is_running.set())
        )
        await is_running.wait()
        second, third = (asyncio.create_task(host.run(["true"], env=ENV)) for _ in range(2))
        await asyncio.sleep(0)
        second.cancel()
        first.cancel()
        await asyncio.wait([first, second])
        assert (await third).exit_code == 0

    async def test_open_processes_do_not_count(self) -> None:
        host = LocalHost(max_processes=1)
        async with host.open_process(["cat"], env=ENV, stdin=True) as process:
            assert (await host.run(["true"], env=ENV)).exit_code == 0
            await process.write(b"x")
            assert await process.read() == b"x"

    def test_one_host_serves_one_loop_after_another(self) -> None:
        host = LocalHost(max_processes=1)

        async def work() -> list[int]:
            return [result.exit_code for result in await asyncio.gather(*(host.run(["true"], env=ENV) for _ in "ab"))]

        assert [asyncio.run(work()) for _ in range(2)] == [[0, 0], [0, 0]]


class TestDepth:
    async def test_depth_and_length_of_paths_do_not_matter(self, host: Host, tree: Path, trash: str) -> None:
        make_deep(tree, 3000, "d" * 40)
        found = await host.inspect_tree(str(tree), since_ns=None)
        assert found.entries == 3001
        assert max(map(len, found.changed_directories)) < 5000
        name = "/".join(["d" * 40] * 1000)
        assert await host.remove_entries(str(tree), [f"{name}/bottom", name], trash=trash) == 1
        await host.remove_tree(trash)
        await host.remove_tree(str(tree))
        assert not tree.exists()

    async def test_a_very_deep_tree_of_short_names(self, host: Host, tree: Path) -> None:
        make_deep(tree, 5000, "d")
        found = await host.inspect_tree(str(tree), since_ns=None)
        assert found.entries == 5001
        await host.remove_tree(str(tree))


class TestInspection:
    def test_closed_directories_are_opened_up(self, nobodys_directory: Path) -> None:
        def work() -> None:
            os.umask(0o022)
            for name in ("none/in/side", "read", "also/read"):
                (nobodys_directory / name).mkdir(parents=True)
                (nobodys_directory / name / "file").touch()
            for name, mode in {"also/read": 0o555, "read": 0o4, "none/in": 0o2000, "none": 0o70, ".": 0}.items():
                (nobodys_directory / name).chmod(mode)
            found = _tree.inspect_tree(str(nobodys_directory), since_ns=2**62)
            assert sorted(found.unlocked) == [".", "also/read", "none", "none/in", "read"]
            assert found.entries == 9
            assert stat.S_IMODE((nobodys_directory / "read").stat().st_mode) == 0o704
            assert _tree.inspect_tree(str(nobodys_directory), since_ns=2**62).unlocked == ()

        as_nobody(work)

    @pytest.mark.skipif(os.getuid() == 0 or os.getuid() == NOBODY, reason="not with this user")
    def test_closed_directories_of_the_present_user(self, tree: Path) -> None:
        (tree / "closed").mkdir(mode=0)
        assert _tree.inspect_tree(str(tree), None).unlocked == ("closed",)


class TestRemovingEntries:
    def test_closed_directories_do_not_hinder(self, nobodys_directory: Path) -> None:
        def work() -> None:
            tree = nobodys_directory / "tree"
            for name in ("a/closed/in", "b"):
                (tree / name).mkdir(parents=True)
                (tree / name / "file").touch()
            for name, mode in {"a/closed": 0, "a": 0o500, "b": 0o500, ".": 0o500}.items():
                (tree / name).chmod(mode)
            trash = str(nobodys_directory / "trash")
            assert _entries.remove_entries(str(tree), ["a/closed", "b/file", "b"], trash) == 3
            assert names_in(tree) == ["a"]
            _removal.remove_tree(trash)
            _removal.remove_tree(str(tree))
            assert names_in(nobodys_directory) == []

        as_nobody(work)


class TestEndingProcesses:
    async def test_the_caller_is_spared(self, host: Host, daemons: Daemons, tree: Path) -> None:
        code = (
            "import asyncio, sys\n"
            "from repopool_async.hosts.local import LocalHost\n"
            "ended = asyncio.run(LocalHost().end_processes(mark=sys.argv[1], tree=sys.argv[2]))\n"
            "print(ended.killed)\n"
        )
        env = {**ENV, daemons.name: "lease", "PYTHONPATH": os.pathsep.join(sys.path)}
        result = await host.run([sys.executable, "-c", code, daemons.mark, str(tree)], env=env)
        assert result.stdout == b"()\n"


class TestBystanders:
    async def test_this_process_counts_when_it_holds_a_file_of_the_tree(self, host: Host, tree: Path) -> None:
        with (tree / "file").open("w"):
            ended = await host.end_processes(mark="REPOPOOL_TEST=none", tree=str(tree))
            assert [entry.split()[0] for entry in ended.bystanders] == [str(os.getpid())]
        assert (await host.end_processes(mark="REPOPOOL_TEST=none", tree=str(tree))).bystanders == ()


async def test_much_that_is_not_urgent_is_deleted_too_whatever_its_modes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "shut").mkdir(parents=True)
    for number in range(2000):
        (tree / f"shut/{number}").touch()
    (tree / "link").symlink_to(tmp_path)
    (tree / "shut").chmod(0)

    assert _removal.is_large(str(tree)) == (os.geteuid() == 0)
    await LocalHost().remove_tree(str(tree), is_urgent=False)

    assert list(tmp_path.iterdir()) == []


# Leaving a fence while somebody else takes the slot over


async def test_who_is_overtaken_while_it_leaves_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slot, host = str(tmp_path), LocalHost()
    await host.enter(slot, 1, None, kills=False)
    end = _fence.kill_registered

    def overtaken(slot_directory: str, last: int) -> list[int]:
        _fence.enter("local", slot, 2, None)
        return end(slot_directory, last)

    monkeypatch.setattr(_fence, "kill_registered", overtaken)
    with pytest.raises(FencedError) as caught:
        await host.leave(slot, 1)
    assert caught.value.top == 2
    assert _fence.top_of(slot) == padded(2)


async def test_who_is_overtaken_while_it_leaves_another_host_is_told(tmp_path: Path) -> None:
    script = library("fence") + b'kill_until() { mkdir "$1/fence/$next"; }\nleave "$@"'
    argv = ["sh", "-c", script.decode(), "sh", str(tmp_path), padded(1), fence_key(str(tmp_path))]

    done = await run_process(argv, env={"PATH": os.environ["PATH"], "next": padded(2)}, cwd="/")

    assert (done.exit_code, done.stdout) == (99, padded(2).encode())
