"""SSH servers for tests: asyncssh's own, in a thread of this process, and a real OpenSSH sshd, both on a high port.

Keys and known_hosts are made afresh. Every server comes with an ssh_config file in which it is called `box`.
"""

import asyncio
import contextlib
import os
import pwd
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import attrs
import pytest
from asyncssh.packet import UInt32

SSHD = "/usr/sbin/sshd"


@attrs.frozen
class Keys:
    """Made once for all servers of a run."""

    directory: Path
    host: asyncssh.SSHKey
    client: asyncssh.SSHKey

    @classmethod
    def make(cls, directory: Path) -> "Keys":
        keys = cls(
            directory, asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
        )
        for name, key in {"host": keys.host, "client": keys.client}.items():
            key.write_private_key(directory / name)
            (directory / name).chmod(0o600)
            key.write_public_key(directory / f"{name}.pub")
        return keys

    @property
    def host_line(self) -> str:
        return self.host.export_public_key().decode().strip()


@attrs.frozen
class Server:
    """A running server. `config` is for `SshOptions`; `home` is where its commands start."""

    port: int
    keys: Keys
    config: Path
    home: Path

    def config_for(self, port: int) -> Path:
        """Return another file, in which `box` is reached by another port."""
        return write_config(self.keys, port, name=f"config-{port}")


def write_config(keys: Keys, port: int, *, name: str, known_hosts: str | None = None) -> Path:
    known = keys.directory / f"known_hosts-{name}"
    known.write_text(f"[127.0.0.1]:{port} {keys.host_line}\n" if known_hosts is None else known_hosts)
    config = keys.directory / name
    config.write_text(
        f"Host box\n HostName 127.0.0.1\n Port {port}\n User {_user()}\n IdentityFile {keys.directory}/client\n"
        f" UserKnownHostsFile {known}\n"
    )
    return config


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


@contextlib.contextmanager
def asyncssh_server(
    keys: Keys, *, shell: tuple[str, ...] = ("sh", "-c"), env: dict[str, str] | None = None
) -> Iterator[Server]:
    """Serve in a thread: its loop outlives those of single tests."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="asyncssh-server")
    thread.start()
    home = keys.directory / "home"
    home.mkdir(exist_ok=True)

    async def start() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[keys.host],
            authorized_client_keys=str(keys.directory / "client.pub"),
            process_factory=_Commands(shell, home, env).handle,
            encoding=None,
            line_editor=False,
        )

    acceptor = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    port = acceptor.get_port()
    try:
        yield Server(port, keys, write_config(keys, port, name=f"config-asyncssh-{port}"), home)
    finally:

        async def stop() -> None:
            acceptor.close()
            await acceptor.wait_closed()
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        for task in (pending := asyncio.all_tasks(loop)):
            task.cancel()
        if pending:
            loop.run_until_complete(asyncio.wait(pending))
        loop.close()


class _Commands:
    """Runs what it is asked to as sshd does for root: it knows no signals, and nothing ends with its channel."""

    def __init__(self, shell: tuple[str, ...], home: Path, env: dict[str, str] | None) -> None:
        self._shell = shell
        self._home = home
        self._env = env or {"PATH": os.environ["PATH"], "HOME": str(home)}

    async def handle(self, process: "asyncssh.SSHServerProcess[bytes]") -> None:
        child = await asyncio.create_subprocess_exec(
            *self._shell,
            process.command or "",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._home,
            env=self._env,
            start_new_session=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        source = asyncio.create_task(_pour(process.stdin, child.stdin))
        drains = asyncio.gather(_pour(child.stdout, process.stdout), _pour(child.stderr, process.stderr))
        # Not wait(), which on 3.11 waits for the pipes' end as well.
        while child.returncode is None:
            await asyncio.sleep(0.002)
        channel = process.channel
        with contextlib.suppress(OSError):
            if child.returncode >= 0 and not channel.is_closing():
                channel._send_request(b"exit-status", UInt32(child.returncode))
        await drains
        source.cancel()
        if child.returncode < 0:
            process.exit_with_signal(signal.Signals(-child.returncode).name.removeprefix("SIG"))
        else:
            process.channel.close()
        await asyncio.wait([source])


async def _pour(source: object, target: object) -> None:
    with contextlib.suppress(OSError, asyncssh.Error, asyncssh.BreakReceived):
        while data := await source.read(65536):  # type: ignore[attr-defined]
            target.write(data)  # type: ignore[attr-defined]
            await target.drain()  # type: ignore[attr-defined]
    if hasattr(target, "close") and isinstance(target, asyncio.StreamWriter):
        with contextlib.suppress(OSError):
            target.close()


@contextlib.contextmanager
def openssh_server(keys: Keys) -> Iterator[Server]:
    """Run the sshd of the system as the present user."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = keys.directory / "home"
    home.mkdir(exist_ok=True)
    if os.getuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)
    options = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": f"{keys.directory}/host",
        "AuthorizedKeysFile": f"{keys.directory}/client.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "MaxStartups": "100",
        "UseDNS": "no",
        "LogLevel": "ERROR",
        # Not the developer's own start-up files: a login shell reads them for every command.
        "SetEnv": f"HOME={home}",
    }
    config = keys.directory / "sshd_config"
    config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    sshd = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=subprocess.PIPE)
    try:
        _await_port(port, sshd)
        yield Server(port, keys, write_config(keys, port, name="config-openssh"), home)
    finally:
        sshd.terminate()
        sshd.communicate(timeout=30)


def _await_port(port: int, sshd: "subprocess.Popen[bytes]") -> None:
    for _ in range(1000):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10):
            return
        if sshd.poll() is not None:
            raise AssertionError(f"sshd did not start: {sshd.communicate()[1]!r}")
        threading.Event().wait(0.01)
    raise AssertionError("sshd does not listen")


@contextlib.contextmanager
def serving(kind: str, directory: Path) -> Iterator[Server]:
    """Serve with `asyncssh` or `openssh`, with new keys in a directory; skip where that is not there."""
    if kind == "openssh" and not os.path.exists(SSHD):
        assert "REPOPOOL_CI" not in os.environ, "the checks install openssh-server"
        pytest.skip("there is no OpenSSH sshd on this machine")
    serve = {"asyncssh": asyncssh_server, "openssh": openssh_server}[kind]
    with serve(Keys.make(directory)) as server:
        yield server
