"""Running commands: own session, output read as it comes and capped, time limits, and nothing left when a call ends.

However a call ends, the command's whole process group is gone afterwards: TERM, a grace period, KILL, reaped, pipes
closed. The group's other members are ended too once the command itself has exited, even where they hold its pipes.
What leaves the group by a session of its own is found by other means (`hosts`). Nothing here knows of git or slots.
"""

import asyncio
import contextlib
import errno
import logging
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import IO, Any, Final, cast

import attrs

from repopool_async._aio import Deadline, in_thread, shielded
from repopool_async.exceptions import CommandTimeoutError
from repopool_async.models import CommandResult

logger: Final = logging.getLogger("repopool")

GRACE_SECONDS: Final = 5.0
"""Between TERM and KILL: git removes its half-made files meanwhile."""
STDOUT_LIMIT: Final = 256 * 1024 * 1024
STDERR_LIMIT: Final = 64 * 1024

_KILL_SECONDS: Final = 10.0
"""How long a killed process may take to die (it may be in the kernel, on a dead disk) before it is given up."""
_DRAIN_SECONDS: Final = 0.25
"""How long what a command left running may hold its output open."""
_CLOSE_SECONDS: Final = 1.0
_TAIL_SLACK_BYTES: Final = 1024 * 1024
_COMMAND_CHARACTERS: Final = 120
_PIDFD_SIGNAL_PROCESS_GROUP: Final = 4

OutputCallback = Callable[[str, bytes], None]
_Sink = Callable[[bytes], None]


async def run_process(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str | None = None,
    input: bytes | None = None,
    timeout: float | None = None,
    idle_timeout: float | None = None,
    stdout_limit: int = STDOUT_LIMIT,
    stderr_limit: int = STDERR_LIMIT,
    on_output: OutputCallback | None = None,
    grace_seconds: float = GRACE_SECONDS,
) -> CommandResult:
    """Run one command to its end; afterwards its process group is gone, whatever happened and whoever cancelled.

    Args:
        argv: the command; no shell is involved. It is looked up in the `PATH` of `env`.
        env: the complete environment.
        cwd: the directory, `/` when missing.
        input: given on standard input, as a file; otherwise that is empty.
        timeout: seconds in all. idle_timeout: seconds without any output.
        stdout_limit: bytes kept; the last ones, earlier ones are dropped. stderr_limit: likewise.
        on_output: is called with `stdout` or `stderr` and every chunk as it comes; what it raises ends the command.
        grace_seconds: between TERM and KILL.

    Raises:
        CommandTimeoutError: a limit was passed.
        OSError: the command or directory does not exist or may not be used.
    """
    started = time.monotonic()
    stdout, stderr = _Tail(stdout_limit), _Tail(stderr_limit)
    child = _Child(
        {1: _sink("stdout", stdout, on_output), 2: _sink("stderr", stderr, on_output)},
        grace_seconds=grace_seconds,
    )
    await _spawn(child, _start(child, argv, env, cwd, input=input, stdin=DEVNULL, output=PIPE))
    try:
        limit = await child.watch(timeout, idle_timeout)
    finally:
        await child.finish()
    if limit is not None:
        raise _timed_out(argv, limit, limit is idle_timeout, stderr.value())
    return CommandResult(
        exit_code=child.exit_code if child.exit_code is not None else -signal.SIGKILL,
        stdout=stdout.value(),
        stderr=stderr.value(),
        duration_seconds=time.monotonic() - started,
        is_truncated=stdout.is_truncated or stderr.is_truncated,
    )


@contextlib.asynccontextmanager
async def open_process(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str | None = None,
    stdin: bool = False,
    inherit: bool = False,
    grace_seconds: float = GRACE_SECONDS,
) -> AsyncIterator["RunningProcess"]:
    """Run a command while the block runs; leaving the block, however, ends what is left of its process group.

    Args:
        argv: the command. env: the complete environment. cwd: the directory, `/` when missing.
        stdin: whether `write` will be used; otherwise standard input is empty.
        inherit: connect standard input, output and error to this process's own instead of to pipes.
        grace_seconds: between TERM and KILL.

    Raises:
        OSError: the command or directory does not exist or may not be used.
    """
    stdout, stderr = asyncio.StreamReader(), asyncio.StreamReader()
    child = _Child({} if inherit else {1: stdout.feed_data, 2: stderr.feed_data}, grace_seconds=grace_seconds)
    if inherit:
        stdout.feed_eof()
        stderr.feed_eof()
    else:
        child.readers = {1: stdout, 2: stderr}
    source = None if inherit else (PIPE if stdin else DEVNULL)
    await _spawn(child, _start(child, argv, env, cwd, input=None, stdin=source, output=None if inherit else PIPE))
    try:
        yield RunningProcess(child, stdout, stderr)
    finally:
        await child.finish()


def start_detached(argv: Sequence[str], *, env: Mapping[str, str]) -> int:
    """Start a command that outlives this process, in a session of its own and without streams; return its pid.

    Nobody here waits for it: its parent ends at once.
    """
    script = '"$@" </dev/null >/dev/null 2>&1 & echo $!'
    started = subprocess.run(
        ["/bin/sh", "-c", script, "sh", *argv],
        env=env,
        cwd="/",
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=DEVNULL,
        start_new_session=True,
        check=True,
    )
    return int(started.stdout)


class RunningProcess:
    """A running command with streams; made by `open_process` only.

    A cancelled `read` loses nothing: the next one returns the same bytes. A command whose output nobody reads stops
    when the buffers (some 200 KiB) are full.
    """

    def __init__(self, child: "_Child", stdout: asyncio.StreamReader, stderr: asyncio.StreamReader) -> None:
        self._child = child
        self._stdout = stdout
        self._stderr = stderr

    @property
    def pid(self) -> int:
        """The process id, which is also its process group's."""
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; a death by signal N is -N."""
        return self._child.exit_code

    async def read(self, size: int = 65536) -> bytes:
        """Return the next bytes of standard output, `b""` at its end or where it is inherited."""
        return await self._stdout.read(size)

    async def read_stderr(self, size: int = 65536) -> bytes:
        """Return the next bytes of standard error, `b""` at its end or where it is inherited."""
        return await self._stderr.read(size)

    async def write(self, data: bytes) -> None:
        """Write to standard input and wait until the buffer has room.

        Cancelled, the data has been buffered and will be written.

        Raises:
            BrokenPipeError: standard input is closed, by either side, or was never asked for.
        """
        await self._child.write(data)

    async def close_stdin(self) -> None:
        """Close standard input, once what was written has gone through; a second call does nothing."""
        self._child.close_stdin()

    def signal(self, number: int) -> None:
        """Send a signal to the whole process group, where the command still runs."""
        if self.exit_code is None:
            self._child.signal(number)

    async def wait(self) -> int:
        """Return the exit code once the command itself has exited; its output may still hold unread bytes."""
        await self._child.wait()
        assert self.exit_code is not None
        return self.exit_code


class _Tail:
    """Keeps the last bytes of a stream."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = bytearray()
        self.is_truncated = False

    def append(self, data: bytes) -> None:
        self._kept += data
        # Cutting at every chunk would move the whole tail each time.
        if len(self._kept) > self._limit + _TAIL_SLACK_BYTES:
            self._cut()

    def value(self) -> bytes:
        self._cut()
        return bytes(self._kept)

    def _cut(self) -> None:
        excess = len(self._kept) - self._limit
        if excess > 0:
            self.is_truncated = True
            del self._kept[:excess]


def _sink(name: str, tail: _Tail, on_output: OutputCallback | None) -> _Sink:
    if on_output is None:
        return tail.append

    def sink(data: bytes) -> None:
        tail.append(data)
        on_output(name, data)

    return sink


@attrs.define
class _Group:
    """The process group of a command, signalled without ever hitting a later one that got the same number.

    A pidfd names the group for ever (Linux 6.9). Without it the number is used, and only at moments when the leader has
    not been reaped or has been just now: the kernel keeps a number from being used again while the group has members.
    """

    id: int
    _descriptor: int | None = None

    @classmethod
    def of(cls, leader: int) -> "_Group":
        if not hasattr(os, "pidfd_open"):
            return cls(leader)
        try:
            return cls(leader, os.pidfd_open(leader))
        except OSError:  # already reaped, an old kernel, a sandbox
            return cls(leader)

    def signal(self, number: int) -> bool:
        """Send a signal (0: none) to all members; False where there are none that may be signalled."""
        if self._descriptor is not None:
            try:
                signal.pidfd_send_signal(self._descriptor, number, None, _PIDFD_SIGNAL_PROCESS_GROUP)
            except ProcessLookupError:
                return False
            except OSError:  # an older kernel does not know the flag
                self.close()
            else:
                return True
        try:
            os.killpg(self.id, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def has_live_members(self) -> bool:
        """Return whether a member is more than a zombie that its new parent has yet to reap; True if nobody can say."""
        try:
            pids = [name for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208 - one read, no objects
        except OSError:
            return True
        return any(self._is_live_member(pid) for pid in pids)

    def _is_live_member(self, pid: str) -> bool:
        try:
            stat = Path("/proc", pid, "stat").read_bytes()
        except OSError:
            return False
        state, _, group = stat[stat.rfind(b")") + 2 :].split(maxsplit=3)[:3]
        return int(group) == self.id and state not in (b"Z", b"X")

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Child(asyncio.SubprocessProtocol):
    """One command from its start to the closing of its last pipe.

    A protocol of our own, because `asyncio.subprocess.Process.wait` waits for the pipes' end too, which something
    that the command left running in the background can put off for ever.
    """

    def __init__(self, sinks: Mapping[int, _Sink], *, grace_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self.readers: Mapping[int, asyncio.StreamReader] = {}
        self.failure: asyncio.Future[BaseException] = loop.create_future()
        self._exited: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()
        self._sinks = sinks
        self._grace_seconds = grace_seconds
        self._last_output = time.monotonic()
        self._is_writable = asyncio.Event()
        self._is_writable.set()
        self._transport: asyncio.SubprocessTransport | None = None
        self._group: _Group | None = None
        self.exit_code: int | None = None

    # What asyncio tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because other event loops' transports are no subclasses.
        self._transport = cast("asyncio.SubprocessTransport", transport)
        self._group = _Group.of(self._transport.get_pid())
        for descriptor, reader in self.readers.items():
            reader.set_transport(cast("asyncio.ReadTransport", self._transport.get_pipe_transport(descriptor)))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._last_output = time.monotonic()
        try:
            self._sinks[fd](data)
        except BaseException as error:  # noqa: BLE001 - raised by whoever watches; the loop would only log it
            if not self.failure.done():
                self.failure.set_result(error)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002 - the end, however
        if fd == 0:
            self._is_writable.set()
        elif fd in self.readers:
            self.readers[fd].feed_eof()

    def pause_writing(self) -> None:
        self._is_writable.clear()

    def resume_writing(self) -> None:
        self._is_writable.set()

    def process_exited(self) -> None:
        assert self._transport is not None
        self.exit_code = self._transport.get_returncode()
        self._exited.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio gives none
        self._closed.set_result(None)

    # What the callers do.

    @property
    def pid(self) -> int:
        assert self._group is not None
        return self._group.id

    def signal(self, number: int) -> bool:
        assert self._group is not None
        return self._group.signal(number)

    async def wait(self) -> None:
        await asyncio.wait([self._exited])

    async def write(self, data: bytes) -> None:
        pipe = self._stdin
        if pipe is None or pipe.is_closing():
            raise BrokenPipeError(errno.EPIPE, "Standard input is closed")
        pipe.write(data)
        await self._is_writable.wait()
        if pipe.is_closing():
            raise BrokenPipeError(errno.EPIPE, "The command closed its standard input")

    def close_stdin(self) -> None:
        if self._stdin is not None:
            self._stdin.close()

    @property
    def _stdin(self) -> asyncio.WriteTransport | None:
        assert self._transport is not None
        return cast("asyncio.WriteTransport | None", self._transport.get_pipe_transport(0))

    async def watch(self, timeout: float | None, idle_timeout: float | None) -> float | None:
        """Wait for the exit and a moment for the end of the output; return the limit that was passed before, if any.

        Raises:
            BaseException: a sink did.
        """
        total = Deadline.after(timeout)
        while not self._exited.done() and not self.failure.done():
            idle = Deadline(None if idle_timeout is None else self._last_output + idle_timeout)
            if total.is_expired:
                return timeout
            if idle.is_expired:
                return idle_timeout
            left = [seconds for seconds in (total.remaining(), idle.remaining()) if seconds is not None]
            await self._first(self._exited, self.failure, seconds=min(left, default=None))
        await self._first(self._closed, self.failure, seconds=_DRAIN_SECONDS)
        if self.failure.done():
            raise self.failure.result()
        return None

    async def _first(self, *futures: "asyncio.Future[Any]", seconds: float | None) -> None:
        await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    async def finish(self) -> None:
        """End what is left of the process group and close everything; always finishes."""
        if self._closed.done() and not self.signal(0):
            self._release()
            return
        await shielded(self._end(), name=f"end:{self.pid}")

    async def _end(self) -> None:
        try:
            if not (await self._stop(signal.SIGTERM, self._grace_seconds) or await self._stop_hard()):
                logger.error("process group %d could not be ended", self.pid)
            await self._close()
        except asyncio.CancelledError:  # the loop shuts down
            self.signal(signal.SIGKILL)
            raise
        finally:
            self._release()

    async def _stop_hard(self) -> bool:
        return await self._stop(signal.SIGKILL, _KILL_SECONDS)

    async def _stop(self, number: int, seconds: float) -> bool:
        """Signal the group and wait until nothing of it lives; return False where the time was not enough."""
        assert self._group is not None
        deadline = Deadline.after(seconds)
        self.signal(number)
        self.signal(signal.SIGCONT)  # a stopped member does not see a TERM
        await asyncio.wait([self._exited], timeout=deadline.remaining())
        pause = 0.001
        while not self._exited.done() or (self.signal(0) and await in_thread(self._group.has_live_members)):
            if deadline.is_expired:
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.1)
        return True

    async def _close(self) -> None:
        """Take what is left in the pipes, then close them, also where somebody outside the group holds them open."""
        assert self._transport is not None
        pipe = self._stdin
        # One that is closed already, with nothing left to write, must not be touched: asyncio has taken it apart.
        if pipe is not None and (not pipe.is_closing() or pipe.get_write_buffer_size()):
            pipe.abort()
        if not self.readers:
            await asyncio.wait([self._closed], timeout=_DRAIN_SECONDS)
        self._transport.close()
        await asyncio.wait([self._closed], timeout=_CLOSE_SECONDS)

    def _release(self) -> None:
        assert self._transport is not None
        assert self._group is not None
        self._transport.close()
        self._group.close()


async def _spawn(child: _Child, start: Coroutine[Any, Any, None]) -> None:
    async def finish(_: None) -> None:
        await child.finish()

    await shielded(start, name="spawn", on_abandoned=finish)


async def _start(
    child: _Child,
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str | None,
    *,
    input: bytes | None,
    stdin: int | None,
    output: int | None,
) -> None:
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(await in_thread(_file_of, input)) if input else stdin
        await asyncio.get_running_loop().subprocess_exec(
            lambda: child,
            *argv,
            env=env,
            cwd=cwd or "/",
            stdin=source,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _file_of(data: bytes) -> IO[bytes]:
    # A file needs no feeding, cannot break like a pipe, and can be opened again by name (`/dev/stdin`).
    file: IO[bytes]
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("stdin"), "w+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the caller closes it
    written = 0
    while written < len(data):
        written += file.write(memoryview(data)[written:])
    file.seek(0)
    return file


def _timed_out(argv: Sequence[str], limit: float, is_idle: bool, stderr: bytes) -> CommandTimeoutError:
    command = shlex.join(argv)
    if len(command) > _COMMAND_CHARACTERS:
        command = command[: _COMMAND_CHARACTERS - 1] + "…"
    how = "printed nothing for" if is_idle else "ran longer than"
    return CommandTimeoutError(
        f"`{command}` {how} {limit:g} s and was ended",
        argv=tuple(argv),
        timeout_seconds=limit,
        is_idle=is_idle,
        stderr=stderr,
    )
