"""The coordinator on files of one machine: records in the store, exclusion by kernel locks, turns by tickets.

A process that dies frees its slot locks, and what it left says ALLOCATED or CLEANING: an orphan. A detached lease is
held by its record instead, until it expires on the boot-time clock or the boot id changes. Turns between processes are
fair (`coordination.tickets` says why). Each verb is one hop to a thread, in which nothing waits but for record locks;
what happens there, step by step, is `coordination.ledger`'s business.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final, TypeVar

import attrs

from repopool_async._aio import in_order, in_thread, shielded
from repopool_async._clock import boottime
from repopool_async.coordination.base import AnyHold, Grant, Hold, OnEvent, Want, checked_ttl
from repopool_async.coordination.ledger import Ledger
from repopool_async.coordination.records import require_new, require_own, require_settled
from repopool_async.coordination.tickets import FileTicket, TicketOffice
from repopool_async.exceptions import LockTimeoutError, PoolManagerError
from repopool_async.lock_manager import LockManager
from repopool_async.models import Lease, Slot, SlotState
from repopool_async.slot_store import SlotStore

T = TypeVar("T")

_POLL_SECONDS: Final = (0.002, 0.1)

_log: Final = logging.getLogger("repopool")


class FileCoordinator:
    """Claims, keeps, gives back and recovers slots; see `coordination.base.Coordinator` for what each verb promises.

    Several may work on one directory, in one process or in many. One may be used from many tasks.

    Args:
        store: the records. locks: of the same directory.
        on_event: told of `lease.forced` and `lease.expired` (`slot_id`, `repo_name`, `lease_id`, `token`) and of
            `history.failed` (`slot_id`, `event`, `error`); what callers know from results they tell themselves.
        clock: seconds since boot.
    """

    def __init__(
        self,
        store: SlotStore,
        locks: LockManager,
        on_event: OnEvent | None = None,
        *,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._store = store
        self._locks = locks
        self._on_event = on_event
        self._clock = clock
        self._ledger = Ledger(store, locks, clock)
        self._hasty = self._ledger.hasty()

    @property
    def poll_seconds(self) -> tuple[float, float]:
        """See `Coordinator`."""
        return _POLL_SECONDS

    def hurry(self) -> None:
        """See `Coordinator.hurry`; no file makes anybody wait."""

    # Claiming

    async def claim(
        self,
        repo_name: str,
        *,
        commit: str | None,
        branch: str | None,
        ref: str | None = None,
        lease_id: str,
        metadata: Mapping[str, Any] | None = None,
        prefer: frozenset[str] = frozenset(),
        exclude: frozenset[str] = frozenset(),
        exclude_hosts: frozenset[str] = frozenset(),
        labels: frozenset[str] = frozenset(),
        detached_ttl: float | None = None,
        wait_seconds: float | None = None,
        stand_back: bool = False,
    ) -> Grant | None:
        """See `Coordinator.claim`."""
        want = Want(
            repo_name=repo_name,
            lease_id=lease_id,
            commit=commit,
            branch=branch,
            ref=ref,
            metadata=metadata or {},
            prefer=prefer,
            exclude=exclude,
            exclude_hosts=exclude_hosts,
            labels=labels,
            detached_ttl=detached_ttl,
            wait_seconds=wait_seconds,
        )
        return await self._claim(want, self._office(repo_name) if stand_back else None)

    async def _claim(self, want: Want, office: TicketOffice | None = None) -> Grant | None:
        def attempt(ledger: Ledger) -> Grant | None:
            return None if office is not None and office.has_tickets() else ledger.claim(want)

        return await self._quickly(attempt, undo=self._unclaim)

    async def detach(self, grant: Grant) -> Lease:
        """See `Coordinator.detach`."""
        return await self._do(lambda: self._ledger.detach(grant))

    async def renew(self, slot_id: str, token: int, ttl: float | None) -> Lease:
        """See `Coordinator.renew`."""
        seconds = checked_ttl(ttl)
        return await self._do(lambda: self._ledger.renew(slot_id, token, seconds))

    async def is_held(self, hold: Hold) -> bool:
        """See `Coordinator.is_held`."""
        return await self._do(lambda: self._ledger.is_held(hold))

    async def lost_among(self, holds: Collection[AnyHold]) -> list[AnyHold]:
        """See `Coordinator.lost_among`."""
        return await self._do(lambda: [hold for hold in holds if not self._ledger.is_held(hold)])

    async def taken_among(self, slot_ids: Collection[str]) -> set[str]:
        """See `Coordinator.taken_among`."""
        return {slot_id for slot_id in slot_ids if await self._locks.is_locked(slot_id)}

    async def raise_token(self, hold: Hold, above: int) -> int:
        """See `Coordinator.raise_token`."""
        return await self._do(lambda: self._ledger.raise_token(hold, above))

    # Giving back

    async def begin_return(self, grant: Grant) -> Slot:
        """See `Coordinator.begin_return`."""
        return await self._quickly(lambda ledger: ledger.begin_return(grant))

    async def release_detached(self, slot_id: str, token: int) -> Hold:
        """See `Coordinator.release_detached`."""
        return await self._do(lambda: self._ledger.release_detached(slot_id, token), undo=self._ledger.let_go)

    async def update(self, hold: Hold, slot: Slot) -> Slot:
        """See `Coordinator.update`."""
        require_own(hold, slot)
        return await self._quickly(lambda ledger: ledger.update(hold, slot))

    async def finish(self, hold: Hold, slot: Slot) -> Slot:
        """See `Coordinator.finish`."""
        require_own(hold, slot)
        require_settled(slot)
        return await self._quickly(lambda ledger: ledger.finish(hold, slot))

    async def abandon_hold(self, hold: Hold) -> None:
        """See `Coordinator.abandon_hold`."""
        await self._do(lambda: self._ledger.let_go(hold))

    # Maintenance

    async def take(
        self,
        slot_id: str,
        *,
        states: Collection[SlotState],
        raise_token: bool = False,
        becomes: SlotState | None = None,
    ) -> Hold | None:
        """See `Coordinator.take`."""
        return await self._do(
            lambda: self._ledger.take(slot_id, states, raise_token=raise_token, becomes=becomes),
            undo=self._ledger.let_go,
        )

    async def orphans(self, repo_name: str) -> list[Slot]:
        """See `Coordinator.orphans`."""
        return await self._do(lambda: self._ledger.orphans(repo_name))

    async def recover_orphan(self, slot_id: str) -> Hold | None:
        """See `Coordinator.recover_orphan`."""
        return await self._do(lambda: self._ledger.recover(slot_id), undo=self._ledger.let_go)

    async def force_unlock(self, slot_id: str) -> Slot:
        """See `Coordinator.force_unlock`."""
        return await self._do(lambda: self._ledger.force_unlock(slot_id))

    async def expire(self, slot_id: str, token: int) -> bool:
        """See `Coordinator.expire`."""
        return await self._do(lambda: self._ledger.expire(slot_id, token))

    async def park_host(self, host_id: str) -> list[str]:
        """See `Coordinator.park_host`."""
        return await self._do(lambda: self._ledger.park_host(host_id))

    async def unpark_host(self, host_id: str) -> list[str]:
        """See `Coordinator.unpark_host`."""
        return await self._do(lambda: self._ledger.unpark_host(host_id))

    # Records

    async def list_slots(self, repo_name: str) -> list[Slot]:
        """See `Coordinator.list_slots`."""
        return await self._do(lambda: self._ledger.list_slots(repo_name))

    async def get_slot(self, slot_id: str) -> Slot:
        """See `Coordinator.get_slot`."""
        return await self._store.load_slot(slot_id)

    async def next_slot_number(self, repo_name: str) -> int:
        """See `Coordinator.next_slot_number`."""
        return await self._do(lambda: self._ledger.next_slot_number(repo_name))

    async def create(self, slot: Slot) -> Hold:
        """See `Coordinator.create`."""
        require_new(slot)
        return await shielded(self._create(slot), name=f"create-{slot.slot_id}", on_abandoned=self.delete)

    async def delete(self, hold: Hold) -> None:
        """See `Coordinator.delete`."""
        await self._do(lambda: self._ledger.delete(hold))

    # Turns

    def ticket(
        self,
        repo_name: str,
        want: Want | None = None,
        *,
        on_change: Callable[[], object] | None = None,  # noqa: ARG002 - files tell nobody; who waits polls
    ) -> FileTicket:
        """See `Coordinator.ticket`."""
        drawn = self._clock()

        async def claim(wanted: Want) -> Grant | None:
            waited = (wanted.wait_seconds or 0.0) + self._clock() - drawn
            return await self._claim(attrs.evolve(wanted, wait_seconds=waited))

        return FileTicket(self._office(repo_name), None if want is None else lambda: claim(want))

    async def has_tickets(self, repo_name: str) -> bool:
        """See `Coordinator.has_tickets`."""
        return await self._do(self._office(repo_name).has_tickets)

    # Inside

    def _office(self, repo_name: str) -> TicketOffice:
        return TicketOffice(self._store.pool_directory(repo_name), repo_name, self._clock)

    async def _create(self, slot: Slot) -> Hold:
        hold = await in_thread(self._ledger.begin_create, slot)
        try:
            await self._store.save_slot(slot)
        except BaseException:
            await in_thread(self._ledger.let_go, hold)
            raise
        return hold

    async def _quickly(self, step: Callable[[Ledger], T], *, undo: Callable[[T], object] | None = None) -> T:
        """Take a step of what every lease does; only where another process has stopped amid one, where it may wait."""
        try:
            return await self._do(lambda: step(self._hasty), undo=undo, thread=in_order)
        except LockTimeoutError:
            return await self._do(lambda: step(self._ledger), undo=undo)

    async def _do(
        self,
        work: Callable[[], T],
        *,
        undo: Callable[[T], object] | None = None,
        thread: Callable[[Callable[[], None]], Awaitable[None]] = in_thread,
    ) -> T:
        """Do the work in a thread; where the caller was cancelled and will never see the outcome, undo it."""
        outcome: list[T] = []
        try:
            # Not shielded(): a task costs as much as a record lock, and a thread's work is waited for in any case.
            await thread(lambda: outcome.append(work()))
        except asyncio.CancelledError:
            if outcome and undo is not None:
                await shielded(self._undo(undo, outcome[0]), name="undo")
            raise
        finally:
            self._tell()
        return outcome[0]

    async def _undo(self, undo: Callable[[T], object], outcome: T) -> None:
        try:
            await in_thread(undo, outcome)
        except (PoolManagerError, OSError):
            _log.exception("a cancelled step could not be undone; its slot is left to recovery")

    def _unclaim(self, grant: Grant | None) -> None:
        if grant is not None:
            self._ledger.unclaim(grant)

    def _tell(self) -> None:
        news = self._ledger.news
        while news:
            kind, fields = news.popleft()
            if self._on_event is not None:
                self._on_event(kind, fields)
