"""`repopool run`: a lease around a command.

Standard streams are the command's: what is to be said of the pool goes to standard error, and only when asked for.
"""

import hashlib
import logging
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import anyio
import attrs

from repopool_async.cli._arguments import ExitStatus
from repopool_async.cli._common import configuration, only
from repopool_async.cli._signals import Handler, Interruption
from repopool_async.config_values import without_credentials
from repopool_async.exceptions import LeaseLostError
from repopool_async.hosts.base import HostProcess
from repopool_async.lease import LeasedSlot
from repopool_async.pool_manager import PoolManager
from repopool_async.repo_pool import RepoPool, Unset

_log: Final = logging.getLogger("repopool")

_NAME_LENGTH: Final = 64


async def run(arguments: Namespace, interruption: Interruption) -> int:
    """Lease a slot, run the command in it, give the slot back, wait until it is clean, return the command's status."""
    config = only(configuration(arguments), arguments.target)
    async with PoolManager(config) as manager:
        pool = await _find_pool(manager, arguments)
        timeout: float | Unset | None = getattr(arguments, "timeout", Unset.TIMEOUT)
        metadata = {"command": arguments.command}
        _log.info("waiting for a slot of %s", pool.name)
        async with pool.lease(
            ref=arguments.ref, timeout=timeout, new_branch=arguments.new_branch, metadata=metadata
        ) as slot:
            _log.info("leased %s at %s %s", slot.slot_id, slot.branch or "detached", slot.commit[:12])
            status = await _run_command(slot, arguments.command, interruption)
        _log.info("%s: the command ended with %d; cleaning", slot.slot_id, status)
    return status


async def _find_pool(manager: PoolManager, arguments: Namespace) -> RepoPool:
    """Return the pool of that name, else the one of that URL; made, grown and told not to fetch as asked."""
    target = arguments.target
    if target in manager.config.pools or target in await manager.list_pools() or not is_url(target):
        pool = await manager.get_pool(target)
    else:
        pool = await _pool_of_url(manager, normalised_url(target), arguments.slots)
    if arguments.slots is not None and arguments.slots > pool.record.num_slots:
        await manager.resize(pool.name, arguments.slots)
    if arguments.no_fetch:
        # Of this process only: nothing of it is stored.
        pool.reconfigure(pool.record, attrs.evolve(pool.options, fetch_on_allocate=False))
    return pool


async def _pool_of_url(manager: PoolManager, url: str, slots: int | None) -> RepoPool:
    name = pool_name(url)
    if name not in await manager.list_pools():
        _log.info("making the pool %s of %s", name, without_credentials(url))
        return await manager.create_pool(name, url, num_slots=slots)
    if url == without_credentials(url):
        return await manager.get_pool(name)
    # Credentials are never stored, so the pool must be told them again.
    stored = (await manager.get_pool(name)).options.changed()
    return await manager.create_pool(name, url, **stored)


def is_url(target: str) -> bool:
    """Return whether the argument can be a repository rather than a pool's name."""
    return "/" in target or ":" in target or target.startswith((".", "~")) or Path(target).is_dir()


def normalised_url(target: str) -> str:
    """Return the URL without trailing slashes, a local path absolute and without links."""
    if "://" in target or re.match(r"[^/]+:", target):
        return target.rstrip("/")
    return os.path.realpath(Path(target).expanduser())


def pool_name(url: str) -> str:
    """Return the name of a URL's pool: the last part of its path and a hash, the same for ever."""
    bare = without_credentials(url)
    last = re.split(r"[/:]", bare.rstrip("/"))[-1].removesuffix(".git")
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("._-")[:_NAME_LENGTH]
    digest = hashlib.sha256(bare.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{readable or 'repository'}-{digest}"


async def _run_command(slot: LeasedSlot, command: list[str], interruption: Interruption) -> int:
    async with AsyncExitStack() as stack:
        try:
            process = await stack.enter_async_context(slot.open_process(*command, inherit=True))
        except OSError as error:
            return _cannot_run(command[0], error)
        with interruption.forwarded_to(process):
            exit_code = await _wait(slot, process)
    return exit_code if exit_code >= 0 else 128 - exit_code


async def _wait(slot: LeasedSlot, process: HostProcess) -> int:
    """Return the exit code; a lease that is taken away ends the command."""
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            await slot.lost.wait()
            group.cancel_scope.cancel()

        group.start_soon(watch)
        exit_code = await process.wait()
        group.cancel_scope.cancel()
        return exit_code
    raise LeaseLostError(f"{slot.slot_id}: the lease was taken away; the command has been ended", slot_id=slot.slot_id)


def _cannot_run(name: str, error: OSError) -> int:
    is_missing = isinstance(error, FileNotFoundError)
    # Not through the logger: like a shell, it is said without -v.
    os.write(2, f"repopool: {name}: {'command not found' if is_missing else error.strerror}\n".encode())
    return ExitStatus.NOT_FOUND if is_missing else ExitStatus.NOT_EXECUTABLE


HANDLERS: Final[Mapping[str, Handler]] = {"run": run}
