"""How fast slots are claimed and given back, without any git work, by one process and by several.

    python -m benchmarks._claims DIRECTORY POOL SECONDS TASKS      is one of the processes

The slots are records only: nothing is cleaned, nothing lies on disk behind them.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks._measure import Scale
from benchmarks._plots import Plot
from benchmarks._report import Row
from repopool_async._clock import now
from repopool_async._identity import boot_id, new_lease_id
from repopool_async._process import run_process
from repopool_async.coordination.files import FileCoordinator
from repopool_async.lock_manager import LockManager
from repopool_async.models import Pool, Seal, Slot, make_slot_id
from repopool_async.slot_allocator import available
from repopool_async.slot_store import SlotStore

Rates = Mapping[tuple[int, int, int], list[float]]
"""Cycles a second of each process, by number of slots, of processes, and of tasks in each process."""

TASKS = 16
"""How many lessees a busy process has. A lone one mostly waits for idle processors to wake: six times a cycle."""

_COMMIT = "1" * 40


async def measure(scale: Scale, directory: Path) -> Rates:
    """Let processes claim for a while, in pools of several sizes."""
    rates: dict[tuple[int, int, int], list[float]] = {}
    for slots in sorted({*scale.slots[:2]}):
        await _make_pool(directory, f"of-{slots}", slots)
        for processes in scale.processes:
            for tasks in (1, TASKS) if processes == 1 else (1,):
                claiming = _claiming(directory, f"of-{slots}", processes, tasks, scale.claim_seconds)
                rates[slots, processes, tasks] = await claiming
    return rates


def rows(rates: Rates, scale: Scale) -> list[Row]:
    """Say whether that was fast and fair."""
    slots, processes = max(slots for slots, _, _ in rates), max(scale.processes)
    alone, busy, many = rates[slots, 1, 1], rates[slots, 1, TASKS], rates[slots, processes, 1]
    share = min(many) / (sum(many) / len(many))
    return [
        Row(f"claims a second, 1 process, {TASKS} tasks, {slots} slots", sum(busy), "", at_least=1000),
        Row("  one task alone", sum(alone), "", at_least=1000),
        Row(f"claims a second, {processes} processes, {slots} slots", sum(many), "", at_least=1000),
        Row("  the slowest process, against an equal share", share, at_least=0.5),
    ]


def plot(rates: Rates) -> Plot:
    """Draw claims a second against processes."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for (slots, processes, tasks), each in rates.items():
        if tasks == 1:
            lines.setdefault(f"{slots} slots", []).append((processes, sum(each)))
    return Plot("throughput", "Claims without git work", "processes", "a second, together", lines)


async def _make_pool(directory: Path, name: str, slots: int) -> None:
    store = SlotStore(directory)
    await store.save_pool(Pool(repo_name=name, repo_url="none", num_slots=slots, created_at=now()))
    for number in range(1, slots + 1):
        slot_id = make_slot_id(name, number)
        path = str(store.tree_path(slot_id))
        slot = Slot(slot_id=slot_id, repo_name=name, repo_url="none", path=path, created_at=now())
        seal = Seal(
            commit=_COMMIT, branch="main", refs_generation="", boot_id=boot_id(), mark_ns=1, settled_ns=1,
            clock_offset_ns=0, tree_device=1, tree_inode=1, mirror_build="",
        )  # fmt: skip
        await store.save_slot(available(slot, seal, now()))


async def _claiming(directory: Path, name: str, processes: int, tasks: int, seconds: float) -> list[float]:
    argv = [sys.executable, "-m", "benchmarks._claims", str(directory), name, str(seconds), str(tasks)]
    top = str(Path(__file__).parent.parent)
    done = await asyncio.gather(*(run_process(argv, env=dict(os.environ), cwd=top) for _ in range(processes)))
    failed = [one.stderr.decode(errors="replace") for one in done if one.exit_code != 0]
    if failed:
        raise RuntimeError(failed[0])
    return [float(json.loads(one.stdout)) for one in done]


async def _claim_for(directory: str, name: str, seconds: float, tasks: int) -> float:
    store = SlotStore(directory)
    coordinator = FileCoordinator(store, LockManager(store.locks_directory))
    await _cycle(coordinator, name)
    started = time.perf_counter()
    cycles = await asyncio.gather(*(_claim_until(coordinator, name, started + seconds) for _ in range(tasks)))
    return sum(cycles) / (time.perf_counter() - started)


async def _claim_until(coordinator: FileCoordinator, name: str, end: float) -> int:
    cycles = 0
    while time.perf_counter() < end:
        cycles += await _cycle(coordinator, name)
    return cycles


async def _cycle(coordinator: FileCoordinator, name: str) -> bool:
    grant = await coordinator.claim(name, commit=_COMMIT, branch="main", lease_id=new_lease_id())
    if grant is None:
        return False
    slot = await coordinator.begin_return(grant)
    assert slot.seal is not None
    await coordinator.finish(grant, available(slot, slot.seal, now()))
    return True


if __name__ == "__main__":
    _directory, _name, _seconds, _tasks = sys.argv[1:]
    print(json.dumps(asyncio.run(_claim_for(_directory, _name, float(_seconds), int(_tasks)))))
