"""Makes what pools work with: what all pools of a manager share, and each pool's own components.

The one place that knows which class stands behind each part: which coordinator there is, where git runs, how a tree
comes to be. Which pools there are is `pool_registry`'s business.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import attrs

from repopool_async._git import GitRunner, base_environment
from repopool_async._git_arguments import Credentials
from repopool_async.components import Components
from repopool_async.config import PoolConfig, PoolOptions
from repopool_async.coordination.base import Coordinator
from repopool_async.coordination.files import FileCoordinator
from repopool_async.events import EventBus
from repopool_async.git_operations import GitOperations
from repopool_async.hosts.base import Host
from repopool_async.hosts.local import LocalHost
from repopool_async.lock_manager import LockManager
from repopool_async.mirror import Mirror
from repopool_async.models import Pool
from repopool_async.run_as import RunAs
from repopool_async.salvage import Salvage
from repopool_async.slot_allocator import SlotAllocator
from repopool_async.slot_cleaner import Callbacks, SlotCleaner
from repopool_async.slot_setup import SlotSetup
from repopool_async.slot_store import SlotStore
from repopool_async.workspaces.base import WorkspaceStrategy
from repopool_async.workspaces.clone import CloneWorkspace
from repopool_async.workspaces.kept_paths import KeptPaths
from repopool_async.workspaces.lfs import Lfs
from repopool_async.workspaces.sparse import Sparse
from repopool_async.workspaces.submodules import Submodules

_LESSEE_PROCESSES: Final = 1_000_000
"""How many commands lessees run at once is their business."""


@attrs.define(eq=False)
class Shared:
    """What all pools of one manager share.

    Attributes:
        config: what is in force; replaced when a configuration file is taken on.
        host: where the pools' own git runs. lessee_host: where lessees' commands run.
    """

    config: PoolConfig
    bus: EventBus
    host: Host
    lessee_host: Host
    store: SlotStore
    locks: LockManager
    coordinator: Coordinator
    allocator: SlotAllocator

    @classmethod
    def of(cls, config: PoolConfig) -> Self:
        """Make it for a configuration, without any I/O."""
        bus = EventBus()
        store = SlotStore(str(config.workspaces_dir), on_event=bus.emit)
        locks = LockManager(store.locks_directory)
        return cls(
            config=config,
            bus=bus,
            host=LocalHost(max_processes=config.max_git_processes),
            lessee_host=LocalHost(max_processes=_LESSEE_PROCESSES),
            store=store,
            locks=locks,
            coordinator=FileCoordinator(store, locks, on_event=bus.emit),
            allocator=SlotAllocator(store),
        )


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
        self._environments: dict[str, dict[str, str]] = {}

    def give_credentials(self, repo_name: str, credentials: Credentials | None) -> None:
        """Have a pool's git use these credentials from now on, what is assembled already as well."""
        environment = base_environment(
            allow_protocols=self._shared.config.allow_protocols, credentials=credentials, git_config=self._git_config
        )
        present = self._environments.setdefault(repo_name, {})
        present.clear()
        present.update(environment)

    async def establish(self, options: PoolOptions) -> RunAs | None:
        """Find the user that a pool's lessees run as, where it names one; raises as `RunAs.establish`."""
        if options.run_as is None:
            return None
        return await RunAs.establish(
            options.run_as,
            host=self._shared.host,
            workspaces_dir=self._shared.store.workspaces_directory,
            is_isolated=options.isolation == "full",
        )

    def assemble(
        self, record: Pool, options: PoolOptions, run_as: RunAs | None, *, current: Callable[[], PoolOptions]
    ) -> Components:
        """Make a pool's components; its credentials have been given.

        Args:
            options: what they are made for. current: returns the options in force when it is called.
            run_as: what `establish` returned for the options.
        """
        shared = self._shared
        runner = self._runner(record.repo_name, options)
        mirror = self._mirror(record, options, runner)
        workspace = self._workspace(options, runner, mirror, run_as, current)
        return Components(
            host=shared.host,
            store=shared.store,
            coordinator=shared.coordinator,
            # Without metrics a pool counts into an allocator that nobody asks.
            allocator=shared.allocator if options.enable_metrics else SlotAllocator(shared.store),
            mirror=mirror,
            cleaner=self._cleaner(options, runner, mirror, workspace, run_as),
            lessee_host=shared.lessee_host,
            lessee_git=GitOperations(shared.lessee_host),
            emit=self._emit,
            cleaning=asyncio.Semaphore(max(2, os.cpu_count() or 2)),
            run_as=run_as,
            salvage=self._salvage(record.repo_name, runner, mirror, workspace),
        )

    def _runner(self, repo_name: str, options: PoolOptions) -> GitRunner:
        return GitRunner(
            self._shared.host,
            environment=self._environments[repo_name],
            timeout=options.git_timeout,
            idle_timeout=options.git_idle_timeout,
            attempts=options.fetch_attempts,
        )

    def _mirror(self, record: Pool, options: PoolOptions, runner: GitRunner) -> Mirror:
        return Mirror(
            str(self._shared.store.mirror_path(record.repo_name)),
            record.repo_url,
            host=self._shared.host,
            git=runner,
            locks=self._shared.locks,
            repo_name=record.repo_name,
            remotes=options.remotes,
            is_blobless=options.history == "blobless",
        )

    def _workspace(
        self,
        options: PoolOptions,
        runner: GitRunner,
        mirror: Mirror,
        run_as: RunAs | None,
        current: Callable[[], PoolOptions],
    ) -> CloneWorkspace:
        sparse = Sparse(host=self._shared.host, git=runner, mirror=mirror, directories=options.sparse)
        lfs = Lfs(host=self._shared.host, git=runner, is_wanted=options.lfs, includes=sparse.includes)
        submodules = Submodules(
            host=self._shared.host,
            git=runner,
            mirror=mirror,
            allow_protocols=self._shared.config.allow_protocols,
            is_wanted=lambda: current().submodules,
            lfs=lfs,
        )
        return CloneWorkspace(
            host=self._shared.host,
            git=runner,
            mirror=mirror,
            submodules=submodules,
            lfs=lfs,
            sparse=sparse,
            is_isolated=options.isolation == "full",
            run_as=run_as,
            kept=self._kept(options, runner, mirror),
        )

    def _kept(self, options: PoolOptions, runner: GitRunner, mirror: Mirror) -> KeptPaths:
        return KeptPaths(host=self._shared.host, git=runner, mirror=mirror, names=options.keep)

    def _setup(self, options: PoolOptions, runner: GitRunner, mirror: Mirror) -> SlotSetup | None:
        if options.setup is None:
            return None
        return SlotSetup(
            host=self._shared.lessee_host,
            git=runner,
            mirror=mirror,
            kept=self._kept(options, runner, mirror),
            command=options.setup,
            key_files=options.setup_key,
            timeout=options.setup_timeout,
            is_ahead=options.warmup_enabled,
        )

    def _cleaner(
        self,
        options: PoolOptions,
        runner: GitRunner,
        mirror: Mirror,
        workspace: WorkspaceStrategy,
        run_as: RunAs | None,
    ) -> SlotCleaner:
        return SlotCleaner(
            GitOperations(self._shared.host, runner=runner),
            workspace=workspace,
            store=self._shared.store,
            callbacks=self._callbacks,
            on_event=self._shared.bus.emit,
            rebuild_always=options.rebuild_always,
            run_as=run_as,
            setup=self._setup(options, runner, mirror),
        )

    def _salvage(self, repo_name: str, runner: GitRunner, mirror: Mirror, workspace: WorkspaceStrategy) -> Salvage:
        return Salvage(
            repo_name,
            str(self._shared.store.pool_directory(repo_name)),
            host=self._shared.host,
            git=runner,
            mirror=mirror,
            locks=self._shared.locks,
            workspace=workspace,
        )
