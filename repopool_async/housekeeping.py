"""What killed processes leave in a workspaces directory besides slots: temporary files and trees, records set aside.

Synchronous, each function for one thread hop. What something is follows from its name, how old it is from its ctime,
which neither renaming nor a lessee can set back. Who may be using it is the caller's question: `LeftOver.lock_id` names
the lock that its maker would hold.
"""
# Paths are text here, as in `_files`.
# ruff: noqa: PTH118, PTH208

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import attrs

from repopool_async import _files, _removal
from repopool_async.models import make_slot_id

TEMPORARY_SECONDS: Final = 3600.0
"""A temporary file is written in moments; one of this age is nobody's any more."""
CORRUPT_DAYS: Final = 30.0
"""How long a record that could not be read is kept for people to look at."""

_CORRUPT: Final = re.compile(r".+\.corrupt-[0-9TZ.]+")
_SLOT_NAME: Final = re.compile(r"slot([1-9][0-9]{0,17})")


@attrs.frozen
class LeftOver:
    """Something that nobody will use again.

    Attributes:
        kind: `temporary`, `mirror`, `tree` or `corrupt`.
        lock_id: the lock whose holder may still be making it; None where its age alone says that nobody is.
    """

    path: str
    kind: str
    age_seconds: float
    lock_id: str | None = None


def left_overs(root: str, repo_name: str) -> list[LeftOver]:
    """Return what killed processes left in a pool's directory and may be deleted."""
    pool = os.path.join(root, repo_name)
    found = [*_pool_left_overs(pool, repo_name)]
    slots = os.path.join(pool, "slots")
    for name in _names(slots):
        match = _SLOT_NAME.fullmatch(name)
        if match is not None:
            found += _slot_left_overs(os.path.join(slots, name), make_slot_id(repo_name, int(match[1])))
    return [one for one in found if one.age_seconds > _patience(one.kind)]


def remove(left_over: LeftOver) -> None:
    """Delete it, whatever it is; what is gone already is no error. Raises OSError as `remove_tree`."""
    _removal.remove_tree(left_over.path)


def total_size(path: str) -> int:
    """Return roughly how many bytes of disk lie below a directory; what vanishes meanwhile does not count."""
    total = 0
    pending = [path]
    seen: set[tuple[int, int]] = set()
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                total += _size(entry, pending, seen)
    return total


def _size(entry: "os.DirEntry[str]", pending: list[str], seen: set[tuple[int, int]]) -> int:
    try:
        status = entry.stat(follow_symlinks=False)
        if entry.is_dir(follow_symlinks=False):
            pending.append(entry.path)
    except OSError:
        return 0
    identity = (status.st_dev, status.st_ino)
    if status.st_nlink > 1 and identity in seen:
        return 0
    seen.add(identity)
    return status.st_blocks * 512


def _pool_left_overs(pool: str, repo_name: str) -> Iterator[LeftOver]:
    for directory in (pool, os.path.join(pool, "mirror.git"), os.path.join(pool, "mirror.git", "repopool")):
        yield from _temporaries(directory)
    for name in _names(pool):
        path = os.path.join(pool, name)
        if name.startswith("mirror.git.tmp-"):
            yield LeftOver(path, "mirror", _age(path), f"mirror-{repo_name}")
        # Without its successor, what was set aside is what tells that there is a pool at all.
        elif _CORRUPT.fullmatch(name) and os.path.lexists(os.path.join(pool, "pool.json")):
            yield LeftOver(path, "corrupt", _age(path))


def _slot_left_overs(directory: str, slot_id: str) -> Iterator[LeftOver]:
    yield from _temporaries(directory)
    for name in _names(directory):
        path = os.path.join(directory, name)
        if name.startswith("tree.new-"):
            yield LeftOver(path, "tree", _age(path), slot_id)
        elif _CORRUPT.fullmatch(name):
            yield LeftOver(path, "corrupt", _age(path))


def _temporaries(directory: str) -> Iterator[LeftOver]:
    for name in _names(directory):
        if _files.is_temporary_name(name):
            path = os.path.join(directory, name)
            yield LeftOver(path, "temporary", _age(path))


def _patience(kind: str) -> float:
    return CORRUPT_DAYS * 86400 if kind == "corrupt" else TEMPORARY_SECONDS


def _age(path: str) -> float:
    try:
        return max(0.0, time.time() - os.lstat(path).st_ctime)
    except OSError:
        return 0.0


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []
