"""Makes what pools work with: what all pools of a manager share, and each pool's own components.

The one place that knows which class stands behind each part: which coordinator there is, where git runs, how a tree
comes to be. Which pools there are is `pool_registry`'s business.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import attrs

from repopool_async._git import base_environment
from repopool_async._git_arguments import Credentials
from repopool_async.common_state import CommonState
from repopool_async.components import Components, HostParts, PoolHosts
from repopool_async.config import PoolConfig, PoolOptions
from repopool_async.config_hosts import HostSpec
from repopool_async.coordination.base import Coordinator
from repopool_async.events import EventBus
from repopool_async.host_assembly import HostAssembly
from repopool_async.host_registry import HostRegistry, Machine
from repopool_async.hosts.local import LocalHost
from repopool_async.mirror_sources import Upstream
from repopool_async.models import LOCAL_HOST, Pool
from repopool_async.shared_state import Locks, PoolRecords
from repopool_async.slot_allocator import SlotAllocator
from repopool_async.slot_cleaner import Callbacks
from repopool_async.slot_store import SlotStore
from repopool_async.store_layout import StoreLayout

_LESSEE_PROCESSES: Final = 1_000_000
"""How many commands lessees run at once is their business."""


@attrs.define(eq=False)
class Shared:
    """What all pools of one manager share.

    Attributes:
        config: what is in force; replaced when a configuration file is taken on.
        own: the manager's own machine. state: where the state of slots is kept.
    """

    config: PoolConfig
    bus: EventBus
    own: Machine
    hosts: HostRegistry
    state: CommonState
    allocator: SlotAllocator

    @property
    def records(self) -> PoolRecords:
        """The records of pools and the logs of slots."""
        return self.state.records

    @property
    def locks(self) -> Locks:
        """Locks by name."""
        return self.state.locks

    @property
    def coordinator(self) -> Coordinator:
        """Who says which slot is whose."""
        return self.state.coordinator

    @classmethod
    def of(cls, config: PoolConfig) -> Self:
        """Make it for a configuration, without any I/O."""
        bus = EventBus()
        state = CommonState.of(config, bus.emit)
        hosts = HostRegistry(
            config.hosts,
            lambda spec: _machine(spec, config),
            admission=state.admission,
            states=state.host_states,
            coordinator=state.coordinator,
            emit=bus.emit,
        )
        return cls(
            config=config,
            bus=bus,
            own=hosts.machine(LOCAL_HOST),
            hosts=hosts,
            state=state,
            allocator=_counting(config),
        )


def _counting(config: PoolConfig) -> SlotAllocator:
    """Return an allocator that finds nothing for anybody: coordinators do, and it counts how that went."""
    return SlotAllocator(SlotStore(str(config.workspaces_dir)))


def _machine(spec: HostSpec, config: PoolConfig) -> Machine:
    layout = StoreLayout(spec.workspaces_dir or config.workspaces_dir)
    if spec.host is not None:
        return Machine(spec, spec.host, spec.host, layout)
    sessions = f"{layout.workspaces_directory}/.sessions"
    if spec.is_local:
        host = LocalHost(spec.name, max_processes=config.max_git_processes, sessions_directory=sessions)
        lessee_host = LocalHost(spec.name, max_processes=_LESSEE_PROCESSES, sessions_directory=sessions)
        return Machine(spec, host, lessee_host, layout)
    from repopool_async.hosts.ssh import SshHost  # noqa: PLC0415 - asyncssh is wanted by those only who have such hosts

    remote = SshHost(spec.reached_at, host_id=spec.name, host_key=spec.host_key, sessions_directory=sessions)
    return Machine(spec, remote, remote, layout, close=remote.close)


class Assembler:
    """Makes the components of pools.

    Args:
        callbacks: the user's, for every slot. git_config: the operator's, for the pools' own git.
        emit: tells what happens in a pool.
    """

    def __init__(
        self,
        shared: Shared,
        *,
        callbacks: Callbacks,
        git_config: Mapping[str, str],
        emit: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._shared = shared
        self._callbacks = callbacks
        self._git_config = git_config
        self._emit = emit
        self._environments: dict[bool, dict[str, dict[str, str]]] = {True: {}, False: {}}

    def give_credentials(self, repo_name: str, credentials: Credentials | None) -> None:
        """Have a pool's git use these credentials from now on, what is assembled already as well."""
        for is_here, environments in self._environments.items():
            environment = base_environment(
                # What this process was started with means nothing on another machine.
                None if is_here else {},
                allow_protocols=self._shared.config.allow_protocols,
                credentials=credentials,
                git_config=self._git_config,
            )
            present = environments.setdefault(repo_name, {})
            present.clear()
            present.update(environment)

    def assemble(self, record: Pool, options: PoolOptions, *, current: Callable[[], PoolOptions]) -> Components:
        """Make a pool's components; its credentials have been given.

        Args:
            options: what they are made for. current: returns the options in force when it is called.
        """
        shared = self._shared

        def upstream(machine: Machine) -> Upstream | None:
            source = shared.hosts.mirror_source(machine)
            return None if source is None else Upstream(hosts.on(source.spec.name).mirror, source.mirror_url(record))

        def make(host_id: str) -> HostParts:
            machine = shared.hosts.machine(host_id)
            return HostAssembly(
                machine=machine,
                record=record,
                options=options,
                current=current,
                absences=lambda: shared.hosts.absences(host_id),
                upstream=upstream,
                environment=self._environments[machine.spec.is_local][record.repo_name],
                allow_protocols=shared.config.allow_protocols,
                callbacks=self._callbacks,
                records=shared.records,
                locks=shared.locks,
                emit=shared.bus.emit,
            ).parts()

        hosts = PoolHosts(lambda: shared.hosts.chosen(current().hosts), make)
        return Components(
            records=shared.records,
            coordinator=shared.coordinator,
            # Without metrics a pool counts into an allocator that nobody asks.
            allocator=shared.allocator if options.enable_metrics else _counting(shared.config),
            hosts=hosts,
            recorded_on=shared.state.recorded_on,
            emit=self._emit,
        )
