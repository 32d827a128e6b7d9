"""The leases of one pool that this process has given out and that have not ended, and who has a slot, in words.

Keeps them and makes what lessees get. Taking and giving back are `acquiring`'s and `releasing`'s business, watching
over them `lease_watch`'s.
"""

from collections.abc import Iterator, Mapping

import attrs

from repopool_async._clock import boottime
from repopool_async._git import GitRunner, lessee_environment
from repopool_async.components import HostParts, PoolContext
from repopool_async.coordination.base import Grant
from repopool_async.fencing import guard_of
from repopool_async.git_operations import GitOperations
from repopool_async.lease import LeasedSlot
from repopool_async.models import Lease, Slot, SlotState
from repopool_async.origins import Origin


@attrs.define(eq=False)
class OpenLease:
    """A lease of this process that has not ended."""

    grant: Grant
    leased: LeasedSlot
    started: float
    origin: Origin
    is_leak_told: bool = False


class OpenLeases:
    """The open leases of one pool. State changes never await."""

    def __init__(self, context: PoolContext) -> None:
        self._pool = context
        self._by_id: dict[str, OpenLease] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[OpenLease]:
        """Iterate over those that are open now, whatever becomes of them meanwhile."""
        return iter(list(self._by_id.values()))

    def open(self, grant: Grant, origin: Origin, inherited: Mapping[str, str] | None = None) -> OpenLease:
        """Make what the lessee of a granted slot gets.

        Args:
            inherited: what commands are given where they do not run on this machine.
        """

        async def renew(ttl: float | None) -> Lease:
            return await self._pool.parts.coordinator.renew(grant.slot.slot_id, grant.lease.token, ttl)

        parts = self._pool.parts.of(grant.slot)
        run_as = parts.run_as
        leased = LeasedSlot(
            grant.slot,
            grant.lease,
            host=parts.lessee_host if run_as is None else run_as.host_for(grant.slot),
            git=self._git(parts, grant.slot, inherited),
            renew=renew,
            is_here=parts.is_here,
            guard=guard_of(grant.slot),
            inherited=inherited if run_as is None else run_as.environment(grant.slot),
        )
        opened = OpenLease(grant, leased, boottime(), origin)
        self._by_id[grant.lease.lease_id] = opened
        return opened

    def _git(self, parts: HostParts, slot: Slot, inherited: Mapping[str, str] | None) -> GitOperations:
        if parts.run_as is not None:
            return parts.run_as.git_for(slot)
        if inherited is None:
            return parts.lessee_git
        return GitOperations(runner=GitRunner(parts.lessee_host, environment=lessee_environment(inherited)))

    def end(self, lease_id: str) -> OpenLease | None:
        """Make what the lessee has unusable and forget the lease; None where it has ended before."""
        opened = self._by_id.pop(lease_id, None)
        if opened is not None:
            opened.leased._end()  # noqa: SLF001 - the pool is the one caller
        return opened

    def of(self, slot: Slot) -> OpenLease | None:
        """Return a slot's lease, where it is one of this process."""
        return self._by_id.get(slot.lease.lease_id) if slot.lease is not None else None

    def bound(self) -> list[OpenLease]:
        """Return the leases that end with this process, as far as they still stand."""
        return [one for one in self if not one.grant.lease.is_detached and not one.leased.lost.is_set()]

    def describe_holder(self, slot: Slot) -> str:
        """Say in one line who has a slot, and of a lease of this process where it was taken."""
        line = describe_holder(slot)
        opened = self.of(slot)
        if opened is None or slot.state is not SlotState.ALLOCATED:
            return line
        return f"{line}, {boottime() - opened.started:.1f} s ago {opened.origin}"


def describe_holder(slot: Slot) -> str:
    """Say in one line who has a slot, or what else is with it."""
    lease = slot.lease
    if slot.state is not SlotState.ALLOCATED or lease is None:
        return f"{slot.slot_id}: {slot.state}" + (f" ({slot.error})" if slot.error else "")
    return (
        f"{slot.slot_id}: leased since {lease.acquired_at:%Y-%m-%d %H:%M:%S} UTC by pid {lease.owner.pid} "
        f"on {lease.owner.host}" + (f", {dict(lease.metadata)}" if lease.metadata else "")
    )
