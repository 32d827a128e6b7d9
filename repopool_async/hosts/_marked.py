"""Who runs on this machine on behalf of a lease: found through /proc, for many leases at once, and ended by pidfd.

A lease's mark is in the environment of everything started under it and is inherited by what that starts, whatever
session or parent it moves to. Synchronous; for one thread hop. Where there is no /proc nothing is found. What a mark
means is not known here, nor which processes are looked at.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Sequence
from os.path import commonprefix
from typing import Final

import attrs

from repopool_async._aio import Deadline
from repopool_async._identity import process_start_time
from repopool_async.hosts._proc import contents, names_in, read
from repopool_async.hosts._search import Search

_DIGITS: Final = 20
"""As many as numbers in marks have at most; Python refuses to read one of thousands."""
_POLL_SECONDS: Final = 0.005
_EXEC_SECONDS: Final = 0.2
_KERNEL_THREAD: Final = 0x00200000
_EXITING: Final = 0x00000004


@attrs.define(eq=False)
class MarkSearch(Search):
    """A search for those that bear a mark, which is a variable in their environment or a group they were put in.

    Attributes:
        variable: a whole `NAME=value`. last: where given, only the first part, which ends in a dot and is followed by
            a number not above this. group: of the kernel's.
        targets: those found, each taken hold of until the search is left.
    """

    variable: str
    last: int | None = attrs.field(default=None, kw_only=True)
    group: int | None = attrs.field(default=None, kw_only=True)
    targets: list["Target"] = attrs.field(factory=list, init=False)

    def clear(self) -> None:
        """See `Search.clear`."""
        while self.targets:
            self.targets.pop().close()

    def is_for(self, number: bytes) -> bool:
        """Return whether what follows the first part of the mark is one of the numbers."""
        return self.last is not None and number.isdigit() and len(number) <= _DIGITS and int(number) <= self.last


class Marked:
    """Looks at one process after the other for any number of searches; what each shows is read once for all."""

    def __init__(self, searches: Sequence[MarkSearch]) -> None:
        self._by_variable: dict[bytes, list[MarkSearch]] = {}
        self._by_first_part: dict[bytes, list[MarkSearch]] = {}
        self._by_group: dict[bytes, list[MarkSearch]] = {}
        for search in searches:
            by_text = self._by_variable if search.last is None else self._by_first_part
            by_text.setdefault(os.fsencode(search.variable), []).append(search)
            if search.group is not None:
                self._by_group.setdefault(str(search.group).encode(), []).append(search)
        # Most bear no mark at all, and are done with at once.
        self._common = os.fsencode(commonprefix([search.variable for search in searches]))  # noqa: RUF071 - of texts

    def look_at(self, pid: int) -> None:
        """Take hold of a process for those searches whose mark it bears."""
        for search in self._concerned_by(pid):
            start_time = process_start_time(pid)
            target = Target(pid, start_time or 0, _open_pidfd(pid))
            # Once more: what the mark was seen on may have ended before it was taken hold of, and the pid be another's.
            if search in self._concerned_by(pid) and not target.is_gone():
                search.targets.append(target)
            else:
                target.close()

    def _concerned_by(self, pid: int) -> set[MarkSearch]:
        concerned: set[MarkSearch] = set()
        environment = _environment(pid)
        if self._common in environment:
            for text in environment.split(b"\0"):
                concerned.update(self._by_variable.get(text, ()))
                first_part, dot, number = text.rpartition(b".")
                concerned.update(s for s in self._by_first_part.get(first_part + dot, ()) if s.is_for(number))
        for group in _groups(pid) if self._by_group else ():
            concerned.update(self._by_group.get(group, ()))
        return concerned


def end(targets: list["Target"], grace: Deadline, limit: Deadline) -> list["Target"]:
    """Ask, wait for the grace period, force; return who still lives at the limit."""
    for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process does not see the first without the second
        for target in targets:
            target.signal(number)
    return kill(_wait_gone(targets, grace), limit)


def kill(targets: list["Target"], limit: Deadline) -> list["Target"]:
    """Force; return who still lives at the limit."""
    for target in targets:
        target.signal(signal.SIGKILL)
    return _wait_gone(targets, limit)


def _wait_gone(targets: list["Target"], deadline: Deadline) -> list["Target"]:
    """Wait until processes have ended; return those that have not by then."""
    rest = [target for target in targets if not target.is_gone()]
    while rest and not deadline.is_expired:
        rest[0].wait_gone(deadline.remaining() or 0.0)
        rest = [target for target in rest if not target.is_gone()]
    return rest


@attrs.define
class Target:
    """A process that can be signalled without ever hitting another that got its pid later."""

    pid: int
    start_time: int
    descriptor: int | None

    def close(self) -> None:
        """Let go of it."""
        if self.descriptor is not None:
            os.close(self.descriptor)

    def signal(self, number: int) -> None:
        """Send a signal, where the process still runs and may be signalled."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.descriptor is not None:
                signal.pidfd_send_signal(self.descriptor, number)
            elif process_start_time(self.pid) == self.start_time:
                os.kill(self.pid, number)

    def is_gone(self) -> bool:
        """Return whether it has ended; a zombie has."""
        if self.descriptor is not None:
            return self._is_readable(0.0)
        return process_start_time(self.pid) != self.start_time

    def wait_gone(self, seconds: float) -> None:
        """Wait until it has ended, or for a while."""
        if self.descriptor is not None:
            self._is_readable(seconds)
        else:
            time.sleep(min(seconds, _POLL_SECONDS))

    def _is_readable(self, seconds: float) -> bool:
        assert self.descriptor is not None
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1000))


def _groups(pid: int) -> set[bytes]:
    """Return the groups of a process; none of one of which no thread runs any more."""
    status = read(f"/proc/{pid}/status")
    if b"\nState:\tZ" in status and len(names_in(f"/proc/{pid}/task")) < 2:
        return set()
    lines = (line.partition(b":") for line in status.splitlines())
    return {group for name, _, value in lines if name in (b"Gid", b"Groups") for group in value.split()}


def _environment(pid: int) -> bytes:
    deadline = Deadline.after(_EXEC_SECONDS)
    try:
        while not (environment := contents(f"/proc/{pid}/environ")):
            # For a moment in the middle of an exec there is none to be seen.
            if deadline.is_expired or not _is_in_exec(pid):
                return _environment_of_threads(pid)
            time.sleep(_POLL_SECONDS / 10)
    except PermissionError:
        return b""
    except OSError:  # gone, or at least its first thread is
        return _environment_of_threads(pid)
    return environment


def _is_in_exec(pid: int) -> bool:
    stat = contents(f"/proc/{pid}/stat")
    state, *fields = stat[stat.rfind(b")") + 2 :].split()
    if state in (b"Z", b"X") or int(fields[5]) & (_KERNEL_THREAD | _EXITING):
        return False
    # The address of the environment's end: one that has been set up has an address even where it is empty.
    return fields[47:48] == [b"0"]


def _environment_of_threads(pid: int) -> bytes:
    """Return what the other threads show: where the first has ended and others go on, it shows nothing."""
    threads = names_in(f"/proc/{pid}/task")
    others = (thread for thread in threads if thread != str(pid)) if len(threads) > 1 else ()
    return next(filter(None, (read(f"/proc/{pid}/task/{thread}/environ") for thread in others)), b"")


def _open_pidfd(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
