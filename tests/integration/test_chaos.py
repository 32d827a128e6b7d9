"""Processes killed with SIGKILL, at random and at every step of what they do: the others put all of it right."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from repopool_async import PoolConfig, PoolManager
from repopool_async._process import run_process
from tests import _workers
from tests.conftest import MakeCommit

pytestmark = pytest.mark.endurance
ROOT = Path(__file__).parents[2]


async def run_chaos(*options: str) -> None:
    # A process of its own, because it forks.
    argv = [sys.executable, "-m", "benchmarks.chaos", *options]
    done = await run_process(argv, env=dict(os.environ), cwd=str(ROOT), timeout=3600)
    assert done.exit_code == 0, done.stdout.decode() + done.stderr.decode()


@pytest.mark.timeout(300)
async def test_twenty_kills_at_random_moments() -> None:
    await run_chaos("--kills", "20", "--workers", "3", "--steps", "none", "--seconds", "200")


@pytest.mark.timeout(300)
async def test_a_kill_at_each_step_of_leasing_returning_and_recovering() -> None:
    await run_chaos("--kills", "0", "--steps", "cycle")


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_thousand_kills_at_random_moments() -> None:
    await run_chaos("--kills", "1000", "--steps", "none", "--seconds", "3000")


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_kill_at_every_single_step_of_everything() -> None:
    await run_chaos("--kills", "0", "--steps", "all")


SLOW_GIT = """#!/bin/sh
for word; do
    case "$word" in clone | read-tree) touch "$GIT_IS_SLOW_AT.$word"; [ "$word" = "$SLOW" ] && sleep 1000;; esac
done
exec {git} "$@"
"""

MAKER = """
import asyncio, sys
from repopool_async import PoolConfig, PoolManager
async def main():
    async with PoolManager(PoolConfig(workspaces_dir=sys.argv[1])) as manager:
        await manager.create_pool("app", sys.argv[2], num_slots=1)
asyncio.run(main())
"""


@pytest.mark.parametrize("slow", ["clone", "read-tree"])
async def test_git_that_outlives_its_dead_process_is_ended_by_whoever_takes_over(
    tmp_path: Path, origin: Path, slow: str
) -> None:
    (tmp_path / "bin").mkdir()
    git = tmp_path / "bin/git"
    script = SLOW_GIT.replace("{git}", shutil.which("git") or "git").replace("$GIT_IS_SLOW_AT", f"{tmp_path}/at")
    git.write_text(script.replace("$SLOW", slow))
    git.chmod(0o755)
    environment = {**os.environ, "PATH": f"{git.parent}:{os.environ['PATH']}"}
    argv = [sys.executable, "-c", MAKER, str(tmp_path / "pools"), str(origin)]
    with subprocess.Popen(argv, env=environment) as maker:
        while not (tmp_path / f"at.{slow}").exists():
            assert maker.poll() is None
            await asyncio.sleep(0.01)
        maker.kill()
    assert working_on(tmp_path) != []
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        await manager.recover()
        await manager.create_pool("app", str(origin), num_slots=1)
        assert working_on(tmp_path) == []
        async with manager.lease("app") as slot:
            assert (await slot.run("git", "status", "--porcelain")).text == ""


def working_on(directory: Path) -> list[str]:
    """Return the processes in whose environment the directory is named as what git works on."""
    mark = f"REPOPOOL_GIT_WORKS_ON={directory}/".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                found.append(path.parent.name)
    return found


async def test_a_fetch_that_was_killed_with_all_its_git_hinders_no_later_one(
    tmp_path: Path, origin: Path, make_commit: MakeCommit
) -> None:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        await manager.create_pool("app", str(origin), num_slots=1)
    with _workers.worker("hold_lock", tmp_path / "pools/locks", "mirror-app") as holder:
        holder.expect("held")
    for name in ("packed-refs", "refs/heads/main", "refs/repopool/remote-head", "HEAD"):
        (tmp_path / f"pools/app/mirror.git/{name}.lock").touch()
    commit = make_commit(origin, "main", {"NEWS": b"new\n"})
    config = PoolConfig(workspaces_dir=tmp_path / "pools")
    async with PoolManager(config) as manager, manager.lease("app", timeout=20) as slot:
        assert slot.commit == commit
