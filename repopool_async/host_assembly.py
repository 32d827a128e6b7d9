"""Makes what a pool has on one host: the mirror, the workspace strategy, the cleaner, where saved work lies.

The one place that knows which class stands behind each of them. What a pool has once is `assembly`'s business.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

from repopool_async._git import GitRunner
from repopool_async.components import HostParts
from repopool_async.config import PoolOptions
from repopool_async.exceptions import ConfigError
from repopool_async.fitness import Fitness
from repopool_async.git_operations import GitOperations
from repopool_async.host_registry import Machine
from repopool_async.mirror import MIRROR_LOCKS, Mirror
from repopool_async.mirror_sources import Upstream
from repopool_async.models import Pool
from repopool_async.run_as import RunAs
from repopool_async.salvage import SALVAGE_LOCKS, Salvage
from repopool_async.shared_state import Locks, PoolRecords
from repopool_async.slot_cleaner import Callbacks, SlotCleaner
from repopool_async.slot_setup import SlotSetup
from repopool_async.store_layout import lock_on
from repopool_async.workspaces.base import WorkspaceStrategy
from repopool_async.workspaces.clone import CloneWorkspace
from repopool_async.workspaces.kept_paths import KeptPaths
from repopool_async.workspaces.lfs import Lfs
from repopool_async.workspaces.sparse import Sparse
from repopool_async.workspaces.submodules import Submodules

_TRUST_SECONDS: Final = 1.0
"""How long the refs of a mirror are believed that another look would take a round trip to; a lease looks again before
it is handed out."""


@attrs.frozen
class HostAssembly:
    """What is needed to make a pool's parts on a host.

    Attributes:
        options: what they are made for. current: returns the options in force when it is called.
        absences: returns how often the host was out of use so far.
        upstream: returns what the mirror on a host is to be fetched from, where that is not the origin.
        environment: of the pool's git; its content may be replaced later. emit: tells an event.
    """

    machine: Machine
    record: Pool
    options: PoolOptions
    current: Callable[[], PoolOptions]
    absences: Callable[[], int]
    upstream: Callable[[Machine], Upstream | None]
    environment: Mapping[str, str]
    allow_protocols: Sequence[str]
    callbacks: Callbacks
    records: PoolRecords
    locks: Locks
    emit: Callable[[str, Mapping[str, Any]], None]

    def parts(self) -> HostParts:
        """Make them."""
        machine = self.machine
        runner = self._runner()
        mirror = self._mirror(runner)
        run_as = self._run_as()
        workspace = self._workspace(runner, mirror, run_as)
        return HostParts(
            host_id=machine.spec.name,
            is_here=machine.spec.is_local,
            host=machine.host,
            lessee_host=machine.lessee_host,
            lessee_git=GitOperations(machine.lessee_host),
            layout=machine.layout,
            mirror=mirror,
            cleaner=self._cleaner(runner, mirror, workspace, run_as),
            salvage=self._salvage(runner, mirror, workspace),
            cleaning=asyncio.Semaphore(max(2, os.cpu_count() or 2)),
            run_as=run_as,
            fitness=None if run_as is None else Fitness(run_as, self.absences, self._tell_unfit),
        )

    def _run_as(self) -> RunAs | None:
        """Return the user that lessees run as, of whom nothing is known yet; None only where the pool names none."""
        if self.options.run_as is None:
            return None
        return RunAs(
            self.options.run_as,
            repo_name=self.record.repo_name,
            host=self.machine.host,
            lessee_host=self.machine.lessee_host,
            is_here=self.machine.spec.is_local,
            workspaces_dir=self.machine.layout.workspaces_directory,
            is_isolated=self.options.isolation == "full",
        )

    def _tell_unfit(self, refusal: ConfigError) -> None:
        about = {"repo_name": self.record.repo_name, "host_id": self.machine.spec.name}
        self.emit("host.unfit", {**about, "reason": str(refusal)})

    def _runner(self) -> GitRunner:
        return GitRunner(
            self.machine.host,
            environment=self.environment,
            timeout=self.options.git_timeout,
            idle_timeout=self.options.git_idle_timeout,
            attempts=self.options.fetch_attempts,
        )

    def _mirror(self, runner: GitRunner) -> Mirror:
        name = self.record.repo_name
        return Mirror(
            self.machine.layout.mirror_path(name),
            self.record.repo_url,
            host=self.machine.host,
            git=runner,
            locks=self.locks,
            repo_name=name,
            remotes=self.options.remotes,
            is_blobless=self.options.history == "blobless",
            lock_id=lock_on(self.machine.spec.name, f"{MIRROR_LOCKS}{name}"),
            trust_seconds=0.0 if self.machine.spec.is_local else _TRUST_SECONDS,
            # A mirror without file contents cannot give them to another.
            upstream=self.upstream(self.machine) if self.options.history == "full" else None,
        )

    def _workspace(self, runner: GitRunner, mirror: Mirror, run_as: RunAs | None) -> CloneWorkspace:
        options = self.options
        sparse = Sparse(host=self.machine.host, git=runner, mirror=mirror, directories=options.sparse)
        lfs = Lfs(host=self.machine.host, git=runner, is_wanted=options.lfs, includes=sparse.includes)
        submodules = Submodules(
            host=self.machine.host,
            git=runner,
            mirror=mirror,
            allow_protocols=self.allow_protocols,
            is_wanted=lambda: self.current().submodules,
            lfs=lfs,
        )
        return CloneWorkspace(
            host=self.machine.host,
            git=runner,
            mirror=mirror,
            submodules=submodules,
            lfs=lfs,
            sparse=sparse,
            is_isolated=options.isolation == "full",
            run_as=run_as,
            kept=self._kept(runner, mirror),
        )

    def _kept(self, runner: GitRunner, mirror: Mirror) -> KeptPaths:
        return KeptPaths(host=self.machine.host, git=runner, mirror=mirror, names=self.options.keep)

    def _setup(self, runner: GitRunner, mirror: Mirror) -> SlotSetup | None:
        if self.options.setup is None:
            return None
        return SlotSetup(
            host=self.machine.lessee_host,
            git=runner,
            mirror=mirror,
            kept=self._kept(runner, mirror),
            command=self.options.setup,
            key_files=self.options.setup_key,
            timeout=self.options.setup_timeout,
            is_ahead=self.options.warmup_enabled,
        )

    def _cleaner(
        self, runner: GitRunner, mirror: Mirror, workspace: WorkspaceStrategy, run_as: RunAs | None
    ) -> SlotCleaner:
        return SlotCleaner(
            GitOperations(self.machine.host, runner=runner),
            workspace=workspace,
            store=self.records,
            callbacks=self.callbacks,
            on_event=self.emit,
            rebuild_always=self.current().rebuild_always,
            run_as=run_as,
            setup=self._setup(runner, mirror),
        )

    def _salvage(self, runner: GitRunner, mirror: Mirror, workspace: WorkspaceStrategy) -> Salvage:
        name = self.record.repo_name
        return Salvage(
            name,
            self.machine.layout.pool_directory(name),
            host=self.machine.host,
            git=runner,
            mirror=mirror,
            locks=self.locks,
            workspace=workspace,
            lock_id=lock_on(self.machine.spec.name, f"{SALVAGE_LOCKS}{name}"),
        )
