"""What a record says of its slot: pure functions, so no files here."""

from datetime import UTC, datetime
from typing import Any

import attrs
import pytest

from repopool_async import Lease, LeaseEnd, LeaseLostError, Slot, SlotState, StoreError
from repopool_async._identity import current_owner
from repopool_async.coordination import records

THEN = datetime(2024, 5, 6, tzinfo=UTC)
SLOT = Slot("web/slot1", "web", "https://example.com/web.git", "/pools/web/slots/slot1/tree", THEN)


def leased(**changes: Any) -> Slot:
    lease = Lease(
        lease_id="a",
        token=1,
        owner=current_owner(),
        acquired_at=THEN,
        acquired_boottime=100.0,
        expires_boottime=110.0,
        is_detached=True,
    )
    return attrs.evolve(SLOT, state=SlotState.ALLOCATED, token=1, lease=attrs.evolve(lease, **changes))


def test_a_detached_lease_keeps_its_slot_until_it_expires() -> None:
    slot = leased()
    assert records.is_kept_by_record(slot, 109.9)
    assert not records.needs_recovery(slot, 109.9)
    records.require_unexpired(slot, 109.9)
    assert records.is_expired(slot, 110.0)
    assert records.needs_recovery(slot, 110.0)
    with pytest.raises(LeaseLostError, match="token 1"):
        records.require_unexpired(slot, 110.0)


def test_a_lease_of_another_boot_has_expired_and_has_no_duration() -> None:
    slot = leased(owner=attrs.evolve(current_owner(), boot_id="another"))
    assert records.is_expired(slot, 105.0)
    assert records.held_seconds_of(slot, 105.0) == 0


def test_a_lease_that_no_record_keeps_never_expires_but_needs_recovery() -> None:
    slot = leased(is_detached=False, expires_boottime=None)
    assert not records.is_expired(slot, 1e9)
    assert records.needs_recovery(slot, 101.0)
    assert records.held_seconds_of(slot, 103.0) == 3


def test_time_after_the_expiry_is_not_held() -> None:
    assert records.held_seconds_of(leased(), 500.0) == 10


def test_how_a_lease_ended_is_noted_once() -> None:
    slot = records.after_use(leased(), 7.0, LeaseEnd.EXPIRED)
    assert (slot.state, slot.unsaved, slot.total_allocated_seconds) == (SlotState.CLEANING, LeaseEnd.EXPIRED, 7)
    assert records.after_use(slot, 0.0, LeaseEnd.CRASHED).unsaved == LeaseEnd.EXPIRED


def test_a_renewal_meanwhile_survives_a_write_of_the_same_lease_only() -> None:
    renewed = records.with_expiry(leased(), 200.0)
    assert records.keeping_expiry(leased(), renewed) == renewed
    assert records.keeping_expiry(leased(lease_id="b"), renewed) == leased(lease_id="b")


def test_an_allocated_slot_without_a_lease_says_how_to_mend_it() -> None:
    with pytest.raises(StoreError, match="force_unlock"):
        records.lease_of(attrs.evolve(SLOT, state=SlotState.ALLOCATED))
