"""Being alone in a bare repository of the pool's, across processes, with nothing of a git that was killed in the way.

What is done there meanwhile is the business of whoever holds the lock: the mirror's, or that of saved work.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from repopool_async._git import WORK_MARK
from repopool_async.hosts.base import Host, RemoveFile
from repopool_async.shared_state import Locks


class RepositoryLock:
    """The lock of one bare repository.

    Args:
        path: where it lies. locks, lock_id: what excludes other processes, and its name there.
    """

    def __init__(self, path: str, *, host: Host, locks: Locks, lock_id: str) -> None:
        self._path = path
        self._host = host
        self._locks = locks
        self._lock_id = lock_id

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold the lock for the block, after whatever a holder that died or failed left is out of the way.

        Raises:
            OSError: that could not be removed.
        """
        async with self._locks.acquire_slot_lock(self._lock_id, timeout=None) as held:
            try:
                if held.was_left:
                    await self._clear_up()
                yield
            except BaseException:
                # Our git may have been killed: cancelled, or because it took too long.
                held.leave()
                raise

    async def _clear_up(self) -> None:
        """End the git of a holder that died, and remove the locks that a killed git leaves; we hold the lock."""
        await self._host.end_processes(mark=f"{WORK_MARK}={self._path}", tree=None)
        stale = [f"{self._path}/{name}.lock" for name in ("packed-refs", "HEAD", "shallow", "config")]
        await self._host.apply([RemoveFile(path) for path in [*stale, *await self._locks_below(f"{self._path}/refs")]])

    async def _locks_below(self, directory: str) -> list[str]:
        found: list[str] = []
        for name in await self._host.list_directory(directory):
            path = f"{directory}/{name}"
            found += [path] if name.endswith(".lock") else await self._locks_below(path)
        return found
