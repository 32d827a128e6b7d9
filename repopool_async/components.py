"""What a pool works with: the parts it has once, those it has on every host, and what is in force for it.

Records only. Making the parts is `assembly`'s business.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs

from repopool_async.config import PoolOptions
from repopool_async.coordination.base import Coordinator
from repopool_async.exceptions import HostUnreachableError
from repopool_async.git_operations import GitOperations
from repopool_async.host_registry import HostRegistry
from repopool_async.hosts.base import Host
from repopool_async.mirror import Mirror
from repopool_async.models import Pool, Slot
from repopool_async.run_as import RunAs
from repopool_async.salvage import Salvage
from repopool_async.shared_state import PoolRecords
from repopool_async.slot_allocator import SlotAllocator
from repopool_async.slot_cleaner import SlotCleaner
from repopool_async.store_layout import StoreLayout


@attrs.frozen
class HostParts:
    """What a pool has on one host.

    Attributes:
        is_here: whether it is the manager's machine, so that its paths mean something to lessees.
        lessee_host: where lessees' commands run; they must not use up what bounds the pool's own git.
        lessee_git: the git verbs as a lessee would run them.
        layout: where things lie on the host. salvage: the work saved there.
        cleaning: bounds how many slots are cleaned or made there at once.
        run_as: the user that lessees run as, where it is another.
    """

    host_id: str
    is_here: bool
    host: Host
    lessee_host: Host
    lessee_git: GitOperations
    layout: StoreLayout
    mirror: Mirror
    cleaner: SlotCleaner
    salvage: Salvage
    cleaning: asyncio.Semaphore
    run_as: RunAs | None = None


class PoolHosts:
    """The parts of a pool by host, made when they are first needed.

    Args:
        choose: returns the hosts on which new slots are made, in the pool's order. make: makes the parts for a host, or
            raises `HostUnreachableError` where there is no such host (any more).
    """

    def __init__(self, choose: Callable[[], Sequence[str]], make: Callable[[str], HostParts]) -> None:
        self.choose: Final = choose
        self._make = make
        self._made: dict[str, HostParts] = {}

    def on(self, host_id: str) -> HostParts:
        """Return the parts on a host."""
        parts = self._made.get(host_id)
        return parts if parts is not None else self._made.setdefault(host_id, self._make(host_id))

    def made(self) -> list[HostParts]:
        """Return the parts that were needed so far."""
        return list(self._made.values())


@attrs.frozen
class Components:
    """What a pool works with; made by the manager, shared where it can be.

    Attributes:
        recorded_on: the host in whose directories of slots their records lie too; None where there is none.
        emit: tells an event, a kind and fields.
    """

    records: PoolRecords
    coordinator: Coordinator
    allocator: SlotAllocator
    hosts: PoolHosts
    recorded_on: str | None
    emit: Callable[[str, Mapping[str, Any]], None]

    def of(self, slot: Slot) -> HostParts:
        """Return the parts on a slot's host."""
        return self.hosts.on(slot.host_id)


@attrs.define(eq=False)
class PoolContext:
    """What is in force for one pool; all who work for the pool look it up here whenever it matters.

    Attributes:
        record, options, parts: replaced while the pool is open; leases and cleanings go on with the new ones.
        hosts: those of the manager.
        changed: set whenever a slot may have become free, or waiting may have become pointless.
    """

    record: Pool
    options: PoolOptions
    parts: Components
    hosts: HostRegistry
    changed: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.record.repo_name

    @asynccontextmanager
    async def at_work(self, slot: Slot) -> AsyncIterator[None]:
        """Wait for the turn to clean or make a slot on its host; the block ends where the host stops answering.

        Raises:
            HostUnreachableError: it did.
        """
        async with self.hosts.expected_to_answer(slot.host_id), self.parts.of(slot).cleaning:
            yield

    @property
    def reference(self) -> HostParts:
        """The parts on the first of the pool's hosts that can be used, whose mirror says what refs mean.

        Raises:
            HostUnreachableError: none can be used now.
        """
        chosen = self.parts.hosts.choose()
        for host_id in chosen:
            if not self.hosts.is_out(host_id):
                return self.parts.hosts.on(host_id)
        raise HostUnreachableError(
            f"{self.name}: none of its hosts can be used now ({', '.join(chosen)}); `repopool hosts list` says why",
            has_not_started=True,
        )
