"""Ends leases: the lessee's proxy dies, the record says so, and the held slot goes to the keeper, which cleans it.

Leases that somebody else takes away are `lease_watch`'s business.
"""

import asyncio
import logging
from typing import Final

import attrs

from repopool_async._aio import shielded
from repopool_async._clock import boottime
from repopool_async.components import PoolContext
from repopool_async.coordination.base import Grant
from repopool_async.disk_full import is_passing
from repopool_async.exceptions import (
    CleanupError,
    CoordinatorUnavailableError,
    LeaseLostError,
    PoolManagerError,
    SlotInUseError,
    SlotNotFoundError,
    StoreError,
    UnkillableError,
)
from repopool_async.fencing import UntoldLeaseError
from repopool_async.lease import LeasedSlot
from repopool_async.models import LeaseEnd, Slot, SlotState
from repopool_async.open_leases import OpenLease, OpenLeases, describe_holder
from repopool_async.slot_keeper import SlotKeeper

_log: Final = logging.getLogger("repopool")

_TAKE_BACK_SECONDS: Final = 5.0
"""How long somebody who was interrupted may be kept because it cannot be noted that a lease came to nothing."""


class Releaser:
    """Gives back the slots of one pool."""

    def __init__(self, context: PoolContext, leases: OpenLeases, keeper: SlotKeeper) -> None:
        self._pool = context
        self._leases = leases
        self._keeper = keeper
        self._giving = 0

    @property
    def is_giving_back(self) -> bool:
        """Whether a slot is on its way from a lease to the keeper, where neither knows of it."""
        return self._giving > 0

    async def give_back(self, leased: LeasedSlot, *, inline: bool = True) -> None:
        """See `RepoPool.give_back`."""
        self._giving += 1  # closing waits: between lease and cleaning the slot is in neither list
        try:
            await shielded(self._give_back(leased, inline=inline), name=f"return-{leased.slot_id}")
        finally:
            self._giving -= 1
            self._pool.changed.set()

    async def _give_back(self, leased: LeasedSlot, *, inline: bool) -> None:
        opened = self._leases.end(leased.lease_id)
        if opened is not None:
            slot = await self._begin_return(opened.grant)
            self._pool.parts.allocator.record_release(self._pool.name, boottime() - opened.started)
            self._pool.parts.emit("slot.released", {"slot_id": leased.slot_id, "lease_id": leased.lease_id})
            if self._pool.options.clean_on_release:
                self._keeper.clean_later(opened.grant, slot)
            else:
                self._keeper.clean_when_wanted(opened.grant, slot)
            self._pool.changed.set()
        task = self._keeper.returning.get(leased.slot_id)
        if inline and task is not None:
            await asyncio.wait([task])

    async def _begin_return(self, grant: Grant) -> Slot:
        try:
            return await self._pool.parts.coordinator.begin_return(grant)
        except SlotNotFoundError as error:
            slot_id = grant.slot.slot_id
            raise LeaseLostError(
                f"{slot_id}: was taken away and deleted while leased", slot_id=slot_id, repo_name=self._pool.name
            ) from error
        except StoreError:
            # It cannot be written that the lease ended: without its lock the slot is an orphan, and recovered.
            await self._pool.parts.coordinator.abandon_hold(grant)
            raise

    async def release(self, slot_id: str, *, token: int | None) -> None:
        """See `RepoPool.release`."""
        for opened in self._leases:
            if opened.leased.slot_id == slot_id and token in (None, opened.leased.token):
                await self.give_back(opened.leased)
                return
        slot = await self._pool.parts.coordinator.get_slot(slot_id)
        if token is not None and token != slot.token:
            raise LeaseLostError(
                f"{slot_id}: token {token} is not the present lease's; the lease has ended or was taken away",
                slot_id=slot_id,
                repo_name=self._pool.name,
            )
        if (
            slot.state is SlotState.ALLOCATED
            and token is not None
            and slot.lease is not None
            and slot.lease.is_detached
        ):
            await shielded(self._release_detached(slot_id, token), name=f"return-{slot_id}")
        elif slot.state is SlotState.ALLOCATED:
            is_detached = slot.lease is not None and slot.lease.is_detached
            who = "who knows its token" if is_detached else "the process that took the lease"
            raise SlotInUseError(
                f"{slot_id}: only {who} may end the lease; {describe_holder(slot)}",
                slot_id=slot_id,
                repo_name=self._pool.name,
            )

    async def _release_detached(self, slot_id: str, token: int) -> None:
        hold = await self._pool.parts.coordinator.release_detached(slot_id, token)
        hold.entered_token = token  # by its lessee, before anybody knew it
        lease_id = hold.slot.lease.lease_id if hold.slot.lease else None
        self._pool.parts.emit("slot.released", {"slot_id": slot_id, "lease_id": lease_id})
        self._keeper.clean_later(hold, hold.slot)
        self._pool.changed.set()
        task = self._keeper.returning.get(slot_id)
        if task is not None:
            await asyncio.wait([task])

    async def give_back_after(self, opened: OpenLease, error: BaseException) -> None:
        """End a lease whose block failed; a failure to do so becomes a note of the block's error."""
        try:
            await self.give_back(opened.leased, inline=self._pool.options.cleanup == "inline")
        except PoolManagerError as failure:
            error.add_note(f"while giving back {opened.leased.slot_id}: {failure}")

    async def take_back(self, grant: Grant, error: BaseException) -> None:
        """Undo a claim that did not become a lease: quarantine the slot where it is to blame, else clean it.

        Where a lease before it was lost, its work is saved as a dead owner's is, under the claim's own lease.
        """
        if isinstance(error, LeaseLostError):
            return
        is_untold = isinstance(error, UntoldLeaseError)
        if not is_untold and isinstance(error, CleanupError | UnkillableError) and not is_passing(error):
            await self._keeper.quarantine(grant, grant.slot, error)
            return
        try:
            async with asyncio.timeout(_TAKE_BACK_SECONDS):
                slot = await self._begin_return(grant)
        except (TimeoutError, CoordinatorUnavailableError) as failure:
            _log.warning("%s: left to recovery: %s", grant.slot.slot_id, str(failure) or "no answer in time")
            await self._pool.parts.coordinator.abandon_hold(grant)
            return
        (self._keeper.recover_later if is_untold else self._keeper.clean_later)(grant, slot)

    async def cut_off(self, opened: OpenLease) -> None:
        """End a lease without cleaning its slot, which is left to recovery; a detached lease goes on."""
        self._leases.end(opened.grant.lease.lease_id)
        if opened.grant.lease.is_detached:
            return
        opened.leased.lost.set()
        await shielded(self._abandon(opened.grant), name=f"abandon-{opened.grant.slot.slot_id}")

    async def _abandon(self, grant: Grant) -> None:
        """Let go of a leased slot, and say so for whoever recovers it."""
        try:
            await self._pool.parts.coordinator.update(grant, attrs.evolve(grant.slot, unsaved=LeaseEnd.CLOSED))
        except LeaseLostError:
            _log.debug("%s: was taken away before", grant.slot.slot_id)
        except (PoolManagerError, OSError) as error:
            _log.warning("%s: that its pool was closed could not be noted: %s", grant.slot.slot_id, error)
        await self._pool.parts.coordinator.abandon_hold(grant)
