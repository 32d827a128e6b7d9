"""A machine reached over SSH as a host: everything in one execution of `sh` each, with nothing installed there.

The host needs git and a POSIX shell. Where it has the GNU tools and /proc its answers are as exact as the local host's;
elsewhere they are cautious: what cannot be told counts as changed. This module runs commands; files are the business
of `_ssh_files`, the fence that of `_ssh_fence`, connections that of `_ssh_connection`. Nothing here knows of git or
leases.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Final, Self

import attrs

from repopool_async._aio import Deadline
from repopool_async._process import _sink, _Tail, _timed_out
from repopool_async.hosts._scripts import (
    CLEAN_BOOTSTRAP,
    admitted,
    answers,
    batch_call,
    framed,
    new_word,
    os_error,
    starting,
)
from repopool_async.hosts._ssh_connection import SshOptions, Target
from repopool_async.hosts._ssh_fence import RemoteFence
from repopool_async.hosts._ssh_files import RemoteFiles
from repopool_async.hosts._ssh_process import Session, Sink
from repopool_async.hosts._ssh_shell import Launch, Shell
from repopool_async.hosts._ssh_streams import opened
from repopool_async.hosts.base import (
    DEFAULT_STDERR_LIMIT,
    DEFAULT_STDOUT_LIMIT,
    Command,
    Guard,
    HostProcess,
    OutputCallback,
)
from repopool_async.hosts.joined import Joined
from repopool_async.hosts.upkeep import upkeep_of
from repopool_async.models import CommandResult

_SIGNALS: Final = 128
# What a shell says of a death by signal. 129 is left out: git says it of a wrong usage.
_DEATHS: Final = frozenset((2, 3, 4, 6, 7, 8, 9, 11, 13, 14, 15, 24, 25))


@attrs.frozen
class _Limits:
    timeout: float | None
    idle: float | None
    stdout: int
    stderr: int
    deadline: Deadline = attrs.field(
        init=False, default=attrs.Factory(lambda self: Deadline.after(self.timeout), takes_self=True)
    )


class SshHost(RemoteFiles, RemoteFence):
    """A machine reached over SSH. Belongs to the event loop of its first call; `close` it there."""

    def __init__(
        self,
        spec: str,
        *,
        host_id: str | None = None,
        host_key: str | None = None,
        options: SshOptions | None = None,
        max_connections: int = 16,
        watch_seconds: float = 300.0,
        sessions_directory: str = ".repopool/sessions",
    ) -> None:
        """Make a host; nothing is connected before the first call.

        Args:
            spec: a name of ssh_config, or `user@host:port`; the user's configuration, agent and known_hosts apply.
            host_id: its name in records, `spec` when missing.
            host_key: the only host key that is accepted, as a line of a `.pub` file.
            options: how it is reached.
            max_connections: how many may carry lessees' commands, six on each, beside the one for all else.
            watch_seconds: without a sign of life for so long a session's processes are ended on the host.
            sessions_directory: on the host, where sessions are noted; relative to the login's directory.

        Raises:
            ConfigError: `spec` names no host.
        """
        given = options or SshOptions()
        if host_key is not None:
            given = attrs.evolve(given, host_key=host_key)
        self._id = host_id or spec
        self._spec = spec
        self._watch_seconds = watch_seconds
        self._sessions_directory = sessions_directory
        self._make_shell = functools.partial(
            Shell, self._id, Target.parse(spec), given, max_connections=max_connections
        )
        self._started_shell: Shell | None = None

    def __repr__(self) -> str:
        return f"SshHost({self._spec!r}, host_id={self._id!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def id(self) -> str:
        """The host's name in records."""
        return self._id

    @property
    def can_tell_unknown(self) -> bool:
        """See `Host.can_tell_unknown`."""
        return False

    @property
    def exec_count(self) -> int:
        """How often something has been executed on the host: a round trip or two each."""
        return self._shell.exec_count

    @property
    def _shell(self) -> Shell:
        # Made by the first call: what it holds belongs to an event loop.
        if self._started_shell is None:
            self._started_shell = self._make_shell()
        return self._started_shell

    async def close(self) -> None:
        """Close the connections, once what is being ended has ended; the host can be used again afterwards."""
        shell, self._started_shell = self._started_shell, None
        if shell is not None:
            await shell.close()

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
        """See `Host.run`.

        What a command without a guard leaves running in its group is ended only where it holds the command's output
        open, or where the call ends early: to look would take another round trip.
        """
        work = None if guard is not None else upkeep_of([cwd or "/", *argv, *env.values()])
        limits = _Limits(timeout, idle_timeout, stdout_limit, stderr_limit)
        if guard is None and self._shell.is_joining:
            return await self._run_joined(Command(tuple(argv), env, cwd, input, tuple(via)), work, limits, on_output)
        one = Command(tuple(argv), env, cwd, via=tuple(via))
        make = functools.partial(starting, one, guard=guard, has_stdin=input is not None, upkeep=work)
        launch = Launch(make, guard=guard, upkeep=work, keeps_stdin=input is not None, is_lessees=guard is not None)
        return await self._run(argv, launch, limits, input=input, on_output=on_output)

    async def batch(
        self, commands: Sequence[Command], *, timeout: float | None = None, stop: bool = True
    ) -> list[CommandResult]:
        """See `Host.batch`.

        A shell tells a death by signal N as 128 + N; that is believed where N is a signal programs die of.
        """
        if not commands:
            return []
        word, refusal = new_word(), new_word()
        calls = [batch_call(one, refusal) for one in commands]
        work = upkeep_of(calls)
        sections, before = (("starting", "fence"), admitted(work)) if work else (("starting",), b"")
        script = framed(calls, word, sections=sections, stops=stop, before=before)
        launch = Launch(lambda _: (CLEAN_BOOTSTRAP, script), upkeep=work, word=word)
        limits = _Limits(timeout, None, DEFAULT_STDOUT_LIMIT, DEFAULT_STDOUT_LIMIT)
        done = await self._run(commands[0].argv, launch, limits)
        results = []
        for answer in answers(word, done.stdout, done.stderr):
            _require_started(answer.stderr, refusal)
            results.append(
                CommandResult(_exit_code(answer.status), answer.stdout, answer.stderr, done.duration_seconds)
            )
        return results

    def joined(self) -> Joined:
        """See `Host.joined`: what the pieces begin with is one execution, and ends at the first that fails.

        Whoever is cancelled waits for it, unless a command is among them: then all of it is ended.
        """
        return self._shell.joined()

    async def _run_joined(
        self, one: Command, work: Guard | None, limits: "_Limits", on_output: OutputCallback | None
    ) -> CommandResult:
        began, refusal = time.monotonic(), new_word()
        call = b"(\n" + batch_call(one, refusal) + b"\n)"
        answer = await self._shell.ask(call, upkeep=work, timeout=limits.timeout)
        _require_started(answer.stderr, refusal)
        stdout, stderr = _Tail(limits.stdout), _Tail(limits.stderr)
        _sink("stdout", stdout, on_output)(answer.stdout)
        _sink("stderr", stderr, on_output)(answer.stderr)
        return CommandResult(
            exit_code=_exit_code(answer.status),
            stdout=stdout.value(),
            stderr=stderr.value(),
            duration_seconds=time.monotonic() - began,
            is_truncated=stdout.is_truncated or stderr.is_truncated,
        )

    async def _run(
        self,
        argv: Sequence[str],
        launch: Launch,
        limits: "_Limits",
        *,
        input: bytes | None = None,
        on_output: OutputCallback | None = None,
    ) -> CommandResult:
        began = time.monotonic()
        stdout, stderr = _Tail(limits.stdout), _Tail(limits.stderr)
        sinks = {1: _sink("stdout", stdout, on_output), 2: _sink("stderr", stderr, on_output)}
        async with AsyncExitStack() as stack:
            session = await self._start(stack, argv, launch, sinks, limits)
            if input is not None:
                session.feed(input)
            limit = await session.watch(limits.timeout, limits.deadline, limits.idle)
            if limit is None and session.is_lost:
                raise self._shell.lost(session.loss)
        if limit is not None:
            raise _timed_out(argv, limit, limit is limits.idle, stderr.value())
        assert session.exit_code is not None
        return CommandResult(
            exit_code=session.exit_code,
            stdout=stdout.value(),
            stderr=stderr.value(),
            duration_seconds=time.monotonic() - began,
            is_truncated=stdout.is_truncated or stderr.is_truncated,
        )

    async def _start(
        self, stack: AsyncExitStack, argv: Sequence[str], launch: Launch, sinks: Mapping[int, Sink], limits: "_Limits"
    ) -> Session:
        """Start a command; its time counts from before the connection, which may be frozen."""
        limit = limits.deadline.limit()
        try:
            async with limit:
                return await stack.enter_async_context(self._shell.started(launch, sinks))
        except TimeoutError:
            if limits.timeout is None or not limit.expired():
                raise
        raise _timed_out(argv, limits.timeout, False, b"")

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
        """See `Host.open_process`."""
        one = Command(tuple(argv), env, cwd, via=tuple(via))
        make = functools.partial(starting, one, guard=guard, has_stdin=stdin or inherit)
        launch = Launch(make, guard=guard, keeps_stdin=stdin or inherit, is_lessees=True)
        return opened(lambda: self._shell, launch, inherit=inherit)


def _exit_code(status: int) -> int:
    number = status - _SIGNALS
    return -number if number in _DEATHS else status


def _require_started(stderr: bytes, refusal: str) -> None:
    """Raise what a command of a batch could not be started for."""
    _, is_refused, reason = stderr.partition(refusal.encode() + b" ")
    if is_refused:
        path = reason.decode(errors="surrogateescape").rpartition(": ")[0]
        raise os_error(reason, path)
