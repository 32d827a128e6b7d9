"""Who a process is, in a form that outlives it and cannot be mistaken for a later process with the same pid.

A pid alone means nothing after a reboot or a pid wrap, and nothing on another machine. An `Owner` therefore carries
host, boot id, pid and process start time. Whether it is dead is told by locks, not here; nor is what it owns known.
"""

import functools
import os
import socket
import uuid
from pathlib import Path
from typing import Final

from repopool_async.models import Owner

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_STAT_BYTES: Final = 4096
"""More than any process's line of `stat` has."""


@functools.cache
def host_name() -> str:
    """Return this machine's name."""
    return socket.gethostname()


@functools.cache
def boot_id() -> str:
    """Return an id that changes at every boot; one constant per host where the platform has none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"no-boot-id-{uuid.getnode():x}"


def process_start_time(pid: int) -> int | None:
    """Return the kernel's start time of a process in clock ticks since boot.

    Returns:
        None where the process does not exist, is a zombie, or the platform cannot say.
    """
    try:
        # Asked of all processes again and again, so it goes without pathlib, which takes three times as long.
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            stat = os.read(descriptor, _STAT_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    # The command name, in parentheses, may itself contain spaces and parentheses.
    fields = stat[stat.rfind(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


def current_owner() -> Owner:
    """Return this process as an owner (never cached: a forked child is somebody else)."""
    pid = os.getpid()
    return Owner(host=host_name(), boot_id=boot_id(), pid=pid, start_time=process_start_time(pid) or 0)


def this_process() -> Owner:
    """Return `current_owner`, found out once per process."""
    return _owner_of(os.getpid())


@functools.lru_cache(maxsize=1)
def _owner_of(pid: int) -> Owner:  # noqa: ARG001 - a forked child is somebody else
    return current_owner()


def new_lease_id() -> str:
    """Return an id that no other lease ever had."""
    return uuid.uuid4().hex
