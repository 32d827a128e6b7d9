"""Long-lived commands on a host reached over SSH: streams both ways, signals, the exit.

Only the streams are here; starting and ending is the business of `_ssh_shell`.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from repopool_async._aio import TaskSet, in_thread
from repopool_async.hosts._ssh_process import Gate, Session
from repopool_async.hosts._ssh_shell import Launch, Shell
from repopool_async.hosts.base import HostProcess

_CHUNK_BYTES: Final = 65536


class RemoteProcess:
    """A running command; made by `opened` only.

    A cancelled `read` loses nothing. A command whose output nobody reads stops when the buffers, some two megabytes,
    are full; both its streams share them.
    """

    def __init__(
        self, shell: Shell, session: Session, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader
    ) -> None:
        self._shell = shell
        self._session = session
        self._stdout = stdout
        self._stderr = stderr

    @property
    def pid(self) -> int:
        """The process id on the host, which is also its process group's."""
        return self._session.started.result()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; a death by signal N is -N."""
        return self._session.exit_code

    async def read(self, size: int = _CHUNK_BYTES) -> bytes:
        """See `HostProcess.read`.

        Raises:
            ConnectionResetError: the connection was lost.
        """
        return await self._stdout.read(size)

    async def read_stderr(self, size: int = _CHUNK_BYTES) -> bytes:
        """See `HostProcess.read_stderr`; errors are those of `read`."""
        return await self._stderr.read(size)

    async def write(self, data: bytes) -> None:
        """See `HostProcess.write`.

        Raises:
            BrokenPipeError: standard input is closed, or was never asked for.
        """
        await self._session.write(data)

    async def close_stdin(self) -> None:
        """See `HostProcess.close_stdin`."""
        self._session.close_stdin()

    def signal(self, number: int) -> None:
        """See `HostProcess.signal`; it is on its way when this returns, and nobody says whether it arrived."""
        if self.exit_code is None:
            self._shell.signal(self.pid, number)

    async def wait(self) -> int:
        """See `HostProcess.wait`.

        Raises:
            HostUnreachableError: the connection was lost; nobody knows how the command ended, or whether.
        """
        await asyncio.wait([self._session.exited])
        if self._session.exit_code is None:
            raise self._shell.lost(self._session.loss)
        return self._session.exit_code


@asynccontextmanager
async def opened(shell: Callable[[], Shell], launch: Launch, *, inherit: bool) -> AsyncIterator[HostProcess]:
    """Have a command with streams running while the block runs; see `Host.open_process`."""
    stdout, stderr = asyncio.StreamReader(), asyncio.StreamReader()
    readers = {1: stdout, 2: stderr}
    async with shell().started(launch, {1: stdout.feed_data, 2: stderr.feed_data}, readers=readers) as session:
        gate = Gate(session)
        for reader in readers.values():
            reader.set_transport(gate.for_reader())
        process = RemoteProcess(shell(), session, stdout, stderr)
        if inherit:
            async with _connected(process):
                yield process
        else:
            yield process


@asynccontextmanager
async def _connected(process: RemoteProcess) -> AsyncIterator[None]:
    """Pass on this process's own standard streams while the block runs; what was printed is passed on to its end."""
    outputs, inputs = TaskSet("inherited-output"), TaskSet("inherited-input")
    outputs.spawn(_copy_out(process.read, 1), name="stdout")
    outputs.spawn(_copy_out(process.read_stderr, 2), name="stderr")
    inputs.spawn(_copy_in(process), name="stdin")
    try:
        yield
        if process.exit_code is not None:
            await outputs.join(timeout=5.0)
    finally:
        await inputs.cancel()
        await outputs.cancel()


async def _copy_out(read: Callable[[int], Awaitable[bytes]], descriptor: int) -> None:
    with suppress(ConnectionResetError):
        while data := await read(_CHUNK_BYTES):
            while data:
                data = data[await in_thread(os.write, descriptor, data) :]


async def _copy_in(process: RemoteProcess) -> None:
    with suppress(BrokenPipeError):
        while data := await _read_stdin():
            await process.write(data)
        await process.close_stdin()


async def _read_stdin() -> bytes:
    """Read from this process's standard input without a thread that nothing could end."""
    loop = asyncio.get_running_loop()
    is_ready = asyncio.Event()
    try:
        loop.add_reader(0, is_ready.set)
    except PermissionError:  # a plain file is always ready
        return os.read(0, _CHUNK_BYTES)
    try:
        await is_ready.wait()
        return os.read(0, _CHUNK_BYTES)
    finally:
        loop.remove_reader(0)
