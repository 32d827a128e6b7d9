"""Looking at a tree that somebody else filled, and taking entries out of it, without ever being led outside.

Synchronous; for one thread hop each. Every directory is opened by name from its parent's descriptor, never through a
link, so neither planted links nor paths longer than the system allows nor any depth matter. Deleting whole trees is the
business of `_removal`.
"""

# Paths are text here: directory descriptors are what this module is about, and pathlib has none.
# ruff: noqa: PTH102, PTH103, PTH106, PTH118, PTH120

import array
import contextlib
import errno
import fcntl
import itertools
import os
import stat
import sys
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

import attrs

from repopool_async._mounts import mounts_below
from repopool_async._removal import open_up
from repopool_async.hosts.base import Settled, TreeInspection

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME_LIMIT: Final = 4096
"""Characters of a name worth reporting: neither git nor a lessee can say a longer one to the system."""
_NO_NAMES: Final = frozenset(("", ".", ".."))
_ATTEMPTS: Final = 3
_GET_FLAGS: Final = 0x80086601 if sys.platform == "linux" else 0
_OWNERS_FLAGS: Final = 0x620380FF
"""The inode flags of `chattr` that somebody sets; the others say how the file system stores the inode."""


def inspect_tree(
    root: str, since_ns: int | None, settled: Settled | None = None, passed_over: Collection[str] = ()
) -> TreeInspection:
    """See `Host.inspect_tree`.

    What has too long a name is counted, and reported as its last directory whose name is not too long, in
    `changed_directories`.
    """
    return _Inspection(root, since_ns, settled or Settled(0, frozenset()), frozenset(passed_over)).run()


class _Inspection:
    """One pass. Holds descriptors of a directory and one in it, whatever the depth; goes up again by `..`."""

    def __init__(self, root: str, since_ns: int | None, settled: Settled, passed_over: frozenset[str]) -> None:
        self._root = root
        self._passed_over = passed_over
        self._since_ns = since_ns
        self._settled = settled
        self._device = 0
        self._mounted = frozenset(os.path.relpath(point, root) for point in mounts_below(root))
        self._entries = 0
        self._changed: list[str] = []
        self._changed_directories: list[str] = []
        self._special: list[str] = []
        self._repositories: list[str] = []
        self._multiply_linked: list[str] = []
        self._unlocked: list[str] = []
        self._mounts: list[str] = []
        self._irregular: list[str] = []
        self._to_compare: set[str] = set()
        self._fresh: Particulars | None = None

    def run(self) -> TreeInspection:
        if open_up(self._root):
            self._unlocked.append(".")
        self._walk(_open_root(self._root))
        return TreeInspection(
            entries=self._entries,
            changed=tuple(self._changed),
            changed_directories=tuple(self._changed_directories),
            special=tuple(self._special),
            repositories=tuple(self._repositories),
            multiply_linked=tuple(self._multiply_linked),
            unlocked=tuple(self._unlocked),
            mounts=tuple(self._mounts),
            irregular=tuple(self._irregular),
        )

    def _walk(self, descriptor: int) -> None:
        try:
            status = os.fstat(descriptor)
            self._device = status.st_dev
            self._compare(descriptor, ".")
            levels = [_Level("", status, self._scan(descriptor, ""))]
            while levels:
                if levels[-1].pending:
                    descriptor = self._visit(descriptor, levels)
                    continue
                levels.pop()
                if levels:
                    descriptor = _ascend(descriptor, levels[-1], self._root)
        finally:
            os.close(descriptor)

    def _visit(self, descriptor: int, levels: list["_Level"]) -> int:
        """Scan the next directory in the present one; step into it if it has directories itself."""
        level = levels[-1]
        name = level.pending.pop()
        prefix = self._prefix(level.prefix, name)
        child = self._open(descriptor, name, level.prefix)
        if child is None:
            return descriptor
        left = child
        try:
            if prefix[:-1] in self._to_compare:
                self._compare(child, prefix[:-1])
            pending = self._scan(child, prefix)
            if pending:
                levels.append(_Level(prefix, os.fstat(child), pending))
                descriptor, left = child, descriptor
        finally:
            os.close(left)
        return descriptor

    def _prefix(self, above: str, name: str) -> str:
        # Beyond the limit it no longer grows: a planted tree could make its names fill the memory.
        if len(above) > _NAME_LIMIT:
            return above
        if len(above) + len(name) > _NAME_LIMIT:
            self._note_too_deep(above[:-1])
        return f"{above}{name}/"

    def _note_too_deep(self, name: str) -> None:
        if name not in self._changed_directories[-1:]:
            self._changed_directories.append(name)

    def _scan(self, descriptor: int, prefix: str) -> list[str]:
        """Look at a directory's entries; return those to be entered."""
        look = self._look if len(prefix) <= _NAME_LIMIT else self._look_briefly
        with os.scandir(descriptor) as entries:
            return [entry.name for entry in entries if look(entry, prefix, descriptor)]

    def _look(self, entry: os.DirEntry[str], prefix: str, descriptor: int) -> bool:
        """Note what there is to be said of an entry; return whether it is to be entered."""
        name = prefix + entry.name
        if entry.name == ".git":
            if prefix:
                self._entries += 1
                self._repositories.append(name)
            return False
        if self._mounted and name in self._mounted:
            # Not even looked at: some file systems never answer.
            self._entries += 1
            self._mounts.append(name)
            return False
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return False
        self._entries += 1
        if stat.S_ISDIR(status.st_mode):
            return self._look_at_directory(entry.name, name, status, descriptor)
        if self._is_changed(name, status):
            self._changed.append(name)
        if not stat.S_ISREG(status.st_mode):
            if not stat.S_ISLNK(status.st_mode):
                self._special.append(name)
        elif status.st_nlink > 1:
            self._multiply_linked.append(name)
        return False

    def _is_changed(self, name: str, status: os.stat_result) -> bool:
        if self._since_ns is None:
            return True
        changed_ns = status.st_ctime_ns
        return changed_ns >= self._since_ns and (
            changed_ns >= self._settled.since_ns or name not in self._settled.names
        )

    def _look_at_directory(self, entry_name: str, name: str, status: os.stat_result, descriptor: int) -> bool:
        if status.st_dev != self._device:
            self._mounts.append(name)
            return False
        if name in self._passed_over:
            self._look_at_passed_over(entry_name, name, descriptor)
            return False
        if self._is_changed(name, status):
            self._changed_directories.append(name)
            self._to_compare.add(name)
        if status.st_mode & stat.S_IRWXU != stat.S_IRWXU and open_up(entry_name, descriptor):
            self._unlocked.append(name)
        return True

    def _look_at_passed_over(self, entry_name: str, name: str, parent: int) -> None:
        """Note a directory that is not entered, where it is not as a new one or something is mounted in it."""
        self._mounts += [point for point in self._mounted if point.startswith(f"{name}/")]
        child = step(parent, entry_name)
        if child is None:
            self._changed.append(name)
            return
        try:
            self._compare(child, name)
        finally:
            os.close(child)

    def _compare(self, descriptor: int, name: str) -> None:
        """Note a directory that is not as a new one would be."""
        if self._fresh is None:
            self._fresh = fresh_directory(os.path.dirname(self._root))
        if particulars(descriptor) != self._fresh:
            self._irregular.append(name)

    def _look_briefly(self, entry: os.DirEntry[str], _prefix: str, descriptor: int) -> bool:
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return False
        self._entries += 1
        if not stat.S_ISDIR(status.st_mode) or status.st_dev != self._device:
            return False
        if status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            open_up(entry.name, descriptor)
        return True

    def _open(self, descriptor: int, name: str, prefix: str) -> int | None:
        try:
            return os.open(name, _DIRECTORY, dir_fd=descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):  # replaced since it was looked at
                self._changed.append(prefix + name)
                return None
            raise OSError(error.errno, error.strerror, os.path.join(self._root, prefix + name)) from error


def _open_root(root: str) -> int:
    try:
        return os.open(root, _DIRECTORY)
    except OSError as error:
        if error.errno == errno.ELOOP:  # what some platforms say of a link
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), root) from error
        raise


Particulars = tuple[int, int, int, int, tuple[tuple[str, bytes], ...]]


def fresh_directory(parent: str) -> Particulars:
    """Say what a new directory is like: umask, default access lists, inherited groups and flags included."""
    path = os.path.join(parent, f".repopool-{uuid.uuid4().hex}")
    os.mkdir(path)
    try:
        descriptor = os.open(path, _DIRECTORY)
        try:
            return particulars(descriptor)
        finally:
            os.close(descriptor)
    finally:
        os.rmdir(path)


def particulars(descriptor: int) -> Particulars:
    """Say what an inode carries besides its contents, as far as its owner could have changed it."""
    status = os.fstat(descriptor)
    names = sorted(os.listxattr(descriptor)) if hasattr(os, "listxattr") else []
    attributes = tuple((name, os.getxattr(descriptor, name)) for name in names)
    return status.st_mode, status.st_uid, status.st_gid, _flags(descriptor), attributes


def _flags(descriptor: int) -> int:
    flags = array.array("l", [0])
    # Not every file system has any.
    with contextlib.suppress(OSError):
        fcntl.ioctl(descriptor, _GET_FLAGS, flags, True)
    return flags[0] & _OWNERS_FLAGS


@attrs.frozen
class _Level:
    prefix: str
    status: os.stat_result
    pending: list[str]


def _ascend(descriptor: int, level: _Level, root: str) -> int:
    """Exchange a directory's descriptor for its parent's."""
    parent = os.open("..", _DIRECTORY, dir_fd=descriptor)
    if not os.path.samestat(os.fstat(parent), level.status):
        os.close(parent)
        raise OSError(
            errno.ESTALE, "A directory was moved while it was being inspected", os.path.join(root, level.prefix)
        )
    os.close(descriptor)
    return parent


def remove_entries(root: str, names: Iterable[str], trash: str) -> int:
    """See `Host.remove_entries`."""
    by_parent: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rstrip("/").rpartition("/")
        if last not in _NO_NAMES:
            by_parent.setdefault(parent, []).append(last)
    removed = 0
    for parent, entries in by_parent.items():
        with opened(root, parent.split("/") if parent else ()) as descriptor:
            if descriptor is not None:
                removed += sum(_remove_entry(descriptor, name, trash) for name in entries)
    return removed


@contextlib.contextmanager
def opened(root: str, parts: Sequence[str]) -> Iterator[int | None]:
    """Open a directory inside the root step by step; None where a step is no real directory on the root's device."""
    descriptor = _open_root(root)
    try:
        device = os.fstat(descriptor).st_dev
        is_inside = _NO_NAMES.isdisjoint(parts)
        for part in parts if is_inside else ():
            below = step(descriptor, part)
            if below is None:
                is_inside = False
                break
            os.close(descriptor)
            descriptor = below
            is_inside = is_inside and os.fstat(descriptor).st_dev == device
        yield descriptor if is_inside else None
    finally:
        os.close(descriptor)


def step(descriptor: int, name: str) -> int | None:
    try:
        return os.open(name, _DIRECTORY, dir_fd=descriptor)
    except PermissionError:
        return os.open(name, _DIRECTORY, dir_fd=descriptor) if open_up(name, descriptor) else None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _remove_entry(parent: int, name: str, trash: str) -> bool:
    """Unlink an entry, or move it to the trash where it is a directory; return whether there was one."""
    for attempt in itertools.count():
        try:
            if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                _move_to_trash(parent, name, trash)
            else:
                os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            return False
        except (IsADirectoryError, NotADirectoryError):  # exchanged since it was looked at
            if attempt > _ATTEMPTS:
                raise
        except PermissionError:
            # The parent may be closed, or the directory itself: it must be writable, because its `..` changes.
            if attempt > _ATTEMPTS or not (open_up(".", parent) or open_up(name, parent)):
                raise
        else:
            return True
    raise AssertionError


def _move_to_trash(parent: int, name: str, trash: str) -> None:
    entry = os.path.join(trash, uuid.uuid4().hex)
    try:
        os.rename(name, entry, src_dir_fd=parent)
    except FileNotFoundError:
        os.makedirs(trash, exist_ok=True)
        os.rename(name, entry, src_dir_fd=parent)
