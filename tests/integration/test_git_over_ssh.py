"""A pool whose remote is reached over SSH: git's and OpenSSH's own clients, and a server that serves real git.

The way there is dropped, slowed and frozen by a proxy; keys and host keys are not what they should be.
"""

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncssh
import pytest

from repopool_async import GitAccessError, PoolConfig, PoolManager
from tests.conftest import MakeCommit
from tests.hosts.proxy import Proxy, proxy
from tests.hosts.sshd import Keys, Server, asyncssh_server, write_config

BIG = os.urandom(2_000_000)

GoBy = Callable[[Path], None]


@pytest.fixture
def go_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GoBy:
    """Have `ssh` read another configuration: it looks for its user's where the password database says."""
    program = shutil.which("ssh")
    if program is None:
        assert "REPOPOOL_CI" not in os.environ, "git cannot reach anything over SSH without openssh-client"
        pytest.skip("there is no ssh on this machine")
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    def go_by(config: Path) -> None:
        (directory / "ssh").write_text(f'#!/bin/sh\nexec {program} -F {config} "$@"\n')
        (directory / "ssh").chmod(0o755)

    return go_by


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    (directory := tmp_path / "keys").mkdir()
    return Keys.make(directory)


@pytest.fixture
def server(keys: Keys, go_by: GoBy) -> Iterator[Server]:
    with asyncssh_server(keys) as server:
        go_by(server.config)
        yield server


@pytest.fixture
def manager(tmp_path: Path) -> PoolManager:
    return PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools"))


@pytest.fixture
def url(origin: Path) -> str:
    return f"ssh://box{origin}"


@pytest.fixture
def heavy_url(url: str, origin: Path, make_commit: MakeCommit) -> str:
    make_commit(origin, "main", {"big": BIG})
    return url


async def connected(way: Proxy, times: int = 1) -> None:
    async with asyncio.timeout(60):
        while way.connections < times:
            await asyncio.sleep(0.01)


def speaks_by(config: Path) -> bool:
    """Return whether any ssh runs that was given this configuration."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(config) in (process / "cmdline").read_bytes():
                return True
    return False


async def require_usable(manager: PoolManager) -> None:
    async with manager.lease("app", ref="main", timeout=60) as slot:
        assert (slot.path / "README.md").exists()
        assert (await slot.run("git", "status", "--porcelain", "--ignored")).text == ""


@pytest.mark.usefixtures("server")
async def test_leases_follow_a_remote_over_ssh(
    manager: PoolManager, url: str, origin: Path, make_commit: MakeCommit
) -> None:
    async with manager:
        await manager.create_pool("app", url, num_slots=1)
        make_commit(origin, "main", {"new.txt": b"new\n"})
        async with manager.lease("app", ref="main") as slot:
            assert (slot.path / "new.txt").read_bytes() == b"new\n"
            (slot.path / "mine.txt").write_text("mine\n")
            await slot.run("git", "add", "mine.txt")
            await slot.run("git", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "mine")
            await slot.run("git", "push", "-q", "origin", "HEAD:refs/heads/mine")
        async with manager.lease("app", ref="mine") as slot:
            assert (slot.path / "mine.txt").read_text() == "mine\n"


async def test_an_unknown_host_is_refused_and_said_to_be(
    manager: PoolManager, server: Server, url: str, go_by: GoBy
) -> None:
    go_by(write_config(server.keys, server.port, name="nobody-known", known_hosts=""))
    async with manager:
        with pytest.raises(GitAccessError, match=r"host's key .* compare it, then connect once by hand"):
            await manager.create_pool("app", url, num_slots=1)
        go_by(server.config)
        await manager.create_pool("app", url, num_slots=1)
        await require_usable(manager)


async def test_a_host_with_another_key_is_refused(manager: PoolManager, server: Server, url: str, go_by: GoBy) -> None:
    async with manager:
        await manager.create_pool("app", url, num_slots=1)
        other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
        known = f"[127.0.0.1]:{server.port} {other}"
        go_by(write_config(server.keys, server.port, name="another-known", known_hosts=known))
        with pytest.raises(GitAccessError, match="host's key"):
            async with manager.lease("app", ref="main", timeout=60):
                pass
        go_by(server.config)
        await require_usable(manager)


async def test_a_key_that_is_not_accepted_is_said_to_be(manager: PoolManager, server: Server, url: str) -> None:
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(server.keys.directory / "client")
    async with manager:
        with pytest.raises(GitAccessError, match="the key in the ssh agent"):
            await manager.create_pool("app", url, num_slots=1)


@pytest.mark.parametrize("after_bytes", [0, 1500, 500_000], ids=["at once", "while it greets", "amid the objects"])
async def test_a_connection_that_drops_is_made_again(
    manager: PoolManager, server: Server, heavy_url: str, go_by: GoBy, after_bytes: int
) -> None:
    async with proxy(server.port) as way, manager:
        go_by(server.config_for(way.port))
        way.cut_after(after_bytes)
        await manager.create_pool("app", heavy_url, num_slots=1, fetch_on_allocate=False)
        assert way.connections > 1
        async with manager.lease("app", ref="main") as slot:
            assert (slot.path / "big").read_bytes() == BIG


async def test_a_slow_way_takes_its_time(manager: PoolManager, server: Server, url: str, go_by: GoBy) -> None:
    async with proxy(server.port, delay_seconds=0.05) as way, manager:
        go_by(server.config_for(way.port))
        await manager.create_pool("app", url, num_slots=1)
        await require_usable(manager)


async def test_whoever_waits_for_a_way_that_is_silent_can_be_cancelled(
    manager: PoolManager, server: Server, url: str, go_by: GoBy
) -> None:
    async with proxy(server.port) as way, manager:
        config = server.config_for(way.port)
        go_by(config)
        await manager.create_pool("app", url, num_slots=1)
        before = way.connections
        way.freeze()
        lease = manager.lease("app", ref="main")
        waiting = asyncio.create_task(lease.__aenter__())
        await connected(way, before + 1)
        assert speaks_by(config)
        waiting.cancel()
        async with asyncio.timeout(30):
            await asyncio.wait([waiting])
            assert waiting.cancelled()
            while speaks_by(config):  # the fetch that nobody waits for any more ends beside
                await asyncio.sleep(0.01)
        way.thaw()
        await require_usable(manager)
