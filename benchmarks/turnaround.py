"""What a lease costs to enter and leave, and how soon a slot is available again, against plain git in the same run.

    python -m benchmarks.turnaround [--files 50000] [--directories 4000] [--rounds 20]

Every figure is a median; ratios are to a floor measured in between: one `git status --ignored` of the same tree, one
bare `git checkout` of the same change, one `git worktree add` of the same commit.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks._report import print_table, write_json
from benchmarks._repositories import git, make_repository
from repopool_async import LeasedSlot, PoolConfig, PoolManager
from repopool_async.repo_pool import RepoPool

Dirt = Callable[[LeasedSlot], Awaitable[None]]


async def nothing(slot: LeasedSlot) -> None:
    """Leave the slot as it was."""


async def some_work(slot: LeasedSlot) -> None:
    """Change one file of a hundred and add a thousand."""
    tracked = (await git(slot.path, "ls-files")).splitlines()
    for name in tracked[::100]:
        (slot.path / name).write_text("changed\n")
    (slot.path / "new").mkdir()
    for number in range(1000):
        (slot.path / "new" / str(number)).write_text("new\n")


async def many_ignored(slot: LeasedSlot) -> None:
    """Leave a hundred thousand ignored files."""
    for directory in range(100):
        (slot.path / f"build/{directory}").mkdir(parents=True)
        for number in range(1000):
            (slot.path / f"build/{directory}/{number}").touch()


async def measure(*, files: int, directories: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Return medians in seconds by name, and the number of rounds."""
    url = await make_repository(scratch / "origin.git", files=files, directories=directories)
    plain = scratch / "plain"
    await git(scratch, "clone", "-q", url, str(plain))
    figures: dict[str, list[float]] = {}
    async with PoolManager(PoolConfig(workspaces_dir=scratch / "pools")) as manager:
        pool = await manager.create_pool("bench", url, num_slots=1, fetch_on_allocate=False)
        await _round(manager, pool, nothing, {})
        for number in range(rounds):
            await _timed(figures, "git status --ignored", git(plain, "status", "--ignored", "--porcelain"))
            await _round(manager, pool, nothing, figures, "untouched")
            await _round(manager, pool, some_work, figures, "1 % changed, 1,000 new")
            await _timed(
                figures, "git checkout of 1 %", git(plain, "checkout", "-q", ("origin/next", "main")[number % 2])
            )
            await _switch(manager, pool, ("next", "main")[number % 2], figures)
        for _ in range(max(3, rounds // 7)):
            await _round(manager, pool, many_ignored, figures, "100,000 ignored")
            await _timed(
                figures, "git worktree add", git(plain, "worktree", "add", "-q", "--detach", str(scratch / "w"))
            )
            await git(plain, "worktree", "remove", "--force", str(scratch / "w"))
    return {"files": files, "rounds": rounds, "medians": {name: statistics.median(v) for name, v in figures.items()}}


async def _timed(figures: dict[str, list[float]], name: str, work: Awaitable[object]) -> None:
    started = time.perf_counter()
    await work
    figures.setdefault(name, []).append(time.perf_counter() - started)


async def _round(
    manager: PoolManager, pool: RepoPool, dirt: Dirt, figures: dict[str, list[float]], name: str = ""
) -> None:
    started = time.perf_counter()
    async with pool.lease(ref="main") as slot:
        entered = time.perf_counter()
        await dirt(slot)
        leaving = time.perf_counter()
    left = time.perf_counter()
    await manager.wait_clean()
    if dirt is nothing:
        figures.setdefault("enter a warm lease", []).append(entered - started)
        figures.setdefault("leave the block", []).append(left - leaving)
    figures.setdefault(f"turnaround, {name}", []).append(time.perf_counter() - leaving)


async def _switch(manager: PoolManager, pool: RepoPool, ref: str, figures: dict[str, list[float]]) -> None:
    started = time.perf_counter()
    async with pool.lease(ref=ref):
        figures.setdefault("enter at another ref (1 %)", []).append(time.perf_counter() - started)
    await manager.wait_clean()
    async with pool.lease(ref="main"):
        pass
    await manager.wait_clean()


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--directories", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="repopool-turnaround-") as directory:
        done = asyncio.run(
            measure(
                files=options.files, directories=options.directories, rounds=options.rounds, scratch=Path(directory)
            )
        )
    medians = done["medians"]
    rows: dict[str, object] = {name: f"{seconds * 1000:9.1f} ms" for name, seconds in sorted(medians.items())}
    status, checkout = medians["git status --ignored"], medians["git checkout of 1 %"]
    for name in sorted(medians):
        if name.startswith("turnaround"):
            rows[f"{name} / git status"] = f"{medians[name] / status:9.2f}"
    rows["another ref / git checkout"] = f"{medians['enter at another ref (1 %)'] / checkout:9.2f}"
    rows["git worktree add / warm lease"] = f"{medians['git worktree add'] / medians['enter a warm lease']:9.0f}"
    print_table(f"{done['files']} files, medians of {done['rounds']} rounds", rows)
    print(f"  written to {write_json('turnaround', done)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
