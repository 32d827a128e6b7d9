"""Several real processes on one directory with no shared parent: never two holders, no error but time-outs."""

import os
import sys
from pathlib import Path

import pytest

from benchmarks import contention
from repopool_async import PoolConfig, PoolManager
from repopool_async._process import run_process


@pytest.mark.parametrize(
    ("processes", "slots", "seconds"),
    [(4, 2, 2.0), pytest.param(16, 4, 60.0, marks=[pytest.mark.soak, pytest.mark.timeout(300)])],
)
async def test_processes_fighting_over_slots_never_share_one(
    tmp_path: Path, origin: Path, processes: int, slots: int, seconds: float
) -> None:
    done = await contention.measure(
        url=str(origin), directory=str(tmp_path / "pools"), seconds=seconds, processes=processes, slots=slots
    )
    assert done["violations"] == []
    assert done["errors"] == []
    assert done["available"] == slots
    assert len(done["leases"]) == processes
    assert min(done["leases"]) > 0


CREATE = """
import asyncio, sys
from repopool_async import PoolConfig, PoolManager
async def main():
    async with PoolManager(PoolConfig(workspaces_dir=sys.argv[1])) as manager:
        await manager.create_pool("shared", sys.argv[2], num_slots=3)
        async with manager.lease("shared") as slot:
            print(slot.slot_id)
asyncio.run(main())
"""


async def test_processes_creating_the_same_pool_at_once_get_one(tmp_path: Path, origin: Path) -> None:
    from repopool_async._aio import together  # noqa: PLC0415 - private helper of the library

    outputs: list[str] = []

    async def one() -> None:
        done = await run_process(
            [sys.executable, "-c", CREATE, str(tmp_path / "pools"), str(origin)], env=dict(os.environ), timeout=60
        )
        assert done.exit_code == 0, done.stderr.decode()
        outputs.append(done.text.strip())

    await together(*[one for _ in range(5)])
    assert len(outputs) == 5
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        summary = (await manager.get_pool_summary())["shared"]
        assert (summary.total_slots, summary.available) == (3, 3)
