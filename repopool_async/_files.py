"""Files written whole or not at all, and read without being trapped.

Synchronous helpers, each meant to run in one thread hop. Paths are text and may hold undecodable bytes as surrogates
(`os.fsdecode`). What lies at a path may have been made by somebody hostile: no link is followed at the last component
and no fifo is waited for. Nothing here knows what the files mean; removing them is `_removal`'s business.
"""
# Paths are text here: descriptors and directory descriptors are what this module is about, and pathlib has neither.
# ruff: noqa: PTH105, PTH108, PTH118, PTH120

import errno
import fcntl
import itertools
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_TEMPORARY_NAME: Final = re.compile(r"\.repopool-[0-9]+-[0-9]+-[0-9a-f]{16}\.tmp")
_counter: Final = itertools.count()

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_OVERWRITE: Final = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_APPEND: Final = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_CHUNK_BYTES: Final = 1024 * 1024
_SETTLING_TRIES: Final = 1000


# Writing


def write_atomic(path: str, data: bytes, *, mode: int = 0o644, durable: bool = False) -> None:
    """Replace a file by a new one, in one step: whoever opens the path sees the old bytes or the new, never a part.

    A process killed on the way leaves the old file and at most a file whose name `is_temporary_name`. The directory
    must exist.

    Args:
        mode: permission bits of the new file; the umask applies.
        durable: whether the file and its directory are synced to disk before this returns.

    Raises:
        OSError: nothing has changed.
    """
    with _replacement(path, mode) as descriptor:
        _write_all(descriptor, data)
        if durable:
            os.fsync(descriptor)
    if durable:
        sync_directory(os.path.dirname(path))


def overwrite(path: str, data: bytes) -> bool:
    """Overwrite a regular file of exactly as many bytes, in place and in one write.

    On a journalling file system that is ten times faster than replacing the file, and it needs no free space. Writers
    do not mix, and one that is killed has written all or nothing of up to a page; but a reader may see old bytes beside
    new ones, so the data needs a checksum, and who finds it wrong reads again with `is_settled`.

    Returns:
        False where that was not possible: there is no such file, or somebody else is overwriting it.

    Raises:
        OSError: the disk failed, or a file system that copies on write is full.
    """
    try:
        descriptor = os.open(path, _OVERWRITE)
    except OSError:
        return False
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != len(data):
            return False
        with _locked(descriptor, fcntl.LOCK_EX) as is_locked:
            return is_locked and os.pwrite(descriptor, data, 0) == len(data)
    finally:
        os.close(descriptor)


def copy_preserving(source: str, target: str) -> None:
    """Copy a regular file's bytes, permission bits and modification time, and rename the copy into place.

    The time is kept to the nanosecond; set-id bits are not, because the copy may belong to somebody more powerful.

    Raises:
        FileNotFoundError: there is no such source.
        OSError: the source is a link, a directory or a special file, or the copy failed; the target has not changed.
    """
    original = os.open(source, _READ)
    try:
        status = _require_regular(original, source)
        with _replacement(target, 0o600) as descriptor:
            _copy_bytes(original, descriptor)
            os.fchmod(descriptor, status.st_mode & 0o777)
            os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))
    finally:
        os.close(original)


def append_line(path: str, line: bytes, *, rotate_bytes: int) -> None:
    """Append one line to a log, which is made where it is missing; several processes may do so at once.

    A log that would grow beyond `rotate_bytes` is first renamed to `<path>.1`, replacing what was there. A line that an
    earlier, killed writer left unfinished is ended, so that it spoils no other.

    Args:
        line: a newline is added where it has none.

    Raises:
        OSError: the path is no regular file, or nothing (or only a part of the line) could be written.
    """
    line = line if line.endswith(b"\n") else line + b"\n"
    descriptor = os.open(path, _APPEND, 0o644)
    try:
        size = _require_regular(descriptor, path).st_size
        if size and size + len(line) > rotate_bytes and _rotate(path, descriptor):
            os.close(descriptor)
            descriptor = os.open(path, _APPEND, 0o644)
            size = _require_regular(descriptor, path).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        _write_all(descriptor, line)
    finally:
        os.close(descriptor)


def sync_directory(path: str) -> None:
    """Sync a directory to disk, so that the names in it survive a loss of power."""
    descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary_name(name: str) -> bool:
    """Return whether a directory entry is one that `temporary_name` named, such as those of `write_atomic`.

    An old one was left by a process that was killed, and may be deleted.
    """
    return _TEMPORARY_NAME.fullmatch(name) is not None


def temporary_name() -> str:
    """Return a new name for what is renamed or removed in moments."""
    return f".repopool-{unique_name()}.tmp"


def unique_name() -> str:
    """Return text that no other thread, process or container makes."""
    # The pid alone collides between threads, pid and counter between containers that share a volume.
    return f"{os.getpid()}-{next(_counter)}-{os.urandom(8).hex()}"


@contextmanager
def _replacement(path: str, mode: int) -> Iterator[int]:
    temporary = os.path.join(os.path.dirname(path), temporary_name())
    descriptor = os.open(temporary, _CREATE, mode)
    try:
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _copy_bytes(source: int, target: int) -> None:
    _clone_bytes(source, target)
    # The loop alone decides where the end is: a file system may clone a part, or claim that there is nothing.
    while chunk := os.read(source, _CHUNK_BYTES):
        _write_all(target, chunk)


def _clone_bytes(source: int, target: int) -> None:
    if not hasattr(os, "copy_file_range"):
        return
    try:
        while os.copy_file_range(source, target, 1 << 30):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise


def _rotate(path: str, descriptor: int) -> bool:
    """Rename the log away unless somebody else is doing so; return whether the path now leads to another file."""
    with _locked(descriptor, fcntl.LOCK_EX) as is_locked:
        # Only the holder of the lock on the file that the path leads to may rename it: two renames would lose a log.
        if is_locked:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                    os.replace(path, path + ".1")
        return is_locked


@contextmanager
def _locked(descriptor: int, kind: int) -> Iterator[bool]:
    """Lock the file while the block runs, without waiting; yield whether that succeeded."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        # Closing alone would leave it locked by a child that was forked meanwhile.
        fcntl.flock(descriptor, fcntl.LOCK_UN)


# Reading


def read_regular(path: str, limit: int, *, is_settled: bool = False) -> bytes | None:
    """Return a regular file's contents, None where there is nothing; never waits for what is there.

    Args:
        limit: the most bytes that are accepted.
        is_settled: wait until nobody is amid an `overwrite` of the file, for a second at most.

    Raises:
        OSError: a link (ELOOP), a directory (EISDIR), a fifo, socket or device (EINVAL), more than `limit` bytes
            (EFBIG), or not readable.
    """
    try:
        descriptor = os.open(path, _READ)
    except FileNotFoundError:
        return None
    except OSError as error:
        # Opening a socket says ENXIO, on some platforms EOPNOTSUPP.
        if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):
            raise OSError(errno.EINVAL, "Not a regular file", path) from error
        raise
    try:
        size = _require_regular(descriptor, path).st_size
        if is_settled:
            _await_settled(descriptor)
        data = _read_up_to(descriptor, size, limit + 1) if size <= limit else None
    finally:
        os.close(descriptor)
    if data is None or len(data) > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return data


def _read_up_to(descriptor: int, expected: int, most: int) -> bytes:
    """Read to the end of the file, whatever size it claimed, or until there are `most` bytes."""
    chunks: list[bytes] = []
    while most > 0 and (chunk := os.read(descriptor, min(expected + 1, _CHUNK_BYTES, most))):
        chunks.append(chunk)
        most -= len(chunk)
    return b"".join(chunks)


def _await_settled(descriptor: int) -> None:
    for _ in range(_SETTLING_TRIES):
        with _locked(descriptor, fcntl.LOCK_SH) as is_locked:
            if is_locked:
                return
        time.sleep(0.001)


def _require_regular(descriptor: int, path: str) -> os.stat_result:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", path)
    return status
