"""A small fleet under pauses, deaths, partitions and lost commits: nobody meets anybody, unless hosts do not check."""

import asyncio
import functools
import random
import uuid

import pytest

from benchmarks._fleet_clock import StandstillError, run_virtually
from benchmarks._fleet_hosts import FleetHost
from benchmarks._fleet_judge import Judge
from benchmarks._fleet_managers import Habits
from benchmarks._fleet_world import Outcome, Plan, Troubles, simulate
from repopool_async.exceptions import FencedError

HABITS = Habits(lessees=8, pause=4.0, command=4.0)
TROUBLES = Troubles(failovers=(20.0, 2.0), reboots=(150.0, 10.0))


@functools.cache
def fleet(seed: int, *, checks: bool = True, repetition: int = 0) -> Outcome:
    """Return what became of a fleet; the same object each time, but for every repetition."""
    return simulate(
        Plan(hosts=6, slots=4, managers=4, seconds=240.0, seed=seed, checks=checks, habits=HABITS, troubles=TROUBLES)
    )


@pytest.mark.parametrize("seed", range(6))
def test_nobody_meets_anybody_and_no_slot_is_lost(seed: int) -> None:
    outcome = fleet(seed)

    assert outcome.violations == []
    assert outcome.kept_slots == outcome.lost_slots == []
    assert outcome.counts["leases"] > 100
    assert outcome.counts["takeovers"] > 10
    assert outcome.counts["lost commits"] > 0
    assert outcome.counts["refused commands"] > 0


def test_without_the_host_check_they_meet() -> None:
    assert fleet(0, checks=False).counts["violations"] > 0


def test_the_same_seed_is_the_same_run_and_another_is_another() -> None:
    assert fleet(1).digest == fleet(1, repetition=1).digest != fleet(2).digest


# The rules of the parts


def test_time_jumps_to_whatever_is_due_next() -> None:
    async def nap() -> float:
        await asyncio.sleep(86400.0)
        return asyncio.get_running_loop().time()

    assert run_virtually(nap) == pytest.approx(86400.0)


def test_a_run_in_which_nothing_can_happen_any_more_says_so() -> None:
    with pytest.raises(StandstillError):
        run_virtually(lambda: asyncio.Event().wait())


def test_the_judge_accuses_who_lives_on_after_another_has_entered() -> None:
    async def meet() -> Judge:
        judge = Judge(asyncio.get_running_loop().time)
        host = FleetHost("host", judge=judge, time=lambda: 0.0, chance=random.Random(1), checks=False)
        first, second = uuid.UUID(int=1), uuid.UUID(int=2)
        await host.enter("/slot", 1, first, kills=False)
        await host.start("/slot", 1, first, seconds=10.0)
        assert judge.violations == []
        await host.enter("/slot", 2, second, kills=True)
        return judge

    (violation,) = run_virtually(meet).violations
    assert violation.what == "hold 2 was let in while a process of hold 1 lives"


def test_a_token_enters_once_and_a_reboot_forgets_those_that_were_not_on_the_disk() -> None:
    async def enter() -> list[int]:
        time = asyncio.get_running_loop().time
        host = FleetHost("host", judge=Judge(time), time=time, chance=random.Random(1), checks=True)
        hold_id = uuid.UUID(int=1)
        await host.enter("/slot", 5, hold_id, kills=False)
        with pytest.raises(FencedError):
            await host.enter("/slot", 5, hold_id, kills=False)
        await asyncio.sleep(60.0)
        await host.enter("/slot", 6, hold_id, kills=False)
        tops = [host.fence("/slot").top[0]]
        host.reboot()
        tops.append(host.fence("/slot").top[0])
        with pytest.raises(FencedError):  # entered before this boot
            await host.start("/slot", 5, hold_id, seconds=1.0)
        return tops

    assert run_virtually(enter) == [6, 5]


def test_who_has_left_may_clean_until_the_host_is_booted_again_and_do_nothing_else() -> None:
    async def leave() -> list[bool]:
        time = asyncio.get_running_loop().time
        host = FleetHost("host", judge=Judge(time), time=time, chance=random.Random(1), checks=True)
        hold_id = uuid.UUID(int=1)
        await host.enter("/slot", 5, hold_id, kills=False)
        await host.leave("/slot", 5, hold_id)

        async def is_let_in(*, is_maintenance: bool) -> bool:
            try:
                await host.start("/slot", 5, hold_id, seconds=1.0, is_maintenance=is_maintenance)
            except FencedError:
                return False
            return True

        answers = [await is_let_in(is_maintenance=True), await is_let_in(is_maintenance=False)]
        await asyncio.sleep(60.0)
        host.reboot()
        return [*answers, await is_let_in(is_maintenance=True)]

    assert run_virtually(leave) == [True, False, False]
