"""Who stands in a tree, or holds something of it, without being the lease's: found through /proc.

Synchronous; for one thread hop. What is done about them is not decided here, nor who belongs to a lease.
"""
# Paths are text here: thousands of them are read, and most are gone before they are.
# ruff: noqa: PTH115, PTH208

import os
import re
from collections.abc import Collection, Iterator
from typing import Final

from repopool_async._identity import process_start_time
from repopool_async.hosts._mappings import shares_memory_with
from repopool_async.hosts._proc import link, names_in, pids, read

_TICK_SECONDS: Final = 0.02
"""More than the clock by which the kernel tells when a process began is coarse."""
_DELETED: Final = " (deleted)"


def find_bystanders(tree: str, survivors: Collection[int], since: float | None) -> Iterator[str]:
    """Yield `pid name` of those that stand in a tree or hold something of it; arguments as for `Host.end_processes`.

    Args:
        survivors: count in any case.
    """
    root = os.path.realpath(tree)
    place, own_mounts = _place(root), link("/proc/self/ns/mnt")
    for pid in sorted(pids()):
        if (
            pid in survivors
            or _stands_in(f"/proc/{pid}", root)
            or _has_mounted(pid, place, own_mounts)
            or (since is not None and _began_after(pid, since) and (_hides(pid) or _holds_unseen(pid, root)))
        ):
            name = read(f"/proc/{pid}/comm").rstrip(b"\n").decode(errors="replace")
            yield f"{pid} {name}"


def _stands_in(own: str, root: str) -> bool:
    """Return whether a process, or one thread of it, stands in a tree or holds something of it."""
    paths = (f"{own}/cwd", f"{own}/root", *(f"{own}/fd/{number}" for number in names_in(f"{own}/fd")))
    return any(_leads_into(path, root) for path in paths) or shares_memory_with(own, root)


def _holds_unseen(pid: int, root: str) -> bool:
    """Return whether a process may hold something of a tree that its first thread does not show.

    Threads may have files and a directory of their own, and go on when the first has ended. A descriptor may be on its
    way through a socket, or be known to an io_uring only: of those nobody can say what they lead to.
    """
    threads = [f"/proc/{pid}/task/{thread}" for thread in names_in(f"/proc/{pid}/task")]
    others = [own for own in threads if own != f"/proc/{pid}/task/{pid}"]
    return any(_stands_in(own, root) for own in others) or any(_has_hidden_files(own) for own in threads)


def _has_hidden_files(own: str) -> bool:
    return any(
        re.search(rb"^(scm_fds|UserFiles):\s+[1-9]", read(f"{own}/fdinfo/{number}"), re.MULTILINE)
        for number in names_in(f"{own}/fd")
        if link(f"{own}/fd/{number}").startswith(("socket:", "anon_inode:[io_uring]"))
    )


_Place = tuple[bytes, bytes]
"""A file system's device, and a path within it; both as `mountinfo` writes them."""


def _place(root: str) -> _Place | None:
    """Say where a directory lies whatever it is mounted as; None where nobody can say."""
    path = _escaped(root)
    found, length = None, -1
    for device, source, point in _mounts("self"):
        prefix = point.rstrip(b"/")
        if len(point) >= length and (path + b"/").startswith(prefix + b"/"):
            found, length = (device, source.rstrip(b"/") + path[len(prefix) :]), len(point)
    return found


def _has_mounted(pid: int, place: _Place | None, own_mounts: str) -> bool:
    """Return whether a process in a container of some kind has the place, or one below, mounted for itself."""
    if place is None or link(f"/proc/{pid}/ns/mnt") == own_mounts:
        return False
    wanted_device, wanted = place
    return any(
        device == wanted_device and (source + b"/").startswith(wanted + b"/") for device, source, _ in _mounts(str(pid))
    )


def _mounts(pid: str) -> Iterator[tuple[bytes, bytes, bytes]]:
    # id parent DEVICE ROOT POINT options ...; paths are escaped, as is what they are compared with.
    for line in read(f"/proc/{pid}/mountinfo").splitlines():
        fields = line.split(b" ", 5)
        if len(fields) > 5:
            yield fields[2], fields[3], fields[4]


def _escaped(path: str) -> bytes:
    return re.sub(rb"[ \t\n\\]", lambda match: b"\\%03o" % match[0][0], os.fsencode(path))


def _began_after(pid: int, since: float) -> bool:
    started = process_start_time(pid)
    if started is None:  # the first thread has ended; the others are younger
        threads = names_in(f"/proc/{pid}/task")
        started = max((process_start_time(int(thread)) or 0 for thread in threads), default=0)
    return started / os.sysconf("SC_CLK_TCK") >= since - _TICK_SECONDS


def _hides(pid: int) -> bool:
    """Return whether a process of our own user lets us see nothing of what it holds."""
    try:
        os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        pass
    except OSError:
        return False
    else:
        return False
    users = next((line.split()[1:] for line in read(f"/proc/{pid}/status").splitlines() if line[:4] == b"Uid:"), [])
    return str(os.geteuid()).encode() in users


def _leads_into(path: str, root: str) -> bool:
    try:
        target = os.readlink(path)
    except OSError:
        return False
    if target != root and not target.startswith(root + "/"):
        return False
    # What has been deleted is no longer part of the tree.
    return not target.endswith(_DELETED) or os.path.lexists(target)
