"""Opening directories inside a tree that somebody else filled, step by step, without ever being led outside.

Synchronous. Every directory is opened by name from its parent's descriptor, never through a link, on the root's device
only. What is done in a directory is its users' business.
"""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Self

from repopool_async._removal import open_up

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NO_NAMES: Final = frozenset(("", ".", ".."))
_KEPT: Final = 32
"""How many levels stay open: a planted tree may be deeper than there are descriptors."""


class Descent:
    """Opens one directory after the other; those above stay open for the next, most of which have them in common."""

    def __init__(self, root: str) -> None:
        self._levels = [open_root(root)]
        self._names: list[str] = []
        self._device = os.fstat(self._levels[0]).st_dev

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._rise(0)
        os.close(self._levels.pop())

    def to(self, directory: str) -> int | None:
        """Return a directory's descriptor, good until the next one is asked for.

        Args:
            directory: relative to the root, "" for that itself.

        Returns:
            None where a step is no real directory on the root's device.
        """
        parts = directory.split("/") if directory else []
        common = 0
        for name, part in zip(self._names, parts, strict=False):
            if name != part:
                break
            common += 1
        self._rise(common)
        if not NO_NAMES.isdisjoint(parts[common:]):
            return None
        return self._levels[-1] if all(self._step(part) for part in parts[common:]) else None

    def _step(self, name: str) -> bool:
        below = step(self._levels[-1], name)
        if below is None:
            return False
        if len(self._levels) > len(self._names) + 1:
            os.close(self._levels.pop())
        self._levels.append(below)
        if os.fstat(below).st_dev != self._device:
            self._rise(0)
            return False
        if len(self._names) < _KEPT:
            self._names.append(name)
        return True

    def _rise(self, count: int) -> None:
        """Close all but so many levels below the root."""
        while len(self._levels) > count + 1:
            os.close(self._levels.pop())
        del self._names[count:]


@contextlib.contextmanager
def opened(root: str, parts: Sequence[str]) -> Iterator[int | None]:
    """Open a directory inside the root step by step; None where a step is no real directory on the root's device."""
    with Descent(root) as descent:
        yield descent.to("/".join(parts))


def open_root(root: str) -> int:
    """Open the directory itself; a link to one is none."""
    try:
        return os.open(root, DIRECTORY)
    except OSError as error:
        if error.errno == errno.ELOOP:  # what some platforms say of a link
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), root) from error
        raise


def step(descriptor: int, name: str) -> int | None:
    """Open a directory by name; None where there is none, or something else."""
    try:
        return os.open(name, DIRECTORY, dir_fd=descriptor)
    except PermissionError:
        return os.open(name, DIRECTORY, dir_fd=descriptor) if open_up(name, descriptor) else None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def by_parent(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the last parts of names by the directory that they lie in, in the order in which these come first."""
    found: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition("/")
        found.setdefault(parent, []).append(last)
    return found
