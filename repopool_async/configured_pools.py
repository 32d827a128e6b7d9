"""The pools that a configuration names: brought up in the background, one change of a pool after the other.

Making a pool is `pool_registry`'s business; what has changed in a file, and when, is `config_reload`'s.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from repopool_async._aio import TaskSet
from repopool_async.assembly import Shared
from repopool_async.exceptions import PoolManagerError
from repopool_async.pool_registry import PoolRegistry


class ConfiguredPools:
    """Makes the pools of the configuration in force be there.

    Attributes:
        is_exact: whether pools get exactly the slots that are configured, or at least as many.
    """

    def __init__(self, shared: Shared, registry: PoolRegistry) -> None:
        self._shared = shared
        self._registry = registry
        self.is_exact = False
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._changing: dict[str, asyncio.Task[None]] = {}
        self._tasks = TaskSet("configured-pools", on_error=lambda _name, _error: None)  # it has been told as an event

    def start(self) -> None:
        """Begin to bring up all of them."""
        for name in self._shared.config.pools:
            self._start(name, self._bring_up(name))

    async def stop(self) -> None:
        """Interrupt all that was begun."""
        await self._tasks.cancel()

    async def wait_ready(self) -> None:
        """Wait until all that was begun is done; raises the first pool's error."""
        for task in [*self._starting.values(), *self._changing.values()]:
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    async def settled(self, name: str) -> None:
        """Wait for a pool that is coming up; where it failed to, raise its error and try again in the background."""
        starting = self._starting.get(name)
        if starting is None:
            return
        await asyncio.wait([starting])
        is_wanted = name in self._shared.config.pools and self._registry.opened(name) is None
        if is_wanted and not starting.cancelled() and starting.exception() is not None:
            self._start(name, self._bring_up(name))
            starting.result()

    def add(self, name: str) -> None:
        """Bring up a pool that is new in the configuration, or there again."""
        if self._registry.opened(name) is not None:
            self.change(name)
        else:
            self._start(name, self._after(self._under_way(name), name, self._bring_up))

    def change(self, name: str) -> None:
        """Have a pool take on its options, after what is being done to it now."""
        self._change(name, self._bring_up, self._under_way(name))

    def remove(self, name: str) -> None:
        """Drain a pool that is gone from the configuration; what is being done to it now is interrupted."""
        pool = self._registry.opened(name)
        if pool is not None:
            pool.retire()
        under_way = self._under_way(name)
        for task in under_way:
            task.cancel()
        self._change(name, self._drain, under_way)

    def forget(self, name: str) -> None:
        """Take no more notice of what was begun for a pool, which has been deleted."""
        self._starting.pop(name, None)
        self._changing.pop(name, None)

    async def _bring_up(self, name: str) -> None:
        spec = self._shared.config.pools.get(name)
        if spec is None:
            return  # removed from the configuration meanwhile
        try:
            pool = await self._registry.create(name, spec.repo_url, spec.options, is_exact=self.is_exact)
            await pool.keeper.recover()  # opening did so for the pools that were there, not for those of the file
        except (PoolManagerError, OSError) as error:
            self._shared.bus.emit("pool.failed", {"repo_name": name, "error": str(error)})
            raise

    async def _drain(self, name: str) -> None:
        self._starting.pop(name, None)
        await self._registry.retire(name)

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._starting[name] = self._tasks.spawn(work, name=f"start-{name}")

    def _change(self, name: str, work: Callable[[str], Awaitable[None]], earlier: list[asyncio.Task[None]]) -> None:
        self._changing[name] = self._tasks.spawn(self._after(earlier, name, work), name=f"change-{name}")

    def _under_way(self, name: str) -> list[asyncio.Task[None]]:
        tasks = (self._changing.get(name), self._starting.get(name))
        return [task for task in tasks if task is not None and not task.done()]

    async def _after(
        self, earlier: list[asyncio.Task[None]], name: str, work: Callable[[str], Awaitable[None]]
    ) -> None:
        try:
            if earlier:
                await asyncio.wait(earlier)
        except asyncio.CancelledError:
            for task in earlier:
                task.cancel()
            await asyncio.wait(earlier)
            raise
        await work(name)
