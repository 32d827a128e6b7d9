"""Makes and unmakes a pool's slots, on the hosts where they belong.

A slot that is being made is held from before its record exists until it is AVAILABLE; interrupted, nothing of it is
left. Which slots there shall be, and what becomes of them in between, is `slot_keeper`'s business.
"""

from collections import Counter
from contextlib import suppress

import attrs

from repopool_async._aio import shielded
from repopool_async._clock import now
from repopool_async.components import PoolContext
from repopool_async.coordination.base import Hold
from repopool_async.disk_full import passing_told
from repopool_async.exceptions import HostUnreachableError, LeaseLostError, StoreError
from repopool_async.hosts.base import Discard
from repopool_async.models import LOCAL_HOST, Slot, make_slot_id
from repopool_async.placement import spread
from repopool_async.slot_allocator import available, cleaning
from repopool_async.workspaces.base import Checkout


@attrs.frozen
class Site:
    """Where a slot is going to be: its number, and the host."""

    number: int
    host_id: str


class SlotMaker:
    """Makes the slots of one pool."""

    def __init__(self, context: PoolContext) -> None:
        self._pool = context

    async def sites(self, count: int) -> list[Site]:
        """Say where the pool's next slots are to be made, and reserve their numbers.

        Raises:
            SlotAllocationError: its hosts cannot hold so many, or none of them can be used now. ConfigError: none of
            those that can runs its lessees.
        """
        coordinator = self._pool.parts.coordinator
        hosts = await self._hosts_of(count)
        return [Site(await coordinator.next_slot_number(self._pool.name), host_id) for host_id in hosts]

    async def _hosts_of(self, count: int) -> list[str]:
        registry = self._pool.hosts
        hosts = await self._pool.fit_among(self._pool.parts.hosts.choose())
        if hosts == [LOCAL_HOST] and registry.specs[LOCAL_HOST].capacity is None:
            return hosts * count
        slots = await self._pool.parts.coordinator.list_slots(self._pool.name)
        return spread(
            count,
            hosts,
            capacities={name: registry.specs[name].capacity for name in hosts},
            present=Counter(slot.host_id for slot in slots),
            in_use=await self._in_use(),
        )

    async def _in_use(self) -> Counter[str]:
        parts = self._pool.parts
        names = await parts.records.list_pools()
        used: Counter[str] = Counter()
        for name in names:
            used.update(slot.host_id for slot in await parts.coordinator.list_slots(name))
        return used

    async def make(self, site: Site) -> Slot:
        """Make a slot and return it AVAILABLE.

        Raises:
            GitOperationError, CleanupError, OSError, HostUnreachableError: it could not be made; nothing of it is left.
        """
        parts = self._pool.parts.hosts.on(site.host_id)
        slot_id = make_slot_id(self._pool.name, site.number)
        slot = Slot(
            slot_id=slot_id,
            repo_name=self._pool.name,
            repo_url=self._pool.record.repo_url,
            path=parts.layout.tree_path(slot_id),
            created_at=now(),
            host_id=site.host_id,
            labels=self._pool.hosts.require(site.host_id).labels,
        )
        hold = await self._pool.parts.coordinator.create(slot)
        try:
            async with self._pool.at_work(slot):
                await self._pool.require_fit(site.host_id)
                with passing_told(self._pool.name):
                    result = await parts.cleaner.provision(slot, await standing(self._pool, slot))
            assert result.seal is not None
            made = await self._pool.parts.coordinator.finish(hold, available(slot, result.seal, now()))
        except BaseException:
            await shielded(self.unmake(hold), name=f"unmake-{slot_id}")
            raise
        self._pool.parts.emit("slot.added", {"slot_id": slot_id, "host_id": site.host_id})
        self._pool.changed.set()
        return made

    async def unmake(self, hold: Hold) -> None:
        """Delete a held slot: its files on its host, its record, what is kept for it elsewhere.

        What lies on a host that does not answer is deleted when it does, by whoever sweeps there.
        """
        slot, coordinator = hold.slot, self._pool.parts.coordinator
        try:
            if slot.host_id != self._pool.parts.recorded_on:  # there the files lie beside the record, and go with it
                slot = await coordinator.update(hold, cleaning(slot))
                await self._delete_files(slot)
            await coordinator.delete(hold)
        except LeaseLostError:
            return  # finished in the instant in which the maker was cancelled: the slot exists and is good
        except (StoreError, OSError):
            await coordinator.abandon_hold(hold)  # where it cannot be deleted, recovery completes it
            raise
        if not self._pool.hosts.is_out(slot.host_id):
            with suppress(HostUnreachableError):
                await self._pool.parts.of(slot).cleaner.discard(slot)

    async def _delete_files(self, slot: Slot) -> None:
        try:
            async with self._pool.hosts.expected_to_answer(slot.host_id):
                parts = self._pool.parts.of(slot)
                directory = parts.layout.slot_directory(slot.slot_id)
                await parts.host.apply([Discard(directory, parts.layout.trash_path(slot.repo_name))])
        except HostUnreachableError as error:
            self._pool.parts.emit("slot.files_left", {"slot_id": slot.slot_id, "reason": str(error)})


async def standing(pool: PoolContext, slot: Slot) -> Checkout:
    """Say what a slot shall show while nobody has it; its last branch's newest commit where warming is on."""
    mirror = pool.parts.of(slot).mirror
    snapshot = await mirror.snapshot()
    branch = slot.last_branch
    if branch is not None and branch not in snapshot.branches:
        branch = None
    if branch is not None and (pool.options.warmup_enabled or slot.lease is None):
        return Checkout(commit=snapshot.branches[branch], branch=branch)
    commit = (slot.lease.commit if slot.lease else None) or (slot.seal.commit if slot.seal else None)
    if commit is not None:
        return Checkout(commit=commit, branch=branch)
    resolved = await mirror.resolve(pool.options.default_ref)
    return Checkout(commit=resolved.commit, branch=resolved.branch)
