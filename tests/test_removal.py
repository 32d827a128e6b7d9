"""Whatever lies there is removed, and nothing else: real mounts, links, modes and races."""

import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from repopool_async import _removal
from tests._forks import NOBODY, as_ordinary_user, child_of_ours, names, open_descriptors

LINUX_ONLY = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


class TestDiscard:
    def test_what_is_absent_is_false_and_makes_no_trash(self, tmp_path: Path) -> None:
        assert _removal.discard(str(tmp_path / "absent"), str(tmp_path / "trash")) is False
        assert names(tmp_path) == []

    @pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling", "fifo", "socket"])
    def test_moves_whatever_is_there(self, tmp_path: Path, kind: str) -> None:
        path, trash = tmp_path / "entry", tmp_path / "a" / "trash"
        (tmp_path / "victim").mkdir()
        if kind == "file":
            path.write_bytes(b"data")
        elif kind == "directory":
            (path / "below").mkdir(parents=True)
        elif kind == "link":
            path.symlink_to("victim")
        elif kind == "dangling":
            path.symlink_to("absent")
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.relpath(path))
        before = path.lstat()
        assert _removal.discard(str(path), str(trash)) is True
        assert not os.path.lexists(path)
        (entry,) = trash.iterdir()
        assert os.path.samestat(entry.lstat(), before)
        assert (tmp_path / "victim").is_dir()

    def test_tells_where_the_entry_went(self, tmp_path: Path) -> None:
        (tmp_path / "entry").touch()
        entry = _removal.move_to_trash(str(tmp_path / "entry"), str(tmp_path / "trash"))
        assert entry is not None
        assert Path(entry).is_file()
        assert _removal.move_to_trash(str(tmp_path / "entry"), str(tmp_path / "trash")) is None

    def test_an_ordinary_user_discards_directories_that_forbid_everything(self, open_tmp: Path) -> None:
        def act() -> None:
            for mode in (0, 0o555, 0o300):
                (open_tmp / "entry" / "below").mkdir(parents=True)
                (open_tmp / "entry").chmod(mode)
                assert _removal.discard(str(open_tmp / "entry"), str(open_tmp / "trash"))
                assert not os.path.lexists(open_tmp / "entry")
            assert len(names(open_tmp / "trash")) == 3

        as_ordinary_user(act)

    def test_an_ordinary_user_is_told_where_the_parent_forbids_it(self, open_tmp: Path) -> None:
        def act() -> None:
            (open_tmp / "parent" / "entry").mkdir(parents=True)
            (open_tmp / "parent").chmod(0o555)
            with pytest.raises(PermissionError):
                _removal.discard(str(open_tmp / "parent" / "entry"), str(open_tmp / "trash"))

        as_ordinary_user(act)

    def test_of_many_at_once_exactly_one_gets_it(self, tmp_path: Path) -> None:
        with ThreadPoolExecutor(8) as threads:
            for number in range(30):
                path = tmp_path / f"entry{number}"
                path.mkdir()
                results = list(threads.map(lambda p: _removal.discard(str(p), str(tmp_path / "trash")), [path] * 8))
                assert results.count(True) == 1
        assert len(names(tmp_path / "trash")) == 30

    def test_a_file_in_place_of_the_trash_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "entry").touch()
        (tmp_path / "trash").touch()
        with pytest.raises(NotADirectoryError):
            _removal.discard(str(tmp_path / "entry"), str(tmp_path / "trash"))
        assert (tmp_path / "entry").exists()


def make_deep(top: Path, depth: int, name: str = "d" * 200) -> None:
    top.mkdir()
    descriptor = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=descriptor)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor))
    os.close(descriptor)


def make_bushy(top: Path) -> None:
    for outer in range(12):
        for inner in range(12):
            directory = top / f"o{outer}" / f"i{inner}"
            directory.mkdir(parents=True)
            for number in range(8):
                (directory / f"f{number}").touch()


class TestRemoveTree:
    def test_what_is_absent_is_no_error(self, tmp_path: Path) -> None:
        _removal.remove_tree(str(tmp_path / "absent"))
        _removal.remove_tree(str(tmp_path / "absent" / "below"))
        (tmp_path / "file").touch()
        _removal.remove_tree(str(tmp_path / "file" / "below"))
        assert names(tmp_path) == ["file"]

    def test_removes_files_links_fifos_and_directories(self, tmp_path: Path) -> None:
        top = tmp_path / "top"
        make_bushy(top)
        (top / "link").symlink_to("/etc")
        (top / "dangling").symlink_to("absent")
        os.mkfifo(top / "fifo")
        for name in (b"caf\xe9", b"new\nline", b"n" * 255, b"-rf", b" "):
            (top / os.fsdecode(name)).mkdir()
        _removal.remove_tree(str(top))
        assert names(tmp_path) == []

    def test_a_single_file_or_link_goes_too(self, tmp_path: Path) -> None:
        (tmp_path / "kept").mkdir()
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to("kept")
        _removal.remove_tree(str(tmp_path / "file"))
        _removal.remove_tree(str(tmp_path / "link"))
        assert names(tmp_path) == ["kept"]

    def test_a_trailing_slash_makes_no_difference(self, tmp_path: Path) -> None:
        (tmp_path / "kept" / "below").mkdir(parents=True)
        (tmp_path / "top" / "below").mkdir(parents=True)
        (tmp_path / "link").symlink_to("kept")
        _removal.remove_tree(f"{tmp_path}/top/")
        _removal.remove_tree(f"{tmp_path}/link/")
        assert names(tmp_path) == ["kept"]
        assert (tmp_path / "kept" / "below").is_dir()

    def test_what_links_lead_to_stays(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "file").write_bytes(b"mine")
        (tmp_path / "top" / "a").mkdir(parents=True)
        (tmp_path / "top" / "a" / "directory").symlink_to(outside)
        (tmp_path / "top" / "a" / "up").symlink_to("..")
        os.link(outside / "file", tmp_path / "top" / "hard")
        _removal.remove_tree(str(tmp_path / "top"))
        assert (outside / "file").read_bytes() == b"mine"
        assert names(tmp_path) == ["outside"]

    def test_depth_beyond_path_names_recursion_and_descriptors(self, tmp_path: Path) -> None:
        make_deep(tmp_path / "top", 3000)

        def remove() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 8, 4096))
            sys.setrecursionlimit(200)
            _removal.remove_tree(str(tmp_path / "top"))

        child_of_ours(remove)
        assert names(tmp_path) == []

    def test_an_ordinary_user_removes_directories_that_forbid_everything(self, open_tmp: Path) -> None:
        def act() -> None:
            for mode in (0, 0o555, 0o111, 0o444):
                directory = open_tmp / "top" / "middle" / "bottom"
                directory.mkdir(parents=True)
                (directory / "file").touch(mode=0)
                for path in (directory, directory.parent, open_tmp / "top"):
                    path.chmod(mode)
                _removal.remove_tree(str(open_tmp / "top"))
                assert names(open_tmp) == []

        as_ordinary_user(act)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")
    @pytest.mark.parametrize("mode", [0o755, 0o754, 0o750, 0o751])
    def test_what_cannot_go_is_named_and_the_rest_goes(self, open_tmp: Path, mode: int) -> None:
        foreign = open_tmp / "top" / "b" / "foreign"
        (foreign / "below").mkdir(parents=True)
        (open_tmp / "top" / "a").mkdir()
        (open_tmp / "top" / "c").mkdir()
        for path in (open_tmp / "top", open_tmp / "top" / "b", open_tmp / "top" / "a", open_tmp / "top" / "c"):
            os.chown(path, NOBODY, NOBODY)
        foreign.chmod(mode)

        def act() -> None:
            with pytest.raises(PermissionError) as caught:
                _removal.remove_tree(str(open_tmp / "top"))
            assert str(caught.value.filename).startswith(str(foreign))
            assert names(open_tmp / "top") == ["b"]

        as_ordinary_user(act)

    def test_several_processes_may_remove_the_same_tree(self, tmp_path: Path) -> None:
        code = "import sys; from repopool_async._removal import remove_tree; sys.stdin.read(); remove_tree(sys.argv[1])"
        for _ in range(3):
            make_bushy(tmp_path / "top")
            command = [sys.executable, "-c", code, str(tmp_path / "top")]
            removers = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(4)]
            for remover in removers:
                assert remover.stdin is not None
                remover.stdin.close()
            assert [remover.wait() for remover in removers] == [0, 0, 0, 0]
            assert names(tmp_path) == []

    def test_entries_that_come_meanwhile_go_too(self, tmp_path: Path) -> None:
        make_bushy(tmp_path / "top")
        stop = threading.Event()

        def litter() -> None:
            number = 0
            while not stop.is_set() and number < 300:
                number += 1
                try:
                    (tmp_path / "top" / "o5" / f"late{number}").mkdir()
                except OSError:
                    return

        litterer = threading.Thread(target=litter)
        litterer.start()
        try:
            _removal.remove_tree(str(tmp_path / "top"))
        finally:
            stop.set()
            litterer.join()
        assert not os.path.lexists(tmp_path / "top")

    def test_a_directory_swapped_for_a_link_leads_nowhere(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        make_bushy(outside)
        expected = sorted(str(path) for path in outside.rglob("*"))
        spare = tmp_path / "spare"
        baits: list[Path] = []
        stop = threading.Event()

        def swap() -> None:
            while not stop.is_set():
                bait = baits[-1]
                try:
                    bait.rename(spare)
                    bait.symlink_to(outside)
                    bait.unlink()
                    spare.rename(bait)
                except OSError:
                    shutil.rmtree(spare, ignore_errors=True)

        swapper = threading.Thread(target=swap)
        for number in range(40):
            top = tmp_path / f"top{number}"
            (top / "bait" / "x" / "y").mkdir(parents=True)
            baits.append(top / "bait")
            if number == 0:
                swapper.start()
            # Whether it succeeds against somebody who never stops is a matter of luck.
            with suppress(OSError):
                _removal.remove_tree(str(top))
        stop.set()
        swapper.join()
        assert sorted(str(path) for path in outside.rglob("*")) == expected

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
    @pytest.mark.parametrize("kind", ["bind", "tmpfs", "root"])
    def test_what_is_mounted_inside_is_neither_entered_nor_removed(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "precious").write_bytes(b"mine")
        point = tmp_path / "top" if kind == "root" else tmp_path / "top" / "a b" / "point"
        point.mkdir(parents=True)
        (tmp_path / "top" / "file").touch()
        what = ["-t", "tmpfs", "none"] if kind == "tmpfs" else ["--bind", str(tmp_path / "source")]
        code = (
            "import errno, os, subprocess, sys\n"
            "from repopool_async._removal import remove_tree\n"
            "if subprocess.run(['mount', *sys.argv[3:], sys.argv[2]], capture_output=True).returncode: sys.exit(77)\n"
            "open(sys.argv[2] + '/other', 'w').close()\n"
            "try:\n"
            "    remove_tree(sys.argv[1])\n"
            "except OSError as error:\n"
            "    assert error.errno == errno.EBUSY and error.filename == sys.argv[2], error\n"
            "    assert os.path.exists(sys.argv[2] + '/other')\n"
            "    sys.exit(0)\n"
            "sys.exit('it was removed')\n"
        )
        command = ["unshare", "-m", sys.executable, "-c", code, str(tmp_path / "top"), str(point), *what]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("no unshare command here")
        if done.returncode == 77 or b"unshare" in done.stderr:
            pytest.skip("mounting is not permitted here")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "source" / "precious").read_bytes() == b"mine"
        assert kind == "root" or not (tmp_path / "top" / "file").exists()

    @LINUX_ONLY
    def test_no_descriptor_is_left_open(self, tmp_path: Path) -> None:
        before = open_descriptors()
        for _ in range(5):
            (tmp_path / "top" / "a" / "b").mkdir(parents=True)
            (tmp_path / "top" / "c").mkdir()
            _removal.remove_tree(str(tmp_path / "top"))
        assert open_descriptors() <= before


class TestOpenUp:
    def test_gives_the_owner_every_right_and_says_whether_that_was_needed(self, tmp_path: Path) -> None:
        directory = tmp_path / "directory"
        directory.mkdir(mode=0o055)
        assert _removal.open_up(str(directory)) is True
        assert stat.S_IMODE(directory.stat().st_mode) == 0o755
        assert _removal.open_up(str(directory)) is False

    def test_leaves_everything_but_directories_alone(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch(mode=0)
        (tmp_path / "directory").mkdir(mode=0)
        (tmp_path / "link").symlink_to("directory")
        for name in ("file", "link", "absent"):
            assert _removal.open_up(str(tmp_path / name)) is False
        assert stat.S_IMODE((tmp_path / "directory").stat().st_mode) == 0
        (tmp_path / "directory").chmod(0o700)
