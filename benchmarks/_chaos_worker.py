"""What the processes do that `benchmarks.chaos` kills: lease and work, return, add and remove slots, make pools.

Everything wrong that one of them sees is a line in a file beside the workspaces. A witness beside the tree proves
exclusion: it names its process and when that began, so one that a killed holder left accuses nobody.
"""

import asyncio
import json
import os
import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

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
SLOTS: Final = 3
"""How many slots the pool has at first; these are never removed."""
_MOST_SLOTS: Final = 6
_WHO: Final = ("-c", "user.name=chaos", "-c", "user.email=chaos@localhost")
REFS: Final = (None, "main", "feature", "first")


def config(root: Path, *, janitor_interval: float = 1.0) -> PoolConfig:
    """Return the configuration that every process of one run has."""
    return PoolConfig(workspaces_dir=root / "pools", janitor_interval=janitor_interval, close_timeout=60.0)


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
    """Use the pool until killed; the worker with index 0 also changes its size and makes and deletes another pool."""
    chance = random.Random(seed)

    async def run() -> None:
        async with PoolManager(config(root)) as manager:
            await manager.create_pool(POOL, url, num_slots=await _size(manager))
            while True:
                await _do_something(manager, root, url, index, chance)

    try:
        asyncio.run(run())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        accuse(root, "error", _told(error))


async def _size(manager: PoolManager) -> int:
    """Return how many slots there are: `create_pool` for fewer or more would change it back."""
    try:
        return max(SLOTS, len(await manager.list_slots(POOL)))
    except PoolNotFoundError:
        return SLOTS


async def _do_something(manager: PoolManager, root: Path, url: str, index: int, chance: random.Random) -> None:
    roll = chance.random()
    try:
        if index > 0 or roll < 0.6:
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
    """Lease a slot at some ref, look whether all is right, leave a mess, and give it back."""
    ref = chance.choice(REFS)
    async with manager.lease(POOL, ref=ref, timeout=60) as slot:
        with alone_in(root, slot):
            await look(root, slot)
            await _mess(root, slot, chance)
            await asyncio.sleep(chance.random() * 0.03)
            note_work(root, slot, has_ended=True)


async def _mess(root: Path, slot: LeasedSlot, chance: random.Random) -> None:
    (slot.path / "untracked/deep").mkdir(parents=True)
    (slot.path / "untracked/deep/file").write_text(slot.lease_id)
    (slot.path / "README").write_text(f"changed by {slot.lease_id}\n")
    if chance.random() < 0.4:
        await slot.run("git", *_WHO, "commit", "-q", "-a", "-m", slot.lease_id)
    note_work(root, slot, has_ended=False)
    if chance.random() < 0.2:
        async with slot.open_process("sleep", "1000"):
            await asyncio.sleep(chance.random() * 0.02)


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


def note_work(root: Path, slot: LeasedSlot, *, has_ended: bool) -> None:
    """Write down that a lease has work which nobody has pushed, or that its lessee is done with it."""
    line = json.dumps({"lease_id": slot.lease_id, "has_ended": has_ended}) + "\n"
    with (root / "work").open("a") as file:
        file.write(line)


def unsaved_work(root: Path, saved: set[str]) -> list[str]:
    """Return the leases that had work, died with it, and were not saved."""
    leases: dict[str, bool] = {}
    for line in _read(root / "work").splitlines():
        entry = json.loads(line)
        leases[entry["lease_id"]] = entry["has_ended"]
    return [lease_id for lease_id, has_ended in leases.items() if not has_ended and lease_id not in saved]


# Whether all is well again


async def all_available(manager: PoolManager, name: str, seconds: float) -> list[str]:
    """Wait until every slot of a pool is AVAILABLE; return those that are not in time, with what is known of them."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        slots = await manager.list_slots(name)
        others = [f"{slot.slot_id}: {slot.state} {slot.error}" for slot in slots if slot.state != SlotState.AVAILABLE]
        if not others or asyncio.get_running_loop().time() > deadline:
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
