"""Kernel locks on open files, and what becomes of them when the process forks.

A forked child shares its parent's open files, and with them their locks: a child that kept one would keep it alive
after the parent's death, one that unlocked it would unlock the parent's. What is opened here is closed in children,
never unlocked there. Which file stands for what is not known here.
"""

import errno
import fcntl
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

OPEN_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

_CONTENTION: Final = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)


class LockFiles:
    """The lock files that this process has open.

    `filelock.FileLock` does as much and more, in ten times the time; what locks and unlocks is filelock's in both.
    """

    def __init__(self) -> None:
        self._gate = threading.RLock()
        self._open: set[int] = set()
        os.register_at_fork(before=self._shut, after_in_parent=self._reopen, after_in_child=self._drop)

    def open(self, path: str, flags: int = OPEN_FLAGS) -> int:
        """Open a lock file.

        Raises:
            OSError: as `os.open`; the directory of a file to be made must exist.
        """
        with self._gate:  # a fork between these two lines would leave the child a descriptor that nobody knows
            descriptor = os.open(path, flags, 0o666)
            self._open.add(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        """Unlock and close; a descriptor that is not known does nothing."""
        from filelock import unlock_descriptor  # noqa: PLC0415 - a third of the package's import time

        with self._gate:
            if descriptor in self._open:
                self._open.discard(descriptor)
                # Closing is not enough: where a child was started in this instant, it still has a copy.
                unlock_descriptor(descriptor)
                os.close(descriptor)

    def lock(self, descriptor: int) -> bool:
        """Make one attempt to lock an open file, and return whether it is ours now."""
        from filelock import lock_descriptor  # noqa: PLC0415 - as above

        return lock_descriptor(descriptor, blocking=False)

    def take(self, path: str) -> int | None:
        """Make one attempt to lock a file, which is made where it is missing; return its descriptor."""
        try:
            descriptor = self.open(path)
        except FileNotFoundError:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            descriptor = self.open(path)
        try:
            status = os.fstat(descriptor)
            if self.lock(descriptor) and identity_of(path) == (status.st_dev, status.st_ino):
                return descriptor
        except BaseException:
            self.close(descriptor)
            raise
        self.close(descriptor)
        return None

    def _shut(self) -> None:
        self._gate.acquire()

    def _reopen(self) -> None:
        self._gate.release()

    def _drop(self) -> None:
        self._gate = threading.RLock()
        descriptors, self._open = self._open, set()
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)


lock_files: Final = LockFiles()


def is_flocked(path: str) -> bool:
    """Return whether anybody holds a lock on a file; False where there is none. Does not exclude other lookers.

    Raises:
        OSError: it could not be opened.
    """
    try:
        descriptor = lock_files.open(path, _READ)
    except FileNotFoundError:
        return False
    try:
        # filelock has no shared locks for this, and an exclusive one would make two lookers see each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _CONTENTION:
            raise
        return True
    finally:
        lock_files.close(descriptor)
    return False


def identity_of(path: str) -> tuple[int, int] | None:
    """Return device and inode of what lies at a path; None where there is nothing."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
