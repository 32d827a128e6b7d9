"""The pool's `setup`: run once for what it depends on, ahead where possible, and told clearly where it fails."""

import shlex
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from repopool_async import LeasedSlot, PoolConfig, PoolManager, PoolTimeoutError, RepoPool, SetupError, SlotState

MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]

SLOT = "workspace-web-slot1"
SCRIPT = """
echo "$$" >> {runs}; test ! -e broken.lock || {{ echo "no such package" >&2; exit 3; }}
test ! -e slow.lock || until test -e {go}; do sleep 0.05; done
mkdir -p cache && cp *.lock cache/ && echo changed > README.md && touch untracked
"""


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        yield manager


@pytest.fixture
def lock_files(origin: Path, make_commit: MakeCommit) -> None:
    for branch, text in (("main", b"1\n"), ("feature/x", b"2\n")):
        make_commit(origin, branch, {"deps.lock": text})


@pytest.fixture
async def pool(manager: PoolManager, origin: Path, tmp_path: Path, lock_files: None) -> RepoPool:
    return await manager.create_pool("web", str(origin), cleanup="inline", **options(tmp_path))


def options(tmp_path: Path) -> dict[str, Any]:
    script = SCRIPT.format(runs=shlex.quote(str(tmp_path / "runs")), go=shlex.quote(str(tmp_path / "go")))
    keys = ["deps.lock", "broken.lock", "slow.lock"]
    return {"keep": ["cache"], "setup": ["sh", "-c", script], "setup_key": keys}


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


def is_gone(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def made(slot: LeasedSlot) -> list[str]:
    assert not (slot.path / "untracked").exists()
    assert (slot.path / "README.md").read_text() == "# A small repository\n"
    return sorted(path.name + path.read_text().strip() for path in (slot.path / "cache").iterdir())


async def test_a_slot_is_set_up_when_it_is_made(pool: RepoPool, tmp_path: Path) -> None:
    assert runs(tmp_path) == 1
    for _ in range(2):
        async with pool.lease() as slot:
            assert made(slot) == ["deps.lock1"]
            (slot.path / "untracked").touch()
    assert runs(tmp_path) == 1


async def test_it_runs_again_where_a_key_file_is_another_and_only_there(
    manager: PoolManager, pool: RepoPool, origin: Path, make_commit: MakeCommit, tmp_path: Path
) -> None:
    async with pool.lease(ref="feature/x") as slot:
        assert made(slot) == ["deps.lock2"]
        (slot.path / "cache/left").touch()
    make_commit(origin, "feature/x", {"other": b"1\n"})
    async with pool.lease(ref="feature/x") as slot:
        assert made(slot) == ["deps.lock2", "left"]
    assert runs(tmp_path) == 2
    async with pool.lease(ref="main") as slot:
        assert made(slot) == ["deps.lock1"]
    assert runs(tmp_path) == 3
    assert await manager.check("web") == {}


async def test_it_runs_ahead_once_what_it_made_is_gone(pool: RepoPool, tmp_path: Path) -> None:
    async with pool.lease() as slot:
        (slot.path / "cache").rename(slot.path / "elsewhere")
    assert runs(tmp_path) == 2
    async with pool.lease() as slot:
        assert made(slot) == ["deps.lock1"]
    assert runs(tmp_path) == 2


async def test_it_runs_again_after_a_repair(manager: PoolManager, pool: RepoPool, tmp_path: Path) -> None:
    await manager.repair_slot(SLOT)
    assert runs(tmp_path) == 2
    async with pool.lease() as slot:
        assert made(slot) == ["deps.lock1"]


async def test_without_warming_it_waits_for_who_needs_it(
    manager: PoolManager, origin: Path, lock_files: None, tmp_path: Path
) -> None:
    pool = await manager.create_pool("web", str(origin), cleanup="inline", warmup_enabled=False, **options(tmp_path))
    async with pool.lease() as slot:
        (slot.path / "cache").rename(slot.path / "elsewhere")
    assert runs(tmp_path) == 1
    async with pool.lease() as slot:
        assert made(slot) == ["deps.lock1"]
    assert runs(tmp_path) == 2


async def test_its_failure_is_told_to_who_needs_it_and_harms_nobody_else(
    manager: PoolManager, pool: RepoPool, origin: Path, make_commit: MakeCommit, tmp_path: Path
) -> None:
    make_commit(origin, "feature/x", {"broken.lock": b""})
    with pytest.raises(SetupError, match=r"sh, exited with 3.*:\nno such package") as caught:
        async with pool.lease(ref="feature/x"):
            raise AssertionError
    assert (caught.value.exit_code, caught.value.stderr) == (3, b"no such package\n")
    assert (caught.value.slot_id, caught.value.repo_name) == (SLOT, "web")
    await manager.wait_clean()
    assert runs(tmp_path) == 2  # not again in vain
    assert (await manager.get_slot_status(SLOT)).state is SlotState.AVAILABLE
    failed = [entry for entry in await manager.get_cleanup_log(SLOT) if entry.operation == "setup" and entry.error]
    assert ["no such package" in str(entry.error) for entry in failed] == [True]
    async with pool.lease(ref="main") as slot:
        assert made(slot) == ["deps.lock1"]
    make_commit(origin, "feature/x", {"broken.lock": None})
    async with pool.lease(ref="feature/x") as slot:
        assert made(slot) == ["deps.lock2"]


async def test_a_slot_in_which_it_fails_is_not_made(
    manager: PoolManager, origin: Path, lock_files: None, tmp_path: Path
) -> None:
    with pytest.raises(SetupError, match=r"cannot be started \(No such file"):
        await manager.create_pool("web", str(origin), **{**options(tmp_path), "setup": ["/nowhere/npm", "ci"]})
    assert not (tmp_path / "pools/web/slots/slot1").exists()
    assert await manager.list_pools() == []


async def test_a_lessee_that_cannot_wait_leaves_the_slot_to_be_set_up_for_the_next(
    manager: PoolManager, pool: RepoPool, origin: Path, make_commit: MakeCommit, tmp_path: Path
) -> None:
    make_commit(origin, "feature/x", {"slow.lock": b"slow\n"})
    with pytest.raises(PoolTimeoutError, match="setup, was not finished"):
        async with pool.lease(ref="feature/x", timeout=3):  # in which the setup must have begun
            raise AssertionError
    (tmp_path / "go").touch()
    await manager.wait_clean()
    async with pool.lease(ref="feature/x", timeout=60) as slot:
        assert made(slot) == ["deps.lock2", "slow.lockslow"]
    assert runs(tmp_path) == 3


async def test_it_is_ended_when_it_takes_too_long_with_all_it_started(
    manager: PoolManager, origin: Path, lock_files: None, tmp_path: Path
) -> None:
    left = tmp_path / "left"
    code = f"import os, time; open({str(left)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    script = f"setsid {shlex.join([sys.executable, '-ISc', code])} & until test -s {left}; do :; done; wait"
    with pytest.raises(SetupError, match=r"was not finished within 2 s \(setup_timeout\)"):
        await manager.create_pool("web", str(origin), keep=["cache"], setup=["sh", "-c", script], setup_timeout=2)
    assert is_gone(left.read_text())
