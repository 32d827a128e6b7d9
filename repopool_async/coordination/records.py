"""What a slot's record says of whose the slot is, and what the record becomes when a lease ends or moves.

Pure functions of records and of the time since boot, the same for every coordinator. Who holds a lock, and whether what
is read here is still true by the time it is acted on, is the coordinator's question.
"""

import math

import attrs

from repopool_async._identity import boot_id
from repopool_async.coordination.base import HOST_UNREACHABLE, Hold, Want
from repopool_async.exceptions import LeaseLostError, StoreError
from repopool_async.models import Lease, LeaseEnd, Slot, SlotState
from repopool_async.slot_allocator import cleaning, order_candidates

# -- whose it is -----------------------------------------------------------------------------------------------------


def is_kept_by_record(slot: Slot, at: float) -> bool:
    """Return whether a slot is a detached lessee's, whoever locks it."""
    lease = slot.lease
    return slot.state is SlotState.ALLOCATED and lease is not None and lease.is_detached and _is_live(lease, at)


def is_expired(slot: Slot, at: float) -> bool:
    """Return whether a slot was a detached lessee's, and nobody has taken it over yet."""
    lease = slot.lease
    is_detached = slot.state is SlotState.ALLOCATED and lease is not None and lease.is_detached
    return is_detached and not is_kept_by_record(slot, at)


def is_parked(slot: Slot) -> bool:
    """Return whether a slot is out of use because its host does not answer."""
    return slot.state is SlotState.ERROR and slot.error == HOST_UNREACHABLE


def needs_recovery(slot: Slot, at: float) -> bool:
    """Return whether a slot must be cleaned before anybody gets it, unless somebody who locks it is at that."""
    if slot.state is SlotState.AVAILABLE:
        return slot.seal is None
    return slot.state is not SlotState.ERROR and not is_kept_by_record(slot, at)


def require_unexpired(slot: Slot, at: float) -> None:
    """Raise `LeaseLostError` where a detached lease has expired."""
    if lease_of(slot).is_detached and not is_kept_by_record(slot, at):
        raise lost(slot, slot.token)


def held_seconds_of(slot: Slot, at: float) -> float:
    """Return how long a lease has lasted; 0 where it began before the machine was booted."""
    lease = slot.lease
    if lease is None or lease.owner.boot_id != boot_id():
        return 0.0
    end = min(at, lease.expires_boottime if lease.expires_boottime is not None else math.inf)
    return max(0.0, end - lease.acquired_boottime)


def lease_of(slot: Slot) -> Lease:
    """Return a leased slot's lease."""
    if slot.lease is None:
        raise StoreError(f"{slot.slot_id}: is {slot.state} without a lease; force_unlock sends it to recovery")
    return slot.lease


def lost(slot: Slot, token: int) -> LeaseLostError:
    """Return the error for whoever comes with a token that is not the present lease's."""
    return LeaseLostError(
        f"{slot.slot_id}: the lease with token {token} has ended or was taken away (the slot is {slot.state} with "
        f"token {slot.token} now); take a new lease",
        repo_name=slot.repo_name,
        slot_id=slot.slot_id,
    )


def _is_live(lease: Lease, at: float) -> bool:
    # After another boot the clock started anew, so the expiry means nothing.
    return lease.owner.boot_id == boot_id() and (lease.expires_boottime is None or at < lease.expires_boottime)


# -- what it becomes -------------------------------------------------------------------------------------------------


def after_use(slot: Slot, held_seconds: float, end: LeaseEnd) -> Slot:
    """Return the record after a lease; how it ended is noted once, whatever happens to the slot before it is clean."""
    unsaved = slot.unsaved or (str(end) if slot.state is SlotState.ALLOCATED else None)
    total = slot.total_allocated_seconds + held_seconds
    return attrs.evolve(cleaning(slot), total_allocated_seconds=total, unsaved=unsaved)


def with_expiry(slot: Slot, expires_boottime: float) -> Slot:
    """Return the record with the lease's expiry moved."""
    return attrs.evolve(slot, lease=attrs.evolve(lease_of(slot), expires_boottime=expires_boottime))


def with_token(slot: Slot, token: int) -> Slot:
    """Return the record, and the lease where the slot is leased, with another token."""
    if slot.state is not SlotState.ALLOCATED:
        return attrs.evolve(slot, token=token)
    return attrs.evolve(slot, token=token, lease=attrs.evolve(lease_of(slot), token=token))


def keeping_expiry(slot: Slot, stored: Slot) -> Slot:
    """Return a record to write over the stored one, with the expiry that a renewal may have moved meanwhile."""
    if slot.lease is None or stored.lease is None or slot.lease.lease_id != stored.lease.lease_id:
        return slot
    return attrs.evolve(slot, lease=attrs.evolve(slot.lease, expires_boottime=stored.lease.expires_boottime))


def is_ready(slot: Slot, want: Want) -> bool:
    """Return whether a slot stands exactly where a claim wants it."""
    seal = slot.seal
    return seal is not None and (seal.commit, seal.branch) == (want.commit, want.branch)


def candidates(slots: list[Slot], want: Want) -> list[Slot]:
    """Return the slots that a claim may be given, the best first."""
    ordered = order_candidates(slots, commit=want.commit, branch=want.branch)
    if not (want.prefer or want.exclude or want.exclude_hosts or want.labels):
        return ordered
    wanted = (
        slot
        for slot in ordered
        if slot.slot_id not in want.exclude
        and slot.host_id not in want.exclude_hosts
        and want.labels.issubset(slot.labels)
    )
    return sorted(wanted, key=lambda slot: slot.slot_id not in want.prefer)


# -- what callers may ask for ----------------------------------------------------------------------------------------


def require_own(hold: Hold, slot: Slot) -> None:
    """Raise `ValueError` where a record is not of a hold's slot and token."""
    if slot.slot_id != hold.slot.slot_id or slot.token != hold.token:
        raise ValueError(
            f"{slot.slot_id} with token {slot.token} is not the record of {hold.slot.slot_id} with token {hold.token}"
        )


def require_settled(slot: Slot) -> None:
    """Raise `ValueError` where a hold cannot end with a record."""
    if slot.state is not SlotState.ERROR and (slot.state is not SlotState.AVAILABLE or slot.seal is None):
        raise ValueError(f"{slot.slot_id}: a hold ends with AVAILABLE and a seal, or with ERROR, not {slot.state}")


def require_new(slot: Slot) -> None:
    """Raise `ValueError` where a record is none to begin with."""
    if slot.state is not SlotState.CLEANING:
        raise ValueError(f"{slot.slot_id}: a new slot is CLEANING until it is finished, not {slot.state}")
