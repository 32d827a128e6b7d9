"""One repository's life: its leases, its options, its end.

Follow one lease from `RepoPool.lease` downwards: `acquiring` takes a slot; `releasing` ends the lease and hands the
slot to the keeper, which has it cleaned. What a slot is made of, how it is cleaned and where its state lives are the
business of the floors below; names of pools, configuration and closing that of the manager above.
"""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from enum import Enum
from functools import partial
from typing import Any, Final

import attrs

from repopool_async._aio import Deadline, together
from repopool_async.acquiring import Acquirer
from repopool_async.components import Components, PoolContext
from repopool_async.config import PoolOptions
from repopool_async.exceptions import PoolInUseError, PoolTimeoutError, SlotNotFoundError
from repopool_async.host_registry import HostRegistry
from repopool_async.lease import LeasedSlot
from repopool_async.lease_watch import LeaseWatch
from repopool_async.mirror import Mirror
from repopool_async.models import Lease, Pool, PoolSummary, Slot, SlotState
from repopool_async.open_leases import OpenLeases, describe_holder
from repopool_async.releasing import Releaser
from repopool_async.salvage import Salvage
from repopool_async.slot_keeper import SlotKeeper

_log: Final = logging.getLogger("repopool")


class Unset(Enum):
    """Tells a time-out that was not given from None, which means no limit."""

    TIMEOUT = "the configured acquire_timeout"


class RepoPool:
    """The slots of one repository. Made by `PoolManager`; see `PoolManager` for the verbs that name a pool."""

    def __init__(self, pool: Pool, options: PoolOptions, parts: Components, hosts: HostRegistry) -> None:
        self._context = PoolContext(pool, options, parts, hosts)
        self._leases = OpenLeases(self._context)
        self.keeper: Final = SlotKeeper(self._context)
        self.watch: Final = LeaseWatch(self._context, self._leases, self.keeper)
        self._releaser = Releaser(self._context, self._leases, self.keeper)
        self._acquirer = Acquirer(self._context, self._leases, self.keeper, self._releaser)
        self._former: list[Mirror] = []

    @property
    def record(self) -> Pool:
        """What is stored of the pool."""
        return self._context.record

    @property
    def options(self) -> PoolOptions:
        """What is in force."""
        return self._context.options

    @property
    def _parts(self) -> Components:
        return self._context.parts

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.record.repo_name

    async def salvages(self) -> dict[str, Salvage]:
        """Return what lessees that ended badly left unpushed, by host."""
        ids = await self.keeper.chores.host_ids()
        reached = [host_id for host_id in ids if not self._context.hosts.is_out(host_id)]
        return {host_id: self._parts.hosts.on(host_id).salvage for host_id in reached}

    def __repr__(self) -> str:
        return (
            f"<RepoPool {self.name!r} [slots: {self.record.num_slots} | leased: {len(self._leases)} here, "
            f"cleaning: {len(self.keeper.returning)} | waiting: {self._acquirer.waiting}]>"
        )

    # -- leasing -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(
        self,
        *,
        ref: str | None = None,
        timeout: float | Unset | None = Unset.TIMEOUT,
        new_branch: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> AsyncIterator[LeasedSlot]:
        """Hold a clean slot at a ref while the block runs.

        Args:
            ref: a branch, tag, commit id or full name; the pool's `default_ref`, else the remote's, where missing.
            timeout: seconds for queueing, fetch and check-out together; the configured `acquire_timeout` where missing,
                None for no limit, 0 for one try.
            new_branch: make this local branch at the commit and check it out.
            metadata: anything JSON can hold; it shows in status and history.
            priority: the higher goes first.

        Raises:
            PoolTimeoutError: the time was not enough. TooManyRequestsError: `max_waiting` others wait already.
            UnknownRefError, RefError: there is no such ref. GitOperationError: the remote could not be asked.
            SlotAllocationError: every slot is quarantined. LeaseLostError: on leaving, where it had been taken away.

        Leaving the block ends the lease at once; the slot is cleaned in the background unless the pool says
        `cleanup: inline`. An error in the block never prevents that and is never hidden by it. Cancelled anywhere, the
        slot goes back.
        """
        seconds = self.options.acquire_timeout if timeout is Unset.TIMEOUT else timeout
        opened = await self._acquirer.acquire(
            ref=ref, timeout=seconds, new_branch=new_branch, metadata=metadata or {}, priority=priority
        )
        try:
            yield opened.leased
        except BaseException as error:
            await self._releaser.give_back_after(opened, error)
            raise
        else:
            await self.give_back(opened.leased, inline=self.options.cleanup == "inline")

    async def allocate(
        self,
        *,
        ref: str | None = None,
        timeout: float | None = 0,
        metadata: Mapping[str, Any] | None = None,
        ttl: float | None = None,
    ) -> LeasedSlot | None:
        """Take a slot and keep it until `give_back`; None where none became free in time.

        Args:
            ttl: seconds until the lease expires unless renewed; it then outlives this process, and whoever knows slot
                id and token may renew and release it. None for a lease that lives with this process.

        A slot that is being cleaned right now is waited for, whatever the timeout. Raises as `lease` does, but for the
        time-out.
        """
        try:
            opened = await self._acquirer.acquire(
                ref=ref,
                timeout=timeout,
                new_branch=None,
                metadata=metadata or {},
                priority=0,
                waits_for_cleaning=True,
                ttl=ttl,
            )
        except PoolTimeoutError as error:
            if error.phase == "queue":
                return None
            raise
        return opened.leased

    async def give_back(self, leased: LeasedSlot, *, inline: bool = True) -> None:
        """End a lease of this process; a second call does nothing.

        Args:
            inline: return only once the slot is clean and AVAILABLE (or quarantined).

        Raises:
            LeaseLostError: it had been taken away; nothing of the slot was touched.
        """
        await self._releaser.give_back(leased, inline=inline)

    async def release(self, slot_id: str, *, token: int | None) -> None:
        """End the lease of a slot by id and clean it; where it is not leased (any more), do nothing.

        Raises:
            LeaseLostError: the token is not the present lease's.
            SlotInUseError: the lease is another living process's, which alone may end it.
        """
        await self._releaser.release(slot_id, token=token)

    async def renew(self, slot_id: str, token: int, ttl: float | None) -> Lease:
        """Move a detached lease's expiry to `ttl` seconds from now; None only confirms the lease.

        Raises:
            LeaseLostError: the token is not the present lease's, or that has expired. ValueError: the ttl is none.
        """
        return await self._parts.coordinator.renew(slot_id, token, ttl)

    # -- telling and changing --------------------------------------------------------------------------------------

    def use(self, parts: Components) -> None:
        """Work with other components from now on; leases and cleanings under way keep what they began with."""
        self._former += [parts.mirror for parts in self._parts.hosts.made()]
        self._context.parts = parts

    def retire(self) -> None:
        """Give no more leases, to nobody who waits either; leases under way go on, and slots stay."""
        self._acquirer.retire()

    def reinstate(self) -> None:
        """Give leases again after `retire`."""
        self._acquirer.reinstate()

    def reconfigure(self, record: Pool, options: PoolOptions) -> None:
        """Take on other options; leases under way keep what they began with."""
        self._context.record = record
        self._context.options = options
        for parts in self._parts.hosts.made():
            parts.cleaner.rebuild_always = options.rebuild_always

    def can_be_reached(self, slot: Slot) -> bool:
        """Return whether anything can be done on a slot's host now."""
        return not self._context.is_out(slot.host_id)

    async def hosts_changed(self) -> None:
        """Have leases on hosts that are out of use end, and slots of those that are back be cleaned."""
        await self.watch.notice_lost()
        await self.keeper.recover()
        self._context.changed.set()

    async def list_slots(self) -> list[Slot]:
        """Return the records of the pool's slots, by number (1.5)."""
        return await self._parts.coordinator.list_slots(self.name)

    async def summary(self) -> PoolSummary:
        """Return the pool at a glance (5.5)."""
        slots = await self._parts.coordinator.list_slots(self.name)
        states = [slot.state for slot in slots]
        return PoolSummary(
            repo_name=self.name,
            repo_url=self.record.repo_url,
            total_slots=len(slots),
            available=states.count(SlotState.AVAILABLE),
            allocated=states.count(SlotState.ALLOCATED),
            cleaning=states.count(SlotState.CLEANING),
            error=states.count(SlotState.ERROR),
            waiting=self._acquirer.waiting,
            allocation_count=sum(slot.allocation_count for slot in slots),
            total_allocated_seconds=sum(slot.total_allocated_seconds for slot in slots),
            metrics=self._parts.allocator.get_allocation_metrics(self.name),
        )

    def stats(self) -> dict[str, int]:
        """Return counts of this process, without any I/O."""
        return {
            "leased": len(self._leases),
            "returning": len(self.keeper.returning),
            "waiting": self._acquirer.waiting,
            "fetches": sum(mirror.fetch_count for mirror in self._mirrors()),
        }

    # -- ending --------------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Fail all waiters at once and let nobody queue any more."""
        self._acquirer.refuse()

    async def close(self, deadline: Deadline) -> None:
        """Give holders and cleanings until the deadline, then leave the rest to recovery.

        Afterwards nothing of this pool runs and no lock is held; slots that were not finished are CLEANING or
        ALLOCATED without a lock, which whoever opens the directory next recovers. Detached leases go on.
        """
        self.refuse()
        await self._acquirer.interrupt()
        try:
            async with deadline.limit():
                while self._leases.bound() or self._releaser.is_giving_back or self.keeper.returning:
                    self._context.changed.clear()
                    await self._context.changed.wait() if not self.keeper.returning else await self.keeper.wait_clean()
        except TimeoutError:
            _log.warning(
                "%s: closed with %d leases open and %d cleanings unfinished; recovery will finish them",
                self.name,
                len(self._leases.bound()),
                len(self.keeper.returning),
            )
        await self.keeper.stop()
        await together(*[partial(self._releaser.cut_off, opened) for opened in self._leases])
        for mirror in self._mirrors():
            await mirror.aclose()

    def _mirrors(self) -> list[Mirror]:
        return [*self._former, *(parts.mirror for parts in self._parts.hosts.made())]

    async def delete(self, *, force: bool) -> None:
        """Delete every slot and the mirror.

        Who dies or fails amid it leaves the pool unfinished, so that it is made whole again until it is deleted.

        Raises:
            PoolInUseError: a slot is leased and `force` is not given; nothing has been deleted. PoolNotFoundError:
            somebody else has deleted it.
        """
        slots = await self._parts.coordinator.list_slots(self.name)
        leased = [slot for slot in slots if slot.state is SlotState.ALLOCATED]
        if leased and not force:
            raise PoolInUseError(
                f"{self.name}: is in use; {describe_holder(leased[0])}; return the slot, or delete with force=True",
                repo_name=self.name,
            )
        self.refuse()
        stored = await self._parts.records.load_pool(self.name)
        await self._parts.records.save_pool(attrs.evolve(stored, is_complete=False))
        for slot in leased:
            await self._parts.coordinator.force_unlock(slot.slot_id)
        await self.watch.notice_lost()
        await self.close(Deadline.after(self.options.cleanup_timeout if not force else 0))
        for slot in slots:
            with suppress(SlotNotFoundError):  # another process was faster
                await self.keeper.remove_slot(slot.slot_id, saves_work=False)
        await self.erase()

    async def erase(self) -> None:
        """Delete the pool's directories, of which nothing is used any more.

        Raises:
            PoolNotFoundError: there is none.
        """
        await self.keeper.chores.erase()
        await self._parts.records.delete_pool(self.name)
