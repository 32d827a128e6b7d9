"""The hosts of one manager: which there are, which may be used now, and what happens when one does not answer.

A host that fails to answer is suspect: no claim tries it until it was asked once more, which takes seconds. Where it
stays silent it is parked, for every process, with all its slots: they are ERROR, their leases have ended as lost. When
it answers again its slots are orphans, which are cleaned like those of dead owners. Where managers on several machines
share a host it is out of use for the one only that it does not answer: others may reach it. Which slots lie where, and
who asks silent hosts again, is not known here.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

import attrs

from repopool_async._aio import Interruptions, TaskSet, together
from repopool_async._clock import boottime
from repopool_async._identity import new_lease_id
from repopool_async.config_hosts import MANAGER, HostSpec, chosen_hosts, present_hosts, refused_hosts, with_local
from repopool_async.coordination.base import Coordinator
from repopool_async.exceptions import (
    ConfigError,
    HostNotFoundError,
    HostUnreachableError,
    PlatformNotSupportedError,
    PoolManagerError,
)
from repopool_async.host_admission import Admission
from repopool_async.host_states import HostCondition, HostState, HostStates
from repopool_async.hosts.base import Host
from repopool_async.models import LOCAL_HOST, Pool
from repopool_async.store_layout import StoreLayout

_log: Final = logging.getLogger("repopool")

_PROBE_SECONDS: Final = 10.0
"""How long a host may take to answer when it is asked whether it is there."""
_LEAVE_SECONDS: Final = 5.0
_REFUSED_SECONDS: Final = 60.0
"""After which a host that was refused is looked at again."""
_PATIENCE_SECONDS: Final = 3.0
"""How long something may take on a host before it is asked whether it is still there."""


@attrs.frozen(eq=False)
class Machine:
    """A host as a manager has it.

    Attributes:
        host: where the pools' own git runs. lessee_host: where lessees' commands run.
        layout: where things lie there. close: ends the connections to it.
    """

    spec: HostSpec
    host: Host
    lessee_host: Host
    layout: StoreLayout
    close: Callable[[], Coroutine[Any, Any, object]] | None = None

    def mirror_url(self, pool: Pool) -> str:
        """Return how git on another host reaches a pool's mirror here: by its path on one machine, else by SSH."""
        path = self.layout.mirror_path(pool.repo_name)
        return path if self.spec.is_local else f"ssh://{self.spec.reached_at}{path}"


class HostRegistry:
    """The hosts of one manager.

    Args:
        specs: those of the configuration. make: makes the machine for one, without any I/O.
        admission: says which may be used.

    Attributes:
        session: names this manager on its hosts. on_change: called when other hosts can be used than before.
    """

    def __init__(
        self,
        specs: Mapping[str, HostSpec],
        make: Callable[[HostSpec], Machine],
        *,
        admission: Admission,
        states: HostStates,
        coordinator: Coordinator,
        emit: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._make = make
        self.session: Final = new_lease_id()
        self._admission = admission
        self._admitted: dict[str, HostSpec] = {}
        self._refused: dict[str, tuple[HostState, float]] = {}
        self._silent: dict[str, HostState] = {}
        self._expected: set[str] = set()
        self._states = states
        self._coordinator = coordinator
        self._emit = emit
        self._configured = with_local(specs)
        self._added: dict[str, HostSpec] = {}
        self._machines: dict[str, Machine] = {}
        self._known: Mapping[str, HostState] = {}
        self._suspects: set[str] = set()
        self._is_settled = asyncio.Event()
        self._strangers: set[str] = set()
        self._unusable: frozenset[str] = frozenset()
        self._absences: Counter[str] = Counter()
        self._tasks = TaskSet("hosts")
        self.on_change: Callable[[], object] = lambda: None

    # -- which there are -----------------------------------------------------------------------------------------

    @property
    def specs(self) -> dict[str, HostSpec]:
        """All hosts by name: the manager's own, those of the configuration, those added."""
        return {**self._configured, **self._added, **self._configured}  # in this order, and what is configured counts

    def declare(self, specs: Mapping[str, HostSpec]) -> None:
        """Take on another configuration's hosts; one that is gone from it is not there any more."""
        self._configured = with_local(specs)
        self._refused.clear()
        self._take_in_new_ones()
        self._look_at_all()

    def machine(self, host_id: str) -> Machine:
        """Return a host.

        Raises:
            HostUnreachableError: there is none of that name, or none any more.
        """
        spec = self.specs.get(host_id)
        if spec is None:
            raise HostUnreachableError(
                f"there is no host {host_id!r} (any more); put it back under `hosts`, or remove its slots with "
                f"`repopool hosts remove --force {host_id}`",
                host_id=host_id,
                has_not_started=True,
                is_passing=False,
            )
        machine = self._machines.get(host_id)
        if machine is None or machine.spec != spec:
            machine = self._machines[host_id] = self._make(spec)
        return machine

    def mirror_source(self, machine: Machine) -> Machine | None:
        """Return the host whose mirrors another fetches from; None where it asks the origin.

        Raises:
            HostUnreachableError: that host is not there any more.
        """
        name = machine.spec.mirror_from
        return None if name is None else self.machine(LOCAL_HOST if name == MANAGER else name)

    def require(self, host_id: str) -> HostSpec:
        """Return what a host is.

        Raises:
            HostNotFoundError: there is none of that name.
        """
        spec = self.specs.get(host_id)
        if spec is None:
            raise HostNotFoundError(f"there is no host {host_id!r} (hosts: {', '.join(self.specs)}); add_host adds one")
        return spec

    def chosen(self, words: Sequence[str]) -> list[str]:
        """Return the hosts that a pool's option `hosts` means, in its order; those that are gone are passed over."""
        return present_hosts(words, self.specs)

    def check(self, words: Sequence[str]) -> None:
        """Refuse a pool's option `hosts` that means nothing.

        Raises:
            ConfigError: a word is neither a host's name nor a label.
        """
        try:
            chosen_hosts(words, self.specs)
        except ConfigError as refusal:
            raise ConfigError(f"hosts{refusal.key or ''}: {refusal.message}", key="hosts") from None

    # -- which may be used ---------------------------------------------------------------------------------------

    @property
    def unusable(self) -> frozenset[str]:
        """Hosts on which no lease is given and no slot made now."""
        return self._unusable

    def require_usable(self, host_id: str) -> None:
        """Raise `HostUnreachableError` where no lease is to be given on a host now."""
        if host_id in self._unusable:
            raise _out_of_use(host_id)

    def absences(self, host_id: str) -> int:
        """Return how often a host was found to be unusable so far: what was known of it before may not be so now."""
        return self._absences[host_id]

    @property
    def is_shared(self) -> bool:
        """Whether managers on other machines may use these hosts too."""
        return self._admission.is_shared

    def is_out(self, host_id: str) -> bool:
        """Whether nothing is to be done on a host now: it is parked, has just failed to answer, or is not ours yet."""
        if host_id in self._suspects or host_id not in self.specs or self.state(host_id).condition.is_out:
            return True
        return self.is_shared and not self._is_admitted(host_id)

    def _is_admitted(self, host_id: str) -> bool:
        return self._admitted.get(host_id) == self.specs.get(host_id)  # by its name it may be another by now

    def is_out_for_all(self, host_id: str) -> bool:
        """Whether a host is out of use for every manager."""
        return self._known.get(host_id, _ACTIVE).condition.is_out

    def is_closed(self, host_id: str) -> bool:
        """Whether no lease is given on a host until somebody, or it itself, changes that."""
        return host_id not in self.specs or self.state(host_id).condition is not HostCondition.ACTIVE

    def state(self, host_id: str) -> HostState:
        """Return what was last seen of a host's state, as far as this manager is concerned."""
        known = self._known.get(host_id, _ACTIVE)
        if known.condition.is_out:
            return known
        refused = self._refused.get(host_id)
        return refused[0] if refused is not None else self._silent.get(host_id, known)

    async def refresh(self) -> None:
        """See what other processes made of the hosts; call it every second."""
        known = await self._states.read()
        if known != self._known:
            self._known = known
            self._added = {name: HostSpec.from_mapping(name, state.spec) for name, state in known.items() if state.spec}
            self._look_at_all()
        self._take_in_new_ones()

    def _look_at_all(self) -> None:
        before = self._unusable
        out = {name for name, state in self._known.items() if state.condition is not HostCondition.ACTIVE}
        out |= {name for name in self.specs if self.is_out(name)}
        gone = (self._strangers | self._expected | self._machines.keys()) - self.specs.keys()
        self._unusable = frozenset(out | self._suspects | gone)
        self._absences.update(self._unusable - before)
        if self._unusable != before:
            self.on_change()

    # -- changing that -------------------------------------------------------------------------------------------

    async def change(self, host_id: str, condition: HostCondition, reason: str = "") -> bool:
        """Put a host into a condition, for every process; returns whether it was in another.

        Its slots follow: parked with it, or, when it comes back, left to whoever recovers orphans.
        """
        self.require(host_id)
        self._refused.pop(host_id, None)
        self._silent.pop(host_id, None)

        def changed(before: HostState | None) -> HostState | None:
            if before is not None and before.condition is condition:
                return before
            after = HostState(condition, reason, spec=before.spec if before else None)
            return None if condition is HostCondition.ACTIVE and after.spec is None else after

        has_changed = await self._states.change(host_id, changed)
        if condition.is_out:
            await self._coordinator.park_host(host_id)
        else:
            await self._coordinator.unpark_host(host_id)
        await self.refresh()
        if has_changed:
            self._emit(_EVENTS[condition], {"host_id": host_id, "reason": reason})
        self.on_change()
        return has_changed

    async def add(self, spec: HostSpec) -> None:
        """Add a host that the configuration does not name, for every process.

        Raises:
            ConfigError: there is one of that name.
        """
        if spec.name in self.specs:
            raise ConfigError(f"hosts.{spec.name}: there is a host of that name; remove it first", key="hosts")
        for path, text in refused_hosts({**self.specs, spec.name: spec}):
            raise ConfigError(f"{'.'.join(path)}: {text}", key=".".join(path))
        added = HostState(spec={"workspaces_dir": spec.workspaces_dir, **spec.changed()})
        await self._states.change(spec.name, lambda _: added)
        await self.refresh()
        await self.settled()
        self._emit("host.added", {"host_id": spec.name})

    async def forget(self, host_id: str) -> None:
        """Forget an added host, and any host's condition; nothing of any pool is there any more."""
        await self._states.change(host_id, lambda _: None)
        await self.forget_place(host_id)
        await self.refresh()
        self._emit("host.removed", {"host_id": host_id})

    async def forget_place(self, host_id: str) -> None:
        """Let a host's name mean another directory from now on; nothing of any pool is there any more."""
        await self._admission.forget(host_id)
        self._admitted.pop(host_id, None)
        self._refused.pop(host_id, None)

    # -- when one does not answer --------------------------------------------------------------------------------

    def suspect(self, error: HostUnreachableError) -> None:
        """Use a host that did not answer no more until it was asked again; returns at once."""
        host_id = error.host_id
        if host_id not in self.specs:
            self._strangers.add(host_id)
            self._look_at_all()
        if self.is_out(host_id):
            return
        self._suspects.add(host_id)
        self._look_at_all()
        self._tasks.spawn(self._confirm(host_id), name=f"confirm-{host_id}")

    async def settled(self) -> bool:
        """Wait until it is known of every suspect host whether it answers; returns whether there was any."""
        was_in_doubt = bool(self._suspects)
        while self._suspects:
            self._is_settled.clear()
            await self._is_settled.wait()
        return was_in_doubt

    async def _confirm(self, host_id: str) -> None:
        try:
            failure = await self.probe(host_id)
            if failure is not None:
                await self._note_silent(host_id, failure)
        except (PoolManagerError, OSError) as error:
            _log.warning("host %s: that it does not answer could not be noted: %s", host_id, error)
        finally:
            self._suspects.discard(host_id)
            self._is_settled.set()
            self._look_at_all()

    async def _note_silent(self, host_id: str, failure: str) -> None:
        if not self.is_shared:
            await self.change(host_id, HostCondition.UNREACHABLE, failure)
            return
        self._silent[host_id] = HostState(HostCondition.UNREACHABLE, failure)
        self._emit(_EVENTS[HostCondition.UNREACHABLE], {"host_id": host_id, "reason": failure})
        self._look_at_all()
        self.on_change()  # it was unusable before, for being suspect

    async def answers_again(self, host_id: str) -> None:
        """Use a host again that had not answered."""
        if not self.is_shared:
            await self.change(host_id, HostCondition.ACTIVE)
            return
        if self._silent.pop(host_id, None) is not None:
            self._emit(_EVENTS[HostCondition.ACTIVE], {"host_id": host_id, "reason": ""})
        self._take_in_new_ones()
        self._look_at_all()

    async def probe(self, host_id: str) -> str | None:
        """Ask a host whether it is there; returns why it seems not to be."""
        try:
            machine = self.machine(host_id)
            async with asyncio.timeout(_PROBE_SECONDS):
                await machine.host.stat(machine.layout.workspaces_directory)
        except (HostUnreachableError, TimeoutError) as error:
            return str(error) or f"no answer within {_PROBE_SECONDS:g} s"
        except OSError as error:
            _log.info("host %s answers: %s", host_id, error)
        return None

    @asynccontextmanager
    async def expected_to_answer(self, host_id: str) -> AsyncIterator[None]:
        """Give the block up where its host stops to answer meanwhile; the block itself may take what it takes.

        Raises:
            HostUnreachableError: the block was given up, or failed so by itself, and the host is suspect from then on;
            or it was not entered, because the host is out of use.
        """
        if self.is_out(host_id) and (host_id != LOCAL_HOST or self.is_shared):
            raise _out_of_use(host_id)
        if host_id == LOCAL_HOST:
            yield
            return
        silent = HostUnreachableError(f"host {host_id} stopped answering", host_id=host_id)
        interruptions = Interruptions()
        asking = self._tasks.spawn(self._ask_meanwhile(host_id, interruptions), name=f"ask-{host_id}")
        try:
            async with interruptions.allowed(None, silent):
                yield
        except HostUnreachableError as error:
            self.suspect(error)
            raise
        finally:
            asking.cancel()

    async def _ask_meanwhile(self, host_id: str, interruptions: Interruptions) -> None:
        while True:
            await asyncio.sleep(_PATIENCE_SECONDS)
            if self.is_out(host_id) or await self.probe(host_id) is not None:
                interruptions.begin()
                return

    # -- taking one into use -------------------------------------------------------------------------------------

    async def admit(self, host_id: str) -> None:
        """See that a host may be used, before anything is done there; once is enough.

        Raises as `Admission.admit`.
        """
        if self._is_admitted(host_id) or (host_id == LOCAL_HOST and not self.is_shared):
            return
        machine = self.machine(host_id)
        source = self.mirror_source(machine)
        if source is not None:
            await self.admit(source.spec.name)
        await self._admission.admit(host_id, machine.host, machine.layout.workspaces_directory)
        self._admitted[host_id] = machine.spec
        self._refused.pop(host_id, None)

    async def require_admitted(self, host_ids: Iterable[str]) -> None:
        """Wait until it is known of each host whether it may be used, and raise why one may not.

        Raises as `Admission.admit`, but for a host that does not answer.
        """
        wanted = list(host_ids)
        self.expect(wanted)
        await self.settled()
        for host_id in wanted:
            if host_id in self._refused:
                await self.admit(host_id)
                await self.answers_again(host_id)

    async def refuse_anothers(self) -> None:
        """Refuse a directory of the manager's own that managers elsewhere have slots in, where they share nothing.

        Raises:
            ConfigError: it is another's.
        """
        if not self.is_shared:
            machine = self.machine(LOCAL_HOST)
            await self._admission.admit(LOCAL_HOST, machine.host, machine.layout.workspaces_directory)

    def expect(self, host_ids: Iterable[str]) -> None:
        """Note that slots of a pool lie, or are to lie, on these hosts; returns at once."""
        if self.is_shared:
            self._expected.update(host_ids)
            self._take_in_new_ones()
            self._look_at_all()

    async def own_settled(self) -> None:
        """Wait until it is known of the directories on this machine whether they may be used, which is not long."""
        while any(self.specs[name].is_local for name in self._suspects & self.specs.keys()):
            self._is_settled.clear()
            await self._is_settled.wait()

    def _take_in_new_ones(self) -> None:
        """Begin to see of hosts that are not in use yet whether they may be; where nobody shares any, pools do that."""
        if not self.is_shared:
            return
        for host_id in self.specs:
            refused = self._refused.get(host_id)
            if refused is not None and boottime() >= refused[1] + _REFUSED_SECONDS:
                del self._refused[host_id]
            is_known = self._is_admitted(host_id) or host_id in self._suspects or self.state(host_id).condition.is_out
            is_wanted = host_id != LOCAL_HOST or host_id in self._expected  # not every manager has slots of its own
            if is_wanted and not is_known:
                self._suspects.add(host_id)
                self._tasks.spawn(self._take_in(host_id), name=f"admit-{host_id}")

    async def _take_in(self, host_id: str) -> None:
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                await self.admit(host_id)
        except (HostUnreachableError, TimeoutError) as error:
            await self._note_silent(host_id, str(error) or f"no answer within {_PROBE_SECONDS:g} s")
        except (ConfigError, PlatformNotSupportedError, OSError) as error:
            self._refused[host_id] = HostState(HostCondition.REFUSED, str(error)), boottime()
            self._emit("host.refused", {"host_id": host_id, "reason": str(error)})
        except PoolManagerError as error:
            _log.warning("host %s: whether it may be used cannot be asked now: %s", host_id, error)
        finally:
            self._suspects.discard(host_id)
            self._is_settled.set()
            self._look_at_all()

    # -- being alive ---------------------------------------------------------------------------------------------

    async def beat(self) -> None:
        """Give a sign of life on every other machine that is in use, where a watchdog ends leases without one."""
        await together(*[partial(self._beat, machine) for machine in self._elsewhere()])

    async def _beat(self, machine: Machine) -> None:
        with suppress(HostUnreachableError, OSError):
            async with self.expected_to_answer(machine.spec.name):
                await machine.host.beat(self.session)

    def _elsewhere(self) -> list[Machine]:
        in_use = [machine for name, machine in self._machines.items() if not self.is_out(name)]
        return [machine for machine in in_use if not machine.spec.is_local]

    async def aclose(self) -> None:
        """End what is under way, and what watches over this manager elsewhere."""
        await self._tasks.cancel()
        await together(*[partial(self._leave, machine) for machine in self._elsewhere()])
        await together(*[machine.close for machine in self._machines.values() if machine.close is not None])

    async def _leave(self, machine: Machine) -> None:
        with suppress(HostUnreachableError, OSError, TimeoutError):
            async with asyncio.timeout(_LEAVE_SECONDS):
                await machine.host.end_session(self.session)


def _out_of_use(host_id: str) -> HostUnreachableError:
    text = f"host {host_id} is out of use; `repopool hosts list` says why"
    return HostUnreachableError(text, host_id=host_id, has_not_started=True)


_ACTIVE: Final = HostState()
_EVENTS: Final = {
    HostCondition.ACTIVE: "host.resumed",
    HostCondition.DRAINING: "host.draining",
    HostCondition.PARKED: "host.parked",
    HostCondition.UNREACHABLE: "host.parked",
}
