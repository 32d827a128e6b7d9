"""The facade: pools by name, their configuration, opening and closing.

Everything that concerns one repository is delegated to its `RepoPool`; this module finds the pool a name or a slot id
means, makes and deletes pools, and owns what they share.
"""

import asyncio
import errno
import functools
import logging
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

import attrs

from repopool_async._aio import Deadline, Interruptions, TaskSet, in_thread, shielded, together
from repopool_async._clock import boottime, now
from repopool_async._git import GitRunner, base_environment, check_git_version, lessee_environment
from repopool_async._git_arguments import Credentials, split_credentials, validate_url
from repopool_async.components import Components
from repopool_async.config import PoolConfig, PoolOptions, refusal_in
from repopool_async.config_changes import READ_AT_USE, ConfigChange, changed_options, compare
from repopool_async.config_values import validate_repo_name
from repopool_async.config_watcher import ConfigWatcher
from repopool_async.coordination.files import FileCoordinator
from repopool_async.events import Event, EventBus
from repopool_async.exceptions import (
    ConfigError,
    ManagerClosedError,
    PlatformNotSupportedError,
    PoolExistsError,
    PoolManagerError,
    PoolNotFoundError,
    RepositoryUrlError,
    SalvageError,
    SalvageNotFoundError,
    SlotNotFoundError,
    StoreError,
)
from repopool_async.git_operations import GitOperations
from repopool_async.hosts.local import LocalHost
from repopool_async.janitor import Janitor, SweepReport
from repopool_async.lease import LeasedSlot
from repopool_async.lock_manager import LockManager
from repopool_async.mirror import Mirror
from repopool_async.models import (
    AllocationMetrics,
    AllocationRecord,
    CleanupResult,
    CommandResult,
    Lease,
    Pool,
    PoolSummary,
    RestoredSalvage,
    SalvageRecord,
    Slot,
    SlotState,
    SlotStatus,
    parse_slot_id,
)
from repopool_async.repo_pool import RepoPool, Unset
from repopool_async.run_as import RunAs
from repopool_async.salvage import Salvage
from repopool_async.slot_allocator import SlotAllocator
from repopool_async.slot_cleaner import Callbacks, SlotCallback, SlotCleaner
from repopool_async.slot_store import SlotStore
from repopool_async.workspaces.clone import CloneWorkspace
from repopool_async.workspaces.submodules import Submodules

_log: Final = logging.getLogger("repopool")

_FILES_RESERVED: Final = 128
"""Open files of a process beside one lock for every slot."""

_CLOSED_MEANWHILE: Final = "the PoolManager was closed meanwhile; open a new one"

_LESSEE_PROCESSES: Final = 1_000_000
"""How many commands lessees run at once is their business."""

_DETACHED_SECONDS: Final = 3600.0


Verb = TypeVar("Verb", bound=Callable[..., Coroutine[Any, Any, Any]])


def _ended_by_closing(verb: Verb) -> Verb:
    """Make a verb fail with `ManagerClosedError` when the manager is closed meanwhile, before `close` returns."""

    @functools.wraps(verb)
    async def interruptible(self: "PoolManager", *args: Any, **kwargs: Any) -> Any:
        self._require_open()
        async with self._interruptions.allowed(None, ManagerClosedError(_CLOSED_MEANWHILE)):
            return await verb(self, *args, **kwargs)

    return cast("Verb", interruptible)


class PoolManager:
    """Pools of clean, isolated git checkouts.

    Args:
        config: where things lie and what the pools are; the defaults where missing. No I/O happens here.
        configure: called with each `Slot` after it was made. check: before it is handed out. reset: after it was
            cleaned, before it is sealed. Sync or async; raising rejects the slot.
        git_config: git configuration for the pool's own git, such as a proxy or a CA; nothing else of the user's
            configuration is read.

    Use it as `async with PoolManager(...) as manager`, or call `open` and `close`. It cannot be reopened.
    """

    def __init__(
        self,
        config: PoolConfig | None = None,
        *,
        configure: SlotCallback | None = None,
        check: SlotCallback | None = None,
        reset: SlotCallback | None = None,
        git_config: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config if config is not None else PoolConfig()
        self._source: Path | None = None
        self._reloading = asyncio.Lock()
        self._changing: dict[str, asyncio.Task[None]] = {}
        self._is_refused = False
        self._transition = asyncio.Lock()
        self._interruptions = Interruptions()
        self._callbacks = Callbacks(configure=configure, check=check, reset=reset)
        self._git_config = dict(git_config or {})
        self._bus = EventBus()
        directory = str(self.config.workspaces_dir)
        self._host = LocalHost(max_processes=self.config.max_git_processes)
        self._lessee_host = LocalHost(max_processes=_LESSEE_PROCESSES)
        self._store = SlotStore(directory, on_event=self._bus.emit)
        self._locks = LockManager(self._store.locks_directory)
        self._coordinator = FileCoordinator(self._store, self._locks, on_event=self._bus.emit)
        self._allocator = SlotAllocator(self._store)
        self._pools: dict[str, RepoPool] = {}
        self._environments: dict[str, dict[str, str]] = {}
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._tasks = TaskSet("manager", on_error=lambda _name, _error: None)
        self._janitor = Janitor(
            lambda: list(self._pools.values()),
            host=self._host,
            store=self._store,
            locks=self._locks,
            emit=self._bus.emit,
            interval_seconds=self.config.janitor_interval,
        )
        self._state = "new"

    @classmethod
    def from_config_file(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Return a manager for a `pools.yaml`, which follows the file while it is open; options are the constructor's.

        Raises:
            ConfigError: the file is refused; the message names key and line.
        """
        manager = cls(PoolConfig.from_file(path), **options)
        manager._source = Path(path).absolute()
        return manager

    def __repr__(self) -> str:
        return f"<PoolManager {str(self.config.workspaces_dir)!r} [{self._state} | pools: {sorted(self._pools)}]>"

    # -- opening and closing -------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the manager is not open (any more)."""
        return self._state != "open"

    async def open(self) -> None:
        """Check the machine, take over what dead processes left, and bring up the configured pools in the background.

        Raises:
            PlatformNotSupportedError: this machine cannot run the pool, and why. StoreError: the directory cannot be
            used. ManagerClosedError: it was opened before.
        """
        if self._state != "new":
            raise ManagerClosedError("this PoolManager was opened before; make a new one")
        self._state = "opening"
        self._bus.open()
        async with self._transition:  # free, or somebody would have changed the state
            await self._open()

    async def _open(self) -> None:
        try:
            await self._check_platform()
            await self._adopt_stored_pools()
            await self._janitor.start()
        except BaseException:
            await shielded(self._end_pools(Deadline.after(0)), name="close-now")
            self._state = "closed"
            self._bus.close()
            raise
        self._state = "open"
        for name in self.config.pools:
            self._starting[name] = self._tasks.spawn(self._bring_up(name), name=f"start-{name}")
        if self._source is not None and self.config.watch != "never":
            watcher = ConfigWatcher(self._source, self._file_changed, is_polled=self.config.watch == "poll")
            self._tasks.spawn(watcher.run(), name="watch-config")

    async def close(self, timeout: float | Unset | None = Unset.TIMEOUT) -> None:
        """End everything; a second call waits for the first, and one during `open` for that.

        Args:
            timeout: seconds of grace for holders and cleanings; the configured `close_timeout` where missing, None for
                no limit.

        Waiters, and whoever is making, changing or repairing something, fail at once with `ManagerClosedError`. What is
        not finished in time is left to recovery by whoever opens the directory next. Afterwards no task, process or
        lock of this manager is left. Cancelling it cuts the grace short.
        """
        if self._state == "new":
            self._state = "closed"
        async with self._transition:
            if self._state == "open":
                grace = self.config.close_timeout if timeout is Unset.TIMEOUT else timeout
                await self._close(Deadline.after(grace))

    async def _close(self, deadline: Deadline) -> None:
        self._state = "closing"
        for pool in self._pools.values():
            pool.refuse()
        try:
            await self._end_pools(deadline)
        except BaseException:
            await shielded(self._end_pools(Deadline.after(0)), name="close-now")
            raise
        finally:
            self._state = "closed"
            self._bus.close()

    async def _end_pools(self, deadline: Deadline) -> None:
        await self._interruptions.interrupt()
        await self._tasks.cancel()
        await self._janitor.stop()
        pools = list(self._pools.values())

        async def end(pool: RepoPool) -> None:
            await pool.close(deadline)

        await together(*[lambda pool=pool: end(pool) for pool in pools])
        with suppress(TimeoutError):
            async with deadline.limit():
                await self._janitor.empty_trash()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _check_platform(self) -> None:
        if os.name != "posix":
            raise PlatformNotSupportedError("repopool needs POSIX (Linux, macOS); this platform is not supported")
        directory = str(self.config.workspaces_dir)
        await check_git_version(self._host)
        await self._make_directory(directory)
        if not self.config.allow_network_filesystem and await self._host.is_network_file_system(directory):
            raise PlatformNotSupportedError(
                f"{directory} lies on a network file system, where locks of crashed machines cannot be trusted; choose "
                f"a local directory, or set allow_network_filesystem if only one machine ever uses it"
            )
        _raise_open_file_limit()

    async def _make_directory(self, directory: str) -> None:
        try:
            await in_thread(_usable_directory, directory, str(self._store.locks_directory))
        except OSError as error:
            raise StoreError(
                f"workspaces_dir {directory} cannot be used ({error.strerror}); choose a writable directory, for "
                f"example with REPOPOOL_WORKSPACES_DIR"
            ) from error

    async def _adopt_stored_pools(self) -> None:
        for name in await self._store.list_pools():
            if name in self.config.pools:
                continue
            try:
                await self._adopt(name)
            except PoolManagerError as error:
                # One damaged pool must not keep the others from opening.
                self._bus.emit("pool.failed", {"repo_name": name, "error": str(error)})

    async def _adopt(self, name: str) -> RepoPool:
        stored = await self._store.load_pool(name)
        options = PoolOptions.from_mapping(stored.options)
        pool = self._register(stored, options, None, await self._established(options))
        if stored.is_drained:
            pool.retire()
        return pool

    async def _established(self, options: PoolOptions) -> RunAs | None:
        """Find the user that a pool's lessees run as, where it names one; raises as `RunAs.establish`."""
        if options.run_as is None:
            return None
        return await RunAs.establish(
            options.run_as,
            host=self._host,
            workspaces_dir=self._store.workspaces_directory,
            is_isolated=options.isolation == "full",
        )

    async def _bring_up(self, name: str) -> None:
        spec = self.config.pools.get(name)
        if spec is None:
            return  # removed from the configuration meanwhile
        try:
            await self._create(name, spec.repo_url, spec.options, is_exact=self._source is not None)
        except (PoolManagerError, OSError) as error:
            self._bus.emit("pool.failed", {"repo_name": name, "error": str(error)})
            raise

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the pools of the configuration file are up.

        Args:
            timeout: seconds.

        Raises:
            TimeoutError: they are not up in time. The first pool's error: it could not be brought up.
        """
        async with asyncio.timeout(timeout):
            for task in [*self._starting.values(), *self._changing.values()]:
                await asyncio.wait([task])
                if not task.cancelled():
                    task.result()

    # -- following the configuration file --------------------------------------------------------------------------

    async def reload(self) -> ConfigChange:
        """Read the configuration file again and take on what is different, without waiting for it to be noticed (8.3).

        Pools that are new come up in the background (`wait_ready` waits for that), as do slots that are missing;
        surplus slots go, those that are leased once they are back; options count from the next lease on. A pool that
        is gone from the file is drained: its leases and slots stay, it gives no new leases, and it is back as soon as
        the file has it again.

        Returns:
            What was different.

        Raises:
            ConfigError: the file is refused, and the configuration is what it was; or this manager was made without
            one. ManagerClosedError: it is not open.
        """
        self._require_open()
        if self._source is None:
            raise ConfigError("this manager has no configuration file; from_config_file makes one that has")
        async with self._reloading:
            try:
                config = await in_thread(PoolConfig.from_file, self._source)
                await self._refuse_other_identity(config, self._source)
            except ConfigError as error:
                self._is_refused = True
                fields = {"source": str(self._source), "line": error.line, "error": str(error)}
                self._bus.emit("config.refused", fields)
                raise
            self._is_refused = False
            change = self._take_on(config)
        fields = {"source": str(self._source), **attrs.asdict(change)}
        self._bus.emit("config.applied", fields)
        return change

    async def _file_changed(self) -> None:
        """Reload, unless the file says what is in force already; refusals have been told as events."""
        if self._source is None or self._state != "open":
            return
        try:
            if not self._is_refused and await in_thread(PoolConfig.from_file, self._source) == self.config:
                return
        except ConfigError:
            pass  # reload refuses it, and says so
        try:
            await self.reload()
        except ConfigError:
            return
        except (PoolManagerError, OSError) as error:
            self._bus.emit("config.refused", {"source": str(self._source), "line": None, "error": str(error)})

    async def _refuse_other_identity(self, config: PoolConfig, source: Path) -> None:
        """Refuse what no running manager can take on: another directory, or another repository under a pool's name."""
        if config.workspaces_dir != self.config.workspaces_dir:
            text = f"cannot change while a manager is open (it is {self.config.workspaces_dir}); restart"
            raise await in_thread(refusal_in, source, ("workspaces_dir",), text)
        for name, spec in config.pools.items():
            stored = await self._stored(name)
            try:
                url, _ = split_credentials(validate_url(spec.repo_url, config.allow_protocols))
            except RepositoryUrlError as error:
                raise await in_thread(refusal_in, source, ("pools", name, "repo_url"), str(error)) from None
            if stored is not None and stored.repo_url != url:
                text = f"{name} is already the pool of {stored.repo_url}; choose another name, or delete_pool first"
                raise await in_thread(refusal_in, source, ("pools", name, "repo_url"), text)

    def _take_on(self, config: PoolConfig) -> ConfigChange:
        """Begin to make a configuration true. No suspension: it is in force as a whole or not at all."""
        change = compare(self.config, config)
        self.config = config
        self._janitor.interval_seconds = config.janitor_interval
        for name in change.removed:
            if name in self._pools:
                self._pools[name].retire()
            self._change(name, self._drain_removed, is_over=True)
        for name in change.added:
            if name in self._pools:
                self._change(name, self._bring_up)
            else:
                work = self._after(self._changing_now(name), name, self._bring_up)
                self._starting[name] = self._tasks.spawn(work, name=f"start-{name}")
        for name in change.changed:
            self._change(name, self._bring_up)
        return change

    def _change(self, name: str, work: Callable[[str], Awaitable[None]], *, is_over: bool = False) -> None:
        """Do something to a pool after what is being done to it now, which is interrupted where it `is_over`."""
        earlier = self._changing_now(name)
        for task in earlier if is_over else []:
            task.cancel()
        self._changing[name] = self._tasks.spawn(self._after(earlier, name, work), name=f"change-{name}")

    def _changing_now(self, name: str) -> list[asyncio.Task[None]]:
        tasks = (self._changing.get(name), self._starting.get(name))
        return [task for task in tasks if task is not None and not task.done()]

    async def _after(
        self, earlier: list[asyncio.Task[None]], name: str, work: Callable[[str], Awaitable[None]]
    ) -> None:
        try:
            if earlier:
                await asyncio.wait(earlier)
        except asyncio.CancelledError:
            for task in earlier:
                task.cancel()
            await asyncio.wait(earlier)
            raise
        await work(name)

    async def _drain_removed(self, name: str) -> None:
        """Have whoever opens the directory next know that a pool gives no leases."""
        self._starting.pop(name, None)
        async with self._locks.acquire_slot_lock(f"pool-{name}", timeout=None):
            stored = await self._stored(name)
            if stored is None:
                return  # it had never come up
            await self._store.save_pool(attrs.evolve(stored, is_drained=True))
        if name in self._pools:
            self._pools[name].retire()
        self._bus.emit("pool.drained", {"repo_name": name})

    # -- pools ---------------------------------------------------------------------------------------------------

    @_ended_by_closing
    async def create_pool(
        self, repo_name: str, repo_url: str, *, num_slots: int | None = None, **options: Any
    ) -> RepoPool:
        """Make a pool and all its slots (1.1, 1.2), or open the one that is there.

        Several processes may do this at once with one directory: one makes it, all get it. A pool that exists for the
        same URL gets the options given and the slots that are missing.

        Args:
            repo_name: letters, digits, `._-`. repo_url: https, ssh, file or a local path; credentials in it are used
                but never stored.
            num_slots: how many slots; the configured default where missing.
            options: any per-pool option of `pools.yaml`.

        Raises:
            ConfigError: an option is refused. RepositoryUrlError: that is no URL.
            PoolExistsError: the name is taken by another repository. EmptyRepositoryError: it has no commits.
            GitOperationError: the repository could not be cloned. StoreError: the directory cannot be written.

        On an error or a cancellation nothing of a new pool is left.
        """
        self._require_open()
        given = options if num_slots is None else {**options, "num_slots": num_slots}
        return await self._create(repo_name, repo_url, self.config.options_for(None, **given))

    async def _create(self, repo_name: str, repo_url: str, options: PoolOptions, *, is_exact: bool = False) -> RepoPool:
        name = validate_repo_name(repo_name)
        _refuse_too_many_slots(name, options.num_slots)
        url, credentials = split_credentials(validate_url(repo_url, self.config.allow_protocols))
        async with self._locks.acquire_slot_lock(f"pool-{name}", timeout=None):
            stored = await self._stored(name)
            if stored is not None and stored.repo_url != url:
                raise PoolExistsError(
                    f"{name}: is already the pool of {stored.repo_url}; choose another name, or delete_pool first",
                    repo_name=name,
                )
            _refuse_change(stored, options)
            pool = self._pools.get(name)
            record = stored or Pool(repo_name=name, repo_url=url, num_slots=options.num_slots, created_at=now())
            record = attrs.evolve(record, num_slots=options.num_slots, options=options.changed(), is_drained=False)
            if pool is None:
                pool = self._register(record, options, credentials, await self._established(options))
            else:
                self._offer(name, credentials)
                if not READ_AT_USE.issuperset(changed_options(pool.options, options)):
                    self._register(record, options, None, await self._established(options))
                pool.reconfigure(record, options)
                pool.reinstate()
            pool.keeper.keep_all()
            await self._fill(pool, record, is_new=stored is None)
            if is_exact:
                await pool.keeper.shrink_to(record.num_slots)
        self._bus.emit("pool.ready", {"repo_name": name})
        return pool

    async def _fill(self, pool: RepoPool, record: Pool, *, is_new: bool) -> None:
        try:
            await pool.keeper.make_mirror()
            await self._store.save_pool(record)
            await pool.keeper.fill(record.num_slots)
        except BaseException:
            if is_new:
                await shielded(self._unmake(pool), name=f"unmake-{pool.name}")
            raise

    async def _unmake(self, pool: RepoPool) -> None:
        self._pools.pop(pool.name, None)
        await pool.close(Deadline.after(0))
        with suppress(PoolNotFoundError):  # interrupted before anything was made
            await self._store.delete_pool(pool.name)

    async def _stored(self, name: str) -> Pool | None:
        try:
            return await self._store.load_pool(name)
        except PoolNotFoundError:
            return None

    def _register(
        self, record: Pool, options: PoolOptions, credentials: Credentials | None, run_as: RunAs | None
    ) -> RepoPool:
        """Assemble a pool's components, for one that is open already as well."""
        name = record.repo_name
        environment = self._environments.setdefault(name, {})
        if name not in self._pools:
            environment.update(self._environment(credentials))
        runner = GitRunner(
            self._host,
            environment=environment,
            timeout=options.git_timeout,
            idle_timeout=options.git_idle_timeout,
            attempts=options.fetch_attempts,
        )
        mirror = Mirror(
            str(self._store.mirror_path(name)),
            record.repo_url,
            host=self._host,
            git=runner,
            locks=self._locks,
            repo_name=name,
            remotes=options.remotes,
        )
        submodules = Submodules(
            host=self._host,
            git=runner,
            mirror=mirror,
            allow_protocols=self.config.allow_protocols,
            # Asked of the pool, whose options may change while it is open.
            is_wanted=lambda: (self._pools[name].options if name in self._pools else options).submodules,
        )
        workspace = CloneWorkspace(
            host=self._host,
            git=runner,
            mirror=mirror,
            submodules=submodules,
            is_isolated=options.isolation == "full",
            run_as=run_as,
        )
        cleaner = SlotCleaner(
            GitOperations(self._host, runner=runner),
            workspace=workspace,
            store=self._store,
            callbacks=self._callbacks,
            on_event=self._bus.emit,
            rebuild_always=options.rebuild_always,
            run_as=run_as,
        )
        parts = Components(
            host=self._host,
            store=self._store,
            coordinator=self._coordinator,
            # Without metrics a pool counts into an allocator that nobody asks.
            allocator=self._allocator if options.enable_metrics else SlotAllocator(self._store),
            mirror=mirror,
            cleaner=cleaner,
            lessee_host=self._lessee_host,
            lessee_git=GitOperations(self._lessee_host),
            emit=self._emit,
            cleaning=asyncio.Semaphore(max(2, os.cpu_count() or 2)),
            run_as=run_as,
            salvage=Salvage(
                name,
                str(self._store.pool_directory(name)),
                host=self._host,
                git=runner,
                mirror=mirror,
                locks=self._locks,
                workspace=workspace,
            ),
        )
        present = self._pools.get(name)
        if present is not None:
            present.use(parts)
            return present
        pool = self._pools[name] = RepoPool(record, options, parts)
        return pool

    def _environment(self, credentials: Credentials | None) -> dict[str, str]:
        return base_environment(
            allow_protocols=self.config.allow_protocols, credentials=credentials, git_config=self._git_config
        )

    def _offer(self, name: str, credentials: Credentials | None) -> None:
        """Give a pool that is open already (adopted from disk, where none are stored) the credentials of a new URL."""
        if credentials is not None:
            self._environments[name].clear()
            self._environments[name].update(self._environment(credentials))

    async def get_pool(self, name: str) -> RepoPool:
        """Return a pool by name; one of the configuration file that is still coming up is waited for.

        Raises:
            PoolNotFoundError: there is none. The pool's error: it could not be brought up.
        """
        self._require_open()
        starting = self._starting.get(name)
        if starting is not None:
            await asyncio.wait([starting])
            is_wanted = name in self.config.pools and name not in self._pools
            if is_wanted and not starting.cancelled() and starting.exception() is not None:
                self._starting[name] = self._tasks.spawn(self._bring_up(name), name=f"start-{name}")
                starting.result()
        if name not in self._pools and await self._stored(name) is not None:
            await self._adopt(name)  # another process made it
        if name not in self._pools:
            known = ", ".join(await self.list_pools()) or "there are none"
            raise PoolNotFoundError(
                f"there is no pool {name!r} (pools: {known}); create_pool makes one", repo_name=name
            )
        return self._pools[name]

    async def list_pools(self) -> list[str]:
        """Return the names of all pools of the directory, sorted."""
        self._require_open()
        return sorted({*self._pools, *await self._store.list_pools()})

    @_ended_by_closing
    async def delete_pool(self, name: str, force: bool = False) -> None:
        """Delete a pool: slots, mirror, history.

        Args:
            force: also where slots are leased; their leases are lost.

        Raises:
            PoolInUseError: a slot is leased and `force` is not given; nothing has been deleted.
        """
        pool = await self.get_pool(name)
        async with self._locks.acquire_slot_lock(f"pool-{name}", timeout=None):
            await shielded(pool.delete(force=force), name=f"delete-{name}")
            self._pools.pop(name, None)
            self._starting.pop(name, None)
            self._changing.pop(name, None)
        self._bus.emit("pool.deleted", {"repo_name": name})

    # -- leases --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(
        self,
        repo_name: str,
        *,
        ref: str | None = None,
        timeout: float | Unset | None = Unset.TIMEOUT,
        new_branch: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> AsyncIterator[LeasedSlot]:
        """Hold a clean slot of a pool while the block runs; see `RepoPool.lease`."""
        pool = await self.get_pool(repo_name)
        async with pool.lease(
            ref=ref, timeout=timeout, new_branch=new_branch, metadata=metadata, priority=priority
        ) as slot:
            yield slot

    async def allocate_slot(
        self,
        repo_name: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        ref: str | None = None,
        timeout: float | None = 0,
        detached: bool = False,
        ttl: float | None = None,
    ) -> LeasedSlot | None:
        """Take a slot (2.1 to 2.3) and keep it until `release_slot`.

        Args:
            metadata: anything JSON can hold. ref: as in `lease`.
            timeout: seconds to wait for a slot, None for no limit.
            detached: whether the lease outlives this process. It is then held by its token (keep slot id and token) and
                expires unless renewed with `renew_slot`; any process that knows both may release it.
            ttl: seconds until a detached lease expires; an hour where missing.

        Returns:
            None where none became free in time (4.2); one that is being cleaned right now is waited for.

        Raises as `RepoPool.lease` does, and `ValueError` for a ttl that is none or of a lease that is not detached.
        """
        if ttl is not None and not detached:
            raise ValueError("ttl is how long a detached lease lasts; give detached=True too")
        pool = await self.get_pool(repo_name)
        seconds = (_DETACHED_SECONDS if ttl is None else ttl) if detached else None
        return await pool.allocate(ref=ref, timeout=timeout, metadata=metadata, ttl=seconds)

    async def release_slot(self, slot: LeasedSlot | str, *, token: int | None = None) -> None:
        """Give a slot back and clean it (2.4); a second call does nothing.

        Args:
            slot: what `allocate_slot` returned, or a slot id. token: of the lease, where only the id is known.

        Raises:
            LeaseLostError: the token is not the present lease's. SlotNotFoundError: there is no such slot.
            SlotInUseError: the lease belongs to another process that is alive.

        Afterwards the slot is AVAILABLE, or quarantined with a reason.
        """
        if isinstance(slot, str):
            await (await self._pool_of(slot)).release(slot, token=token)
        elif not slot.is_released:
            expected = token if token is not None else slot.token
            await (await self._pool_of(slot.slot_id)).release(slot.slot_id, token=expected)

    async def renew_slot(self, slot_id: str, token: int, ttl: float | None = None) -> Lease:
        """Extend a detached lease, from whichever process, and return it as it stands.

        Args:
            ttl: seconds from now; where missing nothing changes and the lease is only confirmed.

        Raises:
            LeaseLostError: the token is not the present lease's, or that has expired. SlotNotFoundError: there is no
            such slot. ValueError: the ttl is not a positive number.
        """
        return await (await self._pool_of(slot_id)).renew(slot_id, token, ttl)

    async def force_unlock(self, slot_id: str) -> Slot:
        """Take a slot away from whoever holds it; it is recovered in the background. Returns its record.

        The holder's next step fails with `LeaseLostError` and its `lost` is set within two seconds. What it left
        unpushed is saved unless the pool says `salvage: never`. A slot that nobody holds stays as it is.

        Raises:
            SlotNotFoundError: there is no such slot.
        """
        return await (await self._pool_of(slot_id)).watch.force_unlock(slot_id)

    # -- saved work ----------------------------------------------------------------------------------------------

    async def list_salvage(self, repo_name: str | None = None) -> list[SalvageRecord]:
        """Return what was saved of leases that ended badly, of one pool or of all, the oldest first."""
        records = [record for pool in await self._named(repo_name) for record in await pool.salvage.records()]
        return sorted(records, key=lambda record: record.created_at)

    async def restore_salvage(self, salvage_id: str, slot: LeasedSlot, *, branch: str | None = None) -> RestoredSalvage:
        """Bring saved work back into a leased slot of the same pool.

        Commits come back as branches. Where the slot is clean its branch is checked out, files lie there as they did,
        uncommitted, and stashes are stash entries again; otherwise files and stashes become branches too. The lessee's
        own git writes the files, as their attributes ask for.

        Args:
            salvage_id: or its beginning. branch: what to call the branch; `salvage/<short id>` where missing.

        Raises:
            SalvageNotFoundError: there is none of that id. CommandFailedError: such a branch exists.
        """
        pool = await self._pool_of(slot.slot_id)
        record = await pool.salvage.find(salvage_id)
        is_clean = await slot.is_clean_working_tree()
        return await pool.salvage.restore(record, slot.run, branch=branch, is_clean=is_clean)

    async def restore_salvage_into(
        self, salvage_id: str, directory: str | os.PathLike[str], *, branch: str | None = None
    ) -> RestoredSalvage:
        """Bring saved work into any clone of the repository as branches; its working tree is not touched.

        Raises:
            SalvageNotFoundError: there is none of that id. SalvageError: git refused.
        """
        pool, record = await self._saved(salvage_id)

        async def run(*argv: str, env: Mapping[str, str] | None = None) -> CommandResult:
            environment = {**lessee_environment(), **(env or {})}
            done = await self._host.run(argv, env=environment, cwd=os.path.abspath(directory))  # noqa: ASYNC240, PTH100
            if done.exit_code != 0:
                words = done.stderr.decode(errors="replace").strip()
                raise SalvageError(f"{record.salvage_id[:8]}: cannot be restored: {words}", repo_name=pool.name)
            return done

        return await pool.salvage.restore(record, run, branch=branch, is_clean=False)

    async def describe_salvage(self, salvage_id: str) -> tuple[SalvageRecord, str]:
        """Return saved work, and git's table of the files that differ from the lessee's HEAD."""
        pool, record = await self._saved(salvage_id)
        return record, await pool.salvage.describe(record)

    async def delete_salvage(self, salvage_id: str) -> None:
        """Delete saved work for good.

        Raises:
            SalvageNotFoundError: there is none of that id.
        """
        pool, record = await self._saved(salvage_id)
        await pool.salvage.delete(record.salvage_id)

    async def _saved(self, salvage_id: str) -> tuple[RepoPool, SalvageRecord]:
        failure: SalvageNotFoundError | None = None
        for pool in await self._named(None):
            try:
                return pool, await pool.salvage.find(salvage_id)
            except SalvageNotFoundError as error:
                failure = error
        raise failure or SalvageNotFoundError(f"no saved work {salvage_id!r}: there are no pools")

    # -- slots ---------------------------------------------------------------------------------------------------

    @_ended_by_closing
    async def add_slot(self, repo_name: str) -> Slot:
        """Add a slot to a live pool (7.1, 7.2); raises as `create_pool` does."""
        pool = await self.get_pool(repo_name)
        slot = await pool.keeper.add_slot()
        await self._remember_size(pool)
        return slot

    @_ended_by_closing
    async def remove_slot(self, slot_id: str) -> None:
        """Delete a slot, directory and all (7.3 to 7.5).

        Raises:
            SlotInUseError: it is leased. SlotNotFoundError: there is none.
        """
        pool = await self._pool_of(slot_id)
        await pool.keeper.remove_slot(slot_id)
        await self._remember_size(pool)

    @_ended_by_closing
    async def resize(self, repo_name: str, num_slots: int) -> None:
        """Grow or shrink a pool to a number of slots.

        Raises:
            ConfigError: the number is refused. SlotInUseError: too many slots are leased to shrink that far; those that
            were free have been removed.
        """
        pool = await self.get_pool(repo_name)
        checked = self.config.options_for(None, num_slots=num_slots)
        try:
            await pool.keeper.resize(checked.num_slots)
        finally:
            await self._remember_size(pool)

    async def _remember_size(self, pool: RepoPool) -> None:
        """Store how many slots there are meant to be from now on."""
        pool.keeper.keep_all()
        stored = await self._store.load_pool(pool.name)
        count = len(await self._coordinator.list_slots(pool.name))
        options = attrs.evolve(pool.options, num_slots=max(count, 1))
        record = attrs.evolve(stored, num_slots=count, options=options.changed())
        await self._store.save_pool(record)
        pool.reconfigure(record, options)

    @_ended_by_closing
    async def repair_slot(self, slot_id: str) -> CleanupResult:
        """Make a quarantined or damaged slot anew (9.5); see `RepoPool.repair_slot`."""
        return await (await self._pool_of(slot_id)).keeper.repair_slot(slot_id)

    @_ended_by_closing
    async def check(self, repo_name: str | None = None) -> dict[str, list[str]]:
        """Look at every inode of every AVAILABLE slot and every object of the mirrors, and repair what is damaged.

        It takes as long as reading the repository's whole history does.

        Returns:
            What was wrong, by slot id and `<pool>/mirror.git`; nothing where all is well.
        """
        found: dict[str, list[str]] = {}
        for pool in await self._named(repo_name):
            found |= await pool.keeper.check()
        return found

    @_ended_by_closing
    async def drain(self, repo_name: str | None = None) -> None:
        """Make the trees of all unleased slots anew."""
        for pool in await self._named(repo_name):
            await pool.keeper.drain()

    # -- looking -------------------------------------------------------------------------------------------------

    async def get_slot_status(self, slot_id: str) -> SlotStatus:
        """Return what can be said of a slot at this moment (4.5, 5.2).

        Raises:
            SlotNotFoundError: there is none.
        """
        pool = await self._pool_of(slot_id)
        slot = await self._coordinator.get_slot(slot_id)
        lease = slot.lease if slot.state is SlotState.ALLOCATED else None
        return SlotStatus(
            slot_id=slot_id,
            repo_name=pool.name,
            state=slot.state,
            path=slot.path,
            is_locked=await self._locks.is_locked(slot_id),
            commit=lease.commit if lease else slot.seal.commit if slot.seal else None,
            branch=lease.branch if lease else slot.seal.branch if slot.seal else None,
            lease=lease,
            held_seconds=boottime() - lease.acquired_boottime if lease else None,
            allocation_count=slot.allocation_count,
            total_allocated_seconds=slot.total_allocated_seconds,
            created_at=slot.created_at,
            last_used_at=slot.last_used_at,
            error=slot.error,
        )

    async def get_pool_summary(self) -> dict[str, PoolSummary]:
        """Return every pool at a glance (5.5)."""
        return {name: await (await self.get_pool(name)).summary() for name in await self.list_pools()}

    async def available_count(self, repo_name: str) -> int:
        """Return how many slots of a pool are AVAILABLE (5.4)."""
        return (await (await self.get_pool(repo_name)).summary()).available

    async def list_slots(self, repo_name: str) -> list[Slot]:
        """Return the records of a pool's slots, by number (1.5)."""
        return await (await self.get_pool(repo_name)).list_slots()

    async def get_allocation_history(self, slot_id: str, *, limit: int | None = None) -> list[AllocationRecord]:
        """Return who had a slot (2.5), newest last."""
        await self._pool_of(slot_id)
        return await self._store.history(slot_id, limit=limit)

    async def get_cleanup_log(self, slot_id: str, *, limit: int | None = None) -> list[CleanupResult]:
        """Return what was done to a slot (3.5), newest last."""
        await self._pool_of(slot_id)
        return await self._store.cleanup_log(slot_id, limit=limit)

    def get_allocation_metrics(self, repo_name: str) -> AllocationMetrics:
        """Return how allocating went in this process (10.5)."""
        return self._allocator.get_allocation_metrics(repo_name)

    def get_stats(self) -> dict[str, dict[str, int]]:
        """Return counts of this process by pool, without any I/O."""
        return {name: pool.stats() for name, pool in self._pools.items()}

    def events(self) -> AsyncIterator[Event]:
        """Iterate over what happens from now on, until the manager is closed."""
        return self._bus.listen()

    @_ended_by_closing
    async def recover(self) -> SweepReport:
        """Run the janitor once, wait until what it began is done, and return what it did.

        It takes over what dead processes left, ends leases older than `max_lease_seconds`, repairs quarantined slots,
        erases the signatures of dead lock holders, deletes abandoned temporary files, and keeps to `disk_limit`.

        Returns:
            The ids of the slots taken over, a list, with attributes for all else.
        """
        self._require_open()
        recovered = await self._janitor.sweep()
        await self.wait_clean()
        return recovered

    async def wait_clean(self) -> None:
        """Wait until this process cleans no slot."""
        for pool in list(self._pools.values()):
            await pool.keeper.wait_clean()

    # -- finding -------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._state not in ("open", "opening"):
            raise ManagerClosedError(f"the PoolManager is {self._state}; use it inside `async with PoolManager(...)`")

    def _emit(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._bus.emit(kind, fields)
        if kind in ("slot.available", "slot.postponed"):  # the latter perhaps for want of the room that trash takes
            self._janitor.note_trash()

    async def _named(self, name: str | None) -> list[RepoPool]:
        names = [name] if name is not None else await self.list_pools()
        return [await self.get_pool(name) for name in names]

    async def _pool_of(self, slot_id: str) -> RepoPool:
        self._require_open()
        try:
            name, _ = parse_slot_id(slot_id)
            return await self.get_pool(name)
        except (ValueError, PoolNotFoundError) as error:
            raise SlotNotFoundError(f"there is no slot {slot_id!r}: {error}", slot_id=slot_id) from None


def _refuse_change(stored: Pool | None, options: PoolOptions) -> None:
    """Refuse another kind of isolation for slots that exist: a lessee may be in one of them this moment."""
    if stored is None:
        return
    was = PoolOptions.from_mapping(stored.options)
    for key in ("isolation", "run_as"):
        if getattr(was, key) != getattr(options, key):
            raise ConfigError(
                f"{stored.repo_name}: {key} is {getattr(was, key)} and stays so as long as the pool exists; "
                f"delete_pool first, or give {key}={getattr(was, key)}",
                key=key,
            )


def _usable_directory(directory: str, locks: str) -> None:
    os.makedirs(locks, exist_ok=True)  # noqa: PTH103 - plain strings throughout
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(directory).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(code, os.strerror(code), directory)


def _raise_open_file_limit() -> None:
    """Raise the soft limit on open files to the hard one: every leased slot holds a lock's descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _refuse_too_many_slots(repo_name: str, num_slots: int) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = num_slots + _FILES_RESERVED
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise PlatformNotSupportedError(
            f"{repo_name}: {num_slots} slots need {needed} open files, this process may have {limit}; raise the hard "
            f"limit (ulimit -Hn) or make fewer slots",
            repo_name=repo_name,
        )
