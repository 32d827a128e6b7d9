"""Watches the hosts of a manager: sees what others made of them, ends leases there, and asks silent ones again.

Of all processes of one machine one at a time asks, ever more seldom; managers that share a database ask each for
themselves. Which condition means what is `host_registry`'s business.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final

from repopool_async._aio import TaskSet, together
from repopool_async._clock import boottime
from repopool_async.coordination.base import Coordinator
from repopool_async.exceptions import CoordinatorUnavailableError, PoolManagerError
from repopool_async.host_registry import HostRegistry
from repopool_async.host_states import HostCondition
from repopool_async.repo_pool import RepoPool
from repopool_async.shared_state import Locks

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
        locks: Locks,
    ) -> None:
        self._hosts = hosts
        self._pools = pools
        self._coordinator = coordinator
        self._locks = locks
        self._out: set[tuple[str, bool]] = set()
        self._asked: dict[str, tuple[int, float]] = {}
        self._changed = asyncio.Event()
        self._tasks = TaskSet("host-watch")

    def start(self) -> None:
        """Begin to watch."""
        self._hosts.on_change = self._changed.set
        self._changed.set()
        self._tasks.spawn(self._each_second(self._hosts.refresh), name="look")
        self._tasks.spawn(self._each_second(self._ask_silent_ones), name="ask")
        self._tasks.spawn(self._follow_for_ever(), name="follow")
        self._tasks.spawn(self._beat_for_ever(), name="beat")

    async def stop(self) -> None:
        """End it."""
        await self._tasks.cancel()

    async def _each_second(self, step: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await step()
            except CoordinatorUnavailableError as error:
                _log.warning("cannot look after the hosts: %s", error)
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
            except (PoolManagerError, OSError) as error:
                is_known = isinstance(error, CoordinatorUnavailableError)
                _log.warning("cannot follow the hosts: %s; tried again soon", error, exc_info=not is_known)
                await asyncio.sleep(_LOOK_SECONDS)
                self._changed.set()

    async def _follow(self) -> None:
        """Have the slots follow their hosts: whoever changed a host may have died before it did."""
        names = {name for name in self._hosts.specs if self._hosts.state(name).condition.is_out}
        out = {(name, self._hosts.is_out_for_all(name)) for name in names}
        for host_id, is_for_all in out - self._out:
            if is_for_all:
                await self._coordinator.park_host(host_id)
            else:
                await together(*[partial(pool.watch.give_up_on, host_id) for pool in self._pools()])
        for host_id in {name for name, _ in self._out} - names:
            self._asked.pop(host_id, None)
            await self._coordinator.unpark_host(host_id)
        self._out = out
        for pool in self._pools():
            await pool.hosts_changed()

    async def _ask_silent_ones(self) -> None:
        due = [name for name in self._hosts.specs if self._is_due(name)]
        if self._hosts.is_shared:  # what others find tells nothing: the way there may be broken for one
            await together(*[partial(self._ask, host_id) for host_id in due])
            return
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
            await self._hosts.answers_again(host_id)
            return
        times, _ = self._asked.get(host_id, (0, 0.0))
        pause = min(_ASK_SECONDS[0] * 2**times, _ASK_SECONDS[1]) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        self._asked[host_id] = (times + 1, boottime() + pause)
