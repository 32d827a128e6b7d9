"""Watches over leases: those taken away, expired, forgotten, or too long; and takes one away where that is asked.

It looks when the janitor calls. Cleaning the slots that come free by it is the keeper's business.
"""

import logging
from typing import Final

from repopool_async._clock import boottime
from repopool_async.components import PoolContext
from repopool_async.coordination.records import is_expired
from repopool_async.models import Slot, SlotState
from repopool_async.open_leases import OpenLease, OpenLeases
from repopool_async.slot_keeper import SlotKeeper

_log: Final = logging.getLogger("repopool")

_RECOVERY_SECONDS: Final = 10.0
"""How often slots of managers that died elsewhere are looked for."""


class LeaseWatch:
    """Watches over the leases of one pool, foremost this process's."""

    def __init__(self, context: PoolContext, leases: OpenLeases, keeper: SlotKeeper) -> None:
        self._pool = context
        self._leases = leases
        self._keeper = keeper

    async def notice_lost(self) -> None:
        """Set `lost` of every lease of this process that was taken away."""
        standing = {opened.grant: opened.leased for opened in self._leases if not opened.leased.lost.is_set()}
        if not standing:
            return
        for grant in await self._pool.parts.coordinator.lost_among(list(standing)):
            leased = standing[grant]
            leased.lost.set()
            self._pool.changed.set()
            self._pool.parts.emit("lease.lost", {"slot_id": leased.slot_id, "lease_id": leased.lease_id})

    async def give_up_on(self, host_id: str) -> None:
        """End this process's leases on a host that does not answer to it; who can reach the host recovers the slots."""
        for opened in self._leases:
            leased = opened.leased
            is_ours = leased.host_id == host_id and not opened.grant.lease.is_detached
            if is_ours and not leased.lost.is_set():
                await self._pool.parts.coordinator.expire(leased.slot_id, leased.token)
        await self.notice_lost()

    async def reap_expired(self) -> None:
        """Recover the slots of detached leases that nobody renewed in time."""
        if self._pool.hosts.is_shared:  # by whose clock they expire, and who died elsewhere, the coordinator knows
            if boottime() - self._keeper.last_recovery >= _RECOVERY_SECONDS:
                await self._keeper.recover()
            return
        slots = await self._pool.parts.coordinator.list_slots(self._pool.name)
        if any(is_expired(slot, boottime()) for slot in slots):
            await self._keeper.recover()

    async def check_ages(self) -> None:
        """Tell of leases older than `leak_warning`, and end those older than `max_lease_seconds`."""
        for opened in self._leases:
            age = boottime() - opened.started
            warning, longest = self._pool.options.leak_warning, self._pool.options.max_lease_seconds
            if warning is not None and age >= warning and not opened.is_leak_told:
                opened.is_leak_told = True
                self._tell_leak(opened, age)
            if longest is not None and age >= longest and not opened.leased.lost.is_set():
                await self.expire(opened.grant.slot)

    def _tell_leak(self, opened: OpenLease, age: float) -> None:
        stack = opened.origin.formatted_stack()
        slot_id, lease_id = opened.leased.slot_id, opened.leased.lease_id
        ended = "; that task has ended" if opened.origin.has_ended else ""
        _log.warning(
            "%s: lease %s is %.0f s old; it was taken %s%s:\n%s", slot_id, lease_id, age, opened.origin, ended, stack
        )
        fields = {"slot_id": slot_id, "lease_id": lease_id, "seconds": age, "task": opened.origin.task_name}
        self._pool.parts.emit("lease.leak", {**fields, "where": opened.origin.where, "stack": stack})

    async def expire(self, slot: Slot) -> bool:
        """Take a lease away that has lasted too long, whoever has it, and recover its slot; False where it has ended.

        Its processes are ended before the slot is cleaned, and a lessee of this process finds `lost` set.
        """
        if slot.lease is None or not await self._pool.parts.coordinator.expire(slot.slot_id, slot.lease.token):
            return False
        await self.notice_lost()
        await self._keeper.recover()
        return True

    async def force_unlock(self, slot_id: str) -> Slot:
        """Take a slot away from whoever holds it, and have it recovered in the background.

        The holder's next step fails with `LeaseLostError`; here its `lost` is set at once, elsewhere within two
        seconds. What it left is saved unless `salvage` is `never`.
        """
        slot = await self._pool.parts.coordinator.force_unlock(slot_id)
        if slot.state is SlotState.CLEANING:
            await self._keeper.interrupt(slot_id)
        await self.notice_lost()
        await self._keeper.recover()
        self._pool.changed.set()
        return slot
