"""Watches the hosts of a manager: sees what others made of them, ends leases there, and asks silent ones again.

Of all processes one at a time asks, ever more seldom. Which condition means what is `host_registry`'s business.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from repopool_async._aio import TaskSet, together
from repopool_async._clock import boottime
from repopool_async.coordination.base import Coordinator
from repopool_async.exceptions import PoolManagerError
from repopool_async.host_registry import HostRegistry
from repopool_async.host_states import HostCondition
from repopool_async.lock_manager import LockManager
from repopool_async.repo_pool import RepoPool

_log: Final = logging.getLogger("repopool")

_LOOK_SECONDS: Final = 1.0
_ASK_SECONDS: Final = (1.0, 60.0)
"""The first and the longest pause between two questions to a host that does not answer."""
_BEAT_SECONDS: Final = 60.0
"""A fifth of what hosts' watchdogs wait for."""
_LOCK_ID: Final = "hosts-probe"


class HostWatch:
    """Watches the hosts of one manager.

    Args:
        pools: returns the pools as they are now.
    """

    def __init__(
        self,
        hosts: HostRegistry,
        pools: Callable[[], Iterable[RepoPool]],
        *,
        coordinator: Coordinator,
        locks: LockManager,
    ) -> None:
        self._hosts = hosts
        self._pools = pools
        self._coordinator = coordinator
        self._locks = locks
        self._out: set[str] = set()
        self._asked: dict[str, tuple[int, float]] = {}
        self._changed = asyncio.Event()
        self._tasks = TaskSet("host-watch")

    def start(self) -> None:
        """Begin to watch."""
        self._hosts.on_change = self._changed.set
        self._changed.set()
        self._tasks.spawn(self._look_for_ever(), name="look")
        self._tasks.spawn(self._follow_for_ever(), name="follow")
        self._tasks.spawn(self._beat_for_ever(), name="beat")

    async def stop(self) -> None:
        """End it."""
        await self._tasks.cancel()

    async def _look_for_ever(self) -> None:
        while True:
            try:
                await self._hosts.refresh()
                await self._ask_silent_ones()
            except (PoolManagerError, OSError):
                _log.exception("cannot look after the hosts; tried again in %g s", _LOOK_SECONDS)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _beat_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            await self._hosts.beat()

    async def _follow_for_ever(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._follow()
            except (PoolManagerError, OSError):
                _log.exception("cannot follow the hosts; tried again in %g s", _LOOK_SECONDS)
                await asyncio.sleep(_LOOK_SECONDS)
                self._changed.set()

    async def _follow(self) -> None:
        """Have the slots follow their hosts: whoever changed a host may have died before it did."""
        out = {name for name in self._hosts.specs if self._hosts.state(name).condition.is_out}
        for host_id in out - self._out:
            await self._coordinator.park_host(host_id)
        for host_id in self._out - out:
            self._asked.pop(host_id, None)
            await self._coordinator.unpark_host(host_id)
        self._out = out
        for pool in self._pools():
            await pool.hosts_changed()

    async def _ask_silent_ones(self) -> None:
        due = [name for name in self._hosts.specs if self._is_due(name)]
        held = await self._locks.try_acquire(_LOCK_ID) if due else None
        if held is None:
            return
        try:
            await together(*[partial(self._ask, host_id) for host_id in due])
        finally:
            await held.release()

    def _is_due(self, host_id: str) -> bool:
        if self._hosts.state(host_id).condition is not HostCondition.UNREACHABLE:
            return False
        return boottime() >= self._asked.get(host_id, (0, 0.0))[1]

    async def _ask(self, host_id: str) -> None:
        failure = await self._hosts.probe(host_id)
        if failure is None:
            await self._hosts.change(host_id, HostCondition.ACTIVE)
            return
        times, _ = self._asked.get(host_id, (0, 0.0))
        pause = min(_ASK_SECONDS[0] * 2**times, _ASK_SECONDS[1]) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        self._asked[host_id] = (times + 1, boottime() + pause)
