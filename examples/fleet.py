"""One pool over two machines: slots are spread, leases go where there is room, one machine fails and comes back.

    python examples/fleet.py [URL [ALIAS:DIRECTORY ALIAS:DIRECTORY]]

Without a URL it uses the repository that this file lies in. Without machines, two directories of this one stand in for
them; ALIAS is a name of your ssh_config (or user@host:port), DIRECTORY an absolute path there. Nothing but git and a
POSIX shell is needed on a machine. Nothing is left afterwards.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from repopool_async import HostSpec, PoolConfig, PoolManager
from repopool_async.lease import LeasedSlot


def machines(given: list[str], directory: str) -> list[HostSpec]:
    """Return two hosts: those given, or two directories of this machine."""
    if not given:
        names = ("first", "second")
        return [HostSpec(name, address="local", workspaces_dir=f"{directory}/{name}") for name in names]
    pairs = [text.partition(":/") for text in given]
    return [
        HostSpec(f"machine{number}", address=alias, workspaces_dir=f"/{path}")
        for number, (alias, _, path) in enumerate(pairs)
    ]


async def work(slot: LeasedSlot) -> None:
    """Do something in a slot, wherever it is."""
    done = await slot.run("git", "log", "-1", "--format=%h %s")
    print(f"{slot.slot_id} on {slot.host_id}: {done.text.strip()}")


async def show(manager: PoolManager) -> None:
    """Print every host on a line."""
    for host in await manager.list_hosts():
        print(f"  {host.host_id}: {host.condition}, {host.available} of {host.total_slots} slots available")


async def lease_everywhere(manager: PoolManager) -> None:
    """Hold one slot on each machine at once."""
    async with manager.lease("example", timeout=120) as one, manager.lease("example", timeout=120) as other:
        await asyncio.gather(work(one), work(other))


async def main(url: str, given: list[str]) -> None:
    """Make the pool, use it, park a machine, go on with the other."""
    with tempfile.TemporaryDirectory(prefix="repopool-example-") as directory:
        hosts = machines(given, directory)
        names = [host.name for host in hosts]
        async with PoolManager(PoolConfig(f"{directory}/manager"), hosts=hosts) as manager:
            await manager.create_pool("example", url, num_slots=4, hosts=names)
            await lease_everywhere(manager)
            await manager.wait_clean()
            await show(manager)

            await manager.park_host(names[0], "pulling its plug")
            async with manager.lease("example", timeout=120) as slot:
                await work(slot)
                assert slot.host_id == names[1]

            await manager.resume_host(names[0])
            await manager.recover()
            await show(manager)
            await manager.delete_pool("example")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parents[1]), sys.argv[2:]))
