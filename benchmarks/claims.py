"""Claims and releases a second, without any git work: on PostgreSQL, as bare SQL and on files, in one run, interleaved.

    python -m benchmarks.claims --dsn postgresql://… [--seconds 5] [--rounds 3] [--clients 1 16 128]

One pair is what a lease costs the coordinator: claim, end of the lease, release; on PostgreSQL as durable as the server
is set to be (that is printed). Bare SQL is what two statements cost through the same driver, whatever a coordinator
makes of them. The database is migrated and gets a pool of its own and a table, which are deleted afterwards.
Clients are tasks of one process; the server's processor time is told where the server runs on this machine.
"""

import argparse
import asyncio
import os
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

from benchmarks._claims_floor import BareTable
from benchmarks._report import describe_ms, print_table, write_json
from repopool_async._clock import now
from repopool_async._identity import boot_id
from repopool_async.coordination._pg_database import Database
from repopool_async.coordination._pg_migrations import migrate
from repopool_async.coordination.base import Coordinator, Grant
from repopool_async.coordination.files import FileCoordinator
from repopool_async.coordination.postgres import PostgresCoordinator
from repopool_async.lock_manager import LockManager
from repopool_async.models import Pool, Seal, Slot, make_slot_id
from repopool_async.shared_state import PoolRecords
from repopool_async.slot_allocator import available
from repopool_async.slot_store import SlotStore
from tests._scratch import scratch

CONNECTIONS = 16
WARM_UP_SECONDS = 2.0
COMMIT = "a" * 40
SEAL = Seal(
    commit=COMMIT, branch="main", refs_generation="1", boot_id=boot_id(), mark_ns=1, settled_ns=1,
    clock_offset_ns=1, tree_device=1, tree_inode=1,
)  # fmt: skip


@attrs.define
class Run:
    """What one engine did with so many clients in one round."""

    engine: str
    clients: int
    pairs_per_second: float
    client_cpu_ms: float
    server_cpu_ms: float | None
    claim_seconds: list[float] = attrs.field(repr=False)


async def make_pool(coordinator: Coordinator, records: PoolRecords, name: str, num_slots: int) -> None:
    """Make a pool of AVAILABLE slots that have no files."""
    await records.save_pool(Pool(repo_name=name, repo_url="u", num_slots=num_slots, created_at=now()))
    for _ in range(num_slots):
        slot_id = make_slot_id(name, await coordinator.next_slot_number(name))
        slot = Slot(slot_id=slot_id, repo_name=name, repo_url="u", path="/nowhere", created_at=now())
        await coordinator.finish(await coordinator.create(slot), available(slot, SEAL, now()))


Claim = Callable[[str], Awaitable[Callable[[], Awaitable[object]]]]
"""Leases a slot under an id, and returns what gives it back."""


def claiming(coordinator: Coordinator, name: str) -> Claim:
    """Return what a lease costs a coordinator."""

    async def claim(lease_id: str) -> Callable[[], Awaitable[object]]:
        grant = await coordinator.claim(name, commit=COMMIT, branch="main", lease_id=lease_id)
        assert grant is not None
        return lambda: give_back(grant)

    async def give_back(grant: Grant) -> None:
        slot = await coordinator.begin_return(grant)
        await coordinator.finish(grant, available(slot, SEAL, now()))

    return claim


def claiming_barely(table: BareTable) -> Claim:
    """Return what it costs the database and its driver."""

    async def claim(lease_id: str) -> Callable[[], Awaitable[object]]:
        row = await table.claim(lease_id)
        return lambda: table.release(row)

    return claim


async def measure(engine: str, claim: Claim, *, clients: int, seconds: float, server_cpu: Callable[[], float]) -> Run:
    """Let clients lease and return for a while."""
    waits: list[float] = []
    end = time.monotonic() + seconds

    async def work(client: int) -> None:
        count = 0
        while time.monotonic() < end:
            count += 1
            asked = time.monotonic()
            give_back = await claim(f"{client}-{count}")
            waits.append(time.monotonic() - asked)
            await give_back()

    started, own, servers = time.monotonic(), time.process_time(), server_cpu()
    await asyncio.gather(*(work(client) for client in range(clients)))
    took, own, servers = time.monotonic() - started, time.process_time() - own, server_cpu() - servers
    pairs = len(waits)
    return Run(
        engine=engine,
        clients=clients,
        pairs_per_second=pairs / took,
        client_cpu_ms=1000 * own / pairs,
        server_cpu_ms=1000 * servers / pairs if servers else None,
        claim_seconds=waits,
    )


def postgres_cpu_seconds() -> float:
    """Return the processor time of all PostgreSQL processes of this machine; 0 where none is."""
    ticks = sum(_ticks(Path(entry.path)) for entry in os.scandir("/proc") if entry.name.isdigit())
    return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(process: Path) -> int:
    try:
        if (process / "comm").read_text().strip() not in ("postgres", "postmaster"):
            return 0
        stat = (process / "stat").read_text()
    except OSError:
        return 0
    return sum(int(field) for field in stat[stat.rfind(")") + 2 :].split()[11:15])


async def run_all(dsn: str, *, seconds: float, rounds: int, clients: list[int]) -> list[Run]:
    """Measure all engines with each number of clients, in turn, several times."""
    runs: list[Run] = []
    name = f"bench-{uuid.uuid4().hex[:8]}"
    slots = 2 * max(*clients, 4 * CONNECTIONS)
    with scratch("repopool-claims-") as directory:
        store = SlotStore(directory)
        files = FileCoordinator(store, LockManager(store.locks_directory))
        async with (
            PostgresCoordinator(dsn, max_connections=CONNECTIONS) as postgres,
            BareTable(dsn, num_slots=slots, max_connections=CONNECTIONS) as bare,
        ):
            try:
                await make_pool(postgres, postgres.records, name, slots)
                await make_pool(files, store, name, slots)
                engines: dict[str, tuple[Claim, Callable[[], float]]] = {
                    "PostgreSQL": (claiming(postgres, name), postgres_cpu_seconds),
                    "bare SQL": (claiming_barely(bare), postgres_cpu_seconds),
                    "files": (claiming(files, name), lambda: 0.0),
                }
                for claim, cpu in engines.values():  # each connection is dear until its plans are made
                    await measure("", claim, clients=4 * CONNECTIONS, seconds=WARM_UP_SECONDS, server_cpu=cpu)
                for _ in range(rounds):
                    for count in clients:
                        for engine, (claim, cpu) in engines.items():
                            runs.append(await measure(engine, claim, clients=count, seconds=seconds, server_cpu=cpu))
            finally:
                await postgres.records.delete_pool(name)
    return runs


async def prepare(dsn: str) -> str:
    """Migrate the database and return what durability it gives."""
    database = Database(dsn)
    await database.open()
    try:
        await migrate(database)
        row = await database.fetch_row(
            "look at settings",
            "SELECT format('synchronous_commit %s, fsync %s, PostgreSQL %s', current_setting('synchronous_commit'), "
            "current_setting('fsync'), current_setting('server_version')) AS settings",
        )
        return str(row["settings"])
    finally:
        await database.close()


def by_case(runs: list[Run]) -> Iterator[tuple[str, list[Run]]]:
    """Yield what belongs together: one engine with one number of clients."""
    for case in dict.fromkeys((run.engine, run.clients) for run in runs):
        yield f"{case[0]}, {case[1]} clients", [run for run in runs if (run.engine, run.clients) == case]


def describe(runs: list[Run]) -> str:
    """Return the medians of several rounds."""
    rates = [run.pairs_per_second for run in runs]
    own = statistics.median(run.client_cpu_ms for run in runs)
    servers = [run.server_cpu_ms for run in runs if run.server_cpu_ms is not None]
    server = f", server {statistics.median(servers):.2f} ms" if servers else ""
    claims = describe_ms([wait for run in runs for wait in run.claim_seconds])
    return (
        f"{statistics.median(rates):.0f} pairs/s (best {max(rates):.0f}); processor time a pair: "
        f"ours {own:.2f} ms{server}; a claim {claims}"
    )


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dsn", default=os.environ.get("REPOPOOL_DSN"), help="default: REPOPOOL_DSN")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 128])
    options = parser.parse_args()
    if not options.dsn:
        parser.error("which database? give --dsn, or set REPOPOOL_DSN")
    settings = asyncio.run(prepare(options.dsn))
    load = os.getloadavg()[0]
    runs = asyncio.run(run_all(options.dsn, seconds=options.seconds, rounds=options.rounds, clients=options.clients))
    rows: dict[str, object] = {"server": settings, "cores, load before": f"{os.cpu_count()}, {load:.1f}"}
    rows |= {case: describe(some) for case, some in by_case(runs)}
    print_table(f"claims and releases, {options.rounds} rounds of {options.seconds:g} s", rows)
    figures: list[dict[str, Any]] = [
        attrs.asdict(run, filter=attrs.filters.exclude(attrs.fields(Run).claim_seconds)) for run in runs
    ]
    print(f"  written to {write_json('claims', {'settings': settings, 'runs': figures})}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
