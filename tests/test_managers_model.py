"""Several managers, each in a process of its own, on one directory against a model of a few lines.

Processes are killed for real, also amid a lease's end or a recovery. What a lessee that did not give its slot back had
made must be saved before its slot is anybody else's or gone. When slots of the dead are recovered, and by whom, is
left open: until it is seen to be AVAILABLE again, such a slot may be in any state. No rule has a precondition, which
such a slot could make true in one run of an example and not in the next.
"""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from repopool_async import SlotState
from tests._managers import Nursery, Process, nursery

pytestmark = pytest.mark.endurance
PROCESSES = 3
SLOTS = 2
MOST_SLOTS = 4
TTL = 1000.0
MOMENT = 300.0
"""By what the clock is set forward: of this and `TTL` no difference is so small that real time could decide."""

_process = st.integers(0, PROCESSES - 1)
_index = st.integers(0, 7)


@attrs.define(eq=False)
class _Lease:
    lease_id: str
    slot_id: str
    token: int
    path: Path
    process: Process
    expires: float | None


@attrs.define
class _Slot:
    """What should be true of a slot: it is leased, or free, or a dead lessee's until somebody has recovered it."""

    lease: _Lease | None = None
    is_free: bool = True


@attrs.define
class World:
    """A pool that the examples share, because making one takes longer than most of them; after a failure, another."""

    nursery: Nursery
    url: str
    ahead: float = 0.0
    highest: int = SLOTS
    is_good: bool = False
    _count: int = 0

    def ensure(self) -> None:
        if self.is_good:
            return
        self.nursery.kill_all()
        self._count += 1
        self.nursery.directory = self.nursery.socket_path.parent / f"world{self._count}"
        self.nursery.directory.mkdir()
        self.ahead, self.highest = 0.0, SLOTS
        self.nursery.set_clock(self.ahead)
        process = self.nursery.spawn()
        process.call("create", url=self.url, num_slots=SLOTS)
        process.kill()


class Managers(RuleBasedStateMachine):
    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[Process | None] = [None] * PROCESSES
        self.slots: dict[str, _Slot] = {}
        self.ended: list[_Lease] = []
        self.unsaved: dict[str, set[str]] = {}
        self.must_be_saved: set[str] = set()
        self.tokens: dict[str, int] = {}
        self.target: int | None = None
        self.in_file = 0

    @initialize()
    def begin(self) -> None:
        self.world.ensure()
        self.world.is_good = False
        for slot_id in self.process(1).call("slots"):
            self.slots[slot_id] = _Slot()
        assert len(self.slots) == SLOTS

    def teardown(self) -> None:
        """Whatever was done, a new process finds or makes all well, and the pool is as it was for the next example."""
        for index in range(PROCESSES):
            self.kill(index)
        self.let_time_pass(4)
        process = self.process(1)
        process.call("recover")
        self.look(process)
        assert all(slot.is_free for slot in self.slots.values())
        assert self.saved() == self.must_be_saved
        process.call("resize", num_slots=SLOTS)
        self.look(process, may_vanish=set(self.slots), may_appear=True)
        for lease_id in self.must_be_saved:
            self.git("update-ref", "-d", f"refs/salvage/{lease_id}")
        self.kill(1)
        self.world.is_good = len(self.slots) == SLOTS

    # Leasing

    @rule(index=_process, is_detached=st.booleans(), commits=st.booleans())
    def allocate(self, index: int, is_detached: bool, commits: bool) -> None:
        process = self.process(index)
        self.look(process)
        ttl = TTL if is_detached else None
        certain = {slot_id for slot_id, slot in self.slots.items() if slot.is_free} - self.passing()
        given = process.call("allocate", timeout=0, ttl=ttl)
        if given is None:
            assert not certain
            if not self.dead() - self.passing():
                return
            self.let_time_pass(1)  # as long as it takes until a waiting process looks for the dead again
            given = process.call("allocate", timeout=30, ttl=ttl)
            assert given is not None
        slot_id = given["slot_id"]
        assert slot_id in self.dead() or self.slots[slot_id].is_free
        assert given["token"] > self.tokens.get(slot_id, 0)
        self.tokens[slot_id] = given["token"]
        self.see_saved(slot_id)
        expires = self.world.ahead + TTL if is_detached else None
        lease = _Lease(given["lease_id"], slot_id, given["token"], Path(given["path"]), process, expires)
        self.slots[slot_id] = _Slot(lease, is_free=False)
        self.work(lease, commits=commits)

    def work(self, lease: _Lease, *, commits: bool) -> None:
        assert sorted(path.name for path in lease.path.iterdir()) == [
            ".git",
            ".gitignore",
            "CHANGES.md",
            "README.md",
            "src",
        ]
        assert (lease.path / "README.md").read_text() == "# A small repository\n"
        (lease.path / "work").write_text(lease.lease_id)
        if commits:
            (lease.path / "README.md").write_text(lease.lease_id)
            subprocess.run(["git", "-C", str(lease.path), "commit", "-qam", "work"], check=True)

    @rule(index=_index)
    def release(self, index: int) -> None:
        lease = self.lease(index)
        if lease is not None and lease.process in self.processes:
            lease.process.call("release", lease_id=lease.lease_id)
            self.slots[lease.slot_id] = _Slot()

    @rule(index=_process, which=_index, lag=st.integers(-1, 1))
    def release_by_token(self, index: int, which: int, lag: int) -> None:
        lease = self.lease(which)
        if lease is None:
            return
        process = self.process(index)
        is_own = lease.process is process
        may = lag == 0 and (is_own or lease.expires is not None)
        expected = None if may else "LeaseLostError" if lag else "SlotInUseError"
        outcome = process.outcome("release_by_id", slot_id=lease.slot_id, token=lease.token + lag)
        assert outcome == expected
        if may:
            self.slots[lease.slot_id] = _Slot()

    @rule(index=_index)
    def release_too_late(self, index: int) -> None:
        if not self.ended:
            return
        lease = self.ended[-1 - index % len(self.ended)]
        if lease.process in self.processes:
            assert lease.process.outcome("release", lease_id=lease.lease_id) == "LeaseLostError"
            self.ended.remove(lease)

    @rule(index=_process, which=_index, lag=st.integers(-1, 1))
    def renew(self, index: int, which: int, lag: int) -> None:
        lease = self.lease(which)
        if lease is None:
            return
        expected = "LeaseLostError" if lag else None
        outcome = self.process(index).outcome("renew", slot_id=lease.slot_id, token=lease.token + lag, ttl=TTL)
        assert outcome == expected
        if not lag and lease.expires is not None:
            lease.expires = self.world.ahead + TTL

    # Ending badly

    @rule(index=_process)
    def kill(self, index: int) -> None:
        process = self.processes[index]
        if process is not None:
            process.kill()
            self.gone(index)

    @rule(index=_process)
    def close(self, index: int) -> None:
        process = self.processes[index]
        if process is not None:
            process.call("close")
            process.kill()
            self.gone(index)

    @rule(index=_process)
    def die_leasing(self, index: int) -> None:
        """It may get any slot that is free, and nobody learns which."""
        process = self.process(index)
        self.look(process)
        process.call("die_leasing")
        process.connection.close()
        for slot in self.slots.values():
            slot.is_free = False
        self.gone(index)

    @rule(which=_index)
    def die_returning(self, which: int) -> None:
        lease = self.lease(which)
        if lease is not None and lease.process in self.processes:
            lease.process.call("die_returning", lease_id=lease.lease_id)
            lease.process.connection.close()
            self.slots[lease.slot_id] = _Slot(is_free=False)
            self.gone(self.processes.index(lease.process))

    @rule(index=_process)
    def die_recovering(self, index: int) -> None:
        process = self.process(index)
        process.call("die_recovering")
        process.connection.close()
        self.gone(index)

    @rule(index=_process, which=_index)
    def force(self, index: int, which: int) -> None:
        if not self.slots:
            return
        slot_id = self.any_slot(which)
        outcome = self.process(index).outcome("force", slot_id=slot_id)
        assert outcome is None or (outcome == "SlotNotFoundError" and slot_id in self.passing())
        if self.slots[slot_id].lease is not None:
            self.end_badly(slot_id)

    @rule(moments=st.integers(1, 4))
    def let_time_pass(self, moments: int) -> None:
        self.world.ahead += moments * MOMENT
        self.world.nursery.set_clock(self.world.ahead)
        for lease in self.leases():
            if lease.expires is not None and lease.expires <= self.world.ahead:
                self.end_badly(lease.slot_id)

    # Maintenance

    @rule(index=_process)
    def recover(self, index: int) -> None:
        process = self.process(index)
        process.call("recover")
        self.look(process)  # another process may have been at some of them, and need a little longer

    @rule(index=_process)
    def add(self, index: int) -> None:
        if len(self.slots) >= MOST_SLOTS:
            return
        process = self.process(index)
        self.look(process)
        slot_id = process.call("add")
        self.see_new(slot_id)
        self.keep_all(index)

    @rule(index=_process, which=_index)
    def remove(self, index: int, which: int) -> None:
        process = self.process(index)
        self.look(process)
        slot_id = self.any_slot(which)
        slot, passing = self.slots[slot_id], self.passing()
        if len(set(self.slots) - passing - {slot_id}) == 0:
            return
        outcome = process.outcome("remove", slot_id=slot_id)
        if outcome is None:
            assert slot.lease is None
            self.see_gone(slot_id)
            self.keep_all(index)
        elif outcome == "SlotNotFoundError":
            assert slot_id in passing
        else:
            assert outcome == "SlotInUseError"
            assert not slot.is_free

    @rule(index=_process, num_slots=st.integers(1, MOST_SLOTS))
    def resize(self, index: int, num_slots: int) -> None:
        process = self.process(index)
        self.look(process)
        is_unhindered = self.target is None
        busy = len(self.dead()) + len(self.leases())
        outcome = process.outcome("resize", num_slots=num_slots)
        if outcome is None:
            self.keep_all(index)
        else:
            assert outcome == "SlotInUseError"
            assert busy > num_slots or not is_unhindered
        self.look(process, may_vanish=set(self.slots), may_appear=True)
        assert busy > num_slots or not is_unhindered or len(self.slots) == num_slots

    @rule(num_slots=st.integers(1, MOST_SLOTS))
    def reload(self, num_slots: int) -> None:
        """Have the process that follows the configuration file take on another number of slots."""
        process = self.process(0)
        self.look(process)
        if num_slots == self.in_file:
            return
        self.write_file(num_slots)
        self.target = num_slots
        process.call("reload")
        self.look(process, may_appear=True)
        if len(self.slots) <= num_slots:
            self.target = None

    # What must always be true

    @invariant()
    def everybody_sees_that(self) -> None:
        for process in self.processes:
            if process is not None:
                self.look(process)

    def look(self, process: Process, *, may_vanish: set[str] | None = None, may_appear: bool = False) -> None:
        """Compare what a process sees with what should be; learn which slots are recovered, gone or new."""
        passing = self.passing() | (may_vanish or set())
        found: dict[str, tuple[str, int]] = process.call("slots")
        for slot_id in set(self.slots) - set(found):
            assert slot_id in passing
            assert self.slots[slot_id].lease is None
            self.see_gone(slot_id)
        for slot_id in set(found) - set(self.slots):
            assert may_appear
            self.see_new(slot_id)
        for slot_id, slot in self.slots.items():
            state, token = found[slot_id]
            if slot.lease is not None:
                assert (state, token) == (SlotState.ALLOCATED, slot.lease.token)
            elif state == SlotState.AVAILABLE:
                self.see_saved(slot_id)
                slot.is_free = True
            else:
                assert state != SlotState.ERROR
                assert not slot.is_free or slot_id in passing

    def see_new(self, slot_id: str) -> None:
        number = int(slot_id.rpartition("slot")[2])
        assert number > self.world.highest - MOST_SLOTS  # several may be made at once
        assert slot_id not in self.slots
        self.world.highest = max(number, self.world.highest)
        self.slots[slot_id] = _Slot()
        self.slots = dict(sorted(self.slots.items(), key=lambda entry: int(entry[0].rpartition("slot")[2])))

    def see_gone(self, slot_id: str) -> None:
        self.see_saved(slot_id)
        del self.slots[slot_id]

    def see_saved(self, slot_id: str) -> None:
        """Now that a slot is not its last lessee's any more, what that had made must be saved."""
        for lease_id in self.unsaved.pop(slot_id, set()):
            assert self.git("cat-file", "blob", f"refs/salvage/{lease_id}:work") == lease_id

    # Inside

    def process(self, index: int) -> Process:
        process = self.processes[index]
        if process is None:
            if index == 0:
                self.write_file(len(list((self.world.nursery.directory / "pools/web/slots").glob("*/slot.json"))))
            process = self.processes[index] = self.world.nursery.spawn(follows_file=index == 0)
        return process

    def write_file(self, num_slots: int) -> None:
        self.in_file = num_slots
        directory, options = self.world.nursery.directory, "cleanup_options: {fetch_on_allocate: no}"
        (directory / "pools.yaml").write_text(
            f"workspaces_dir: {directory}/pools\njanitor_interval: 3600\nwatch: never\npools:\n"
            f"  web: {{repo_url: {self.world.url}, num_slots: {num_slots}, {options}}}\n"
        )

    def gone(self, index: int) -> None:
        """Note that a process has died: its leases, but for the detached ones, are nobody's any more."""
        process = self.processes[index]
        self.processes[index] = None
        self.keep_all(index)
        for lease in self.leases():
            if lease.process is process and lease.expires is None:
                self.end_badly(lease.slot_id)

    def end_badly(self, slot_id: str) -> None:
        lease = self.slots[slot_id].lease
        assert lease is not None
        self.slots[slot_id] = _Slot(is_free=False)
        self.ended.append(lease)
        self.unsaved.setdefault(slot_id, set()).add(lease.lease_id)
        self.must_be_saved.add(lease.lease_id)

    def keep_all(self, index: int) -> None:
        """Note that surplus slots stay: only the process that follows the file removes them, unless told otherwise."""
        if index == 0:
            self.target = None

    def passing(self) -> set[str]:
        """Return the slots that go as soon as nobody has them."""
        surplus = list(self.slots)[self.target :] if self.target is not None else []
        return {slot_id for slot_id in surplus if self.slots[slot_id].lease is None}

    def dead(self) -> set[str]:
        return {slot_id for slot_id, slot in self.slots.items() if not slot.is_free and slot.lease is None}

    def leases(self) -> list[_Lease]:
        return [slot.lease for slot in self.slots.values() if slot.lease is not None]

    def lease(self, index: int) -> _Lease | None:
        leases = self.leases()
        return leases[index % len(leases)] if leases else None

    def any_slot(self, index: int) -> str:
        return list(self.slots)[index % len(self.slots)]

    def saved(self) -> set[str]:
        if not (self.world.nursery.directory / "pools/web/salvage.git/HEAD").exists():
            return set()
        return set(self.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/salvage").split())

    def git(self, *arguments: str) -> str:
        repository = self.world.nursery.directory / "pools/web/salvage.git"
        done = subprocess.run(["git", "-C", str(repository), *arguments], check=True, capture_output=True, timeout=60)
        return done.stdout.decode()


class ManagersAtLength(Managers):
    """The same for longer."""


@pytest.fixture(autouse=True)
def _world(tmp_path: Path, origin: Path) -> Iterator[None]:
    with ExitStack() as stack:
        Managers.world = World(stack.enter_context(nursery(tmp_path)), str(origin))
        yield


SETTINGS = settings(
    max_examples=4,
    stateful_step_count=16,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestManagers = Managers.TestCase
TestManagers.settings = SETTINGS
TestManagersAtLength = pytest.mark.soak(pytest.mark.timeout(3600)(ManagersAtLength.TestCase))
TestManagersAtLength.settings = settings(SETTINGS, max_examples=150, stateful_step_count=60)
