"""What it costs to get a slot: warm, after asking the remote, in a crowd, from many processes.

    python -m benchmarks.test_allocation_performance [--smoke]

Ratios are to what plain git does in between, in the same run; every figure is a median.
"""

import asyncio
from pathlib import Path

from benchmarks import _claims
from benchmarks._command import Program, run_from_command_line
from benchmarks._measure import SMOKE, LoopWatch, Samples, Scale, Tell, counting_spawns
from benchmarks._plots import Plot
from benchmarks._report import Report, Row
from benchmarks._repositories import cached_repository, commit, copied, git
from benchmarks._rivals import CLONE, RECIPE, SHARED, WARMTREE, WORKTREE, Rivals, warmtree
from repopool_async import PoolConfig, PoolManager
from repopool_async.repo_pool import RepoPool
from tests.gitserver import serving

ENTER, LEAVE = "enter a warm lease", "leave the block"
ASKING, LS_REMOTE = "enter a lease that asks an unchanged remote", "git ls-remote"


async def measure(scale: Scale, scratch: Path, tell: Tell) -> Report:
    """Run the benchmark in an empty directory."""
    samples = Samples()
    rows = await _warm_leases(scale, scratch, samples, tell)
    rows += await _unchanged_remote(scale, scratch, samples, tell)
    rows += await _crowd(scale, scratch, tell)
    tell("claims")
    claims = await _claims.measure(scale, scratch / "claims")
    rows += _claims.rows(claims, scale)
    plots = [_latency_plot(scale, samples), _claims.plot(claims)]
    return Report("allocation", "Allocating", rows, samples, plots)


# A warm lease, beside what others do


async def _warm_leases(scale: Scale, scratch: Path, samples: Samples, tell: Tell) -> list[Row]:
    spawned = 0
    async with PoolManager(PoolConfig(workspaces_dir=scratch / "pools")) as manager:
        measured: list[tuple[RepoPool, Rivals, str]] = []
        for files, directories in scale.sizes:
            tell(f"a pool of {files:,} files")
            url = await cached_repository(files=files, directories=directories)
            pool = await manager.create_pool(f"of-{files}", url, num_slots=1, fetch_on_allocate=False)
            rivals = Rivals(url, scratch / f"rivals-{files}", samples, f"{files:,} files")
            await rivals.prepare()
            measured.append((pool, rivals, f"{files:,} files"))
        with LoopWatch() as watch:
            for number in range(scale.rounds):
                tell(f"warm leases, round {number + 1}")
                for pool, rivals, label in measured:
                    spawned += await warm_lease(manager, pool, samples, label)
                    await rivals.make_checkouts()
    return _warm_rows(scale, samples, spawned, watch)


async def warm_lease(manager: PoolManager, pool: RepoPool, samples: Samples, label: str) -> int:
    """Lease a slot that stands where it is wanted; note times and return how many processes that started."""
    lease = pool.lease(ref="main")
    with counting_spawns() as spawned:
        slot = await samples.timed(f"{ENTER}, {label}", lease.__aenter__())
        started = spawned()
    assert slot.branch == "main"
    await samples.timed(f"{LEAVE}, {label}", lease.__aexit__(None, None, None))
    await manager.wait_clean()
    return started


def _warm_rows(scale: Scale, samples: Samples, spawned: int, watch: LoopWatch) -> list[Row]:
    few, many = f"{scale.sizes[0][0]:,} files", f"{scale.sizes[-1][0]:,} files"
    rows = [
        Row(f"{ENTER}, {many}", samples.median(f"{ENTER}, {many}") * 1000, "ms", at_most=5),
        Row(f"  {many} against {few}", samples.ratio(f"{ENTER}, {many}", f"{ENTER}, {few}"), at_most=1.5),
        Row("  processes started by all of them", spawned, "", at_most=0),
        Row(f"{LEAVE}, {many}", samples.median(f"{LEAVE}, {many}") * 1000, "ms", at_most=5),
    ]
    for name, at_least in ((WORKTREE, 200), (CLONE, None), (SHARED, None), (RECIPE, None), (WARMTREE, None)):
        if f"{name}, {many}" in samples.by_name:
            ratio = samples.ratio(f"{name}, {many}", f"{ENTER}, {many}")
            rows.append(Row(f"{name}, {many}: times a warm lease", ratio, at_least=at_least))
    if warmtree() is None:
        rows.append(Row("warmtree", 0, "", note="not installed: pip install warmtree (Python 3.12 or newer)"))
    rows.append(Row("event loop held up by one callback", watch.wall_seconds * 1000, "ms", at_most=20, note=watch.what))
    rows.append(Row("  computing", watch.cpu_seconds * 1000, "ms", at_most=20))
    return rows


def _latency_plot(scale: Scale, samples: Samples) -> Plot:
    shown = {ENTER: "warm lease", CLONE: CLONE, SHARED: SHARED, WORKTREE: WORKTREE, RECIPE: RECIPE, WARMTREE: WARMTREE}
    lines = {
        shown[name]: [(files, samples.median(f"{name}, {files:,} files") * 1000) for files, _ in scale.sizes]
        for name in shown
        if f"{name}, {scale.sizes[-1][0]:,} files" in samples.by_name
    }
    return Plot("latency", "Until there is a clean checkout", "files in the repository", "milliseconds", lines)


# Asking the remote


async def _unchanged_remote(scale: Scale, scratch: Path, samples: Samples, tell: Tell) -> list[Row]:
    files, directories = scale.sizes[0]
    source = await copied(await cached_repository(files=files, directories=directories), scratch / "unchanged/r.git")
    rows = []
    with serving(scratch / "unchanged") as server:
        for where, url in (("HTTP", server.url("r.git")), ("a path", str(source))):
            tell(f"an unchanged remote, {where}")
            ratio = await _asking(scale, scratch, samples, where, url)
            rows.append(Row(f"fetch_on_allocate, unchanged remote by {where} / git ls-remote", ratio, at_most=1.2))
    return rows


async def _asking(scale: Scale, scratch: Path, samples: Samples, where: str, url: str) -> float:
    asking, ls_remote = f"{ASKING}, {where}", f"{LS_REMOTE}, {where}"
    async with PoolManager(PoolConfig(workspaces_dir=scratch / f"asking-{len(where)}")) as manager:
        pool = await manager.create_pool("asking", url, num_slots=1)
        for _ in range(scale.rounds):
            await samples.timed(ls_remote, git(scratch, "ls-remote", url))
            lease = pool.lease(ref="main")
            await samples.timed(asking, lease.__aenter__())
            await lease.__aexit__(None, None, None)
            await manager.wait_clean()
    return samples.ratio(asking, ls_remote)


# A crowd


async def _crowd(scale: Scale, scratch: Path, tell: Tell) -> list[Row]:
    """Let many lease a commit at once that the mirror does not have yet, from a server that counts."""
    tell("a crowd")
    files, directories = scale.sizes[0]
    source = await copied(await cached_repository(files=files, directories=directories), scratch / "served/r.git")
    with serving(scratch / "served") as server:
        async with PoolManager(PoolConfig(workspaces_dir=scratch / "crowd")) as manager:
            pool = await manager.create_pool("crowd", server.url("r.git"), num_slots=4)
            new = await commit(source, "main", {"new.txt": "new\n"}, parent="main")
            packs, requests = server.packs_asked_for, len(server.requests)

            async def lease() -> str:
                async with pool.lease(timeout=None) as slot:
                    return slot.commit

            commits = await asyncio.gather(*(lease() for _ in range(scale.crowd)))
            await manager.wait_clean()
    wrong = sum(seen != new for seen in commits)
    note = f"{len(server.requests) - requests} requests in all"
    return [
        Row(f"{scale.crowd} leases at once on a cold ref: packs sent", server.packs_asked_for - packs, "", 1, 1, note),
        Row("  leases of another commit", wrong, "", at_most=0),
    ]


PROGRAM = Program("allocation", lambda scale: len(scale.sizes) + scale.rounds + 3, measure)


async def test_smoke(tmp_path: Path) -> None:
    """See that the program runs; its figures mean nothing at this size."""
    report = await measure(SMOKE, tmp_path, lambda _: None)

    assert {row.what: row.figure for row in report.rows}["  processes started by all of them"] == 0
    assert len(report.plots) == 2


if __name__ == "__main__":
    raise SystemExit(run_from_command_line(__doc__, [PROGRAM]))
