"""Several coordinators on one directory against a model of a few lines: whatever happens in whatever order.

A kernel lock taken twice through two open files excludes within a process just as between two, so coordinators that
share nothing but the directory stand for processes; one that lets go of a lock without a word stands for a dead one.
"""

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from repopool_async._clock import now
from repopool_async.coordination.base import Grant, Hold
from repopool_async.exceptions import LeaseLostError, SlotNotFoundError
from repopool_async.models import Slot, SlotState
from repopool_async.slot_allocator import available, broken
from repopool_async.slot_store import SlotStore
from tests._workers import REPO, make_coordinator, make_pool, make_seal, make_slot

T = TypeVar("T")
PROCESSES = 3
TTL = 10.0

_process = st.integers(0, PROCESSES - 1)
_index = st.integers(0, 7)


@attrs.define(eq=False)
class _Held:
    """A hold that somebody was given, and may still try to use."""

    hold: Hold
    process: int

    @property
    def is_detached(self) -> bool:
        return isinstance(self.hold, Grant) and self.hold.lease.is_detached


@attrs.define
class _Slot:
    """What should be true of a slot."""

    state: SlotState = SlotState.AVAILABLE
    token: int = 0
    holder: _Held | None = None
    expires: float | None = None


class Coordination(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.time = 1000.0
        self.store = SlotStore(self.directory.name)
        path = Path(self.directory.name)
        self.processes = [make_coordinator(path, clock=lambda: self.time) for _ in range(PROCESSES)]
        self.slots: dict[str, _Slot] = {}
        self.given: list[_Held] = []
        self.highest = 0

    def teardown(self) -> None:
        self.runner.close()
        self.directory.cleanup()

    @initialize(count=st.integers(1, 3))
    def make_pool(self, count: int) -> None:
        for slot_id in self.run(make_pool(Path(self.directory.name), count)):
            self.slots[slot_id] = _Slot()
        self.highest = count

    # Claiming and giving back

    @rule(process=_process, is_detached=st.booleans(), is_let_go=st.booleans())
    def claim(self, process: int, is_detached: bool, is_let_go: bool) -> None:
        free = {
            slot_id for slot_id, slot in self.slots.items() if slot.state is SlotState.AVAILABLE and slot.holder is None
        }
        grant = self.run(
            self.processes[process].claim(
                REPO,
                commit=None,
                branch=None,
                lease_id=f"lease-{len(self.given)}",
                detached_ttl=TTL if is_detached else None,
            )
        )
        if grant is None:
            assert not free
            return
        assert grant.slot.slot_id in free
        slot = self.slots[grant.slot.slot_id]
        assert grant.token == grant.lease.token == slot.token + 1
        slot.state, slot.token = SlotState.ALLOCATED, grant.token
        slot.expires = self.time + TTL if is_detached else None
        self.give(slot, grant, process)
        if is_detached and is_let_go:
            self.detach(0)

    @precondition(lambda self: self.given)
    @rule(index=_index)
    def detach(self, index: int) -> None:
        held = self.recent(index)
        if not held.is_detached or not isinstance(held.hold, Grant):
            return
        slot = self.slot_of(held)
        may = self.is_own(held) and self.is_live(slot)
        if self.attempt(held, self.processes[held.process].detach(held.hold), may=may):
            assert slot is not None
            slot.expires, slot.holder = self.time + TTL, None

    @precondition(lambda self: self.given)
    @rule(index=_index)
    def begin_return(self, index: int) -> None:
        held = self.recent(index)
        if not isinstance(held.hold, Grant):
            return
        slot = self.slot_of(held)
        may = self.is_own(held) and slot is not None and slot.state is SlotState.ALLOCATED
        if self.attempt(held, self.processes[held.process].begin_return(held.hold), may=may):
            assert slot is not None
            slot.state, slot.expires, slot.holder = SlotState.CLEANING, None, held

    @precondition(lambda self: self.given)
    @rule(index=_index, is_broken=st.booleans())
    def finish(self, index: int, is_broken: bool) -> None:
        held = self.recent(index)
        slot = self.slot_of(held)
        record = held.hold.slot
        end = broken(record, "bad") if is_broken else available(record, make_seal(), now())
        if self.attempt(held, self.processes[held.process].finish(held.hold, end), may=self.is_own(held)):
            assert slot is not None
            slot.state, slot.expires, slot.holder = end.state, None, None

    @precondition(lambda self: self.given)
    @rule(index=_index)
    def update(self, index: int) -> None:
        held = self.recent(index)
        record = attrs.evolve(held.hold.slot, last_branch=f"branch-{index}")
        if self.attempt(held, self.processes[held.process].update(held.hold, record), may=self.is_own(held)):
            slot = self.slot_of(held)
            assert slot is not None
            slot.state = record.state

    @precondition(lambda self: self.given)
    @rule(index=_index)
    def die_or_abandon(self, index: int) -> None:
        held = self.recent(index)
        self.run(self.processes[held.process].abandon_hold(held.hold))
        slot = self.slot_of(held)
        if slot is not None and slot.holder is held:
            slot.holder = None

    @precondition(lambda self: self.slots)
    @rule(process=_process, index=_index, lag=st.integers(-1, 1))
    def release_detached(self, process: int, index: int, lag: int) -> None:
        slot_id, slot = self.any_slot(index)
        may = lag == 0 and self.is_live(slot)
        try:
            hold = self.run(self.processes[process].release_detached(slot_id, slot.token + lag))
        except LeaseLostError:
            assert not may
            return
        assert may
        slot.state, slot.expires = SlotState.CLEANING, None
        self.give(slot, hold, process)

    @precondition(lambda self: self.slots)
    @rule(process=_process, index=_index, lag=st.integers(-1, 1), ttl=st.floats(1, 20))
    def renew(self, process: int, index: int, lag: int, ttl: float) -> None:
        slot_id, slot = self.any_slot(index)
        is_lease = slot.state is SlotState.ALLOCATED and lag == 0
        may = is_lease and (slot.expires is None or self.is_live(slot))
        try:
            lease = self.run(self.processes[process].renew(slot_id, slot.token + lag, ttl))
        except LeaseLostError:
            assert not may
            return
        assert may
        if slot.expires is not None:
            slot.expires = self.time + ttl
        assert lease.expires_boottime == slot.expires

    # Maintenance

    @precondition(lambda self: self.slots)
    @rule(
        process=_process,
        index=_index,
        states=st.sets(st.sampled_from(SlotState), min_size=1),
        raise_token=st.booleans(),
        is_marked=st.booleans(),
    )
    def take(self, process: int, index: int, states: set[SlotState], raise_token: bool, is_marked: bool) -> None:
        slot_id, slot = self.any_slot(index)
        may = slot.state in states and slot.holder is None and not self.is_live(slot)
        hold = self.run(
            self.processes[process].take(
                slot_id,
                states=states,
                raise_token=raise_token,
                becomes=SlotState.CLEANING if is_marked else None,
            )
        )
        assert (hold is not None) == may
        if hold is not None:
            slot.token += raise_token
            if is_marked:
                slot.state, slot.expires = SlotState.CLEANING, None
            self.give(slot, hold, process)

    @precondition(lambda self: self.slots)
    @rule(process=_process, index=_index)
    def recover(self, process: int, index: int) -> None:
        slot_id, slot = self.any_slot(index)
        may = self.is_orphan(slot)
        hold = self.run(self.processes[process].recover_orphan(slot_id))
        assert (hold is not None) == may
        if hold is not None:
            slot.state, slot.token, slot.expires = SlotState.CLEANING, slot.token + 1, None
            self.give(slot, hold, process)

    @precondition(lambda self: self.slots)
    @rule(process=_process, index=_index)
    def force_unlock(self, process: int, index: int) -> None:
        slot_id, slot = self.any_slot(index)
        self.run(self.processes[process].force_unlock(slot_id))
        if slot.state is SlotState.ALLOCATED or slot.holder is not None:
            slot.token, slot.holder, slot.expires = slot.token + 1, None, None
            if slot.state is not SlotState.ERROR:
                slot.state = SlotState.CLEANING

    @rule(process=_process)
    def add_slot(self, process: int) -> None:
        coordinator = self.processes[process]
        number = self.run(coordinator.next_slot_number(REPO))
        assert number > self.highest
        self.highest = number
        if len(self.slots) < 4:
            hold = self.run(coordinator.create(make_slot(self.store, number)))
            slot = self.slots[hold.slot.slot_id] = _Slot(state=SlotState.CLEANING)
            self.give(slot, hold, process)

    @precondition(lambda self: self.given)
    @rule(index=_index)
    def remove_slot(self, index: int) -> None:
        held = self.recent(index)
        if self.attempt(held, self.processes[held.process].delete(held.hold), may=self.is_own(held)):
            del self.slots[held.hold.slot.slot_id]

    @rule(seconds=st.floats(0, 15))
    def let_time_pass(self, seconds: float) -> None:
        self.time += seconds

    # What must always be true

    @invariant()
    def every_process_sees_the_same_slots_and_orphans(self) -> None:
        expected = {slot_id: (slot.state, slot.token) for slot_id, slot in self.slots.items()}
        orphans = {slot_id for slot_id, slot in self.slots.items() if self.is_orphan(slot)}
        for coordinator in self.processes:
            found = self.run(coordinator.list_slots(REPO))
            assert {slot.slot_id: (slot.state, slot.token) for slot in found} == expected
            assert {slot.slot_id for slot in self.run(coordinator.orphans(REPO))} == orphans

    @invariant()
    def nobody_but_the_holder_holds(self) -> None:
        standing: dict[str, list[_Held]] = {}
        for held in self.given:
            slot = self.slot_of(held)
            expected = slot is not None and self.holds(held, slot)
            assert self.run(self.processes[held.process].is_held(held.hold)) == expected
            if expected:
                standing.setdefault(held.hold.slot.slot_id, []).append(held)
        assert all(len(holders) == 1 for holders in standing.values())

    # Inside

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(step)

    def attempt(self, held: _Held, step: Coroutine[Any, Any, object], *, may: bool) -> bool:
        """Make a step with a hold; whether it succeeds is foretold, and where it does not nothing changes."""
        before = self.stored(held)
        try:
            self.run(step)
        except (LeaseLostError, SlotNotFoundError):
            assert not may
            assert self.stored(held) == before
            return False
        assert may
        return True

    def stored(self, held: _Held) -> Slot | None:
        try:
            return self.store.read_slot_sync(held.hold.slot.slot_id)
        except SlotNotFoundError:
            return None

    def give(self, slot: _Slot, hold: Hold, process: int) -> None:
        slot.holder = _Held(hold, process)
        self.given.append(slot.holder)

    def recent(self, index: int) -> _Held:
        return self.given[-1 - index % len(self.given)]

    def any_slot(self, index: int) -> tuple[str, _Slot]:
        return list(self.slots.items())[index % len(self.slots)]

    def slot_of(self, held: _Held) -> _Slot | None:
        return self.slots.get(held.hold.slot.slot_id)

    def is_live(self, slot: _Slot | None) -> bool:
        """Whether a detached lease keeps the slot."""
        return (
            slot is not None
            and slot.state is SlotState.ALLOCATED
            and slot.expires is not None
            and self.time < slot.expires
        )

    def is_own(self, held: _Held) -> bool:
        slot = self.slot_of(held)
        if slot is None or slot.token != held.hold.token:
            return False
        return slot.holder is held or (held.is_detached and self.is_live(slot))

    def holds(self, held: _Held, slot: _Slot) -> bool:
        if held.is_detached:
            return slot.token == held.hold.token and self.is_live(slot)
        return slot.holder is held

    def is_orphan(self, slot: _Slot) -> bool:
        if slot.state not in (SlotState.ALLOCATED, SlotState.CLEANING) or self.is_live(slot):
            return False
        is_expired = slot.state is SlotState.ALLOCATED and slot.expires is not None
        return is_expired or slot.holder is None


class CoordinationAtLength(Coordination):
    """The same for longer."""


SETTINGS = settings(
    max_examples=15,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestCoordination = pytest.mark.endurance(Coordination.TestCase)
TestCoordination.settings = SETTINGS
TestCoordinationAtLength = pytest.mark.soak(pytest.mark.timeout(600)(CoordinationAtLength.TestCase))
TestCoordinationAtLength.settings = settings(SETTINGS, max_examples=150)
