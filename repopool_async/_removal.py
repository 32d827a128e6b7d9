"""Files and directories removed whatever they are: at once out of sight, or for good.

Synchronous helpers, each meant to run in one thread hop. What lies at a path may have been made by somebody hostile: no
link is followed, no other mount is entered. Whether something may go is not decided here.
"""
# Paths are text here: descriptors and directory descriptors are what this module is about, and pathlib has neither.
# ruff: noqa: PTH101, PTH103, PTH104, PTH106, PTH108, PTH118

import errno
import itertools
import os
import stat
from contextlib import suppress
from typing import Final

from repopool_async._files import unique_name
from repopool_async._mounts import mounts_below

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_REMOVAL_PASSES: Final = 8
_LARGE: Final = 2000


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
    entry = os.path.join(trash, unique_name())
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


def is_large(path: str) -> bool:
    """Return whether there is much at a path, and nothing mounted: worth a program of its own that takes its time."""
    if mounts_below(path):
        return False
    seen = 0
    pending = [path]
    while pending and seen < _LARGE:
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                seen += 1
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return seen >= _LARGE


def remove_unless_large(path: str) -> bool:
    """Do as `remove_tree` where there is not much; return whether that was so."""
    if is_large(path):
        return False
    remove_tree(path)
    return True


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
