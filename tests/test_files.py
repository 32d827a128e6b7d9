"""Files are replaced whole and read without being trapped: real processes, fifos, modes."""

import errno
import fcntl
import os
import random
import resource
import signal
import socket
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repopool_async import _files
from tests._forks import as_ordinary_user, child_of_ours, names, open_descriptors, python

PATIENTLY: Final = settings(deadline=None)
LINUX_ONLY = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def leftovers(directory: Path) -> list[str]:
    return [name for name in names(directory) if _files.is_temporary_name(name)]


class TestWriteAtomic:
    def test_makes_a_file_and_replaces_it(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        _files.write_atomic(str(path), b"one")
        assert path.read_bytes() == b"one"
        _files.write_atomic(str(path), b"two", durable=True)
        assert path.read_bytes() == b"two"
        assert names(tmp_path) == ["record"]

    def test_a_bare_name_means_the_present_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        _files.write_atomic("record", b"", durable=True)
        assert (tmp_path / "record").read_bytes() == b""

    def test_the_mode_is_the_one_asked_for_less_the_umask(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        before = os.umask(0o027)
        try:
            _files.write_atomic(str(path), b"#!/bin/sh\n", mode=0o755)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o750

    def test_names_that_are_no_text_work(self, tmp_path: Path) -> None:
        path = f"{tmp_path}/" + os.fsdecode(b"caf\xe9\n\x80")
        _files.write_atomic(path, b"data")
        assert _files.read_regular(path, 10) == b"data"
        assert [os.fsencode(name) for name in names(tmp_path)] == [b"caf\xe9\n\x80"]

    def test_a_name_of_255_bytes_works(self, tmp_path: Path) -> None:
        _files.write_atomic(str(tmp_path / ("n" * 255)), b"data")
        assert names(tmp_path) == ["n" * 255]

    def test_a_link_in_its_place_is_replaced_and_not_followed(self, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_bytes(b"mine")
        path = tmp_path / "record"
        path.symlink_to(victim)
        _files.write_atomic(str(path), b"data")
        assert victim.read_bytes() == b"mine"
        assert not path.is_symlink()

    def test_a_fifo_in_its_place_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        os.mkfifo(path)
        _files.write_atomic(str(path), b"data")
        assert path.read_bytes() == b"data"

    def test_a_directory_in_its_place_is_an_error_that_leaves_nothing_behind(self, tmp_path: Path) -> None:
        (tmp_path / "record").mkdir()
        with pytest.raises(IsADirectoryError):
            _files.write_atomic(str(tmp_path / "record"), b"data")
        assert names(tmp_path) == ["record"]

    def test_the_directory_must_exist(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            _files.write_atomic(str(tmp_path / "absent" / "record"), b"data")

    def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        path.write_bytes(b"old")

        def write_too_much() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            with pytest.raises(OSError, match="too large"):
                _files.write_atomic(str(path), b"x" * 10_000)

        child_of_ours(write_too_much)
        assert path.read_bytes() == b"old"
        assert names(tmp_path) == ["record"]

    def test_an_ordinary_user_is_refused_in_a_read_only_directory(self, open_tmp: Path) -> None:
        def write() -> None:
            (open_tmp / "shut").mkdir(mode=0o555)
            with pytest.raises(PermissionError):
                _files.write_atomic(str(open_tmp / "shut" / "record"), b"data")

        as_ordinary_user(write)

    def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        code = (
            "import os, sys\n"
            "from repopool_async._files import write_atomic\n"
            "bodies = [bytes([65 + n]) * 300_000 for n in range(4)]\n"
            "for n in range(10**9):\n"
            "    write_atomic(sys.argv[1], bodies[n % 4])\n"
            "    os.write(1, b'.')\n"
        )
        rolls = random.Random(7)
        for _ in range(12):
            with python(code, str(path)) as writer:
                assert writer.stdout is not None
                os.read(writer.stdout.fileno(), 1)
                for _ in range(rolls.randrange(20)):
                    os.read(writer.stdout.fileno(), 1)
                writer.kill()
            data = path.read_bytes()
            assert len(data) == 300_000
            assert len(set(data)) == 1
        others = set(names(tmp_path)) - {"record"}
        assert all(_files.is_temporary_name(name) for name in others)

    def test_writers_in_several_processes_never_mix(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        code = (
            "import sys\n"
            "from repopool_async._files import write_atomic\n"
            "body = sys.argv[2].encode() * (50_000 + 1000 * int(sys.argv[2]))\n"
            "for _ in range(150):\n"
            "    write_atomic(sys.argv[1], body)\n"
        )
        writers = [python(code, str(path), str(n)) for n in range(4)]
        while any(writer.poll() is None for writer in writers):
            data = _files.read_regular(str(path), 10**6)
            if data is not None:
                assert data == data[:1] * (50_000 + 1000 * int(data[:1]))
        for writer in writers:
            with writer:
                assert writer.wait() == 0
        assert names(tmp_path) == ["record"]

    def test_writers_in_several_threads_never_mix(self, tmp_path: Path) -> None:
        path = str(tmp_path / "record")
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda n: _files.write_atomic(path, bytes([n % 256]) * 5000), range(400)))
        data = Path(path).read_bytes()
        assert data == data[:1] * 5000
        assert names(tmp_path) == ["record"]

    @LINUX_ONLY
    def test_no_descriptor_is_left_open(self, tmp_path: Path) -> None:
        before = open_descriptors()
        for _ in range(20):
            _files.write_atomic(str(tmp_path / "record"), b"data", durable=True)
            with pytest.raises(OSError):  # noqa: PT011 - whichever
                _files.write_atomic(str(tmp_path), b"data")
        assert open_descriptors() <= before


class TestOverwrite:
    def test_overwrites_in_place(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        path.write_bytes(b"aaaa")
        inode = path.stat().st_ino
        assert _files.overwrite(str(path), b"bbbb") is True
        assert path.read_bytes() == b"bbbb"
        assert path.stat().st_ino == inode

    @pytest.mark.parametrize("kind", ["absent", "shorter", "longer", "link", "directory", "fifo", "no directory"])
    def test_does_nothing_where_there_is_no_file_of_that_size(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "record"
        (tmp_path / "victim").write_bytes(b"mine")
        if kind in ("shorter", "longer"):
            path.write_bytes(b"aaa" if kind == "shorter" else b"aaaaa")
        elif kind == "link":
            path.symlink_to("victim")
        elif kind == "directory":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "no directory":
            path = tmp_path / "victim" / "record"
        assert _files.overwrite(str(path), b"bbbb") is False
        assert (tmp_path / "victim").read_bytes() == b"mine"

    def test_does_nothing_while_somebody_else_does(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        path.write_bytes(b"aaaa")
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert _files.overwrite(str(path), b"bbbb") is False
            fcntl.flock(file, fcntl.LOCK_UN)
            assert _files.overwrite(str(path), b"bbbb") is True

    def test_a_settled_read_waits_until_the_writer_has_finished(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        path.write_bytes(b"aaaa")
        with path.open("rb+") as file, ThreadPoolExecutor(1) as threads:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.pwrite(file.fileno(), b"bb", 0)
            reading = threads.submit(_files.read_regular, str(path), 4, is_settled=True)
            assert _files.read_regular(str(path), 4) == b"bbaa"  # which one that does not wait may see
            os.pwrite(file.fileno(), b"bb", 2)
            fcntl.flock(file, fcntl.LOCK_UN)
            assert reading.result() == b"bbbb"

    def test_a_settled_read_does_not_wait_for_ever(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_files, "_SETTLING_TRIES", 3)
        (tmp_path / "record").write_bytes(b"aaaa")
        with (tmp_path / "record").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert _files.read_regular(str(tmp_path / "record"), 4, is_settled=True) == b"aaaa"

    def test_a_writer_killed_at_any_moment_has_written_all_or_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        path.write_bytes(b"A" * 4096)
        code = (
            "import os, sys\n"
            "from repopool_async._files import overwrite\n"
            "for n in range(10**9):\n"
            "    assert overwrite(sys.argv[1], bytes([65 + n % 26]) * 4096)\n"
            "    n % 100 or os.write(1, b'.')\n"
        )
        rolls = random.Random(11)
        for _ in range(12):
            with python(code, str(path)) as writer:
                assert writer.stdout is not None
                for _ in range(1 + rolls.randrange(20)):
                    os.read(writer.stdout.fileno(), 1)
                writer.kill()
            data = path.read_bytes()
            assert len(data) == 4096
            assert len(set(data)) == 1
        assert _files.overwrite(str(path), b"Z" * 4096)  # a dead writer's lock is gone

    @LINUX_ONLY
    def test_no_descriptor_is_left_open(self, tmp_path: Path) -> None:
        path = tmp_path / "record"
        path.write_bytes(b"aaaa")
        before = open_descriptors()
        for data in (b"bbbb", b"b") * 10:
            _files.overwrite(str(path), data)
        assert open_descriptors() <= before


class TestTemporaryNames:
    def test_what_a_killed_writer_leaves_is_recognised(self, tmp_path: Path) -> None:
        def die() -> None:
            with _files._replacement(str(tmp_path / "slot.json"), 0o600) as descriptor:
                os.write(descriptor, b"{")
                os._exit(0)

        child_of_ours(die)
        (name,) = names(tmp_path)
        assert _files.is_temporary_name(name)

    @pytest.mark.parametrize(
        "name",
        [
            "slot.json",
            "slot.json.corrupt-20260101T000000.000000Z",
            "history.jsonl.1",
            "tree",
            ".git",
            ".tmp",
            "",
            "1-2-3",
        ],
    )
    def test_nothing_else_is(self, name: str) -> None:
        assert not _files.is_temporary_name(name)

    @PATIENTLY
    @given(st.text())
    def test_text_at_large_is_not(self, name: str) -> None:
        assert not _files.is_temporary_name(name)


class TestReadRegular:
    def test_returns_what_was_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"data")
        assert _files.read_regular(str(tmp_path / "file"), 4) == b"data"

    def test_an_empty_file_has_no_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert _files.read_regular(str(tmp_path / "file"), 0) == b""

    def test_more_than_a_chunk_comes_whole(self, tmp_path: Path) -> None:
        data = os.urandom(3 * 1024 * 1024 + 17)
        (tmp_path / "file").write_bytes(data)
        assert _files.read_regular(str(tmp_path / "file"), len(data)) == data

    def test_what_is_absent_is_none(self, tmp_path: Path) -> None:
        assert _files.read_regular(str(tmp_path / "file"), 10) is None
        assert _files.read_regular(str(tmp_path / "absent" / "file"), 10) is None

    def test_one_byte_over_the_limit_is_too_large(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"12345")
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at
            _files.read_regular(str(tmp_path / "file"), 4)
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(tmp_path / "file")

    def test_a_huge_sparse_file_is_refused_without_being_read(self, tmp_path: Path) -> None:
        with (tmp_path / "file").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(OSError) as caught:  # noqa: PT011
            _files.read_regular(str(tmp_path / "file"), 1 << 20)
        assert caught.value.errno == errno.EFBIG

    @LINUX_ONLY
    def test_a_file_that_claims_to_be_empty_is_read_to_its_end(self) -> None:
        data = _files.read_regular("/proc/self/mountinfo", 10**7)
        assert data is not None
        assert data.endswith(b"\n")
        with pytest.raises(OSError) as caught:  # noqa: PT011
            _files.read_regular("/proc/self/mountinfo", 10)
        assert caught.value.errno == errno.EFBIG

    def test_nothing_but_a_regular_file_is_read_and_nothing_is_waited_for(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"data")
        (tmp_path / "link").symlink_to("file")
        (tmp_path / "dangling").symlink_to("absent")
        (tmp_path / "directory").mkdir()
        os.mkfifo(tmp_path / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(tmp_path / "socket"))
            expected = {
                "link": errno.ELOOP,
                "dangling": errno.ELOOP,
                "directory": errno.EISDIR,
                "fifo": errno.EINVAL,
                "socket": errno.EINVAL,
                "/dev/null": errno.EINVAL,
            }
            for name, number in expected.items():
                with pytest.raises(OSError) as caught:  # noqa: PT011
                    _files.read_regular(str(tmp_path / name), 100)
                assert caught.value.errno == number, name

    def test_an_ordinary_user_is_told_of_a_file_he_may_not_read(self, open_tmp: Path) -> None:
        def read() -> None:
            (open_tmp / "file").touch(mode=0)
            with pytest.raises(PermissionError):
                _files.read_regular(str(open_tmp / "file"), 10)

        as_ordinary_user(read)

    @LINUX_ONLY
    def test_no_descriptor_is_left_open(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        before = open_descriptors()
        for _ in range(20):
            with pytest.raises(OSError):  # noqa: PT011
                _files.read_regular(str(tmp_path / "fifo"), 10)
        assert open_descriptors() <= before


class TestAppendLine:
    def append(self, path: Path, line: bytes, rotate_bytes: int = 10**6) -> None:
        _files.append_line(str(path), line, rotate_bytes=rotate_bytes)

    def test_lines_follow_each_other(self, tmp_path: Path) -> None:
        self.append(tmp_path / "log", b"one")
        self.append(tmp_path / "log", b"two\n")
        assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"

    def test_an_unfinished_line_does_not_spoil_the_next(self, tmp_path: Path) -> None:
        (tmp_path / "log").write_bytes(b"one\n{tor")
        self.append(tmp_path / "log", b"two")
        assert (tmp_path / "log").read_bytes() == b"one\n{tor\ntwo\n"

    def test_a_full_log_is_renamed_first(self, tmp_path: Path) -> None:
        for number in range(7):
            self.append(tmp_path / "log", b"line%d" % number, rotate_bytes=18)
        assert (tmp_path / "log.1").read_bytes() == b"line3\nline4\nline5\n"
        assert (tmp_path / "log").read_bytes() == b"line6\n"
        assert sorted(names(tmp_path)) == ["log", "log.1"]

    def test_a_line_larger_than_a_log_still_gets_in(self, tmp_path: Path) -> None:
        self.append(tmp_path / "log", b"x" * 100, rotate_bytes=10)
        self.append(tmp_path / "log", b"y" * 100, rotate_bytes=10)
        assert (tmp_path / "log").read_bytes() == b"y" * 100 + b"\n"
        assert (tmp_path / "log.1").read_bytes() == b"x" * 100 + b"\n"

    def test_nothing_but_a_regular_file_is_written_to(self, tmp_path: Path) -> None:
        (tmp_path / "victim").write_bytes(b"mine")
        (tmp_path / "link").symlink_to("victim")
        (tmp_path / "directory").mkdir()
        os.mkfifo(tmp_path / "fifo")
        for name, number in {"link": errno.ELOOP, "directory": errno.EISDIR, "fifo": errno.EINVAL}.items():
            with pytest.raises(OSError) as caught:  # noqa: PT011
                self.append(tmp_path / name, b"line")
            assert caught.value.errno == number, name
        assert (tmp_path / "victim").read_bytes() == b"mine"

    def test_several_processes_lose_no_line_even_across_a_rotation(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        code = (
            "import sys\n"
            "from repopool_async._files import append_line\n"
            "for n in range(200):\n"
            "    append_line(sys.argv[1], b'%s %03d ' % (sys.argv[2].encode(), n) + b'x' * 90, rotate_bytes=50_000)\n"
        )
        writers = [python(code, str(path), str(number)) for number in range(4)]
        for writer in writers:
            with writer:
                assert writer.wait() == 0
        lines = Path(f"{path}.1").read_bytes().splitlines() + path.read_bytes().splitlines()
        assert sorted(line[:5] for line in lines if line) == [
            b"%d %03d" % (writer, number) for writer in range(4) for number in range(200)
        ]


class TestCopyPreserving:
    def test_keeps_bytes_mode_and_time_to_the_nanosecond(self, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        data = os.urandom(3 * 1024 * 1024 + 5)
        source.write_bytes(data)
        source.chmod(0o751)
        os.utime(source, ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321))
        target.write_bytes(b"old")
        _files.copy_preserving(str(source), str(target))
        status = target.stat()
        assert target.read_bytes() == data
        assert stat.S_IMODE(status.st_mode) == 0o751
        assert status.st_mtime_ns == 1_500_000_000_987_654_321
        assert sorted(names(tmp_path)) == ["source", "target"]

    def test_does_not_pass_set_id_bits_on(self, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.touch()
        source.chmod(0o6755)
        _files.copy_preserving(str(source), str(target))
        assert stat.S_IMODE(target.stat().st_mode) == 0o755

    def test_an_empty_file_is_copied(self, tmp_path: Path) -> None:
        (tmp_path / "source").touch()
        _files.copy_preserving(str(tmp_path / "source"), str(tmp_path / "target"))
        assert (tmp_path / "target").read_bytes() == b""

    @LINUX_ONLY
    def test_a_file_that_claims_to_be_empty_is_copied_to_its_end(self, tmp_path: Path) -> None:
        _files.copy_preserving("/proc/self/mountinfo", str(tmp_path / "target"))
        assert (tmp_path / "target").read_bytes() == Path("/proc/self/mountinfo").read_bytes()

    @pytest.mark.parametrize("kind", ["link", "directory", "fifo", "absent"])
    def test_another_source_is_refused_and_the_target_stays(self, tmp_path: Path, kind: str) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        target.write_bytes(b"old")
        if kind == "link":
            source.symlink_to("/etc/passwd")
        elif kind == "directory":
            source.mkdir()
        elif kind == "fifo":
            os.mkfifo(source)
        with pytest.raises(OSError):  # noqa: PT011 - whichever
            _files.copy_preserving(str(source), str(target))
        assert target.read_bytes() == b"old"
        assert leftovers(tmp_path) == []

    def test_a_link_at_the_target_is_replaced_and_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(b"data")
        (tmp_path / "victim").write_bytes(b"mine")
        (tmp_path / "target").symlink_to("victim")
        _files.copy_preserving(str(tmp_path / "source"), str(tmp_path / "target"))
        assert (tmp_path / "victim").read_bytes() == b"mine"
        assert (tmp_path / "target").read_bytes() == b"data"
