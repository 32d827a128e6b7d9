"""What the steps of a lease cost on a host over SSH, against this machine: executions on the host, and time.

    python -m benchmarks.remote [--rounds 20] [--delay-ms 40] [--files 2000]

Needs `pip install 'repopool-async[ssh]'` and git; the server is an OpenSSH sshd where there is one, asyncssh's own
otherwise. Every step is measured in turn on all of them; figures are medians. The delay is per round trip.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import attrs

from benchmarks._report import print_table, write_json
from benchmarks._repositories import make_repository
from repopool_async import Guard, LocalHost, LockManager, Slot, SshHost
from repopool_async._clock import now
from repopool_async._git import GitRunner, base_environment
from repopool_async.hosts._ssh_connection import SshOptions
from repopool_async.hosts.base import Command, Host, MakeDirectory, WriteFile
from repopool_async.mirror import Mirror
from repopool_async.workspaces.base import Checkout, Rung
from repopool_async.workspaces.clone import CloneWorkspace
from tests._scratch import scratch
from tests.hosts import sshd
from tests.hosts.proxy import proxy

ENV = {"PATH": os.environ["PATH"]}


class Bench:
    """One host with a mirror and a slot."""

    def __init__(self, name: str, host: Host, directory: Path, url: str) -> None:
        self.name = name
        self.host = host
        self.figures: dict[str, list[float]] = {}
        self.executions: dict[str, int] = {}
        git = GitRunner(host, environment=base_environment())
        locks = LockManager(directory / "locks")
        self._mirror = Mirror(f"{directory}/web/mirror.git", url, host=host, git=git, locks=locks, repo_name="web")
        self._workspace = CloneWorkspace(host=host, git=git, mirror=self._mirror)
        self._slot = Slot("workspace-web-slot1", "web", url, f"{directory}/web/slots/slot1/tree", created_at=now())
        self._directory = self._slot.path.rpartition("/")[0]
        self._token = 0

    async def open(self) -> None:
        """Make mirror and tree."""
        await self._mirror.ensure()
        await self.host.apply([MakeDirectory(self._directory)])
        resolved = await self._mirror.resolve("main")
        self._checkout = Checkout(resolved.commit, resolved.branch)
        await self._workspace.provision(self._slot, self._checkout)
        await self._seal()

    async def close(self) -> None:
        """Let the mirror go."""
        await self._mirror.aclose()

    async def round(self) -> None:
        """Take every step once."""
        root = self._directory
        files = [WriteFile(f"{root}/bench/{number}", b"x" * 100) for number in range(10)]
        guard = Guard(root, self._token + 1)
        await self._measure("run true", lambda: self.host.run(["true"], env=ENV))
        await self._measure("batch of 5", lambda: self.host.batch([Command(("true",), ENV)] * 5))
        await self._measure("stat", lambda: self.host.stat(root))
        await self._measure("10 files", lambda: self.host.apply([MakeDirectory(f"{root}/bench"), *files]))
        await self._measure("inspect", lambda: self.host.inspect_tree(self._slot.path, since_ns=2**62))
        await self._measure("enter", self._enter)
        await self._measure("guarded run", lambda: self.host.run(["true"], env=ENV, guard=guard))
        await self._measure("prepare, warm", lambda: self._workspace.prepare(self._slot, self._checkout))
        await self._measure("restore and seal, untouched", self._restore)
        await self.host.apply([WriteFile(f"{self._slot.path}/new", b"x")])
        await self._measure("restore and seal, a file added", self._restore)

    async def _enter(self) -> None:
        self._token += 1
        await self.host.enter(self._directory, self._token, "bench")

    async def _restore(self) -> None:
        work = await self._workspace.restore(self._slot, self._checkout, rung=Rung.CLEAN, seals=True)
        self._slot = attrs.evolve(self._slot, seal=work.seal)

    async def _seal(self) -> None:
        self._slot = attrs.evolve(self._slot, seal=await self._workspace.seal(self._slot, self._checkout))

    async def _measure(self, step: str, work: Callable[[], Awaitable[object]]) -> None:
        before, started = self._count(), time.perf_counter()
        await work()
        self.figures.setdefault(step, []).append(time.perf_counter() - started)
        self.executions[step] = self._count() - before

    def _count(self) -> int:
        return self.host.exec_count if isinstance(self.host, SshHost) else 0


async def measure(server: sshd.Server, scratch: Path, *, rounds: int, delay_ms: float, files: int) -> dict[str, Any]:
    """Return medians in seconds and executions, by step and host."""
    url = await make_repository(scratch / "origin.git", files=files, directories=max(1, files // 20))
    async with AsyncExitStack() as stack:
        slow = await stack.enter_async_context(proxy(server.port, delay_seconds=delay_ms / 2000))
        hosts: dict[str, Host] = {"local": LocalHost(sessions_directory=f"{scratch}/sessions")}
        for name, config in {"ssh": server.config, f"ssh +{delay_ms:g} ms": server.config_for(slow.port)}.items():
            options = SshOptions(config=(str(config),))
            host = SshHost("box", options=options, sessions_directory=f"{scratch}/sessions")
            hosts[name] = await stack.enter_async_context(host)
        benches = [Bench(name, host, scratch / str(index), url) for index, (name, host) in enumerate(hosts.items())]
        for bench in benches:
            await bench.open()
            stack.push_async_callback(bench.close)
        for _ in range(rounds):
            for bench in benches:
                await bench.round()
    return {
        bench.name: {
            step: {"median_seconds": statistics.median(values), "executions": bench.executions[step]}
            for step, values in bench.figures.items()
        }
        for bench in benches
    }


def main() -> None:
    """Run the benchmark and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--delay-ms", type=float, default=40.0)
    parser.add_argument("--files", type=int, default=2000)
    arguments = parser.parse_args()
    with scratch("repopool-remote-") as directory, ExitStack() as stack:
        keys_directory = Path(directory, "keys")
        keys_directory.mkdir()
        serve = sshd.openssh_server if Path(sshd.SSHD).exists() else sshd.asyncssh_server
        server = stack.enter_context(serve(sshd.Keys.make(keys_directory)))
        found = asyncio.run(
            measure(
                server,
                Path(directory),
                rounds=arguments.rounds,
                delay_ms=arguments.delay_ms,
                files=arguments.files,
            )
        )
    for name, steps in found.items():
        shown = {
            step: f"{figure['median_seconds'] * 1000:7.1f} ms  {figure['executions']:3d} executions"
            for step, figure in steps.items()
        }
        print_table(name, shown)
    write_json("remote", {"server": serve.__name__, "files": arguments.files, "hosts": found})


if __name__ == "__main__":
    main()
