"""What every coordinator promises: what each verb does, what it refuses, and what a cancelled one leaves."""

import asyncio
import contextlib
import gc
import os
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from repopool_async._clock import now
from repopool_async.coordination.base import HOST_UNREACHABLE, Coordinator, Grant, Hold, Want
from repopool_async.exceptions import LeaseLostError, PoolNotFoundError, SlotNotFoundError, StoreError
from repopool_async.models import Pool, Slot, SlotState
from repopool_async.slot_allocator import available, broken
from tests._postgres import eventually
from tests._workers import COMMIT, REPO, cancel_at, make_seal, settle
from tests.coordination.conftest import Events, Place

OTHER = "b" * 40
ALL_STATES = frozenset(SlotState)
ONE, TWO = "workspace-web-slot1", "workspace-web-slot2"


@pytest.fixture
async def coordinator(place: Place, events: Events) -> Coordinator:
    """A pool of two AVAILABLE slots."""
    await place.records.save_pool(Pool(repo_name=REPO, repo_url="u", num_slots=2, created_at=now()))
    made = await place.coordinator(on_event=lambda kind, fields: events.append((kind, fields)))
    for _ in range(2):
        await add_slot(made, place)
    return made


@pytest.fixture
async def other(place: Place, coordinator: Coordinator) -> Coordinator:
    """As another process would have it."""
    return await place.coordinator()


async def add_slot(coordinator: Coordinator, place: Place, **fields: Any) -> Slot:
    slot = attrs.evolve(place.slot(await coordinator.next_slot_number(REPO)), **fields)
    return await settle(coordinator, await coordinator.create(slot))


async def claim(coordinator: Coordinator, lease_id: str = "lease", **options: Any) -> Grant | None:
    return await coordinator.claim(REPO, **{"commit": COMMIT, "branch": "main", "lease_id": lease_id, **options})


async def claimed(coordinator: Coordinator, lease_id: str = "lease", **options: Any) -> Grant:
    grant = await claim(coordinator, lease_id, **options)
    assert grant is not None
    return grant


async def give_back(coordinator: Coordinator, grant: Grant) -> Slot:
    await coordinator.begin_return(grant)
    return await settle(coordinator, grant)


async def state_of(coordinator: Coordinator, slot_id: str) -> SlotState:
    return (await coordinator.get_slot(slot_id)).state


async def history_of(place: Place, slot_id: str) -> list[str]:
    return [record.event for record in await place.records.history(slot_id)]


async def test_a_claimed_slot_is_allocated_and_locked(coordinator: Coordinator, place: Place) -> None:
    grant = await claimed(coordinator, ref="main", metadata={"job": 7}, wait_seconds=0.5)
    slot = await coordinator.get_slot(grant.slot.slot_id)
    assert slot == grant.slot
    assert (slot.state, slot.token, slot.lease) == (SlotState.ALLOCATED, 1, grant.lease)
    assert (grant.lease.owner.pid, grant.lease.ref, grant.lease.metadata) == (os.getpid(), "main", {"job": 7})
    assert (grant.lease.commit, grant.lease.branch, grant.lease.is_detached) == (COMMIT, "main", False)
    assert grant.previous.state is SlotState.AVAILABLE
    assert await place.is_locked(slot.slot_id)
    assert await coordinator.is_held(grant)
    (record,) = await place.records.history(slot.slot_id)
    assert (record.event, record.lease_id, record.token, record.wait_seconds) == ("allocated", "lease", 1, 0.5)
    assert record.metadata == {"job": 7}


async def test_a_returned_slot_is_available_again_with_its_use_counted(coordinator: Coordinator, place: Place) -> None:
    grant = await claimed(coordinator)
    await place.advance(5)
    dirty = await coordinator.begin_return(grant)
    assert dirty.state is SlotState.CLEANING
    assert dirty.lease == grant.lease
    assert await place.is_locked(dirty.slot_id)
    clean = await coordinator.finish(grant, available(dirty, make_seal(OTHER), now()))
    assert await coordinator.get_slot(dirty.slot_id) == clean
    assert (clean.state, clean.lease, clean.allocation_count) == (SlotState.AVAILABLE, None, 1)
    assert clean.total_allocated_seconds == pytest.approx(5, abs=1)
    assert not await place.is_locked(dirty.slot_id)
    assert not await coordinator.is_held(grant)
    records = await place.records.history(dirty.slot_id)
    assert [record.event for record in records] == ["allocated", "released"]
    assert records[1].held_seconds == pytest.approx(5, abs=1)


async def hosts_claimed(coordinator: Coordinator, count: int, **options: Any) -> list[str]:
    """Claim so many slots, one after the other, and return their hosts."""
    return [(await claimed(coordinator, f"lease-{number}", **options)).slot.host_id for number in range(count)]


async def test_claims_go_to_the_host_with_the_largest_part_of_its_slots_free(place: Place) -> None:
    await place.records.save_pool(Pool(repo_name=REPO, repo_url="u", num_slots=6, created_at=now()))
    coordinator = await place.coordinator()
    for host_id in "aaaabb":
        await add_slot(coordinator, place, host_id=host_id)
    assert await hosts_claimed(coordinator, 6) == ["a", "b", "a", "a", "b", "a"]


async def test_claims_go_to_the_wanted_commit_first_and_to_the_emptiest_host_second(place: Place) -> None:
    await place.records.save_pool(Pool(repo_name=REPO, repo_url="u", num_slots=6, created_at=now()))
    coordinator = await place.coordinator()
    for host_id, commit in (("a", OTHER), ("a", OTHER), ("b", COMMIT), ("b", OTHER), ("c", COMMIT), ("c", COMMIT)):
        hold = await coordinator.create(
            attrs.evolve(place.slot(await coordinator.next_slot_number(REPO)), host_id=host_id)
        )
        await coordinator.finish(hold, available(hold.slot, make_seal(commit), now()))
    assert await hosts_claimed(coordinator, 6) == ["b", "c", "c", "a", "a", "b"]


async def test_an_excluded_host_is_none_to_choose(place: Place) -> None:
    await place.records.save_pool(Pool(repo_name=REPO, repo_url="u", num_slots=4, created_at=now()))
    coordinator = await place.coordinator()
    for host_id in "aabb":
        await add_slot(coordinator, place, host_id=host_id)
    assert await hosts_claimed(coordinator, 2, exclude_hosts=frozenset("a")) == ["b", "b"]
    assert await claim(coordinator, exclude_hosts=frozenset("a")) is None


async def test_who_works_on_which_slot_can_be_asked_of_all_at_once(
    coordinator: Coordinator, other: Coordinator
) -> None:
    ids = [slot.slot_id for slot in await coordinator.list_slots(REPO)]
    assert await coordinator.taken_among(ids) == set()
    one, two = await claimed(coordinator), await claimed(other)
    assert await coordinator.taken_among(ids) == {one.slot.slot_id, two.slot.slot_id}
    assert await other.taken_among([one.slot.slot_id]) == {one.slot.slot_id}
    await give_back(other, two)
    assert await coordinator.taken_among([*ids, "workspace-web-slot99"]) == {one.slot.slot_id}


async def test_every_lease_has_a_higher_token(coordinator: Coordinator, other: Coordinator) -> None:
    tokens: dict[str, list[int]] = {}
    for index in range(10):
        using = (coordinator, other)[index % 2]
        grant = await claimed(using)
        tokens.setdefault(grant.slot.slot_id, []).append(grant.token)
        await give_back(using, grant)
    assert all(given == sorted(set(given)) for given in tokens.values())


async def test_no_slot_is_given_twice(coordinator: Coordinator, other: Coordinator) -> None:
    grants = await asyncio.gather(*(claim(using, f"l{i}") for i, using in enumerate([coordinator, other] * 8)))
    given = [grant.slot.slot_id for grant in grants if grant is not None]
    assert sorted(given) == [ONE, TWO]
    assert await claim(coordinator) is None
    assert await claim(other) is None


async def test_a_slot_that_another_process_returned_is_seen_at_once(
    coordinator: Coordinator, other: Coordinator
) -> None:
    grants = [await claimed(coordinator), await claimed(coordinator)]
    assert await claim(other) is None
    await give_back(coordinator, grants[0])
    grant = await claimed(other)
    assert grant.slot.slot_id == grants[0].slot.slot_id


async def test_the_warmest_slot_is_claimed(coordinator: Coordinator) -> None:
    first = await claimed(coordinator)
    second = await claimed(coordinator)
    await coordinator.begin_return(first)
    await coordinator.finish(first, available(first.slot, make_seal(OTHER, "dev"), now()))
    await give_back(coordinator, second)
    grant = await claimed(coordinator, commit=OTHER, branch="dev")
    assert grant.slot.slot_id == first.slot.slot_id


async def test_slots_can_be_preferred_and_excluded(coordinator: Coordinator) -> None:
    one, two = ONE, TWO
    preferred = await claimed(coordinator, prefer=frozenset({two}))
    assert preferred.slot.slot_id == two
    assert await claim(coordinator, exclude=frozenset({one})) is None
    await give_back(coordinator, preferred)
    assert (await claimed(coordinator, exclude=frozenset({two}))).slot.slot_id == one


async def test_nothing_is_claimed_from_a_pool_that_does_not_exist(place: Place) -> None:
    assert await claim(await place.coordinator()) is None


async def test_a_held_record_can_be_written(coordinator: Coordinator, place: Place) -> None:
    grant = await claimed(coordinator)
    lease = attrs.evolve(grant.lease, branch="agent/x")
    written = await coordinator.update(grant, attrs.evolve(grant.slot, lease=lease, last_branch="agent/x"))
    assert grant.slot == written == await coordinator.get_slot(written.slot_id)


async def test_a_record_of_another_slot_or_token_is_refused(coordinator: Coordinator) -> None:
    grant, stranger = await claimed(coordinator), await claimed(coordinator)
    for wrong in (stranger.slot, attrs.evolve(grant.slot, token=99)):
        with pytest.raises(ValueError, match="is not the record"):
            await coordinator.update(grant, wrong)
        with pytest.raises(ValueError, match="is not the record"):
            await coordinator.finish(grant, wrong)


async def test_a_hold_cannot_end_half_way(coordinator: Coordinator) -> None:
    grant = await claimed(coordinator)
    dirty = await coordinator.begin_return(grant)
    unsealed = attrs.evolve(dirty, state=SlotState.AVAILABLE, seal=None)
    for wrong in (dirty, unsealed):
        with pytest.raises(ValueError, match="a hold ends with"):
            await coordinator.finish(grant, wrong)
    assert await coordinator.is_held(grant)


async def test_what_has_ended_cannot_be_ended_again(coordinator: Coordinator) -> None:
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


async def test_a_broken_slot_is_not_handed_out(coordinator: Coordinator) -> None:
    grant = await claimed(coordinator)
    dirty = await coordinator.begin_return(grant)
    await coordinator.finish(grant, broken(dirty, "disk on fire"))
    assert (await coordinator.get_slot(dirty.slot_id)).error == "disk on fire"
    second = await claimed(coordinator)
    assert await claim(coordinator) is None
    assert await coordinator.orphans(REPO) == []
    assert await coordinator.is_held(second)


async def test_a_hold_stands_where_its_end_cannot_be_written(coordinator: Coordinator, place: Place) -> None:
    grant = await claimed(coordinator)
    dirty = await coordinator.begin_return(grant)
    with pytest.raises(StoreError):
        await coordinator.finish(grant, available(attrs.evolve(dirty, extra={"x": object()}), make_seal(), now()))
    assert await coordinator.is_held(grant)
    assert await coordinator.get_slot(dirty.slot_id) == dirty
    await settle(coordinator, grant)


async def test_a_grant_that_is_lost_sight_of_is_an_orphan(coordinator: Coordinator, other: Coordinator) -> None:
    grant = await claimed(coordinator)
    slot_id = grant.slot.slot_id
    assert await other.orphans(REPO) == []
    del grant
    gc.collect()
    (orphan,) = await eventually(lambda: other.orphans(REPO))
    assert orphan.slot_id == slot_id


async def test_what_a_holder_drops_is_an_orphan_and_not_handed_out(
    coordinator: Coordinator, other: Coordinator, place: Place
) -> None:
    leased, cleaned = await claimed(coordinator, "one"), await claimed(coordinator, "two")
    await coordinator.begin_return(cleaned)
    assert await other.orphans(REPO) == []
    await place.advance(3)
    await coordinator.abandon_hold(leased)
    await coordinator.abandon_hold(cleaned)
    assert await claim(other) is None
    found = await other.orphans(REPO)
    assert [slot.slot_id for slot in found] == [ONE, TWO]
    hold = await other.recover_orphan(leased.slot.slot_id)
    assert hold is not None
    assert (hold.slot.state, hold.token) == (SlotState.CLEANING, leased.token + 1)
    assert hold.slot.lease == leased.lease, "salvage and history need it"
    assert hold.slot.total_allocated_seconds == pytest.approx(3, abs=1)
    assert [slot.slot_id for slot in await other.orphans(REPO)] == [cleaned.slot.slot_id]
    await settle(other, hold)
    assert await history_of(place, leased.slot.slot_id) == ["allocated", "recovered"]
    assert (await claimed(coordinator)).token == leased.token + 2


async def test_an_orphan_is_recovered_once(coordinator: Coordinator, other: Coordinator) -> None:
    grant = await claimed(coordinator)
    await coordinator.abandon_hold(grant)
    holds = await asyncio.gather(*(using.recover_orphan(grant.slot.slot_id) for using in [coordinator, other] * 5))
    assert sum(hold is not None for hold in holds) == 1


async def test_what_somebody_holds_is_not_recovered(coordinator: Coordinator, other: Coordinator) -> None:
    grant = await claimed(coordinator)
    assert await other.recover_orphan(grant.slot.slot_id) is None
    await coordinator.begin_return(grant)
    assert await other.recover_orphan(grant.slot.slot_id) is None
    await settle(coordinator, grant)
    assert await other.recover_orphan(grant.slot.slot_id) is None
    assert await coordinator.orphans(REPO) == []


async def test_a_detached_lease_is_held_by_its_record(
    coordinator: Coordinator, other: Coordinator, place: Place
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    lease = await coordinator.detach(grant)
    assert lease.expires_boottime == pytest.approx(place.now() + 60, abs=1)
    assert not await place.is_locked(grant.slot.slot_id)
    assert await coordinator.is_held(grant)
    second = await claimed(other)
    assert await claim(other) is None
    assert await other.orphans(REPO) == []
    assert await other.is_held(second)
    assert await other.recover_orphan(grant.slot.slot_id) is None
    assert await other.take(grant.slot.slot_id, states=ALL_STATES) is None


async def test_a_lease_that_is_detached_again_lasts_no_longer_than_was_asked(
    coordinator: Coordinator, place: Place
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    for _ in range(3):
        await place.advance(20)
        lease = await coordinator.detach(grant)
        assert lease.expires_boottime == pytest.approx(place.now() + 60, abs=1)


async def test_a_detached_lease_may_be_given_back_by_whoever_has_its_token(
    coordinator: Coordinator, other: Coordinator, place: Place
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
    assert await history_of(place, grant.slot.slot_id) == ["allocated", "released"]


async def test_the_lessee_itself_gives_a_detached_lease_back(coordinator: Coordinator) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    await coordinator.detach(grant)
    assert (await coordinator.begin_return(grant)).state is SlotState.CLEANING
    assert await coordinator.is_held(grant) is False, "the lease has ended, only the slot is held"
    assert (await settle(coordinator, grant)).state is SlotState.AVAILABLE


async def test_before_it_is_detached_a_lease_can_be_prepared_and_returned_as_any(
    coordinator: Coordinator, place: Place
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    assert await place.is_locked(grant.slot.slot_id)
    await coordinator.update(grant, attrs.evolve(grant.slot, last_branch="x"))
    assert (await give_back(coordinator, grant)).last_branch == "x"


async def test_a_detached_lease_that_its_process_never_let_go_of_can_be_given_back_elsewhere(
    coordinator: Coordinator, other: Coordinator
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    hold = await other.release_detached(grant.slot.slot_id, grant.token)
    with pytest.raises(LeaseLostError):
        await coordinator.begin_return(grant)
    await settle(other, hold)


async def test_an_old_detached_lease_writes_nothing_into_the_next_one(
    coordinator: Coordinator, other: Coordinator
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


async def test_renewing_moves_the_expiry(coordinator: Coordinator, other: Coordinator, place: Place) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    await coordinator.detach(grant)
    await place.advance(50)
    lease = await other.renew(grant.slot.slot_id, grant.token, 100)
    assert lease.expires_boottime == pytest.approx(place.now() + 100, abs=1)
    assert await other.renew(grant.slot.slot_id, grant.token, None) == lease
    await place.advance(99)
    assert await other.orphans(REPO) == []
    written = await coordinator.update(grant, attrs.evolve(grant.slot, last_branch="x"))
    assert written.lease == lease, "an expiry that was renewed meanwhile stays"
    with pytest.raises(LeaseLostError):
        await other.renew(grant.slot.slot_id, grant.token + 1, 100)


async def test_an_expired_lease_is_an_orphan_and_cannot_be_renewed(
    coordinator: Coordinator,
    place: Place,
    events: Events,
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    await coordinator.detach(grant)
    await place.advance(61)
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
    assert await history_of(place, grant.slot.slot_id) == ["allocated", "expired"]
    assert [(kind, fields["lease_id"]) for kind, fields in events] == [("lease.expired", "lease")]


async def test_an_expired_lease_is_taken_from_a_process_that_still_locks_it(
    coordinator: Coordinator, other: Coordinator, place: Place
) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    await place.advance(61)
    hold = await other.recover_orphan(grant.slot.slot_id)
    assert hold is not None
    with pytest.raises(LeaseLostError):
        await coordinator.begin_return(grant)
    await settle(other, hold)
    assert await claim(coordinator) is not None


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf")])
async def test_a_time_that_is_none_is_refused(coordinator: Coordinator, ttl: float) -> None:
    with pytest.raises(ValueError, match="positive, finite"):
        await claim(coordinator, detached_ttl=ttl)
    grant = await claimed(coordinator, detached_ttl=60)
    with pytest.raises(ValueError, match="positive, finite"):
        await coordinator.renew(grant.slot.slot_id, grant.token, ttl)


async def test_a_lease_of_a_process_has_no_expiry_to_renew_and_is_not_released_by_token(
    coordinator: Coordinator, other: Coordinator
) -> None:
    grant = await claimed(coordinator)
    assert await other.renew(grant.slot.slot_id, grant.token, 60) == grant.lease
    with pytest.raises(LeaseLostError):
        await other.release_detached(grant.slot.slot_id, grant.token)
    with pytest.raises(ValueError, match="not detached"):
        await coordinator.detach(grant)
    assert await coordinator.is_held(grant)


@pytest.mark.parametrize("is_cleaning", [False, True])
async def test_forcing_takes_a_slot_from_its_holder(
    coordinator: Coordinator,
    other: Coordinator,
    place: Place,
    events: Events,
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
    assert await coordinator.get_slot(forced.slot_id) == forced
    hold = await coordinator.recover_orphan(forced.slot_id)
    assert hold is not None
    await other.abandon_hold(grant)
    assert await coordinator.is_held(hold)
    await settle(coordinator, hold)
    assert (await history_of(place, forced.slot_id))[-2:] == ["forced", "recovered"]
    assert [(kind, fields["lease_id"]) for kind, fields in events] == [("lease.forced", "lease")]


async def test_forcing_ends_a_detached_lease(coordinator: Coordinator) -> None:
    grant = await claimed(coordinator, detached_ttl=60)
    await coordinator.detach(grant)
    await coordinator.force_unlock(grant.slot.slot_id)
    assert not await coordinator.is_held(grant)
    assert [slot.slot_id for slot in await coordinator.orphans(REPO)] == [grant.slot.slot_id]


async def test_forcing_what_nobody_holds_changes_nothing(coordinator: Coordinator) -> None:
    slot_id = ONE
    before = await coordinator.get_slot(slot_id)
    assert await coordinator.force_unlock(slot_id) == before
    assert await coordinator.get_slot(slot_id) == before


async def test_forcing_maintenance_sends_an_available_slot_to_recovery_and_keeps_a_quarantined_one(
    coordinator: Coordinator, other: Coordinator
) -> None:
    one, two = ONE, TWO
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


async def test_a_slot_can_be_held_for_maintenance(coordinator: Coordinator, other: Coordinator) -> None:
    slot_id = ONE
    hold = await coordinator.take(slot_id, states={SlotState.AVAILABLE})
    assert hold is not None
    assert (hold.slot.state, hold.token) == (SlotState.AVAILABLE, 0)
    assert await other.take(slot_id, states=ALL_STATES) is None
    assert (await claimed(other)).slot.slot_id != slot_id
    assert await claim(other) is None
    await coordinator.abandon_hold(hold)
    assert (await claimed(other)).slot.slot_id == slot_id


async def test_maintenance_may_mark_the_slot_before_it_touches_it(coordinator: Coordinator) -> None:
    slot_id = ONE
    hold = await coordinator.take(slot_id, states={SlotState.AVAILABLE}, raise_token=True, becomes=SlotState.CLEANING)
    assert hold is not None
    assert (hold.slot.state, hold.token) == (SlotState.CLEANING, 1)
    assert await coordinator.get_slot(slot_id) == hold.slot
    await coordinator.abandon_hold(hold)
    assert [slot.slot_id for slot in await coordinator.orphans(REPO)] == [slot_id]


async def test_only_the_states_that_were_named_are_taken(coordinator: Coordinator) -> None:
    assert await coordinator.take(ONE, states={SlotState.ERROR}) is None
    grant = await claimed(coordinator)
    assert await coordinator.take(grant.slot.slot_id, states=ALL_STATES) is None
    await coordinator.abandon_hold(grant)
    hold = await coordinator.take(grant.slot.slot_id, states=ALL_STATES)
    assert hold is not None
    await coordinator.abandon_hold(hold)


async def test_what_does_not_exist_is_not_found(coordinator: Coordinator) -> None:
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


async def test_a_new_slot_is_held_until_it_is_finished(
    coordinator: Coordinator, other: Coordinator, place: Place
) -> None:
    number = await coordinator.next_slot_number(REPO)
    hold = await coordinator.create(place.slot(number))
    assert await state_of(other, hold.slot.slot_id) is SlotState.CLEANING
    assert await other.orphans(REPO) == []
    await settle(coordinator, hold)
    assert [slot.number for slot in await other.list_slots(REPO)] == [1, 2, 3]


async def test_a_slot_whose_maker_died_is_an_orphan(coordinator: Coordinator, place: Place) -> None:
    hold = await coordinator.create(place.slot(await coordinator.next_slot_number(REPO)))
    await coordinator.abandon_hold(hold)
    (orphan,) = await coordinator.orphans(REPO)
    recovered = await coordinator.recover_orphan(orphan.slot_id)
    assert recovered is not None
    assert (recovered.slot.lease, recovered.token) == (None, 1)


async def test_a_slot_is_made_once(coordinator: Coordinator, place: Place) -> None:
    with pytest.raises(ValueError, match="exists already"):
        await coordinator.create(place.slot(1))
    with pytest.raises(ValueError, match="is CLEANING until"):
        await coordinator.create(attrs.evolve(place.slot(3), state=SlotState.AVAILABLE))
    assert await claim(coordinator) is not None


async def test_numbers_are_never_given_twice(coordinator: Coordinator, place: Place) -> None:
    numbers = await asyncio.gather(*(coordinator.next_slot_number(REPO) for _ in range(8)))
    assert sorted(numbers) == list(range(3, 11))
    slot = await add_slot(coordinator, place)
    hold = await coordinator.take(slot.slot_id, states=ALL_STATES)
    assert hold is not None
    await coordinator.delete(hold)
    pool = await place.records.load_pool(REPO)
    await place.records.save_pool(
        attrs.evolve(pool, next_slot_number=1)
    )  # written by somebody who had read it long ago
    assert await coordinator.next_slot_number(REPO) == slot.number + 1
    with pytest.raises(PoolNotFoundError):
        await coordinator.next_slot_number("nowhere")


async def test_a_deleted_slot_is_gone_for_everybody(coordinator: Coordinator, other: Coordinator, place: Place) -> None:
    slot_id = ONE
    assert len(await other.list_slots(REPO)) == 2
    hold = await coordinator.take(slot_id, states=ALL_STATES)
    assert hold is not None
    await coordinator.delete(hold)
    with pytest.raises(SlotNotFoundError):
        await other.get_slot(slot_id)
    with pytest.raises(SlotNotFoundError):
        await place.records.history(slot_id)
    assert not await place.is_locked(slot_id)
    assert (await claimed(other)).slot.slot_id != slot_id
    assert await claim(other) is None
    assert [slot.number for slot in await other.list_slots(REPO)] == [2]


async def test_a_slot_that_was_taken_away_is_not_deleted(coordinator: Coordinator, other: Coordinator) -> None:
    slot_id = ONE
    hold = await coordinator.take(slot_id, states=ALL_STATES)
    assert hold is not None
    await other.force_unlock(slot_id)
    with pytest.raises(LeaseLostError):
        await coordinator.delete(hold)
    assert len(await coordinator.list_slots(REPO)) == 2


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 6, 9, 14])
async def test_a_cancelled_claim_leaves_every_slot_as_it_was(
    coordinator: Coordinator, other: Coordinator, turns: int, times: int
) -> None:
    before = await coordinator.list_slots(REPO)
    for _ in range(3):
        grant = await cancel_at(turns, times, asyncio.create_task(claim(coordinator)))
        if grant is not None:
            await give_back(coordinator, grant)
    after = await other.list_slots(REPO)
    assert [(slot.state, slot.seal, slot.lease) for slot in after] == [
        (slot.state, slot.seal, slot.lease) for slot in before
    ]
    assert await claim(other) is not None
    assert await claim(other) is not None


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 9])
async def test_cancelled_maintenance_holds_nothing(coordinator: Coordinator, turns: int) -> None:
    grant = await claimed(coordinator, prefer=frozenset({ONE}))
    await coordinator.abandon_hold(grant)
    attempts: list[Callable[[], Any]] = [
        lambda: coordinator.take(TWO, states={SlotState.AVAILABLE}),
        lambda: coordinator.recover_orphan(grant.slot.slot_id),
    ]
    for attempt in attempts:
        hold: Hold | None = await cancel_at(turns, 2, asyncio.create_task(attempt()))
        if hold is not None:
            await coordinator.abandon_hold(hold)
    assert await coordinator.take(TWO, states={SlotState.AVAILABLE}) is not None
    assert await coordinator.recover_orphan(grant.slot.slot_id) is not None


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancelled_return_still_happens(coordinator: Coordinator, times: int) -> None:
    grant = await claimed(coordinator)
    await cancel_at(1, times, asyncio.create_task(coordinator.begin_return(grant)))
    assert await state_of(coordinator, grant.slot.slot_id) is SlotState.CLEANING
    clean = available(grant.slot, make_seal(), now())
    await cancel_at(1, times, asyncio.create_task(coordinator.finish(grant, clean)))
    assert await state_of(coordinator, grant.slot.slot_id) is SlotState.AVAILABLE
    assert await claim(coordinator) is not None
    assert await claim(coordinator) is not None


async def test_the_oldest_ticket_is_first(coordinator: Coordinator, other: Coordinator, place: Place) -> None:
    assert not await coordinator.has_tickets(REPO)
    async with coordinator.ticket(REPO) as first:
        await place.advance(0.1)
        async with other.ticket(REPO) as second:
            assert await coordinator.has_tickets(REPO)
            assert await first.is_first()
            assert not await second.is_first()
        async with other.ticket(REPO) as third:
            assert not await third.is_first()
    assert not await coordinator.has_tickets(REPO)


async def test_the_next_is_first_once_the_oldest_has_left(coordinator: Coordinator, place: Place) -> None:
    context = coordinator.ticket(REPO)
    first = await context.__aenter__()
    await place.advance(0.1)
    async with coordinator.ticket(REPO) as second:
        assert not await second.is_first()
        await context.__aexit__(None, None, None)
        assert await second.is_first()
        assert not await first.is_first()


async def test_a_newcomer_stands_back_where_it_says_so(coordinator: Coordinator, other: Coordinator) -> None:
    async with other.ticket(REPO):
        assert await claim(coordinator, stand_back=True) is None
        assert await claim(coordinator) is not None
    assert await claim(coordinator, stand_back=True) is not None


async def test_who_is_silent_is_overtaken_and_keeps_its_place(
    coordinator: Coordinator, other: Coordinator, place: Place
) -> None:
    async with coordinator.ticket(REPO) as stopped:
        await place.advance(place.silence_seconds / 2)  # real time passes too
        async with other.ticket(REPO) as second:
            assert not await second.is_first()
            await place.advance(place.silence_seconds / 2 + 0.1)
            assert await second.is_first()
            assert await stopped.is_first()
            assert not await second.is_first()
        await place.advance(place.silence_seconds + 0.1)
        assert not await other.has_tickets(REPO)


async def test_there_are_no_tickets_for_a_pool_that_does_not_exist(place: Place) -> None:
    coordinator = await place.coordinator()
    assert not await coordinator.has_tickets("nowhere")
    with pytest.raises(PoolNotFoundError):
        async with coordinator.ticket("nowhere"):
            pass
    assert await place.records.list_pools() == []


async def test_who_was_served_waits_behind_everybody_who_waits(
    coordinator: Coordinator, other: Coordinator, place: Place
) -> None:
    served: list[str] = []
    offices = {"one": coordinator, "two": other, "three": await place.coordinator()}
    async with contextlib.AsyncExitStack() as outermost:
        stacks = {name: await outermost.enter_async_context(contextlib.AsyncExitStack()) for name in offices}
        waiting = {}
        for name, using in offices.items():
            await place.advance(0.001)
            waiting[name] = await stacks[name].enter_async_context(using.ticket(REPO))
        for _ in range(6):
            (first,) = [name for name, ticket in waiting.items() if await ticket.is_first()]
            served.append(first)
            await stacks[first].aclose()
            await place.advance(0.001)
            waiting[first] = await stacks[first].enter_async_context(offices[first].ticket(REPO))
    assert served == ["one", "two", "three"] * 2


# Tickets for something


def want(lease_id: str, **options: Any) -> Want:
    return Want(**{"repo_name": REPO, "lease_id": lease_id, "commit": COMMIT, "branch": "main", **options})


async def test_a_ticket_is_served_in_turn(coordinator: Coordinator, other: Coordinator, place: Place) -> None:
    grants = [await claimed(coordinator), await claimed(coordinator)]
    async with coordinator.ticket(REPO, want("first", ref="main", wait_seconds=1.0)) as first:
        await place.advance(0.1)
        async with other.ticket(REPO, want("second")) as second:
            assert await first.claim() is None
            assert await second.claim() is None
            await give_back(other, grants[0])
            assert await second.claim() is None
            grant = await first.claim()
            assert grant is not None
            assert (grant.lease.lease_id, grant.lease.ref, grant.token) == ("first", "main", grants[0].token + 1)
            assert await coordinator.get_slot(grant.slot.slot_id) == grant.slot
        assert await coordinator.is_held(grant)
    assert await coordinator.is_held(grant), "what was granted does not go with the ticket"
    (record,) = await place.records.history(grant.slot.slot_id, limit=1)
    assert (record.event, record.lease_id) == ("allocated", "first")
    assert (record.wait_seconds or 0) >= 1.0


async def test_a_ticket_that_is_served_stops_nobody(coordinator: Coordinator, other: Coordinator) -> None:
    async with coordinator.ticket(REPO, want("first")) as ticket:
        assert await ticket.claim() is not None
    assert not await other.has_tickets(REPO)
    assert await claim(other, stand_back=True) is not None


async def test_a_ticket_for_nothing_claims_nothing(coordinator: Coordinator) -> None:
    async with coordinator.ticket(REPO) as ticket:
        with pytest.raises(ValueError, match="drawn for nothing"):
            await ticket.claim()


async def test_a_ticket_gets_only_what_it_asks_for(coordinator: Coordinator, other: Coordinator, place: Place) -> None:
    grants = [await claimed(coordinator), await claimed(coordinator)]
    ids = [grant.slot.slot_id for grant in grants]
    async with coordinator.ticket(REPO, want("picky", exclude=frozenset({ids[0]}))) as picky:
        assert await picky.claim() is None
        await give_back(coordinator, grants[0])
        assert await picky.claim() is None
        await give_back(coordinator, grants[1])
        grant = await picky.claim()
        assert grant is not None
        assert grant.slot.slot_id == ids[1]


@pytest.mark.parametrize("turns", range(0, 12, 2))
async def test_a_cancelled_draw_leaves_no_ticket_and_holds_nothing(
    coordinator: Coordinator, other: Coordinator, turns: int
) -> None:
    async def queue() -> None:
        async with coordinator.ticket(REPO, want("late")) as ticket:
            await ticket.claim()
            raise asyncio.CancelledError

    for _ in range(3):
        await cancel_at(turns, 2, asyncio.create_task(queue()))
    gc.collect()
    assert not await other.has_tickets(REPO)


# Hosts


async def test_slots_can_be_asked_for_by_label_and_hosts_shut_out(coordinator: Coordinator, place: Place) -> None:
    big = await add_slot(coordinator, place, host_id="far", labels=("big", "fast"))
    grant = await claimed(coordinator, labels=frozenset({"big"}))
    assert grant.slot.slot_id == big.slot_id
    assert await claim(coordinator, labels=frozenset({"big"})) is None
    await give_back(coordinator, grant)
    assert await claim(coordinator, labels=frozenset({"big", "slow"})) is None
    assert await claim(coordinator, labels=frozenset({"big"}), exclude_hosts=frozenset({"far"})) is None
    near = [await claimed(coordinator, exclude_hosts=frozenset({"far"})) for _ in range(2)]
    assert {each.slot.slot_id for each in near} == {ONE, TWO}
    assert await claim(coordinator, exclude_hosts=frozenset({"far"})) is None


async def test_the_slots_of_an_unreachable_host_are_lost_and_come_back_with_it(
    coordinator: Coordinator, other: Coordinator, place: Place
) -> None:
    ids = [(await add_slot(coordinator, place, host_id="far")).slot_id for _ in range(3)]
    near = frozenset({ONE, TWO})
    leased = await claimed(coordinator, exclude=near)
    ill = await coordinator.take(ids[2], states=ALL_STATES)
    assert ill is not None
    await coordinator.finish(ill, broken(ill.slot, "disk on fire"))
    assert sorted(await other.park_host("far")) == ids[:2]
    assert await other.park_host("far") == []
    parked = await other.get_slot(leased.slot.slot_id)
    assert (parked.state, parked.error, parked.token) == (SlotState.ERROR, HOST_UNREACHABLE, leased.token + 1)
    assert (parked.lease, parked.unsaved) == (leased.lease, "forced")
    assert not await coordinator.is_held(leased)
    with pytest.raises(LeaseLostError):
        await coordinator.begin_return(leased)
    assert await claim(coordinator, exclude=near) is None
    assert await coordinator.orphans(REPO) == []
    assert await coordinator.take(parked.slot_id, states=ALL_STATES) is None
    assert sorted(await other.unpark_host("far")) == ids[:2]
    assert [slot.slot_id for slot in await other.orphans(REPO)] == ids[:2]
    assert (await other.get_slot(ids[2])).error == "disk on fire"
    for slot_id in ids[:2]:
        hold = await other.recover_orphan(slot_id)
        assert hold is not None
        await settle(other, hold)
    assert await claim(coordinator, exclude=near) is not None
    assert (await history_of(place, leased.slot.slot_id))[:2] == ["allocated", "forced"]


async def test_a_holder_that_cannot_reach_its_host_parks_the_slot_itself(coordinator: Coordinator) -> None:
    grant = await claimed(coordinator)
    dirty = await coordinator.begin_return(grant)
    await coordinator.finish(grant, broken(dirty, HOST_UNREACHABLE))
    assert await coordinator.take(dirty.slot_id, states={SlotState.ERROR}) is None
    assert await coordinator.unpark_host(dirty.host_id) == [dirty.slot_id]


# What hosts and watchers ask


async def test_a_token_is_raised_above_what_the_host_has_seen(coordinator: Coordinator, other: Coordinator) -> None:
    grant = await claimed(coordinator)
    assert await coordinator.raise_token(grant, 40) == 41
    assert (grant.token, grant.slot.token, grant.lease.token) == (41, 41, 41)
    assert await other.get_slot(grant.slot.slot_id) == grant.slot
    assert await coordinator.is_held(grant)
    assert await coordinator.raise_token(grant, 3) == 42, "never lower"
    await give_back(coordinator, grant)
    assert (await claimed(other, prefer=frozenset({grant.slot.slot_id}))).token == 43


async def test_no_token_is_raised_of_what_was_taken_away(coordinator: Coordinator, other: Coordinator) -> None:
    grant = await claimed(coordinator)
    await other.force_unlock(grant.slot.slot_id)
    with pytest.raises(LeaseLostError):
        await coordinator.raise_token(grant, 40)
    assert (await other.get_slot(grant.slot.slot_id)).token == grant.token + 1


async def test_what_was_lost_is_told_of_many_at_once(coordinator: Coordinator, other: Coordinator) -> None:
    kept, lost = await claimed(coordinator), await claimed(coordinator)
    assert await coordinator.lost_among([kept, lost]) == []
    await other.force_unlock(lost.slot.slot_id)
    assert await coordinator.lost_among([kept, lost]) == [lost]
    assert await coordinator.lost_among([]) == []
