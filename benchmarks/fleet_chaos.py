"""Ill-treats a fleet, managers with two hosts over SSH and a database, and looks whether it stays sound.

    python -m benchmarks.fleet_chaos [--seconds 600] [--managers 2] [--tasks 8] [--slots 8] [--seed N] [--unchecked]

Needs PostgreSQL, OpenSSH's sshd (asyncssh's own is used where there is none) and `flock`. While the managers' tasks
lease from one pool, at random moments a manager is killed and started anew, or stopped for longer than it may be
silent; its way to the database, or to a host, is frozen or cut; the database is restarted, crashes, or loses its
connections. Then all of that ends, and a new manager has a minute to bring every slot back.

Prints leases, what was done to them, slots given twice, slots lost, slots found dirty, tokens granted twice and
unexpected errors (all of which must be 0), and exits with status 1 where one is not, or where nothing works any more.

With --unchecked hosts let everybody in, and managers are only stopped: then slots must be found given twice, or else
this program would not see it.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, AsyncExitStack
from pathlib import Path
from typing import Final

import attrs

from benchmarks._chaos_origin import make_repository
from benchmarks._findings import Findings
from benchmarks._fleet_worker import REPO
from benchmarks._report import print_table, write_json
from repopool_async import HostSpec, PoolConfig, PoolManager, SlotState
from repopool_async.config_coordination import Coordination
from tests._postgres import Proxy, Server
from tests._scratch import scratch
from tests.hosts import sshd
from tests.hosts.proxy import Proxy as SshProxy
from tests.hosts.proxy import proxy as ssh_proxy

TOP: Final = Path(__file__).parents[1]
DATABASE: Final = "chaos"
TTL_SECONDS: Final = 2.0
RECOVERY_SECONDS: Final = 60.0


@attrs.define(eq=False)
class Member:
    """A manager in a process of its own, with its own ways to the database and to the hosts."""

    settings: Path
    database: Proxy
    hosts: dict[str, SshProxy]
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it."""
        argv = [sys.executable, "-m", "benchmarks._fleet_worker", str(self.settings)]
        log = self.settings.with_suffix(".log").open("ab")
        with log:
            self.process = await asyncio.create_subprocess_exec(*argv, cwd=TOP, stdout=log, stderr=log)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    async def end(self, number: signal.Signals, seconds: float) -> int | None:
        """End it, by force where it takes longer; returns its exit status, None where it had to be forced.

        One that does not end when it is asked to says in its log what it is waiting for.
        """
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        try:
            async with asyncio.timeout(seconds):
                return await self.process.wait()
        except TimeoutError:
            if number == signal.SIGTERM:
                for where in (signal.SIGUSR1, signal.SIGUSR2):
                    self.process.send_signal(where)
                await asyncio.sleep(2)
            self.process.kill()
            await self.process.wait()
            return None


@attrs.define(eq=False)
class Fleet:
    """What is ill-treated, and with what."""

    root: Path
    server: Server
    members: list[Member]
    random: random.Random
    is_unchecked: bool = False
    done: Counter[str] = attrs.field(factory=Counter)

    async def ill_treat(self, seconds: float) -> None:
        """Do something bad every second or so."""
        ways: list[Callable[[Member], Awaitable[None]]] = [
            self.kill, self.stop, self.freeze_database, self.cut_database, self.freeze_host, self.cut_host,
            self.restart_database, self.crash_database, self.end_backends,
        ]  # fmt: skip
        pauses = (0.3, 1.2)
        if self.is_unchecked:
            ways, pauses = [self.stop], (3.0, 5.0)
        end = asyncio.get_running_loop().time() + seconds
        # Each once, in some order, and then whatever comes.
        first = self.random.sample(ways, len(ways))
        while asyncio.get_running_loop().time() < end:
            way = first.pop() if first else self.random.choice(ways)
            member = self.random.choice(self.members)
            if member.process is None or member.process.returncode is not None:
                return  # it ended by itself, which is told as an error
            await way(member)
            self.done[way.__name__] += 1
            await asyncio.sleep(self.random.uniform(*pauses))

    async def kill(self, member: Member) -> None:
        """Kill a manager and start another."""
        await member.end(signal.SIGKILL, 10)
        await member.start()

    async def stop(self, member: Member) -> None:
        """Stop a manager for so long that it is taken for dead."""
        member.send(signal.SIGSTOP)
        shortest = 3 if self.is_unchecked else 1  # it takes that until another has cleaned and leased its slots
        await asyncio.sleep(self.random.uniform(shortest, 4) * TTL_SECONDS)
        member.send(signal.SIGCONT)

    async def freeze_database(self, member: Member) -> None:
        """Have the database not answer one manager for a while."""
        member.database.freeze()
        await asyncio.sleep(self.random.uniform(0.5, 2) * TTL_SECONDS)
        member.database.thaw()

    async def cut_database(self, member: Member) -> None:
        """Break one manager's connections to the database."""
        member.database.cut()

    async def freeze_host(self, member: Member) -> None:
        """Have a host not answer one manager for a while."""
        host = self.random.choice(list(member.hosts.values()))
        host.freeze()
        await asyncio.sleep(self.random.uniform(1, 3))
        host.thaw()

    async def cut_host(self, member: Member) -> None:
        """Break one manager's connections to a host."""
        self.random.choice(list(member.hosts.values())).cut()

    async def restart_database(self, _: Member) -> None:
        """Stop the database and start it."""
        await self._restart(signal.SIGINT)

    async def crash_database(self, _: Member) -> None:
        """Have the database crash and recover."""
        await self._restart(signal.SIGQUIT)

    async def _restart(self, number: signal.Signals) -> None:
        await asyncio.to_thread(self.server.stop, number)
        await asyncio.sleep(self.random.uniform(0, 1.5))
        await asyncio.to_thread(self.server.start)

    async def end_backends(self, _: Member) -> None:
        """End every connection of the managers from the database's side."""
        async with self.server.admin(DATABASE) as connection:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'repopool'"
            )


async def measure(options: argparse.Namespace, root: Path) -> tuple[Findings, Fleet, int]:
    """Do it; returns what was found, the fleet, and how many leases at once were given in the end."""
    async with AsyncExitStack() as stack:
        server = await asyncio.to_thread(Server.make)
        stack.callback(server.remove)
        await asyncio.to_thread(server.start)
        await server.make_database(DATABASE)
        make_repository(root)
        (root / "witness").mkdir()
        servers = {name: stack.enter_context(_sshd(root, name)) for name in ("a", "b")}
        await _make_pool(root, server, servers, options.slots)
        members = [
            await _member(root, number, server, servers, stack, tasks=options.tasks, is_unchecked=options.unchecked)
            for number in range(options.managers)
        ]
        fleet = Fleet(root, server, members, random.Random(options.seed), is_unchecked=options.unchecked)
        await asyncio.gather(*[member.start() for member in members])
        findings = Findings()
        try:
            await fleet.ill_treat(options.seconds)
            endings = await asyncio.gather(*[member.end(signal.SIGTERM, RECOVERY_SECONDS) for member in members])
        finally:
            await asyncio.gather(*[member.end(signal.SIGKILL, 10) for member in members])
        for member, status in zip(members, endings, strict=True):
            if status not in (0, -signal.SIGTERM):  # the latter where it had not begun yet
                findings.errors.append(f"{member.settings.stem} did not end in good order when asked to: {status}")
        at_once = await _judge(root, fleet, findings, options.slots)
        findings.kills = fleet.done["kill"]
        findings.take_accusations(root)
        return findings, fleet, at_once


def _sshd(root: Path, name: str) -> AbstractContextManager[sshd.Server]:
    (directory := root / f"sshd-{name}").mkdir()
    keys = sshd.Keys.make(directory)
    return sshd.openssh_server(keys) if Path(sshd.SSHD).exists() else sshd.asyncssh_server(keys)


def _config(root: Path, name: str, dsn: str) -> PoolConfig:
    coordination = Coordination(dsn=dsn, session_ttl=TTL_SECONDS)
    return PoolConfig(root / name, coordination=coordination, janitor_interval=5, close_timeout=10)


def _hosts(root: Path) -> list[HostSpec]:
    return [HostSpec(name, address="local", workspaces_dir=str(root / f"host-{name}")) for name in ("a", "b")]


async def _make_pool(root: Path, server: Server, servers: dict[str, sshd.Server], num_slots: int) -> None:
    """Make the pool by a manager on the hosts' own machine, which all of them are."""
    async with PoolManager(_config(root, "maker", server.dsn(DATABASE)), hosts=_hosts(root)) as manager:
        await manager.create_pool(REPO, str(root / "origin"), num_slots=num_slots, hosts=list(servers))


async def _member(
    root: Path,
    number: int,
    server: Server,
    servers: dict[str, sshd.Server],
    stack: AsyncExitStack,
    *,
    tasks: int,
    is_unchecked: bool,
) -> Member:
    database = await stack.enter_async_context(Proxy(server.port))
    ways = {name: await stack.enter_async_context(ssh_proxy(one.port)) for name, one in servers.items()}
    hosts = {
        name: {"directory": str(root / f"host-{name}"), "config": str(servers[name].config_for(way.port))}
        for name, way in ways.items()
    }
    settings = {
        "root": str(root),
        "workspaces_dir": str(root / f"manager{number}"),
        "dsn": server.dsn(DATABASE, port=database.port),
        "session_ttl": TTL_SECONDS,
        "hosts": hosts,
        "tasks": tasks,
        "is_unchecked": is_unchecked,
        "longest_stay_seconds": 15 if is_unchecked else 6,
    }
    path = root / f"manager{number}.json"
    path.write_text(json.dumps(settings))
    return Member(path, database, ways)


async def _judge(root: Path, fleet: Fleet, findings: Findings, num_slots: int) -> int:
    """Have a new manager bring everything back; returns how many slots it could lease at once."""
    async with PoolManager(_config(root, "judge", fleet.server.dsn(DATABASE)), hosts=_hosts(root)) as manager:
        try:
            async with asyncio.timeout(RECOVERY_SECONDS):
                while any(slot.state is not SlotState.AVAILABLE for slot in await manager.list_slots(REPO)):
                    await manager.recover()
                    await asyncio.sleep(0.1)
        except TimeoutError:
            pass  # told below, slot by slot
        slots = await manager.list_slots(REPO)
        lost = [slot for slot in slots if slot.state is not SlotState.AVAILABLE]
        findings.slots_lost += [f"{slot.slot_id}: {slot.state} {slot.error or ''}" for slot in lost]
        findings.slots_lost += [f"{num_slots - len(slots)} without a record"] if len(slots) < num_slots else []
        leases = [await manager.allocate_slot(REPO, timeout=0) for _ in range(num_slots)]
        for lease in leases:
            if lease is not None:
                await lease.run("git", "rev-parse", "HEAD")
                await manager.release_slot(lease)
    async with fleet.server.admin(DATABASE) as connection:
        twice = await connection.fetch(
            "SELECT slot_id, record ->> 'token' AS token FROM repopool.history WHERE event = 'allocated' "
            "GROUP BY 1, 2 HAVING count(*) > 1"
        )
    findings.double_holders += [f"{row['slot_id']}: token {row['token']} was granted twice" for row in twice]
    return sum(lease is not None for lease in leases)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of ill-treatment (default: %(default)s)")
    parser.add_argument("--managers", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=8, help="of each manager (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--unchecked", action="store_true", help="let hosts check nothing, which must be found out")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    with scratch("repopool-fleet-chaos-") as directory:
        findings, fleet, at_once = asyncio.run(measure(options, directory))
        counts = {name: _count(directory / name) for name in ("leases", "interrupted")}
        if findings.violations:
            for log in sorted(directory.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-20000:]}")
    done = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(fleet.done.items()))
    print_table(
        f"{options.managers} managers, {options.tasks} tasks each, {options.slots} slots, "
        f"seed {options.seed}, {options.seconds:.0f} s",
        {
            "leases": counts["leases"],
            "leases interrupted": counts["interrupted"],
            "what was done to them": done,
            "slots given twice": len(findings.double_holders),
            "slots lost": len(findings.slots_lost),
            "slots found dirty": len(findings.half_made),
            "unexpected errors": len(findings.errors),
            "slots leased at once in the end": f"{at_once} of {options.slots}",
        },
    )
    for line in findings.violations[:20]:
        print(f"  ! {line}")
    figures = {"options": vars(options), "done": dict(fleet.done), **counts, **attrs.asdict(findings)}
    print(f"  written to {write_json('fleet_chaos', figures)}")
    return 1 if findings.violations or at_once < options.slots or not counts["leases"] else 0


def _count(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    raise SystemExit(main())
