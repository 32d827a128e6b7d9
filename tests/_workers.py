"""Pools without repositories to coordinate, and real processes that compete for them.

A worker is `python -m tests._workers <what> <arguments>`: it says a word a line on its standard output, is told to go
on by a line on its standard input, and ends when that is closed.
"""

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from repopool_async._clock import now
from repopool_async._identity import boot_id
from repopool_async.coordination.base import Coordinator, Hold
from repopool_async.coordination.files import FileCoordinator
from repopool_async.coordination.postgres import PostgresCoordinator
from repopool_async.lock_manager import LockManager
from repopool_async.models import Pool, Seal, Slot, SlotState, make_slot_id
from repopool_async.slot_allocator import available
from repopool_async.slot_store import SlotStore

ROOT = Path(__file__).parents[1]
REPO = "web"
COMMIT = "a" * 40


def make_seal(commit: str = COMMIT, branch: str | None = "main") -> Seal:
    return Seal(
        commit=commit,
        branch=branch,
        refs_generation="1",
        boot_id=boot_id(),
        mark_ns=1,
        settled_ns=1,
        clock_offset_ns=2,
        tree_device=3,
        tree_inode=4,
    )


def make_slot(store: SlotStore, number: int, repo_name: str = REPO) -> Slot:
    slot_id = make_slot_id(repo_name, number)
    return Slot(
        slot_id=slot_id, repo_name=repo_name, repo_url="u", path=str(store.tree_path(slot_id)), created_at=now()
    )


def make_coordinator(directory: Path, **options: Callable[..., object]) -> FileCoordinator:
    store = SlotStore(directory)
    return FileCoordinator(store, LockManager(store.locks_directory), **options)  # type: ignore[arg-type]


async def make_pool(directory: Path, num_slots: int) -> list[str]:
    """Make a pool of AVAILABLE slots and return their ids."""
    store = SlotStore(directory)
    await store.save_pool(Pool(repo_name=REPO, repo_url="u", num_slots=num_slots, created_at=now()))
    coordinator = make_coordinator(directory)
    return [(await add_slot(coordinator, store)).slot_id for _ in range(num_slots)]


async def add_slot(coordinator: FileCoordinator, store: SlotStore) -> Slot:
    slot = make_slot(store, await coordinator.next_slot_number(REPO))
    return await settle(coordinator, await coordinator.create(slot))


async def settle(coordinator: Coordinator, hold: Hold) -> Slot:
    """Make a held slot AVAILABLE, as a cleaner would."""
    return await coordinator.finish(hold, available(hold.slot, make_seal(), now()))


async def cancel_at(turns: int, times: int, task: "asyncio.Task[Any]") -> Any:
    """Cancel a task after so many turns of the loop, so often, and return what it returned or None."""
    for _ in range(turns):
        await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    try:
        return await task
    except asyncio.CancelledError:
        return None


# Processes


@attrs.define
class Worker:
    process: "subprocess.Popen[str]"

    def expect(self, word: str) -> str:
        """Wait for a line that begins with a word, and return the rest of it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(word), (line, self.process.poll())
        return line.removeprefix(word).strip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> int:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        return self.process.wait(30)


@contextmanager
def worker(what: str, *arguments: object) -> Iterator[Worker]:
    started = start(what, *arguments)
    try:
        yield started
    finally:
        started.kill()
        for stream in (started.process.stdin, started.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


def start(what: str, *arguments: object) -> Worker:
    return Worker(
        subprocess.Popen(
            [sys.executable, "-m", "tests._workers", what, *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def wait_for_word() -> bool:
    """Return whether a line came, False at the end."""
    return bool(sys.stdin.readline())


def hold_lock(locks: str, slot_id: str) -> None:
    held = LockManager(locks).try_acquire_sync(slot_id)
    say("held" if held else "busy")
    if wait_for_word() and held:
        held.release_sync()
        say("released")
        wait_for_word()


def fork_with_lock(locks: str, slot_id: str) -> None:
    """Hold a lock, and have a forked child that outlives us without meaning to."""
    manager = LockManager(locks)
    held = manager.try_acquire_sync(slot_id)
    assert held
    child = os.fork()
    if child == 0:
        say("child", os.getpid(), held.is_held)
        held.release_sync()  # must not unlock the parent's
        del held
        say("dropped")
        _sleep_for_ever()
    say("parent", held.is_held, held.is_current())
    wait_for_word()


def fork_with_record_lock(locks: str, slot_id: str) -> None:
    """Fork while another thread is in the middle of a read-modify-write."""
    manager = LockManager(locks)
    is_inside, may_leave = threading.Event(), threading.Event()

    def change() -> None:
        with manager.record_lock_sync(slot_id):
            is_inside.set()
            may_leave.wait()

    thread = threading.Thread(target=change)
    thread.start()
    is_inside.wait()
    if os.fork() == 0:
        say("child", os.getpid())
        _sleep_for_ever()
    wait_for_word()
    may_leave.set()
    thread.join()
    say("left")
    wait_for_word()


def _sleep_for_ever() -> None:
    while True:
        time.sleep(3600)


def lease_and_wait(directory: str, detached_ttl: str) -> None:
    async def run() -> None:
        coordinator = make_coordinator(Path(directory))
        ttl = float(detached_ttl) or None
        grant = await coordinator.claim(REPO, commit=COMMIT, branch="main", lease_id="theirs", detached_ttl=ttl)
        assert grant
        if ttl is not None:
            await coordinator.detach(grant)
        say("leased", grant.slot.slot_id, grant.token)
        await asyncio.to_thread(wait_for_word)

    asyncio.run(run())


def lease_in_database(dsn: str, ttl: str) -> None:
    async def run() -> None:
        async with PostgresCoordinator(dsn, ttl=float(ttl)) as coordinator:
            grant = await coordinator.claim(REPO, commit=COMMIT, branch="main", lease_id="theirs")
            assert grant
            say("leased", grant.slot.slot_id, grant.token)
            await asyncio.to_thread(wait_for_word)

    asyncio.run(run())


def queue_and_lease(directory: str, count: str) -> None:
    """Lease a slot so many times, in turn with other processes, and say each time."""

    async def run() -> None:
        coordinator = make_coordinator(Path(directory))
        say("ready")
        await asyncio.to_thread(wait_for_word)
        for index in range(int(count)):
            async with coordinator.ticket(REPO) as ticket:
                while True:
                    grant = None
                    if await ticket.is_first():
                        grant = await coordinator.claim(
                            REPO, commit=COMMIT, branch="main", lease_id=f"{os.getpid()}-{index}"
                        )
                    if grant is not None:
                        break
                    await asyncio.sleep(0.001)
            say("leased", os.getpid(), index)
            await coordinator.begin_return(grant)
            await settle(coordinator, grant)

    asyncio.run(run())


def compete(directory: str, seed: str) -> None:
    """Lease, use, return and recover slots until told to stop; say so where somebody else is in the same slot."""

    async def run() -> None:
        chance = random.Random(seed)
        coordinator = make_coordinator(Path(directory))
        stop = asyncio.create_task(asyncio.to_thread(wait_for_word))
        say("ready")
        while not stop.done():
            await asyncio.gather(*(_compete_once(coordinator, Path(directory), chance) for _ in range(2)))
            await asyncio.sleep(chance.random() * 0.002)

    asyncio.run(run())


async def _compete_once(coordinator: FileCoordinator, directory: Path, chance: random.Random) -> None:
    grant = await coordinator.claim(REPO, commit=None, branch=None, lease_id=f"{os.getpid()}-{chance.random()}")
    if grant is not None:
        with alone_in(directory, grant.slot):
            await asyncio.sleep(chance.random() * 0.005)
            await coordinator.begin_return(grant)
        await settle(coordinator, grant)
    for orphan in await coordinator.orphans(REPO):
        hold = await coordinator.recover_orphan(orphan.slot_id)
        if hold is not None:
            with alone_in(directory, hold.slot):
                await asyncio.sleep(chance.random() * 0.002)
            await settle(coordinator, hold)


@contextmanager
def alone_in(directory: Path, slot: Slot) -> Iterator[None]:
    """Leave a witness in a slot for the block; one that a living process left is the end of all exclusion."""
    witness = directory / f"witness-{slot.slot_id}"
    with suppress(FileNotFoundError):
        pid = int(witness.read_text() or "0")
        if pid and Path(f"/proc/{pid}").exists() and _is_running(pid):
            _accuse(directory, f"{slot.slot_id}: {os.getpid()} met {pid}, token {slot.token}")
        witness.unlink()
    try:
        descriptor = os.open(witness, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        _accuse(directory, f"{slot.slot_id}: {os.getpid()} was not alone, token {slot.token}")
        raise
    os.write(descriptor, str(os.getpid()).encode())
    os.close(descriptor)
    yield
    witness.unlink()


def _is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat[stat.rfind(")") + 2] not in "ZX"


def _accuse(directory: Path, text: str) -> None:
    with (directory / "accusations").open("a") as file:
        file.write(text + "\n")


def slots_in(directory: Path, state: SlotState) -> int:
    return sum(slot.state is state for slot in SlotStore(directory).list_slots_sync(REPO))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
