"""Taking entries out of a tree that somebody else filled, without ever being led outside.

Synchronous; for one thread hop. Which entries go is decided elsewhere; deleting what lies in the trash is the business
of `_removal`.
"""

# Paths are text here: directory descriptors are what this module is about, and pathlib has none.
# ruff: noqa: PTH102, PTH103, PTH118, PTH120

import contextlib
import errno
import itertools
import os
import stat
import uuid
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Final

from repopool_async._files import temporary_name
from repopool_async._removal import discard, open_up
from repopool_async.hosts._descent import DIRECTORY, NO_NAMES, Descent, by_parent

MANY: Final = 500
"""From how many entries on files are moved to the trash, too: to free what they occupy takes longer than the rest."""
_ATTEMPTS: Final = 3

_Dispose = Callable[[int, str], None]
"""Takes an entry out of a directory."""


def remove_entries(root: str, names: Collection[str], trash: str) -> int:
    """See `Host.remove_entries`."""
    found = by_parent(name.rstrip("/") for name in names)
    unlink: _Dispose = partial(_unlink, trash)
    disposing = _moving(trash, unlink) if len(names) >= MANY else contextlib.nullcontext(unlink)
    with disposing as dispose, Descent(root) as descent:
        return sum(_remove(descent.to(parent), entries, dispose) for parent, entries in found.items())


def _remove(parent: int | None, names: Collection[str], dispose: _Dispose) -> int:
    if parent is None:
        return 0
    return sum(_remove_entry(parent, name, dispose) for name in names if name not in NO_NAMES)


def _remove_entry(parent: int, name: str, dispose: _Dispose) -> bool:
    """Dispose of an entry; return whether there was one."""
    for attempt in itertools.count():
        try:
            dispose(parent, name)
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


def _unlink(trash: str, parent: int, name: str) -> None:
    """Unlink an entry, or move it to the trash where it is a directory."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=parent)
        return
    entry = os.path.join(trash, uuid.uuid4().hex)
    try:
        os.rename(name, entry, src_dir_fd=parent)
    except FileNotFoundError:
        os.makedirs(trash, exist_ok=True)
        os.rename(name, entry, src_dir_fd=parent)


@contextlib.contextmanager
def _moving(trash: str, unlink: _Dispose) -> Iterator[_Dispose]:
    """Move entries to one directory, which goes to the trash in the end: what lies there may be deleted any moment."""
    path = os.path.join(os.path.dirname(trash), temporary_name())
    os.mkdir(path)
    try:
        with _opened(path) as aside:
            yield partial(_move, aside, itertools.count(), unlink)
    finally:
        discard(path, trash)


def _move(aside: int, numbers: Iterator[int], unlink: _Dispose, parent: int, name: str) -> None:
    try:
        os.rename(name, str(next(numbers)), src_dir_fd=parent, dst_dir_fd=aside)
    except OSError as error:
        if error.errno != errno.EXDEV:  # as where parts of a file system have quotas of their own
            raise
        unlink(parent, name)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
