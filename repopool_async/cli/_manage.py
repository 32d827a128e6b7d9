"""The verbs that change pools: thin wrappers over `PoolManager`, a line of output each."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Final

from repopool_async.cli._common import configuration, in_words, on_one_line, only
from repopool_async.cli._signals import Handler, Interruption
from repopool_async.models import AllocationRecord, CleanupResult
from repopool_async.pool_manager import PoolManager


def _manager(arguments: Namespace) -> PoolManager:
    return PoolManager(only(configuration(arguments), getattr(arguments, "pool", None)))


async def add(arguments: Namespace, _: Interruption) -> int:
    """Add a slot."""
    async with _manager(arguments) as manager:
        slot = await manager.add_slot(arguments.pool)
    print(slot.slot_id)
    return 0


async def remove(arguments: Namespace, _: Interruption) -> int:
    """Remove a slot."""
    async with _manager(arguments) as manager:
        await manager.remove_slot(arguments.slot_id)
    print(f"removed {arguments.slot_id}")
    return 0


async def delete(arguments: Namespace, _: Interruption) -> int:
    """Delete a pool."""
    async with PoolManager(only(configuration(arguments), None)) as manager:
        await manager.delete_pool(arguments.pool, force=arguments.force)
    print(f"deleted {arguments.pool}")
    return 0


async def repair(arguments: Namespace, _: Interruption) -> int:
    """Repair a slot."""
    async with _manager(arguments) as manager:
        result = await manager.repair_slot(arguments.slot_id)
    print(f"repaired {result.slot_id}: {'; '.join(result.steps)}")
    return 0


async def recover(arguments: Namespace, _: Interruption) -> int:
    """Recover what dead processes left."""
    async with _manager(arguments) as manager:
        recovered = await manager.recover()
    for slot_id in recovered:
        print(f"recovered {slot_id}")
    if not recovered:
        print("nothing to recover")
    return 0


async def log(arguments: Namespace, _: Interruption) -> int:
    """Print history and clean-up log of a slot as one story."""
    async with _manager(arguments) as manager:
        history = await manager.get_allocation_history(arguments.slot_id)
        cleanups = await manager.get_cleanup_log(arguments.slot_id)
    lines = [(record.at, _history_line(record)) for record in history]
    lines += [(result.started_at, _cleanup_line(result)) for result in cleanups]
    lines.sort(key=lambda line: line[0])
    for at, text in lines[-arguments.limit :] if arguments.limit else lines:
        print(f"{at:%Y-%m-%d %H:%M:%S}  {text}")
    return 0


def _history_line(record: AllocationRecord) -> str:
    where = " ".join(part for part in (record.ref or record.branch, (record.commit or "")[:12]) if part)
    parts = [
        f"{record.event:<10} {where or '-'}",
        f"lease {record.lease_id[:8]} by pid {record.owner.pid} on {record.owner.host}",
        *_seconds("waited", record.wait_seconds),
        *_seconds("held", record.held_seconds),
        *([in_words(record.metadata)] if record.metadata else []),
    ]
    return ", ".join(parts)


def _seconds(word: str, seconds: float | None) -> list[str]:
    return [] if seconds is None else [f"{word} {seconds:.3f} s"]


def _cleanup_line(result: CleanupResult) -> str:
    if not result.success:
        return f"{result.operation:<10} FAILED after {result.duration_seconds:.3f} s: {on_one_line(result.error or '')}"
    parts = [
        f"{result.operation:<10} {(result.commit or '-')[:12]}",
        f"{result.duration_seconds:.3f} s",
        f"removed {result.removed}",
        f"restored {result.restored}",
        *([f"repaired by {result.rung}"] if result.rung else []),
    ]
    return ", ".join(parts)


HANDLERS: Final[Mapping[str, Handler]] = {
    "add": add,
    "delete": delete,
    "log": log,
    "recover": recover,
    "remove": remove,
    "repair": repair,
}
