"""Hosts of every kind, for tests of what all of them do."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from repopool_async.hosts._ssh_connection import SshOptions
from repopool_async.hosts.base import Host
from repopool_async.hosts.local import LocalHost
from repopool_async.hosts.ssh import SshHost
from tests.hosts import sshd
from tests.hosts.daemons import Daemons
from tests.hosts.sshd import Keys, Server

WATCH_SECONDS = 0.4
"""Without a sign of life for so long a session's processes are ended."""


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def asyncssh_server(keys: Keys) -> Iterator[Server]:
    with sshd.asyncssh_server(keys) as server:
        yield server


@pytest.fixture(scope="session")
def openssh_server(keys: Keys) -> Iterator[Server]:
    if not os.path.exists(sshd.SSHD):
        assert "REPOPOOL_CI" not in os.environ, "the checks install openssh-server"
        pytest.skip("there is no OpenSSH sshd on this machine")
    with sshd.openssh_server(keys) as server:
        yield server


@pytest.fixture
async def ssh_host(asyncssh_server: Server, tmp_path: Path) -> AsyncIterator[SshHost]:
    """A host on asyncssh's own server, which ignores signals as OpenSSH does for root."""
    async with reach(asyncssh_server, tmp_path) as host:
        yield host


@pytest.fixture
def watch_seconds() -> float:
    return WATCH_SECONDS


@pytest.fixture(params=["local", "asyncssh", "openssh"])
async def host(request: pytest.FixtureRequest, tmp_path: Path, watch_seconds: float) -> AsyncIterator[Host]:
    if request.param == "local":
        yield LocalHost(watch_seconds=watch_seconds, sessions_directory=str(tmp_path / "sessions"))
        return
    server = request.getfixturevalue(f"{request.param}_server")
    async with reach(server, tmp_path, watch_seconds=watch_seconds) as remote:
        yield remote


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    path.mkdir()
    return path


@pytest.fixture
def trash(tmp_path: Path) -> str:
    return str(tmp_path / "trash")


@pytest.fixture
async def daemons(host: Host) -> AsyncIterator[Daemons]:
    daemons = Daemons(host)
    yield daemons
    daemons.close()


def reach(
    server: Server,
    directory: Path,
    *,
    port: int | None = None,
    watch_seconds: float = WATCH_SECONDS,
    **options: object,
) -> SshHost:
    """Return a host on a server, or on what lies in front of it on another port."""
    config = server.config if port is None else server.config_for(port)
    return SshHost(
        "box",
        options=SshOptions(config=(str(config),), **options),  # type: ignore[arg-type]
        watch_seconds=watch_seconds,
        sessions_directory=str(directory / "sessions"),
    )
