"""The corpus against a pool whose slots lie on a host reached over SSH, which is this machine all the same.

A trial there takes more than ten times what it takes here, so the ordinary run plays a few vectors, others each time;
the soak run plays all of them.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from repopool_async import HostSpec, PoolConfig, PoolManager, SshHost
from repopool_async.hosts._ssh_connection import SshOptions
from tests.contamination.corpus import Vector, for_user
from tests.contamination.kit import NotPossibleError
from tests.contamination.trial import Bench
from tests.hosts import sshd
from tests.hosts.sshd import Keys, Server

CORPUS = for_user(is_root=os.geteuid() == 0)
OF_KEPT_PATHS = {"links", "kinds", "hard links", "special files", "mounts", "tree"}


class RemoteBench(Bench):
    """A bench whose pool lies on a host."""

    trial_seconds = 120.0

    def __init__(self, directory: Path, server: Server, **options: Any) -> None:
        super().__init__(directory, hosts=["box"], **options)
        self._server = server

    @asynccontextmanager
    async def _manager(self) -> AsyncIterator[PoolManager]:
        options = SshOptions(config=(str(self._server.config),))
        async with SshHost("box", options=options, sessions_directory=f"{self.directory}/sessions") as host:
            spec = HostSpec("box", workspaces_dir=str(self.workspaces), host=host)
            config = PoolConfig(workspaces_dir=self.directory / "here", close_timeout=0.5)
            async with PoolManager(config, hosts=[spec]) as manager:
                yield manager

    def throw_away_pool(self) -> None:
        """Make the next trial begin with a new pool."""
        super().throw_away_pool()
        subprocess.run(["rm", "-rf", self.directory / "here"], check=False)


@contextmanager
def made(keys: Path, **options: Any) -> Iterator[Bench]:
    with sshd.asyncssh_server(Keys.make(keys)) as server:
        directory = Path(tempfile.mkdtemp(prefix="repopool-"))
        try:
            yield (bench := RemoteBench(directory, server, **options))
            bench.throw_away_pool()
        finally:
            subprocess.run(["rm", "-rf", directory], check=False)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with made(tmp_path_factory.mktemp("keys")) as bench:
        yield bench


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with made(tmp_path_factory.mktemp("keys"), keep=["cache", "src/cache"]) as bench:
        yield bench


def named(vectors: list[Vector]) -> list[object]:
    return [pytest.param(vector, id=vector.name) for vector in vectors]


async def require_none(bench: Bench, vector: Vector, then: str) -> None:
    try:
        outcome = await bench.play(vector, then)
    except NotPossibleError as error:
        pytest.skip(str(error))
    assert outcome.leaks == (), outcome.log


@pytest.mark.sampled(one_in=80)
@pytest.mark.parametrize("vector", named(CORPUS))
async def test_the_next_lessee_on_a_host_sees_a_fresh_clone(bench: Bench, vector: Vector) -> None:
    await require_none(bench, vector, "main")


@pytest.mark.sampled(one_in=3)
@pytest.mark.parametrize("vector", named([one for one in CORPUS if re.search("through_a_socket|io_uring", one.name)]))
async def test_a_host_sees_who_holds_what_no_process_shows(bench: Bench, vector: Vector) -> None:
    await require_none(bench, vector, "main")


@pytest.mark.sampled(one_in=40)
@pytest.mark.parametrize("vector", named([vector for vector in CORPUS if vector.group in OF_KEPT_PATHS]))
async def test_kept_paths_on_a_host_let_nothing_else_through(keeping: Bench, vector: Vector) -> None:
    await require_none(keeping, vector, "main")


@pytest.mark.soak
@pytest.mark.parametrize("vector", named([vector for vector in CORPUS if vector.group not in OF_KEPT_PATHS]))
async def test_whatever_else_was_done_around_kept_paths_on_a_host(keeping: Bench, vector: Vector) -> None:
    await require_none(keeping, vector, "main")


@pytest.mark.soak
@pytest.mark.parametrize("vector", named(CORPUS))
async def test_also_when_the_next_lessee_wants_another_ref(bench: Bench, vector: Vector) -> None:
    await require_none(bench, vector, "feature")
