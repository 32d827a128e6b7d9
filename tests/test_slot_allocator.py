"""Which slot is chosen, what its record becomes, and what is counted."""

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repopool_async._identity import current_owner
from repopool_async.exceptions import SlotAllocationError
from repopool_async.models import AllocationMetrics, Lease, Slot, SlotState, make_slot_id
from repopool_async.slot_allocator import (
    RECENT_WAITS,
    SlotAllocator,
    allocated,
    available,
    broken,
    cleaning,
    order_candidates,
)
from repopool_async.slot_store import SlotStore
from tests._workers import REPO, make_seal

WANTED = "b" * 40
OTHER = "a" * 40
EPOCH = datetime(2024, 1, 1, tzinfo=UTC)


def make_slot(
    number: int,
    *,
    commit: str | None = OTHER,
    branch: str | None = None,
    last_branch: str | None = None,
    used: int | None = None,
    state: SlotState = SlotState.AVAILABLE,
    path: str = "/tree",
) -> Slot:
    return Slot(
        slot_id=make_slot_id(REPO, number),
        repo_name=REPO,
        repo_url="u",
        path=path,
        created_at=EPOCH,
        state=state,
        seal=make_seal(commit, branch) if commit is not None else None,
        last_branch=last_branch,
        last_used_at=EPOCH + timedelta(seconds=used) if used is not None else None,
    )


def make_lease(token: int, *, branch: str | None = "main") -> Lease:
    return Lease(
        lease_id=f"lease-{token}",
        token=token,
        owner=current_owner(),
        acquired_at=EPOCH,
        acquired_boottime=1.0,
        branch=branch,
    )


def numbers(slots: list[Slot]) -> list[int]:
    return [slot.number for slot in slots]


# Order


def test_among_equals_the_least_loaded_host_comes_first() -> None:
    slots = [
        attrs.evolve(make_slot(1, used=9), host_id="a"),
        attrs.evolve(make_slot(2, state=SlotState.ALLOCATED), host_id="a"),
        attrs.evolve(make_slot(3, used=1), host_id="b"),
        attrs.evolve(make_slot(4, used=2), host_id="b"),
        attrs.evolve(make_slot(5, commit=WANTED), host_id="a"),
    ]
    order = [slot.number for slot in order_candidates(slots, commit=WANTED, branch=None)]
    assert order == [5, 4, 3, 1]


def test_the_slot_that_stands_at_the_commit_comes_first_then_the_branch_then_the_most_recently_used() -> None:
    slots = [
        make_slot(1, used=50),
        make_slot(2, used=60),
        make_slot(3, branch="main", used=1),
        make_slot(4, last_branch="main", used=2),
        make_slot(5, commit=WANTED, branch="other", used=3),
        make_slot(6, commit=WANTED, branch="main", used=0),
    ]
    assert numbers(order_candidates(slots, commit=WANTED, branch="main")) == [6, 5, 4, 3, 2, 1]


def test_a_detached_slot_is_best_for_a_detached_lease() -> None:
    slots = [make_slot(1, commit=WANTED, branch="main", used=9), make_slot(2, commit=WANTED, branch=None, used=1)]
    assert numbers(order_candidates(slots, commit=WANTED, branch=None)) == [2, 1]


def test_without_a_wish_the_most_recently_used_comes_first_and_the_never_used_last() -> None:
    slots = [make_slot(1), make_slot(2, used=1), make_slot(3, used=3), make_slot(4, used=2), make_slot(5)]
    assert numbers(order_candidates(slots, commit=None, branch=None)) == [3, 4, 2, 1, 5]


def test_only_sealed_available_slots_are_candidates() -> None:
    slots = [make_slot(number, state=state) for number, state in enumerate(SlotState, start=1)]
    unsealed = make_slot(9, commit=None)
    assert [slot.state for slot in order_candidates([*slots, unsealed], commit=None, branch=None)] == ["available"]


_slots = st.builds(
    make_slot,
    st.integers(1, 10_000),
    commit=st.sampled_from([WANTED, OTHER, None]),
    branch=st.sampled_from(["main", "other", None]),
    last_branch=st.sampled_from(["main", "other", None]),
    used=st.none() | st.integers(0, 5),
    state=st.sampled_from([SlotState.AVAILABLE, SlotState.ALLOCATED, SlotState.ERROR]),
)
_pools = st.lists(_slots, max_size=12, unique_by=lambda slot: slot.slot_id)


@given(_pools, st.sampled_from([WANTED, None]), st.sampled_from(["main", None]), st.randoms())
def test_the_order_depends_on_the_slots_alone(
    slots: list[Slot], commit: str | None, branch: str | None, chance: Random
) -> None:
    ordered = order_candidates(slots, commit=commit, branch=branch)
    shuffled = list(slots)
    chance.shuffle(shuffled)
    assert order_candidates(shuffled, commit=commit, branch=branch) == ordered
    assert {slot.slot_id for slot in ordered} == {
        slot.slot_id for slot in slots if slot.state is SlotState.AVAILABLE and slot.seal is not None
    }


@given(_pools)
def test_no_slot_is_behind_one_that_needs_more_work(slots: list[Slot]) -> None:
    def work(slot: Slot) -> int:
        assert slot.seal is not None
        if slot.seal.commit == WANTED:
            return 0
        return 1 if "main" in (slot.seal.branch, slot.last_branch) else 2

    ordered = order_candidates(slots, commit=WANTED, branch="main")
    assert all(work(first) <= work(second) for first, second in itertools.pairwise(ordered))


# Transitions


def test_allocating_notes_the_lease_and_keeps_what_it_began_from() -> None:
    slot = attrs.evolve(make_slot(1), token=4, allocation_count=7)
    taken = allocated(slot, make_lease(5), EPOCH)
    assert (taken.state, taken.token, taken.lease) == (SlotState.ALLOCATED, 5, make_lease(5))
    assert (taken.last_used_at, taken.last_branch, taken.allocation_count) == (EPOCH, "main", 8)
    assert taken.seal == slot.seal


@pytest.mark.parametrize("token", [3, 4])
def test_a_token_that_is_not_newer_is_refused(token: int) -> None:
    with pytest.raises(SlotAllocationError, match=f"token {token} is not newer than 4") as caught:
        allocated(attrs.evolve(make_slot(1), token=4), make_lease(token), EPOCH)
    assert (caught.value.repo_name, caught.value.slot_id) == (REPO, "workspace-web-slot1")


@pytest.mark.parametrize("state", [SlotState.ALLOCATED, SlotState.CLEANING, SlotState.ERROR])
def test_only_an_available_slot_can_be_allocated(state: SlotState) -> None:
    with pytest.raises(SlotAllocationError, match=f"workspace-web-slot1: is {state}"):
        allocated(make_slot(1, state=state), make_lease(1), EPOCH)
    with pytest.raises(SlotAllocationError):
        allocated(make_slot(1, commit=None), make_lease(1), EPOCH)


def test_cleaning_keeps_the_lease_and_the_seal_readable() -> None:
    taken = allocated(make_slot(1), make_lease(1), EPOCH)
    dirty = cleaning(taken)
    assert attrs.evolve(dirty, state=SlotState.ALLOCATED) == taken


def test_a_cleaned_slot_is_available_with_its_new_seal() -> None:
    dirty = cleaning(allocated(make_slot(1), make_lease(1), EPOCH))
    later = EPOCH + timedelta(hours=1)
    clean = available(dirty, make_seal(WANTED), later)
    assert (clean.state, clean.lease, clean.seal, clean.error) == (
        SlotState.AVAILABLE,
        None,
        make_seal(WANTED),
        None,
    )
    assert (clean.token, clean.last_used_at, clean.last_branch) == (1, later, "main")


def test_a_slot_that_was_only_made_or_mended_counts_as_unused() -> None:
    assert available(make_slot(1, state=SlotState.CLEANING), make_seal(), EPOCH).last_used_at is None
    assert available(broken(make_slot(1), "bad"), make_seal(), EPOCH).error is None


def test_a_quarantined_slot_says_why() -> None:
    bad = broken(cleaning(allocated(make_slot(1), make_lease(1), EPOCH)), "disk full")
    assert (bad.state, bad.error, bad.lease, bad.token) == (SlotState.ERROR, "disk full", None, 1)


# The allocator


@pytest.fixture
def store(tmp_path: Path) -> SlotStore:
    return SlotStore(tmp_path)


@pytest.fixture
def allocator(store: SlotStore) -> SlotAllocator:
    return SlotAllocator(store)


async def save(store: SlotStore, *slots: Slot) -> None:
    for slot in slots:
        await store.save_slot(attrs.evolve(slot, path=str(store.tree_path(slot.slot_id))))


async def test_the_best_free_slot_is_found(store: SlotStore, allocator: SlotAllocator) -> None:
    await save(store, make_slot(1, used=9), make_slot(2, commit=WANTED, used=1), make_slot(3, state=SlotState.ERROR))
    found = await allocator.find_available_slot(REPO, commit=WANTED)
    assert found is not None
    assert found.number == 2
    most_recent = await allocator.find_available_slot(REPO)
    assert most_recent is not None
    assert most_recent.number == 1


async def test_nothing_is_found_where_nothing_is_free(store: SlotStore, allocator: SlotAllocator) -> None:
    assert await allocator.find_available_slot(REPO) is None
    await save(store, make_slot(1, state=SlotState.ALLOCATED), make_slot(2, commit=None))
    assert await allocator.find_available_slot(REPO) is None


async def test_marking_is_stored(store: SlotStore, allocator: SlotAllocator) -> None:
    await save(store, make_slot(1))
    slot = await allocator.find_available_slot(REPO)
    assert slot is not None
    taken = await allocator.mark_allocated(slot, make_lease(1))
    assert await store.load_slot(slot.slot_id) == taken
    assert taken.state is SlotState.ALLOCATED
    assert await allocator.find_available_slot(REPO) is None
    free = await allocator.mark_available(taken, make_seal(WANTED))
    assert await store.load_slot(slot.slot_id) == free
    assert await allocator.find_available_slot(REPO) == free


async def test_a_refused_marking_changes_nothing(store: SlotStore, allocator: SlotAllocator) -> None:
    await save(store, make_slot(1, state=SlotState.CLEANING))
    slot = await store.load_slot("workspace-web-slot1")
    with pytest.raises(SlotAllocationError):
        await allocator.mark_allocated(slot, make_lease(1))
    assert await store.load_slot(slot.slot_id) == slot


async def test_the_lru_cache_is_ahead_of_the_records(store: SlotStore, allocator: SlotAllocator) -> None:
    await save(store, make_slot(1, used=1), make_slot(2, used=2), make_slot(3, used=3))
    allocator.update_lru_cache("workspace-web-slot2")
    found = await allocator.find_available_slot(REPO)
    assert found is not None
    assert found.number == 2
    allocator.update_lru_cache("workspace-web-slot1")
    found = await allocator.find_available_slot(REPO)
    assert found is not None
    assert found.number == 1


# Counting


def test_metrics_start_at_nothing(allocator: SlotAllocator) -> None:
    assert allocator.get_allocation_metrics(REPO) == AllocationMetrics()


def test_everything_is_counted_per_pool(allocator: SlotAllocator) -> None:
    for wait, warm in ((0.1, True), (0.2, False), (0.6, True)):
        allocator.record_request(REPO)
        allocator.record_allocation(REPO, wait, warm=warm)
    allocator.record_request(REPO)
    allocator.record_timeout(REPO)
    allocator.record_rejection(REPO)
    allocator.record_failure(REPO)
    allocator.record_release(REPO, 4.0)
    allocator.record_release(REPO, 8.0)
    allocator.record_allocation("other", 60.0)
    metrics = allocator.get_allocation_metrics(REPO)
    assert metrics.average_wait_seconds == pytest.approx(0.3)
    assert attrs.evolve(metrics, average_wait_seconds=0.0) == AllocationMetrics(
        requests=4,
        allocations=3,
        warm=2,
        timeouts=1,
        rejections=1,
        failures=1,
        releases=2,
        p50_wait_seconds=0.2,
        p99_wait_seconds=0.6,
        max_wait_seconds=0.6,
        average_use_seconds=6.0,
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_percentiles_are_waits_that_so_many_did_not_exceed(waits: list[float]) -> None:
    allocator = SlotAllocator(SlotStore("unused"))
    for wait in waits:
        allocator.record_allocation(REPO, wait)
    metrics = allocator.get_allocation_metrics(REPO)
    for value, share in ((metrics.p50_wait_seconds, 0.5), (metrics.p99_wait_seconds, 0.99)):
        assert value in waits
        assert sum(wait <= value for wait in waits) >= share * len(waits)
        assert sum(wait < value for wait in waits) <= share * len(waits)
    assert metrics.max_wait_seconds == max(waits)


def test_percentiles_forget_what_was_long_ago(allocator: SlotAllocator) -> None:
    allocator.record_allocation(REPO, 100.0)
    for _ in range(RECENT_WAITS):
        allocator.record_allocation(REPO, 1.0)
    metrics = allocator.get_allocation_metrics(REPO)
    assert metrics.p99_wait_seconds == 1.0
    assert metrics.max_wait_seconds == 100.0
    assert metrics.allocations == RECENT_WAITS + 1
