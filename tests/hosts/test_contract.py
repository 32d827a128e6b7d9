"""What every host does, wherever it is: the local one, asyncssh's own server, a real sshd."""

import asyncio
import contextlib
import errno
import mmap
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from repopool_async._identity import process_start_time
from repopool_async.exceptions import CommandTimeoutError, FencedError
from repopool_async.hosts._proc import pids, read
from repopool_async.hosts.base import (
    Command,
    CopyFile,
    Discard,
    FileKind,
    FileStep,
    Guard,
    Host,
    Inode,
    MakeDirectory,
    RemoveFile,
    Rename,
    TreeInspection,
    WriteFile,
)
from repopool_async.hosts.local import LocalHost
from tests.hosts.daemons import ENV, FOREVER, Daemons, relay_in, until


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


class TestCommands:
    async def test_run(self, host: Host, tmp_path: Path) -> None:
        told: list[tuple[str, bytes]] = []
        result = await host.run(
            ["sh", "-c", "cat; pwd; exit 2"],
            env=ENV,
            cwd=str(tmp_path),
            input=b"input\n",
            on_output=lambda stream, data: told.append((stream, data)),
        )
        assert (result.exit_code, result.stdout) == (2, f"input\n{tmp_path}\n".encode())
        assert {stream for stream, _ in told} == {"stdout"}

    async def test_run_within_limits(self, host: Host) -> None:
        with pytest.raises(CommandTimeoutError):
            await host.run(["sleep", FOREVER], env=ENV, timeout=0.05)
        with pytest.raises(CommandTimeoutError):
            await host.run(["sleep", FOREVER], env=ENV, idle_timeout=0.05)
        result = await host.run(["printf", "12345"], env=ENV, stdout_limit=2)
        assert (result.stdout, result.is_truncated) == (b"45", True)

    async def test_batch_stops_at_the_first_failure(self, host: Host, tmp_path: Path) -> None:
        commands = [
            Command(("sh", "-c", "echo $WORD"), {**ENV, "WORD": "a"}),
            Command(("sh", "-c", "cat; exit 3"), ENV, input=b"b"),
            Command(("pwd",), ENV, cwd=str(tmp_path)),
        ]
        results = await host.batch(commands)
        assert [(result.exit_code, result.stdout) for result in results] == [(0, b"a\n"), (3, b"b")]
        results = await host.batch(commands, stop=False)
        assert [result.exit_code for result in results] == [0, 3, 0]
        assert results[2].text.strip() == str(tmp_path)

    async def test_batch_has_one_time_limit(self, host: Host) -> None:
        started = time.monotonic()
        with pytest.raises(CommandTimeoutError):
            await host.batch([Command(("sleep", "0.3"), ENV)] * 100, timeout=0.5)
        assert time.monotonic() - started < 10


class TestFileSteps:
    async def test_steps_are_done_in_order(self, host: Host, tmp_path: Path, trash: str) -> None:
        root = str(tmp_path)
        await host.apply(
            [
                MakeDirectory(f"{root}/a/b"),
                MakeDirectory(f"{root}/a/b"),
                WriteFile(f"{root}/a/b/file", b"data", mode=0o600, is_durable=True),
                CopyFile(f"{root}/a/b/file", f"{root}/copy"),
                CopyFile(f"{root}/absent", f"{root}/never", is_optional=True),
                Rename(f"{root}/a/b", f"{root}/moved"),
                MakeDirectory(f"{root}/gone/deep"),
                Discard(f"{root}/gone", trash),
                Discard(f"{root}/absent", trash),
                WriteFile(f"{root}/removed", b""),
                RemoveFile(f"{root}/removed"),
                RemoveFile(f"{root}/absent"),
                RemoveFile(f"{root}/copy/beneath/a/file"),
            ]
        )
        assert names_in(root) == ["a", "copy", "moved", "trash"]
        assert (tmp_path / "moved/file").read_bytes() == (tmp_path / "copy").read_bytes() == b"data"
        assert stat.S_IMODE((tmp_path / "moved/file").stat().st_mode) == 0o600
        assert (tmp_path / "copy").stat().st_mtime_ns == (tmp_path / "moved/file").stat().st_mtime_ns
        assert len(names_in(trash)) == 1

    @pytest.mark.parametrize(
        "step",
        [
            CopyFile("{root}/absent", "{root}/x"),
            CopyFile("{root}/file", "{root}/absent/x", is_optional=True),
            WriteFile("{root}/absent/x", b""),
            Rename("{root}/absent", "{root}/x"),
        ],
    )
    async def test_the_first_failure_ends_them(
        self, host: Host, tmp_path: Path, step: CopyFile | WriteFile | Rename
    ) -> None:
        (tmp_path / "file").touch()
        fields = {name: value for name in ("source", "target", "path") if (value := getattr(step, name, None))}
        placed = {name: value.format(root=tmp_path) for name, value in fields.items()}
        failing: FileStep
        match step:
            case WriteFile():
                failing = WriteFile(placed["path"], b"")
            case CopyFile():
                failing = CopyFile(placed["source"], placed["target"], is_optional=step.is_optional)
            case _:
                failing = Rename(placed["source"], placed["target"])
        steps = [MakeDirectory(f"{tmp_path}/before"), failing, MakeDirectory(f"{tmp_path}/after")]
        with pytest.raises(FileNotFoundError):
            await host.apply(steps)
        assert names_in(tmp_path) == ["before", "file"]

    async def test_reading(self, host: Host, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"12345")
        (tmp_path / "link").symlink_to("file")
        assert await host.read_bytes(f"{tmp_path}/file", limit=5) == b"12345"
        assert await host.read_bytes(f"{tmp_path}/absent", limit=5) is None
        (tmp_path / "dir").mkdir()
        for name, limit, expected in [("file", 4, errno.EFBIG), ("link", 5, errno.ELOOP), ("dir", 5, errno.EISDIR)]:
            with pytest.raises(OSError, match=name) as raised:
                await host.read_bytes(f"{tmp_path}/{name}", limit=limit)
            assert raised.value.errno == expected

    async def test_stat(self, host: Host, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"12345")
        (tmp_path / "file").chmod(0o4750)
        (tmp_path / "link").symlink_to("nowhere")
        os.mkfifo(tmp_path / "fifo")
        found = await host.stat(f"{tmp_path}/file")
        expected = os.lstat(tmp_path / "file")
        assert found is not None
        assert (found.kind, found.mode, found.size, found.links) == (FileKind.FILE, 0o4750, 5, 1)
        assert (found.device, found.inode) == (expected.st_dev, expected.st_ino)
        assert (found.mtime_ns, found.ctime_ns) == (expected.st_mtime_ns, expected.st_ctime_ns)
        kinds = [await host.stat(f"{tmp_path}/{name}") for name in ("link", "fifo", ".", "absent", "file/x")]
        assert [found and found.kind for found in kinds] == ["link", "special", "directory", None, None]

    async def test_listing(self, host: Host, tmp_path: Path) -> None:
        for name in ("b", "a", os.fsdecode(b"\xff")):
            (tmp_path / name).touch()
        assert await host.list_directory(str(tmp_path)) == ["a", "b", "\udcff"]
        assert await host.list_directory(f"{tmp_path}/absent") == []
        assert await host.list_directory(f"{tmp_path}/a") == []

    async def test_clock_is_the_file_systems(self, host: Host, tmp_path: Path) -> None:
        for _ in range(3):
            (tmp_path / "written").write_text("")
            last = (tmp_path / "written").stat().st_ctime_ns
            assert await host.file_system_clock_ns(str(tmp_path), moves_on=True) > last
            (tmp_path / "written").unlink()
        before = await host.file_system_clock_ns(str(tmp_path))
        (tmp_path / "file").touch()
        after = await host.file_system_clock_ns(str(tmp_path))
        assert before <= (tmp_path / "file").stat().st_ctime_ns <= after
        assert names_in(tmp_path) == ["file"]

    async def test_network_file_systems_are_told_apart(self, host: Host, tmp_path: Path) -> None:
        assert not await host.is_network_file_system(str(tmp_path / "not" / "yet"))


class TestInspection:
    async def test_everything_is_reported_without_a_date(self, host: Host, tree: Path) -> None:
        (tree / "sub/empty").mkdir(parents=True)
        (tree / "sub/file").write_text("text")
        (tree / "sub/file.hard").hardlink_to(tree / "sub/file")
        (tree / "link").symlink_to("/etc")
        os.mkfifo(tree / "fifo")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
            server.bind(str(tree / "socket"))
        found = await host.inspect_tree(str(tree), since_ns=None)
        assert found.entries == 7
        assert sorted(found.changed) == ["fifo", "link", "socket", "sub/file", "sub/file.hard"]
        assert sorted(found.changed_directories) == ["sub", "sub/empty"]
        assert sorted(found.special) == ["fifo", "socket"]
        assert sorted(found.multiply_linked) == ["sub/file", "sub/file.hard"]
        assert (found.repositories, found.unlocked, found.mounts) == ((), (), ())

    async def test_only_what_changed_since_is_reported(self, host: Host, tree: Path) -> None:
        for name in ("old", "touched", "moded", "renamed", "quiet/file", "busy/file", "busy/removed"):
            (tree / name).parent.mkdir(exist_ok=True)
            (tree / name).write_text("1")
        mark = await _next_tick(host, tree.parent)
        assert await host.inspect_tree(str(tree), since_ns=mark) == TreeInspection(entries=9)
        with (tree / "touched").open("r+") as file:
            file.write("2")
        os.utime(tree / "touched", (1, 1))
        (tree / "moded").chmod(0o755)
        (tree / "renamed").rename(tree / "new name")
        (tree / "busy/removed").unlink()
        found = await host.inspect_tree(str(tree), since_ns=mark)
        assert sorted(found.changed) == ["moded", "new name", "touched"]
        assert found.changed_directories == ("busy",)

    async def test_own_git_directory_is_left_out_and_planted_ones_are_not_entered(self, host: Host, tree: Path) -> None:
        for name in (".git", "planted/.git", "planted/deep/.git"):
            (tree / name / "hooks").mkdir(parents=True)
        (tree / "worktree").mkdir()
        (tree / "worktree/.git").write_text("gitdir: /elsewhere")
        found = await host.inspect_tree(str(tree), since_ns=None)
        assert sorted(found.repositories) == ["planted/.git", "planted/deep/.git", "worktree/.git"]
        assert found.changed == ()
        assert found.entries == 6

    async def test_names_of_any_bytes(self, host: Host, tree: Path) -> None:
        names = [os.fsdecode(name) for name in (b"\xff\xfe", b"new\nline", b"-rf", b"\xc3\xa4 '\"", b"\x01\x7f")]
        for name in names:
            (tree / name).mkdir()
            (tree / name / name).touch()
        found = await host.inspect_tree(str(tree), since_ns=None)
        assert sorted(found.changed) == sorted(f"{name}/{name}" for name in names)

    async def test_links_are_not_followed(self, host: Host, tree: Path, tmp_path: Path) -> None:
        (tmp_path / "outside/sub").mkdir(parents=True)
        (tmp_path / "outside").chmod(0o500)
        (tree / "link").symlink_to(tmp_path / "outside")
        (tree / "loop").symlink_to(".")
        found = await host.inspect_tree(str(tree), since_ns=None)
        assert found.entries == 2
        assert found.unlocked == ()
        assert stat.S_IMODE((tmp_path / "outside").stat().st_mode) == 0o500

    async def test_depth_and_length_of_paths_do_not_matter(self, host: Host, tree: Path) -> None:
        make_deep(tree, 300, "d" * 40)
        (tree / "beside").touch()
        found = await host.inspect_tree(str(tree), since_ns=None)
        assert found.entries == 302
        assert found.changed == ("beside",)
        assert max(map(len, found.changed_directories)) < 5000
        await host.remove_tree(str(tree))
        assert not tree.exists()

    async def test_what_is_too_deep_to_name_is_reported_as_the_last_directory_that_is_not(
        self, host: Host, tree: Path, trash: str
    ) -> None:
        make_deep(tree, 200, "d" * 40)
        mark = await _next_tick(host, tree.parent)
        found = await host.inspect_tree(str(tree), since_ns=mark)
        (name,) = found.changed_directories
        assert set(name.split("/")) == {"d" * 40}
        assert await host.remove_entries(str(tree), [name], trash=trash) == 1
        assert (await host.inspect_tree(str(tree), since_ns=2**62)).changed_directories == ()
        await host.remove_tree(trash)

    @pytest.mark.parametrize("kind", ["link", "file", "absent"])
    async def test_root_must_be_a_directory(self, host: Host, tree: Path, tmp_path: Path, kind: str) -> None:
        if kind == "link":
            (tmp_path / "root").symlink_to(tree)
        elif kind == "file":
            (tmp_path / "root").touch()
        with pytest.raises(FileNotFoundError if kind == "absent" else NotADirectoryError):
            await host.inspect_tree(str(tmp_path / "root"), since_ns=None)

    async def test_only_the_root_that_is_meant_is_looked_at(self, host: Host, tree: Path) -> None:
        (tree / "closed").mkdir(mode=0o500)
        meant = tree.stat()
        inspection = await host.inspect_tree(
            str(tree), since_ns=None, only=Inode(meant.st_dev, meant.st_ino), beside=str(tree)
        )
        assert inspection.changed_directories == ("closed",)
        (tree / "closed").chmod(0o500)
        with pytest.raises(OSError, match="tale") as caught:
            await host.inspect_tree(str(tree), since_ns=None, only=Inode(meant.st_dev, meant.st_ino + 1))
        assert caught.value.errno == errno.ESTALE
        assert stat.S_IMODE((tree / "closed").stat().st_mode) == 0o500

    async def test_entries_that_come_and_go_meanwhile_do_no_harm(self, host: Host, tree: Path, tmp_path: Path) -> None:
        for number in range(50):
            (tree / f"{number}/sub/sub").mkdir(parents=True)
        change = "rm -rf $i/sub; ln -s / $i/sub; rm $i/sub; mkdir -p $i/sub/sub"
        script = f"while :; do for i in 1 2 3 4 5 6 7 8 9; do {change}; done; done"
        async with host.open_process(["sh", "-c", script], env=ENV, cwd=str(tree)):
            for _ in range(10):
                found = await host.inspect_tree(str(tree), since_ns=None)
                assert all(not name.startswith("/") for name in found.changed)

    async def test_directories_that_are_not_as_new_ones_are_named(self, host: Host, tree: Path) -> None:
        for name in ("as/new", "closed", "marked", "open/to/all"):
            (tree / name).mkdir(parents=True)
        (tree / "closed").chmod(0o700)
        (tree / "open/to/all").chmod(0o1777)
        with contextlib.suppress(OSError):
            os.setxattr(tree / "marked", "user.repopool", b"x")
        expected = ["closed", *(["marked"] if os.listxattr(tree / "marked") else []), "open/to/all"]
        assert sorted((await host.inspect_tree(str(tree), since_ns=None)).irregular) == expected
        assert (await host.inspect_tree(str(tree), since_ns=2**62)).irregular == ()
        tree.chmod(0o700)
        assert (await host.inspect_tree(str(tree), since_ns=2**62)).irregular == (".",)
        assert names_in(tree.parent) == ["tree"]

    async def test_flags_of_the_file_system_are_told(self, host: Host, tree: Path, tmp_path: Path) -> None:
        (tree / "new\nline").mkdir()
        (tree / "flagged").mkdir()
        _flag(tree / "flagged")
        found = set((await host.inspect_tree(str(tree), since_ns=None)).irregular)
        assert found in ({"flagged"}, {"."}), "where it is not told which, it is said of the root"
        assert (await host.inspect_tree(str(tree), since_ns=2**62)).irregular == ()
        names = ["flagged", "new\nline"]
        assert await host.move_directories(str(tree), f"{tmp_path}/kept", names) == ("new\nline",)

    async def test_new_directories_are_what_they_are_beside_the_root(self, host: Host, tree: Path) -> None:
        tree.parent.chmod(0o2755)
        (tree / "unlike").mkdir()
        (tree / "alike").mkdir()
        for path in (tree, tree / "alike"):
            path.chmod(0o2755)
        assert (await host.inspect_tree(str(tree), since_ns=None)).irregular == ("unlike",)

    async def test_files_that_something_is_mounted_on_are_named(self, host: Host, tree: Path) -> None:
        (tree / "file").touch()
        with _mounted(["--bind", "/etc/hostname"], tree / "file"):
            assert (await host.inspect_tree(str(tree), since_ns=2**62)).mounts == ("file",)

    async def test_mounts_are_not_entered(self, host: Host, tree: Path, trash: str) -> None:
        (tree / "mounted").mkdir()
        (tree / "bound").mkdir()
        with _mounted(["-t", "tmpfs", "none"], tree / "mounted"), _mounted(["--bind", "/etc"], tree / "bound"):
            (tree / "mounted/file").touch()
            found = await host.inspect_tree(str(tree), since_ns=None)
            assert sorted(found.mounts) == ["bound", "mounted"]
            assert (found.entries, found.changed) == (2, ())
            assert await host.remove_entries(str(tree), ["mounted/file"], trash=trash) == 0
            with pytest.raises(OSError, match="mounted") as raised:
                await host.remove_tree(str(tree))
            assert raised.value.errno == errno.EBUSY
            assert (tree / "mounted/file").exists()
        assert Path("/etc/passwd").exists()


def _flag(path: Path) -> None:
    done = subprocess.run(["chattr", "+d", path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the file system keeps no flags: {done.stderr}")


@contextlib.contextmanager
def _mounted(arguments: list[str], target: Path) -> Iterator[None]:
    if os.spawnlp(os.P_WAIT, "sh", "sh", "-c", 'mount "$@" 2>/dev/null', "sh", *arguments, str(target)) != 0:
        pytest.skip("may not mount")
    try:
        yield
    finally:
        os.spawnlp(os.P_WAIT, "umount", "umount", str(target))


async def _next_tick(host: Host, directory: Path) -> int:
    """Return a time of the file system that is later than everything that has happened so far."""
    first = await host.file_system_clock_ns(str(directory))
    while (mark := await host.file_system_clock_ns(str(directory))) <= first:
        pass
    return mark


class TestRemovingEntries:
    async def test_files_are_unlinked_and_directories_moved_to_the_trash(
        self, host: Host, tree: Path, trash: str
    ) -> None:
        (tree / "keep").touch()
        (tree / "sub/dir/inner").mkdir(parents=True)
        (tree / "sub/file").touch()
        (tree / "link").symlink_to("keep")
        (tree / "dirlink").symlink_to("sub")
        os.mkfifo(tree / "sub/fifo")
        names = ["sub/dir", "sub/file", "link", "dirlink", "sub/fifo", "absent", "absent/deeper", "sub/dir/inner"]
        assert await host.remove_entries(str(tree), names, trash=trash) == 5
        assert names_in(tree) == ["keep", "sub"]
        assert names_in(tree / "sub") == []
        (entry,) = names_in(trash)
        assert names_in(Path(trash, entry)) == ["inner"]

    async def test_nothing_outside_is_touched_whatever_the_tree_contains(
        self, host: Host, tree: Path, trash: str, tmp_path: Path
    ) -> None:
        outside = tmp_path / "outside"
        (outside / "dir").mkdir(parents=True)
        (outside / "file").touch()
        (tree / "link").symlink_to(outside)
        (tree / "sub").mkdir()
        (tree / "sub/up").symlink_to("../..")
        (tree / "file").touch()
        names = [
            "link/file",
            "link/dir",
            "sub/up/outside",
            "../outside/file",
            "sub/../../outside/file",
            "..",
            ".",
            "",
            "/",
            f"{outside}/file",
            "./file",
            "sub//up",
            "file/beneath",
        ]
        assert await host.remove_entries(str(tree), names, trash=trash) == 0
        assert names_in(outside) == ["dir", "file"]
        assert names_in(tree) == ["file", "link", "sub"]

    async def test_nothing_to_remove(self, host: Host, tree: Path, trash: str) -> None:
        assert await host.remove_entries(str(tree), [], trash=trash) == 0
        assert not Path(trash).exists()

    async def test_names_of_any_bytes_and_trailing_slashes(self, host: Host, tree: Path, trash: str) -> None:
        name = os.fsdecode(b"\xff\n")
        (tree / name / name).mkdir(parents=True)
        assert await host.remove_entries(str(tree), [f"{name}/{name}/"], trash=trash) == 1
        assert names_in(tree / name) == []

    async def test_deep_entries(self, host: Host, tree: Path, trash: str) -> None:
        make_deep(tree, 150, "d" * 40)
        name = "/".join(["d" * 40] * 150)
        assert await host.remove_entries(str(tree), [f"{name}/bottom", name], trash=trash) == 2
        await host.remove_tree(trash)
        await host.remove_tree(str(tree))


class TestRemovingTrees:
    @pytest.mark.parametrize("kind", ["file", "link", "dangling", "fifo", "directory", "absent"])
    async def test_whatever_it_is(self, host: Host, tmp_path: Path, kind: str) -> None:
        path, kept = tmp_path / "path", tmp_path / "kept"
        (kept / "sub").mkdir(parents=True)
        match kind:
            case "file":
                path.touch()
            case "link":
                path.symlink_to(kept)
            case "dangling":
                path.symlink_to("nowhere")
            case "fifo":
                os.mkfifo(path)
            case "directory":
                shutil.copytree(kept, path)
                (path / "link").symlink_to(kept)
        await host.remove_tree(str(path))
        assert names_in(tmp_path) == ["kept"]
        assert names_in(kept) == ["sub"]

    async def test_two_at_once_do_not_mind_each_other(self, host: Host, tree: Path) -> None:
        for number in range(200):
            (tree / f"{number}/sub").mkdir(parents=True)
        await asyncio.gather(*(host.remove_tree(str(tree)) for _ in range(4)))
        assert not tree.exists()

    async def test_finishes_also_when_cancelled(self, host: Host, tree: Path) -> None:
        for number in range(500):
            (tree / f"{number}/sub").mkdir(parents=True)
        task = asyncio.create_task(host.remove_tree(str(tree)))
        for _ in range(2):
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not tree.exists()


class TestEndingProcesses:
    async def test_whatever_bears_the_mark_is_ended_wherever_it_went(
        self, host: Host, daemons: Daemons, tree: Path
    ) -> None:
        pids = [await daemons.start(f"ready; sleep {FOREVER}; true") for _ in range(3)]
        ended = await host.end_processes(mark=daemons.mark, tree=str(tree))
        assert set(pids) < set(ended.killed)  # and their children
        assert list(ended.killed) == sorted(ended.killed)
        assert daemons.running() == []
        assert ended.bystanders == ()

    async def test_the_unmarked_and_the_otherwise_marked_are_left_alone(
        self, host: Host, daemons: Daemons, tree: Path
    ) -> None:
        others = [
            await daemons.start(f"ready; exec sleep {FOREVER}", value=value) for value in (None, "lease2", "leas")
        ]
        ended = await host.end_processes(mark=daemons.mark, tree=str(tree))
        assert ended.killed == ()
        assert daemons.running() == others

    async def test_without_a_tree_nobody_else_is_looked_for(self, host: Host, daemons: Daemons, tree: Path) -> None:
        marked = await daemons.start(f"ready; exec sleep {FOREVER}")
        other = await daemons.start(f"ready; exec sleep {FOREVER}", value=None, cwd=tree)
        ended = await host.end_processes(mark=daemons.mark, tree=None)
        assert (ended.killed, ended.bystanders, ended.survivors) == ((marked,), (), ())
        assert daemons.running() == [other]

    async def test_term_comes_first(self, host: Host, daemons: Daemons, tree: Path, tmp_path: Path) -> None:
        # Between its birth and its own program a shell's child may lose a signal.
        slept = f'sleep {FOREVER} >/dev/null & until [ "$(cat /proc/$!/comm)" = sleep ]; do :; done'
        await daemons.start(f"trap 'echo bye > {tmp_path}/word; exit' TERM; {slept}; ready; wait")
        await host.end_processes(mark=daemons.mark, tree=str(tree), grace_seconds=30)
        assert (tmp_path / "word").read_text() == "bye\n"

    async def test_those_that_ignore_it_are_killed_after_the_grace_period(
        self, host: Host, daemons: Daemons, tree: Path
    ) -> None:
        pid = await daemons.start(f"trap '' TERM; ready; sleep {FOREVER}; sleep {FOREVER}")
        started = time.monotonic()
        ended = await host.end_processes(mark=daemons.mark, tree=str(tree), grace_seconds=0.2)
        assert time.monotonic() - started >= 0.2
        assert pid in ended.killed
        assert daemons.running() == []

    async def test_the_stopped_are_ended_too(self, host: Host, daemons: Daemons, tree: Path) -> None:
        pid = await daemons.start("ready; kill -STOP $$")
        started = time.monotonic()
        ended = await host.end_processes(mark=daemons.mark, tree=str(tree), grace_seconds=60)
        assert ended.killed == (pid,)
        assert time.monotonic() - started < 30

    async def test_what_the_dying_start_is_ended_too(
        self, host: Host, daemons: Daemons, tree: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "heir").write_text(f"trap 'setsid sleep {FOREVER} & exit' TERM; sleep {FOREVER} & wait")
        await daemons.start(f"trap 'setsid sh {tmp_path}/heir & exit' TERM; ready; sleep {FOREVER} & wait")
        await host.end_processes(mark=daemons.mark, tree=str(tree))
        assert (await host.end_processes(mark=daemons.mark, tree=str(tree))).killed == ()

    async def test_what_becomes_another_program_all_the_time_is_ended(
        self, host: Host, daemons: Daemons, tree: Path, tmp_path: Path
    ) -> None:
        """Amid an exec a process shows no environment."""
        again = tmp_path / "again"
        again.write_text(f"exec sh {again}\n")
        pids = [await daemons.start(f"ready; exec sh {again}") for _ in range(5)]
        ended = await host.end_processes(mark=daemons.mark, tree=str(tree))
        assert set(pids) <= set(ended.killed)
        assert not any(process_start_time(pid) for pid in pids)

    async def test_what_hands_itself_on_is_ended(
        self, host: Host, daemons: Daemons, tree: Path, tmp_path: Path
    ) -> None:
        """Who looks once sees those that are gone, and not their heirs."""
        relay = relay_in(tmp_path)
        await daemons.start(f"ready; exec sh {relay} 500")
        await host.end_processes(mark=daemons.mark, tree=str(tree))
        here = LocalHost(sessions_directory=str(tmp_path / "sessions"))
        assert (await here.end_processes(mark=daemons.mark, tree=str(tree))).killed == ()

    async def test_those_whose_first_thread_has_ended_are_found(
        self, host: Host, daemons: Daemons, tree: Path, tmp_path: Path
    ) -> None:
        if os.uname().machine != "x86_64":
            pytest.skip("the number of the system call is that machine's")
        (tmp_path / "script.py").write_text(
            "import ctypes, threading, time\n"
            "def stay():\n"
            "    while open('/proc/self/stat').read().rpartition(') ')[2][0] != 'Z': time.sleep(0.001)\n"
            f"    open('{tmp_path}/gate', 'w').close()\n"
            f"    time.sleep({FOREVER})\n"
            "threading.Thread(target=stay).start()\n"
            "ctypes.CDLL(None).syscall(60, 0)\n"
        )
        os.mkfifo(tmp_path / "gate")
        pid = await daemons.start(f"ready; exec {sys.executable} {tmp_path}/script.py")
        with (tmp_path / "gate").open("rb") as gate:
            gate.read()
        assert (await host.end_processes(mark=daemons.mark, tree=str(tree))).killed == (pid,)
        assert not Path(f"/proc/{pid}/task").exists() or len(names_in(f"/proc/{pid}/task")) == 1

    async def test_finishes_also_when_cancelled(self, host: Host, daemons: Daemons, tree: Path) -> None:
        await daemons.start(f"trap '' TERM; ready; sleep {FOREVER}; sleep {FOREVER}")
        task = asyncio.create_task(host.end_processes(mark=daemons.mark, tree=str(tree), grace_seconds=0.1))
        for _ in range(2):
            await asyncio.sleep(0.01)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert daemons.running() == []


class TestBystanders:
    async def test_strangers_that_stand_in_the_tree_are_named_and_left_alone(
        self, host: Host, daemons: Daemons, tree: Path, tmp_path: Path
    ) -> None:
        (tree / "sub").mkdir()
        (tree / "file").touch()
        (tmp_path / "tree-like").mkdir()
        sitter = await daemons.start(f"ready; exec sleep {FOREVER}", value=None, cwd=tree / "sub")
        at_root = await daemons.start(f"ready; exec sleep {FOREVER}", value=None, cwd=tree)
        reader = await daemons.start(f"exec 5<{tree}/file; ready; exec sleep {FOREVER}", value=None)
        await daemons.start(f"ready; exec sleep {FOREVER}", value=None, cwd=tmp_path / "tree-like")
        await daemons.start(f"ready; exec sleep {FOREVER}", value=None, cwd=tmp_path)
        ended = await host.end_processes(mark=daemons.mark, tree=str(tree))
        assert ended.killed == ()
        assert ended.bystanders == tuple(f"{pid} sleep" for pid in sorted([sitter, at_root, reader]))
        assert len(daemons.running()) == 5

    async def test_strangers_that_share_memory_with_its_files_count(
        self, host: Host, daemons: Daemons, tree: Path, tmp_path: Path
    ) -> None:
        (tree / "new\nline").write_text("text")
        (tmp_path / "script.py").write_text(
            "import mmap, os, sys, time\n"
            "descriptor = os.open(sys.argv[1], os.O_RDWR)\n"
            "memory = mmap.mmap(descriptor, 0, access=int(sys.argv[2]))\n"
            "os.closerange(descriptor, 100)\n"
            "open(sys.argv[3], 'w').close()\n"
            f"time.sleep({FOREVER})\n"
        )
        pids = []
        for access in (mmap.ACCESS_WRITE, mmap.ACCESS_COPY):
            gate = tmp_path / f"gate{access}"
            os.mkfifo(gate)
            script = f"ready; exec {sys.executable} {tmp_path}/script.py '{tree}/new\nline' {access} {gate}"
            pids.append(await daemons.start(script, value=None))
            gate.read_bytes()
        ended = await host.end_processes(mark=daemons.mark, tree=str(tree))
        assert [entry.split()[0] for entry in ended.bystanders] == [str(pids[0])]

    async def test_strangers_in_a_container_that_has_it_mounted_count(
        self, host: Host, daemons: Daemons, tree: Path, tmp_path: Path
    ) -> None:
        (tree / "sub dir").mkdir()
        (tmp_path / "place").mkdir()
        unshare = ["unshare", "--user", "--map-root-user", "--mount"]
        if (await host.run([*unshare, "true"], env=ENV)).exit_code != 0:
            pytest.skip("no containers here")
        os.mkfifo(tmp_path / "gate")
        (tmp_path / "script").write_text('mount --bind "$1" "$2"; : > "$3"; read -r never < "$3"')
        inside = f"sh {tmp_path}/script '{tree}/sub dir' {tmp_path}/place {tmp_path}/gate"
        pid = await daemons.start(f"ready; exec {' '.join(unshare)} {inside}", value=None)
        (tmp_path / "gate").read_bytes()
        ended = await host.end_processes(mark=daemons.mark, tree=str(tree))
        assert ended.bystanders == (f"{pid} sh",)

    async def test_the_tree_may_be_named_through_a_link(
        self, host: Host, daemons: Daemons, tree: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "link").symlink_to(tmp_path)
        sitter = await daemons.start(f"ready; exec sleep {FOREVER}", value=None, cwd=tree)
        ended = await host.end_processes(mark=daemons.mark, tree=f"{tmp_path}/link/tree")
        assert ended.bystanders == (f"{sitter} sleep",)

    async def test_the_marked_are_no_bystanders(self, host: Host, daemons: Daemons, tree: Path) -> None:
        pid = await daemons.start(f"ready; exec sleep {FOREVER}", cwd=tree)
        ended = await host.end_processes(mark=daemons.mark, tree=str(tree))
        assert (ended.killed, ended.bystanders) == ((pid,), ())

    async def test_holding_what_has_been_deleted_does_not_count(self, host: Host, daemons: Daemons, tree: Path) -> None:
        (tree / "file").touch()
        (tree / "really (deleted)").touch()
        await daemons.start(f"exec 5<{tree}/file; ready; exec sleep {FOREVER}", value=None)
        other = await daemons.start(f"exec 5<'{tree}/really (deleted)'; ready; exec sleep {FOREVER}", value=None)
        (tree / "file").unlink()
        ended = await host.end_processes(mark=daemons.mark, tree=str(tree))
        assert ended.bystanders == (f"{other} sleep",)


@pytest.fixture
def slot(tmp_path: Path) -> str:
    path = tmp_path / "slots" / "a slot's"
    path.mkdir(parents=True)
    return str(path)


class TestFence:
    async def test_a_guarded_command_runs_under_the_present_token_only(self, host: Host, slot: str) -> None:
        with pytest.raises(FencedError, match="not entered"):
            await host.run(["true"], env=ENV, guard=Guard(slot, 7))
        await host.enter(slot, 7, "session")
        done = await host.run(["sh", "-c", "exit 99"], env=ENV, guard=Guard(slot, 7))
        assert done.exit_code == 99
        for token in (6, 8):
            with pytest.raises(FencedError) as raised:
                await host.run(["touch", f"{slot}/touched"], env=ENV, guard=Guard(slot, token))
            assert (raised.value.top, raised.value.token, raised.value.is_used) == (7, token, False)
        assert names_in(slot) == ["fence", "run"]

    async def test_what_lies_on_disk(self, host: Host, slot: str) -> None:
        await host.enter(slot, 41, "session")
        await host.enter(slot, 42, "session")
        assert names_in(f"{slot}/fence") == [f"{42:020d}"]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        assert Path(slot, "fence", f"{42:020d}", "boot").read_text() == boot
        async with host.open_process(["sleep", FOREVER], env=ENV, guard=Guard(slot, 42)) as process:
            await until(lambda: any(path.stat().st_size for path in Path(slot, "run").iterdir()))
            (name,) = names_in(f"{slot}/run")
            assert name == f"{42:020d}.{process.pid}"
            start = process_start_time(process.pid)
            assert Path(slot, "run", name).read_text() == f"{start} {boot}"
        assert names_in(f"{slot}/run") == []

    async def test_a_token_enters_once(self, host: Host, slot: str) -> None:
        await host.enter(slot, 7, "session")
        with pytest.raises(FencedError) as raised:
            await host.enter(slot, 7, "other")
        assert (raised.value.top, raised.value.is_used) == (7, True)
        with pytest.raises(FencedError) as raised:
            await host.enter(slot, 6, "other")
        assert (raised.value.top, raised.value.is_used) == (7, False)
        assert (await host.run(["true"], env=ENV, guard=Guard(slot, 7))).exit_code == 0

    async def test_of_many_that_enter_with_one_token_one_succeeds(self, host: Host, slot: str) -> None:
        outcomes = await asyncio.gather(*(host.enter(slot, 3, "session") for _ in range(4)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes].count(type(None)) == 1
        assert all(outcome is None or isinstance(outcome, FencedError) for outcome in outcomes)

    async def test_entering_ends_what_older_tokens_left(self, host: Host, slot: str, tmp_path: Path) -> None:
        await host.enter(slot, 1, "session")
        # One in the command's own group, one that left it, and one that stands for the command itself.
        script = f"sleep {FOREVER} & echo $!; setsid sleep {FOREVER} & echo $!; exec sleep {FOREVER}"
        async with host.open_process(["sh", "-c", script], env=ENV, guard=Guard(slot, 1)) as process:
            said = b""
            while said.count(b"\n") < 2:
                said += await process.read()
            pids = [process.pid, *map(int, said.split())]
            await host.enter(slot, 2, "session")
            assert [pid for pid in pids if process_start_time(pid) is not None] == []
            assert await process.wait() == -signal.SIGKILL
        assert names_in(f"{slot}/run") == []

    async def test_killing_ends_what_hands_itself_on(self, host: Host, slot: str, tmp_path: Path) -> None:
        relay = relay_in(tmp_path)
        await host.enter(slot, 1, "session")
        async with host.open_process(["sh", str(relay), "500"], env=ENV, guard=Guard(slot, 1)) as process:
            await process.wait()
            await host.kill(slot, 2)
            alive = [pid for pid in pids() if read(f"/proc/{pid}/cmdline").startswith(b"sh\0" + os.fsencode(relay))]
            assert alive == []

    async def test_killing_ends_lower_tokens_only(self, host: Host, slot: str) -> None:
        await host.enter(slot, 5, "session")
        async with host.open_process(["sleep", FOREVER], env=ENV, guard=Guard(slot, 5)) as process:
            await until(lambda: any(path.stat().st_size for path in Path(slot, "run").iterdir()))
            await host.kill(slot, 5)
            assert process.exit_code is None
            await host.kill(slot, 6)
            assert await process.wait() == -signal.SIGKILL
        assert (await host.run(["true"], env=ENV, guard=Guard(slot, 5))).exit_code == 0

    @pytest.mark.parametrize("name", ["fence", "run"])
    @pytest.mark.parametrize("verb", ["enter", "leave", "kill"])
    async def test_what_stands_in_place_of_its_directories_is_removed_and_not_followed(
        self, host: Host, slot: str, tmp_path: Path, name: str, verb: str
    ) -> None:
        await host.enter(slot, 1, None)
        outside = tmp_path / "outside"
        for path in ("empty", "1", f"{1:020d}", f"{1:020d}~left.x"):
            (outside / path).mkdir(parents=True)
        (outside / "1/boot").write_text("precious")
        (outside / "1.1").write_text("precious")
        before = sorted(outside.rglob("*"))
        shutil.rmtree(f"{slot}/{name}")
        Path(slot, name).symlink_to(outside)

        if verb == "kill":
            await host.kill(slot, 2)
        else:
            await (host.enter(slot, 2, None) if verb == "enter" else host.leave(slot, 2))

        assert sorted(outside.rglob("*")) == before
        assert not Path(slot, name).is_symlink()

    async def test_a_file_in_place_of_a_directory_is_removed(self, host: Host, slot: str) -> None:
        for name in ("fence", "run"):
            Path(slot, name).write_text("x")
        await host.enter(slot, 1, None)
        assert (await host.run(["true"], env=ENV, guard=Guard(slot, 1))).exit_code == 0

    @pytest.mark.parametrize("stranger", ["9" * 20, "9" * 30, "0" * 19, "zzz", "~left", f"{10**17}", f"{5:020d}x"])
    async def test_names_that_no_token_has_count_for_nothing(self, host: Host, slot: str, stranger: str) -> None:
        await host.enter(slot, 1, None)
        Path(slot, "fence", stranger).mkdir()
        assert (await host.run(["true"], env=ENV, guard=Guard(slot, 1))).exit_code == 0
        await host.leave(slot, 1)
        await host.enter(slot, 2, None)
        assert (await host.run(["true"], env=ENV, guard=Guard(slot, 2))).exit_code == 0

    async def test_a_registered_number_that_is_anothers_since_is_left_alone(
        self, host: Host, slot: str, daemons: Daemons
    ) -> None:
        pid = await daemons.start(f"ready; exec sleep {FOREVER}", value=None)
        await host.enter(slot, 1, "session")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        start = process_start_time(pid)
        Path(slot, "run", f"{1:020d}.{pid}").write_text(f"{(start or 0) - 1} {boot}")
        await host.enter(slot, 2, "session")
        Path(slot, "run", f"{2:020d}.{pid}").write_text(f"{start} another-boot\n")
        await host.enter(slot, 3, "session")
        assert daemons.running() == [pid]
        assert names_in(f"{slot}/run") == []

    async def test_what_was_entered_before_another_boot_is_refused(self, host: Host, slot: str) -> None:
        await host.enter(slot, 1, "session")
        Path(slot, "fence", f"{1:020d}", "boot").write_text("another-boot\n")
        with pytest.raises(FencedError, match="since the host was started"):
            await host.run(["true"], env=ENV, guard=Guard(slot, 1))
        await host.enter(slot, 2, "session")
        assert (await host.run(["true"], env=ENV, guard=Guard(slot, 2))).exit_code == 0

    async def test_local_and_remote_are_one_fence(self, host: Host, slot: str, tmp_path: Path) -> None:
        here = LocalHost(sessions_directory=str(tmp_path / "sessions"))
        await host.enter(slot, 1, "there")
        async with here.open_process(["sleep", FOREVER], env=ENV, guard=Guard(slot, 1)) as process:
            await until(lambda: any(path.stat().st_size for path in Path(slot, "run").iterdir()))
            await host.enter(slot, 2, "there")
            assert await process.wait() == -signal.SIGKILL
        with pytest.raises(FencedError):
            await here.run(["true"], env=ENV, guard=Guard(slot, 1))
        await here.enter(slot, 3, "here")
        with pytest.raises(FencedError):
            await host.run(["true"], env=ENV, guard=Guard(slot, 2))

    async def test_who_left_runs_nothing_more_and_only_a_higher_token_enters(self, host: Host, slot: str) -> None:
        await host.enter(slot, 1, "session")
        async with host.open_process(["sleep", FOREVER], env=ENV, guard=Guard(slot, 1)) as process:
            await until(lambda: any(path.stat().st_size for path in Path(slot, "run").iterdir()))
            await host.leave(slot, 1)
            assert await process.wait() == -signal.SIGKILL
        await host.leave(slot, 1)
        with pytest.raises(FencedError):
            await host.run(["true"], env=ENV, guard=Guard(slot, 1))
        with pytest.raises(FencedError):
            await host.enter(slot, 1, "session")
        await host.enter(slot, 2, "session")
        assert (await host.run(["true"], env=ENV, guard=Guard(slot, 2))).exit_code == 0
        with pytest.raises(FencedError):
            await host.leave(slot, 1)

    async def test_a_slot_that_was_left_before_anybody_entered_it_can_be_used(self, host: Host, slot: str) -> None:
        await host.leave(slot, 1)  # its owner died between claiming and entering it
        await host.enter(slot, 2, "session")
        assert (await host.run(["true"], env=ENV, guard=Guard(slot, 2))).exit_code == 0

    async def test_what_cannot_be_started_is_said_as_without_a_guard(self, host: Host, slot: str) -> None:
        await host.enter(slot, 1, "session")
        for arguments in ({"argv": ["no-such-command"]}, {"argv": ["true"], "cwd": f"{slot}/absent"}):
            with pytest.raises(FileNotFoundError):
                await host.run(**arguments, env=ENV, guard=Guard(slot, 1))

    async def test_the_environment_is_as_given_but_for_the_mark(self, host: Host, slot: str) -> None:
        await host.enter(slot, 1, "session")
        given = {**ENV, "top": "mine", "boot": "2", "line": "a\nb", "N": "n", "stat": "s", "LC_ALL": "C.UTF-8"}
        done = await host.run(["env", "-0"], env=given, guard=Guard(slot, 1))
        seen = dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0") if entry)
        assert seen.pop("REPOPOOL_FENCE", "").endswith(f".{1:020d}")
        seen.pop("_", None)
        assert seen == given


class TestWatchdog:
    async def test_a_session_that_gives_no_sign_of_life_loses_its_slots(self, host: Host, slot: str) -> None:
        await host.enter(slot, 1, "gone")
        async with host.open_process(["sleep", FOREVER], env=ENV, guard=Guard(slot, 1)) as process:
            await host.beat("gone")
            async with asyncio.timeout(20):
                assert await process.wait() == -signal.SIGKILL
        with pytest.raises(FencedError, match="sign of life") as raised:
            await host.run(["true"], env=ENV, guard=Guard(slot, 1))
        assert raised.value.top == 1
        await host.enter(slot, 2, "back")
        assert (await host.run(["true"], env=ENV, guard=Guard(slot, 2))).exit_code == 0

    @pytest.mark.parametrize("watch_seconds", [1.2])  # on a busy machine a sign of life takes a good while
    async def test_one_that_does_keeps_them(self, host: Host, slot: str, tmp_path: Path, watch_seconds: float) -> None:
        await host.enter(slot, 1, "alive")
        async with host.open_process(["sleep", FOREVER], env=ENV, guard=Guard(slot, 1)) as process:
            begun = time.monotonic()
            while time.monotonic() < begun + watch_seconds * 1.25:
                await host.beat("alive")
                await asyncio.sleep(0.1)
            assert process.exit_code is None
            watch = (tmp_path / "sessions/alive/watch").read_text()
            assert process_start_time(int(watch.split()[0])) is not None
            await host.end_session("alive")
            await until(lambda: process_start_time(int(watch.split()[0])) is None)
            assert process.exit_code is None

    async def test_what_a_later_token_runs_is_not_the_sessions(self, host: Host, slot: str) -> None:
        await host.enter(slot, 1, "gone")
        await host.beat("gone")
        await host.enter(slot, 2, "other")
        async with host.open_process(["sleep", FOREVER], env=ENV, guard=Guard(slot, 2)) as process:
            await until(lambda: not (Path(slot).parent.parent / "sessions/gone").exists())
            assert process.exit_code is None

    @pytest.mark.parametrize("session", ["", "../x", "a/b", "-x", "a b", "x\n"])
    async def test_a_session_is_no_path(self, host: Host, session: str) -> None:
        with pytest.raises(ValueError, match="session"):
            await host.beat(session)


class TestPassingOverAndMoving:
    async def test_what_is_passed_over_is_not_entered(self, host: Host, tree: Path) -> None:
        for name in ("kept/sub", "deep/kept[1]", "odd", "other"):
            (tree / name).mkdir(parents=True)
        for name in ("kept/file", "deep/kept[1]/file", "other/file", "plain"):
            (tree / name).touch()
        os.mkfifo(tree / "kept/fifo")
        (tree / "kept/.git").mkdir()
        (tree / "odd").chmod(0o700)
        names = ("kept", "deep/kept[1]", "odd", "plain", "absent")
        inspection = await host.inspect_tree(str(tree), since_ns=None, passed_over=names)
        assert sorted(inspection.changed) == ["other/file", "plain"]
        assert sorted(inspection.changed_directories) == ["deep", "other"]
        assert set(inspection.irregular) - {"."} == {"odd"}
        assert (inspection.special, inspection.repositories) == ((), ())

    async def test_ordinary_directories_move(self, host: Host, tree: Path, tmp_path: Path) -> None:
        beside = tmp_path / "slot/kept"
        for name in ("one/sub", "a b/two's", "taken", "private"):
            (tree / name).mkdir(parents=True)
        (tree / "one/sub/file").write_text("kept")
        (tree / "private").chmod(0o700)
        (tree / "file").touch()
        (tree / "link").symlink_to(tree / "one")
        (beside / "taken").mkdir(parents=True)
        names = ["one", "a b/two's", "taken", "private", "file", "link", "link/sub", "absent", "../outside"]
        assert await host.move_directories(str(tree), str(beside), names) == ("one", "a b/two's", "private")
        assert (beside / "one/sub/file").read_text() == "kept"
        assert names_in(tree) == ["a b", "file", "link", "taken"]
        assert names_in(beside) == ["a b", "one", "private", "taken"]
        assert stat.S_IMODE((beside / "private").stat().st_mode) == stat.S_IMODE(tree.stat().st_mode)
        assert await host.move_directories(str(beside), str(tree), ["one", "a b/two's"]) == ("one", "a b/two's")
        assert (tree / "one/sub/file").read_text() == "kept"
        assert await host.move_directories(f"{tmp_path}/absent", str(tree), ["one"]) == ()
        assert not [name for name in names_in(tmp_path) if name.startswith(".repopool-")]

    async def test_a_directory_that_is_not_as_a_new_one_stays(self, host: Host, tree: Path, tmp_path: Path) -> None:
        (tree / "marked").mkdir()
        (tree / "plain").mkdir()
        os.setxattr(tree / "marked", "user.note", b"x")
        assert await host.move_directories(str(tree), f"{tmp_path}/kept", ["marked", "plain"]) == ("plain",)
        assert names_in(tree) == ["marked"]
