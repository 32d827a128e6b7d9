"""Who stands in trees, or holds something of them, without being a lease's: found through /proc, for many at once.

Synchronous; for one thread hop. What is done about them is not decided here, nor who belongs to a lease, nor which
processes are looked at.
"""
# Paths are text here: thousands of them are read, and most are gone before they are.
# ruff: noqa: PTH208

import os
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Final

import attrs

from repopool_async._identity import process_start_time
from repopool_async.hosts._mappings import files_shared_by
from repopool_async.hosts._places import Places
from repopool_async.hosts._proc import link, names_in, read
from repopool_async.hosts._search import Search

_TICK_SECONDS: Final = 0.02
"""More than the clock by which the kernel tells when a process began is coarse."""
_DELETED: Final = " (deleted)"


@attrs.define(eq=False)
class BystanderSearch(Search):
    """A search for those that stand in a tree or hold something of it.

    Attributes:
        tree: as for `Host.end_processes`; `since`, too, in seconds since boot. survivors: count in any case.
        names: `pid name` of those found, by pid.
    """

    tree: str
    survivors: Collection[int]
    since: float | None
    names: dict[int, str] = attrs.field(factory=dict, init=False)

    def clear(self) -> None:
        """See `Search.clear`."""
        self.names.clear()


class Bystanders:
    """Looks at one process after the other for any number of searches; what each shows is read once for all."""

    def __init__(self, searches: Sequence[BystanderSearch]) -> None:
        """Prepare for the searches. One whose tree cannot be looked up has failed, which is no matter to the rest."""
        mounts = list(_mounts("self")) if searches else []
        roots = [(root, search) for search in searches if (root := _root(search)) is not None]
        places = [(place, search) for root, search in roots if (place := _place(root, mounts)) is not None]
        self._standing = Places(roots)
        self._mounted = Places(places)
        self._own_mounts = link("/proc/self/ns/mnt")
        self._surviving = [search for search in searches if search.survivors]
        self._dated = [(search.since - _TICK_SECONDS, search) for search in searches if search.since is not None]
        self._earliest = min((since for since, _ in self._dated), default=None)

    def look_at(self, pid: int) -> None:
        """Note a process in those searches to which it is a bystander."""
        found = self._standing_in(f"/proc/{pid}")
        found.update(search for search in self._surviving if pid in search.survivors)
        if link(f"/proc/{pid}/ns/mnt") != self._own_mounts:
            found |= self._having_mounted(pid)
        if self._earliest is not None and (began := _began(pid)) >= self._earliest:
            dated = {search for since, search in self._dated if began >= since} - found
            found |= dated if not dated or _hides(pid) else dated & self._holding_unseen(pid, dated)
        if found:
            name = read(f"/proc/{pid}/comm").rstrip(b"\n").decode(errors="replace")
            for search in found:
                search.names[pid] = f"{pid} {name}"

    def _standing_in(self, own: str) -> set[BystanderSearch]:
        """Return in whose tree a process, or one thread of it, stands or holds something."""
        found: set[BystanderSearch] = set()
        for path in (f"{own}/cwd", f"{own}/root", *(f"{own}/fd/{number}" for number in names_in(f"{own}/fd"))):
            target = link(path)
            searches = self._standing.of(target)
            # What has been deleted is no longer part of the tree.
            if searches and (not target.endswith(_DELETED) or os.path.lexists(target)):
                found.update(searches)
        for name in files_shared_by(own):
            found.update(self._standing.of(name))
        return found

    def _having_mounted(self, pid: int) -> set[BystanderSearch]:
        """Return whose tree, or a part, a process in a container of some kind has mounted for itself."""
        return {search for device, source, _ in _mounts(str(pid)) for search in self._mounted.of(f"{device}{source}")}

    def _holding_unseen(self, pid: int, dated: set[BystanderSearch]) -> set[BystanderSearch]:
        """Return of whose tree a process may hold something that its first thread does not show.

        Threads may have files and a directory of their own, and go on when the first has ended. A descriptor may be on
        its way through a socket, or be known to an io_uring only: of those nobody can say what they lead to.
        """
        threads = [f"/proc/{pid}/task/{thread}" for thread in names_in(f"/proc/{pid}/task")]
        if any(_has_hidden_files(own) for own in threads):
            return dated
        others = (own for own in threads if own != f"/proc/{pid}/task/{pid}")
        return {search for own in others for search in self._standing_in(own)}


def _root(search: BystanderSearch) -> str | None:
    try:
        return os.path.realpath(search.tree)
    except (OSError, ValueError) as error:
        search.failure = error
        return None


def _has_hidden_files(own: str) -> bool:
    return any(
        re.search(rb"^(scm_fds|UserFiles):\s+[1-9]", read(f"{own}/fdinfo/{number}"), re.MULTILINE)
        for number in names_in(f"{own}/fd")
        if link(f"{own}/fd/{number}").startswith(("socket:", "anon_inode:[io_uring]"))
    )


_Mount = tuple[str, str, str]
"""A file system's device, the path within it that is mounted, and where; as `mountinfo` writes them."""


def _place(root: str, mounts: Sequence[_Mount]) -> str | None:
    """Say where a directory lies whatever it is mounted as, a device and a path in it; None where nobody can say."""
    path = _escaped(root)
    found, length = None, -1
    for device, source, point in mounts:
        prefix = point.rstrip("/")
        if len(point) >= length and f"{path}/".startswith(f"{prefix}/"):
            found, length = device + source.rstrip("/") + path[len(prefix) :], len(point)
    return found


def _mounts(pid: str) -> Iterator[_Mount]:
    # id parent DEVICE ROOT POINT options ...; paths are escaped, as is what they are compared with.
    for line in os.fsdecode(read(f"/proc/{pid}/mountinfo")).split("\n"):
        fields = line.split(" ", 5)
        if len(fields) > 5:
            yield fields[2], fields[3], fields[4]


def _escaped(path: str) -> str:
    return re.sub(r"[ \t\n\\]", lambda match: f"\\{ord(match[0]):03o}", path)


def _began(pid: int) -> float:
    """Return when a process began, in seconds since boot."""
    started = process_start_time(pid)
    if started is None:  # the first thread has ended; the others are younger
        threads = names_in(f"/proc/{pid}/task")
        started = max((process_start_time(int(thread)) or 0 for thread in threads), default=0)
    return started / os.sysconf("SC_CLK_TCK")


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
