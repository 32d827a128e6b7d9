"""Every record survives JSON whatever it holds, stays what it was made, and ids say which slot they mean."""

import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repopool_async import models
from repopool_async._codec import dumps, loads
from repopool_async.models import (
    AllocationMetrics,
    AllocationRecord,
    CleanupResult,
    CommandResult,
    GitResult,
    HostStatus,
    Lease,
    LeaseEnd,
    Owner,
    Pool,
    PoolSummary,
    ResolvedRef,
    RestoredSalvage,
    SalvageRecord,
    Seal,
    Slot,
    SlotState,
    SlotStatus,
    StaleLock,
    make_slot_id,
    parse_slot_id,
)

PATIENTLY: Final = settings(deadline=None)
NOON: Final = datetime(2026, 1, 2, 12, 0, 0, 123456, tzinfo=UTC)
OWNER: Final = Owner(host="ci-7", boot_id="5f0c", pid=4711, start_time=987654)
LEASE: Final = Lease(
    lease_id="lease-1",
    token=3,
    owner=OWNER,
    acquired_at=NOON,
    acquired_boottime=12.5,
    expires_boottime=612.5,
    is_detached=True,
    ref="main",
    commit="a" * 40,
    branch="main",
    metadata={"job": 7, "tags": ["a", None], "nested": {"x": 1.5}},
)
SEAL: Final = Seal(
    commit="a" * 40,
    branch=None,
    refs_generation="g1",
    boot_id="5f0c",
    mark_ns=1_700_000_000_000_000_001,
    settled_ns=1_700_000_000_000_000_002,
    clock_offset_ns=-5,
    tree_device=64769,
    tree_inode=2**63,
)

# Paths and names come from the file system, so bytes that are no text arrive as surrogates.
texts: Final = st.text() | st.binary(max_size=20).map(os.fsdecode)
numbers: Final = st.integers(min_value=0, max_value=2**70)
seconds: Final = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
offsets: Final = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments: Final = st.datetimes(datetime(1970, 1, 2), datetime(9999, 1, 1), timezones=offsets)  # noqa: DTZ001 - bounds
plain: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
mappings: Final = st.dictionaries(st.text(), plain, max_size=4)
counts: Final = st.integers(0, 10**6)
maybe_text: Final = st.none() | texts

owners: Final = st.builds(Owner, host=texts, boot_id=texts, pid=numbers, start_time=numbers)
leases: Final = st.builds(
    Lease,
    lease_id=texts,
    token=numbers,
    owner=owners,
    acquired_at=moments,
    acquired_boottime=seconds,
    expires_boottime=st.none() | seconds,
    is_detached=st.booleans(),
    ref=maybe_text,
    commit=maybe_text,
    branch=maybe_text,
    metadata=mappings,
)
seals: Final = st.builds(
    Seal,
    commit=texts,
    branch=maybe_text,
    refs_generation=texts,
    boot_id=texts,
    mark_ns=numbers,
    settled_ns=numbers,
    clock_offset_ns=st.integers(),
    tree_device=numbers,
    tree_inode=numbers,
)


def extras(kind: type[Any]) -> st.SearchStrategy[Mapping[str, Any]]:
    known = set(attrs.fields_dict(kind)) - {"extra"}
    return st.dictionaries(st.text().filter(lambda key: key not in known), plain, max_size=3)


pools: Final = st.builds(
    Pool,
    repo_name=texts,
    repo_url=texts,
    num_slots=counts,
    created_at=moments,
    next_slot_number=counts,
    options=mappings,
    schema_version=counts,
    extra=extras(Pool),
)
slots: Final = st.builds(
    Slot,
    slot_id=texts,
    repo_name=texts,
    repo_url=texts,
    path=texts,
    created_at=moments,
    state=st.sampled_from(SlotState),
    token=numbers,
    lease=st.none() | leases,
    seal=st.none() | seals,
    error=maybe_text,
    last_used_at=st.none() | moments,
    last_branch=maybe_text,
    allocation_count=counts,
    total_allocated_seconds=seconds,
    schema_version=counts,
    extra=extras(Slot),
)
cleanups: Final = st.builds(
    CleanupResult,
    slot_id=texts,
    operation=texts,
    success=st.booleans(),
    started_at=moments,
    duration_seconds=seconds,
    commit=maybe_text,
    steps=st.lists(texts, max_size=4).map(tuple),
    removed=counts,
    restored=counts,
    rung=maybe_text,
    error=maybe_text,
)
history: Final = st.builds(
    AllocationRecord,
    event=texts,
    slot_id=texts,
    lease_id=texts,
    token=numbers,
    at=moments,
    owner=owners,
    ref=maybe_text,
    commit=maybe_text,
    branch=maybe_text,
    wait_seconds=st.none() | seconds,
    held_seconds=st.none() | seconds,
    metadata=mappings,
)

EXAMPLES: Final[list[Any]] = [
    HostStatus(
        host_id="far",
        address="builder@far:2222",
        workspaces_dir="/srv/pools",
        labels=("linux", "large"),
        capacity=8,
        condition="parked",
        reason="no answer",
        total_slots=3,
        available=0,
        allocated=1,
    ),
    OWNER,
    LEASE,
    SEAL,
    Pool(
        repo_name="web", repo_url="https://example.org/web.git", num_slots=2, created_at=NOON, options={"keep": ["x"]}
    ),
    Slot(
        slot_id="workspace-web-slot1",
        repo_name="web",
        repo_url="https://example.org/web.git",
        path="/srv/pool/web/slots/slot1/tree",
        created_at=NOON,
        state=SlotState.ALLOCATED,
        token=3,
        lease=LEASE,
        seal=SEAL,
        last_used_at=NOON,
    ),
    SlotStatus(
        slot_id="workspace-web-slot1",
        repo_name="web",
        state=SlotState.ERROR,
        path="/tree",
        is_locked=False,
        commit=None,
        branch=None,
        lease=LEASE,
        held_seconds=1.5,
        allocation_count=1,
        total_allocated_seconds=2.5,
        created_at=NOON,
        last_used_at=None,
        error="disk full",
    ),
    AllocationMetrics(requests=3, allocations=2, average_wait_seconds=0.25),
    PoolSummary(
        repo_name="web",
        repo_url="https://example.org/web.git",
        total_slots=4,
        available=1,
        allocated=1,
        cleaning=1,
        error=1,
        waiting=0,
        allocation_count=9,
        total_allocated_seconds=99.5,
        metrics=AllocationMetrics(),
    ),
    CleanupResult(
        slot_id="workspace-web-slot1",
        operation="return",
        success=True,
        started_at=NOON,
        duration_seconds=0.125,
        steps=("discard git directory", "reset"),
    ),
    AllocationRecord(
        event="allocated", slot_id="workspace-web-slot1", lease_id="lease-1", token=3, at=NOON, owner=OWNER
    ),
    StaleLock(slot_id="workspace-web-slot1", path="/locks/x.lock", owner=OWNER, age_seconds=3600.5),
    CommandResult(exit_code=-9, stdout=b"caf\xe9\x00\n", stderr=b"", duration_seconds=0.5, is_truncated=True),
    GitResult(args=("fetch", "origin"), exit_code=0, stdout=b"\xff\xfe", stderr="", duration_seconds=0.5),
    ResolvedRef(asked="main", commit="b" * 40, branch="main"),
    SalvageRecord(
        salvage_id="lease-1", repo_name="web", slot_id="workspace-web-slot1", lease_id="lease-1", commit="c" * 40,
        reason=LeaseEnd.CRASHED, created_at=NOON, base="a" * 40, head="b" * 40, owner=OWNER,
        branches={"main": "b" * 40}, stash_commits=("d" * 40,), stash_messages=("s",), skipped=("x: too large",),
    ),
    RestoredSalvage(branch="salvage/lease-1", branches=("salvage/lease-1",), stashes=1, is_checked_out=True),
]  # fmt: skip
RECORDS: Final = [kind for kind in vars(models).values() if isinstance(kind, type) and attrs.has(kind)]


class TestEveryRecord:
    def test_has_an_example_here(self) -> None:
        assert {type(example) for example in EXAMPLES} == set(RECORDS)

    @pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
    def test_survives_json(self, record: Any) -> None:
        assert loads(type(record), dumps(record)) == record

    @pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
    def test_cannot_be_changed(self, record: Any) -> None:
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(record, attrs.fields(type(record))[0].name, "other")

    @pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
    def test_equals_a_copy_and_differs_from_a_changed_one(self, record: Any) -> None:
        assert attrs.evolve(record) == record
        name = attrs.fields(type(record))[0].name
        assert attrs.evolve(record, **{name: "something else"}) != record


class TestRoundTrips:
    @PATIENTLY
    @given(owners)
    def test_owner(self, record: Owner) -> None:
        assert loads(Owner, dumps(record)) == record

    @PATIENTLY
    @given(leases)
    def test_lease(self, record: Lease) -> None:
        assert loads(Lease, dumps(record)) == record

    @PATIENTLY
    @given(seals)
    def test_seal(self, record: Seal) -> None:
        assert loads(Seal, dumps(record)) == record

    @PATIENTLY
    @given(pools)
    def test_pool(self, record: Pool) -> None:
        assert loads(Pool, dumps(record)) == record

    @PATIENTLY
    @given(slots)
    def test_slot(self, record: Slot) -> None:
        assert loads(Slot, dumps(record)) == record

    @PATIENTLY
    @given(slots)
    def test_writing_what_was_read_changes_no_byte(self, record: Slot) -> None:
        data = dumps(record)
        assert dumps(loads(Slot, data)) == data

    @PATIENTLY
    @given(cleanups)
    def test_cleanup_result(self, record: CleanupResult) -> None:
        assert loads(CleanupResult, dumps(record)) == record

    @PATIENTLY
    @given(history)
    def test_allocation_record(self, record: AllocationRecord) -> None:
        assert loads(AllocationRecord, dumps(record)) == record

    @PATIENTLY
    @given(st.builds(CommandResult, stdout=st.binary(), stderr=st.binary(), duration_seconds=seconds))
    def test_output_that_is_no_text(self, record: CommandResult) -> None:
        assert loads(CommandResult, dumps(record)) == record


class TestSlotIds:
    def test_look_as_the_plan_says(self) -> None:
        assert make_slot_id("web", 1) == "workspace-web-slot1"

    @PATIENTLY
    @given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True), st.integers(1, 10**9))
    def test_say_which_pool_and_number(self, name: str, number: int) -> None:
        assert parse_slot_id(make_slot_id(name, number)) == (name, number)

    @pytest.mark.parametrize("name", ["slot1", "a-slot1", "workspace-a-slot1", "a-slot1-slot2", "workspace-"])
    def test_are_not_confused_by_names_that_look_like_them(self, name: str) -> None:
        assert parse_slot_id(make_slot_id(name, 12)) == (name, 12)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "web",
            "workspace-web",
            "workspace-web-slot",
            "workspace-web-slot0",
            "workspace-web-slot01",
            "workspace-web-slot-1",
            "workspace-web-slot1 ",
            "workspace-web-slot1\n",
            "workspace--slot",
            "workspace-slot1",
            "xworkspace-web-slot1",
            "workspace-web-slot१",
        ],
    )
    def test_other_text_is_none(self, text: str) -> None:
        with pytest.raises(ValueError, match="workspace-<pool>-slot1"):
            parse_slot_id(text)

    def test_a_slot_knows_its_number(self) -> None:
        slot = next(example for example in EXAMPLES if isinstance(example, Slot))
        assert slot.number == 1


class TestDefaults:
    def test_a_new_slot_waits_to_be_made_and_was_never_leased(self) -> None:
        slot = Slot(slot_id="workspace-web-slot1", repo_name="web", repo_url="u", path="/p", created_at=NOON)
        assert slot.state is SlotState.CLEANING
        assert (slot.token, slot.lease, slot.seal, slot.error) == (0, None, None, None)
        assert (slot.allocation_count, slot.total_allocated_seconds, slot.last_used_at) == (0, 0.0, None)

    def test_mappings_are_not_shared_between_records(self) -> None:
        one = Pool(repo_name="a", repo_url="u", num_slots=1, created_at=NOON)
        two = Pool(repo_name="b", repo_url="u", num_slots=1, created_at=NOON)
        assert one.options is not two.options
        assert one.extra is not two.extra

    def test_a_slot_state_reads_as_the_plan_names_it(self) -> None:
        assert [state.name for state in SlotState] == ["AVAILABLE", "ALLOCATED", "CLEANING", "ERROR"]
        assert [str(state) for state in SlotState] == ["available", "allocated", "cleaning", "error"]


class TestResults:
    def test_output_of_a_command_is_text_whatever_it_was(self) -> None:
        assert CommandResult(exit_code=0, stdout=b"caf\xe9\n", stderr=b"", duration_seconds=0.0).text == "caf\ufffd\n"

    def test_output_of_git_keeps_bytes_that_are_no_text(self) -> None:
        result = GitResult(args=(), exit_code=0, stdout=b" caf\xe9\n", stderr="", duration_seconds=0.0)
        assert os.fsencode(result.text) == b"caf\xe9"

    @pytest.mark.parametrize(("exit_code", "success"), [(0, True), (1, False), (128, False), (-15, False)])
    def test_git_succeeded_where_it_exited_with_zero(self, exit_code: int, success: bool) -> None:
        result = GitResult(args=(), exit_code=exit_code, stdout=b"", stderr="", duration_seconds=0.0)
        assert result.success is success
