"""What can be asked of the machines of a manager: list, add, drain, park, resume, remove. Part of `PoolManager`.

What a condition means for claims is `host_registry`'s business, what becomes of slots that of pools and coordinator.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from repopool_async.assembly import Shared
from repopool_async.config_hosts import HostSpec
from repopool_async.exceptions import ConfigError, SlotAllocationError, SlotInUseError, SlotNotFoundError
from repopool_async.host_states import HostCondition, HostState
from repopool_async.models import LOCAL_HOST, HostStatus, Slot, SlotState
from repopool_async.open_leases import describe_holder
from repopool_async.pool_registry import PoolRegistry


class HostVerbs:
    """The verbs of `PoolManager` about hosts."""

    _shared: Shared
    _registry: PoolRegistry

    def _require_open(self) -> None:
        raise NotImplementedError

    async def list_hosts(self) -> list[HostStatus]:
        """Return all hosts: in what condition they are and how many slots they have."""
        self._require_open()
        hosts = self._shared.hosts
        await hosts.refresh()
        if hosts.is_shared:  # what they are to this manager it may be about to see
            await hosts.settled()
        slots = [slot for one in await self._slots_by_pool() for slot in one]
        return [_status(spec, hosts.state(name), slots) for name, spec in hosts.specs.items()]

    async def add_host(
        self,
        name: str,
        address: str | None = None,
        *,
        workspaces_dir: str,
        labels: Sequence[str] = (),
        capacity: int | None = None,
        host_key: str | None = None,
        mirror_from: str | None = None,
    ) -> HostSpec:
        """Add a host, for every process of this directory, until it is removed; it need not answer yet.

        Args are those of a host in `pools.yaml`. Pools that choose its name or one of its labels make their next slots
        there.

        Raises:
            ConfigError: something is refused, or there is a host of that name.
        """
        self._require_open()
        spec = HostSpec(
            name,
            address=address,
            workspaces_dir=workspaces_dir,
            labels=tuple(labels),
            capacity=capacity,
            host_key=host_key,
            mirror_from=mirror_from,
        )
        await self._shared.hosts.add(spec)
        return spec

    async def drain_host(self, name: str, reason: str = "") -> None:
        """Give no more leases on a host and make no slots there; leases under way go on.

        Raises:
            HostNotFoundError: there is none of that name.
        """
        self._require_open()
        await self._shared.hosts.change(name, HostCondition.DRAINING, reason)

    async def park_host(self, name: str, reason: str = "") -> None:
        """Take a host out of use at once: leases there end as lost; nothing is done there until `resume_host`.

        Raises:
            HostNotFoundError: there is none of that name. ConfigError: it is the manager's own machine.
        """
        self._require_open()
        if name == LOCAL_HOST:
            raise ConfigError(f"{LOCAL_HOST} is the manager's own machine and cannot be parked; drain it", key="hosts")
        await self._shared.hosts.change(name, HostCondition.PARKED, reason)

    async def resume_host(self, name: str) -> None:
        """Use a host again that was drained or parked; the slots of a parked one are cleaned first.

        Raises:
            HostNotFoundError: there is none of that name.
        """
        self._require_open()
        await self._shared.hosts.change(name, HostCondition.ACTIVE)

    async def remove_host(self, name: str, *, force: bool = False) -> None:
        """Remove a host's slots, make them anew on the pools' other hosts, and forget the host.

        One of the configuration stays DRAINING until it is gone from there.

        Args:
            force: also slots that are leased, whose leases are lost, and those of a host that does not answer, whose
                files stay there.

        Raises:
            HostNotFoundError: there is none of that name. SlotInUseError: a slot is leased; the host is DRAINING then.
            ConfigError: it is the manager's own machine.
        """
        self._require_open()
        hosts = self._shared.hosts
        if name == LOCAL_HOST:
            raise ConfigError(f"{LOCAL_HOST} is the manager's own machine and cannot be removed; drain it", key="hosts")
        if not hosts.is_out(name) or not force:
            await hosts.change(name, HostCondition.DRAINING, "being removed")
        for slots in await self._slots_by_pool():
            await self._empty(name, [slot for slot in slots if slot.host_id == name], force=force)
        if name in self._shared.config.hosts:
            await hosts.change(name, HostCondition.DRAINING, "removed; take it out of the configuration, or resume it")
            await hosts.forget_place(name)
        else:
            await hosts.forget(name)

    async def _slots_by_pool(self) -> list[list[Slot]]:
        coordinator = self._shared.coordinator
        return [await coordinator.list_slots(name) for name in await self._registry.names()]

    async def _empty(self, host_id: str, slots: list[Slot], *, force: bool) -> None:
        """Remove one pool's slots on a host."""
        leased = [slot for slot in slots if slot.state is SlotState.ALLOCATED]
        if leased and not force:
            raise SlotInUseError(
                f"{leased[0].slot_id}: is leased, so its host {host_id} is drained and not removed yet; "
                f"{describe_holder(leased[0])}",
                slot_id=leased[0].slot_id,
            )
        pool = await self._registry.find(slots[0].repo_name) if slots else None
        if pool is None:
            return
        for slot in leased:
            await pool.watch.force_unlock(slot.slot_id)
        await self._shared.coordinator.unpark_host(host_id)
        is_out = self._shared.hosts.is_out(host_id)

        async def remove() -> None:
            for slot in slots:
                with suppress(SlotNotFoundError):  # another process was faster
                    await pool.keeper.remove_slot(slot.slot_id, saves_work=not is_out)

        try:
            await self._registry.replace_slots(pool, remove)
        except SlotAllocationError as error:
            self._shared.bus.emit("pool.short", {"repo_name": pool.name, "reason": str(error)})


def _status(spec: HostSpec, state: HostState, slots: list[Slot]) -> HostStatus:
    states = Counter(slot.state for slot in slots if slot.host_id == spec.name)
    return HostStatus(
        host_id=spec.name,
        address=spec.reached_at,
        workspaces_dir=spec.workspaces_dir,
        labels=spec.labels,
        capacity=spec.capacity,
        condition=str(state.condition),
        reason=state.reason,
        total_slots=states.total(),
        available=states[SlotState.AVAILABLE],
        allocated=states[SlotState.ALLOCATED],
    )
