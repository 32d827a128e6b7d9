"""What the processes do that `benchmarks.chaos` kills: lease, work, return, add and remove slots, make pools, reload.

Everything wrong that one of them sees is a line in a file beside the workspaces. A witness beside the tree proves
exclusion: it names its process and when that began, so one that a killed holder left accuses nobody.
"""

import asyncio
import json
import os
import random
import traceback
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from benchmarks._chaos_work import end_work, make_work
from repopool_async import (
    LeasedSlot,
    PoolConfig,
    PoolExistsError,
    PoolInUseError,
    PoolManager,
    PoolNotFoundError,
    PoolTimeoutError,
    SlotInUseError,
    SlotNotFoundError,
    SlotState,
)
from repopool_async._identity import process_start_time

POOL: Final = "chaos"
OTHER: Final = "other"
"""A pool that is made and deleted."""
FILED: Final = "filed"
"""A pool that a configuration file describes, which is edited and reloaded; it saves the work of every lease."""
SLOTS: Final = 3
"""How many slots the pool has at first; these are never removed."""
_MOST_SLOTS: Final = 6
REFS: Final = (None, "main", "feature", "first")


def config(root: Path, *, janitor_interval: float = 1.0) -> PoolConfig:
    """Return the configuration that every process of one run has."""
    return PoolConfig(workspaces_dir=root / "pools", janitor_interval=janitor_interval, close_timeout=60.0)


def write_config(
    root: Path, url: str, num_slots: int, *, lock_timeout: int = 30, janitor_interval: float = 1.0
) -> Path:
    """Write the configuration file of the pool `filed`, as editors do, and return its path."""
    path = root / "pools.yaml"
    new = path.with_name(f"pools.yaml.{os.getpid()}")
    new.write_text(
        f"workspaces_dir: {root}/pools\njanitor_interval: {janitor_interval}\nclose_timeout: 60\nwatch: never\n"
        f"pools:\n  {FILED}: {{repo_url: '{url}', num_slots: {num_slots}, salvage: always, "
        f"lock_timeout: {lock_timeout}}}\n"
    )
    new.replace(path)
    return path


def accuse(root: Path, kind: str, text: str) -> None:
    """Write down something that must never be: a `double holder`, something `half made`, an `error`."""
    line = json.dumps({"kind": kind, "pid": os.getpid(), "text": text}) + "\n"
    with (root / "accusations").open("a") as file:
        file.write(line)


def _told(error: BaseException) -> str:
    frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')} {' '.join(frames)}"


# A worker


def work_for_ever(root: Path, url: str, index: int, seed: int) -> None:
    """Use the pools until killed.

    Besides, worker 0 grows and shrinks one and makes and deletes another, and worker 1 edits and reloads the
    configuration of the third.
    """
    chance = random.Random(seed)

    async def run() -> None:
        async with _manager(root, url, index, chance) as manager:
            await manager.create_pool(POOL, url, num_slots=await _size(manager))
            while True:
                work = _do_something(manager, root, url, index, chance)
                await (_cancel(root, work, chance) if chance.random() < 0.25 else work)

    try:
        asyncio.run(run())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        accuse(root, "error", _told(error))


async def _cancel(root: Path, work: Coroutine[Any, Any, None], chance: random.Random) -> None:
    """Begin something, and cancel it at a random moment, once or twice."""
    task = asyncio.get_running_loop().create_task(work)
    for _ in range(chance.choice((1, 2))):
        await asyncio.sleep(chance.random() * 0.1)
        task.cancel()
    await asyncio.wait([task], timeout=120)
    if not task.done():
        accuse(root, "error", f"hangs though it was cancelled: {task!r}")
    elif task.cancelled():
        with (root / "cancellations").open("a") as file:
            file.write(".")


def _manager(root: Path, url: str, index: int, chance: random.Random) -> PoolManager:
    if index == 1:
        return PoolManager.from_config_file(write_config(root, url, chance.randint(1, 3)))
    return PoolManager(config(root))


async def _size(manager: PoolManager) -> int:
    """Return how many slots there are: `create_pool` for fewer or more would change it back."""
    try:
        return max(SLOTS, len(await manager.list_slots(POOL)))
    except PoolNotFoundError:
        return SLOTS


async def _do_something(manager: PoolManager, root: Path, url: str, index: int, chance: random.Random) -> None:
    roll = chance.random()
    try:
        if index == 1 and roll < 0.3:
            await _reload(manager, root, url, chance)
        elif index > 0 or roll < 0.6:
            await lease_and_work(manager, root, chance)
        elif roll < 0.75:
            if len(await manager.list_slots(POOL)) < _MOST_SLOTS:
                await manager.add_slot(POOL)
        elif roll < 0.9:
            await _remove_one(manager)
        else:
            await _make_or_delete(manager, url)
    except PoolTimeoutError:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        accuse(root, "error", _told(error))


async def lease_and_work(manager: PoolManager, root: Path, chance: random.Random) -> None:
    """Lease a slot at some ref, look whether all is right, leave work and a process, and give it back."""
    name = FILED if chance.random() < 0.25 and FILED in await manager.list_pools() else POOL
    async with manager.lease(name, ref=chance.choice(REFS), timeout=60) as slot:
        with alone_in(root, slot):
            await look(root, slot)
            try:
                await make_work(root, slot, commits=chance.random() < 0.4)
                if chance.random() < 0.2:
                    async with slot.open_process("sleep", "1000"):
                        await asyncio.sleep(chance.random() * 0.02)
                await asyncio.sleep(chance.random() * 0.03)
            finally:
                end_work(root, slot)


async def _reload(manager: PoolManager, root: Path, url: str, chance: random.Random) -> None:
    write_config(root, url, chance.randint(1, 3), lock_timeout=chance.randint(20, 40))
    await manager.reload()
    await manager.wait_ready(60)


async def _remove_one(manager: PoolManager) -> None:
    removable = [slot.slot_id for slot in await manager.list_slots(POOL) if slot.number > SLOTS]
    if removable:
        with suppress(SlotInUseError, SlotNotFoundError):
            await manager.remove_slot(removable[-1])


async def _make_or_delete(manager: PoolManager, url: str) -> None:
    if OTHER in await manager.list_pools():
        with suppress(PoolInUseError, PoolNotFoundError):
            await manager.delete_pool(OTHER)
    else:
        with suppress(PoolExistsError):
            await manager.create_pool(OTHER, url, num_slots=2)


# What is right


async def look(root: Path, slot: LeasedSlot) -> None:
    """Accuse whoever handed out a slot that is not exactly the commit it claims to be."""
    serial = _read(slot.path / "SERIAL")
    files = {path.name for path in slot.path.iterdir()} - {".git"}
    wrong = [path.name for path in slot.path.glob("file-*") if _read(path) != serial * 20]
    status = (await slot.run("git", "status", "--porcelain=v2", "--branch", "--ignored", check=False)).text
    lines = [line for line in status.splitlines() if not line.startswith("# branch.")]
    if wrong or lines or not serial or f"# branch.oid {slot.commit}\n" not in status + "\n" or "README" not in files:
        accuse(root, "half made", f"{slot.slot_id} at {slot.commit}: {serial!r} {sorted(files)[:6]} {wrong} {status}")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


# Who is there


@contextmanager
def alone_in(root: Path, slot: LeasedSlot) -> Iterator[None]:
    """Leave a witness beside the tree for the block; a living process's that is there already is a second holder."""
    witness = slot.path.parent / "witness"
    mine = witness.with_name(f"witness-{os.getpid()}")
    mine.write_text(f"{os.getpid()} {process_start_time(os.getpid())}")
    try:
        try:
            os.link(mine, witness)  # as O_EXCL, but with its text from the first instant
        except FileExistsError:
            _accuse_living(root, slot, witness)
            with suppress(FileNotFoundError):
                witness.unlink()
            os.link(mine, witness)
        yield
    finally:
        for path in (witness, mine):
            with suppress(FileNotFoundError):
                path.unlink()


def _accuse_living(root: Path, slot: LeasedSlot, witness: Path) -> None:
    words = _read(witness).split()
    if len(words) == 2 and str(process_start_time(int(words[0]))) == words[1]:
        accuse(root, "double holder", f"{slot.slot_id}: {os.getpid()} met {words[0]}, token {slot.token}")


# Whether all is well again


async def all_available(manager: PoolManager, name: str, seconds: float, *, slots: int = 0) -> list[str]:
    """Wait until a pool has so many slots and every one is AVAILABLE; return those that are not in time, and why."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        found = await manager.list_slots(name)
        others = [f"{slot.slot_id}: {slot.state} {slot.error}" for slot in found if slot.state != SlotState.AVAILABLE]
        if (not others and len(found) >= slots) or asyncio.get_running_loop().time() > deadline:
            return others
        await asyncio.sleep(0.02)


async def lease_all(manager: PoolManager, root: Path, name: str) -> int:
    """Hold all slots of a pool at once and look at each; return how many there were."""
    slots = await manager.list_slots(name)
    ready = asyncio.Barrier(len(slots)) if slots else None

    async def one() -> None:
        async with manager.lease(name, timeout=60) as slot:
            with alone_in(root, slot):
                await look(root, slot)
                assert ready is not None
                await ready.wait()

    async with asyncio.TaskGroup() as group:
        for _ in slots:
            group.create_task(one())
    await manager.wait_clean()
    return len(slots)
