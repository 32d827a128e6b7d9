"""`repopool doctor`: what is wrong with the machine and the workspaces directory, and with `--fix` what became of it.

Without `--fix` it reads and changes nothing, like `status`. With it the janitor runs once, and then everything is
looked at again: the exit status says whether anything is still wrong.
"""

import resource
from argparse import Namespace
from collections.abc import AsyncIterator, Mapping
from typing import Final

import attrs

from repopool_async._aio import in_thread
from repopool_async._clock import now
from repopool_async._git import check_git_version
from repopool_async._mounts import file_system_type
from repopool_async.cli import _status
from repopool_async.cli._common import configuration, on_one_line, only
from repopool_async.cli._signals import Handler, Interruption
from repopool_async.common_state import CommonState
from repopool_async.config import PoolConfig, PoolOptions
from repopool_async.exceptions import CoordinatorUnavailableError, PoolManagerError
from repopool_async.hosts.local import LocalHost
from repopool_async.housekeeping import left_overs, total_size
from repopool_async.lock_manager import LockManager
from repopool_async.mirror import MIRROR_LOCKS
from repopool_async.models import SlotState
from repopool_async.pool_manager import PoolManager
from repopool_async.pool_registry import name_lock
from repopool_async.salvage import SALVAGE_LOCKS
from repopool_async.store_layout import StoreLayout

STILL_WRONG: Final = 1

_FEW_FILES: Final = 1024


@attrs.frozen
class Finding:
    """One line of the report."""

    text: str
    is_wrong: bool = False

    def __str__(self) -> str:
        return f"{'WRONG' if self.is_wrong else 'ok   '}  {on_one_line(self.text)}"


async def doctor(arguments: Namespace, _: Interruption) -> int:
    """Print what is found, mend it where asked, and return 1 where something is (still) wrong."""
    config = configuration(arguments)
    findings = [finding async for finding in _examine(config)]
    if arguments.fix and any(finding.is_wrong for finding in findings):
        await _fix(config)
        findings = [finding async for finding in _examine(config)]
    for finding in findings:
        print(finding)
    wrong = sum(finding.is_wrong for finding in findings)
    if wrong and not arguments.fix:
        print(f"{wrong} wrong; `repopool doctor --fix` mends what can be mended")
    elif wrong:
        print(f"{wrong} still wrong")
    return STILL_WRONG if wrong else 0


async def _fix(config: PoolConfig) -> None:
    async with PoolManager(only(config, None)) as manager:
        report = await manager.recover()
    for name, values in report.fields().items():
        for value in values if name != "over_limit" else ():
            print(f"fixed  {name.replace('_', ' ')}: {on_one_line(str(value))}")


async def _examine(config: PoolConfig) -> AsyncIterator[Finding]:
    async for finding in _examine_machine(config):
        yield finding
    try:
        async with _status.opened(config) as state:
            if state.admission.is_shared:
                yield Finding(f"database {state.where}")
            async for finding in _examine_pools(state, StoreLayout(config.workspaces_dir)):
                yield finding
    except CoordinatorUnavailableError as error:
        yield Finding(str(error), is_wrong=True)


async def _examine_pools(state: CommonState, layout: StoreLayout) -> AsyncIterator[Finding]:
    for name in await state.records.list_pools():
        try:
            async for finding in _examine_pool(state, layout, name):
                yield finding
        except CoordinatorUnavailableError:
            raise
        except PoolManagerError as error:
            yield Finding(str(error), is_wrong=True)
    if not isinstance(state.locks, LockManager):
        return  # in a database a lock ends with its holder
    for stale in await state.locks.detect_stale_locks():
        if stale.slot_id.startswith((MIRROR_LOCKS, SALVAGE_LOCKS)):
            continue  # the next holder sees it and clears up
        who = f"pid {stale.owner.pid} on {stale.owner.host}" if stale.owner else "somebody"
        yield Finding(f"{stale.slot_id}: its lock was left by {who}, who is dead", is_wrong=True)


async def _examine_machine(config: PoolConfig) -> AsyncIterator[Finding]:
    try:
        version = await check_git_version(LocalHost())
        yield Finding(f"git {'.'.join(map(str, version))}")
    except (PoolManagerError, OSError) as error:
        yield Finding(f"git: {error}", is_wrong=True)
    directory = str(config.workspaces_dir)
    kind = await in_thread(file_system_type, directory) or "unknown"
    is_network = await LocalHost().is_network_file_system(directory)
    yield Finding(
        f"{directory}: file system {kind}{', a network file system' if is_network else ''}",
        is_wrong=is_network and not config.allow_network_filesystem,
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    is_unlimited = hard == resource.RLIM_INFINITY
    shown = "unlimited" if is_unlimited else str(hard)
    yield Finding(f"open files: at most {shown}", is_wrong=not is_unlimited and hard < _FEW_FILES)
    yield Finding(f"git commands at once: at most {config.git_process_limit}")


async def _examine_pool(state: CommonState, layout: StoreLayout, name: str) -> AsyncIterator[Finding]:
    (view,) = await _status.look(state, name)
    options = PoolOptions.from_mapping(view.pool.options)
    busy = view.count(SlotState.ALLOCATED)
    drained = ", drained (removed from the configuration)" if view.pool.is_drained else ""
    yield Finding(f"{name}: {len(view.slots)} slots, {busy} leased{drained}")
    if not (view.pool.is_complete or view.pool.is_drained or await state.locks.is_locked(name_lock(name))):
        have = f"has {len(view.slots)} of {view.pool.num_slots} slots"
        yield Finding(f"{name}: {have}, and whoever was making the others died or could not", is_wrong=True)
    for one in view.slots:
        slot = one.slot
        if one.is_orphaned:
            yield Finding(f"{slot.slot_id}: {slot.state}, but whoever had it is dead", is_wrong=True)
        elif slot.state is SlotState.ERROR:
            yield Finding(f"{slot.slot_id}: quarantined: {slot.error}", is_wrong=True)
        elif one.lease is not None:
            hours = (now() - one.lease.acquired_at).total_seconds() / 3600
            if hours >= options.stale_lock_hours:
                who = f"pid {one.lease.owner.pid} on {one.lease.owner.host}"
                yield Finding(f"{slot.slot_id}: leased for {hours:.1f} hours by {who}", is_wrong=True)
    for left_over in await in_thread(left_overs, layout.workspaces_directory, name):
        if left_over.lock_id is not None and await state.locks.is_locked(left_over.lock_id):
            continue  # somebody is making it
        days = left_over.age_seconds / 86400
        yield Finding(f"{left_over.path}: {left_over.kind}, abandoned {days:.1f} days ago", is_wrong=True)
    yield await _disk(layout, name, options.disk_limit)


async def _disk(layout: StoreLayout, name: str, limit: int | None) -> Finding:
    used = await in_thread(total_size, layout.pool_directory(name))
    trash = await in_thread(total_size, layout.trash_path(name))
    bound = f" of {_mib(limit)}" if limit is not None else ""
    is_over = limit is not None and used > limit
    return Finding(f"{name}: {_mib(used)}{bound} on disk, {_mib(trash)} of that trash", is_wrong=is_over)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


HANDLERS: Final[Mapping[str, Handler]] = {"doctor": doctor}
