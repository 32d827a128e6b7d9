"""What the processes of a pool share besides its slots: pool records, logs, and locks by name.

Files of one machine keep them (`SlotStore`, `LockManager`), or a database for many machines does
(`coordination.postgres`). Where a slot's files lie is not among it: that is a matter of the host.
"""

from contextlib import AbstractAsyncContextManager
from typing import Protocol

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
