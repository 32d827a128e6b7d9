"""Which processes this one has started, but for the servers that tests of one session share."""

import os
from pathlib import Path

from repopool_async._identity import process_start_time

_SHARED: set[int] = set()


def running() -> set[int]:
    """Return the pids of this process's children that run."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in pids if process_start_time(int(pid)) is not None}


def begin() -> None:
    """Take what runs now, before a test, as not the test's: a database, an sshd."""
    _SHARED.clear()
    _SHARED.update(running())


def left() -> set[int]:
    """Return what has been started since `begin` and still runs."""
    return running() - _SHARED
