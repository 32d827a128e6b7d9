"""The managers of a simulated fleet: lessees, cleaners, recovery, heartbeats, in processes that stop and die.

A manager stops at any await and goes on there later, or never; what it started on hosts goes on without it. Fences are
entered and left by `repopool_async.fencing`, in the order in which `acquiring`, `releasing` and `slot_keeper` do.
"""

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from itertools import islice
from typing import Any, Final, TypeVar, cast

import attrs

from benchmarks._fleet_coordinator import FleetCoordinator
from benchmarks._fleet_database import Database
from benchmarks._fleet_hosts import FleetHost, Process
from benchmarks._fleet_judge import Judge
from benchmarks._fleet_network import Network
from repopool_async._aio import TaskSet
from repopool_async.coordination.base import Coordinator, Hold, Want
from repopool_async.coordination.records import lost
from repopool_async.exceptions import (
    CoordinatorUnavailableError,
    HostUnreachableError,
    LeaseLostError,
    PoolManagerError,
)
from repopool_async.fencing import enter, leave, slot_directory
from repopool_async.hosts.base import Host
from repopool_async.models import Owner, Seal, Slot, SlotState
from repopool_async.slot_allocator import available, broken

T = TypeVar("T")

SEALS: Final = tuple(
    Seal(
        commit=digit * 40, branch="main", refs_generation="1", boot_id="", mark_ns=1, settled_ns=1,
        clock_offset_ns=1, tree_device=1, tree_inode=1,
    )
    for digit in "123"
)  # fmt: skip
_SUSPICIONS: Final = 3
"""How many calls in a row a host leaves unanswered before it is parked."""
_SWEEP_TURNS: Final = 15
"""Of how many reapings one looks at everything."""
_RECOVERED_AT_ONCE: Final = 20


@attrs.frozen
class Habits:
    """What managers and lessees do; means, in seconds where nothing else is said.

    Attributes:
        lessees: of each manager. ttl: of sessions. commands: of each lease. background: the share of leases that leave
            a process behind. clean: one of the two commands of a cleaning.
    """

    lessees: int = 100
    ttl: float = 10.0
    pause: float = 30.0
    commands: int = 3
    command: float = 8.0
    background: float = 0.2
    clean: float = 0.5


@attrs.frozen
class Surroundings:
    """What all managers of a fleet share."""

    database: Database
    hosts: Mapping[str, FleetHost]
    network: Network
    judge: Judge
    chance: random.Random
    time: Callable[[], float]
    pools: Sequence[str]
    habits: Habits


class KilledError(BaseException):
    """The process is no more: nothing of it runs on, not even what it would do at its end."""


class Manager:
    """One process that leases slots for its lessees.

    Args:
        number: no other manager has, or had. pools: from which it leases, and after which it looks.
    """

    def __init__(self, number: int, surroundings: Surroundings, pools: Sequence[str]) -> None:
        self.name: Final = f"manager-{number}"
        self.pools: Final = pools
        self.owner: Final = Owner(self.name, "boot", number, 1)
        self.database: Final = surroundings.database
        self.is_retiring = False
        self._number = number
        self._ids = 0
        self._all = surroundings
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._is_dead = False
        self._tasks = TaskSet(self.name, on_error=self._failed)
        self._silent: set[str] = set()
        self._unanswered: Counter[str] = Counter()
        self._settling = 0
        self._coordinator = FleetCoordinator(self, self._tasks, ttl=surroundings.habits.ttl)

    # -- a process among others ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to live."""
        loops = {
            "beat": self._beat_for_ever,
            "reap": self._reap_for_ever,
            "watch": self._watch_for_ever,
            "recover": self._recover_for_ever,
            "look": self._look_for_ever,
        }
        for name, loop in loops.items():
            self._tasks.spawn(loop(), name=name)
        for _ in range(self._all.habits.lessees):
            self._tasks.spawn(self._lease_for_ever(), name="lessee")

    @property
    def is_dead(self) -> bool:
        """Whether it was killed."""
        return self._is_dead

    def pause(self) -> None:
        """Stop at whatever is awaited."""
        self._resumed.clear()

    def resume(self) -> None:
        """Go on."""
        self._resumed.set()

    def kill(self) -> None:
        """End at whatever is awaited."""
        self._is_dead = True
        self._resumed.set()

    async def _awake(self) -> None:
        if not self._resumed.is_set():
            await self._resumed.wait()
        if self._is_dead:
            raise KilledError

    def _failed(self, _name: str, failure: BaseException) -> None:
        if not isinstance(failure, KilledError):
            self._all.judge.fail(failure)

    async def sleep(self, seconds: float) -> None:
        """Wait; longer where the process is paused meanwhile."""
        await asyncio.sleep(seconds)
        await self._awake()

    def time(self) -> float:
        """Return the seconds that have passed."""
        return self._all.time()

    def new_id(self) -> uuid.UUID:
        """Return an id that nothing has yet, and that is the same in every run."""
        self._ids += 1
        return uuid.UUID(int=self._number * 10**9 + self._ids)

    async def ask(self, step: Callable[[], T]) -> T:
        """Have the database do a step; raises as `Network.ask_database`."""
        return await self._woken(self._all.network.ask_database(self.name, lambda: self.database.is_down, step))

    async def ask_host(self, host: FleetHost, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Have a host do something; raises as `Network.ask_host`."""
        try:
            result = await self._woken(self._all.network.ask_host(self.name, host.id, lambda: not host.is_up, work))
        except HostUnreachableError:
            await self._suspect(host.id)
            raise
        self._unanswered.pop(host.id, None)
        return result

    async def _woken(self, question: Coroutine[Any, Any, T]) -> T:
        try:
            result = await question
        except PoolManagerError:
            await self._awake()
            raise
        await self._awake()
        return result

    # -- lessees -------------------------------------------------------------------------------------------------

    async def _lease_for_ever(self) -> None:
        chance = self._all.chance
        while True:
            await self.sleep(chance.expovariate(1 / self._all.habits.pause))
            if self.is_retiring:
                return
            try:
                await self._lease_once(chance.choice(self.pools), chance.choice(SEALS).commit)
            except LeaseLostError:
                self._all.judge.note("leases lost")
            except CoordinatorUnavailableError:
                self._all.judge.note("claims or returns without an answer")

    async def _lease_once(self, pool: str, commit: str) -> None:
        want = Want(
            repo_name=pool,
            lease_id=str(self.new_id()),
            commit=commit,
            branch="main",
            exclude_hosts=frozenset(self._silent),
        )
        grant = await self._coordinator.claim(want)
        if grant is None:
            self._all.judge.note("nothing was free")
            return
        place = self._place(grant)
        try:
            grant.slot = await enter(place.as_host, place.as_coordinator, grant, None)
        except LeaseLostError:
            self._coordinator.abandon(grant)
            raise
        except (CoordinatorUnavailableError, HostUnreachableError):
            self._all.judge.note("slots that could not be entered")
        else:
            self._all.judge.note("leases")
            await self._work(place)
        slot = await self._coordinator.begin_return(grant)
        self._settle_later(grant, slot)

    async def _work(self, place: "Place") -> None:
        chance, habits = self._all.chance, self._all.habits
        try:
            if chance.random() < habits.background:
                await place.run(chance.expovariate(1 / (10 * habits.command)), is_awaited=False)
            for _ in range(habits.commands):
                if place.hold.lock.is_lost:
                    return
                await place.run(chance.expovariate(1 / habits.command))
        except (LeaseLostError, HostUnreachableError):
            self._all.judge.note("commands that failed")

    def _place(self, hold: Hold) -> "Place":
        return Place(self, hold, self._all.hosts[hold.slot.host_id], self._coordinator)

    # -- cleaning ------------------------------------------------------------------------------------------------

    def _settle_later(self, hold: Hold, slot: Slot) -> None:
        self._tasks.spawn(self._settle(hold, slot), name=f"clean-{slot.slot_id}")

    async def _settle(self, hold: Hold, slot: Slot) -> None:
        place = self._place(hold)
        self._settling += 1
        try:
            slot = await leave(place.as_host, place.as_coordinator, hold)
            for _ in range(2):
                await self._clean(place)
            seal = self._all.chance.choice(SEALS)
            await self._coordinator.finish(hold, available(slot, seal, self.database.now()))
        except HostUnreachableError:
            self._coordinator.abandon(hold)
        except PoolManagerError as error:
            await self._quarantine(hold, str(error))
        finally:
            self._settling -= 1

    async def _clean(self, place: "Place") -> None:
        if place.hold.lock.is_lost:
            raise lost(place.hold.slot, place.hold.token)
        process = await place.run(self._all.chance.expovariate(1 / self._all.habits.clean), is_maintenance=True)
        if process.is_killed:
            raise PoolManagerError("a command of the cleaning was killed; it is tried again")

    async def _quarantine(self, hold: Hold, reason: str) -> None:
        try:
            await self._coordinator.finish(hold, broken(hold.slot, reason))
        except LeaseLostError:
            self._all.judge.note("cleanings that lost their slot")
        except CoordinatorUnavailableError:
            self._coordinator.abandon(hold)

    # -- what goes on beside -------------------------------------------------------------------------------------

    async def _beat_for_ever(self) -> None:
        ttl, chance = self._all.habits.ttl, self._all.chance
        while True:
            while not await self._coordinator.beat():
                await self.sleep(min(1.0, ttl / 10) * chance.uniform(0.5, 1.0))
            await self.sleep(ttl / 3 * chance.uniform(0.8, 1.0))

    async def _reap_for_ever(self) -> None:
        ttl = self._all.habits.ttl
        turn = 0
        while True:
            await self.sleep(ttl / 3 * self._all.chance.uniform(0.8, 1.2))
            turn += 1
            if self._coordinator.is_steady:
                session_id, is_full = self._coordinator.session_id, turn % _SWEEP_TURNS == 0
                await self._try(lambda: self.database.reap(session_id, ttl / 3, is_full=is_full))  # noqa: B023
                if is_full:
                    await self._give_back_unknown()

    async def _give_back_unknown(self) -> None:
        try:
            await self._coordinator.give_back_unknown()
        except CoordinatorUnavailableError:
            self._all.judge.note("questions without an answer")

    async def _try(self, step: Callable[[], object]) -> None:
        try:
            await self.ask(step)
        except CoordinatorUnavailableError:
            self._all.judge.note("questions without an answer")

    async def _watch_for_ever(self) -> None:
        while True:
            await self.sleep(1.0)
            try:
                await self._coordinator.note_lost()
            except CoordinatorUnavailableError:
                self._all.judge.note("questions without an answer")

    async def _recover_for_ever(self) -> None:
        while True:
            await self.sleep(self._all.chance.uniform(1.0, 3.0))
            try:
                await self._recover(self._all.chance.choice(self.pools))
            except CoordinatorUnavailableError:
                self._all.judge.note("questions without an answer")

    async def _recover(self, pool: str) -> None:
        for slot in self._within_reach(await self._coordinator.orphans(pool)):
            hold = await self._coordinator.recover_orphan(slot.slot_id)
            self._recovered(hold)
        for slot in self._within_reach(await self._coordinator.quarantined(pool)):
            hold = await self._coordinator.take(slot.slot_id, {SlotState.ERROR}, SlotState.CLEANING)
            self._recovered(hold)

    def _within_reach(self, slots: Sequence[Slot]) -> list[Slot]:
        room = max(0, _RECOVERED_AT_ONCE - self._settling)
        return list(islice((slot for slot in slots if slot.host_id not in self._silent), room))

    def _recovered(self, hold: Hold | None) -> None:
        if hold is not None:
            self._all.judge.note("takeovers", slot_directory(hold.slot), f"hold {hold.lock.hold_id.int}")
            self._settle_later(hold, hold.slot)

    async def _look_for_ever(self) -> None:
        """Learn which hosts are out of use, and ask one of them again."""
        while True:
            await self.sleep(self._all.chance.uniform(1.0, 4.0))
            try:
                silent = await self.ask(lambda: list(self.database.silent_hosts))
                self._silent = set(silent)
                if silent:
                    await self._probe(self._all.chance.choice(silent))
            except (CoordinatorUnavailableError, HostUnreachableError):
                self._all.judge.note("questions without an answer")

    async def _probe(self, host_id: str) -> None:
        await self.ask_host(self._all.hosts[host_id], _nothing)
        await self.ask(lambda: self.database.unpark(host_id))
        self._all.judge.note("hosts unparked")

    async def _suspect(self, host_id: str) -> None:
        self._unanswered[host_id] += 1
        if self._unanswered[host_id] == _SUSPICIONS and host_id not in self._silent:
            self._silent.add(host_id)
            self._unanswered.pop(host_id)
            self._all.judge.note("hosts parked")
            await self._try(lambda: self.database.park(host_id))


@attrs.frozen
class Place:
    """A held slot on its host, as the manager that holds it reaches it."""

    manager: Manager
    hold: Hold
    host: FleetHost
    coordinator: FleetCoordinator

    @property
    def as_host(self) -> Host:
        """As much of a `Host` as `fencing` needs."""
        return cast("Host", self)

    @property
    def as_coordinator(self) -> Coordinator:
        """As much of a `Coordinator` as `fencing` needs."""
        return cast("Coordinator", self.coordinator)

    async def enter(self, slot_directory: str, token: int, session: str | None, *, kills: bool = True) -> None:  # noqa: ARG002
        """See `Host.enter`."""
        hold_id = self.hold.lock.hold_id
        await self.manager.ask_host(self.host, lambda: self.host.enter(slot_directory, token, hold_id, kills=kills))

    async def leave(self, slot_directory: str, token: int) -> None:
        """See `Host.leave`."""
        hold_id = self.hold.lock.hold_id
        await self.manager.ask_host(self.host, lambda: self.host.leave(slot_directory, token, hold_id))

    async def run(self, seconds: float, *, is_maintenance: bool = False, is_awaited: bool = True) -> Process:
        """Run a process for so many seconds; raises as `Host.run`."""
        directory, token, hold_id = slot_directory(self.hold.slot), self.hold.token, self.hold.lock.hold_id

        async def work() -> Process:
            process = await self.host.start(directory, token, hold_id, seconds=seconds, is_maintenance=is_maintenance)
            if is_awaited:
                await process.has_ended.wait()
            return process

        return await self.manager.ask_host(self.host, work)


async def _nothing() -> None:
    """Answer."""
