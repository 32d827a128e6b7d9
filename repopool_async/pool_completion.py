"""Finishes pools whose maker died before all their slots were there, in the background, a pool at a time each.

Which pools these are, and what completing one takes, is `pool_registry`'s business; when to look is the janitor's.
"""

import asyncio
from typing import Final

from repopool_async._aio import TaskSet
from repopool_async._clock import boottime
from repopool_async.assembly import Shared
from repopool_async.exceptions import PoolManagerError, SlotAllocationError, StoreError
from repopool_async.pool_registry import PoolRegistry
from repopool_async.repo_pool import RepoPool

_PAUSE_SECONDS: Final = (60.0, 3600.0)
"""The first and the longest pause between attempts at a pool that cannot be completed."""


class PoolCompletion:
    """Completes the pools of one manager."""

    def __init__(self, shared: Shared, registry: PoolRegistry) -> None:
        self._shared = shared
        self._registry = registry
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, tuple[int, float]] = {}
        self._tasks = TaskSet("complete-pools")

    async def begin(self, pool: RepoPool, is_asked: bool) -> bool:
        """Begin to make the slots that a pool lacks because whoever was making them died; return whether it does.

        Args:
            is_asked: at once, even where it failed a moment ago.
        """
        name = pool.name
        is_due = is_asked or boottime() >= self._failures.get(name, (0, 0.0))[1]
        if not is_due or not await self._is_unfinished(name) or name in self._running:
            return False
        self._running[name] = self._tasks.spawn(self._complete(pool), name=name)
        return True

    async def _is_unfinished(self, name: str) -> bool:
        try:
            return await self._registry.is_unfinished(name)
        except StoreError as error:  # one damaged pool must not keep the others waiting
            self._shared.bus.emit("pool.failed", {"repo_name": name, "error": str(error)})
            return False

    async def settled(self) -> None:
        """Wait until all that was begun is done, or has failed, of which an event tells."""
        while pending := [task for task in self._running.values() if not task.done()]:
            await asyncio.wait(pending)

    async def stop(self) -> None:
        """Interrupt all that was begun; nothing half made is left of it."""
        await self._tasks.cancel()
        self._running.clear()

    async def _complete(self, pool: RepoPool) -> None:
        try:
            with pool.keeper.making_slots():
                await self._registry.complete(pool)
        except SlotAllocationError as error:
            self._postpone(pool.name)
            self._shared.bus.emit("pool.short", {"repo_name": pool.name, "reason": str(error)})
        except (PoolManagerError, OSError) as error:
            self._postpone(pool.name)
            self._shared.bus.emit("pool.failed", {"repo_name": pool.name, "error": str(error)})
        else:
            self._failures.pop(pool.name, None)
        finally:
            self._running.pop(pool.name, None)

    def _postpone(self, name: str) -> None:
        tries, _ = self._failures.get(name, (0, 0.0))
        pause = min(_PAUSE_SECONDS[0] * 2**tries, _PAUSE_SECONDS[1])
        self._failures[name] = (tries + 1, boottime() + pause)
