"""Pools of many slots, and of a repository with much history.

    python -m benchmarks.test_large_pool [--smoke]

Each pool is measured by a process of its own that opens what another made: what it takes in memory is nobody else's.
"""

import asyncio
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._command import Program, run_from_command_line
from benchmarks._measure import SMOKE, Samples, Scale, Tell
from benchmarks._plots import Plot
from benchmarks._report import Report, Row
from benchmarks._repositories import cached_heavy_repository, cached_repository, git
from repopool_async import PoolConfig, PoolManager
from repopool_async._process import run_process

_ALLOCATE, _SUMMARY = "allocate of {} slots", "get_pool_summary of {} slots"


async def measure(scale: Scale, scratch: Path, tell: Tell) -> Report:
    """Run the benchmark in an empty directory."""
    samples = Samples()
    rows = await _many_slots(scale, scratch, samples, tell)
    rows += await _much_history(scale, scratch, samples, tell)
    lines = {
        "allocate": [(slots, samples.median(_ALLOCATE.format(slots)) * 1000) for slots in scale.slots],
        "get_pool_summary": [(slots, samples.median(_SUMMARY.format(slots)) * 1000) for slots in scale.slots],
    }
    plot = Plot("slots", "In a pool of many slots", "slots", "milliseconds", lines)
    return Report("large_pool", "Large pools", rows, samples, [plot])


# Many slots


async def _many_slots(scale: Scale, scratch: Path, samples: Samples, tell: Tell) -> list[Row]:
    url = await cached_repository(files=20, directories=4)
    for slots in scale.slots:
        tell(f"a pool of {slots:,} slots")
        async with PoolManager(PoolConfig(workspaces_dir=scratch / f"of-{slots}")) as manager:
            await manager.create_pool("large", url, num_slots=slots, fetch_on_allocate=False)
    megabytes: dict[int, float] = {}
    for slots in scale.slots * 2:  # twice, so that no pool has all the warm caches
        tell(f"leases of {slots:,} slots")
        seen = await _by_another_process(scratch / f"of-{slots}", scale.rounds)
        for seconds in seen["allocate"]:
            samples.add(_ALLOCATE.format(slots), seconds)
        for seconds in seen["summary"]:
            samples.add(_SUMMARY.format(slots), seconds)
        megabytes[slots] = seen["megabytes"]
    few, many = scale.slots[0], scale.slots[-1]
    ratio = samples.ratio(_ALLOCATE.format(many), _ALLOCATE.format(few))
    return [
        Row(f"allocate, {many:,} slots against {few}", ratio, at_most=1.5),
        Row(f"get_pool_summary, {many:,} slots", samples.median(_SUMMARY.format(many)) * 1000, "ms", at_most=50),
        Row(f"memory of the manager, {many:,} slots", megabytes[many], "MB", at_most=120),
    ]


async def _by_another_process(directory: Path, rounds: int) -> Any:
    argv = [sys.executable, "-m", "benchmarks.test_large_pool", "--worker", str(directory), str(rounds)]
    done = await run_process(argv, env=dict(os.environ), cwd=str(Path(__file__).parent.parent))
    if done.exit_code != 0:
        raise RuntimeError(done.stderr.decode(errors="replace"))
    return json.loads(done.stdout)


async def _work(directory: str, rounds: int) -> dict[str, object]:
    """Lease and ask for summaries, and say what that took."""
    allocate: list[float] = []
    summary: list[float] = []
    async with PoolManager(PoolConfig(workspaces_dir=directory)) as manager:
        await manager.get_pool_summary()
        for _ in range(rounds):
            started = time.perf_counter()
            slot = await manager.allocate_slot("large")
            allocate.append(time.perf_counter() - started)
            assert slot is not None
            await manager.release_slot(slot)
            started = time.perf_counter()
            await manager.get_pool_summary()
            summary.append(time.perf_counter() - started)
    return {"allocate": allocate, "summary": summary, "megabytes": _peak_megabytes()}


def _peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


# Much history


async def _much_history(scale: Scale, scratch: Path, samples: Samples, tell: Tell) -> list[Row]:
    url = await cached_heavy_repository(megabytes=scale.pack_megabytes)
    await git(scratch, "clone", "-q", "--no-hardlinks", "--bare", url, str(scratch / "warms-the-cache.git"))
    name = f"a pool of {scale.trees} slots, {scale.pack_megabytes} MB of history"
    stored = 0.0
    for number in range(scale.rounds):
        tell(f"much history, round {number + 1}")
        by_hand, workspaces = scratch / f"hand-{number}", scratch / f"history-{number}"
        await _settle(by_hand)
        await samples.timed("one clone and the check-outs", _by_hand(url, by_hand, scale.trees))
        await _settle(by_hand)
        async with PoolManager(PoolConfig(workspaces_dir=workspaces)) as manager:
            await samples.timed(
                name, manager.create_pool("history", url, num_slots=scale.trees, fetch_on_allocate=False)
            )
            stored = _pack_bytes(workspaces) / _pack_bytes(Path(url))
            await manager.delete_pool("history")
        await _settle(workspaces)
    return [
        Row(
            f"{name} / one clone and {scale.trees - 1} check-outs",
            samples.ratio(name, "one clone and the check-outs"),
            at_most=1.3,
        ),
        Row("  packs on disk, against the repository's", stored, at_most=1.05),
    ]


async def _settle(directory: Path) -> None:
    """Delete what has been measured and let the disk come to rest: gigabytes still to be written slow what is next."""

    def settle() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        os.sync()

    await asyncio.to_thread(settle)


async def _by_hand(url: str, directory: Path, trees: int) -> None:
    """Clone once and check out the other trees from that, two at a time: what two cores can do."""
    directory.mkdir()
    await git(directory, "clone", "-q", "--no-hardlinks", url, "0")
    two = asyncio.Semaphore(2)

    async def check_out(number: int) -> None:
        async with two:
            await git(directory, "clone", "-q", "--shared", "0", str(number))

    await asyncio.gather(*(check_out(number) for number in range(1, trees)))


def _pack_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.pack"))


PROGRAM = Program("large pools", lambda scale: 3 * len(scale.slots) + scale.rounds, measure)


async def test_smoke(tmp_path: Path) -> None:
    """See that the program runs; its figures mean nothing at this size."""
    report = await measure(SMOKE, tmp_path, lambda _: None)

    assert len(report.rows) == 5
    assert statistics.median(row.figure for row in report.rows) > 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(asyncio.run(_work(sys.argv[2], int(sys.argv[3])))))
    else:
        raise SystemExit(run_from_command_line(__doc__, [PROGRAM]))
