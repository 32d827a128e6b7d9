"""Several processes lease from one directory, and a witness in every slot proves that none is ever given twice.

    python examples/concurrent_allocation.py [URL]

Without a URL it uses the repository that this file lies in. Everything happens in a temporary directory.
"""

import asyncio
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repopool_async import PoolConfig, PoolManager

PROCESSES = 4
LEASES_EACH = 5
SLOTS = 2


@contextmanager
def witness(path: Path) -> Iterator[None]:
    """Fail if anybody else is in the block with the same path: "x" is O_CREAT | O_EXCL."""
    with path.open("x"):
        yield
    path.unlink()


async def work(directory: str, witnesses: str) -> tuple[int, list[tuple[str, float]]]:
    """Lease a few times in this process; return its pid and, for each lease, the slot and the seconds waited."""
    leases = []
    async with PoolManager(PoolConfig(directory)) as manager:
        for _ in range(LEASES_EACH):
            asked = time.monotonic()
            async with manager.lease("example", timeout=120, metadata={"worker": os.getpid()}) as slot:
                leases.append((slot.slot_id, time.monotonic() - asked))
                with witness(Path(witnesses, slot.slot_id)):
                    (slot.path / "work.txt").write_text(str(os.getpid()))
                    await asyncio.sleep(random.uniform(0.01, 0.05))
    return os.getpid(), leases


def work_in_process(directories: tuple[str, str]) -> tuple[int, list[tuple[str, float]]]:
    """Run `work` to its end; this is what each process does."""
    return asyncio.run(work(*directories))


async def make_pool(directory: str, url: str) -> None:
    """Make the pool that all processes use."""
    async with PoolManager(PoolConfig(directory)) as manager:
        await manager.create_pool("example", url, num_slots=SLOTS)


async def count_available(directory: str) -> int:
    """Return how many slots are available now."""
    async with PoolManager(PoolConfig(directory)) as manager:
        return await manager.available_count("example")


def main(url: str) -> int:
    """Let the processes loose and print what they tell; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="repopool-example-") as top:
        directory, witnesses = f"{top}/workspaces", f"{top}/witnesses"
        Path(witnesses).mkdir()
        print(f"{PROCESSES} processes, {LEASES_EACH} leases each, {SLOTS} slots of {url}\n")
        asyncio.run(make_pool(directory, url))

        # Spawned, not forked: nothing is shared but the directory.
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as processes:
            results = processes.map(work_in_process, [(directory, witnesses)] * PROCESSES, chunksize=1)

        print(f"{'process':>8}  {'leases':>6}  {'mean wait':>10}  {'longest':>9}  slots")
        for pid, leases in results:
            waits = [seconds for _, seconds in leases]
            used = ", ".join(f"{slot_id} x{count}" for slot_id, count in sorted(Counter(s for s, _ in leases).items()))
            print(f"{pid:>8}  {len(leases):>6}  {sum(waits) / len(waits):>8.3f} s  {max(waits):>7.3f} s  {used}")

        available = asyncio.run(count_available(directory))
        print(f"\nno slot was given twice; {available} of {SLOTS} are available")
        return 0 if available == SLOTS else 1


def this_repository() -> str:
    """Return the top level of the checkout that this file lies in."""
    return next(str(path) for path in Path(__file__).resolve().parents if (path / ".git").exists())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else this_repository()))
