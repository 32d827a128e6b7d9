"""What lies between the managers, the database and the hosts of a simulated fleet: time, loss and cut cables.

What was asked may not have arrived, may have happened without an answer, or may yet happen long after whoever asked
has given up. Who asked cannot tell which.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

import attrs

from benchmarks._fleet_judge import Judge
from repopool_async._aio import TaskSet
from repopool_async.exceptions import CoordinatorUnavailableError, HostUnreachableError, PoolManagerError

T = TypeVar("T")

DATABASE: Final = "database"
PATIENCE_SECONDS: Final = 5.0
"""How long an answer is waited for."""


class _LostError(Exception):
    """There was no answer."""


@attrs.define
class Weather:
    """How bad the network is.

    Attributes:
        loss: the share of requests, and of answers, that are lost. late: the share of lost requests that arrive all the
            same, within `late_seconds`. latency: the mean one way, in seconds.
    """

    loss: float = 0.002
    late: float = 0.3
    late_seconds: float = 20.0
    latency: float = 0.005


class Network:
    """Carries questions and answers.

    Args:
        time: the virtual clock.

    Attributes:
        weather: may be changed at any time.
    """

    def __init__(self, *, judge: Judge, time: Callable[[], float], chance: random.Random) -> None:
        self.weather = Weather()
        self._judge = judge
        self._time = time
        self._chance = chance
        self._late = TaskSet("late")
        self._cuts: dict[tuple[str, str], float] = {}

    def cut(self, manager: str, peer: str, seconds: float) -> None:
        """Let nothing pass between two for a while."""
        self._cuts[manager, peer] = self._time() + seconds

    def heal(self) -> None:
        """Mend everything for ever."""
        self._cuts.clear()
        self.weather = Weather(loss=0.0)

    async def ask_database(self, manager: str, is_down: Callable[[], bool], step: Callable[[], T]) -> T:
        """Have the database do a step.

        Raises:
            CoordinatorUnavailableError: there was no answer. PoolManagerError: that was the answer.
        """

        async def work() -> T:
            return step()

        try:
            return await self._ask(manager, DATABASE, is_down, work)
        except _LostError:
            raise CoordinatorUnavailableError("the database does not answer; try again") from None

    async def ask_host(
        self, manager: str, host_id: str, is_down: Callable[[], bool], work: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        """Have a host do something, which it does to its end whether there will be somebody to hear of it or not.

        Raises:
            HostUnreachableError: there was no answer. PoolManagerError: that was the answer.
        """
        try:
            return await self._ask(manager, host_id, is_down, work)
        except _LostError:
            raise HostUnreachableError(f"host {host_id} does not answer; try again later", host_id=host_id) from None

    async def _ask(
        self, manager: str, peer: str, is_down: Callable[[], bool], work: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        await self._travel()
        if is_down():
            await self._give_up()
        if self._is_lost(manager, peer):
            if self._chance.random() < self.weather.late:
                self._late.spawn(self._arrive_late(is_down, work), name=f"{manager}-{peer}")
            await self._give_up()
        try:
            result = await work()
        except PoolManagerError:
            await self._travel_back(manager, peer)
            raise
        await self._travel_back(manager, peer)
        return result

    async def _arrive_late(self, is_down: Callable[[], bool], work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        await asyncio.sleep(self._chance.uniform(0, self.weather.late_seconds))
        if not is_down():
            with suppress(PoolManagerError):  # nobody waits for the answer
                await work()
            self._judge.note("late messages")

    async def _travel(self) -> None:
        await asyncio.sleep(self._chance.expovariate(1 / self.weather.latency))

    async def _travel_back(self, manager: str, peer: str) -> None:
        await self._travel()
        if self._is_lost(manager, peer):
            await self._give_up()

    def _is_lost(self, manager: str, peer: str) -> bool:
        return self._cuts.get((manager, peer), 0.0) > self._time() or self._chance.random() < self.weather.loss

    async def _give_up(self) -> None:
        self._judge.note("lost messages")
        await asyncio.sleep(PATIENCE_SECONDS)
        raise _LostError
