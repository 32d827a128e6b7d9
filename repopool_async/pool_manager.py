"""The facade: every verb of the public interface, handed to who does it.

What concerns one repository is its `RepoPool`'s business, found by a pool's name or a slot's id in the `PoolRegistry`.
Of what all of it is made `assembly` decides, in what order it begins and ends the `Lifecycle`.
"""

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

import attrs

from repopool_async._clock import boottime, now
from repopool_async._identity import boot_id
from repopool_async.assembly import Assembler, Shared
from repopool_async.config import PoolConfig
from repopool_async.config_changes import ConfigChange
from repopool_async.config_hosts import HostSpec, checked_hosts
from repopool_async.config_reload import ConfigReload
from repopool_async.configured_pools import ConfiguredPools
from repopool_async.events import Event
from repopool_async.exceptions import PoolNotFoundError, SlotNotFoundError
from repopool_async.host_verbs import HostVerbs
from repopool_async.host_watch import HostWatch
from repopool_async.janitor import Janitor, SweepReport
from repopool_async.lease import LeasedSlot
from repopool_async.lifecycle import Lifecycle
from repopool_async.models import (
    AllocationMetrics,
    AllocationRecord,
    CleanupResult,
    Lease,
    PoolSummary,
    RestoredSalvage,
    SalvageRecord,
    Slot,
    SlotStatus,
    parse_slot_id,
)
from repopool_async.pool_completion import PoolCompletion
from repopool_async.pool_registry import PoolRegistry
from repopool_async.repo_pool import RepoPool, Unset
from repopool_async.salvage_catalogue import SalvageCatalogue
from repopool_async.slot_cleaner import Callbacks, SlotCallback

_DETACHED_SECONDS: Final = 3600.0

Verb = TypeVar("Verb", bound=Callable[..., Coroutine[Any, Any, Any]])


def _ended_by_closing(verb: Verb) -> Verb:
    """Make a verb fail with `ManagerClosedError` when the manager is closed meanwhile, before `close` returns."""

    @functools.wraps(verb)
    async def interruptible(self: "PoolManager", *args: Any, **kwargs: Any) -> Any:
        async with self._lifecycle.ending_with_it():
            return await verb(self, *args, **kwargs)

    return cast("Verb", interruptible)


class PoolManager(HostVerbs):
    """Pools of clean, isolated git checkouts.

    Args:
        config: where things lie and what the pools are; the defaults where missing. No I/O happens here.
        configure: called with each `Slot` after it was made. check: before it is handed out. reset: after it was
            cleaned, before it is sealed. Sync or async; raising rejects the slot.
        git_config: git configuration for the pool's own git, such as a proxy or a CA; nothing else of the user's
            configuration is read.
        hosts: machines that can hold slots, beside those of the configuration.

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
        hosts: Sequence[HostSpec] = (),
    ) -> None:
        given = config if config is not None else PoolConfig()
        if hosts:
            given = attrs.evolve(given, hosts={**given.hosts, **checked_hosts(hosts)})
        self._shared = Shared.of(given)
        assembler = Assembler(
            self._shared,
            callbacks=Callbacks(configure=configure, check=check, reset=reset),
            git_config=dict(git_config or {}),
            emit=self._emit,
        )
        self._registry = PoolRegistry(self._shared, assembler)
        self._configured = ConfiguredPools(self._shared, self._registry)
        self._completion = PoolCompletion(self._shared, self._registry)
        self._janitor = Janitor(
            lambda: self._registry,
            workspaces_dir=str(self.config.workspaces_dir),
            locks=self._shared.locks,
            emit=self._shared.bus.emit,
            complete=self._completion.begin,
            interval_seconds=self.config.janitor_interval,
        )
        self._reloading = ConfigReload(self._shared, self._registry, self._configured, self._janitor)
        watch = HostWatch(
            self._shared.hosts,
            lambda: self._registry,
            coordinator=self._shared.coordinator,
            locks=self._shared.locks,
        )
        self._lifecycle = Lifecycle(
            self._shared,
            self._registry,
            self._configured,
            self._reloading,
            janitor=self._janitor,
            completion=self._completion,
            watch=watch,
        )

    @classmethod
    def from_config_file(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Return a manager for a `pools.yaml`, which follows the file while it is open; options are the constructor's.

        Raises:
            ConfigError: the file is refused; the message names key and line.
        """
        manager = cls(PoolConfig.from_file(path), **options)
        manager._reloading.follow(Path(path).absolute())
        return manager

    def __repr__(self) -> str:
        pools = sorted(pool.name for pool in self._registry)
        return f"<PoolManager {str(self.config.workspaces_dir)!r} [{self._lifecycle.state} | pools: {pools}]>"

    @property
    def config(self) -> PoolConfig:
        """What is in force: as it was given, or as the configuration file says by now."""
        return self._shared.config

    # -- opening and closing -------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the manager is not open (any more)."""
        return self._lifecycle.state != "open"

    async def open(self) -> None:
        """Check the machine, take over what dead processes left, and bring up the configured pools in the background.

        Raises:
            PlatformNotSupportedError: this machine cannot run the pool, and why. StoreError: the directory cannot be
            used, or the database refuses or lacks the schema (`repopool db migrate`). CoordinatorUnavailableError: the
            database cannot be used now. ConfigError: the directory is another manager's. ManagerClosedError: it was
            opened before.
        """
        await self._lifecycle.open()

    async def close(self, timeout: float | Unset | None = Unset.TIMEOUT) -> None:
        """End everything; a second call waits for the first, and one during `open` for that.

        Args:
            timeout: seconds of grace for holders and cleanings; the configured `close_timeout` where missing, None for
                no limit.

        Waiters, and whoever is making, changing or repairing something, fail at once with `ManagerClosedError`. What is
        not finished in time is left to recovery by whoever opens the directory next. Afterwards no task, process or
        lock of this manager is left. Cancelling it cuts the grace short.
        """
        await self._lifecycle.close(self.config.close_timeout if timeout is Unset.TIMEOUT else timeout)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the pools of the configuration file are up.

        Args:
            timeout: seconds.

        Raises:
            TimeoutError: they are not up in time. The first pool's error: it could not be brought up.
        """
        async with asyncio.timeout(timeout):
            await self._configured.wait_ready()

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
        return await self._reloading.reload()

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
        return await self._registry.create(repo_name, repo_url, self.config.options_for(None, **given))

    async def get_pool(self, name: str) -> RepoPool:
        """Return a pool by name; one of the configuration file that is still coming up is waited for.

        Raises:
            PoolNotFoundError: there is none. The pool's error: it could not be brought up.
        """
        self._require_open()
        await self._configured.settled(name)
        pool = await self._registry.find(name)
        if pool is None:
            known = ", ".join(await self.list_pools()) or "there are none"
            raise PoolNotFoundError(
                f"there is no pool {name!r} (pools: {known}); create_pool makes one", repo_name=name
            )
        return pool

    async def list_pools(self) -> list[str]:
        """Return the names of all pools of the directory, sorted."""
        self._require_open()
        return await self._registry.names()

    @_ended_by_closing
    async def delete_pool(self, name: str, force: bool = False) -> None:
        """Delete a pool: slots, mirror, history.

        Args:
            force: also where slots are leased; their leases are lost.

        Raises:
            PoolInUseError: a slot is leased and `force` is not given; nothing has been deleted.

        Cancelled, it is deleted all the same. Where this process dies amid it, whoever comes next makes the pool whole
        again; delete it again.
        """
        pool = await self.get_pool(name)
        async with self._registry.name_held(name):
            await self._registry.delete(pool, force=force)
            self._configured.forget(name)
        self._shared.bus.emit("pool.deleted", {"repo_name": name})

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
        return await (await self._salvage(repo_name)).records()

    async def restore_salvage(self, salvage_id: str, slot: LeasedSlot, *, branch: str | None = None) -> RestoredSalvage:
        """Bring saved work back into a leased slot of the same pool, on whichever of its hosts it was saved.

        Commits come back as branches. Where the slot is clean its branch is checked out, files lie there as they did,
        uncommitted, and stashes are stash entries again; otherwise files and stashes become branches too. The lessee's
        own git writes the files, as their attributes ask for.

        Args:
            salvage_id: or its beginning. branch: what to call the branch; `salvage/<short id>` where missing.

        Raises:
            SalvageNotFoundError: there is none of that id. CommandFailedError: such a branch exists, at another commit;
            then none has been made.

        Cancelled, it may be called again, and goes by what has been made by then.
        """
        pool = await self._pool_of(slot.slot_id)
        return await SalvageCatalogue([pool], self._shared.own.host).restore(salvage_id, slot, branch=branch)

    async def restore_salvage_into(
        self, salvage_id: str, directory: str | os.PathLike[str], *, branch: str | None = None
    ) -> RestoredSalvage:
        """Bring saved work into any clone of the repository as branches; its working tree is not touched.

        Raises:
            SalvageNotFoundError: there is none of that id. SalvageError: git refused, as where such a branch exists at
            another commit; then none has been made.

        Cancelled, it may be called again.
        """
        return await (await self._salvage()).restore_into(salvage_id, directory, branch=branch)

    async def describe_salvage(self, salvage_id: str) -> tuple[SalvageRecord, str]:
        """Return saved work, and git's table of the files that differ from the lessee's HEAD."""
        return await (await self._salvage()).describe(salvage_id)

    async def delete_salvage(self, salvage_id: str) -> None:
        """Delete saved work for good.

        Raises:
            SalvageNotFoundError: there is none of that id.
        """
        await (await self._salvage()).delete(salvage_id)

    async def _salvage(self, repo_name: str | None = None) -> SalvageCatalogue:
        return SalvageCatalogue(await self._named(repo_name), self._shared.own.host)

    # -- slots ---------------------------------------------------------------------------------------------------

    @_ended_by_closing
    async def add_slot(self, repo_name: str) -> Slot:
        """Add a slot to a live pool (7.1, 7.2); raises as `create_pool` does."""
        pool = await self.get_pool(repo_name)
        slot = await pool.keeper.add_slot()
        await self._registry.remember_size(pool)
        return slot

    @_ended_by_closing
    async def remove_slot(self, slot_id: str) -> None:
        """Delete a slot, directory and all (7.3 to 7.5).

        Raises:
            SlotInUseError: it is leased. SlotNotFoundError: there is none.
        """
        pool = await self._pool_of(slot_id)
        await pool.keeper.remove_slot(slot_id)
        await self._registry.remember_size(pool)

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
            await self._registry.remember_size(pool)

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
        await self._pool_of(slot_id)
        slot = await self._shared.coordinator.get_slot(slot_id)
        taken = await self._shared.coordinator.taken_among([slot_id])
        return SlotStatus.of(slot, is_locked=slot_id in taken, at=_boottime_of(slot))

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
        return await self._shared.records.history(slot_id, limit=limit)

    async def get_cleanup_log(self, slot_id: str, *, limit: int | None = None) -> list[CleanupResult]:
        """Return what was done to a slot (3.5), newest last."""
        await self._pool_of(slot_id)
        return await self._shared.records.cleanup_log(slot_id, limit=limit)

    def get_allocation_metrics(self, repo_name: str) -> AllocationMetrics:
        """Return how allocating went in this process (10.5)."""
        return self._shared.allocator.get_allocation_metrics(repo_name)

    def get_stats(self) -> dict[str, dict[str, int]]:
        """Return counts of this process by pool, without any I/O."""
        return {pool.name: pool.stats() for pool in self._registry}

    def events(self) -> AsyncIterator[Event]:
        """Iterate over what happens from now on, until the manager is closed."""
        return self._shared.bus.listen()

    @_ended_by_closing
    async def recover(self) -> SweepReport:
        """Run the janitor once, wait until what it began is done, and return what it did.

        It takes over what dead processes left, makes the slots of pools whose maker died, ends leases older than
        `max_lease_seconds`, repairs quarantined slots, erases the signatures of dead lock holders, deletes abandoned
        temporary files, and keeps to `disk_limit`.

        Returns:
            The ids of the slots taken over, a list, with attributes for all else.
        """
        self._require_open()
        recovered = await self._janitor.sweep()
        await self._completion.settled()
        await self.wait_clean()
        return recovered

    async def wait_clean(self) -> None:
        """Wait until this process cleans no slot."""
        for pool in self._registry:
            await pool.keeper.wait_clean()

    # -- finding -------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        self._lifecycle.require_open()

    def _emit(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._shared.bus.emit(kind, fields)
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


def _boottime_of(slot: Slot) -> float:
    """Return what the boot-time clock says now that a slot's lease was told by; another machine's is reckoned."""
    lease = slot.lease
    if lease is None or lease.owner.boot_id == boot_id():
        return boottime()
    return lease.acquired_boottime + (now() - lease.acquired_at).total_seconds()
