"""One command in one channel: its script sent, its start told, its output passed on, its end waited for.

Every script says on standard output as what process it runs before anything else of it appears; what a login shell
prints before that is dropped. Who opens channels is `_ssh_connection`, what scripts say `_scripts`; ending a process
group takes another channel, and is the business of `ssh`.
"""

import asyncio
import errno
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from repopool_async._aio import Deadline

_STDERR: Final = 1
_NOISE_BYTES: Final = 256 * 1024
"""What a login shell may print before the command is given up."""
_QUIET_SECONDS: Final = 1.0
"""How long, after a command has exited, its output may be silent before what holds it open is taken for a leftover."""

Sink = Callable[[bytes], None]


class Refusal(Exception):  # noqa: N818 - it never leaves the package
    """The host did not start the command; the words say why."""


class Session:
    """What asyncssh tells of a channel: a duck-typed `SSHClientSession`.

    Attributes:
        script: what is sent at once. keeps_stdin: whether more will be written after it.
        sinks: are given output, 1 and 2. pid: the process, known once `started` is done.
    """

    def __init__(
        self,
        word: str,
        script: bytes,
        sinks: Mapping[int, Sink],
        *,
        keeps_stdin: bool = False,
        readers: Mapping[int, asyncio.StreamReader] | None = None,
        on_abandoned: Callable[["Session"], Awaitable[None]] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[int] = loop.create_future()
        self.exited: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.failure: asyncio.Future[BaseException] = loop.create_future()
        self._readers = readers or {}
        self.exit_code: int | None = None
        self.loss: Exception | None = None
        self._loop = loop
        self._mark = b"\n" + word.encode()
        self._script = script
        self._keeps_stdin = keeps_stdin
        self._sinks = sinks
        self._on_abandoned = on_abandoned
        self._noise: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
        self._last_output = time.monotonic()
        self._is_writable = asyncio.Event()
        self._is_writable.set()
        self._channel: Any = None

    # What asyncssh tells.

    def connection_made(self, chan: Any) -> None:
        self._channel = chan
        # The request to execute goes out before this turn of the loop ends; the script follows without waiting for an
        # answer to it. (OpenSSH opens the window with its answer, others take it at once.)
        self._loop.call_soon(self._send_script)

    def session_started(self) -> None:
        pass

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self._last_output = time.monotonic()
        stream = 2 if datatype == _STDERR else 1
        if stream in self._noise:
            data = self._without_noise(stream, data)
        if data:
            self._deliver(stream, data)

    def eof_received(self) -> bool:
        for reader in self._readers.values():
            reader.feed_eof()
        return True  # its exit is still to come

    def exit_status_received(self, status: int) -> None:
        self._exit(status)

    def exit_signal_received(self, name: str, core_dumped: bool, msg: str, lang: str) -> None:  # noqa: ARG002
        self._exit(-getattr(signal, f"SIG{name}", signal.SIGKILL))

    def connection_lost(self, exc: Exception | None) -> None:
        self.loss = exc
        lost = ConnectionResetError(errno.ECONNRESET, "The connection to the host was lost")
        for reader in self._readers.values():
            if self.exit_code is None:
                reader.set_exception(lost)
            else:
                reader.feed_eof()
        self._is_writable.set()
        for future in (self.exited, self.closed):
            if not future.done():
                future.set_result(None)
        if not self.started.done():
            self.started.cancel()

    def pause_writing(self) -> None:
        self._is_writable.clear()

    def resume_writing(self) -> None:
        self._is_writable.set()

    def xon_xoff_requested(self, client_can_do: bool) -> None:
        pass

    # Reading what comes.

    def _send_script(self) -> None:
        if not self._channel.is_closing():
            if self._script:
                self._channel.write(self._script)
            if not self._keeps_stdin:
                self._channel.write_eof()

    def _without_noise(self, stream: int, data: bytes) -> bytes:
        """Return what comes after the first mark; "" while it has not come."""
        noise = self._noise[stream]
        noise += data
        start = noise.find(self._mark)
        end = -1 if start < 0 else noise.find(b"\n", start + len(self._mark))
        if end < 0:
            if len(noise) > _NOISE_BYTES:
                del noise[: -len(self._mark) - 200]
            return b""
        words = noise[start + len(self._mark) : end].decode(errors="surrogateescape").split(" ", 2)
        del self._noise[stream]
        if stream == 1 and not self.started.done():
            self._note_start(words[1] if len(words) > 1 else "", words[2] if len(words) > 2 else "")
        return bytes(noise[end + 1 :])

    def _note_start(self, kind: str, detail: str) -> None:
        if kind == "started":
            self.started.set_result(int(detail))
        else:
            self.started.set_exception(Refusal(kind, detail))
            self.started.exception()  # seen by whoever waits, if anybody does

    def _deliver(self, stream: int, data: bytes) -> None:
        try:
            self._sinks[stream](data)
        except BaseException as error:  # noqa: BLE001 - raised by whoever watches; the loop would only log it
            if not self.failure.done():
                self.failure.set_result(error)

    def _exit(self, code: int) -> None:
        self.exit_code = code
        if not self.exited.done():
            self.exited.set_result(None)

    # What callers do.

    async def abandon(self) -> None:
        """End what was started for somebody who has been cancelled meanwhile."""
        if self._on_abandoned is not None:
            await self._on_abandoned(self)
        self.close()

    async def wait_started(self) -> bool:
        """Wait until the command is about to run; False where the connection was lost before.

        Raises:
            Refusal: it is not.
        """
        await asyncio.wait([self.started])
        if self.started.cancelled():
            return False
        self.started.result()
        return True

    async def watch(self, timeout: float | None, deadline: Deadline, idle_timeout: float | None) -> float | None:
        """Wait for the exit and the end of the output; return the limit that was passed before, if any.

        Args:
            timeout: what `deadline` was made of.

        Raises:
            BaseException: a sink did.
        """
        while not self.exited.done() and not self.failure.done():
            idle = Deadline(None if idle_timeout is None else self._last_output + idle_timeout)
            if deadline.is_expired:
                return timeout
            if idle.is_expired:
                return idle_timeout
            left = [seconds for seconds in (deadline.remaining(), idle.remaining()) if seconds is not None]
            await self._first(self.exited, self.failure, seconds=min(left, default=None))
        exited_at = time.monotonic()
        while not self.closed.done() and not self.failure.done():
            # Output may take longer to arrive than the exit; only silence means that nobody writes any more.
            quiet = Deadline(max(exited_at, self._last_output) + _QUIET_SECONDS)
            if quiet.is_expired:
                break
            await self._first(self.closed, self.failure, seconds=quiet.remaining())
        if self.failure.done():
            raise self.failure.result()
        return None

    async def _first(self, *futures: "asyncio.Future[Any]", seconds: float | None) -> None:
        await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    @property
    def is_lost(self) -> bool:
        """Whether the connection went before the command's exit was known."""
        return self.closed.done() and self.exit_code is None

    async def write(self, data: bytes) -> None:
        if not self._keeps_stdin or self._channel.is_closing():
            raise BrokenPipeError(errno.EPIPE, "Standard input is closed")
        self._channel.write(data)
        await self._is_writable.wait()
        if self.closed.done():
            raise BrokenPipeError(errno.EPIPE, "The command closed its standard input")

    def feed(self, data: bytes) -> None:
        """Write everything there is to write, and close standard input."""
        if not self._channel.is_closing():
            self._channel.write(data)
            self._channel.write_eof()

    def close_stdin(self) -> None:
        if not self._channel.is_closing():
            self._channel.write_eof()

    def pause_reading(self) -> None:
        self._channel.pause_reading()

    def resume_reading(self) -> None:
        self._channel.resume_reading()

    def close(self) -> None:
        """Close the channel; what is in it is dropped."""
        if self._channel is not None and not self.closed.done():
            self._channel.abort()


class Gate:
    """Lets each of two readers hold back a channel that they share: it flows while neither does."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._holding: set[object] = set()

    def for_reader(self) -> asyncio.ReadTransport:
        """Return a transport for one reader to be held back by."""
        return _HalfGate(self._session, self._holding)


class _HalfGate(asyncio.ReadTransport):
    def __init__(self, session: Session, holding: set[object]) -> None:
        super().__init__()
        self._session = session
        self._holding = holding

    def pause_reading(self) -> None:
        self._holding.add(self)
        self._session.pause_reading()

    def resume_reading(self) -> None:
        self._holding.discard(self)
        if not self._holding:
            self._session.resume_reading()
