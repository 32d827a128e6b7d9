"""Looking at a tree that somebody else filled, without ever being led outside.

Synchronous; for one thread hop each. Directories are opened as in `_descent`, so neither planted links nor paths longer
than the system allows nor any depth matter. Nothing is taken out here.
"""

# Paths are text here: directory descriptors are what this module is about, and pathlib has none.
# ruff: noqa: PTH102, PTH106, PTH118, PTH120

import array
import contextlib
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Collection, Iterable
from typing import Any, Final

import attrs

from repopool_async._aio import in_turn
from repopool_async._files import temporary_name
from repopool_async._mounts import mounts_below
from repopool_async._removal import open_up
from repopool_async.hosts._descent import DIRECTORY, Descent, by_parent, open_root, step
from repopool_async.hosts.base import Known, Settled, TreeInspection

_NAME_LIMIT: Final = 4096
"""Characters of a name worth reporting: neither git nor a lessee can say a longer one to the system."""
_GET_FLAGS: Final = 0x80086601 if sys.platform == "linux" else 0
_OWNERS_FLAGS: Final = 0x620380FF
"""The inode flags of `chattr` that somebody sets; the others say how the file system stores the inode."""
_KIND: Final = 0o170000


def inspect_tree(
    root: str,
    since_ns: int | None,
    settled: Settled | None = None,
    passed_over: Collection[str] = (),
    known: Known | None = None,
    *,
    beside: str | None = None,
) -> TreeInspection:
    """See `Host.inspect_tree`.

    What has too long a name is counted, and reported as its last directory whose name is not too long, in
    `changed_directories`.
    """
    inspection = Inspection(root, since_ns, settled, frozenset(passed_over), known, beside=beside)
    inspection.enter(inspection.begin())
    return inspection.result()


def find_unknown(root: str, directories: Iterable[str], known: Known) -> list[str]:
    """See `Host.find_unknown`."""
    found = []
    with Descent(root) as descent:
        for directory in directories:
            prefix = f"{directory}/" if directory else ""
            descriptor = descent.to(directory)
            names = [prefix + name for name in os.listdir(descriptor)] if descriptor is not None else []  # noqa: PTH208
            found += [name for name in names if not (known.has_file(name) or known.has_directory(name))]
    return [name for name in found if name != ".git"]


@attrs.define
class _Found:
    """What a `TreeInspection` tells, while it is being found."""

    entries: int = 0
    is_complete: bool = True
    changed: list[str] = attrs.field(factory=list)
    changed_directories: list[str] = attrs.field(factory=list)
    special: list[str] = attrs.field(factory=list)
    repositories: list[str] = attrs.field(factory=list)
    multiply_linked: list[str] = attrs.field(factory=list)
    unlocked: list[str] = attrs.field(factory=list)
    mounts: list[str] = attrs.field(factory=list)
    irregular: list[str] = attrs.field(factory=list)
    unknown: list[str] = attrs.field(factory=list)


class Inspection:
    """One pass. Holds descriptors of a directory and one in it, whatever the depth; goes up again by `..`."""

    def __init__(
        self,
        root: str,
        since_ns: int | None,
        settled: Settled | None,
        passed_over: frozenset[str] = frozenset(),
        known: Known | None = None,
        *,
        beside: str | None = None,
    ) -> None:
        self._found = _Found()
        self._root = root
        self._passed_over = passed_over
        self._known = known
        self._since_ns = since_ns
        self._settled = settled or Settled(0, frozenset())
        self._device = 0
        self._mounted = frozenset(os.path.relpath(point, root) for point in mounts_below(root))
        self._to_compare: set[str] = set()
        self._beside = beside or root
        self._fresh: Particulars | None = None

    def begin(self) -> list[str]:
        """Look at the root itself and its entries; return those to be entered."""
        if open_up(self._root):
            self._found.unlocked.append(".")
        descriptor = open_root(self._root)
        try:
            self._device = os.fstat(descriptor).st_dev
            self._compare(descriptor, ".")
            return self._scan(descriptor, "")
        finally:
            os.close(descriptor)

    def enter(self, directories: Iterable[str]) -> None:
        """Look at everything in some directories, of which only their own entry has been looked at."""
        with Descent(self._root) as descent:
            for parent, names in by_parent(directories).items():
                with in_turn:
                    descriptor = descent.to(parent)
                    if descriptor is not None:
                        self._walk(os.dup(descriptor), f"{parent}/" if parent else "", names)

    def look_at(self, names: Iterable[str], seen: Collection[str]) -> list[str]:
        """Look at some entries, and at those of the directories among them; return which of these are to be entered.

        Args:
            seen: directories that have been looked at themselves, as entries of what they lie in.
        """
        pending = []
        with Descent(self._root) as descent:
            for parent, entries in by_parent(names).items():
                prefix = f"{parent}/" if parent else ""
                with in_turn:
                    descriptor = descent.to(parent)
                    for name in entries if descriptor is not None else ():
                        assert descriptor is not None
                        if prefix + name in seen or self._look(_Named(name, descriptor), prefix, descriptor):
                            pending += self._look_into(name, prefix, descriptor)
        return pending

    def _look_into(self, name: str, prefix: str, descriptor: int) -> list[str]:
        child = self._open(descriptor, name, prefix)
        if child is None:
            return []
        try:
            if prefix + name in self._to_compare:
                self._compare(child, prefix + name)
            return [f"{prefix}{name}/{below}" for below in self._scan(child, f"{prefix}{name}/")]
        finally:
            os.close(child)

    def result(self) -> TreeInspection:
        """Return what has been found."""
        found: dict[str, Any] = attrs.asdict(self._found, recurse=False)
        lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        return TreeInspection(**(found | lists))

    def _walk(self, descriptor: int, prefix: str, pending: list[str]) -> None:
        """Go through directories of an open one, whose descriptor is closed in the end."""
        try:
            levels = [_Level(prefix, os.fstat(descriptor), pending)]
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
        if name not in self._found.changed_directories[-1:]:
            self._found.changed_directories.append(name)

    def _scan(self, descriptor: int, prefix: str) -> list[str]:
        """Look at a directory's entries; return those to be entered."""
        if len(prefix) > _NAME_LIMIT:
            with os.scandir(descriptor) as entries:
                return [entry.name for entry in entries if self._look_briefly(entry, prefix, descriptor)]
        if self._known is not None:
            return self._scan_known(descriptor, prefix, self._known)
        with os.scandir(descriptor) as entries:
            return [entry.name for entry in entries if self._look(entry, prefix, descriptor)]

    def _scan_known(self, descriptor: int, prefix: str, known: Known) -> list[str]:
        """Do as `_scan` where it is known what belongs there, wasting no time on what is just that."""
        directory = prefix[:-1]
        files = known.files[directory]
        present, pending = 0, []
        with os.scandir(descriptor) as entries:
            for entry in entries:
                is_file = entry.name in files
                present += is_file
                if is_file and self._is_plainly_unchanged(entry):
                    self._found.entries += 1
                elif self._look(entry, prefix, descriptor):
                    pending.append(entry.name)
        if present < len(files) or len(pending) < len(known.directories[directory]):
            self._found.is_complete = False
        return pending

    def _is_plainly_unchanged(self, entry: os.DirEntry[str]) -> bool:
        """Return whether an entry is what most are: a file that nobody touched, of which there is nothing to say."""
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (
            self._since_ns is not None
            and status.st_ctime_ns < self._since_ns
            and status.st_nlink == 1
            and status.st_mode & _KIND == stat.S_IFREG
            and not self._mounted
        )

    def _look(self, entry: "os.DirEntry[str] | _Named", prefix: str, descriptor: int) -> bool:
        """Note what there is to be said of an entry; return whether it is to be entered."""
        name = prefix + entry.name
        if entry.name == ".git":
            if prefix:
                self._found.entries += 1
                self._found.repositories.append(name)
            return False
        if self._mounted and name in self._mounted:
            # Not even looked at: some file systems never answer.
            self._found.entries += 1
            self._found.mounts.append(name)
            return False
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return False
        self._found.entries += 1
        is_directory = stat.S_ISDIR(status.st_mode)
        if self._known is not None and not self._belongs(name, self._known, is_directory=is_directory):
            return False
        if is_directory:
            return self._look_at_directory(entry.name, name, status, descriptor)
        self._look_at_file(name, status)
        return False

    def _look_at_file(self, name: str, status: os.stat_result) -> None:
        if self._is_changed(name, status):
            self._found.changed.append(name)
        if not stat.S_ISREG(status.st_mode):
            if not stat.S_ISLNK(status.st_mode):
                self._found.special.append(name)
        elif status.st_nlink > 1:
            self._found.multiply_linked.append(name)

    def _belongs(self, name: str, known: Known, *, is_directory: bool) -> bool:
        """Return whether something belongs there; note what does not, and what is mounted in it."""
        if is_directory and known.has_directory(name):
            return True
        if not is_directory and known.has_file(name):
            return True
        if known.has_directory(name) or known.has_file(name):
            self._found.is_complete = False  # something of another kind is in its place
        self._found.unknown.append(name)
        self._found.mounts += [point for point in self._mounted if point.startswith(f"{name}/")]
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
            self._found.mounts.append(name)
            return False
        if name in self._passed_over:
            self._look_at_passed_over(entry_name, name, descriptor)
            return False
        if self._is_changed(name, status):
            self._found.changed_directories.append(name)
            self._to_compare.add(name)
        if status.st_mode & stat.S_IRWXU != stat.S_IRWXU and open_up(entry_name, descriptor):
            self._found.unlocked.append(name)
        return True

    def _look_at_passed_over(self, entry_name: str, name: str, parent: int) -> None:
        """Note a directory that is not entered, where it is not as a new one or something is mounted in it."""
        self._found.mounts += [point for point in self._mounted if point.startswith(f"{name}/")]
        child = step(parent, entry_name)
        if child is None:
            self._found.changed.append(name)
            return
        try:
            self._compare(child, name)
        finally:
            os.close(child)

    def _compare(self, descriptor: int, name: str) -> None:
        """Note a directory that is not as a new one would be."""
        if self._fresh is None:
            self._fresh = fresh_directory(os.path.dirname(self._beside))
        if particulars(descriptor) != self._fresh:
            self._found.irregular.append(name)

    def _look_briefly(self, entry: os.DirEntry[str], _prefix: str, descriptor: int) -> bool:
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return False
        self._found.entries += 1
        if not stat.S_ISDIR(status.st_mode) or status.st_dev != self._device:
            return False
        if status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            open_up(entry.name, descriptor)
        return True

    def _open(self, descriptor: int, name: str, prefix: str) -> int | None:
        try:
            return os.open(name, DIRECTORY, dir_fd=descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):  # replaced since it was looked at
                self._found.changed.append(prefix + name)
                return None
            raise OSError(error.errno, error.strerror, os.path.join(self._root, prefix + name)) from error


Particulars = tuple[int, int, int, int, tuple[tuple[str, bytes], ...]]


def fresh_directory(parent: str) -> Particulars:
    """Say what a new directory is like: umask, default access lists, inherited groups and flags included."""
    path = os.path.join(parent, temporary_name())
    os.mkdir(path)
    try:
        descriptor = os.open(path, DIRECTORY)
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
class _Named:
    """As much of an `os.DirEntry` as is looked at, for an entry whose name somebody else found."""

    name: str
    _descriptor: int

    def stat(self, *, follow_symlinks: bool) -> os.stat_result:
        return os.stat(self.name, dir_fd=self._descriptor, follow_symlinks=follow_symlinks)


@attrs.frozen
class _Level:
    prefix: str
    status: os.stat_result
    pending: list[str]


def _ascend(descriptor: int, level: _Level, root: str) -> int:
    """Exchange a directory's descriptor for its parent's."""
    parent = os.open("..", DIRECTORY, dir_fd=descriptor)
    if not os.path.samestat(os.fstat(parent), level.status):
        os.close(parent)
        raise OSError(
            errno.ESTALE, "A directory was moved while it was being inspected", os.path.join(root, level.prefix)
        )
    os.close(descriptor)
    return parent
