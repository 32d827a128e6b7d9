"""The verb `salvage`: what was saved of leases that ended badly, listed, shown and brought back into a clone."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Final

from repopool_async._codec import dumps
from repopool_async.cli._common import configuration, only
from repopool_async.cli._signals import Handler, Interruption
from repopool_async.models import SalvageRecord
from repopool_async.pool_manager import PoolManager


def _manager(arguments: Namespace) -> PoolManager:
    return PoolManager(only(configuration(arguments), getattr(arguments, "pool", None)))


async def salvage(arguments: Namespace, interruption: Interruption) -> int:
    """Do what the action says."""
    return await _ACTIONS[arguments.action](arguments, interruption)


async def _list(arguments: Namespace, _: Interruption) -> int:
    async with _manager(arguments) as manager:
        records = await manager.list_salvage(arguments.pool)
    for record in records:
        print(dumps(record).decode().rstrip() if arguments.json else _line(record))
    if not records and not arguments.json:
        print("nothing was saved")
    return 0


async def _show(arguments: Namespace, _: Interruption) -> int:
    async with _manager(arguments) as manager:
        record, changes = await manager.describe_salvage(arguments.salvage_id)
    facts = {
        "id": record.salvage_id,
        "slot": record.slot_id,
        "saved": f"{record.created_at:%Y-%m-%d %H:%M:%S} UTC, because its lease {record.reason}",
        "lessee": dict(record.metadata) or "",
        "base": record.base,
        "head": f"{record.head} {record.branch or '(detached)'}",
        "commits": record.commits,
        "size": f"{record.size_bytes} bytes",
    }
    lines = [f"{name:<9}{value}" for name, value in facts.items() if value != ""]
    lines += [f"branch   {commit} {name}" for name, commit in record.branches.items()]
    stashes = zip(record.stash_commits, record.stash_messages, strict=True)
    lines += [f"stash    {commit} {message}" for commit, message in stashes]
    lines += [f"skipped  {line}" for line in record.skipped]
    print(_printable("\n".join([*lines, *([changes] if changes else [])])))
    return 0


async def _restore(arguments: Namespace, _: Interruption) -> int:
    async with _manager(arguments) as manager:
        restored = await manager.restore_salvage_into(
            arguments.salvage_id, arguments.directory, branch=arguments.branch
        )
    for branch in restored.branches:
        print(_printable(branch))
    return 0


def _line(record: SalvageRecord) -> str:
    counts = {
        "commits": record.commits,
        "stashes": record.stashes,
        "changed": record.files_changed,
        "untracked": record.untracked,
        "skipped": len(record.skipped),
    }
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    where = record.branch or record.head[:12]
    return _printable(
        f"{record.salvage_id[:8]}  {record.created_at:%Y-%m-%d %H:%M}  {record.slot_id}  {record.reason:<8}  "
        f"{where}  {parts}"
    )


def _printable(text: str) -> str:
    """Return the text without what a lessee's file names could do to a terminal."""
    shown = text.encode(errors="backslashreplace").decode()
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in shown)


_ACTIONS: Final[Mapping[str, Handler]] = {"list": _list, "show": _show, "restore": _restore}
HANDLERS: Final[Mapping[str, Handler]] = {"salvage": salvage}
