"""What the processes of a pool share besides its slots: pool records, logs, locks by name, what is known of hosts.

Files of one machine keep them (`SlotStore`, `LockManager`), or a database for many machines does
(`coordination.postgres`). Where a slot's files lie is not among it: that is a matter of the host.
"""

import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import attrs

from repopool_async.models import AllocationRecord, CleanupResult, Pool, StaleLock


class PoolRecords(Protocol):
    """The records of pools and the logs of slots. Every verb raises `StoreError` where it cannot read or write."""

    async def save_pool(self, pool: Pool) -> None:
        """Write a pool's record."""

    async def load_pool(self, repo_name: str) -> Pool:
        """Return a pool's record.

        Raises:
            PoolNotFoundError: there is no such pool.
        """

    async def list_pools(self) -> list[str]:
        """Return the names of all pools, sorted."""

    async def delete_pool(self, repo_name: str) -> None:
        """Delete a pool's record and all records of its slots.

        Raises:
            PoolNotFoundError: there is no such pool.
        """

    async def append_cleanup(self, result: CleanupResult) -> None:
        """Add a line to its slot's clean-up log.

        Raises:
            SlotNotFoundError: there is no such slot.
        """

    async def history(self, slot_id: str, *, limit: int | None = None) -> list[AllocationRecord]:
        """Return a slot's allocation history, oldest first; of it the newest `limit` lines.

        Raises:
            SlotNotFoundError: there is no such slot.
        """

    async def cleanup_log(self, slot_id: str, *, limit: int | None = None) -> list[CleanupResult]:
        """Return a slot's clean-up log; as `history`."""


class NamedLock(Protocol):
    """A lock that this process holds, until it is released or the process ends."""

    @property
    def was_left(self) -> bool:
        """Whether the last holder ended without releasing it, or said so, and so perhaps amid something."""

    def leave(self) -> None:
        """Have the next holder find `was_left`, though this one will release it."""

    async def release(self) -> None:
        """Give the lock up; a second call does nothing."""


class Locks(Protocol):
    """Exclusive locks by name, among all processes that share the state."""

    def acquire_slot_lock(self, slot_id: str, timeout: float | None = ...) -> AbstractAsyncContextManager[NamedLock]:
        """Hold a lock for the block; cancelled while waiting, nothing is held.

        Args:
            slot_id: the lock's name. timeout: seconds to wait at most, 0 for one attempt, None for any time.

        Raises:
            LockTimeoutError: somebody else held it all that time.
        """

    async def try_acquire(self, slot_id: str) -> NamedLock | None:
        """Take a lock where it is free, else return None. Cancelled, it is not held."""

    async def is_locked(self, slot_id: str) -> bool:
        """Return whether anybody, this process included, holds a lock."""

    async def cleanup_stale_locks(
        self, *, older_than_hours: float | None = None, spared_prefix: str | tuple[str, ...] = ()
    ) -> list[StaleLock]:
        """Forget, and return, whose locks ended with them; `was_left` no longer tells of those.

        Args:
            spared_prefix: locks whose names begin so (with any of several) keep what they know, because their next
                holder must.
        """


@attrs.frozen
class Place:
    """A directory on a machine as a database knows it.

    Attributes:
        name: of the host. place: the id that the directory bears. described: for people, by whoever named it first.
    """

    name: str
    place: uuid.UUID
    described: str


class SharedHosts(Protocol):
    """What managers on several machines agree on about hosts. Every verb raises `StoreError` where it cannot."""

    @property
    def where(self) -> str:
        """Where that is kept, for people, without what is secret."""

    async def identity(self) -> str:
        """Return which database this is: 32 hexadecimal digits, its own for ever."""

    async def records(self) -> dict[str, str]:
        """Return what is recorded, by host."""

    async def change(self, name: str, decide: Callable[[str | None], str | None]) -> bool:
        """Replace what is recorded of a host by what is decided from it; returns whether that is something else.

        Args:
            decide: must be quick: everybody else waits. None stands for nothing.
        """

    async def settle(self, name: str, place: uuid.UUID, described: str) -> Place | None:
        """Have a name mean a directory from now on, for every manager; None where it does.

        Returns:
            What stands against it: the directory that the name means already, or the name of this one.
        """

    async def forget(self, name: str) -> None:
        """Have a name mean no directory any more."""
