"""Processes that lease slots of a real pool, for tests that kill them; run as `python -m tests._lessees WHAT ...`."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repopool_async import LeaseLostError, PoolConfig, PoolManager, SlotInUseError
from tests._workers import Worker, say, wait_for_word

ROOT = Path(__file__).parents[1]


@contextmanager
def lessee(what: str, *arguments: object) -> Iterator[Worker]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests._lessees", what, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    started = Worker(process)
    try:
        yield started
    finally:
        started.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def manager_of(directory: str) -> PoolManager:
    return PoolManager(PoolConfig(workspaces_dir=directory, janitor_interval=3600))


async def work(directory: str, script: str) -> None:
    """Lease a slot, run a shell script in it, say so, and stay until told to give it back."""
    async with manager_of(directory) as manager:
        slot = await manager.allocate_slot("web", {"who": "the lessee"}, timeout=30)
        assert slot is not None
        await slot.run("sh", "-ec", script)
        say("working", slot.slot_id, slot.lease_id, slot.path)
        await asyncio.to_thread(wait_for_word)
        await manager.release_slot(slot)
        say("returned")


async def detach(directory: str, ttl: str) -> None:
    """Take a detached lease, leave a file there, tell id and token, and stay or end without giving it back."""
    async with manager_of(directory) as manager:
        slot = await manager.allocate_slot("web", timeout=30, detached=True, ttl=float(ttl))
        assert slot is not None
        (slot.path / "from-the-lessee").write_text("work")
        say("detached", slot.slot_id, slot.token)
        while await asyncio.to_thread(wait_for_word):
            say("lost" if slot.lost.is_set() else "held")


async def release(directory: str, slot_id: str, token: str) -> None:
    """Try to release somebody's lease, and say what came of it."""
    async with manager_of(directory) as manager:
        try:
            await manager.release_slot(slot_id, token=int(token) or None)
        except LeaseLostError:
            say("lost")
        except SlotInUseError:
            say("refused")
        else:
            say("released")
        await asyncio.to_thread(wait_for_word)


async def renew(directory: str, slot_id: str, token: str, ttl: str) -> None:
    """Try to renew somebody's lease, and say what came of it."""
    async with manager_of(directory) as manager:
        try:
            lease = await manager.renew_slot(slot_id, int(token), float(ttl))
        except LeaseLostError:
            say("lost")
        else:
            say("renewed", lease.lease_id)
        await asyncio.to_thread(wait_for_word)


if __name__ == "__main__":
    asyncio.run(globals()[sys.argv[1]](*sys.argv[2:]))
