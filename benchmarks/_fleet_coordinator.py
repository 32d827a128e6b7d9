"""The coordinator as one manager of a simulated fleet has it: the verbs of `Coordinator`, over a bad network.

As `coordination.postgres` does, it chooses the ids of holds itself, gives back for ever what it may have been given,
insists on ending leases, and begins nothing that it may not be alive for. What the database says is not decided here.
"""

import uuid
from collections.abc import Callable, Collection
from typing import Final, Protocol, TypeVar

import attrs

from benchmarks._fleet_database import Database
from repopool_async._aio import TaskSet
from repopool_async.coordination._pg_changes import Change, Decide, raising, recovering, taking
from repopool_async.coordination.base import Grant, Hold, Want
from repopool_async.coordination.records import lease_of, lost
from repopool_async.exceptions import CoordinatorUnavailableError
from repopool_async.models import Owner, Slot, SlotState

T = TypeVar("T")

TRUSTED_SHARE: Final = 0.9
_RETRY_SECONDS: Final = (0.05, 1.0)
_DEBT_SECONDS: Final = (0.05, 5.0)


class Client(Protocol):
    """The process that asks."""

    @property
    def database(self) -> Database:
        """Which is asked."""

    @property
    def owner(self) -> Owner:
        """Who it is, for records."""

    async def ask(self, step: Callable[[], T]) -> T:
        """Have the database do a step; raises as `Network.ask_database`."""

    async def sleep(self, seconds: float) -> None:
        """Wait; longer where the process is paused meanwhile."""

    def time(self) -> float:
        """Return the seconds that have passed."""

    def new_id(self) -> uuid.UUID:
        """Return an id that nothing has yet."""


@attrs.define(eq=False)
class HeldSlot:
    """The `Hold.lock` of this coordinator.

    Attributes:
        is_held: whether it has not been let go of. is_lost: whether it is known to have been taken away.
    """

    hold_id: uuid.UUID
    is_held: bool = True
    is_lost: bool = False


class FleetCoordinator:
    """One manager's; its session is made by `open`.

    Args:
        tasks: in which debts are paid. ttl: of sessions, in seconds.
    """

    def __init__(self, client: Client, tasks: TaskSet, *, ttl: float) -> None:
        self.session_id = client.new_id()
        self.trusted_until = float("-inf")
        self.trusted_since = float("-inf")
        self.holds: dict[Hold, None] = {}
        self._client = client
        self._database = client.database
        self._ttl = ttl
        self._asked_for: set[uuid.UUID] = set()
        self._debts: dict[uuid.UUID, Callable[[uuid.UUID], None]] = {}
        self._tasks = tasks
        self._is_paying = False

    # -- being alive ---------------------------------------------------------------------------------------------

    @property
    def is_trusted(self) -> bool:
        """Whether the database surely takes us for alive."""
        return self._client.time() < self.trusted_until

    @property
    def is_steady(self) -> bool:
        """Whether that has been so for one whole `ttl`."""
        return self.is_trusted and self._client.time() - self.trusted_since >= self._ttl

    async def open(self) -> None:
        """Make this process known, as somebody new."""
        self.session_id = self._client.new_id()
        session_id, sent = self.session_id, self._client.time()
        await self._client.ask(lambda: self._database.open_session(session_id))
        self._trust(sent)

    async def beat(self) -> bool:
        """Beat once; return whether it is known what came of it."""
        sent = self._client.time()
        try:
            if await self._client.ask(lambda: self._database.beat(self.session_id)):
                self._trust(sent)
            else:
                self.trusted_until = float("-inf")
                await self.open()
        except CoordinatorUnavailableError:
            return False
        return True

    def _trust(self, sent: float) -> None:
        if not self.is_trusted:
            self.trusted_since = self._client.time()
        self.trusted_until = sent + self._ttl * TRUSTED_SHARE

    def _require_trust(self) -> None:
        if not self.is_trusted:
            raise CoordinatorUnavailableError("nothing new is leased before the database answers; try again then")

    # -- leases --------------------------------------------------------------------------------------------------

    async def claim(self, want: Want) -> Grant | None:
        """See `Coordinator.claim`."""
        self._require_trust()
        hold_id, session_id = self._new_hold_id(), self.session_id
        try:
            claimed = await self._client.ask(
                lambda: self._database.claim(session_id, hold_id, want, self._client.owner)
            )
        except CoordinatorUnavailableError:
            self._owe(hold_id, self._database.abandon)
            raise
        finally:
            self._asked_for.discard(hold_id)
        if claimed is None:
            return None
        slot, before = claimed
        grant = Grant(slot=slot, token=slot.token, lock=HeldSlot(hold_id), lease=lease_of(slot), previous=before)
        self.holds[grant] = None
        return grant

    async def raise_token(self, hold: Hold, above: int) -> int:
        """See `Coordinator.raise_token`."""
        change = await self._change(hold.slot.slot_id, raising(hold.lock.hold_id, hold.token, above))
        assert change is not None
        hold.become(change.slot)
        return hold.token

    async def begin_return(self, grant: Grant) -> Slot:
        """See `Coordinator.begin_return`; where nobody answers, the slot is left to recovery."""
        slot_id, hold_id, token = grant.slot.slot_id, grant.lock.hold_id, grant.token
        try:
            slot = await self._insist(
                lambda is_repeated: self._database.begin_return(slot_id, hold_id, token, is_repeated=is_repeated)
            )
        except CoordinatorUnavailableError:
            self.abandon(grant)
            raise
        if slot is None:
            raise self._lost(grant)
        grant.slot = slot
        return slot

    async def update(self, hold: Hold, slot: Slot) -> Slot:
        """See `Coordinator.update`."""
        hold_id, token = hold.lock.hold_id, hold.token
        if not hold.lock.is_held or not await self._insist(lambda _: self._database.write(hold_id, token, slot)):
            raise self._lost(hold)
        hold.slot = slot
        return slot

    async def finish(self, hold: Hold, slot: Slot) -> None:
        """See `Coordinator.finish`."""
        if not hold.lock.is_held:
            raise self._lost(hold)
        hold_id, token = hold.lock.hold_id, hold.token
        is_done = await self._insist(
            lambda is_repeated: self._database.finish(hold_id, token, slot, is_repeated=is_repeated)
        )
        if not is_done:
            raise self._lost(hold)
        self._end(hold)

    def abandon(self, hold: Hold) -> None:
        """Do as `Coordinator.abandon_hold`, in the background and until the database has heard of it."""
        if hold.lock.is_held:
            self._end(hold)
            self._owe(hold.lock.hold_id, self._database.let_go)

    async def note_lost(self) -> None:
        """Mark what of all that is held was taken away."""
        asked = {(hold.slot.slot_id, hold.token, hold.lock.hold_id): hold for hold in self.holds}
        for key in await self._client.ask(lambda: self._database.lost_among(list(asked))):
            hold = asked[key]
            # It may have been given a higher token since it was asked for.
            hold.lock.is_lost = hold.lock.is_lost or hold.token == key[1]

    async def give_back_unknown(self) -> None:
        """Let go of what only the database believes to be ours; see `coordination._pg_holds`."""
        session_id = self.session_id
        ours = await self._client.ask(lambda: self._database.held_by(session_id))
        known = {hold.lock.hold_id for hold in self.holds} | self._asked_for
        for hold_id in ours:
            if hold_id not in known:
                self._owe(hold_id, self._database.let_go)

    # -- recovery ------------------------------------------------------------------------------------------------

    async def orphans(self, repo_name: str) -> list[Slot]:
        """See `Coordinator.orphans`."""
        return await self._client.ask(lambda: self._database.orphans(repo_name))

    async def quarantined(self, repo_name: str) -> list[Slot]:
        """Return a pool's slots that only a repair brings back."""
        return await self._client.ask(lambda: self._database.quarantined(repo_name))

    async def recover_orphan(self, slot_id: str) -> Hold | None:
        """See `Coordinator.recover_orphan`."""
        return await self._hold(slot_id, recovering)

    async def take(self, slot_id: str, states: Collection[SlotState], becomes: SlotState | None) -> Hold | None:
        """See `Coordinator.take`."""
        return await self._hold(slot_id, lambda hold_id: taking(hold_id, states, raise_token=False, becomes=becomes))

    async def _hold(self, slot_id: str, deciding: Callable[[uuid.UUID], Decide]) -> Hold | None:
        self._require_trust()
        hold_id = self._new_hold_id()
        try:
            change = await self._change(slot_id, deciding(hold_id))
        except CoordinatorUnavailableError:
            self._owe(hold_id, self._database.abandon)
            raise
        finally:
            self._asked_for.discard(hold_id)
        if change is None:
            return None
        hold = Hold(change.slot, change.slot.token, HeldSlot(hold_id))
        self.holds[hold] = None
        return hold

    def _new_hold_id(self) -> uuid.UUID:
        hold_id = self._client.new_id()
        self._asked_for.add(hold_id)
        return hold_id

    async def _change(self, slot_id: str, decide: Decide) -> Change | None:
        session_id = self.session_id
        return await self._client.ask(lambda: self._database.change(slot_id, session_id, decide))

    # -- inside --------------------------------------------------------------------------------------------------

    async def _insist(self, step: Callable[[bool], T]) -> T:
        """Ask until there is an answer, for one `ttl`; the step is told whether it may have happened before."""
        deadline = self._client.time() + self._ttl
        is_repeated = False
        pause = _RETRY_SECONDS[0]
        while True:
            try:
                return await self._client.ask(lambda repeated=is_repeated: step(repeated))  # type: ignore[misc]
            except CoordinatorUnavailableError:
                if self._client.time() >= deadline:
                    raise
            is_repeated = True
            await self._client.sleep(pause)
            pause = min(2 * pause, _RETRY_SECONDS[1])

    def _lost(self, hold: Hold) -> Exception:
        hold.lock.is_lost = True
        self._end(hold)
        return lost(hold.slot, hold.token)

    def _end(self, hold: Hold) -> None:
        hold.lock.is_held = False
        self.holds.pop(hold, None)

    def _owe(self, hold_id: uuid.UUID, pay: Callable[[uuid.UUID], None]) -> None:
        self._debts[hold_id] = pay
        if not self._is_paying:
            self._is_paying = True
            self._tasks.spawn(self._pay_all(), name="settle")

    async def _pay_all(self) -> None:
        pause = _DEBT_SECONDS[0]
        while self._debts:
            for hold_id, pay in list(self._debts.items()):
                if await self._is_paid(hold_id, pay):
                    self._debts.pop(hold_id)
            if self._debts:
                await self._client.sleep(pause)
                pause = min(2 * pause, _DEBT_SECONDS[1])
        self._is_paying = False

    async def _is_paid(self, hold_id: uuid.UUID, pay: Callable[[uuid.UUID], None]) -> bool:
        try:
            await self._client.ask(lambda: pay(hold_id))
        except CoordinatorUnavailableError:
            return False
        return True
