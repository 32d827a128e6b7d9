"""Forty tasks lease four slots of a real repository at changing refs; each must see exactly its commit.

    python -m benchmarks.real_repository URL [--slots 4] [--tasks 40]

Prints how long creating the pool took, the leases and their parts, and how many saw a wrong commit (must be 0).
"""

import argparse
import asyncio
import random
import tempfile
import time
from typing import Any

from benchmarks._report import describe_ms, print_table, write_json
from repopool_async import LeasedSlot, PoolConfig, PoolManager


async def _inspect(slot: LeasedSlot) -> list[str]:
    head = (await slot.run("git", "rev-parse", "HEAD")).text.strip()
    status = (await slot.run("git", "status", "--porcelain", "--ignored")).text
    wrong = [] if head == slot.commit else [f"HEAD is {head}, not {slot.commit}"]
    return wrong + ([f"not clean: {status[:200]}"] if status else [])


async def measure(url: str, *, slots: int, tasks: int, workspaces_dir: str, seed: int = 1) -> dict[str, Any]:
    """Run the benchmark and return its figures; times are in seconds."""
    waits: list[float] = []
    wrong: list[str] = []
    async with PoolManager(PoolConfig(workspaces_dir=workspaces_dir)) as manager:
        started = time.perf_counter()
        pool = await manager.create_pool("real", url, num_slots=slots, fetch_on_allocate=False)
        created = time.perf_counter() - started
        async with pool.lease() as slot:
            listing = (await slot.run("git", "for-each-ref", "--format=%(refname)")).text.splitlines()
            files = len((await slot.run("git", "ls-files")).text.splitlines())
            commits = (await slot.run("git", "rev-list", "--max-count=400", "HEAD")).text.split()
        branches = [name.removeprefix("refs/remotes/origin/") for name in listing if "/origin/" in name]
        refs = [*commits[::10], *[branch for branch in branches if branch != "HEAD"][:40]]
        random.Random(seed).shuffle(refs)

        async def one(ref: str) -> None:
            asked = time.perf_counter()
            async with pool.lease(ref=ref, timeout=None) as slot:
                waits.append(time.perf_counter() - asked)
                wrong.extend(await _inspect(slot))
                await slot.run("sh", "-c", "echo dirt > dirt; echo x >> README; mkdir -p d/e; git stash list")

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(tasks):
                group.create_task(one(refs[number % len(refs)]))
        leased = time.perf_counter() - started
        await manager.wait_clean()
        warm: list[float] = []
        for _ in range(21):
            asked = time.perf_counter()
            async with pool.lease():
                warm.append(time.perf_counter() - asked)
            await manager.wait_clean()
        summary = await pool.summary()
    return {
        "url": url, "files": files, "refs": len(listing), "slots": slots, "tasks": tasks, "create_seconds": created,
        "forty_leases_seconds": leased, "waits": waits, "warm": warm, "wrong": wrong, "available": summary.available,
    }  # fmt: skip


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="repopool-real-") as directory:
        done = asyncio.run(measure(options.url, slots=options.slots, tasks=options.tasks, workspaces_dir=directory))
    print_table(
        f"{options.url}: {done['files']} files, {done['refs']} refs",
        {
            f"create a pool of {done['slots']}": f"{done['create_seconds']:.2f} s",
            f"{done['tasks']} leases by {done['tasks']} tasks, changing refs": f"{done['forty_leases_seconds']:.2f} s",
            "from asking to holding, queue included": describe_ms(done["waits"]),
            "warm lease, nobody waiting": describe_ms(done["warm"]),
            "leases that saw anything wrong": len(done["wrong"]),
            "slots AVAILABLE at the end": done["available"],
        },
    )
    print(f"  written to {write_json('real_repository', done)}")
    return 1 if done["wrong"] or done["available"] != done["slots"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
