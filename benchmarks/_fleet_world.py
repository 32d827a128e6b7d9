"""A simulated fleet as a whole: its machines, what befalls them, and what is left once everything works again.

One seed decides everything that happens. No time passes but on the virtual clock.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

import attrs

from benchmarks._fleet_clock import run_virtually
from benchmarks._fleet_database import Database
from benchmarks._fleet_hosts import FleetHost
from benchmarks._fleet_judge import Judge, Violation
from benchmarks._fleet_managers import SEALS, Habits, Manager, Surroundings
from benchmarks._fleet_network import DATABASE, Network
from repopool_async._aio import TaskSet
from repopool_async.models import Slot, SlotState, make_slot_id
from repopool_async.slot_allocator import available

_POOL_SLOTS: Final = 200
_POOLS_EACH: Final = 5
_SETTLE_SECONDS: Final = 300.0
_LOOK_SECONDS: Final = 5.0


@attrs.frozen
class Troubles:
    """How often a machine meets with what, as the mean seconds between two such events, and for how long."""

    pauses: tuple[float, float] = (120.0, 12.0)
    kills: tuple[float, float] = (300.0, 8.0)
    database_cuts: tuple[float, float] = (200.0, 15.0)
    host_cuts: tuple[float, float] = (100.0, 20.0)
    reboots: tuple[float, float] = (900.0, 20.0)
    failovers: tuple[float, float] = (45.0, 3.0)
    lost_seconds: float = 1.0


@attrs.frozen
class Plan:
    """What fleet is simulated.

    Attributes:
        seconds: of trouble, on the virtual clock. checks: whether hosts check tokens. managers: how many processes.
    """

    hosts: int
    slots: int
    managers: int
    seconds: float
    seed: int
    checks: bool = True
    habits: Habits = attrs.field(factory=Habits)
    troubles: Troubles = attrs.field(factory=Troubles)


@attrs.frozen
class Outcome:
    """What became of a fleet.

    Attributes:
        kept_slots: that were not AVAILABLE, or somebody's, once everything had worked again for five minutes.
        lost_slots: the same once all managers were started anew. settle_seconds: until there were none.
        digest: the same for the same plan.
    """

    plan: Plan
    counts: Mapping[str, int]
    violations: list[Violation]
    kept_slots: list[str]
    lost_slots: list[str]
    settle_seconds: float
    digest: str


def simulate(plan: Plan) -> Outcome:
    """Let a fleet live, and return what became of it."""

    async def live() -> Outcome:
        return await _World(plan).live()

    return run_virtually(live)


class _World:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._time: Callable[[], float] = asyncio.get_running_loop().time
        self._chance = random.Random(plan.seed)
        self._judge = Judge(self._time)
        self._is_troubled = True
        self._number = 0
        self._tasks = TaskSet("troubles", on_error=lambda _name, failure: self._judge.fail(failure))
        slots = _slots(plan)
        hosts = {
            name: FleetHost(name, judge=self._judge, time=self._time, chance=self._chance, checks=plan.checks)
            for name in sorted({slot.host_id for slot in slots})
        }
        self._all = Surroundings(
            database=Database(slots, judge=self._judge, time=self._time, ttl=plan.habits.ttl),
            hosts=hosts,
            network=Network(judge=self._judge, time=self._time, chance=self._chance),
            judge=self._judge,
            chance=self._chance,
            time=self._time,
            pools=list(dict.fromkeys(slot.repo_name for slot in slots)),
            habits=plan.habits,
        )
        self._managers = [self._new_manager(place) for place in range(plan.managers)]

    async def live(self) -> Outcome:
        """Let trouble happen for as long as was planned, then mend everything and wait until it has settled."""
        for manager in self._managers:
            manager.start()
        self._begin_troubles()
        await asyncio.sleep(self._plan.seconds)
        self._mend()
        began = self._time()
        kept = await self._settle(_SETTLE_SECONDS)
        if kept:
            self._restart()
        unsettled = await self._settle(_SETTLE_SECONDS)
        took = self._time() - began
        await self._end()
        if self._judge.failure is not None:
            raise self._judge.failure
        return Outcome(
            plan=self._plan,
            counts=dict(sorted(self._judge.counts.items())),
            violations=self._judge.violations,
            kept_slots=kept,
            lost_slots=unsettled,
            settle_seconds=took,
            digest=self._judge.digest,
        )

    async def _settle(self, longest: float) -> list[str]:
        """Wait until every slot is AVAILABLE; return which are not, after so many seconds."""
        for _ in range(int(longest / _LOOK_SECONDS)):
            if not self._unsettled():
                break
            await asyncio.sleep(_LOOK_SECONDS)
        return self._unsettled()

    def _restart(self) -> None:
        for manager in self._managers:
            manager.kill()
        self._managers = [self._new_manager(place) for place in range(self._plan.managers)]
        for manager in self._managers:
            manager.start()
            manager.is_retiring = True

    def _unsettled(self) -> list[str]:
        rows = self._all.database.rows()
        return [
            row.slot.slot_id for row in rows if row.slot.state is not SlotState.AVAILABLE or row.session_id is not None
        ]

    async def _end(self) -> None:
        for manager in self._managers:
            manager.kill()
        await self._tasks.cancel()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def _new_manager(self, place: int) -> Manager:
        """Return a process that nobody has seen yet, for the pools of those that were in its place before."""
        self._number += 1
        each = min(_POOLS_EACH, len(self._all.pools))
        pools = [self._all.pools[(place * each + step) % len(self._all.pools)] for step in range(each)]
        return Manager(self._number, self._all, pools)

    # -- what befalls them ---------------------------------------------------------------------------------------

    def _begin_troubles(self) -> None:
        troubles, managers, hosts = self._plan.troubles, self._plan.managers, self._plan.hosts
        kinds: list[tuple[tuple[float, float], int, Callable[[float], Coroutine[Any, Any, None]]]] = [
            (troubles.pauses, managers, self._pause),
            (troubles.kills, managers, self._kill),
            (troubles.database_cuts, managers, self._cut_database),
            (troubles.host_cuts, managers, self._cut_hosts),
            (troubles.reboots, hosts, self._reboot),
            (troubles.failovers, 1, self._fail_over),
        ]
        for (every, lasts), machines, happen in kinds:
            self._tasks.spawn(self._again_and_again(every / machines, lasts, happen), name=happen.__name__)

    async def _again_and_again(
        self, every: float, lasts: float, happen: Callable[[float], Coroutine[Any, Any, None]]
    ) -> None:
        while True:
            await asyncio.sleep(self._chance.expovariate(1 / every))
            if not self._is_troubled:
                return
            self._tasks.spawn(happen(self._chance.expovariate(1 / lasts)), name="trouble")

    async def _pause(self, seconds: float) -> None:
        manager = self._chance.choice(self._managers)
        self._judge.note("pauses", about=manager.name)
        manager.pause()
        await asyncio.sleep(seconds)
        manager.resume()

    async def _kill(self, seconds: float) -> None:
        place = self._chance.randrange(len(self._managers))
        if self._managers[place].is_dead:
            return
        self._judge.note("kills", about=self._managers[place].name)
        self._managers[place].kill()
        await asyncio.sleep(seconds)
        self._managers[place] = self._new_manager(place)
        self._managers[place].start()
        self._managers[place].is_retiring = not self._is_troubled

    async def _cut_database(self, seconds: float) -> None:
        self._judge.note("partitions from the database")
        self._all.network.cut(self._chance.choice(self._managers).name, DATABASE, seconds)

    async def _cut_hosts(self, seconds: float) -> None:
        self._judge.note("partitions from hosts")
        manager = self._chance.choice(self._managers).name
        names = list(self._all.hosts)
        for name in self._chance.sample(names, max(1, len(names) // 10)):
            self._all.network.cut(manager, name, seconds)

    async def _reboot(self, seconds: float) -> None:
        host = self._all.hosts[self._chance.choice(list(self._all.hosts))]
        self._judge.note("reboots", about=host.id)
        host.reboot()
        host.is_up = False
        await asyncio.sleep(seconds)
        host.is_up = True

    async def _fail_over(self, seconds: float) -> None:
        self._judge.note("failovers")
        database = self._all.database
        database.is_down = True
        await asyncio.sleep(seconds)
        lost = database.fail_over(seconds + self._chance.uniform(0, self._plan.troubles.lost_seconds))
        self._judge.counts["lost commits"] += lost
        database.is_down = False

    def _mend(self) -> None:
        self._judge.note("mended")
        self._is_troubled = False
        self._all.network.heal()
        for manager in self._managers:
            manager.is_retiring = True
            manager.resume()


def _slots(plan: Plan) -> list[Slot]:
    """Return all slots, verified clean, the ones of each pool spread over several hosts."""
    total = plan.hosts * plan.slots
    pools = max(1, total // _POOL_SLOTS)
    slots = []
    for index in range(total):
        repo_name, number = f"pool{index % pools}", index // pools + 1
        host_id = f"host{(index // pools + index % pools * (_POOL_SLOTS // 2)) % plan.hosts}"
        slot_id = make_slot_id(repo_name, number)
        path = f"/{repo_name}/{number}/tree"
        slot = Slot(slot_id, repo_name, "url", path, Database.EPOCH, host_id=host_id)
        slots.append(available(slot, SEALS[index % len(SEALS)], Database.EPOCH))
    return slots
