"""Files, trees and the process table of a host reached over SSH: one execution for each question or order.

What is asked is written in `remote/*.sh`, how answers read in `_ssh_trees`. A link exchanged for a file between a test
and its use cannot be excluded by a shell everywhere; where that matters the functions there say what they do about it.
"""

import errno
import functools
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

import attrs

from repopool_async import _mounts
from repopool_async._aio import shielded
from repopool_async._clock import boottime
from repopool_async._identity import boot_id
from repopool_async.hosts import _ssh_collect
from repopool_async.hosts._scripts import (
    Tools,
    command,
    compile_steps,
    glob_literal,
    mount_name,
    temporary,
)
from repopool_async.hosts._ssh_shell import Shell
from repopool_async.hosts._ssh_trees import (
    deep_pattern,
    maps_pattern,
    mounts_of,
    nanoseconds,
    parse_stat,
    place_pattern,
    read_inspection,
    read_processes,
)
from repopool_async.hosts.base import (
    ClockOffset,
    Collected,
    EndedProcesses,
    FileStat,
    FileStep,
    Inode,
    Known,
    Moment,
    Settled,
    TreeInspection,
    Wanted,
    WriteFile,
)

BLOCK_BYTES: Final = 65536
_TICKS_PER_SECOND: Final = 50
_TICKS_OF_PROC: Final = 100
_START_TICKS: Final = 2
"""More than the clock by which the kernel tells when a process began is coarse."""
_ON_ITS_WAY_SECONDS: Final = 30
_NAMES_AT_ONCE: Final = 500
_ABSENT: Final = 3
ELSEWHERE: Final = 5
_CLOCK_PRECISION_NS: Final = 100_000_000
"""The boot clock is told in hundredths of a second, and asking takes its time. Daemons that keep time slew less."""
_OF_THE_CONNECTION: Final = frozenset(
    ("SSH_CLIENT", "SSH_CONNECTION", "SSH_TTY", "SSH_AUTH_SOCK", "SHLVL", "PWD", "OLDPWD", "_", "LC_ALL")
)
_TOOLS_TO_MOVE: Final = frozenset(("gnu_find", "gnu_mv", "gnu_tar"))
_NO_NAMES: Final = frozenset(("", ".", ".."))


class RemoteFiles:
    """The part of a host that is about files and what holds them."""

    _seconds = 0
    _login: Mapping[str, str] | None = None

    @property
    def _shell(self) -> Shell:
        raise NotImplementedError

    async def apply(self, steps: Sequence[FileStep]) -> None:
        """See `Host.apply`."""
        if steps:
            has_data = any(isinstance(step, WriteFile) for step in steps)
            answer = await self._shell.call(
                lambda tools: compile_steps(steps, tools.umask), "files", is_confidential=has_data
            )
            answer.require(steps=steps)

    async def read_bytes(self, path: str, *, limit: int) -> bytes | None:
        """See `Host.read_bytes`; what is exchanged for a fifo at the wrong moment can hold up a host without GNU dd."""
        call = command("read_file", path, limit // BLOCK_BYTES + 1)
        answer = await self._shell.call(lambda _: call, "reading", is_repeatable=True, may_end_with=(0, _ABSENT))
        if answer.status == _ABSENT:
            return None
        data = answer.require(path)
        if len(data) > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
        return data

    async def stat(self, path: str) -> FileStat | None:
        """See `Host.stat`."""
        answer = await self._shell.call(lambda _: command("look", path), "reading", is_repeatable=True)
        return parse_stat(answer.require(path), is_exact=await self._is_exact())

    async def stat_many(self, paths: Sequence[str]) -> list[FileStat | None]:
        """See `Host.stat_many`."""
        answer = await self._shell.call(lambda _: command("look_at_all", *paths), "reading", is_repeatable=True)
        is_exact = await self._is_exact()
        return [parse_stat(one, is_exact=is_exact) for one in answer.require().split(b"\1\n")[:-1]]

    async def list_directory(self, path: str) -> list[str]:
        """See `Host.list_directory`; what is no directory has no names either."""
        answer = await self._shell.call(lambda _: command("list_names", path), "reading", is_repeatable=True)
        return sorted(os.fsdecode(name) for name in answer.require(path).split(b"\0") if name)

    async def remove_tree(self, path: str, *, is_urgent: bool = True) -> None:  # noqa: ARG002 - it cannot
        """See `Host.remove_tree`; nothing is deleted at all where something is mounted inside."""
        path = path.rstrip("/") or "/"
        call = command("remove_tree", path, mount_name(path))
        (await self._shell.call(lambda _: call, "trees", is_repeatable=True)).require(path)

    async def inspect_tree(
        self,
        root: str,
        *,
        since_ns: int | None,
        settled: Settled | None = None,
        passed_over: Collection[str] = (),
        known: Known | None = None,
        beside: str | None = None,
        only: Inode | None = None,
    ) -> TreeInspection:
        """See `Host.inspect_tree`; where a directory has other flags than a new one, the root counts as irregular.

        A host without the GNU tools passes over nothing; one without lsattr compares no flags.
        """
        if known is not None:
            raise _not_there(root)
        fresh = temporary(beside or root)
        exact = await self._is_exact()
        make = functools.partial(_inspection, root, since_ns, fresh, only=only, passed_over=passed_over)
        answer = await self._shell.call(make, "inspection")
        return read_inspection(answer, root, fresh, since_ns=since_ns, settled=settled, is_exact=exact)

    async def find_unknown(self, root: str, directories: Collection[str], known: Known) -> list[str]:  # noqa: ARG002
        """See `Host.find_unknown`; only asked of it where `can_tell_unknown`."""
        raise _not_there(root)

    async def remove_entries(self, root: str, names: Sequence[str], *, trash: str) -> int:
        """See `Host.remove_entries`."""
        parents = _by_parent(names)
        if not parents:
            return 0
        lines = [
            command("require_directory", root) + b" || exit",
            command("find_mounts", root, mount_name(root)) + b" || exit",
            b"removed=0 trashed=0",
        ]
        for parent, entries in parents.items():
            removals = [command("remove_here", trash, f"{uuid.uuid4().hex}-", *chunk) for chunk in _chunks(entries)]
            block = b" || exit; ".join((*removals, b""))
            lines.append(b"if " + command("enter_parent", root, parent) + b"; then " + block + b"fi")
        lines.append(b"echo $removed")
        answer = await self._shell.call(lambda _: b"\n".join(lines), "trees")
        return int(answer.require(root))

    async def move_directories(self, source: str, target: str, names: Sequence[str]) -> tuple[str, ...]:
        """See `Host.move_directories`; without lsattr no flags are compared, without the GNU tools nothing moves."""
        flags = (await self._shell.tools()).flags if names else frozenset()
        if not flags >= _TOOLS_TO_MOVE:
            return ()
        parents = _by_parent(names)
        inside = [f"{parent}/{name}".lstrip("/") for parent, entries in parents.items() for name in entries]
        call = command("move_directories", source, mount_name(source), target, temporary(source), *inside)
        answer = await self._shell.call(lambda _: call, "moves")
        moved = {os.fsdecode(name) for name in answer.require(source).split(b"\0")}
        return tuple(name for name in names if name in moved)

    async def measure_entries(self, root: str, names: Sequence[str]) -> list[int | None]:
        """See `Host.measure_entries`."""
        parents = _by_parent(names)
        lines = [command("find_mounts", root, mount_name(root)) + b" || exit"]
        for parent, entries in parents.items():
            measured = command("measure_here", *entries)
            absent = command("printf", "%b", "\\0000" * len(entries))
            step = (
                b"if " + command("enter_parent", root, parent) + b"; then " + measured + b"; else " + absent + b"; fi"
            )
            lines.append(step)
        if not parents:
            return [None] * len(names)
        answer = await self._shell.call(lambda _: b"\n".join(lines), "trees")
        flat = [f"{parent}/{name}".lstrip("/") for parent, entries in parents.items() for name in entries]
        sizes = dict(zip(flat, answer.require(root).split(b"\0"), strict=False))
        return [_measured(sizes.get(name.rstrip("/"), b"")) for name in names]

    async def file_system_clock_ns(self, directory: str, *, moves_on: bool = False) -> int:
        """See `Host.file_system_clock_ns`; in whole seconds, counted up within one, where the host has no GNU find."""
        name = temporary(f"{directory}/x").rpartition("/")[2]
        call = command("clock", directory, name, "1" if moves_on else "")
        answer = await self._shell.call(lambda _: call, "reading")
        text = answer.require(directory).decode().strip()
        if "." in text:
            return nanoseconds(text)
        self._seconds += 1
        return int(text) * 1_000_000_000 + self._seconds % 1_000_000_000

    async def boot_id(self) -> str:
        """See `Host.boot_id`."""
        return (await self._shell.tools()).boot

    async def clock_offset(self) -> ClockOffset:
        """See `Host.clock_offset`; a host that does not tell also has no file times that are believed."""
        answer = await self._shell.call(lambda _: command("clocks"), "boot", is_repeatable=True)
        words = answer.stdout.decode(errors="replace").split()
        if answer.status != 0 or len(words) != 2 or not words[1].isdigit():
            return ClockOffset(0, _CLOCK_PRECISION_NS)
        return ClockOffset(int(words[1]) - int(float(words[0]) * 1e9), _CLOCK_PRECISION_NS)

    async def login_environment(self) -> Mapping[str, str]:
        """See `Host.login_environment`."""
        if self._login is None:
            answer = await self._shell.call(lambda _: command("env"), is_repeatable=True)
            lines = answer.require().decode(errors="surrogateescape").splitlines()
            pairs = [line.partition("=") for line in lines]
            self._login = {name: value for name, equals, value in pairs if equals and name not in _OF_THE_CONNECTION}
        return self._login

    async def is_network_file_system(self, path: str) -> bool:
        """See `Host.is_network_file_system`."""
        answer = await self._shell.call(lambda _: command("place", path), "reading", is_repeatable=True)
        directory, mounts = mounts_of(answer.require(path))
        return _mounts.is_network_type(_mounts.type_among(directory, mounts))

    async def collect_files(
        self,
        root: str,
        inside: str,
        target: str,
        wanted: Sequence[Wanted],
        *,
        enter: str,
        limit_bytes: int,
        limit_files: int,
    ) -> Collected:
        """See `Host.collect_files`: a listing, then a copy; what is to be checked or read comes here as well."""
        collection = _ssh_collect.Collection(self._shell, root, inside, target, wanted=wanted, enter=enter)
        return await collection.run(limit_bytes, limit_files)

    async def end_processes(
        self,
        *,
        mark: str,
        tree: str | None,
        grace_seconds: float = 2.0,
        since: Moment | None = None,
        group: int | None = None,
    ) -> EndedProcesses:
        """See `Host.end_processes`; finds nobody where there is no /proc."""
        place = Place(tree, mark, "" if group is None else str(group), round(grace_seconds * _TICKS_PER_SECOND))
        hidden = b"" if since is None else await self._looking_for_hidden(since)
        return await shielded(self._end_processes(place, hidden), name="ssh-end-processes")

    async def _looking_for_hidden(self, since: Moment) -> bytes:
        """Return the call that looks for those that began since a moment."""
        if since.boot_id == await self.boot_id():
            return command("find_hidden", int(since.seconds * _TICKS_OF_PROC) - _START_TICKS)
        if since.boot_id != boot_id():
            return b""
        # Its clock counts from another boot than ours. Some more seconds: the question may take them on its way.
        return command("find_hidden_of_last", int(boottime() - since.seconds + _ON_ITS_WAY_SECONDS))

    async def _end_processes(self, place: "Place", hidden: bytes) -> EndedProcesses:
        for _ in range(2):
            answer = await self._shell.call(functools.partial(_ending, place, hidden), "marked")
            if answer.status != ELSEWHERE:
                return read_processes(answer.require(place.tree or ""))
            # The way to the tree leads through a link: once more, with the way the kernel knows.
            place = attrs.evolve(place, tree=os.fsdecode(answer.stdout.rpartition(b"\0")[2]))
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), place.tree)

    async def _is_exact(self) -> bool:
        return "gnu_find" in (await self._shell.tools()).flags


def _inspection(
    root: str, since_ns: int | None, fresh: str, tools: Tools, *, only: Inode | None, passed_over: Collection[str]
) -> bytes:
    named = (root, mount_name(root), glob_literal(root))
    if "gnu_find" not in tools.flags:
        return command("inspect_posix", *named, "" if only is None else only.inode)
    # Find asks for later, not for as late or later.
    since = "" if since_ns is None else f"@{(since_ns - 1) // 10**9}.{(since_ns - 1) % 10**9:09d}"
    inode = "" if only is None else f"{only.device} {only.inode}"
    return command("inspect_gnu", *named, since, deep_pattern(root), fresh, inode, *passed_over)


@attrs.frozen
class Place:
    """Whose processes are to be ended, and where others may stand."""

    tree: str | None
    mark: str
    group: str
    grace_ticks: int


def _ending(place: Place, hidden: bytes, tools: Tools) -> bytes:
    ending = command("end_marked", place.mark, place.group, place.grace_ticks)
    if place.tree is None:
        return ending + b"\nname_found"
    pattern = place_pattern(place.tree, tools.mounts)
    lines = [
        command("require_real", place.tree) + b" || exit %d" % ELSEWHERE,
        ending,
        command("find_bystanders", place.tree, glob_literal(place.tree), maps_pattern(place.tree)),
        command("find_mounted", pattern) if pattern else b":",
        hidden or b":",
        b"name_found",
    ]
    return b"\n".join(lines)


def _not_there(path: str) -> OSError:
    return OSError(errno.ENOTSUP, "a host over SSH is not told what belongs in a tree", path)


def _by_parent(names: Iterable[str]) -> dict[str, list[str]]:
    """Sort names by the directory they are in; those that no entry inside a tree can have are left out."""
    parents: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rstrip("/").rpartition("/")
        is_inside = last not in _NO_NAMES and (not name.startswith("/"))
        if is_inside and (not parent or _NO_NAMES.isdisjoint(parent.split("/"))):
            parents.setdefault(parent, []).append(last)
    return parents


def _chunks(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + _NAMES_AT_ONCE] for start in range(0, len(names), _NAMES_AT_ONCE))


def _measured(answer: bytes) -> int | None:
    kind, _, size = answer.partition(b" ")
    return int(size) if kind in (b"f", b"l") else None
