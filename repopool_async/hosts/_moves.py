"""Moving whole directories out of a tree that somebody else filled, and into one, without being led outside.

Synchronous; for one thread hop each. Only what is an ordinary directory moves, reached through nothing but ordinary
directories; its contents are neither looked at nor changed, so their number does not matter. Which directories are
moved, and where to, is decided elsewhere.
"""

# Paths are text here: directory descriptors are what this module is about, and pathlib has none.
# ruff: noqa: PTH103, PTH112, PTH114, PTH118, PTH120

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from repopool_async._mounts import mounts_below
from repopool_async._removal import open_up
from repopool_async.hosts._descent import opened, step
from repopool_async.hosts._tree import Particulars, fresh_directory, particulars

_ANY_MODE: Final = 0o777
_NOT_TO_BE_MOVED: Final = (errno.EPERM, errno.EACCES, errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST)


def move_directories(source: str, target: str, names: Iterable[str]) -> tuple[str, ...]:
    """See `Host.move_directories`."""
    if os.path.islink(source) or not os.path.isdir(source):
        return ()
    open_up(source)
    mounts = mounts_below(source)
    fresh = fresh_directory(os.path.dirname(source))
    free = [name for name in names if not _holds_mount(source, name, mounts)]
    return tuple(name for name in free if _move(source, target, name, fresh))


def _holds_mount(source: str, name: str, mounts: Iterable[str]) -> bool:
    path = os.path.join(source, name)
    return any(point == path or point.startswith(f"{path}/") for point in mounts)


def _move(source: str, target: str, name: str, fresh: Particulars) -> bool:
    *parents, last = name.split("/")
    with _opened_directory(source, parents) as origin:
        if origin is None or not _is_ordinary(origin, last, fresh):
            return False
        with _made(target, parents) as destination:
            return destination is not None and not _exists(last, destination) and _rename(last, origin, destination)


@contextlib.contextmanager
def _opened_directory(root: str, parts: Sequence[str]) -> Iterator[int | None]:
    try:
        context = contextlib.ExitStack()
        descriptor = context.enter_context(opened(root, parts))
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    with context:
        yield descriptor


def _is_ordinary(parent: int, name: str, fresh: Particulars) -> bool:
    """Return whether an entry is a directory as a new one would be; its mode is made so where it is not."""
    try:
        descriptor = step(parent, name)
    except PermissionError:
        return False
    if descriptor is None:
        return False
    try:
        found = particulars(descriptor)
        is_ordinary = found[1:] == fresh[1:] and os.fstat(descriptor).st_dev == os.fstat(parent).st_dev
        if is_ordinary and found[0] != fresh[0]:
            os.fchmod(descriptor, stat.S_IMODE(fresh[0]))
    finally:
        os.close(descriptor)
    return is_ordinary


@contextlib.contextmanager
def _made(root: str, parts: Sequence[str]) -> Iterator[int | None]:
    """Open a directory below the root, making what is missing on the way; None where something else is in the way."""
    os.makedirs(root, exist_ok=True)
    for count in range(1, len(parts) + 1):
        with opened(root, parts[: count - 1]) as above:
            if above is None:
                break
            with contextlib.suppress(FileExistsError):
                os.mkdir(parts[count - 1], _ANY_MODE, dir_fd=above)
    with opened(root, parts) as descriptor:
        yield descriptor


def _exists(name: str, parent: int) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _rename(name: str, origin: int, destination: int) -> bool:
    open_up(".", origin)
    try:
        os.rename(name, name, src_dir_fd=origin, dst_dir_fd=destination)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in _NOT_TO_BE_MOVED:
            return False
        raise
    return True
