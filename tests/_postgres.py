"""A real PostgreSQL for the tests, and a proxy that stands between it and a client when something is to go wrong.

The binaries are those on PATH, or Debian's, which are not on it. PostgreSQL refuses to run as root, so under root it
runs as another user. `fsync` is off: nothing here outlives a test run.
"""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import asyncpg
import pytest

from repopool_async.coordination._pg_database import Database
from repopool_async.coordination._pg_migrations import migrate

SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "60",
    "shared_buffers": "16MB",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "autovacuum": "off",
    "log_min_messages": "fatal",
    "max_wal_size": "256MB",
}


def binary(name: str) -> str | None:
    """Return the path of one of PostgreSQL's programs, the newest where there are several."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    return found or next((str(place / name) for place in places if (place / name).exists()), None)


def require(name: str, package: str) -> str:
    """Return a program's path; skip the test where there is none, but never in the checks."""
    path = binary(name)
    if path is None:
        why = f"{name} is neither on PATH nor in /usr/lib/postgresql; install Debian's {package}"
        if os.environ.get("REPOPOOL_CI"):
            pytest.fail(why)
        pytest.skip(why)
    return path


def _unprivileged() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    users = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = users.get("postgres") or users["nobody"]
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def own_directory(prefix: str) -> Path:
    """Return a new directory that the unprivileged user owns, outside of pytest's, which nobody else may enter."""
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    who = _unprivileged()
    if who:
        os.chown(directory, who["user"], who["group"])
    return directory


def run_unprivileged(*argv: str, cwd: Path) -> None:
    subprocess.run(argv, cwd=cwd, check=True, stdout=subprocess.DEVNULL, timeout=60, **_unprivileged())


def start_unprivileged(*argv: str, cwd: Path, log: Path) -> "subprocess.Popen[bytes]":
    with log.open("ab") as out:
        return subprocess.Popen(argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **_unprivileged())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """One PostgreSQL on a loopback port, with its data in a temporary directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def make(cls) -> Self:
        """Make one, without starting it."""
        require("postgres", "postgresql")
        initdb = require("initdb", "postgresql")
        server = cls(own_directory("repopool-pg-"))
        options = ("-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync")
        run_unprivileged(initdb, "-D", str(server.data), *options, cwd=server.directory)
        return server

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def copy(self) -> "Server":
        """Return another, stopped server with the data of this one, which must be stopped."""
        other = Server(own_directory("repopool-pg-"))
        run_unprivileged("cp", "-a", str(self.data), str(other.data), cwd=other.directory)
        return other

    def standby(self) -> "Server":
        """Return another, stopped server that follows this one, which must be stopped, once both run."""
        other = self.copy()
        with (other.data / "postgresql.auto.conf").open("a") as settings:
            settings.write(f"primary_conninfo = 'host=127.0.0.1 port={self.port} user=postgres'\n")
        (other.data / "standby.signal").touch()
        return other

    def dsn(self, database: str, *, port: int | None = None, user: str = "repopool") -> str:
        return f"postgresql://{user}@127.0.0.1:{port or self.port}/{database}"

    def start(self) -> None:
        settings = [part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}")]
        self.process = start_unprivileged(
            *(require("postgres", "postgresql"), "-D", str(self.data), "-p", str(self.port), *settings),
            cwd=self.directory,
            log=self.directory / "log",
        )
        asyncio.run(self._answers())

    async def _answers(self) -> None:
        async with asyncio.timeout(30):
            while True:
                assert self.process is not None
                assert self.process.poll() is None, (self.directory / "log").read_text()
                try:
                    connection = await asyncpg.connect(self.dsn("postgres", user="postgres"))
                except (OSError, asyncpg.PostgresError):
                    await asyncio.sleep(0.02)
                else:
                    await connection.close()
                    return

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it: INT ends its clients too, QUIT is a crash."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)

    async def make_database(self, name: str) -> None:
        """Make a role, and a database of its own with the schema; once for a server."""
        async with self.admin() as connection:
            await connection.execute("CREATE ROLE repopool LOGIN")
            await connection.execute(f"CREATE DATABASE {name} OWNER repopool")
        database = Database(self.dsn(name))
        await database.open()
        await migrate(database)
        await database.close()

    @asynccontextmanager
    async def admin(self, database: str = "postgres") -> AsyncIterator[Any]:
        connection = await asyncpg.connect(self.dsn(database, user="postgres"))
        try:
            yield connection
        finally:
            await connection.close()


async def caught_up(standby: Server, primary: Server) -> None:
    """Wait until a standby has everything that its primary has by now."""
    async with primary.admin() as connection, standby.admin() as there:
        position = await connection.fetchval("SELECT pg_current_wal_insert_lsn()::text")
        await connection.execute("CHECKPOINT")  # so that it is written, commits that nobody waited for included
        query = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
        await eventually(lambda: there.fetchval(query, position), 30)


async def cut_off(standby: Server) -> None:
    """Have a standby receive nothing more of what its primary commits."""
    async with standby.admin() as connection:
        await connection.execute("ALTER SYSTEM SET primary_conninfo = ''")
        await connection.execute("SELECT pg_reload_conf()")
        await eventually(lambda: connection.fetchval("SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)"), 30)


async def promote(standby: Server) -> None:
    """Make a standby the primary."""
    async with standby.admin() as connection:
        assert await connection.fetchval("SELECT pg_promote()")


class Proxy:
    """Passes bytes between clients and a server, until told otherwise; in the test's event loop."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._swallows = False

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def freeze(self) -> None:
        """Pass nothing more; connections stay."""
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    def swallow_replies(self, is_on: bool = True) -> None:
        """Bring what clients say to the server, and nothing of what it says to them."""
        self._swallows = is_on

    def cut(self) -> None:
        """End all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(up_writer)
        for source, sink, is_reply in ((reader, up_writer, False), (up_reader, writer, True)):
            task = asyncio.create_task(self._pass(source, sink, is_reply))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, is_reply: bool) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await self._flows.wait()
                if not (is_reply and self._swallows):
                    sink.write(data)
                    await sink.drain()
        sink.transport.abort()
        self._writers.discard(sink)


@asynccontextmanager
async def pgbouncer(server_port: int, database: str, *, port: int | None = None) -> AsyncIterator[int]:
    """Run a pgbouncer in transaction mode before a server, and give its port."""
    program = require("pgbouncer", "pgbouncer")
    directory = own_directory("repopool-bouncer-")
    port = port or free_port()
    (directory / "users").write_text('"repopool" ""\n')
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "trust",
        "auth_file": directory / "users",
        "pool_mode": "transaction",
        "default_pool_size": 3,
        "ignore_startup_parameters": "extra_float_digits",
    }
    lines = ["[databases]", f"{database} = host=127.0.0.1 port={server_port}", "[pgbouncer]"]
    lines += [f"{name} = {value}" for name, value in settings.items()]
    (directory / "ini").write_text("\n".join(lines) + "\n")
    process = start_unprivileged(program, str(directory / "ini"), cwd=directory, log=directory / "log")

    async def answers() -> bool:
        assert process.poll() is None, (directory / "log").read_text()
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await eventually(answers)
        yield port
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 30)
        shutil.rmtree(directory, ignore_errors=True)


async def eventually(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait until something that others bring about is so, and return it."""
    async with asyncio.timeout(seconds):
        while not (value := await condition()):
            await asyncio.sleep(0.01)
    return value
