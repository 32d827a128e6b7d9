"""Files written whole or not at all, read without being trapped, and removed whatever they are.

Synchronous helpers, each meant to run in one thread hop. Paths are text and may hold undecodable bytes as surrogates
(`os.fsdecode`). What lies at a path may have been made by somebody hostile: no link is followed at the last component,
no fifo is waited for, no other mount is entered. Nothing here knows what the files mean.
"""
# Paths are text here: descriptors and directory descriptors are what this module is about, and pathlib has neither.
# ruff: noqa: PTH101, PTH103, PTH104, PTH105, PTH106, PTH108, PTH118, PTH119, PTH120

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
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK_BYTES: Final = 1024 * 1024
_REMOVAL_PASSES: Final = 8
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
    """Return whether a directory entry is one that `write_atomic` or `copy_preserving` makes and renames or removes.

    An old one was left by a process that was killed, and may be deleted.
    """
    return _TEMPORARY_NAME.fullmatch(name) is not None


def _unique() -> str:
    # The pid alone collides between threads, pid and counter between containers that share a volume.
    return f"{os.getpid()}-{next(_counter)}-{os.urandom(8).hex()}"


@contextmanager
def _replacement(path: str, mode: int) -> Iterator[int]:
    temporary = os.path.join(os.path.dirname(path), f".repopool-{_unique()}.tmp")
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


# Removing


def discard(path: str, trash: str) -> bool:
    """Rename whatever is at `path` into the directory `trash`, which is made where it is missing.

    Returns:
        False where there is nothing at `path`.

    Raises:
        OSError: it could not be renamed: another file system (EXDEV), something mounted there (EBUSY), no permission.
    """
    return move_to_trash(path, trash) is not None


def move_to_trash(path: str, trash: str) -> str | None:
    """Do as `discard`, and return the entry's new path; None where there is nothing at `path`."""
    entry = os.path.join(trash, _unique())
    for attempt in itertools.count():
        try:
            os.rename(path, entry)
        except FileNotFoundError:
            if not os.path.lexists(path):
                return None
            if attempt > 1:
                raise
            os.makedirs(trash, exist_ok=True)
        except PermissionError:
            # A directory that changes its parent must itself be writable, because its `..` changes.
            if attempt > 1 or not open_up(path):
                raise
        else:
            break
    return entry


def remove_tree(path: str) -> None:
    """Delete whatever is at `path`; what is absent is no error.

    No link is followed, directories that forbid it are opened up, depth is not limited, and what is mounted inside is
    neither entered nor removed. Everything that can go is gone also when this raises. Several processes may do so at
    once.

    Raises:
        OSError: the first thing that could not be deleted (EBUSY where something is mounted).
    """
    path = path.rstrip("/") or "/"
    mounts = mounts_below(path)
    for attempt in itertools.count(1):
        failure = _Removal(path, mounts).run()
        if failure is None:
            return
        # Somebody added entries or moved directories meanwhile: look again.
        if attempt == _REMOVAL_PASSES or failure.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ESTALE):
            raise failure


class _Removal:
    """One pass of `remove_tree`: holds one descriptor at a time, so depth costs neither descriptors nor recursion."""

    def __init__(self, path: str, mounts: frozenset[str]) -> None:
        self._path = path
        self._mounts = mounts
        self._failure: OSError | None = None
        self._descriptor = -1
        self._names: list[str] = []
        self._identities: list[tuple[int, int]] = []
        self._pending: list[list[str]] = []

    def run(self) -> OSError | None:
        """Remove what can be removed; return the first failure."""
        try:
            mode = os.lstat(self._path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            if not stat.S_ISDIR(mode):
                os.unlink(self._path)
            elif self._path in self._mounts:
                self._note(_busy())
            else:
                self._remove_directory()
        except (FileNotFoundError, NotADirectoryError):
            self._note(_stale())
        except OSError as error:
            self._note(error)
        return self._failure

    def _remove_directory(self) -> None:
        try:
            self._enter(_open_directory(self._path), self._path)
            while self._pending[-1] or len(self._pending) > 1:
                if self._pending[-1]:
                    self._descend(self._pending[-1].pop())
                else:
                    self._ascend()
        finally:
            if self._descriptor >= 0:
                os.close(self._descriptor)
        os.rmdir(self._path)

    def _enter(self, descriptor: int, name: str) -> None:
        """Make a directory the present one, and delete everything in it but the directories."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor
        self._names.append(name)
        self._identities.append(_identity(descriptor))
        self._pending.append([])
        try:
            with os.scandir(descriptor) as entries:
                listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except FileNotFoundError:
            return  # somebody else removed it meanwhile
        except OSError as error:
            self._note(error)
            return
        for entry_name, is_directory in listed:
            if is_directory:
                self._pending[-1].append(entry_name)
            else:
                self._unlink(entry_name)

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._descriptor)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            self._pending[-1].append(name)
        except OSError as error:
            self._note(error, name)

    def _descend(self, name: str) -> None:
        descriptor = -1
        try:
            if self._mounts and os.path.join(*self._names, name) in self._mounts:
                raise _busy()
            descriptor = _open_directory(name, self._descriptor)
            if _identity(descriptor)[0] != self._identities[-1][0]:
                raise _busy()
            # Another user's directory may let us in and not out again.
            os.close(os.open("..", _DIRECTORY, dir_fd=descriptor))
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            self._unlink(name)
        except OSError as error:
            self._note(error, name)
            if descriptor >= 0:
                os.close(descriptor)
        else:
            self._enter(descriptor, name)

    def _ascend(self) -> None:
        parent = os.open("..", _DIRECTORY, dir_fd=self._descriptor)
        os.close(self._descriptor)
        self._descriptor = parent
        name = self._names.pop()
        self._identities.pop()
        self._pending.pop()
        if _identity(parent) != self._identities[-1]:
            # The directory was moved while we were in it: nothing outside the tree may be touched.
            raise _stale()
        try:
            os.rmdir(name, dir_fd=parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._note(error, name)

    def _note(self, error: OSError, name: str = "") -> None:
        """Remember the first failure, with the whole path of what it is about."""
        if self._failure is None:
            path = os.path.join(*(self._names or [self._path]), name).rstrip("/")
            self._failure = OSError(error.errno, error.strerror, path)


def _busy() -> OSError:
    return OSError(errno.EBUSY, "Another file system is mounted there")


def _stale() -> OSError:
    return OSError(errno.ESTALE, "It was moved or replaced while it was being removed")


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _open_directory(name: str, parent: int | None = None) -> int:
    """Open a directory, with every right its owner can give himself."""
    try:
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    except PermissionError:
        if not open_up(name, parent):
            raise
        return os.open(name, _DIRECTORY, dir_fd=parent)
    _grant_owner(descriptor, os.fstat(descriptor).st_mode)
    return descriptor


def open_up(name: str, parent: int | None = None) -> bool:
    """Give a directory's owner the right to read, change and enter it; a link is not followed.

    Args:
        name: its path, relative to the directory `parent` (a descriptor) where one is given.

    Returns:
        Whether that changed anything: False where it is no directory, has the rights already, or is another user's.
    """
    if not hasattr(os, "O_PATH"):
        return _open_up_by_name(name, parent)
    try:
        descriptor = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError:
        return False
    try:
        # Such a descriptor refuses fchmod; its entry in /proc leads to the very inode, never through a link.
        return _grant_owner(descriptor, os.fstat(descriptor).st_mode, f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _open_up_by_name(name: str, parent: int | None) -> bool:
    with suppress(OSError, NotImplementedError):
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode) and mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(name, stat.S_IMODE(mode) | stat.S_IRWXU, dir_fd=parent, follow_symlinks=False)
            return True
    return False


def _grant_owner(descriptor: int, mode: int, where: str | None = None) -> bool:
    if mode & stat.S_IRWXU == stat.S_IRWXU:
        return False
    with suppress(OSError):
        os.chmod(where or descriptor, stat.S_IMODE(mode) | stat.S_IRWXU)
        return True
    return False


# Mounts

_NETWORK_TYPE: Final = r"""
    9p | acfs | afp | afs | beegfs | ceph | cifs | coda | davfs2? | exafs | gfs2? | glusterfs | gpfs | hdfs | lustre |
    ncpfs | nfs[34]? | ocfs2 | orangefs | pvfs2 | smb[23]? | smbfs | vboxsf | virtiofs | webdav |
    fuse\.( afp | afs | beegfs | blobfuse2? | ceph(-fuse)? | cifs | curlftpfs | davfs2? | gcsfuse | glusterfs | goofys |
    hdfs | juicefs | lizardfs | mfs | moosefs | mount-s3 | nfs | rclone | s3fs | seaweedfs | smbnetfs | sshfs )
"""


def is_network_file_system(path: str) -> bool:
    """Return whether `path`, or where it would be, lies on a network file system; False where nobody can say."""
    kind = file_system_type(path)
    return kind is not None and re.fullmatch(_NETWORK_TYPE, kind, re.VERBOSE) is not None


def file_system_type(path: str) -> str | None:
    """Return the name of the file system that `path` lies on, or would; None where nobody can say."""
    return _file_system_type(os.path.realpath(path), _mounts())


def _file_system_type(path: str, mounts: list[tuple[str, str]]) -> str | None:
    """Return the type of the mount that `path` lies on: the longest mount point, of several there the last."""
    found, length = None, 0
    for point, kind in mounts:
        if len(point) >= length and _is_within(path, point):
            found, length = kind, len(point)
    return found


def _is_within(path: str, point: str) -> bool:
    return path == point or path.startswith(point if point.endswith("/") else point + "/")


def mounts_below(path: str) -> frozenset[str]:
    """Return the mount points at or below `path`, as this path spells them."""
    points = [point for point, _ in _mounts()]
    parent = os.path.dirname(path)
    real = os.path.join(os.path.realpath(parent or "."), os.path.basename(path))
    return frozenset(path + point[len(real) :] for point in points if _is_within(point, real))


def _mounts() -> list[tuple[str, str]]:
    """Return mount points and file system types, in the order they were mounted; empty where there is no /proc."""
    try:
        descriptor = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        chunks = iter(lambda: os.read(descriptor, _CHUNK_BYTES), b"")
        return _parse_mounts(b"".join(chunks))
    finally:
        os.close(descriptor)


def _parse_mounts(text: bytes) -> list[tuple[str, str]]:
    mounts = []
    for line in text.splitlines():
        # id parent device root POINT options [optional fields] - TYPE source options
        front, _, back = line.partition(b" - ")
        fields = front.split(b" ")
        if len(fields) > 4 and back:
            mounts.append((os.fsdecode(_unescape(fields[4])), os.fsdecode(back.split(b" ")[0])))
    return mounts


def _unescape(field: bytes) -> bytes:
    # The kernel writes space, tab, newline and backslash as three octal digits.
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field) if b"\\" in field else field
