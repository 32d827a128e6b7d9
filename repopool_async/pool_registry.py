"""The pools of one manager by name: makes, opens, changes and deletes them.

Several processes may do that with one directory at once; who does holds the pool's name. What pools a configuration
asks for is `configured_pools`' business, what a pool is made of `assembly`'s.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import attrs

from repopool_async._aio import Deadline, shielded
from repopool_async._clock import boottime, now
from repopool_async._git_arguments import Credentials, split_credentials, validate_url
from repopool_async.assembly import Assembler, Shared
from repopool_async.config import PoolOptions
from repopool_async.config_changes import READ_AT_USE, changed_options
from repopool_async.config_values import validate_repo_name
from repopool_async.exceptions import (
    ConfigError,
    CoordinatorUnavailableError,
    PoolExistsError,
    PoolManagerError,
    PoolNotFoundError,
)
from repopool_async.models import Pool
from repopool_async.preflight import refuse_too_many_slots
from repopool_async.repo_pool import RepoPool

_LOOK_SECONDS: Final = 1.0
"""How long an open pool is taken to be there still without looking."""


class PoolRegistry:
    """The pools that are open, and what is stored of all others."""

    def __init__(self, shared: Shared, assembler: Assembler) -> None:
        self._shared = shared
        self._assembler = assembler
        self._pools: dict[str, RepoPool] = {}
        self._seen: dict[str, float] = {}

    def __iter__(self) -> Iterator[RepoPool]:
        """Iterate over the pools that are open now."""
        return iter(list(self._pools.values()))

    def opened(self, name: str) -> RepoPool | None:
        """Return a pool that is open."""
        return self._pools.get(name)

    async def names(self) -> list[str]:
        """Return the names of all pools of the directory, sorted."""
        names = sorted(await self._shared.records.list_pools())
        for name in self._pools.keys() - set(names):
            await self._close_if_deleted(name)
        return names

    async def stored(self, name: str) -> Pool | None:
        """Return what is stored of a pool."""
        try:
            return await self._shared.records.load_pool(name)
        except PoolNotFoundError:
            return None

    async def find(self, name: str) -> RepoPool | None:
        """Return a pool, which is opened where another process has made it; None where there is none (any more)."""
        if name in self._pools and boottime() - self._seen.get(name, float("-inf")) >= _LOOK_SECONDS:
            with suppress(CoordinatorUnavailableError):
                await self._close_if_deleted(name)
                self._seen[name] = boottime()
        if name not in self._pools and await self.stored(name) is not None:
            await self.adopt(name)
        return self._pools.get(name)

    async def _close_if_deleted(self, name: str) -> None:
        """Close a pool that another process has deleted, or deleted and made of another repository."""
        if await self._is_there(name):
            return
        held = await self._shared.locks.try_acquire(name_lock(name))
        if held is None:
            return  # somebody is making, changing or deleting it, perhaps we
        try:
            pool = self._pools.get(name)
            if pool is not None and not await self._is_there(name):
                del self._pools[name]
                await shielded(pool.close(Deadline.after(0)), name=f"close-{name}")
                self._shared.bus.emit("pool.deleted", {"repo_name": name})
        finally:
            await held.release()

    async def _is_there(self, name: str) -> bool:
        pool, stored = self._pools.get(name), await self.stored(name)
        if stored is None:  # its record may be damaged beyond guessing, and the pool at work all the same
            return name in await self._shared.records.list_pools()
        return pool is None or stored.repo_url == pool.record.repo_url

    async def adopt(self, name: str) -> RepoPool:
        """Open a pool that is stored, as it is stored."""
        stored = await self._shared.records.load_pool(name)
        pool = await self._open(stored, PoolOptions.from_mapping(stored.options), None)
        if stored.is_drained:
            pool.retire()
        return pool

    async def adopt_all(self) -> None:
        """Open the pools that are stored, but for those that the configuration in force brings up."""
        for name in await self._shared.records.list_pools():
            if name in self._shared.config.pools:
                continue
            try:
                await self.adopt(name)
            except PoolManagerError as error:
                # One damaged pool must not keep the others from opening.
                self._shared.bus.emit("pool.failed", {"repo_name": name, "error": str(error)})

    async def create(self, repo_name: str, repo_url: str, options: PoolOptions, *, is_exact: bool = False) -> RepoPool:
        """Make a pool and its slots, or have the one that is there take on the options; see `PoolManager.create_pool`.

        Args:
            is_exact: remove slots where there are too many.
        """
        name = validate_repo_name(repo_name)
        if not self._shared.hosts.is_shared:
            refuse_too_many_slots(name, options.num_slots)
        self._shared.hosts.check(options.hosts)
        url, credentials = split_credentials(validate_url(repo_url, self._shared.config.allow_protocols))
        async with self.name_held(name):
            stored = await self.stored(name)
            _refuse_other_repository(name, stored, url)
            _refuse_change(stored, options)
            record = stored or Pool(repo_name=name, repo_url=url, num_slots=options.num_slots, created_at=now())
            record = attrs.evolve(record, num_slots=options.num_slots, options=options.changed(), is_drained=False)
            pool = await self._with_options(record, options, credentials)
            pool.keeper.keep_all()
            await self._fill(pool, record, is_new=stored is None)
            if is_exact:
                await pool.keeper.shrink_to(record.num_slots)
        self._shared.bus.emit("pool.ready", {"repo_name": name})
        return pool

    async def is_unfinished(self, name: str) -> bool:
        """Return whether a pool lacks slots that nobody is making: whoever did has died, or could not."""
        stored = await self.stored(name)
        if stored is None or stored.is_complete or stored.is_drained:
            return False
        return not await self._shared.locks.is_locked(name_lock(name))

    async def complete(self, pool: RepoPool) -> None:
        """Make the slots that an unfinished pool lacks, unless somebody else is at it; raises as `create` does."""
        held = await self._shared.locks.try_acquire(name_lock(pool.name))
        if held is None:
            return
        try:
            stored = await self.stored(pool.name)
            if stored is None or stored.is_complete or stored.is_drained:
                return
            await pool.keeper.chores.make_mirrors()
            await self._make_slots(pool, stored)
        finally:
            await held.release()
        self._shared.bus.emit("pool.ready", {"repo_name": pool.name})

    async def replace_slots(self, pool: RepoPool, remove: Callable[[], Awaitable[None]]) -> None:
        """Remove slots and make as many new ones; who dies or fails meanwhile leaves the pool unfinished.

        Raises:
            SlotAllocationError: its hosts cannot hold so many. Otherwise as `create` and `remove`.
        """
        async with self.name_held(pool.name):
            stored = await self._shared.records.load_pool(pool.name)
            await self._shared.records.save_pool(attrs.evolve(stored, is_complete=False))
            await remove()
            await self._make_slots(pool, await self._shared.records.load_pool(pool.name))

    async def retire(self, name: str) -> None:
        """Have a pool give no more leases, in whichever process opens it, until it is created again."""
        async with self.name_held(name):
            stored = await self.stored(name)
            if stored is None:
                return  # it had never come up
            await self._shared.records.save_pool(attrs.evolve(stored, is_drained=True))
        if name in self._pools:
            self._pools[name].retire()
        self._shared.bus.emit("pool.drained", {"repo_name": name})

    async def delete(self, pool: RepoPool, *, force: bool) -> None:
        """Delete a pool whose name is held; see `PoolManager.delete_pool`."""
        await shielded(pool.delete(force=force), name=f"delete-{pool.name}")
        self._pools.pop(pool.name, None)

    async def remember_size(self, pool: RepoPool) -> None:
        """Store how many slots there are meant to be from now on: as many as there are."""
        pool.keeper.keep_all()
        stored = await self._shared.records.load_pool(pool.name)
        count = len(await self._shared.coordinator.list_slots(pool.name))
        options = attrs.evolve(pool.options, num_slots=max(count, 1))
        record = attrs.evolve(stored, num_slots=count, options=options.changed())
        await self._shared.records.save_pool(record)
        pool.reconfigure(record, options)

    @asynccontextmanager
    async def name_held(self, name: str) -> AsyncIterator[None]:
        """Keep all others, in other processes too, from making, changing or deleting a pool during the block."""
        async with self._shared.locks.acquire_slot_lock(name_lock(name), timeout=None):
            yield

    async def _with_options(self, record: Pool, options: PoolOptions, credentials: Credentials | None) -> RepoPool:
        """Open a pool, or have the open one take on other options, made of other components where they need that."""
        pool = self._pools.get(record.repo_name)
        if pool is None:
            return await self._open(record, options, credentials)
        if credentials is not None:  # it may have been adopted from disk, where none are stored
            self._assembler.give_credentials(pool.name, credentials)
        if not READ_AT_USE.issuperset(changed_options(pool.options, options)):
            await self._open(record, options, None)
        pool.reconfigure(record, options)
        pool.reinstate()
        return pool

    async def _open(self, record: Pool, options: PoolOptions, credentials: Credentials | None) -> RepoPool:
        """Assemble a pool; one that is open already goes on with the new components."""
        name = record.repo_name
        slots = await self._shared.coordinator.list_slots(name) if self._shared.hosts.is_shared else []
        present = self._pools.get(name)  # only now: somebody else may have opened it meanwhile
        if present is None:
            self._assembler.give_credentials(name, credentials)
        parts = self._assembler.assemble(
            record, options, current=lambda: self._pools[name].options if name in self._pools else options
        )
        if present is not None:
            present.use(parts)
            return present
        pool = self._pools[name] = RepoPool(record, options, parts, self._shared.hosts)
        self._shared.hosts.expect([*parts.hosts.choose(), *{slot.host_id for slot in slots}])
        return pool

    async def _fill(self, pool: RepoPool, record: Pool, *, is_new: bool) -> None:
        try:
            await pool.keeper.chores.make_mirrors()
            await self._make_slots(pool, record)
        except BaseException:
            if is_new:
                await shielded(self._unmake(pool), name=f"unmake-{pool.name}")
            raise

    async def _make_slots(self, pool: RepoPool, record: Pool) -> None:
        """Make a pool have the slots that its record says; until all are there it says that some are missing, too."""
        is_complete = len(await pool.list_slots()) >= record.num_slots
        await self._shared.records.save_pool(attrs.evolve(record, is_complete=is_complete))
        if not is_complete:
            await pool.keeper.fill(record.num_slots)
            stored = await self._shared.records.load_pool(pool.name)  # numbers have been given since
            await self._shared.records.save_pool(attrs.evolve(stored, is_complete=True))

    async def _unmake(self, pool: RepoPool) -> None:
        self._pools.pop(pool.name, None)
        await pool.close(Deadline.after(0))
        with suppress(PoolNotFoundError):  # interrupted before anything was made
            await pool.erase()


def name_lock(name: str) -> str:
    """Return the lock of whoever makes, changes or deletes a pool."""
    return f"pool-{name}"


def _refuse_other_repository(name: str, stored: Pool | None, url: str) -> None:
    if stored is not None and stored.repo_url != url:
        raise PoolExistsError(
            f"{name}: is already the pool of {stored.repo_url}; choose another name, or delete_pool first",
            repo_name=name,
        )


def _refuse_change(stored: Pool | None, options: PoolOptions) -> None:
    """Refuse another kind of isolation for slots that exist: a lessee may be in one of them this moment."""
    if stored is None:
        return
    was = PoolOptions.from_mapping(stored.options)
    for key in ("isolation", "run_as", "history"):
        if getattr(was, key) != getattr(options, key):
            raise ConfigError(
                f"{stored.repo_name}: {key} is {getattr(was, key)} and stays so as long as the pool exists; "
                f"delete_pool first, or give {key}={getattr(was, key)}",
                key=key,
            )
