"""This machine as a host: its processes, its files, its process table.

Every file operation is one hop to a worker thread, which finishes even when the caller is cancelled; what the hops do
is written in `_files`, `_tree` and `_fence`, how commands run in `_process`, how processes are found in `_passes`.
Nothing here knows of git or slots.
"""
# Paths are text here, as in the protocol: they may hold undecodable bytes and belong to whichever host.
# ruff: noqa: PTH103, PTH105, PTH108, PTH118, PTH208

import asyncio
import errno
import os
import secrets
import stat
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple

import anyio
import attrs

from repopool_async import _files, _mounts, _removal
from repopool_async._aio import Deadline, in_thread, shielded
from repopool_async._clock import wall_minus_boot_ns
from repopool_async._identity import boot_id
from repopool_async._process import open_process, run_process
from repopool_async.hosts import _collect, _entries, _fence, _local_fence, _moves, _ownership, _survey, _tree
from repopool_async.hosts._ending import end_processes
from repopool_async.hosts._passes import Passes
from repopool_async.hosts._scripts import session_name
from repopool_async.hosts.base import (
    DEFAULT_STDERR_LIMIT,
    DEFAULT_STDOUT_LIMIT,
    ClockOffset,
    CloseEntries,
    Collected,
    Command,
    CopyFile,
    Discard,
    EndedProcesses,
    FileKind,
    FileStat,
    FileStep,
    GiveTree,
    Guard,
    HostProcess,
    Inode,
    Known,
    MakeDirectory,
    Moment,
    OutputCallback,
    RemoveFile,
    Rename,
    SetAccess,
    Settled,
    TreeInspection,
    Wanted,
    WriteFile,
)
from repopool_async.hosts.joined import Joined
from repopool_async.hosts.upkeep import upkeep_of
from repopool_async.models import CommandResult

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_CLOCK_PRECISION_NS: Final = 5_000_000
_CLOCK_TICK_SECONDS: Final = 0.002


class LocalHost:
    """This machine. May be made without a running event loop and used from several."""

    def __init__(
        self,
        host_id: str = "local",
        *,
        max_processes: int | None = None,
        watch_seconds: float = 300.0,
        sessions_directory: str = "~/.repopool/sessions",
    ) -> None:
        """Make a host.

        Args:
            host_id: its name in records.
            max_processes: how many commands of `run` and `batch` run at once, per event loop; more wait in order
                before their time limits begin. Twice the number of cores when missing.
            watch_seconds: without a sign of life for so long a session's processes are ended.
            sessions_directory: where sessions are noted.
        """
        self._watch_seconds = watch_seconds
        self._sessions_directory = str(Path(sessions_directory).expanduser())
        self._id = host_id
        self._max_processes = max_processes or 2 * (os.cpu_count() or 1)
        self._limiters: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )
        self._passes_of: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Passes] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"LocalHost({self._id!r}, max_processes={self._max_processes})"

    @property
    def id(self) -> str:
        """The host's name in records."""
        return self._id

    @property
    def can_tell_unknown(self) -> bool:
        """See `Host.can_tell_unknown`."""
        return True

    # -- commands ------------------------------------------------------------------------------------------------

    async def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None = None,
        input: bytes | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        stdout_limit: int = DEFAULT_STDOUT_LIMIT,
        stderr_limit: int = DEFAULT_STDERR_LIMIT,
        on_output: OutputCallback | None = None,
        guard: Guard | None = None,
        via: Sequence[str] = (),
    ) -> CommandResult:
        """See `Host.run`."""
        if guard is None:
            await self._admit([cwd or "/", *argv, *env.values()])
        async with self._limiter(), self._registered(argv, env, cwd, guard, via) as start:
            result = await run_process(
                start.argv,
                env=start.env,
                cwd=cwd,
                input=input,
                timeout=timeout,
                idle_timeout=idle_timeout,
                stdout_limit=stdout_limit,
                stderr_limit=stderr_limit,
                on_output=on_output,
            )
            await self._require_admitted(guard, result.exit_code)
            return result

    async def batch(
        self, commands: Sequence[Command], *, timeout: float | None = None, stop: bool = True
    ) -> list[CommandResult]:
        """See `Host.batch`."""
        results: list[CommandResult] = []
        async with self._limiter():
            deadline = Deadline.after(timeout)
            for command in commands:
                await self._admit([command.cwd or "/", *command.argv, *command.env.values()])
                if command.via:
                    await in_thread(_fence.require_startable, command.argv, command.env, command.cwd)
                result = await run_process(
                    [*command.via, *command.argv],
                    env=command.env,
                    cwd=command.cwd,
                    input=command.input,
                    timeout=deadline.remaining(),
                )
                results.append(result)
                if stop and result.exit_code != 0:
                    break
        return results

    def joined(self) -> Joined:
        """See `Host.joined`; one piece follows the other."""
        return Joined()

    def open_process(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None = None,
        stdin: bool = False,
        inherit: bool = False,
        guard: Guard | None = None,
        via: Sequence[str] = (),
    ) -> AbstractAsyncContextManager[HostProcess]:
        """See `Host.open_process`; these do not count against `max_processes`."""
        if guard is None and not via:
            return open_process(argv, env=env, cwd=cwd, stdin=stdin, inherit=inherit)
        return self._open_registered(argv, env, cwd, guard, via, stdin=stdin, inherit=inherit)

    @asynccontextmanager
    async def _open_registered(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str | None,
        guard: Guard | None,
        via: Sequence[str],
        *,
        stdin: bool,
        inherit: bool,
    ) -> AsyncIterator[HostProcess]:
        if guard is not None:
            # One that loses its lease between this look and its own ends at once, as one that is killed a moment later.
            await in_thread(_fence.require_present, self._id, guard)
        async with (
            self._registered(argv, env, cwd, guard, via) as start,
            open_process(start.argv, env=start.env, cwd=cwd, stdin=stdin, inherit=inherit) as process,
        ):
            yield process

    @asynccontextmanager
    async def _registered(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, guard: Guard | None, via: Sequence[str]
    ) -> AsyncIterator["_Start"]:
        """Say how a command is started under a guard; afterwards its note is gone, and nothing that left its group."""
        if guard is not None or via:
            await self._require_startable(argv, env, cwd, guard)
        if guard is None:
            yield _Start([*via, *argv], env)
            return
        try:
            yield _Start(*_fence.guarded([*via, *argv], env, guard))
        finally:
            await in_thread(_fence.forget_ended, guard)

    async def _require_startable(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, guard: Guard | None
    ) -> None:
        try:
            await in_thread(_fence.require_startable, argv, env, cwd)
        except OSError:
            if guard is not None:
                await in_thread(_fence.require_present, self._id, guard)  # it may have been removed with its slot
            raise

    async def _require_admitted(self, guard: Guard | None, exit_code: int) -> None:
        if guard is not None and exit_code == _fence.REFUSED:
            await in_thread(_fence.require_present, self._id, guard)

    async def _admit(self, texts: Iterable[str]) -> None:
        """Refuse upkeep of a slot that was taken over."""
        guard = upkeep_of(texts)
        if guard is not None:
            await in_thread(_fence.require_upkeep, self._id, guard)

    async def _change(self, names: Iterable[str], func: Callable[[*Ts], T], *args: *Ts) -> T:
        """Change files in a thread, unless that is upkeep of a slot that was taken over."""
        guard = upkeep_of(names)
        if guard is None:
            return await in_thread(func, *args)

        def change() -> T:
            _fence.require_upkeep(self._id, guard)
            return func(*args)

        return await in_thread(change)

    def _limiter(self) -> asyncio.Semaphore:
        return self._limiters.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._max_processes))

    # -- files ---------------------------------------------------------------------------------------------------

    async def apply(self, steps: Sequence[FileStep]) -> None:
        """See `Host.apply`."""
        await self._change((name for step in steps for name in _paths_of(step)), _apply, tuple(steps))

    async def read_bytes(self, path: str, *, limit: int) -> bytes | None:
        """See `Host.read_bytes`."""
        return await in_thread(_files.read_regular, path, limit)

    async def stat(self, path: str) -> FileStat | None:
        """See `Host.stat`."""
        return await in_thread(_stat, path)

    async def stat_many(self, paths: Sequence[str]) -> list[FileStat | None]:
        """See `Host.stat_many`."""
        return await in_thread(lambda: [_stat(path) for path in paths])

    async def list_directory(self, path: str) -> list[str]:
        """See `Host.list_directory`; what is no directory has no names either."""
        return await in_thread(_list_directory, path)

    async def remove_tree(self, path: str, *, is_urgent: bool = True) -> None:
        """See `Host.remove_tree`."""
        if not is_urgent:
            if await self._change([path], _removal.remove_unless_large, path):
                return
            await _remove_gently(path)  # what it could not remove is left to what can
        await self._change([path], _removal.remove_tree, path)

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
        """See `Host.inspect_tree`."""
        if only is not None:
            await in_thread(_require_inode, root, only)
        if since_ns is not None and known is not None and known.file_count >= _survey.MANY_FILES:
            surveyed = await _survey.inspect_tree(root, since_ns, settled, known)
            if surveyed is not None:
                return surveyed
        look = partial(_tree.inspect_tree, beside=beside)
        return await in_thread(look, root, since_ns, settled, passed_over, known)

    async def find_unknown(self, root: str, directories: Collection[str], known: Known) -> list[str]:
        """See `Host.find_unknown`."""
        return await in_thread(_tree.find_unknown, root, tuple(directories), known)

    async def remove_entries(self, root: str, names: Sequence[str], *, trash: str) -> int:
        """See `Host.remove_entries`."""
        return await self._change([root], _entries.remove_entries, root, tuple(names), trash) if names else 0

    async def move_directories(self, source: str, target: str, names: Sequence[str]) -> tuple[str, ...]:
        """See `Host.move_directories`."""
        paths = (source, target)
        return await self._change(paths, _moves.move_directories, source, target, tuple(names)) if names else ()

    async def file_system_clock_ns(self, directory: str, *, moves_on: bool = False) -> int:
        """See `Host.file_system_clock_ns`."""
        first = now = await in_thread(_file_system_clock_ns, directory)
        while moves_on and now == first:
            await anyio.sleep(_CLOCK_TICK_SECONDS)
            now = await in_thread(_file_system_clock_ns, directory)
        return now

    async def boot_id(self) -> str:
        """See `Host.boot_id`."""
        return boot_id()

    async def clock_offset(self) -> ClockOffset:
        """See `Host.clock_offset`."""
        return ClockOffset(wall_minus_boot_ns(), _CLOCK_PRECISION_NS)

    async def login_environment(self) -> Mapping[str, str]:
        """See `Host.login_environment`."""
        return os.environ

    async def is_network_file_system(self, path: str) -> bool:
        """See `Host.is_network_file_system`."""
        return await in_thread(_mounts.is_network_file_system, path)

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
        """See `Host.collect_files`."""
        return await in_thread(
            _collect.collect_files, root, inside, target, tuple(wanted), enter, limit_bytes, limit_files
        )

    async def measure_entries(self, root: str, names: Sequence[str]) -> list[int | None]:
        """See `Host.measure_entries`."""
        return await in_thread(_collect.measure_entries, root, tuple(names)) if names else []

    # -- processes -----------------------------------------------------------------------------------------------

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
        seconds = since.seconds if since is not None and since.boot_id == boot_id() else None
        ending = end_processes(self._passes(), mark, tree=tree, grace_seconds=grace_seconds, since=seconds, group=group)
        return await shielded(ending, name="end-processes")

    def _passes(self) -> Passes:
        return self._passes_of.setdefault(asyncio.get_running_loop(), Passes())

    # -- the fence -----------------------------------------------------------------------------------------------

    async def enter(self, slot_directory: str, token: int, session: str | None, *, kills: bool = True) -> None:
        """See `Host.enter`."""
        directory = None if session is None else self._session_directory(session)
        await _local_fence.enter(self._passes(), self._id, slot_directory, token, directory, kills=kills)

    async def leave(self, slot_directory: str, token: int) -> None:
        """See `Host.leave`."""
        await _local_fence.leave(self._passes(), self._id, slot_directory, token)

    async def kill(self, slot_directory: str, below: int) -> None:
        """See `Host.kill`."""
        await _local_fence.kill_until(self._passes(), self._id, slot_directory, below - 1)

    async def beat(self, session: str) -> None:
        """See `Host.beat`."""
        await in_thread(_fence.beat, self._session_directory(session), self._watch_seconds)

    async def end_session(self, session: str) -> None:
        """See `Host.end_session`."""
        await in_thread(_fence.end_session, self._session_directory(session))

    def _session_directory(self, session: str) -> str:
        return f"{self._sessions_directory}/{session_name(session)}"


@attrs.frozen
class _Start:
    argv: Sequence[str]
    env: Mapping[str, str]


async def _remove_gently(path: str) -> None:
    """Delete what is at a path when nobody else needs processor or disk, as far as the machine's own programs can.

    Not in a thread: one that waits for its turn while it has the interpreter's lock would keep everybody waiting.
    """
    argv = ["nice", "-n", "19", "ionice", "-c", "3", "rm", "-rf", "--one-file-system", "--", path]
    with suppress(OSError):
        await run_process(argv, env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"})


def _paths_of(step: FileStep) -> Iterator[str]:
    match step:
        case CopyFile(source, target) | Rename(source, target):
            yield from (source, target)
        case _:
            yield step.path


def _apply(steps: Sequence[FileStep]) -> None:
    for step in steps:
        _apply_step(step)


def _apply_step(step: FileStep) -> None:
    match step:
        case MakeDirectory(path, mode):
            os.makedirs(path, mode, exist_ok=True)
        case WriteFile(path, data, mode, is_durable):
            _files.write_atomic(path, data, mode=mode, durable=is_durable)
        case CopyFile(source, target, is_optional):
            _copy(source, target, is_optional=is_optional)
        case Rename(source, target):
            os.replace(source, target)
        case Discard(path, trash):
            _removal.discard(path, trash)
        case RemoveFile(path):
            with suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)
        case SetAccess(path, uid, gid, mode, is_optional):
            with suppress(*([FileNotFoundError] if is_optional else [])):
                _ownership.set_access(path, uid, gid, mode)
        case CloseEntries(path, spared):
            _ownership.close_entries(path, spared)
        case GiveTree(path, uid, gid):
            _ownership.give_tree(path, uid, gid)


def _copy(source: str, target: str, *, is_optional: bool) -> None:
    try:
        _files.copy_preserving(source, target)
    except FileNotFoundError:
        # The target's directory may be what is missing.
        if not is_optional or os.path.lexists(source):
            raise


def _stat(path: str) -> FileStat | None:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return FileStat(
        kind=_kind(status.st_mode),
        mode=stat.S_IMODE(status.st_mode),
        size=status.st_size,
        device=status.st_dev,
        inode=status.st_ino,
        links=status.st_nlink,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
    )


def _require_inode(path: str, wanted: Inode) -> None:
    found = _stat(path)
    if found is None or (found.device, found.inode) != (wanted.device, wanted.inode):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)


def _kind(mode: int) -> FileKind:
    kinds = {stat.S_IFREG: FileKind.FILE, stat.S_IFDIR: FileKind.DIRECTORY, stat.S_IFLNK: FileKind.LINK}
    return kinds.get(stat.S_IFMT(mode), FileKind.SPECIAL)


def _list_directory(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _file_system_clock_ns(directory: str) -> int:
    # Only a change asks the file system for its time. The name is one that is swept up after a crash.
    path = os.path.join(directory, f".repopool-{os.getpid()}-0-{secrets.token_hex(8)}.tmp")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        return os.fstat(descriptor).st_ctime_ns
    finally:
        os.close(descriptor)
        os.unlink(path)
