"""Connections to one host: made once for all who wait, checked, kept alive, given up when dead, not tried too often.

A connection carries a few channels at once; more commands wait in order. Opening a channel has a deadline of its own,
because a link may stop without a word, and is tried again where the server had no room for it, because then nothing has
started. What runs in the channels is the business of `_ssh_process`. asyncssh is imported on use.
"""

import asyncio
import contextlib
import errno
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

import attrs

from repopool_async._aio import TaskSet, shielded
from repopool_async.exceptions import ConfigError, HostKeyError, HostUnreachableError

if TYPE_CHECKING:
    import asyncssh

_TARGET: Final = re.compile(
    r"(?:ssh://)?(?:(?P<user>[^@/\s]+)@)?(?:\[(?P<literal>[0-9A-Fa-f:.%a-z]+)\]|(?P<host>[^:@/\s\[\]-][^:@/\s\[\]]*))"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_OPEN_TRIES: Final = 10
_CONNECT_TRIES: Final = 3
_FIRST_PAUSE_SECONDS: Final = 0.2
_LONGEST_PAUSE_SECONDS: Final = 60.0
_CLOSE_SECONDS: Final = 2.0
_GIVE_BACK_SECONDS: Final = 1.0


@attrs.frozen
class Target:
    """Where a host is: a name of ssh_config or of the network, and what is to be used instead of what that says."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, spec: str) -> "Target":
        """Read `alias`, `user@host`, `user@host:port` or `ssh://user@host:port`; IPv6 addresses in brackets.

        Raises:
            ConfigError: it is none of these.
        """
        match = _TARGET.fullmatch(spec)
        port = int(match["port"]) if match and match["port"] else None
        if match is None or (port is not None and not 0 < port < 65536):
            raise ConfigError(f"{spec!r} is no SSH host: write a name of ~/.ssh/config or user@host:port")
        return cls(match["literal"] or match["host"], match["user"], port)

    def __str__(self) -> str:
        return self.host if self.port is None else f"{self.host}:{self.port}"


@attrs.frozen
class SshOptions:
    """How a host is reached; everything else is as the user's ssh_config says.

    Attributes:
        config: ssh_config files instead of `~/.ssh/config`. known_hosts: a file instead of the usual ones.
        host_key: the host's own key, as a line of a `.pub` file; no other is accepted then, whatever known_hosts say.
        identities: private key files instead of the usual ones.
        max_channels: at once on one connection; OpenSSH allows ten, and frees one a moment after it was closed.
        keepalive_seconds, keepalive_count: a link that answers nothing for so many intervals is dead.
        connect_seconds: for one try to connect. open_seconds: for opening a channel.
        breaker_failures: after so many failures in a row calls fail at once for a while.
    """

    config: tuple[str, ...] | None = None
    known_hosts: str | None = None
    host_key: str | None = None
    identities: tuple[str, ...] | None = None
    max_channels: int = 6
    keepalive_seconds: float = 15.0
    keepalive_count: int = 3
    connect_seconds: float = 20.0
    open_seconds: float = 20.0
    breaker_failures: int = _CONNECT_TRIES
    first_pause_seconds: float = _FIRST_PAUSE_SECONDS


@attrs.define
class Breaker:
    """When a host may be tried again: jittered pauses that double; after several failures nobody is kept waiting."""

    limit: int
    first_pause: float = _FIRST_PAUSE_SECONDS
    failures: int = 0
    retry_at: float = 0.0
    last: HostUnreachableError | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls fail at once."""
        return self.failures >= self.limit and time.monotonic() < self.retry_at

    def pause(self) -> float:
        """Return the seconds until the next try."""
        return max(0.0, self.retry_at - time.monotonic())

    def succeeded(self) -> None:
        """Note that the host can be reached."""
        self.failures, self.last = 0, None

    def failed(self, error: HostUnreachableError, *, is_lasting: bool) -> None:
        """Note that it cannot; where the reason is one that lasts, it is not tried again soon."""
        self.failures = max(self.failures + 1, self.limit if is_lasting else 0)
        pause = min(_LONGEST_PAUSE_SECONDS, self.first_pause * 2.0**self.failures)
        self.retry_at = time.monotonic() + random.uniform(0.5, 1.0) * pause  # noqa: S311 - no secret
        self.last = error


class Connection:
    """At most one connection to a host at a time, and the channels on it. For one event loop."""

    def __init__(self, host_id: str, target: Target, options: SshOptions, breaker: Breaker, tasks: TaskSet) -> None:
        self.host_id = host_id
        self.generation = 0
        self.exec_count = 0
        self._target = target
        self._options = options
        self._breaker = breaker
        self._tasks = tasks
        self._channels = asyncio.Semaphore(options.max_channels)
        self._connection: asyncssh.SSHClientConnection | None = None
        self._connecting: asyncio.Task[asyncssh.SSHClientConnection] | None = None

    def __repr__(self) -> str:
        return f"<Connection {self._target} {'connected' if self._connection else 'not connected'}>"

    @property
    def is_full(self) -> bool:
        """Whether a further command would wait for a channel."""
        return self._channels.locked()

    @contextlib.asynccontextmanager
    async def channel(self, command: str, make_session: Callable[[], Any]) -> AsyncIterator[Any]:
        """Have a command started while the block runs; afterwards its channel is closed, whatever runs on the host.

        Args:
            make_session: makes what is told of the channel's events, and is yielded.

        Raises:
            HostUnreachableError: says whether the command has certainly not started.
        """
        async with self._channels:
            session = await self._open(command, make_session)
            try:
                yield session
            finally:
                session.close()

    async def _open(self, command: str, make_session: Callable[[], Any]) -> Any:
        # A task of its own: cancelled halfway asyncssh would lose a channel that the server has given.
        opening = self._tasks.spawn(self._open_channel(command, make_session), name="open")
        try:
            await asyncio.wait([opening])
        except asyncio.CancelledError:
            giving_back = self._tasks.spawn(_give_back(opening), name="give-back")
            # On a link that works this takes a round trip or two; a frozen one must not hold up who has no time left.
            await shielded(_wait_a_little(giving_back), name="give-back")
            raise
        return opening.result()

    async def _open_channel(self, command: str, make_session: Callable[[], Any]) -> Any:
        import asyncssh  # noqa: PLC0415

        pause = 0.005
        for attempt in range(1, _OPEN_TRIES + 1):
            connection = await self.connected()
            try:
                return await self._create(connection, command, make_session)
            except asyncssh.ChannelOpenError as error:
                if not self._is_alive(connection):
                    # Only what was cut off in between is worth another connection, and only once.
                    self._drop(connection)
                    if attempt > 1:
                        raise self._unreachable(error, has_not_started=True) from error
                elif attempt == _OPEN_TRIES:
                    raise self._unreachable(error, has_not_started=True) from error
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            pause = min(2 * pause, 1.0)
        raise AssertionError

    async def _create(
        self, connection: "asyncssh.SSHClientConnection", command: str, make_session: Callable[[], Any]
    ) -> Any:
        import asyncssh  # noqa: PLC0415

        session = make_session()
        try:
            async with asyncio.timeout(self._options.open_seconds):
                await connection.create_session(
                    lambda: session, command, encoding=None, env={}, send_env=[], request_pty=False
                )
        except TimeoutError as error:
            self._drop(connection)
            raise self._unreachable(f"opened no channel within {self._options.open_seconds:g} s") from error
        except (OSError, asyncssh.DisconnectError) as error:
            self._drop(connection)
            raise self._unreachable(error) from error
        self.exec_count += 1
        return session

    async def connected(self) -> "asyncssh.SSHClientConnection":
        """Return a live connection; whoever comes while one is being made waits for that one.

        Raises:
            HostUnreachableError: nothing has started.
        """
        if self._connection is not None and self._is_alive(self._connection):
            return self._connection
        if self._breaker.is_open:
            assert self._breaker.last is not None
            raise self._again(self._breaker.last)
        if self._connecting is None:
            self._connecting = self._tasks.spawn(self._connect(), name="connect")
            self._connecting.add_done_callback(self._has_connected)
        connecting = self._connecting
        await asyncio.wait([connecting])
        error = connecting.exception()
        if isinstance(error, HostUnreachableError):
            raise self._again(error)
        return connecting.result()

    def _has_connected(self, task: "asyncio.Task[asyncssh.SSHClientConnection]") -> None:
        self._connecting = None
        if not task.cancelled() and task.exception() is None:
            self._connection = task.result()
            self.generation += 1

    async def _connect(self) -> "asyncssh.SSHClientConnection":
        while True:
            await asyncio.sleep(self._breaker.pause())
            try:
                connection = await self._connect_once()
            except HostUnreachableError as error:
                self._breaker.failed(error, is_lasting=not error.is_passing)
                if self._breaker.failures >= self._breaker.limit:
                    raise
            else:
                self._breaker.succeeded()
                return connection

    async def _connect_once(self) -> "asyncssh.SSHClientConnection":
        import asyncssh  # noqa: PLC0415

        try:
            async with asyncio.timeout(self._options.connect_seconds):
                options = await self._construct()
                return await asyncssh.connect(self._target.host, options=options, config=None)
        except TimeoutError as error:
            raise self._unreachable(f"no connection within {self._options.connect_seconds:g} s") from error
        except asyncssh.HostKeyNotVerifiable as error:
            raise self._untrusted(error) from error
        except (OSError, asyncssh.Error, ValueError) as error:
            is_passing = not isinstance(error, asyncssh.PermissionDenied | asyncssh.KeyImportError | ValueError)
            raise self._unreachable(error, has_not_started=True, is_passing=is_passing) from error

    async def _construct(self) -> "asyncssh.SSHClientConnectionOptions":
        import asyncssh  # noqa: PLC0415

        given = self._options
        arguments: dict[str, Any] = {
            "host": self._target.host,
            "keepalive_interval": given.keepalive_seconds,
            "keepalive_count_max": given.keepalive_count,
            "connect_timeout": given.connect_seconds,
            "login_timeout": given.connect_seconds,
            # Nobody is asked, nothing is lent.
            "password_auth": False,
            "kbdint_auth": False,
            "agent_forwarding": False,
            "x11_forwarding": False,
            "request_pty": False,
        }
        optional = {
            "username": self._target.user,
            "port": self._target.port,
            # Left out it would mean no file at all; empty it means the user's own.
            "config": () if given.config is None else list(given.config),
            "known_hosts": given.known_hosts,
            "client_keys": None if given.identities is None else list(given.identities),
        }
        arguments |= {name: value for name, value in optional.items() if value is not None}
        if given.host_key is not None:
            arguments["known_hosts"] = ([asyncssh.import_public_key(given.host_key)], [], [])
        options: asyncssh.SSHClientConnectionOptions = await asyncssh.SSHClientConnectionOptions.construct(**arguments)
        if options.known_hosts is None:
            raise ValueError(
                "the SSH configuration switches the checking of host keys off (UserKnownHostsFile none); "
                "name a file there, or pin the host's key with host_key="
            )
        return options

    def _is_alive(self, connection: "asyncssh.SSHClientConnection") -> bool:
        return not connection.is_closed()

    def _drop(self, connection: "asyncssh.SSHClientConnection") -> None:
        connection.abort()
        if self._connection is connection:
            self._connection = None

    def _untrusted(self, error: Exception) -> HostKeyError:
        where = self._options.known_hosts or "~/.ssh/known_hosts"
        return HostKeyError(
            f"host {self.host_id} ({self._target}): its SSH host key is not trusted ({_text(error)}). Compare the "
            f"key's fingerprint with the host's own, then add it to {where} (ssh-keyscan prints it) or pin it with "
            "host_key=",
            host_id=self.host_id,
            has_not_started=True,
        )

    def _unreachable(
        self, reason: str | Exception, *, has_not_started: bool = False, is_passing: bool = True
    ) -> HostUnreachableError:
        text = reason if isinstance(reason, str) else _text(reason)
        return HostUnreachableError(
            f"host {self.host_id} ({self._target}) cannot be reached: {text}. Try `ssh {self._target.host}` by hand",
            host_id=self.host_id,
            has_not_started=has_not_started,
            is_passing=is_passing,
        )

    def lost(self, reason: Exception | None) -> HostUnreachableError:
        """Return the error of a command whose connection broke: nobody can say how far it got."""
        return self._unreachable(reason or OSError(errno.EPIPE, "the connection was closed"))

    def _again(self, error: HostUnreachableError) -> HostUnreachableError:
        """Return an error of one's own for every caller: tracebacks grow on what is raised twice."""
        return type(error)(error.message, host_id=self.host_id, has_not_started=True, is_passing=error.is_passing)

    async def close(self) -> None:
        """Close the connection; what still runs in its channels is left behind."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await connection.wait_closed()
                return
        connection.abort()


async def _give_back(opening: "asyncio.Task[Any]") -> None:
    await asyncio.wait([opening])
    if not opening.cancelled() and opening.exception() is None:
        await opening.result().abandon()


async def _wait_a_little(task: "asyncio.Task[Any]") -> None:
    await asyncio.wait([task], timeout=_GIVE_BACK_SECONDS)


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
