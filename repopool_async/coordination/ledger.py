"""The lease protocol on files, step by step: every function here is one step, finished in the thread that called it.

A slot is held by its slot lock; its record is read, checked and written under its record lock, in that order and never
the other way round. Whoever writes has, under the record lock, read the record anew, found its own token in it, and
seen that the file it locks is still the one that others try to lock. That is all exclusion rests on: views are hints.

Whose a slot is by its record, and what the record becomes, `coordination.records` says; tasks, cancellation and telling
others are `coordination.files`' business.
"""

import copy
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, Self

import attrs

from repopool_async._clock import now
from repopool_async._identity import this_process
from repopool_async.coordination.base import HOST_UNREACHABLE, Grant, Hold, Want
from repopool_async.coordination.records import (
    after_use,
    candidates,
    held_seconds_of,
    is_expired,
    is_kept_by_record,
    is_parked,
    is_ready,
    keeping_expiry,
    lease_of,
    lost,
    needs_recovery,
    require_unexpired,
    with_expiry,
    with_token,
)
from repopool_async.coordination.view import PoolView
from repopool_async.exceptions import LeaseLostError, LockTimeoutError, SlotNotFoundError, StoreError
from repopool_async.lock_manager import RECORD_TIMEOUT_SECONDS, HeldLock, LockManager
from repopool_async.models import AllocationRecord, Lease, LeaseEnd, Slot, SlotState, parse_slot_id
from repopool_async.slot_allocator import allocated, cleaning
from repopool_async.slot_store import SlotStore

_READY_TRIED: Final = 3
_HASTY_SECONDS: Final = 0.002
_log: Final = logging.getLogger("repopool")


class Ledger:
    """Who holds which slot, in files. May be used from several threads.

    Attributes:
        news: what happened that the owner may want to tell, oldest first; taken from by the owner.
        patience: how many seconds a step waits for a record that another process has locked.
    """

    def __init__(self, store: SlotStore, locks: LockManager, clock: Callable[[], float]) -> None:
        self.news: deque[tuple[str, dict[str, object]]] = deque()
        self._store = store
        self._locks = locks
        self._clock = clock
        self._views: dict[str, PoolView] = {}
        self._trying: set[str] = set()
        self.patience = RECORD_TIMEOUT_SECONDS

    def hasty(self) -> Self:
        """Return another face of the same ledger, whose steps may not wait.

        Where another process holds a record for longer than it ever should, they raise `LockTimeoutError` before they
        have changed anything.
        """
        face = copy.copy(self)
        face.patience = _HASTY_SECONDS
        return face

    # Claiming

    def claim(self, want: Want) -> Grant | None:
        """Lease the best free slot; None where nothing is free."""
        view = self._view(want.repo_name)
        is_fresh = view.is_fresh
        if not is_fresh and (ready := self._claim_ready(view, want)) is not None:
            return ready
        slots = view.slots() if is_fresh else view.refresh()
        grant = self._claim_first(candidates(slots, want), want)
        if grant is None and is_fresh:
            seen = {slot.slot_id for slot in slots if slot.state is SlotState.AVAILABLE}
            late = [slot for slot in view.refresh() if slot.slot_id not in seen]
            grant = self._claim_first(candidates(late, want), want)
        return grant

    def _claim_ready(self, view: PoolView, want: Want) -> Grant | None:
        """Lease a slot that could not be better, without looking at all the files of a large pool first.

        What was seen seconds ago is good enough to name one: whether it is still free is asked of its record.
        """
        if not view.is_recent:
            return None
        ready = [slot for slot in candidates(view.slots(), want)[:_READY_TRIED] if is_ready(slot, want)]
        return self._claim_first(ready, want)

    def unclaim(self, grant: Grant) -> None:
        """Put a slot back as it was before the claim, but for its token, which nobody shall bear again."""
        try:
            with self._own_record(grant) as stored:
                self._write(attrs.evolve(grant.previous, token=stored.token))
            self._remember("released", stored, held_seconds=0.0)
        finally:
            grant.lock.release_sync()

    def detach(self, grant: Grant) -> Lease:
        """Let go of a detached lease's lock; its time starts anew."""
        if grant.ttl is None:
            raise ValueError(f"{grant.slot.slot_id}: the lease is not detached; claim it with detached_ttl")
        with self._own_record(grant) as stored:
            require_unexpired(stored, self._clock())
            grant.slot = self._write(with_expiry(stored, self._clock() + grant.ttl))
        grant.lock.release_sync()
        grant.lease = lease_of(grant.slot)
        return grant.lease

    def renew(self, slot_id: str, token: int, ttl: float | None) -> Lease:
        """Move a detached lease's expiry."""
        with self._record(slot_id) as stored:
            if stored.state is not SlotState.ALLOCATED or stored.token != token:
                raise lost(stored, token)
            require_unexpired(stored, self._clock())
            is_moved = ttl is not None and lease_of(stored).is_detached
            slot = self._write(with_expiry(stored, self._clock() + (ttl or 0.0))) if is_moved else stored
        return lease_of(slot)

    def is_held(self, hold: Hold) -> bool:
        """Return whether a hold still stands."""
        if not isinstance(hold, Grant) or not hold.lease.is_detached:
            return bool(hold.lock.is_current())
        try:
            with self._record(hold.slot.slot_id) as stored:
                return stored.token == hold.token and is_kept_by_record(stored, self._clock())
        except SlotNotFoundError:
            return False

    def raise_token(self, hold: Hold, above: int) -> int:
        """Give a hold a token higher than `above`."""
        with self._own_record(hold) as stored:
            hold.become(self._write(with_token(stored, max(stored.token, above) + 1)))
        return hold.token

    # Giving back

    def begin_return(self, grant: Grant) -> Slot:
        """End a lease; the slot stays held."""
        if grant.lease.is_detached and not grant.lock.is_held:
            hold = self.release_detached(grant.slot.slot_id, grant.token)
            grant.slot, grant.lock = hold.slot, hold.lock
            return grant.slot
        with self._own_record(grant) as stored:
            if stored.state is not SlotState.ALLOCATED:
                raise lost(stored, grant.token)
            held_seconds = held_seconds_of(stored, self._clock())
            grant.slot = self._write(after_use(stored, held_seconds, LeaseEnd.RETURNED))
        self._remember("released", grant.slot, held_seconds=held_seconds)
        return grant.slot

    def release_detached(self, slot_id: str, token: int) -> Hold:
        """End a detached lease whose token is known; the slot is held from then on."""
        with self._candidate(slot_id) as candidate:
            stored = candidate.stored
            if stored.token != token or not is_kept_by_record(stored, self._clock()):
                raise lost(stored, token)
            held_seconds = held_seconds_of(stored, self._clock())
            hold = candidate.keep(after_use(stored, held_seconds, LeaseEnd.RETURNED), may_seize=True)
        self._remember("released", hold.slot, held_seconds=held_seconds)
        return hold

    def update(self, hold: Hold, slot: Slot) -> Slot:
        """Write a held slot's record."""
        with self._own_record(hold) as stored:
            hold.slot = self._write(keeping_expiry(slot, stored))
        return hold.slot

    def finish(self, hold: Hold, slot: Slot) -> Slot:
        """Write what became of a slot and let go of it."""
        with self._own_record(hold):
            hold.slot = self._write(slot)
        hold.lock.release_sync()
        return hold.slot

    def let_go(self, hold: Hold | None) -> None:
        """Release the lock and leave the record."""
        if hold is not None:
            hold.lock.release_sync()

    # Maintenance

    def take(
        self, slot_id: str, states: Collection[SlotState], *, raise_token: bool, becomes: SlotState | None
    ) -> Hold | None:
        """Hold a slot that nobody holds."""
        if self._store.read_slot_sync(slot_id).state not in states:
            return None  # trying its lock would be in a claimer's way
        with self._candidate(slot_id) as candidate:
            stored = candidate.stored
            if stored.state not in states or is_parked(stored) or not candidate.is_locked:
                return None
            if is_kept_by_record(stored, self._clock()):
                return None
            slot = attrs.evolve(stored, token=stored.token + raise_token, state=becomes or stored.state)
            return candidate.keep(slot)

    def orphans(self, repo_name: str) -> list[Slot]:
        """Return the slots that nobody holds though they are not AVAILABLE."""
        return [slot for slot in self._view(repo_name).refresh() if self._looks_orphaned(slot)]

    def recover(self, slot_id: str) -> Hold | None:
        """Take over an orphan."""
        if not self._looks_orphaned(self._store.read_slot_sync(slot_id)):
            return None
        with self._candidate(slot_id) as candidate:
            stored = candidate.stored
            at = self._clock()
            has_expired = is_expired(stored, at)
            if not needs_recovery(stored, at) or not (candidate.is_locked or has_expired):
                return None
            held_seconds = held_seconds_of(stored, at) if stored.state is SlotState.ALLOCATED else None
            end = LeaseEnd.EXPIRED if has_expired else LeaseEnd.CRASHED
            slot = attrs.evolve(after_use(stored, held_seconds or 0.0, end), token=stored.token + 1)
            hold = candidate.keep(slot, may_seize=has_expired)
        self._remember("expired" if has_expired else "recovered", hold.slot, held_seconds=held_seconds)
        if has_expired:
            self._announce("lease.expired", hold.slot)
        return hold

    def force_unlock(self, slot_id: str) -> Slot:
        """Take a slot away from whoever holds it."""
        with self._record(slot_id) as stored:
            is_leased = stored.state is SlotState.ALLOCATED
            if not is_leased and not self._locks.is_locked_sync(slot_id):
                return stored
            held_seconds = held_seconds_of(stored, self._clock()) if is_leased else None
            is_broken = stored.state is SlotState.ERROR
            after = stored if is_broken else after_use(stored, held_seconds or 0.0, LeaseEnd.FORCED)
            # Killed between these two, we leave a holder whose token is stale; the other way round, the same.
            slot = self._write(attrs.evolve(after, token=stored.token + 1))
            self._locks.replace_sync(slot_id)
        self._remember("forced", slot, held_seconds=held_seconds)
        self._announce("lease.forced", slot)
        return slot

    def expire(self, slot_id: str, token: int) -> bool:
        """Take away one certain lease."""
        with self._record(slot_id) as stored:
            if stored.state is not SlotState.ALLOCATED or stored.token != token:
                return False
            held_seconds = held_seconds_of(stored, self._clock())
            slot = self._write(attrs.evolve(after_use(stored, held_seconds, LeaseEnd.EXPIRED), token=token + 1))
            self._locks.replace_sync(slot_id)
        self._remember("expired", slot, held_seconds=held_seconds)
        self._announce("lease.expired", slot)
        return True

    def park_host(self, host_id: str) -> list[str]:
        """Take every slot of a host out of use."""
        return [slot.slot_id for slot in self._slots_of_host(host_id) if self._park(slot.slot_id)]

    def _park(self, slot_id: str) -> bool:
        with self._record(slot_id) as stored:
            if stored.state is SlotState.ERROR:
                return False
            is_leased = stored.state is SlotState.ALLOCATED
            held_seconds = held_seconds_of(stored, self._clock()) if is_leased else None
            after = after_use(stored, held_seconds or 0.0, LeaseEnd.FORCED)
            self._write(attrs.evolve(after, state=SlotState.ERROR, error=HOST_UNREACHABLE, token=stored.token + 1))
            self._locks.replace_sync(slot_id)
        if is_leased:
            self._remember("forced", stored, held_seconds=held_seconds)
        return True

    def unpark_host(self, host_id: str) -> list[str]:
        """Make orphans of a host's parked slots."""
        return [slot.slot_id for slot in self._slots_of_host(host_id) if self._unpark(slot.slot_id)]

    def _unpark(self, slot_id: str) -> bool:
        with self._record(slot_id) as stored:
            if is_parked(stored):
                self._write(cleaning(stored))
            return is_parked(stored)

    def _slots_of_host(self, host_id: str) -> Iterator[Slot]:
        for repo_name in self._store.list_pools_sync():
            yield from (slot for slot in self._view(repo_name).refresh() if slot.host_id == host_id)

    # Records

    def list_slots(self, repo_name: str) -> list[Slot]:
        """Return a pool's slots by number."""
        return self._view(repo_name).refresh()

    def next_slot_number(self, repo_name: str) -> int:
        """Return a number that was never given before, and remember it."""
        with self._locks.record_lock_sync(f"numbers-{repo_name}"):
            pool = self._store.load_pool_sync(repo_name)
            present = [slot.number for slot in self._view(repo_name).refresh()]
            number = max([pool.next_slot_number, *(used + 1 for used in (*present, *self._locked_numbers(repo_name)))])
            self._store.save_pool_sync(attrs.evolve(pool, next_slot_number=number + 1))
        return number

    def begin_create(self, slot: Slot) -> Hold:
        """Hold a slot that does not exist yet."""
        held = self._locks.try_acquire_sync(slot.slot_id)
        if held is None:
            raise LockTimeoutError(f"{slot.slot_id}: is locked by another process; choose a new number")
        try:
            self._store.read_slot_sync(slot.slot_id)
        except SlotNotFoundError:
            return Hold(slot, slot.token, held)
        except BaseException:
            held.release_sync()
            raise
        held.release_sync()
        raise ValueError(f"{slot.slot_id}: exists already; slot numbers are never used again")

    def delete(self, hold: Hold) -> None:
        """Delete a held slot and let go of it."""
        slot_id = hold.slot.slot_id
        with self._own_record(hold) as stored:
            # Deleting takes long; out of the record lock, a crash half-way must find something to recover.
            self._write(cleaning(stored))
        self._store.delete_slot_sync(slot_id)
        self._view(hold.slot.repo_name).forget(slot_id)
        hold.lock.release_sync()

    # Inside

    def _view(self, repo_name: str) -> PoolView:
        view = self._views.get(repo_name)
        return view if view is not None else self._views.setdefault(repo_name, PoolView(self._store, repo_name))

    def _locked_numbers(self, repo_name: str) -> Iterator[int]:
        """Lock files are never removed: they know of every slot there ever was, whoever wrote the pool's record."""
        for slot_id in self._locks.known_ids_sync():
            with suppress(ValueError):
                name, number = parse_slot_id(slot_id)
                if name == repo_name:
                    yield number

    def _claim_first(self, candidates: list[Slot], want: Want) -> Grant | None:
        busy = []
        for slot in candidates:
            # Another thread of ours is at it, and will most likely have it.
            if slot.slot_id in self._trying:
                busy.append(slot)
            elif (grant := self._claim_one(slot.slot_id, want)) is not None:
                return grant
        return next((grant for slot in busy if (grant := self._claim_one(slot.slot_id, want)) is not None), None)

    def _claim_one(self, slot_id: str, want: Want) -> Grant | None:
        self._trying.add(slot_id)
        try:
            with self._candidate(slot_id) as candidate:
                stored = candidate.stored
                if stored.state is not SlotState.AVAILABLE or stored.seal is None or not candidate.is_locked:
                    return None
                lease = self._lease(stored, want)
                hold = candidate.keep(allocated(stored, lease, lease.acquired_at))
        except SlotNotFoundError:
            self._view(want.repo_name).forget(slot_id)
            return None
        finally:
            self._trying.discard(slot_id)
        self._remember("allocated", hold.slot, wait_seconds=want.wait_seconds)
        return Grant(slot=hold.slot, token=hold.token, lock=hold.lock, lease=lease, previous=stored)

    def _lease(self, slot: Slot, want: Want) -> Lease:
        started = self._clock()
        is_detached = want.detached_ttl is not None
        return Lease(
            lease_id=want.lease_id,
            token=slot.token + 1,
            owner=this_process(),
            acquired_at=now(),
            acquired_boottime=started,
            expires_boottime=started + want.detached_ttl if want.detached_ttl is not None else None,
            is_detached=is_detached,
            ref=want.ref,
            commit=want.commit,
            branch=want.branch,
            metadata=want.metadata,
        )

    @contextmanager
    def _record(self, slot_id: str) -> Iterator[Slot]:
        """Hold a slot's record lock for the block and give it the record."""
        with self._locks.record_lock_sync(slot_id, patience=self.patience):
            yield self._store.read_slot_sync(slot_id)

    @contextmanager
    def _own_record(self, hold: Hold) -> Iterator[Slot]:
        """As `_record`, once it is certain that the hold stands."""
        with ExitStack() as stack:
            try:
                stored = stack.enter_context(self._record(hold.slot.slot_id))
            except SlotNotFoundError as error:
                hold.lock.release_sync()
                raise LeaseLostError(
                    f"{hold.slot.slot_id}: the lease was taken away and the slot deleted; take a new lease",
                    repo_name=hold.slot.repo_name,
                    slot_id=hold.slot.slot_id,
                ) from error
            if stored.token != hold.token or not self._is_still_held(hold, stored):
                hold.lock.release_sync()
                raise lost(stored, hold.token)
            yield stored

    def _is_still_held(self, hold: Hold, stored: Slot) -> bool:
        return bool(hold.lock.is_current()) or (
            isinstance(hold, Grant) and hold.lease.is_detached and is_kept_by_record(stored, self._clock())
        )

    @contextmanager
    def _candidate(self, slot_id: str) -> Iterator["_Candidate"]:
        """Try to lock a slot, and hold its record lock for the block; unless kept, the slot is let go of again."""
        # Unsigned if need be: after `force_unlock` on a full disk only cleaning this slot may make room to sign.
        candidate = _Candidate(self, self._locks, self._locks.try_acquire_sync(slot_id, is_signed=False))
        try:
            with self._record(slot_id) as stored:
                candidate.look(stored)
                yield candidate
                if not candidate.is_kept:
                    self._view(stored.repo_name).put(stored)
        finally:
            candidate.let_go_unless_kept()

    def write(self, slot: Slot) -> Slot:
        """Write a record; call it under the record lock."""
        return self._write(slot)

    def _write(self, slot: Slot) -> Slot:
        self._store.write_slot_sync(slot)
        self._view(slot.repo_name).put(slot)
        return slot

    def _looks_orphaned(self, slot: Slot) -> bool:
        at = self._clock()
        return needs_recovery(slot, at) and (is_expired(slot, at) or not self._locks.is_locked_sync(slot.slot_id))

    # -- telling -------------------------------------------------------------------------------------------------

    def _announce(self, kind: str, slot: Slot) -> None:
        lease_id = slot.lease.lease_id if slot.lease else None
        about = {"slot_id": slot.slot_id, "repo_name": slot.repo_name, "lease_id": lease_id, "token": slot.token}
        self.news.append((kind, dict[str, object](about)))

    def _remember(
        self, event: str, slot: Slot, *, wait_seconds: float | None = None, held_seconds: float | None = None
    ) -> None:
        """Write a line of history. Its failure stops nothing: the record is what counts, and it has been written."""
        lease = slot.lease
        if lease is None:
            return
        record = AllocationRecord(
            event=event,
            slot_id=slot.slot_id,
            lease_id=lease.lease_id,
            token=lease.token,
            at=now(),
            owner=lease.owner,
            ref=lease.ref,
            commit=lease.commit,
            branch=lease.branch,
            wait_seconds=wait_seconds,
            held_seconds=held_seconds,
            metadata=lease.metadata,
        )
        try:
            self._store.append_history_sync(record)
        except (StoreError, SlotNotFoundError) as error:
            _log.warning("%s: history of %s not written: %s", slot.slot_id, event, error)
            self.news.append(("history.failed", {"slot_id": slot.slot_id, "event": event, "error": str(error)}))


class _Candidate:
    """A slot that somebody looks at under its record lock, and may decide to keep."""

    def __init__(self, ledger: Ledger, locks: LockManager, held: HeldLock | None) -> None:
        self.stored: Slot
        self.is_locked = False
        self._ledger = ledger
        self._locks = locks
        self._held = held
        self.is_kept = False

    def look(self, stored: Slot) -> None:
        """Note the record, and whether the lock is ours and still worth anything."""
        self.stored = stored
        self.is_locked = self._held is not None and self._held.is_current()

    def keep(self, slot: Slot, *, may_seize: bool = False) -> Hold:
        """Write the record, where it is another one, and keep the lock, which is taken by force where that is said."""
        held = self._held
        if held is None or not self.is_locked:
            if not may_seize:
                raise AssertionError(f"{slot.slot_id}: kept without its lock")
            self.let_go_unless_kept()
            self._held = held = self._locks.seize_sync(slot.slot_id)
        if slot != self.stored:
            self._ledger.write(slot)
        self.is_kept = True
        return Hold(slot, slot.token, held)

    def let_go_unless_kept(self) -> None:
        """Release the lock of a slot that was only looked at."""
        if self._held is not None and not self.is_kept:
            self._held.release_sync()
