"""Sixteen processes fight over four slots; a witness file made with O_EXCL in each slot proves exclusion.

    python -m benchmarks.contention [--seconds 60] [--processes 16] [--slots 4]

Prints leases per process, double holders (must be 0), errors other than time-outs (must be 0) and the slots' states at
the end (all AVAILABLE). The witness lies beside the tree, where cleaning does not touch it.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._report import describe_ms, print_table, write_json
from repopool_async import PoolConfig, PoolManager, PoolTimeoutError
from repopool_async._process import run_process
from tests._scratch import scratch


async def work(directory: str, url: str, *, slots: int, seconds: float) -> dict[str, Any]:
    """Lease again and again until the time is over; return what was seen."""
    waits: list[float] = []
    seen: dict[str, Any] = {"leases": 0, "timeouts": 0, "violations": [], "errors": [], "waits": waits}
    async with PoolManager(PoolConfig(workspaces_dir=directory)) as manager:
        pool = await manager.create_pool("contended", url, num_slots=slots, fetch_on_allocate=False)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            asked = time.monotonic()
            try:
                async with pool.lease(timeout=10) as slot:
                    waits.append(time.monotonic() - asked)
                    seen["leases"] += 1
                    _hold(slot.path.parent / "witness", slot.path, seen)
            except PoolTimeoutError:
                seen["timeouts"] += 1
            except Exception as error:  # noqa: BLE001 - every other error is a finding
                seen["errors"].append(f"{type(error).__name__}: {error}")
    return seen


def _hold(witness: Path, tree: Path, seen: dict[str, Any]) -> None:
    try:
        os.close(os.open(witness, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        seen["violations"].append(str(witness))
        return
    try:
        if (tree / "dirt").exists():
            seen["violations"].append(f"dirt of another lease in {tree}")
        (tree / "dirt").write_text(str(os.getpid()))
    finally:
        witness.unlink()


async def measure(*, url: str, directory: str, seconds: float, processes: int, slots: int) -> dict[str, Any]:
    """Run the fight and return its figures."""
    async with PoolManager(PoolConfig(workspaces_dir=directory)) as manager:
        await manager.create_pool("contended", url, num_slots=slots, fetch_on_allocate=False)
    argv = [sys.executable, "-m", "benchmarks.contention", "--worker", directory, url, str(slots), str(seconds)]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(run_process(argv, env=dict(os.environ), cwd=str(Path(__file__).parent.parent)))
            for _ in range(processes)
        ]
    finished = [task.result() for task in tasks]
    reports = [json.loads(done.stdout) for done in finished if done.exit_code == 0]
    crashed = [done.stderr.decode(errors="replace")[-2000:] for done in finished if done.exit_code != 0]
    async with PoolManager(PoolConfig(workspaces_dir=directory)) as manager:
        await manager.recover()
        summary = (await manager.get_pool_summary())["contended"]
    return {
        "processes": processes, "slots": slots, "seconds": seconds,
        "leases": [report["leases"] for report in reports],
        "timeouts": sum(report["timeouts"] for report in reports),
        "violations": [item for report in reports for item in report["violations"]],
        "errors": [item for report in reports for item in report["errors"]] + crashed,
        "waits": [wait for report in reports for wait in report["waits"]],
        "available": summary.available,
    }  # fmt: skip


def make_repository(directory: Path) -> str:
    """Make a small repository with the commands of git itself and return its path."""
    path = directory / "origin"
    path.mkdir()
    (path / "README").write_text("a repository\n")
    who = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for argv in (["init", "-q", "-b", "main"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        asyncio.run(run_process(["git", *argv], cwd=str(path), env=dict(os.environ)))
    return str(path)


def main() -> int:
    """Run from the command line."""
    if sys.argv[1:2] == ["--worker"]:
        directory, url, slots, seconds = sys.argv[2:]
        print(json.dumps(asyncio.run(work(directory, url, slots=int(slots), seconds=float(seconds)))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--slots", type=int, default=4)
    options = parser.parse_args()
    with scratch("repopool-contention-") as place:
        done = asyncio.run(
            measure(
                url=make_repository(place),
                directory=f"{place}/pools",
                seconds=options.seconds,
                processes=options.processes,
                slots=options.slots,
            )
        )
    print_table(
        f"{done['processes']} processes, {done['slots']} slots, {done['seconds']:g} s",
        {
            "leases": sum(done["leases"]),
            "least and most by one process": f"{min(done['leases'], default=0)} and {max(done['leases'], default=0)}",
            "from asking to holding": describe_ms(done["waits"]),
            "time-outs": done["timeouts"],
            "double holders or leaks": len(done["violations"]),
            "other errors": len(done["errors"]),
            "slots AVAILABLE at the end": done["available"],
        },
    )
    for line in [*done["violations"], *done["errors"]][:10]:
        print(f"  ! {line}")
    print(f"  written to {write_json('contention', done)}")
    return 1 if done["violations"] or done["errors"] or done["available"] != done["slots"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
