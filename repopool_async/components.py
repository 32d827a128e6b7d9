"""What a pool works with: the parts it has once, those it has on every host, and what is in force for it.

Records, and which hosts can be used by what they say. Making the parts is `assembly`'s business.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import attrs

from repopool_async._aio import together
from repopool_async.config import PoolOptions
from repopool_async.coordination.base import Coordinator
from repopool_async.exceptions import ConfigError, HostUnreachableError
from repopool_async.fitness import Fitness
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
        run_as: the user that lessees run as, where it is another. fitness: whether they can, there.
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
    fitness: Fitness | None = None


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

    # -- which hosts can be used ---------------------------------------------------------------------------------

    async def require_fit(self, host_id: str, *, is_asked: bool = False) -> None:
        """See that a host can run the pool's lessees as it is wanted, before one can run there.

        Args:
            is_asked: ask it now, even where it could not a moment ago.

        Raises:
            ConfigError: it cannot; from then on it is not used for the pool.
            HostUnreachableError, OSError: it cannot be asked.
        """
        fitness = self.parts.hosts.on(host_id).fitness
        if fitness is not None:
            await fitness.require(is_asked=is_asked)

    async def fit_among(self, host_ids: Iterable[str], *, is_asked: bool = False) -> list[str]:
        """Return those of some hosts on which slots can be made now, having asked whom nobody asked yet.

        Args:
            is_asked: ask also those that could not a moment ago, which is done otherwise only where there is no other.

        Raises:
            ConfigError: none of those that answer can run the pool's lessees; or one of them is somebody else's.
        """
        wanted = [host_id for host_id in host_ids if host_id not in self.hosts.unusable]
        await together(*[partial(self._ask_fit, host_id, is_asked=is_asked) for host_id in wanted])
        fit = [host_id for host_id in wanted if host_id not in self.unusable]
        refusals = [error for host_id in wanted if (error := self.refusal(host_id)) is not None]
        if fit or not refusals:
            return fit
        if is_asked:
            raise refusals[0].with_traceback(None)
        return await self.fit_among(wanted, is_asked=True)

    async def _ask_fit(self, host_id: str, *, is_asked: bool) -> None:
        if self.parts.hosts.on(host_id).fitness is None:
            return
        try:
            async with self.hosts.expected_to_answer(host_id):
                await self.hosts.admit(host_id)  # which makes the directory that the user has to get at
                await self.require_fit(host_id, is_asked=is_asked)
        except (HostUnreachableError, ConfigError) as error:  # it is suspect or unfit now, and passed over
            if isinstance(error, ConfigError) and self.refusal(host_id) is None:
                raise

    def refusal(self, host_id: str) -> ConfigError | None:
        """Return why a host cannot be used for this pool, whatever others have there; None where nothing is known."""
        return next((error for name, error in self._refusals() if name == host_id), None)

    def _refusals(self) -> Iterator[tuple[str, ConfigError]]:
        for parts in self.parts.hosts.made():
            if parts.fitness is not None and (error := parts.fitness.refusal) is not None:
                yield parts.host_id, error

    @property
    def unusable(self) -> frozenset[str]:
        """Hosts on which no lease is given and no slot made now."""
        return self.hosts.unusable.union(name for name, _ in self._refusals())

    def is_out(self, host_id: str) -> bool:
        """Whether no slot of the pool can be cleaned on a host now."""
        return self.hosts.is_out(host_id) or self.refusal(host_id) is not None

    def is_closed(self, host_id: str) -> bool:
        """Whether no lease is given on a host until somebody, or it itself, changes that."""
        return self.hosts.is_closed(host_id) or self.refusal(host_id) is not None

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
            HostUnreachableError: none can be used now. ConfigError: those that answer cannot run the pool's lessees.
        """
        chosen = self.parts.hosts.choose()
        for host_id in chosen:
            if not self.is_out(host_id):
                return self.parts.hosts.on(host_id)
        for host_id in chosen:
            if (refusal := self.refusal(host_id)) is not None:
                raise refusal.with_traceback(None)
        raise HostUnreachableError(
            f"{self.name}: none of its hosts can be used now ({', '.join(chosen)}); `repopool hosts list` says why",
            has_not_started=True,
        )
