"""One pool over two machines: slots are spread, leases go where there is room, one machine fails and comes back.

    python examples/fleet.py [URL [ALIAS:DIRECTORY ALIAS:DIRECTORY]]

Without a URL it uses the repository that this file lies in. Without machines, two directories of this one stand in for
them; ALIAS is a name of your ssh_config (or user@host:port), DIRECTORY an absolute path there. Nothing but git and a
POSIX shell is needed on a machine. Nothing is left afterwards.

Where REPOPOOL_DSN names a PostgreSQL database (after `repopool db migrate`) there are two managers that share the pool
through it, as two machines would that run one each; otherwise one does everything.
"""

import asyncio
import os
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from repopool_async import Coordination, LeasedSlot, PoolConfig, PoolManager


def machines(given: list[str], directory: str) -> dict[str, tuple[str, str]]:
    """Return names, addresses and directories of two hosts: those given, or two directories of this machine."""
    if not given:
        return {name: ("local", f"{directory}/{name}") for name in ("first", "second")}
    pairs = [text.partition(":/") for text in given]
    return {f"machine{number}": (alias, f"/{path}") for number, (alias, _, path) in enumerate(pairs)}


async def work(slot: LeasedSlot) -> None:
    """Do something in a slot, wherever it is."""
    done = await slot.run("git", "log", "-1", "--format=%h %s")
    print(f"{slot.slot_id} on {slot.host_id}: {done.text.strip()}")


async def show(manager: PoolManager) -> None:
    """Print every host on a line."""
    for host in await manager.list_hosts():
        print(f"  {host.host_id}: {host.condition}, {host.available} of {host.total_slots} slots available")


async def lease_everywhere(manager: PoolManager, other: PoolManager) -> None:
    """Hold one slot on each machine at once."""
    async with manager.lease("example", timeout=120) as one, other.lease("example", timeout=120) as two:
        await asyncio.gather(work(one), work(two))


async def main(url: str, given: list[str], dsn: str | None) -> None:
    """Make the pool, use it, park a machine, go on with the other."""
    coordination = None if dsn is None else Coordination(dsn=dsn)
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="repopool-example-"))
        config = PoolConfig(f"{directory}/manager", coordination=coordination)
        manager = await stack.enter_async_context(PoolManager(config))
        hosts = machines(given, directory)
        names = list(hosts)
        for name, (address, path) in hosts.items():
            await manager.add_host(name, address, workspaces_dir=path)
        other = manager
        if dsn is not None:
            config = PoolConfig(f"{directory}/other", coordination=coordination)
            other = await stack.enter_async_context(PoolManager(config))
        await manager.create_pool("example", url, num_slots=4, hosts=names)
        await lease_everywhere(manager, other)
        await manager.wait_clean()
        await other.wait_clean()
        await show(other)

        await manager.park_host(names[0], "pulling its plug")
        await show(other)  # which sees it too
        async with other.lease("example", timeout=120) as slot:
            await work(slot)
            assert slot.host_id == names[1]

        await other.resume_host(names[0])
        await manager.recover()
        await show(manager)
        await manager.delete_pool("example")
        for name in names:
            await manager.remove_host(name)


if __name__ == "__main__":
    asyncio.run(
        main(
            sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parents[1]),
            sys.argv[2:],
            os.environ.get("REPOPOOL_DSN"),
        )
    )
