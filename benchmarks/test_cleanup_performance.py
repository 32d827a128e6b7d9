"""How soon a slot is available again after a lease, whatever the lessee did, and what a change of ref costs.

    python -m benchmarks.test_cleanup_performance [--smoke]

The floor is one `git status --ignored` of the same clean tree, and one bare `git checkout` of the same change, measured
in between.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._command import Program, run_from_command_line
from benchmarks._measure import SMOKE, LoopWatch, Samples, Scale, Tell, processor_seconds
from benchmarks._plots import Plot
from benchmarks._report import Report, Row
from benchmarks._repositories import cached_repository, file_names, git
from benchmarks._rivals import RECIPE, STATUS, Rivals
from repopool_async import PoolConfig, PoolManager
from repopool_async.repo_pool import RepoPool

Dirt = Callable[[Path], None]
"""What a lessee does to a tree."""

NOTHING, SOME, IGNORED = "untouched", "1 % changed and new files", "many ignored files"
CHECKOUT, SWITCH = "git checkout of 1 %", "enter at another ref, 1 %"


async def measure(scale: Scale, scratch: Path, tell: Tell) -> Report:
    """Run the benchmark in an empty directory."""
    samples = Samples()
    files, directories = scale.sizes[-1]
    url = await cached_repository(files=files, directories=directories)
    rivals = Rivals(url, scratch / "rivals", samples, f"{files:,} files")
    tell("a pool")
    await rivals.prepare()
    with LoopWatch() as watch:
        async with PoolManager(PoolConfig(workspaces_dir=scratch / "pools")) as manager:
            pool = await manager.create_pool("cleaned", url, num_slots=1, fetch_on_allocate=False)
            bench = _Bench(manager, pool, rivals, samples, scale)
            await bench.turnarounds(tell)
            await bench.shares(tell)
            await manager.delete_pool("cleaned")
    rows = _rows(samples, files, watch)
    rows += await _together(scale, scratch, samples, tell)
    return Report("cleanup", f"Cleaning, {files:,} files", rows, samples, [_plot(samples, scale)])


class _Bench:
    """Leases of one slot, each with something done to the tree, and the floors in between."""

    def __init__(self, manager: PoolManager, pool: RepoPool, rivals: Rivals, samples: Samples, scale: Scale) -> None:
        self._manager = manager
        self._pool = pool
        self._rivals = rivals
        self._samples = samples
        self._scale = scale
        self._names = file_names(*scale.sizes[-1])

    async def turnarounds(self, tell: Tell) -> None:
        """Measure what has a target."""
        await self._turnaround(nothing, None)
        for number in range(self._scale.rounds):
            tell(f"turnarounds, round {number + 1}")
            await self._rivals.status()
            await self._turnaround(nothing, NOTHING)
            await self._turnaround(self._changing(0.01), SOME)
            await self._dirty_recipe()
            await self._turnaround(self._ignoring, IGNORED)
            await self._switch(number)

    async def shares(self, tell: Tell) -> None:
        """Measure how the turnaround grows with what was changed."""
        for share in self._scale.shares:
            tell(f"{share:.1%} changed")
            for _ in range(self._scale.slow_rounds):
                await self._turnaround(self._changing(share, new=0), f"{share:.1%} changed")
                await asyncio.to_thread(self._change, self._rivals.plain, share, 0)
                await self._samples.timed(f"{RECIPE}, {share:.1%} changed", self._recipe())

    async def _turnaround(self, dirt: Dirt, name: str | None) -> None:
        """Measure from leaving a lease until its slot is available again."""
        async with self._pool.lease(ref="main") as slot:
            await asyncio.to_thread(dirt, slot.path)
            slot_directory = slot.path.parent
            leaving = time.perf_counter()
        await self._manager.wait_clean()
        if name is not None:
            self._samples.add(name, time.perf_counter() - leaving)
        trash = slot_directory.parent.parent / "trash"
        while any(trash.iterdir()):  # noqa: ASYNC110 - what is still being deleted would disturb what comes next
            await asyncio.sleep(0.01)

    async def _dirty_recipe(self) -> None:
        """Clean the same mess as continuous integration does."""
        await asyncio.to_thread(self._change, self._rivals.plain, 0.01, self._scale.new_files)
        await self._rivals.recipe()

    async def _recipe(self) -> None:
        await git(self._rivals.plain, "fetch", "-q", "origin")
        await git(self._rivals.plain, "clean", "-ffdxq")
        await git(self._rivals.plain, "reset", "-q", "--hard", "origin/main")

    async def _switch(self, number: int) -> None:
        """Measure a check-out of another commit before a lease, and a bare one."""
        ref = ("origin/next", "origin/main")[number % 2]
        await self._samples.timed(CHECKOUT, git(self._rivals.plain, "checkout", "-q", "--detach", ref))
        for ref in ("next", "main"):
            lease = self._pool.lease(ref=ref)
            await self._samples.timed(SWITCH, lease.__aenter__())
            await lease.__aexit__(None, None, None)
            await self._manager.wait_clean()
        await git(self._rivals.plain, "checkout", "-q", "main")

    def _changing(self, share: float, new: int | None = None) -> Dirt:
        return lambda tree: self._change(tree, share, self._scale.new_files if new is None else new)

    def _change(self, tree: Path, share: float, new: int) -> None:
        for name in self._names[:: max(1, round(1 / share))]:
            (tree / name).write_text("changed\n")
        (tree / "new").mkdir(exist_ok=True)
        for number in range(new):
            (tree / f"new/{number}").write_text("new\n")

    def _ignoring(self, tree: Path) -> None:
        for number in range(self._scale.ignored_files):
            directory = tree / f"build/{number // 1000}"
            if number % 1000 == 0:
                directory.mkdir(parents=True)
            (directory / str(number)).touch()


def nothing(_tree: Path) -> None:
    """Leave the slot as it was."""


def _rows(samples: Samples, files: int, watch: LoopWatch) -> list[Row]:
    status = f"{STATUS}, {files:,} files"
    return [
        Row(f"turnaround, {NOTHING} / {STATUS}", samples.ratio(NOTHING, status), at_most=1.5),
        Row(f"turnaround, {SOME} / {STATUS}", samples.ratio(SOME, status), at_most=2.0),
        Row(f"turnaround, {IGNORED} / {STATUS}", samples.ratio(IGNORED, status), at_most=2.2),
        Row(f"{SWITCH} / {CHECKOUT}", samples.ratio(SWITCH, CHECKOUT), at_most=1.3),
        Row(f"{RECIPE}, {SOME} / turnaround", samples.ratio(f"{RECIPE}, {files:,} files", SOME)),
        Row("event loop held up by one callback", watch.wall_seconds * 1000, "ms", at_most=20, note=watch.what),
        Row("  computing", watch.cpu_seconds * 1000, "ms", at_most=20),
    ]


def _plot(samples: Samples, scale: Scale) -> Plot:
    lines = {
        "lease to available": [(share * 100, samples.median(f"{share:.1%} changed") * 1000) for share in scale.shares],
        RECIPE: [(share * 100, samples.median(f"{RECIPE}, {share:.1%} changed") * 1000) for share in scale.shares],
    }
    return Plot("turnaround", "From leaving to available", "percent of the files changed", "milliseconds", lines)


# Many at once


async def _together(scale: Scale, scratch: Path, samples: Samples, tell: Tell) -> list[Row]:
    url = await cached_repository(files=scale.together_files, directories=max(1, scale.together_files // 12))
    rows = []
    for name, at_least in (("in place", 1.2), ("rebuilt", 1.7)):
        tell(f"{scale.together} slots cleaned {name}")
        async with PoolManager(PoolConfig(workspaces_dir=scratch / f"together-{name[:2]}")) as manager:
            pool = await manager.create_pool(
                "many", url, num_slots=scale.together, fetch_on_allocate=False, rebuild_always=name == "rebuilt"
            )
            for _ in range(scale.rounds):
                for at_once in (False, True):
                    await _clean_all(manager, pool, samples, f"{name}, {'together' if at_once else 'one by one'}")
            await manager.delete_pool("many")
        one, all_ = f"{name}, one by one", f"{name}, together"
        ratio = samples.ratio(one, all_)
        rows.append(Row(f"{scale.together} slots cleaned {name}, one by one / together", ratio, at_least=at_least))
        # Together they cannot be faster than all processors at work: this says how far from it one by one is.
        rows.append(Row(f"  processors at work, {one}", samples.ratio(f"{one}, processor time", one)))
        rows.append(Row(f"  processors at work, {all_}", samples.ratio(f"{all_}, processor time", all_)))
    return rows


async def _clean_all(manager: PoolManager, pool: RepoPool, samples: Samples, name: str) -> None:
    """Lease all slots, change a little in each, and measure until all are available again."""
    leased = [await pool.allocate(ref="main") for _ in range(pool.record.num_slots)]
    held = [slot for slot in leased if slot is not None]
    assert len(held) == len(leased)
    for slot in held:
        (slot.path / ".gitignore").write_text("changed\n")
        (slot.path / "new").write_text("new\n")
    started, worked = time.perf_counter(), processor_seconds()
    if name.endswith("together"):
        await asyncio.gather(*(manager.release_slot(slot) for slot in held))
    else:
        for slot in held:
            await manager.release_slot(slot)
    samples.add(name, time.perf_counter() - started)
    samples.add(f"{name}, processor time", processor_seconds() - worked)


PROGRAM = Program("cleaning", lambda scale: 1 + scale.rounds + len(scale.shares) + 2, measure)


async def test_smoke(tmp_path: Path) -> None:
    """See that the program runs; its figures mean nothing at this size."""
    report = await measure(SMOKE, tmp_path, lambda _: None)

    assert len(report.rows) == 13
    assert all(row.figure > 0 for row in report.rows)


if __name__ == "__main__":
    raise SystemExit(run_from_command_line(__doc__, [PROGRAM]))
