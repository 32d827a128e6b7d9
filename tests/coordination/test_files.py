"""The coordinator on files: what each verb does, what it refuses, and what a cancelled one leaves."""

import asyncio
import contextlib
import gc
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from repopool_async._clock import boottime, now
from repopool_async.coordination import view
from repopool_async.coordination.base import Grant, Hold
from repopool_async.coordination.files import FileCoordinator
from repopool_async.exceptions import (
    LeaseLostError,
    PoolNotFoundError,
    SlotNotFoundError,
    StoreError,
)
from repopool_async.lock_manager import HeldLock, LockManager
from repopool_async.models import AllocationRecord, Slot, SlotState
from repopool_async.slot_allocator import available, broken
from repopool_async.slot_store import SlotStore
from tests._workers import COMMIT, REPO, add_slot, make_coordinator, make_pool, make_seal, make_slot, settle

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


async def test_a_claimed_slot_is_allocated_and_locked(coordinator: FileCoordinator, store: SlotStore) -> None:
    grant = await claimed(coordinator, ref="main", metadata={"job": 7}, wait_seconds=0.5)
    slot = await store.load_slot(grant.slot.slot_id)
    assert slot == grant.slot
    assert (slot.state, slot.token, slot.lease) == (SlotState.ALLOCATED, 1, grant.lease)
    assert (grant.lease.owner.pid, grant.lease.ref, grant.lease.metadata) == (os.getpid(), "main", {"job": 7})
    assert (grant.lease.commit, grant.lease.branch, grant.lease.is_detached) == (COMMIT, "main", False)
    assert grant.previous.state is SlotState.AVAILABLE
    assert await LockManager(store.locks_directory).is_locked(slot.slot_id)
    assert await coordinator.is_held(grant)
    (record,) = await store.history(slot.slot_id)
    assert (record.event, record.lease_id, record.token, record.wait_seconds) == ("allocated", "lease", 1, 0.5)
    assert record.metadata == {"job": 7}


async def test_a_returned_slot_is_available_again_with_its_use_counted(
    coordinator: FileCoordinator, store: SlotStore, clock: Clock
) -> None:
    grant = await claimed(coordinator)
    clock.seconds += 5
    dirty = await coordinator.begin_return(grant)
    assert dirty.state is SlotState.CLEANING
    assert dirty.lease == grant.lease
    assert await LockManager(store.locks_directory).is_locked(dirty.slot_id)
    clean = await coordinator.finish(grant, available(dirty, make_seal(OTHER), now()))
    assert await store.load_slot(dirty.slot_id) == clean
    assert (clean.state, clean.lease, clean.allocation_count) == (SlotState.AVAILABLE, None, 1)
    assert clean.total_allocated_seconds == pytest.approx(5)
    assert not await LockManager(store.locks_directory).is_locked(dirty.slot_id)
    assert not await coordinator.is_held(grant)
    records = await store.history(dirty.slot_id)
    assert [record.event for record in records] == ["allocated", "released"]
    assert records[1].held_seconds == pytest.approx(5)


async def test_every_lease_has_a_higher_token(coordinator: FileCoordinator, other: FileCoordinator) -> None:
    tokens: dict[str, list[int]] = {}
    for index in range(10):
        using = (coordinator, other)[index % 2]
        grant = await claimed(using)
        tokens.setdefault(grant.slot.slot_id, []).append(grant.token)
        await give_back(using, grant)
    assert all(given == sorted(set(given)) for given in tokens.values())


async def test_no_slot_is_given_twice(coordinator: FileCoordinator, other: FileCoordinator) -> None:
    grants = await asyncio.gather(*(claim(using, f"l{i}") for i, using in enumerate([coordinator, other] * 8)))
    given = [grant.slot.slot_id for grant in grants if grant is not None]
    assert sorted(given) == ["workspace-web-slot1", "workspace-web-slot2"]
    assert await claim(coordinator) is None
    assert await claim(other) is None


async def test_a_slot_that_another_process_returned_is_seen_at_once(
    coordinator: FileCoordinator, other: FileCoordinator
) -> None:
    grants = [await claimed(coordinator), await claimed(coordinator)]
    assert await claim(other) is None
    await give_back(coordinator, grants[0])
    grant = await claimed(other)
    assert grant.slot.slot_id == grants[0].slot.slot_id


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


async def test_the_warmest_slot_is_claimed(coordinator: FileCoordinator) -> None:
    first = await claimed(coordinator)
    second = await claimed(coordinator)
    await coordinator.begin_return(first)
    await coordinator.finish(first, available(first.slot, make_seal(OTHER, "dev"), now()))
    await give_back(coordinator, second)
    grant = await claimed(coordinator, commit=OTHER, branch="dev")
    assert grant.slot.slot_id == first.slot.slot_id


async def test_slots_can_be_preferred_and_excluded(coordinator: FileCoordinator) -> None:
    one, two = "workspace-web-slot1", "workspace-web-slot2"
    preferred = await claimed(coordinator, prefer=frozenset({two}))
    assert preferred.slot.slot_id == two
    assert await claim(coordinator, exclude=frozenset({one})) is None
    await give_back(coordinator, preferred)
    assert (await claimed(coordinator, exclude=frozenset({two}))).slot.slot_id == one


async def test_nothing_is_claimed_from_a_pool_that_does_not_exist(tmp_path: Path) -> None:
    assert await claim(make_coordinator(tmp_path)) is None


async def test_a_held_record_can_be_written(coordinator: FileCoordinator, store: SlotStore) -> None:
    grant = await claimed(coordinator)
    lease = attrs.evolve(grant.lease, branch="agent/x")
    written = await coordinator.update(grant, attrs.evolve(grant.slot, lease=lease, last_branch="agent/x"))
    assert grant.slot == written == await store.load_slot(written.slot_id)


async def test_a_record_of_another_slot_or_token_is_refused(coordinator: FileCoordinator) -> None:
    grant, stranger = await claimed(coordinator), await claimed(coordinator)
    for wrong in (stranger.slot, attrs.evolve(grant.slot, token=99)):
        with pytest.raises(ValueError, match="is not the record"):
            await coordinator.update(grant, wrong)
        with pytest.raises(ValueError, match="is not the record"):
            await coordinator.finish(grant, wrong)


async def test_a_hold_cannot_end_half_way(coordinator: FileCoordinator) -> None:
    grant = await claimed(coordinator)
    dirty = await coordinator.begin_return(grant)
    unsealed = attrs.evolve(dirty, state=SlotState.AVAILABLE, seal=None)
    for wrong in (dirty, unsealed):
        with pytest.raises(ValueError, match="a hold ends with"):
            await coordinator.finish(grant, wrong)
    assert await coordinator.is_held(grant)


async def test_what_has_ended_cannot_be_ended_again(coordinator: FileCoordinator) -> None:
    grant = await claimed(coordinator)
    await coordinator.begin_return(grant)
    with pytest.raises(LeaseLostError, match="token 1"):
        await coordinator.begin_return(grant)
    free = await settle(coordinator, grant)
    for late in (coordinator.begin_return(grant), coordinator.update(grant, free), coordinator.finish(grant, free)):
        with pytest.raises(LeaseLostError):
            await late
    assert await coordinator.get_slot(free.slot_id) == free
    await coordinator.abandon_hold(grant)


async def test_a_broken_slot_is_not_handed_out(coordinator: FileCoordinator) -> None:
    grant = await claimed(coordinator)
    dirty = await coordinator.begin_return(grant)
    await coordinator.finish(grant, broken(dirty, "disk on fire"))
    assert (await coordinator.get_slot(dirty.slot_id)).error == "disk on fire"
    second = await claimed(coordinator)
    assert await claim(coordinator) is None
    assert await coordinator.orphans(REPO) == []
    assert await coordinator.is_held(second)


async def test_a_hold_stands_where_its_end_cannot_be_written(coordinator: FileCoordinator, store: SlotStore) -> None:
    grant = await claimed(coordinator)
    dirty = await coordinator.begin_return(grant)
    with pytest.raises(StoreError):
        await coordinator.finish(grant, available(attrs.evolve(dirty, extra={"x": object()}), make_seal(), now()))
    assert await coordinator.is_held(grant)
    assert await store.load_slot(dirty.slot_id) == dirty
    await settle(coordinator, grant)


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


# Orphans


async def test_a_grant_that_is_lost_sight_of_is_an_orphan(coordinator: FileCoordinator, other: FileCoordinator) -> None:
    grant = await claimed(coordinator)
    slot_id = grant.slot.slot_id
    assert await other.orphans(REPO) == []
    del grant
    gc.collect()
    assert [slot.slot_id for slot in await other.orphans(REPO)] == [slot_id]


async def test_what_a_holder_drops_is_an_orphan_and_not_handed_out(
    coordinator: FileCoordinator, other: FileCoordinator, store: SlotStore, clock: Clock
) -> None:
    leased, cleaned = await claimed(coordinator, "one"), await claimed(coordinator, "two")
    await coordinator.begin_return(cleaned)
    assert await other.orphans(REPO) == []
    clock.seconds += 3
    await coordinator.abandon_hold(leased)
    await coordinator.abandon_hold(cleaned)
    assert await claim(other) is None
    found = await other.orphans(REPO)
    assert [slot.slot_id for slot in found] == ["workspace-web-slot1", "workspace-web-slot2"]
    hold = await other.recover_orphan(leased.slot.slot_id)
    assert hold is not None
    assert (hold.slot.state, hold.token) == (SlotState.CLEANING, leased.token + 1)
    assert hold.slot.lease == leased.lease, "salvage and history need it"
    assert hold.slot.total_allocated_seconds == pytest.approx(3)
    assert [slot.slot_id for slot in await other.orphans(REPO)] == [cleaned.slot.slot_id]
    await settle(other, hold)
    assert await history_of(store, leased.slot.slot_id) == ["allocated", "recovered"]
    assert (await claimed(coordinator)).token == leased.token + 2


async def test_an_orphan_is_recovered_once(coordinator: FileCoordinator, other: FileCoordinator) -> None:
    grant = await claimed(coordinator)
    await coordinator.abandon_hold(grant)
    holds = await asyncio.gather(*(using.recover_orphan(grant.slot.slot_id) for using in [coordinator, other] * 5))
    assert sum(hold is not None for hold in holds) == 1


async def test_what_somebody_holds_is_not_recovered(coordinator: FileCoordinator, other: FileCoordinator) -> None:
    grant = await claimed(coordinator)
    assert await other.recover_orphan(grant.slot.slot_id) is None
    await coordinator.begin_return(grant)
    assert await other.recover_orphan(grant.slot.slot_id) is None
    await settle(coordinator, grant)
    assert await other.recover_orphan(grant.slot.slot_id) is None
    assert await coordinator.orphans(REPO) == []


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


# Detached leases


async def test_a_detached_lease_is_held_by_its_record(
    coordinator: FileCoordinator, other: FileCoordinator, store: SlotStore, clock: Clock
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    lease = await coordinator.detach(grant)
    assert lease.expires_boottime == clock.seconds + 60
    assert not await LockManager(store.locks_directory).is_locked(grant.slot.slot_id)
    assert await coordinator.is_held(grant)
    second = await claimed(other)
    assert await claim(other) is None
    assert await other.orphans(REPO) == []
    assert await other.is_held(second)
    assert await other.recover_orphan(grant.slot.slot_id) is None
    assert await other.take(grant.slot.slot_id, states=ALL_STATES) is None


async def test_a_detached_lease_may_be_given_back_by_whoever_has_its_token(
    coordinator: FileCoordinator, other: FileCoordinator, store: SlotStore
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    await coordinator.detach(grant)
    for wrong in (0, 2, -1):
        with pytest.raises(LeaseLostError):
            await other.release_detached(grant.slot.slot_id, wrong)
    hold = await other.release_detached(grant.slot.slot_id, grant.token)
    assert hold.slot.state is SlotState.CLEANING
    assert await other.orphans(REPO) == []
    with pytest.raises(LeaseLostError):
        await coordinator.release_detached(grant.slot.slot_id, grant.token)
    with pytest.raises(LeaseLostError):
        await coordinator.begin_return(grant)
    assert not await coordinator.is_held(grant)
    await settle(other, hold)
    assert await history_of(store, grant.slot.slot_id) == ["allocated", "released"]


async def test_the_lessee_itself_gives_a_detached_lease_back(coordinator: FileCoordinator) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    await coordinator.detach(grant)
    assert (await coordinator.begin_return(grant)).state is SlotState.CLEANING
    assert await coordinator.is_held(grant) is False, "the lease has ended, only the slot is held"
    assert (await settle(coordinator, grant)).state is SlotState.AVAILABLE


async def test_before_it_is_detached_a_lease_can_be_prepared_and_returned_as_any(
    coordinator: FileCoordinator, store: SlotStore
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    assert await LockManager(store.locks_directory).is_locked(grant.slot.slot_id)
    await coordinator.update(grant, attrs.evolve(grant.slot, last_branch="x"))
    assert (await give_back(coordinator, grant)).last_branch == "x"


async def test_a_detached_lease_that_its_process_never_let_go_of_can_be_given_back_elsewhere(
    coordinator: FileCoordinator, other: FileCoordinator
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    hold = await other.release_detached(grant.slot.slot_id, grant.token)
    with pytest.raises(LeaseLostError):
        await coordinator.begin_return(grant)
    await settle(other, hold)


async def test_an_old_detached_lease_writes_nothing_into_the_next_one(
    coordinator: FileCoordinator, other: FileCoordinator
) -> None:
    old = await claimed(coordinator, detached_ttl=60)
    await coordinator.detach(old)
    await settle(other, await other.release_detached(old.slot.slot_id, old.token))
    new = await claimed(other, "new", detached_ttl=60, prefer=frozenset({old.slot.slot_id}))
    await other.detach(new)
    assert new.slot.slot_id == old.slot.slot_id
    for late in (coordinator.update(old, old.slot), coordinator.begin_return(old), coordinator.detach(old)):
        with pytest.raises(LeaseLostError, match=f"token {old.token} has ended"):
            await late
    assert not await coordinator.is_held(old)
    assert await other.get_slot(new.slot.slot_id) == new.slot


async def test_renewing_moves_the_expiry(coordinator: FileCoordinator, other: FileCoordinator, clock: Clock) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    await coordinator.detach(grant)
    clock.seconds += 50
    lease = await other.renew(grant.slot.slot_id, grant.token, 100)
    assert lease.expires_boottime == clock.seconds + 100
    assert await other.renew(grant.slot.slot_id, grant.token, None) == lease
    clock.seconds += 99
    assert await other.orphans(REPO) == []
    written = await coordinator.update(grant, attrs.evolve(grant.slot, last_branch="x"))
    assert written.lease == lease, "an expiry that was renewed meanwhile stays"
    with pytest.raises(LeaseLostError):
        await other.renew(grant.slot.slot_id, grant.token + 1, 100)


async def test_an_expired_lease_is_an_orphan_and_cannot_be_renewed(
    coordinator: FileCoordinator,
    store: SlotStore,
    clock: Clock,
    events: list[tuple[str, Mapping[str, object]]],
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    await coordinator.detach(grant)
    clock.seconds += 61
    assert not await coordinator.is_held(grant)
    for late in (
        coordinator.renew(grant.slot.slot_id, grant.token, 60),
        coordinator.release_detached(grant.slot.slot_id, grant.token),
        coordinator.update(grant, grant.slot),
        coordinator.begin_return(grant),
    ):
        with pytest.raises(LeaseLostError):
            await late
    assert [slot.slot_id for slot in await coordinator.orphans(REPO)] == [grant.slot.slot_id]
    hold = await coordinator.recover_orphan(grant.slot.slot_id)
    assert hold is not None
    assert hold.token == grant.token + 1
    assert await history_of(store, grant.slot.slot_id) == ["allocated", "expired"]
    assert [(kind, fields["lease_id"]) for kind, fields in events] == [("lease.expired", "lease")]


async def test_an_expired_lease_is_taken_from_a_process_that_still_locks_it(
    coordinator: FileCoordinator, other: FileCoordinator, clock: Clock
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    clock.seconds += 61
    hold = await other.recover_orphan(grant.slot.slot_id)
    assert hold is not None
    with pytest.raises(LeaseLostError):
        await coordinator.begin_return(grant)
    await settle(other, hold)
    assert await claim(coordinator) is not None


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


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf")])
async def test_a_time_that_is_none_is_refused(coordinator: FileCoordinator, ttl: float) -> None:
    with pytest.raises(ValueError, match="positive, finite"):
        await claim(coordinator, detached_ttl=ttl)
    grant = await claimed(coordinator, detached_ttl=60)
    with pytest.raises(ValueError, match="positive, finite"):
        await coordinator.renew(grant.slot.slot_id, grant.token, ttl)


async def test_a_lease_of_a_process_has_no_expiry_to_renew_and_is_not_released_by_token(
    coordinator: FileCoordinator, other: FileCoordinator
) -> None:
    grant = await claimed(coordinator)
    assert await other.renew(grant.slot.slot_id, grant.token, 60) == grant.lease
    with pytest.raises(LeaseLostError):
        await other.release_detached(grant.slot.slot_id, grant.token)
    with pytest.raises(ValueError, match="not detached"):
        await coordinator.detach(grant)
    assert await coordinator.is_held(grant)


# Force


@pytest.mark.parametrize("is_cleaning", [False, True])
async def test_forcing_takes_a_slot_from_its_holder(
    coordinator: FileCoordinator,
    other: FileCoordinator,
    store: SlotStore,
    events: list[tuple[str, Mapping[str, object]]],
    is_cleaning: bool,
) -> None:
    grant = await claimed(other)
    if is_cleaning:
        await other.begin_return(grant)
    forced = await coordinator.force_unlock(grant.slot.slot_id)
    assert (forced.state, forced.token, forced.lease) == (SlotState.CLEANING, grant.token + 1, grant.lease)
    assert not await other.is_held(grant)
    for late in (
        other.update(grant, grant.slot),
        other.begin_return(grant),
        other.finish(grant, available(grant.slot, make_seal(), now())),
        other.renew(grant.slot.slot_id, grant.token, 60),
    ):
        with pytest.raises(LeaseLostError):
            await late
    assert await store.load_slot(forced.slot_id) == forced
    hold = await coordinator.recover_orphan(forced.slot_id)
    assert hold is not None
    await other.abandon_hold(grant)
    assert await coordinator.is_held(hold)
    await settle(coordinator, hold)
    assert (await history_of(store, forced.slot_id))[-2:] == ["forced", "recovered"]
    assert [(kind, fields["lease_id"]) for kind, fields in events] == [("lease.forced", "lease")]


async def test_forcing_ends_a_detached_lease(coordinator: FileCoordinator) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    await coordinator.detach(grant)
    await coordinator.force_unlock(grant.slot.slot_id)
    assert not await coordinator.is_held(grant)
    assert [slot.slot_id for slot in await coordinator.orphans(REPO)] == [grant.slot.slot_id]


async def test_forcing_what_nobody_holds_changes_nothing(coordinator: FileCoordinator) -> None:
    slot_id = "workspace-web-slot1"
    before = await coordinator.get_slot(slot_id)
    assert await coordinator.force_unlock(slot_id) == before
    assert await coordinator.get_slot(slot_id) == before


async def test_forcing_maintenance_sends_an_available_slot_to_recovery_and_keeps_a_quarantined_one(
    coordinator: FileCoordinator, other: FileCoordinator
) -> None:
    one, two = "workspace-web-slot1", "workspace-web-slot2"
    first = await other.take(one, states={SlotState.AVAILABLE})
    second = await other.take(two, states={SlotState.AVAILABLE})
    assert first is not None
    assert second is not None
    await other.finish(second, broken(second.slot, "bad"))
    second = await other.take(two, states={SlotState.ERROR})
    assert second is not None
    assert (await coordinator.force_unlock(one)).state is SlotState.CLEANING
    assert (await coordinator.force_unlock(two)).state is SlotState.ERROR
    for hold in (first, second):
        with pytest.raises(LeaseLostError):
            await settle(other, hold)


async def test_who_is_robbed_between_locking_and_looking_takes_nothing(tmp_path: Path) -> None:
    class LateLocks(LockManager):
        """Between its two locks, somebody forces the slot and leaves it as good as new."""

        def try_acquire_sync(self, slot_id: str) -> HeldLock | None:
            held = super().try_acquire_sync(slot_id)
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


# Maintenance


async def test_a_slot_can_be_held_for_maintenance(coordinator: FileCoordinator, other: FileCoordinator) -> None:
    slot_id = "workspace-web-slot1"
    hold = await coordinator.take(slot_id, states={SlotState.AVAILABLE})
    assert hold is not None
    assert (hold.slot.state, hold.token) == (SlotState.AVAILABLE, 0)
    assert await other.take(slot_id, states=ALL_STATES) is None
    assert (await claimed(other)).slot.slot_id != slot_id
    assert await claim(other) is None
    await coordinator.abandon_hold(hold)
    assert (await claimed(other)).slot.slot_id == slot_id


async def test_maintenance_may_mark_the_slot_before_it_touches_it(coordinator: FileCoordinator) -> None:
    slot_id = "workspace-web-slot1"
    hold = await coordinator.take(slot_id, states={SlotState.AVAILABLE}, raise_token=True, becomes=SlotState.CLEANING)
    assert hold is not None
    assert (hold.slot.state, hold.token) == (SlotState.CLEANING, 1)
    assert await coordinator.get_slot(slot_id) == hold.slot
    await coordinator.abandon_hold(hold)
    assert [slot.slot_id for slot in await coordinator.orphans(REPO)] == [slot_id]


async def test_only_the_states_that_were_named_are_taken(coordinator: FileCoordinator) -> None:
    assert await coordinator.take("workspace-web-slot1", states={SlotState.ERROR}) is None
    grant = await claimed(coordinator)
    assert await coordinator.take(grant.slot.slot_id, states=ALL_STATES) is None
    await coordinator.abandon_hold(grant)
    hold = await coordinator.take(grant.slot.slot_id, states=ALL_STATES)
    assert hold is not None
    await coordinator.abandon_hold(hold)


async def test_what_does_not_exist_is_not_found(coordinator: FileCoordinator) -> None:
    slot_id = "workspace-web-slot99"
    for attempt in (
        coordinator.take(slot_id, states=ALL_STATES),
        coordinator.recover_orphan(slot_id),
        coordinator.force_unlock(slot_id),
        coordinator.renew(slot_id, 1, 60),
        coordinator.release_detached(slot_id, 1),
        coordinator.get_slot(slot_id),
    ):
        with pytest.raises(SlotNotFoundError):
            await attempt


# Making and removing


async def test_a_new_slot_is_held_until_it_is_finished(
    coordinator: FileCoordinator, other: FileCoordinator, store: SlotStore
) -> None:
    number = await coordinator.next_slot_number(REPO)
    hold = await coordinator.create(make_slot(store, number))
    assert await state_of(other, hold.slot.slot_id) is SlotState.CLEANING
    assert await other.orphans(REPO) == []
    await settle(coordinator, hold)
    assert [slot.number for slot in await other.list_slots(REPO)] == [1, 2, 3]


async def test_a_slot_whose_maker_died_is_an_orphan(coordinator: FileCoordinator, store: SlotStore) -> None:
    hold = await coordinator.create(make_slot(store, await coordinator.next_slot_number(REPO)))
    await coordinator.abandon_hold(hold)
    (orphan,) = await coordinator.orphans(REPO)
    recovered = await coordinator.recover_orphan(orphan.slot_id)
    assert recovered is not None
    assert (recovered.slot.lease, recovered.token) == (None, 1)


async def test_a_slot_is_made_once(coordinator: FileCoordinator, store: SlotStore) -> None:
    with pytest.raises(ValueError, match="exists already"):
        await coordinator.create(make_slot(store, 1))
    with pytest.raises(ValueError, match="is CLEANING until"):
        await coordinator.create(attrs.evolve(make_slot(store, 3), state=SlotState.AVAILABLE))
    assert await claim(coordinator) is not None


async def test_numbers_are_never_given_twice(coordinator: FileCoordinator, store: SlotStore) -> None:
    numbers = await asyncio.gather(*(coordinator.next_slot_number(REPO) for _ in range(8)))
    assert sorted(numbers) == list(range(3, 11))
    slot = await add_slot(coordinator, store)
    hold = await coordinator.take(slot.slot_id, states=ALL_STATES)
    assert hold is not None
    await coordinator.delete(hold)
    pool = await store.load_pool(REPO)
    await store.save_pool(attrs.evolve(pool, next_slot_number=1))  # written by somebody who had read it long ago
    assert await coordinator.next_slot_number(REPO) == slot.number + 1
    with pytest.raises(PoolNotFoundError):
        await coordinator.next_slot_number("nowhere")


async def test_a_deleted_slot_is_gone_for_everybody(
    coordinator: FileCoordinator, other: FileCoordinator, store: SlotStore
) -> None:
    slot_id = "workspace-web-slot1"
    assert len(await other.list_slots(REPO)) == 2
    hold = await coordinator.take(slot_id, states=ALL_STATES)
    assert hold is not None
    await coordinator.delete(hold)
    assert not Path(store.slot_directory(slot_id)).exists()
    assert not await LockManager(store.locks_directory).is_locked(slot_id)
    assert (await claimed(other)).slot.slot_id != slot_id
    assert await claim(other) is None
    assert [slot.number for slot in await other.list_slots(REPO)] == [2]


async def test_a_slot_that_was_taken_away_is_not_deleted(coordinator: FileCoordinator, other: FileCoordinator) -> None:
    slot_id = "workspace-web-slot1"
    hold = await coordinator.take(slot_id, states=ALL_STATES)
    assert hold is not None
    await other.force_unlock(slot_id)
    with pytest.raises(LeaseLostError):
        await coordinator.delete(hold)
    assert len(await coordinator.list_slots(REPO)) == 2


async def test_records_of_a_newer_version_keep_what_we_do_not_know(
    coordinator: FileCoordinator, store: SlotStore
) -> None:
    path = Path(store.slot_directory("workspace-web-slot1")) / "slot.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red", "schema_version": 9}))
    grant = await claimed(coordinator, prefer=frozenset({"workspace-web-slot1"}))
    await give_back(coordinator, grant)
    assert json.loads(path.read_text())["colour"] == "red"


# Cancellation


async def cancel_at(turns: int, times: int, task: "asyncio.Task[Any]") -> Any:
    """Cancel a task after so many turns of the loop, so often, and return what it returned or None."""
    for _ in range(turns):
        await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    try:
        return await task
    except asyncio.CancelledError:
        return None


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("turns", range(12))
async def test_a_cancelled_claim_leaves_every_slot_as_it_was(
    coordinator: FileCoordinator, other: FileCoordinator, turns: int, times: int
) -> None:
    before = await coordinator.list_slots(REPO)
    for _ in range(5):
        grant = await cancel_at(turns, times, asyncio.create_task(claim(coordinator)))
        if grant is not None:
            await give_back(coordinator, grant)
    after = await other.list_slots(REPO)
    assert [(slot.state, slot.seal, slot.lease) for slot in after] == [
        (slot.state, slot.seal, slot.lease) for slot in before
    ]
    assert await claim(other) is not None
    assert await claim(other) is not None


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


@pytest.mark.parametrize("turns", range(10))
async def test_cancelled_maintenance_holds_nothing(coordinator: FileCoordinator, turns: int) -> None:
    grant = await claimed(coordinator)
    await coordinator.abandon_hold(grant)
    attempts: list[Callable[[], Any]] = [
        lambda: coordinator.take("workspace-web-slot2", states={SlotState.AVAILABLE}),
        lambda: coordinator.recover_orphan(grant.slot.slot_id),
    ]
    for attempt in attempts:
        hold: Hold | None = await cancel_at(turns, 2, asyncio.create_task(attempt()))
        if hold is not None:
            await coordinator.abandon_hold(hold)
    assert await coordinator.take("workspace-web-slot2", states={SlotState.AVAILABLE}) is not None
    assert await coordinator.recover_orphan(grant.slot.slot_id) is not None


@pytest.mark.parametrize("turns", range(0, 30, 3))
async def test_a_cancelled_creation_leaves_nothing(coordinator: FileCoordinator, store: SlotStore, turns: int) -> None:
    number = await coordinator.next_slot_number(REPO)
    hold = await cancel_at(turns, 2, asyncio.create_task(coordinator.create(make_slot(store, number))))
    if hold is None:
        assert len(await coordinator.list_slots(REPO)) == 2
        assert not await LockManager(store.locks_directory).is_locked(f"workspace-web-slot{number}")
    else:
        await settle(coordinator, hold)


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancelled_return_still_happens(coordinator: FileCoordinator, times: int) -> None:
    grant = await claimed(coordinator)
    await cancel_at(1, times, asyncio.create_task(coordinator.begin_return(grant)))
    assert await state_of(coordinator, grant.slot.slot_id) is SlotState.CLEANING
    clean = available(grant.slot, make_seal(), now())
    await cancel_at(1, times, asyncio.create_task(coordinator.finish(grant, clean)))
    assert await state_of(coordinator, grant.slot.slot_id) is SlotState.AVAILABLE
    assert await claim(coordinator) is not None
    assert await claim(coordinator) is not None


# Turns


async def test_the_oldest_ticket_is_first(coordinator: FileCoordinator, other: FileCoordinator, clock: Clock) -> None:
    assert not await coordinator.has_tickets(REPO)
    async with coordinator.ticket(REPO) as first:
        clock.seconds += 0.1
        async with other.ticket(REPO) as second:
            assert await coordinator.has_tickets(REPO)
            assert await first.is_first()
            assert not await second.is_first()
        async with other.ticket(REPO) as third:
            assert not await third.is_first()
    assert not await coordinator.has_tickets(REPO)


async def test_the_next_is_first_once_the_oldest_has_left(coordinator: FileCoordinator, clock: Clock) -> None:
    first = coordinator.ticket(REPO)
    await first.__aenter__()
    clock.seconds += 0.1
    async with coordinator.ticket(REPO) as second:
        assert not await second.is_first()
        await first.__aexit__(None, None, None)
        assert await second.is_first()
        assert not await first.is_first()


async def test_a_newcomer_stands_back_where_it_says_so(coordinator: FileCoordinator, other: FileCoordinator) -> None:
    async with other.ticket(REPO):
        assert await claim(coordinator, stand_back=True) is None
        assert await claim(coordinator) is not None
    assert await claim(coordinator, stand_back=True) is not None


async def test_who_is_silent_is_overtaken_and_keeps_its_place(
    coordinator: FileCoordinator, other: FileCoordinator, clock: Clock
) -> None:
    async with coordinator.ticket(REPO) as stopped:
        clock.seconds += 1.9
        async with other.ticket(REPO) as second:
            assert not await second.is_first()
            clock.seconds += 0.2
            assert await second.is_first()
            assert await stopped.is_first()
            assert not await second.is_first()
        clock.seconds += 2.1
        assert not await other.has_tickets(REPO)


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


async def test_there_are_no_tickets_for_a_pool_that_does_not_exist(tmp_path: Path) -> None:
    coordinator = make_coordinator(tmp_path)
    assert not await coordinator.has_tickets("nowhere")
    with pytest.raises(PoolNotFoundError):
        async with coordinator.ticket("nowhere"):
            pass
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("turns", range(0, 12, 2))
async def test_a_cancelled_draw_leaves_no_ticket(coordinator: FileCoordinator, tmp_path: Path, turns: int) -> None:
    async def queue() -> None:
        async with coordinator.ticket(REPO):
            pass

    for _ in range(5):
        await cancel_at(turns, 2, asyncio.create_task(queue()))
    assert list((tmp_path / REPO).glob("tickets/*")) == []
    assert not await coordinator.has_tickets(REPO)


async def test_who_was_served_waits_behind_everybody_who_waits(
    coordinator: FileCoordinator, other: FileCoordinator, tmp_path: Path, clock: Clock
) -> None:
    served: list[str] = []
    offices = {"one": coordinator, "two": other, "three": make_coordinator(tmp_path, clock=clock)}
    async with contextlib.AsyncExitStack() as stack:
        waiting = {}
        for name, using in offices.items():
            clock.seconds += 0.001
            waiting[name] = await stack.enter_async_context(using.ticket(REPO))
        for _ in range(9):
            (first,) = [name for name, ticket in waiting.items() if await ticket.is_first()]
            served.append(first)
            await waiting[first].__aexit__(None, None, None)
            clock.seconds += 0.001
            waiting[first] = await stack.enter_async_context(offices[first].ticket(REPO))
    assert served == ["one", "two", "three"] * 3
