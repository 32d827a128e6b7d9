"""Real processes on one directory: exclusion, death at any moment, detached leases, and whose turn it is."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from repopool_async.coordination.files import FileCoordinator
from repopool_async.models import SlotState
from repopool_async.slot_store import SlotStore
from tests._workers import COMMIT, REPO, Worker, make_coordinator, make_pool, settle, slots_in, start, worker

PROCESSES = 8
SLOTS = 3
SECONDS = 2.0


@pytest.fixture
async def coordinator(tmp_path: Path) -> FileCoordinator:
    """A pool of one AVAILABLE slot."""
    await make_pool(tmp_path, 1)
    return make_coordinator(tmp_path)


async def recover_all(coordinator: FileCoordinator) -> int:
    count = 0
    for orphan in await coordinator.orphans(REPO):
        hold = await coordinator.recover_orphan(orphan.slot_id)
        assert hold is not None
        await settle(coordinator, hold)
        count += 1
    return count


async def test_the_lease_of_a_living_process_is_left_alone_and_that_of_a_dead_one_recovered(
    coordinator: FileCoordinator, tmp_path: Path
) -> None:
    with worker("lease_and_wait", tmp_path, 0) as other:
        slot_id, token = other.expect("leased").split()
        assert await coordinator.claim(REPO, commit=None, branch=None, lease_id="mine") is None
        assert await coordinator.orphans(REPO) == []
        other.kill()
        (orphan,) = await coordinator.orphans(REPO)
        assert orphan.lease is not None
        assert orphan.lease.owner.pid == other.process.pid
        assert await coordinator.claim(REPO, commit=None, branch=None, lease_id="mine") is None
        assert await recover_all(coordinator) == 1
    grant = await coordinator.claim(REPO, commit=None, branch=None, lease_id="mine")
    assert grant is not None
    assert (grant.slot.slot_id, grant.token) == (slot_id, int(token) + 2)


async def test_a_detached_lease_outlives_its_process(coordinator: FileCoordinator, tmp_path: Path) -> None:
    with worker("lease_and_wait", tmp_path, 3600) as other:
        slot_id, token = other.expect("leased").split()
        other.kill()
    assert await coordinator.orphans(REPO) == []
    assert await coordinator.claim(REPO, commit=None, branch=None, lease_id="mine") is None
    await coordinator.renew(slot_id, int(token), 60)
    await settle(coordinator, await coordinator.release_detached(slot_id, int(token)))
    assert slots_in(tmp_path, SlotState.AVAILABLE) == 1


async def test_a_detached_lease_that_its_living_process_still_locks_can_be_given_back(
    coordinator: FileCoordinator, tmp_path: Path
) -> None:
    grant = await coordinator.claim(REPO, commit=COMMIT, branch="main", lease_id="mine", detached_ttl=3600)
    assert grant is not None
    elsewhere = make_coordinator(tmp_path)
    await settle(elsewhere, await elsewhere.release_detached(grant.slot.slot_id, grant.token))
    assert slots_in(tmp_path, SlotState.AVAILABLE) == 1


async def test_processes_that_queue_are_all_served(tmp_path: Path) -> None:
    await make_pool(tmp_path, 1)
    count, processes = 20, 3
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker("queue_and_lease", tmp_path, count)) for _ in range(processes)]
        for each in workers:
            each.expect("ready")
        for each in workers:
            each.tell()
        for each in workers:
            for _ in range(count):
                each.expect("leased")
            assert each.close() == 0
    history = await SlotStore(tmp_path).history("workspace-web-slot1")
    order = [record.owner.pid for record in history if record.event == "allocated"]
    assert Counter(order) == dict.fromkeys((each.process.pid for each in workers), count)


async def test_a_stopped_process_holds_nobody_up_for_long(coordinator: FileCoordinator, tmp_path: Path) -> None:
    blocker = await coordinator.claim(REPO, commit=None, branch=None, lease_id="mine")
    assert blocker is not None
    with worker("queue_and_lease", tmp_path, 1) as other:
        other.expect("ready")
        other.tell()
        async with asyncio.timeout(20):
            while not await coordinator.has_tickets(REPO):
                await asyncio.sleep(0.01)
        os.kill(other.process.pid, signal.SIGSTOP)
        try:
            await coordinator.begin_return(blocker)
            await settle(coordinator, blocker)
            async with asyncio.timeout(20), coordinator.ticket(REPO) as ticket:
                assert not await ticket.is_first()
                while not await ticket.is_first():
                    await asyncio.sleep(0.05)
        finally:
            os.kill(other.process.pid, signal.SIGCONT)
        other.expect("leased")


async def test_the_ticket_of_a_killed_process_is_worth_nothing(coordinator: FileCoordinator, tmp_path: Path) -> None:
    blocker = await coordinator.claim(REPO, commit=None, branch=None, lease_id="mine")
    with worker("queue_and_lease", tmp_path, 1) as other:
        other.expect("ready")
        other.tell()
        async with asyncio.timeout(20):
            while not await coordinator.has_tickets(REPO):
                await asyncio.sleep(0.01)
        other.kill()
        assert not await coordinator.has_tickets(REPO)
    assert list((tmp_path / REPO / "tickets").iterdir()) == []
    assert blocker is not None


async def test_processes_killed_at_any_moment_never_share_a_slot_and_lose_none(tmp_path: Path) -> None:
    await make_pool(tmp_path, SLOTS)
    chance = random.Random()
    killed = await asyncio.to_thread(compete_and_kill, tmp_path, chance)
    assert not (tmp_path / "accusations").exists(), (tmp_path / "accusations").read_text()
    assert killed > 3
    coordinator = make_coordinator(tmp_path)
    await recover_all(coordinator)
    assert slots_in(tmp_path, SlotState.AVAILABLE) == SLOTS
    leases = 0
    for slot in await coordinator.list_slots(REPO):
        records = await SlotStore(tmp_path).history(slot.slot_id)
        tokens = [record.token for record in records if record.event == "allocated"]
        assert tokens == sorted(set(tokens)), "one token, one lease"
        assert slot.token >= max(tokens)
        leases += len(tokens)
    assert leases > 50
    for _ in range(SLOTS):
        assert await coordinator.claim(REPO, commit=None, branch=None, lease_id="last") is not None


def compete_and_kill(directory: Path, chance: random.Random) -> int:
    """Let processes compete, kill one of them time and again, and return how often."""
    killed = 0
    with competitors(directory, chance) as workers:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            time.sleep(chance.random() * 0.2)  # not to wait for anything: when the blow falls shall be chance
            victim = chance.randrange(PROCESSES)
            close(workers[victim], is_killed=True)
            workers[victim] = start("compete", directory, chance.random())
            killed += 1
        for each in workers:
            assert close(each) == 0
    return killed


@contextlib.contextmanager
def competitors(directory: Path, chance: random.Random) -> Iterator[list[Worker]]:
    workers = [start("compete", directory, chance.random()) for _ in range(PROCESSES)]
    try:
        for each in workers:
            each.expect("ready")
        yield workers
    finally:
        for each in workers:
            close(each, is_killed=True)


def close(competitor: Worker, *, is_killed: bool = False) -> int:
    if is_killed:
        competitor.kill()
    code = competitor.close()
    assert competitor.process.stdout is not None
    competitor.process.stdout.close()
    return code
