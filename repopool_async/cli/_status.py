"""`repopool status`: what the records and locks say, as tables or JSON.

It reads and changes nothing: no pool is opened, no lock is taken, so it works beside any number of processes that hold
leases, and after one that died. Of pools in a database it shows those of all managers. The shape of the JSON is part of
the interface: keys are added, never changed.
"""

import importlib.util
import json
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final

import attrs

from repopool_async._clock import boottime
from repopool_async._identity import boot_id, host_name
from repopool_async.cli._common import configuration, in_words, on_one_line
from repopool_async.cli._signals import Handler, Interruption
from repopool_async.common_state import CommonState
from repopool_async.config import PoolConfig
from repopool_async.exceptions import PoolNotFoundError
from repopool_async.models import Lease, Pool, Slot, SlotState

JSON_VERSION: Final = 1

_HEADINGS: Final = ("SLOT", "STATE", "COMMIT", "BRANCH", "LEASES", "SECONDS", "HOLDER")


@attrs.frozen
class _SlotView:
    """A slot at this moment; `is_orphaned` says that its owner died and that the next process will recover it."""

    slot: Slot
    is_locked: bool
    is_orphaned: bool

    @property
    def lease(self) -> Lease | None:
        return self.slot.lease if self.slot.state is SlotState.ALLOCATED else None

    @property
    def standing(self) -> tuple[str | None, str | None]:
        """Commit and branch, of the lease or else of the seal."""
        source = self.lease or self.slot.seal
        return (source.commit, source.branch) if source is not None else (None, None)


@attrs.frozen
class _PoolView:
    pool: Pool
    slots: tuple[_SlotView, ...]

    def count(self, state: SlotState) -> int:
        return sum(view.slot.state is state for view in self.slots)


async def status(arguments: Namespace, _: Interruption) -> int:
    """Print the pools."""
    config = configuration(arguments)
    async with opened(config) as state:
        views = await look(state, arguments.pool)
    if arguments.json:
        print(json.dumps(_as_json(str(config.workspaces_dir), views), indent=2, ensure_ascii=False))
    elif not views:
        print(f"no pools in {state.where}")
    else:
        _print_tables(views)
    return 0


@asynccontextmanager
async def opened(config: PoolConfig) -> AsyncIterator[CommonState]:
    """Give for the block what a configuration's managers have in common; raises as `CommonState.open`."""
    state = CommonState.of(config)
    await state.open()
    try:
        yield state
    finally:
        await state.close()


async def look(state: CommonState, only: str | None) -> list[_PoolView]:
    """Return all pools, or the one that is named, as they are now; changes nothing."""
    names = await state.records.list_pools()
    if only is not None and only not in names:
        known = ", ".join(names) or "there are none"
        raise PoolNotFoundError(f"there is no pool {only!r} in {state.where} (pools: {known})", repo_name=only)
    return [await _look_at(state, name) for name in ([only] if only is not None else names)]


async def _look_at(state: CommonState, name: str) -> _PoolView:
    views = []
    slots = await state.coordinator.list_slots(name)
    taken = await state.coordinator.taken_among([slot.slot_id for slot in slots])
    for listed in slots:
        is_locked = listed.slot_id in taken
        is_doubtful = not is_locked and _is_unheld(listed)
        # Whether it is held was looked at after the record, so a slot given back in between would look orphaned.
        slot = await state.coordinator.get_slot(listed.slot_id) if is_doubtful else listed
        views.append(_SlotView(slot, is_locked, is_doubtful and _is_unheld(slot)))
    return _PoolView(await state.records.load_pool(name), tuple(views))


def _is_unheld(slot: Slot) -> bool:
    """Return whether a slot that should be held is not held by its record either."""
    lease = slot.lease
    if slot.state is SlotState.ALLOCATED and lease is not None and lease.is_detached:
        is_elsewhere = lease.owner.host != host_name()
        is_current = lease.owner.boot_id == boot_id() and boottime() < (lease.expires_boottime or float("inf"))
        return not (is_elsewhere or is_current)
    return slot.state in (SlotState.ALLOCATED, SlotState.CLEANING)


# As JSON ----------------------------------------------------------------------------------------------------------


def _as_json(directory: str, views: Sequence[_PoolView]) -> dict[str, Any]:
    return {"version": JSON_VERSION, "workspaces_dir": directory, "pools": [_pool_json(view) for view in views]}


def _pool_json(view: _PoolView) -> dict[str, Any]:
    return {
        "repo_name": view.pool.repo_name,
        "repo_url": view.pool.repo_url,
        "created_at": view.pool.created_at.isoformat(),
        "total_slots": len(view.slots),
        **{state.value: view.count(state) for state in SlotState},
        "allocation_count": sum(one.slot.allocation_count for one in view.slots),
        "total_allocated_seconds": sum(one.slot.total_allocated_seconds for one in view.slots),
        "slots": [_slot_json(one) for one in view.slots],
    }


def _slot_json(view: _SlotView) -> dict[str, Any]:
    slot = view.slot
    commit, branch = view.standing
    return {
        "slot_id": slot.slot_id,
        "state": slot.state.value,
        "is_locked": view.is_locked,
        "is_orphaned": view.is_orphaned,
        "host_id": slot.host_id,
        "path": slot.path,
        "commit": commit,
        "branch": branch,
        "error": slot.error,
        "created_at": slot.created_at.isoformat(),
        "last_used_at": slot.last_used_at.isoformat() if slot.last_used_at else None,
        "allocation_count": slot.allocation_count,
        "total_allocated_seconds": slot.total_allocated_seconds,
        "lease": _lease_json(view.lease),
    }


def _lease_json(lease: Lease | None) -> dict[str, Any] | None:
    if lease is None:
        return None
    return {
        "lease_id": lease.lease_id,
        "token": lease.token,
        "ref": lease.ref,
        "host": lease.owner.host,
        "pid": lease.owner.pid,
        "acquired_at": lease.acquired_at.isoformat(),
        "is_detached": lease.is_detached,
        "metadata": dict(lease.metadata),
    }


# As tables --------------------------------------------------------------------------------------------------------


def _print_tables(views: Sequence[_PoolView]) -> None:
    is_rich = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
    for number, view in enumerate(views):
        if number:
            print()
        counts = ", ".join(f"{view.count(state)} {state}" for state in SlotState if view.count(state))
        title = f"{view.pool.repo_name}  {view.pool.repo_url}  ({counts or 'no slots'})"
        rows = [_row(one) for one in view.slots]
        if is_rich:
            _print_rich(title, rows)
        else:
            _print_plain(title, rows)


def _row(view: _SlotView) -> tuple[str, ...]:
    slot = view.slot
    commit, branch = view.standing
    return (
        slot.slot_id,
        f"{slot.state}, owner died" if view.is_orphaned else str(slot.state),
        (commit or "-")[:12],
        branch or "-",
        str(slot.allocation_count),
        f"{slot.total_allocated_seconds:.1f}",
        _holder(view.lease) if view.lease is not None else on_one_line(slot.error or "-"),
    )


def _holder(lease: Lease) -> str:
    words = f"pid {lease.owner.pid} on {lease.owner.host} since {_local(lease.acquired_at)}"
    return f"{words} {in_words(lease.metadata)}".rstrip()


def _local(moment: datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def _print_plain(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    print(title)
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    for row in (_HEADINGS, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_rich(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    from rich.box import SIMPLE  # noqa: PLC0415 - optional, and slow to import
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    colours = {"available": "green", "allocated": "yellow", "cleaning": "cyan", "error": "red"}
    table = Table(*_HEADINGS, title=Text(title), title_justify="left", box=SIMPLE)
    for row in rows:
        # Text, not str: branch names and metadata are not markup.
        table.add_row(*(Text(cell, colours.get(cell.partition(",")[0], "")) for cell in row))
    Console().print(table)


HANDLERS: Final[Mapping[str, Handler]] = {"status": status}
