"""Being alone in a repository: what a git that was killed there left is in nobody's way. Real git, really killed."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from repopool_async import LocalHost, LockManager
from repopool_async.repository_lock import RepositoryLock


def git(path: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(path), *args], check=True, capture_output=True, text=True).stdout.strip()


async def be_killed_amid_a_change(repository: Path) -> None:
    """Have git hold the lock of a ref, and kill it."""
    change = f"start\ncreate refs/heads/new {git(repository, 'rev-parse', 'main')}\nprepare\n"
    argv = ["git", "-C", str(repository), "update-ref", "--stdin"]
    async with LocalHost().open_process(argv, env=dict(os.environ), stdin=True) as process:
        await process.write(change.encode())
        while not (repository / "refs/heads/new.lock").exists():
            await asyncio.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
    assert (repository / "refs/heads/new.lock").exists()


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_locks_of_a_git_that_was_killed_are_gone_when_its_holder_is(
    origin: Path, tmp_path: Path, is_cancelled: bool
) -> None:
    lock = RepositoryLock(str(origin), host=LocalHost(), locks=LockManager(tmp_path / "locks"), lock_id="mirror-web")

    async def hold() -> None:
        async with lock.alone():
            await be_killed_amid_a_change(origin)
            if is_cancelled:
                task.cancel()
                await asyncio.sleep(60)
            raise TimeoutError

    task = asyncio.get_running_loop().create_task(hold())
    await asyncio.wait([task])
    assert task.cancelled() is is_cancelled
    if not is_cancelled:
        assert isinstance(task.exception(), TimeoutError)
    async with lock.alone():
        git(origin, "update-ref", "refs/heads/new", "main")
