"""Giving files to a user, one path or a whole tree that we have just made, and taking them from all users.

Synchronous; for one thread hop each. No link is followed.
"""
# ruff: noqa: PTH208 - descriptors are what this module is about

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterator
from typing import Final

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def set_access(path: str, uid: int, gid: int, mode: int) -> None:
    """Set owner, group and permissions of a file or directory; a link or special file is refused."""
    descriptor = os.open(path, _PATH)
    try:
        status = os.fstat(descriptor)
        if (status.st_uid, status.st_gid) != (uid, gid):
            os.fchown(descriptor, uid, gid)
        if stat.S_IMODE(status.st_mode) != mode:
            os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def close_entries(directory: str, spared: Collection[str]) -> None:
    """Make the files and directories in a directory root's alone; what goes meanwhile is passed over."""
    for entry in sorted({*os.listdir(directory)} - {*spared}):
        path = f"{directory}/{entry}"
        with contextlib.suppress(FileNotFoundError):
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
                _close(path, 0o700 if stat.S_ISDIR(mode) else 0o600)


def _close(path: str, mode: int) -> None:
    try:
        set_access(path, 0, 0, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link has come in its place
            raise


def give_tree(root: str, uid: int, gid: int) -> None:
    """Give a directory and all that is in it to a user; what is that user's already is not touched."""
    top = os.open(root, _DIRECTORY)
    try:
        _give(top, ".", os.fstat(top), uid, gid)
        pending = ["."]
        while pending:
            pending += _give_entries(top, pending.pop(), uid, gid)
    finally:
        os.close(top)


def _give_entries(top: int, name: str, uid: int, gid: int) -> Iterator[str]:
    descriptor = os.open(name, _DIRECTORY, dir_fd=top)
    try:
        for entry in sorted(os.listdir(descriptor)):
            status = os.stat(entry, dir_fd=descriptor, follow_symlinks=False)
            _give(descriptor, entry, status, uid, gid)
            if stat.S_ISDIR(status.st_mode):
                yield f"{name}/{entry}"
    finally:
        os.close(descriptor)


def _give(descriptor: int, name: str, status: os.stat_result, uid: int, gid: int) -> None:
    if (status.st_uid, status.st_gid) != (uid, gid):
        os.chown(name, uid, gid, dir_fd=descriptor, follow_symlinks=False)
