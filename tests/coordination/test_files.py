"""The coordinator on files: what each verb does, what it refuses, and what a cancelled one leaves."""

import asyncio
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from repopool_async._clock import boottime
from repopool_async.coordination import view
from repopool_async.coordination.base import Grant
from repopool_async.coordination.files import FileCoordinator
from repopool_async.exceptions import (
    LeaseLostError,
    StoreError,
)
from repopool_async.lock_manager import HeldLock, LockManager
from repopool_async.models import AllocationRecord, Slot, SlotState
from repopool_async.slot_store import SlotStore
from tests._workers import COMMIT, REPO, cancel_at, make_coordinator, make_pool, make_slot, settle

OTHER = "b" * 40
ALL_STATES = frozenset(SlotState)


class Clock:
    """A boot-time clock that stands still until told otherwise."""

    def __init__(self) -> None:
        self.seconds = boottime()

    def __call__(self) -> float:
        return self.seconds


class SlowStore(SlotStore):
    """A store whose next write waits until it is let go on."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.is_slow = False
        self.has_arrived = threading.Event()
        self.may_go_on = threading.Event()

    def write_slot_sync(self, slot: Slot) -> None:
        if self.is_slow:
            self.is_slow = False
            self.has_arrived.set()
            assert self.may_go_on.wait(30)
        super().write_slot_sync(slot)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> SlotStore:
    return SlotStore(tmp_path)


@pytest.fixture
def events() -> list[tuple[str, Mapping[str, object]]]:
    return []


@pytest.fixture
async def coordinator(tmp_path: Path, clock: Clock, events: list[tuple[str, Mapping[str, object]]]) -> FileCoordinator:
    """A pool of two AVAILABLE slots."""
    await make_pool(tmp_path, 2)
    return make_coordinator(tmp_path, clock=clock, on_event=lambda kind, fields: events.append((kind, fields)))


@pytest.fixture
def other(tmp_path: Path, coordinator: FileCoordinator, clock: Clock) -> FileCoordinator:
    """As another process would have it: with its own locks and its own view."""
    return make_coordinator(tmp_path, clock=clock)


async def claim(coordinator: FileCoordinator, lease_id: str = "lease", **options: Any) -> Grant | None:
    return await coordinator.claim(REPO, **{"commit": COMMIT, "branch": "main", "lease_id": lease_id, **options})


async def claimed(coordinator: FileCoordinator, lease_id: str = "lease", **options: Any) -> Grant:
    grant = await claim(coordinator, lease_id, **options)
    assert grant is not None
    return grant


async def give_back(coordinator: FileCoordinator, grant: Grant) -> Slot:
    await coordinator.begin_return(grant)
    return await settle(coordinator, grant)


async def state_of(coordinator: FileCoordinator, slot_id: str) -> SlotState:
    return (await coordinator.get_slot(slot_id)).state


async def history_of(store: SlotStore, slot_id: str) -> list[str]:
    return [record.event for record in await store.history(slot_id)]


# Claiming and giving back


async def test_what_was_seen_before_names_a_slot_and_its_record_says_whether_it_is_free(
    coordinator: FileCoordinator, other: FileCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = await coordinator.list_slots(REPO)
    monkeypatch.setattr(view, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(view.PoolView, "refresh", lambda _view: pytest.fail("all the files were looked at"))
    first = await claimed(coordinator)
    monkeypatch.undo()
    await give_back(coordinator, first)
    taken = await claimed(other, "theirs")  # which `coordinator` has not seen

    second = await claimed(coordinator)

    assert {taken.slot.slot_id, second.slot.slot_id} == {slot.slot_id for slot in seen}


# Orphans


# Detached leases


# Force


# Maintenance


# Making and removing


# Cancellation


# Turns


async def test_an_old_view_misleads_nobody(
    coordinator: FileCoordinator, other: FileCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "FRESH_SECONDS", 3600.0)
    assert len(await coordinator.list_slots(REPO)) == 2
    dropped, returned = await claimed(other), await claimed(other)
    await other.abandon_hold(dropped)
    assert await claim(coordinator) is None, "what the view calls AVAILABLE is not"
    await give_back(other, returned)
    assert (await claimed(coordinator)).token == 2, "what the view calls ALLOCATED is free"


async def test_a_history_that_cannot_be_written_stops_nothing(
    tmp_path: Path, events: list[tuple[str, Mapping[str, object]]]
) -> None:
    class ForgetfulStore(SlotStore):
        def append_history_sync(self, record: AllocationRecord) -> None:
            raise StoreError(f"{record.slot_id}: no space left", slot_id=record.slot_id)

    await make_pool(tmp_path, 1)
    store = ForgetfulStore(tmp_path)
    coordinator = FileCoordinator(
        store, LockManager(store.locks_directory), lambda kind, fields: events.append((kind, fields))
    )
    grant = await claimed(coordinator)
    assert await state_of(coordinator, grant.slot.slot_id) is SlotState.ALLOCATED
    assert (await give_back(coordinator, grant)).state is SlotState.AVAILABLE
    assert [kind for kind, _ in events] == ["history.failed", "history.failed"]
    assert events[0][1]["event"] == "allocated"


async def test_the_robbed_owner_writes_nothing(coordinator: FileCoordinator, other: FileCoordinator) -> None:
    grant = await claimed(coordinator)
    grant.lock.release_sync()  # as if its process had been thought dead
    hold = await other.recover_orphan(grant.slot.slot_id)
    assert hold is not None
    for late in (coordinator.update(grant, grant.slot), coordinator.begin_return(grant)):
        with pytest.raises(LeaseLostError):
            await late
    assert await other.get_slot(grant.slot.slot_id) == hold.slot
    assert not await coordinator.is_held(grant)
    assert await other.is_held(hold)


async def test_an_available_slot_without_a_seal_must_be_cleaned_first(
    coordinator: FileCoordinator, store: SlotStore
) -> None:
    slot = await store.load_slot("workspace-web-slot1")
    await store.save_slot(attrs.evolve(slot, seal=None))
    second = await claimed(coordinator)
    assert await claim(coordinator) is None
    assert await coordinator.is_held(second)
    assert [orphan.slot_id for orphan in await coordinator.orphans(REPO)] == [slot.slot_id]
    assert await coordinator.recover_orphan(slot.slot_id) is not None


async def test_a_corrupt_record_becomes_an_orphan_with_a_higher_token(
    coordinator: FileCoordinator, store: SlotStore
) -> None:
    grant = await claimed(coordinator)
    await give_back(coordinator, grant)
    path = Path(store.slot_directory(grant.slot.slot_id)) / "slot.json"
    path.write_bytes(b'{"token": 1')
    (orphan,) = await coordinator.orphans(REPO)
    assert orphan.slot_id == grant.slot.slot_id
    hold = await coordinator.recover_orphan(orphan.slot_id)
    assert hold is not None
    assert hold.token > grant.token
    await settle(coordinator, hold)


async def test_after_another_boot_no_lease_is_believed(
    coordinator: FileCoordinator, store: SlotStore, clock: Clock
) -> None:
    grants = [await claimed(coordinator, detached_ttl=1e6), await claimed(coordinator)]
    await coordinator.detach(grants[0])
    await coordinator.abandon_hold(grants[1])
    for grant in grants:
        slot = await store.load_slot(grant.slot.slot_id)
        assert slot.lease is not None
        owner = attrs.evolve(slot.lease.owner, boot_id="another-boot")
        await store.save_slot(attrs.evolve(slot, lease=attrs.evolve(slot.lease, owner=owner)))
    clock.seconds = 5.0
    assert len(await coordinator.orphans(REPO)) == 2
    with pytest.raises(LeaseLostError):
        await coordinator.renew(grants[0].slot.slot_id, grants[0].token, 60)
    for grant in grants:
        hold = await coordinator.recover_orphan(grant.slot.slot_id)
        assert hold is not None
        assert hold.slot.total_allocated_seconds == 0.0
        await settle(coordinator, hold)


async def test_who_is_robbed_between_locking_and_looking_takes_nothing(tmp_path: Path) -> None:
    class LateLocks(LockManager):
        """Between its two locks, somebody forces the slot and leaves it as good as new."""

        def try_acquire_sync(self, slot_id: str, *, is_signed: bool = True) -> HeldLock | None:
            held = super().try_acquire_sync(slot_id, is_signed=is_signed)
            with self.record_lock_sync(slot_id):
                self.replace_sync(slot_id)
            return held

    (slot_id,) = await make_pool(tmp_path, 1)
    store = SlotStore(tmp_path)
    coordinator = FileCoordinator(store, LateLocks(store.locks_directory))
    before = await store.load_slot(slot_id)
    assert await claim(coordinator) is None
    assert await coordinator.take(slot_id, states=ALL_STATES) is None
    assert await store.load_slot(slot_id) == before
    lost = await claimed(make_coordinator(tmp_path))
    await make_coordinator(tmp_path).abandon_hold(lost)
    assert await coordinator.recover_orphan(slot_id) is None


async def test_a_record_that_stays_locked_holds_up_nobody_who_does_not_want_it(
    coordinator: FileCoordinator, store: SlotStore
) -> None:
    first, second = [await claimed(coordinator, str(number)) for number in range(2)]
    with LockManager(store.locks_directory).record_lock_sync(first.slot.slot_id):
        returning = asyncio.create_task(coordinator.begin_return(first))
        await asyncio.sleep(0)
        for _ in range(3):
            await coordinator.update(second, second.slot)
        await coordinator.begin_return(second)
        assert not returning.done()
    assert (await returning).state is SlotState.CLEANING
    for grant in (first, second):
        await settle(coordinator, grant)


async def test_records_of_a_newer_version_keep_what_we_do_not_know(
    coordinator: FileCoordinator, store: SlotStore
) -> None:
    path = Path(store.slot_directory("workspace-web-slot1")) / "slot.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red", "schema_version": 9}))
    grant = await claimed(coordinator, prefer=frozenset({"workspace-web-slot1"}))
    await give_back(coordinator, grant)
    assert json.loads(path.read_text())["colour"] == "red"


@pytest.mark.parametrize("times", [1, 2])
async def test_a_claim_cancelled_while_it_writes_gives_the_slot_back_but_not_its_token(
    tmp_path: Path, times: int
) -> None:
    await make_pool(tmp_path, 1)
    store = SlowStore(tmp_path)
    coordinator = FileCoordinator(store, LockManager(store.locks_directory))
    (before,) = await coordinator.list_slots(REPO)
    store.is_slow = True
    task = asyncio.create_task(claim(coordinator))
    await asyncio.to_thread(store.has_arrived.wait, 30)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done(), "the slot is being taken: only its return ends this"
    store.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    (after,) = await coordinator.list_slots(REPO)
    assert after == attrs.evolve(before, token=before.token + 1)
    assert await history_of(store, after.slot_id) == ["allocated", "released"]
    assert (await claimed(coordinator)).token == 2


async def test_a_claim_within_a_cancelled_scope_arrives_or_is_given_back(tmp_path: Path) -> None:
    await make_pool(tmp_path, 1)
    store = SlowStore(tmp_path)
    coordinator = FileCoordinator(store, LockManager(store.locks_directory))
    store.is_slow = True
    grants: list[Grant] = []

    async def cancel(scope: anyio.CancelScope) -> None:
        await asyncio.to_thread(store.has_arrived.wait, 30)
        scope.cancel()
        store.may_go_on.set()

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(cancel, scope)
            grants.append(await claimed(coordinator))
    for grant in grants:
        assert await coordinator.is_held(grant)
        await give_back(coordinator, grant)
    assert (await claimed(coordinator)).token == 2


@pytest.mark.parametrize("turns", range(0, 30, 3))
async def test_a_cancelled_creation_leaves_nothing(coordinator: FileCoordinator, store: SlotStore, turns: int) -> None:
    number = await coordinator.next_slot_number(REPO)
    hold = await cancel_at(turns, 2, asyncio.create_task(coordinator.create(make_slot(store, number))))
    if hold is None:
        assert len(await coordinator.list_slots(REPO)) == 2
        assert not await LockManager(store.locks_directory).is_locked(f"workspace-web-slot{number}")
    else:
        await settle(coordinator, hold)


async def test_a_dead_ticket_is_removed_by_whoever_sees_it(
    coordinator: FileCoordinator, tmp_path: Path, clock: Clock
) -> None:
    tickets = tmp_path / REPO / "tickets"
    tickets.mkdir()
    dead = tickets / "00000000000000000001-1-dead"
    dead.write_bytes(b"\0" * 8)
    unborn, newborn = tickets / ".00000000000000000001-1-x", tickets / f".{int(clock.seconds * 1e9):020d}-1-y"
    unborn.touch()
    newborn.touch()
    async with coordinator.ticket(REPO) as ticket:
        assert await ticket.is_first()
        assert not dead.exists()
        assert not unborn.exists()
        assert newborn.exists(), "somebody may be about to lock it"


@pytest.mark.parametrize("turns", range(0, 12, 2))
async def test_a_cancelled_draw_leaves_no_ticket(coordinator: FileCoordinator, tmp_path: Path, turns: int) -> None:
    async def queue() -> None:
        async with coordinator.ticket(REPO):
            pass

    for _ in range(5):
        await cancel_at(turns, 2, asyncio.create_task(queue()))
    assert list((tmp_path / REPO).glob("tickets/*")) == []
    assert not await coordinator.has_tickets(REPO)
