"""`repopool doctor` as a user runs it: what it lists, what it mends, how it exits."""

import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from repopool_async import PoolConfig, PoolManager, SlotStore


def doctor(directory: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "repopool_async.cli", "doctor", "--workspaces-dir", str(directory), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.fixture
async def pools(tmp_path: Path, origin: Path) -> Path:
    async with PoolManager(PoolConfig(tmp_path / "pools")) as manager:
        await manager.create_pool("web", str(origin), num_slots=2)
    return tmp_path / "pools"


def leave_behind(directory: Path) -> None:
    """Lease a slot in a process that dies."""
    program = (
        "import asyncio, os, sys; from repopool_async import PoolConfig, PoolManager\n"
        "async def main():\n"
        "    async with PoolManager(PoolConfig(sys.argv[1])) as manager:\n"
        "        await manager.allocate_slot('web'); os._exit(0)\n"
        "asyncio.run(main())"
    )
    subprocess.run([sys.executable, "-c", program, str(directory)], check=True, timeout=60)


async def test_where_all_is_well_it_says_so(pools: Path) -> None:
    status, said = doctor(pools)
    assert status == 0, said
    assert "WRONG" not in said
    for words in ("git 2.", "file system", "open files", "web: 2 slots, 0 leased", "on disk"):
        assert words in said


async def test_it_tells_without_touching_and_mends_when_asked(pools: Path) -> None:
    leave_behind(pools)
    for _ in range(2):
        status, said = doctor(pools)
        assert status == 1
        assert "WRONG  workspace-web-slot1: allocated, but whoever had it is dead" in said
        assert "WRONG  workspace-web-slot1: its lock was left by pid" in said
        assert "doctor --fix" in said
    status, said = doctor(pools, "--fix")
    assert status == 0, said
    assert "fixed  recovered: workspace-web-slot1" in said
    assert "WRONG" not in said
    assert doctor(pools)[0] == 0


async def test_a_pool_that_lacks_slots_is_told_and_completed(pools: Path) -> None:
    record = await SlotStore(pools).load_pool("web")
    await SlotStore(pools).save_pool(attrs.evolve(record, num_slots=3, is_complete=False))
    status, said = doctor(pools)
    assert status == 1
    assert "WRONG  web: has 2 of 3 slots, and whoever was making the others died or could not" in said
    status, said = doctor(pools, "--fix")
    assert status == 0, said
    assert "fixed  completing: web" in said
    assert "web: 3 slots, 0 leased" in said


async def test_what_cannot_be_mended_leaves_a_status(tmp_path: Path, origin: Path) -> None:
    async with PoolManager(PoolConfig(tmp_path / "pools")) as manager:
        await manager.create_pool("web", str(origin), disk_limit="1KiB")
    status, said = doctor(tmp_path / "pools", "--fix")
    assert status == 1
    assert "fixed  over limit: web" not in said
    assert "WRONG  web: " in said
    assert "1 still wrong" in said


async def test_lease_held_for_long_is_told(tmp_path: Path, origin: Path) -> None:
    async with PoolManager(PoolConfig(tmp_path / "pools")) as manager:
        await manager.create_pool("web", str(origin), stale_lock_hours=1e-9)
        slot = await manager.allocate_slot("web")
        assert slot is not None
        status, said = doctor(tmp_path / "pools")
        assert status == 1
        assert f"WRONG  {slot.slot_id}: leased for 0.0 hours by pid {os.getpid()}" in said
        await manager.release_slot(slot)
    assert doctor(tmp_path / "pools")[0] == 0
