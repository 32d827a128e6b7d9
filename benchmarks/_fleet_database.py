"""The database of a simulated fleet: slots and sessions in memory, changed by the project's own decisions.

What is decided in Python is called here as it is called there; what is SQL is written after the function of
`migrations/0001.sql` that each docstring names. Every call is a transaction. A failover undoes the last of them.
"""

import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Final

import attrs

from benchmarks._fleet_judge import Judge
from repopool_async.coordination._pg_changes import Change, Decide
from repopool_async.coordination._pg_rows import Row, state_of
from repopool_async.coordination.base import HOST_UNREACHABLE, Want
from repopool_async.coordination.records import after_use, candidates
from repopool_async.exceptions import CoordinatorUnavailableError
from repopool_async.models import Lease, LeaseEnd, Owner, Slot, SlotState
from repopool_async.slot_allocator import allocated

JOURNAL_SECONDS: Final = 5.0
_LOOKED_AT: Final = 8
"""How many free slots a claim chooses from."""

HoldKey = tuple[str, int, uuid.UUID]
"""A slot, and the token and the id of who takes it for his."""


@attrs.frozen
class Stored:
    """A row of the table of slots; the columns of the schema, as far as anything here depends on them."""

    slot: Slot
    session_id: uuid.UUID | None = None
    hold_id: uuid.UUID | None = None
    ended_hold_id: uuid.UUID | None = None
    overwritten: Slot | None = None
    leased_at: float = 0.0


class Database:
    """One server that every manager asks.

    Args:
        time: the virtual clock. ttl: of sessions, in seconds.
    """

    EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)

    def __init__(self, slots: Collection[Slot], *, judge: Judge, time: Callable[[], float], ttl: float) -> None:
        self.is_down = False
        self.sessions: dict[uuid.UUID, float] = {}
        self.silent_hosts: dict[str, bool] = {}
        self._judge = judge
        self._time = time
        self._ttl = ttl
        self._began = 0.0
        self._rows: dict[str, Stored] = {}
        self._free: dict[str, dict[str, None]] = defaultdict(dict)
        self._busy: dict[str, dict[str, None]] = defaultdict(dict)
        self._held: dict[uuid.UUID, str] = {}
        self._of_host: dict[str, list[str]] = defaultdict(list)
        self._journal: deque[tuple[float, dict[Any, Any], Any, Any]] = deque()
        for slot in slots:
            self._of_host[slot.host_id].append(slot.slot_id)
            self._store(slot.slot_id, Stored(slot))

    def now(self) -> datetime:
        """Return the server's clock, for records."""
        return self.EPOCH + timedelta(seconds=self._time())

    def rows(self) -> Collection[Stored]:
        """Return all rows."""
        return self._rows.values()

    # -- failing -------------------------------------------------------------------------------------------------

    def fail_over(self, lost_seconds: float) -> int:
        """Go on as another server, which has not seen the last commits; return how many are lost."""
        self._began = self._time()
        lost = 0
        while self._journal and self._journal[-1][0] > self._time() - lost_seconds:
            _, table, key, before = self._journal.pop()
            lost += 1
            if table is self._rows:
                self._judge.note("undone", self._rows[key].slot.path.rpartition("/")[0])
                self._store(key, before)
            elif before is None:
                table.pop(key, None)
            else:
                table[key] = before
        self._journal.clear()
        return lost

    def _write(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        at = self._time()
        while self._journal and self._journal[0][0] < at - JOURNAL_SECONDS:
            self._journal.popleft()
        self._journal.append((at, table, key, table.get(key)))
        if table is self._rows:
            self._store(key, value)
        elif value is None:
            table.pop(key, None)
        else:
            table[key] = value

    def _store(self, slot_id: str, row: Stored) -> None:
        before = self._rows.get(slot_id)
        if before is not None and before.hold_id is not None:
            self._held.pop(before.hold_id, None)
        self._rows[slot_id] = row
        if row.hold_id is not None:
            self._held[row.hold_id] = slot_id
        pool = row.slot.repo_name
        is_available = row.slot.state is SlotState.AVAILABLE
        _keep(self._free[pool], slot_id, is_in=is_available and row.session_id is None)
        _keep(self._busy[pool], slot_id, is_in=not is_available)

    # -- sessions ------------------------------------------------------------------------------------------------

    def open_session(self, session_id: uuid.UUID) -> None:
        """Make a process known."""
        self._write(self.sessions, session_id, self._time() + self._ttl)

    def beat(self, session_id: uuid.UUID) -> bool:
        """`repopool.beat`: a late session comes back, one that was reaped does not."""
        if session_id not in self.sessions:
            return False
        self._write(self.sessions, session_id, self._time() + self._ttl)
        return True

    def is_alive(self, session_id: uuid.UUID) -> bool:
        """`repopool.is_alive`."""
        return self.sessions.get(session_id, 0.0) > self._time()

    def reap(self, session_id: uuid.UUID, grace: float, *, is_full: bool) -> int:
        """`repopool.reap`: end late sessions, but nobody in the first time after the server began."""
        if not self.is_alive(session_id):
            return 0
        at = self._time()
        is_settled = at - self._began > self._ttl
        late = [one for one, expires in self.sessions.items() if is_settled and expires < at - grace]
        for one in late:
            self._write(self.sessions, one, None)
            self._judge.note("sessions reaped")
        if late or is_full:
            self._bury()
        return len(late)

    def _bury(self) -> None:
        """`repopool.bury`: what is held by no session is nobody's, under a token that grew."""
        for hold_id, slot_id in list(self._held.items()):
            row = self._rows[slot_id]
            if row.session_id in self.sessions:
                continue
            slot = attrs.evolve(row.slot, token=row.slot.token + 1)
            self._put(attrs.evolve(row, slot=slot, session_id=None, hold_id=None, overwritten=None))
            self._tell("buried", row.slot, hold_id)

    # -- claiming and giving back --------------------------------------------------------------------------------

    def claim(self, session_id: uuid.UUID, hold_id: uuid.UUID, want: Want, owner: Owner) -> tuple[Slot, Slot] | None:
        """`repopool.claim`: lease a free slot; returns its record and the one before, None where nothing is free."""
        if not self.is_alive(session_id):
            raise CoordinatorUnavailableError("the session has expired; try again once there is a new one")
        free = self._free[want.repo_name]
        found = candidates([self._rows[slot_id].slot for slot_id in islice(reversed(free), _LOOKED_AT)], want)
        if not found:
            return None
        before = found[0]
        at = self._time()
        lease = Lease(want.lease_id, before.token + 1, owner, self.now(), at, commit=want.commit, branch=want.branch)
        slot = allocated(before, lease, self.now())
        row = self._rows[slot.slot_id]
        self._put(
            attrs.evolve(row, slot=slot, session_id=session_id, hold_id=hold_id, overwritten=before, leased_at=at)
        )
        self._tell("claims", slot, hold_id)
        return slot, before

    def begin_return(self, slot_id: str, hold_id: uuid.UUID, token: int, *, is_repeated: bool) -> Slot | None:
        """`repopool.begin_return`: end a lease; None where it is not the hold's any more."""
        row = self._rows[slot_id]
        if row.hold_id != hold_id or row.slot.token != token:
            return None
        if row.slot.state is SlotState.ALLOCATED:
            slot = after_use(row.slot, self._time() - row.leased_at, LeaseEnd.RETURNED)
            self._put(attrs.evolve(row, slot=slot, overwritten=None))
            self._tell("returns", slot, hold_id)
            return slot
        return row.slot if is_repeated and row.slot.state is SlotState.CLEANING else None

    def write(self, hold_id: uuid.UUID, token: int, slot: Slot) -> bool:
        """`repopool.write`: write the record of a slot that is held."""
        row = self._rows[slot.slot_id]
        if row.hold_id != hold_id or row.slot.token != token:
            return False
        self._put(attrs.evolve(row, slot=slot, overwritten=None))
        self._tell("written", slot, hold_id)
        return True

    def finish(self, hold_id: uuid.UUID, token: int, slot: Slot, *, is_repeated: bool) -> bool:
        """`repopool.finish`: write what became of a slot and let go of it."""
        row = self._rows[slot.slot_id]
        if row.hold_id == hold_id and row.slot.token == token:
            self._put(Stored(slot, ended_hold_id=hold_id))
            self._tell("finished", slot, hold_id)
            return True
        return is_repeated and row.ended_hold_id == hold_id

    def abandon(self, hold_id: uuid.UUID) -> None:
        """`repopool.abandon`: undo what a client may or may not have been given, but for the token."""
        row = self._of_hold(hold_id)
        if row is None:
            return
        slot = row.slot
        if row.overwritten is not None:
            slot = attrs.evolve(row.overwritten, token=slot.token)
        self._put(attrs.evolve(row, slot=slot, session_id=None, hold_id=None, overwritten=None))
        self._tell("abandoned claims", slot, hold_id)

    def let_go(self, hold_id: uuid.UUID) -> None:
        """`repopool.let_go`: leave a held slot as it is."""
        row = self._of_hold(hold_id)
        if row is not None:
            self._put(attrs.evolve(row, session_id=None, hold_id=None, overwritten=None))
            self._tell("let go", row.slot, hold_id)

    # -- decided in Python ---------------------------------------------------------------------------------------

    def change(self, slot_id: str, session_id: uuid.UUID, decide: Decide) -> Change | None:
        """Do as `_pg_changes.change_slot`."""
        row = self._rows[slot_id]
        change = decide(self._look(row))
        if change is None:
            return None
        holder = session_id if change.hold_id is not None else None
        self._put(attrs.evolve(row, slot=change.slot, session_id=holder, hold_id=change.hold_id, overwritten=None))
        self._tell("changed", change.slot, change.hold_id)
        return change

    def orphans(self, repo_name: str) -> list[Slot]:
        """`SlotTable.orphans`."""
        rows = (self._rows[slot_id] for slot_id in self._busy[repo_name])
        return [row.slot for row in rows if self._look(row).is_orphan]

    def quarantined(self, repo_name: str) -> list[Slot]:
        """Return a pool's slots that only a repair brings back."""
        slots = (self._rows[slot_id].slot for slot_id in self._busy[repo_name])
        return [slot for slot in slots if slot.state is SlotState.ERROR and slot.error != HOST_UNREACHABLE]

    def lost_among(self, holds: Collection[HoldKey]) -> list[HoldKey]:
        """`Coordinator.lost_among`."""
        return [hold for hold in holds if not self._stands(*hold)]

    def held_by(self, session_id: uuid.UUID) -> list[uuid.UUID]:
        """Return the ids of the holds of a session."""
        return [hold_id for hold_id, slot_id in self._held.items() if self._rows[slot_id].session_id == session_id]

    def _stands(self, slot_id: str, token: int, hold_id: uuid.UUID) -> bool:
        row = self._rows[slot_id]
        return row.slot.token == token and row.hold_id == hold_id

    def _look(self, row: Stored) -> Row:
        """What `_pg_rows.LOOK` says; no lease here is detached."""
        return Row(
            slot=row.slot,
            state=state_of(row.slot),
            hold_id=row.hold_id,
            is_held=row.session_id in self.sessions,
            is_detached=False,
            is_expired=False,
            held_seconds=self._time() - row.leased_at,
        )

    # -- hosts ---------------------------------------------------------------------------------------------------

    def park(self, host_id: str) -> None:
        """Note that a host does not answer, and `repopool.park_host`: who held its slots has lost them."""
        self._write(self.silent_hosts, host_id, value=True)
        for slot_id in self._of_host[host_id]:
            row = self._rows[slot_id]
            slot = row.slot
            if slot.state is SlotState.ERROR:
                continue
            if slot.state is SlotState.ALLOCATED:
                slot = attrs.evolve(slot, unsaved=slot.unsaved or str(LeaseEnd.FORCED))
            slot = attrs.evolve(slot, state=SlotState.ERROR, error=HOST_UNREACHABLE, token=slot.token + 1)
            self._put(Stored(slot, ended_hold_id=row.ended_hold_id))
            self._tell("parked slots", slot, row.hold_id)

    def unpark(self, host_id: str) -> None:
        """Note that a host answers again, and `repopool.unpark_host`: its slots are orphans."""
        self._write(self.silent_hosts, host_id, value=None)
        for slot_id in self._of_host[host_id]:
            row = self._rows[slot_id]
            if row.slot.error == HOST_UNREACHABLE:
                self._put(attrs.evolve(row, slot=attrs.evolve(row.slot, state=SlotState.CLEANING, error=None)))

    # -- inside --------------------------------------------------------------------------------------------------

    def _of_hold(self, hold_id: uuid.UUID) -> Stored | None:
        slot_id = self._held.get(hold_id)
        return None if slot_id is None else self._rows[slot_id]

    def _put(self, row: Stored) -> None:
        self._write(self._rows, row.slot.slot_id, row)

    def _tell(self, kind: str, slot: Slot, hold_id: uuid.UUID | None) -> None:
        who = "nobody" if hold_id is None else f"hold {hold_id.int}"
        self._judge.note(kind, slot.path.rpartition("/")[0], f"{who} token {slot.token} {slot.state}")


def _keep(index: dict[str, None], slot_id: str, *, is_in: bool) -> None:
    index.pop(slot_id, None)
    if is_in:
        index[slot_id] = None
