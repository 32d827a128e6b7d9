"""Who runs on this machine on behalf of a lease, and who else stands in a tree: found through /proc, ended by pidfd.

A lease's mark is in the environment of everything started under it and is inherited by what that starts, whatever
session or parent it moves to. Synchronous; for one thread hop. Where there is no /proc nothing is found. What a mark
means is not known here.
"""
# Paths are text here: thousands of them are read, and most are gone before they are.

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from typing import Final, Self

import attrs

from repopool_async._aio import Deadline, in_turn
from repopool_async._identity import process_start_time
from repopool_async.hosts._bystanders import find_bystanders
from repopool_async.hosts._proc import contents, names_in, pids, read
from repopool_async.hosts.base import EndedProcesses

_KILL_SECONDS: Final = 3.0
"""How long, beyond the grace period, the killed may take to die and to stop breeding."""
_POLL_SECONDS: Final = 0.005
_EXEC_SECONDS: Final = 0.2
_KERNEL_THREAD: Final = 0x00200000
_EXITING: Final = 0x00000004


def end_processes(
    mark: str, tree: str | None, grace_seconds: float, since: float | None = None, group: int | None = None
) -> EndedProcesses:
    """See `Host.end_processes`; takes at most the grace period and three seconds.

    A marked process that cannot be ended (another user's, stuck in the kernel) is named among the bystanders.
    """
    killed, survivors = _end_marked(_Mark(os.fsencode(mark), group), grace_seconds)
    bystanders: tuple[str, ...] = ()
    if tree is not None:
        with in_turn:
            bystanders = tuple(find_bystanders(tree, survivors, since))
    return EndedProcesses(killed=tuple(sorted(killed)), bystanders=bystanders, survivors=tuple(sorted(survivors)))


@attrs.frozen
class _Mark:
    """What a lease's processes are known by: a variable in their environment, or a group they were put in."""

    variable: bytes
    group: int | None


def _end_marked(mark: _Mark, grace_seconds: float) -> tuple[set[int], list[int]]:
    """End what bears the mark, and what that starts meanwhile, until there is none; return the dead and the rest."""
    grace, limit = Deadline.after(grace_seconds), Deadline.after(grace_seconds + _KILL_SECONDS)
    killed: set[int] = set()
    while True:
        with contextlib.ExitStack() as stack:
            targets = [stack.enter_context(target) for target in _find_marked(mark)]
            if not targets:
                return killed, []
            rest = _end(targets, grace, limit)
            killed.update(target.pid for target in targets if target not in rest)
            if limit.is_expired:
                return killed, [target.pid for target in rest]
            if len(rest) == len(targets):
                # Nothing more can be done to these; newcomers must not be looked for without a pause.
                time.sleep(_POLL_SECONDS)


def _end(targets: list["_Target"], grace: Deadline, limit: Deadline) -> list["_Target"]:
    """Ask, wait for the grace period, force; return who still lives."""
    for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process does not see the first without the second
        for target in targets:
            target.signal(number)
    rest = wait_gone(targets, grace)
    for target in rest:
        target.signal(signal.SIGKILL)
    return wait_gone(rest, limit)


def wait_gone(targets: list["_Target"], deadline: Deadline) -> list["_Target"]:
    """Wait until processes have ended; return those that have not by then."""
    rest = [target for target in targets if not target.is_gone()]
    while rest and not deadline.is_expired:
        rest[0].wait_gone(deadline.remaining() or 0.0)
        rest = [target for target in rest if not target.is_gone()]
    return rest


@attrs.define
class _Target:
    """A process that can be signalled without ever hitting another that got its pid later."""

    pid: int
    start_time: int
    descriptor: int | None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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


def _others() -> Iterator[int]:
    """Name every process but this one, those started while we look included: heirs of some that ended unseen."""
    seen = {os.getpid()}
    while unseen := [pid for pid in pids() if pid not in seen]:
        seen.update(unseen)
        yield from unseen


def _find_marked(mark: _Mark) -> list[_Target]:
    with in_turn:
        return [target for pid in _others() if (target := _marked(pid, mark)) is not None]


def _marked(pid: int, mark: _Mark) -> _Target | None:
    if not _bears(pid, mark):
        return None
    start_time = process_start_time(pid)
    target = _Target(pid, start_time or 0, _open_pidfd(pid))
    # Read once more: what the mark was seen on may have ended before it was taken hold of, and the pid be another's.
    if _bears(pid, mark) and not target.is_gone():
        return target
    target.__exit__()
    return None


def _bears(pid: int, mark: _Mark) -> bool:
    return (mark.group is not None and _is_in_group(pid, mark.group)) or _has_variable(pid, mark.variable)


def find_variable(prefix: str, last: int) -> list[_Target]:
    """Find the processes in whose environment a variable's text is a prefix and a number not above `last`."""
    start = os.fsencode(prefix)
    found = []
    with in_turn:
        for pid in _others():
            environment = _environment(pid)
            for text in environment.split(b"\0") if start in environment else ():
                number = text.removeprefix(start)
                is_ours = text.startswith(start) and number.isdigit() and int(number) <= last
                target = _marked(pid, _Mark(text, None)) if is_ours else None
                found += [target] if target is not None else []
    return found


def _is_in_group(pid: int, group: int) -> bool:
    status = read(f"/proc/{pid}/status")
    number = str(group).encode()
    if number not in status or (b"\nState:\tZ" in status and len(names_in(f"/proc/{pid}/task")) < 2):
        return False
    lines = (line.partition(b":") for line in status.splitlines())
    return any(name in (b"Gid", b"Groups") and number in value.split() for name, _, value in lines)


def _has_variable(pid: int, mark: bytes) -> bool:
    environment = _environment(pid)
    return mark in environment and mark in environment.split(b"\0")


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
