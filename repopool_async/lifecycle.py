"""Opening and closing a manager: once each, in order, and whatever is under way ends with it.

new, opening, open, closing, closed; there is no way back. What opening and closing mean for one pool is the pool's
business.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Final

from repopool_async._aio import Deadline, Interruptions, shielded, together
from repopool_async.assembly import Shared
from repopool_async.config_reload import ConfigReload
from repopool_async.configured_pools import ConfiguredPools
from repopool_async.exceptions import CoordinatorUnavailableError, ManagerClosedError
from repopool_async.host_watch import HostWatch
from repopool_async.janitor import Janitor
from repopool_async.pool_completion import PoolCompletion
from repopool_async.pool_registry import PoolRegistry
from repopool_async.preflight import check_machine

_CLOSED_MEANWHILE: Final = "the PoolManager was closed meanwhile; open a new one"


class Lifecycle:
    """The life of one manager.

    Attributes:
        state: for people.
    """

    def __init__(
        self,
        shared: Shared,
        registry: PoolRegistry,
        configured: ConfiguredPools,
        reloading: ConfigReload,
        *,
        janitor: Janitor,
        completion: PoolCompletion,
        watch: HostWatch,
    ) -> None:
        self.state = "new"
        self._shared = shared
        self._registry = registry
        self._configured = configured
        self._reloading = reloading
        self._janitor = janitor
        self._completion = completion
        self._watch = watch
        self._transition = asyncio.Lock()
        self._interruptions = Interruptions()

    def require_open(self) -> None:
        """Raise `ManagerClosedError` where the manager is not in use, or not any more."""
        if self.state not in ("open", "opening"):
            raise ManagerClosedError(f"the PoolManager is {self.state}; use it inside `async with PoolManager(...)`")

    def ending_with_it(self) -> AbstractAsyncContextManager[None]:
        """End the block with `ManagerClosedError` when the manager is closed meanwhile, before `close` returns."""
        self.require_open()
        return self._interruptions.allowed(None, ManagerClosedError(_CLOSED_MEANWHILE))

    async def open(self) -> None:
        """See `PoolManager.open`."""
        if self.state != "new":
            raise ManagerClosedError("this PoolManager was opened before; make a new one")
        self.state = "opening"
        self._shared.bus.open()
        async with self._transition:  # free, or somebody would have changed the state
            await self._open()

    async def _open(self) -> None:
        try:
            await check_machine(self._shared.own.host, self._shared.config, self._shared.state.directories)
            await self._shared.hosts.refuse_anothers()
            await self._shared.state.open()
            await self._shared.hosts.refresh()
            await self._registry.adopt_all()
            await self._shared.hosts.own_settled()
            await self._janitor.start()
        except BaseException:
            await shielded(self._end_pools(Deadline.after(0)), name="close-now")
            self.state = "closed"
            self._shared.bus.close()
            raise
        self.state = "open"
        self._watch.start()
        self._configured.start()
        self._reloading.start()

    async def close(self, grace: float | None) -> None:
        """See `PoolManager.close`."""
        if self.state == "new":
            self.state = "closed"
        async with self._transition:
            if self.state == "open":
                await self._close(Deadline.after(grace))

    async def _close(self, deadline: Deadline) -> None:
        self.state = "closing"
        self._reloading.refuse()
        for pool in self._registry:
            pool.refuse()
        try:
            await self._end_pools(deadline)
        except BaseException:
            await shielded(self._end_pools(Deadline.after(0)), name="close-now")
            raise
        finally:
            self.state = "closed"
            self._shared.bus.close()

    async def _end_pools(self, deadline: Deadline) -> None:
        await self._interruptions.interrupt()
        await self._reloading.stop()
        await self._configured.stop()
        await self._janitor.stop()
        await self._completion.stop()
        await self._watch.stop()
        async with self._hurrying_after(deadline):
            await together(*[lambda pool=pool: pool.close(deadline) for pool in self._registry])
            await self._shared.hosts.aclose()
            with suppress(TimeoutError, CoordinatorUnavailableError):
                async with deadline.limit():
                    await self._janitor.empty_trash()
            await self._shared.state.close()

    @asynccontextmanager
    async def _hurrying_after(self, deadline: Deadline) -> AsyncIterator[None]:
        """Have the coordinator, where it does not answer, hold up nobody once the time is over."""
        remaining = deadline.remaining()
        timer = None
        if remaining is not None:
            timer = asyncio.get_running_loop().call_later(remaining, self._shared.coordinator.hurry)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
