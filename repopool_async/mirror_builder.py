"""Building a mirror, or its successor: complete in a temporary directory, then renamed into place.

Whoever calls holds the mirror's lock. Why it is built, and what of a damaged one can be saved, is not decided here.
"""

import logging
import os
import secrets
from typing import Final

import anyio

from repopool_async._git import WORK_MARK
from repopool_async.exceptions import GitOperationError
from repopool_async.hosts.base import Discard, Host, MakeDirectory, Rename
from repopool_async.mirror_git import MirrorGit
from repopool_async.mirror_repair import Carried, carry_over
from repopool_async.mirror_snapshots import MirrorSnapshots
from repopool_async.mirror_sources import MirrorSource

_log: Final = logging.getLogger("repopool")


class MirrorBuilder:
    """Builds one mirror.

    Args:
        trash: where a replaced one goes.
    """

    def __init__(
        self, host: Host, git: MirrorGit, snapshots: MirrorSnapshots, source: MirrorSource, *, trash: str
    ) -> None:
        self._host = host
        self._git = git
        self._snapshots = snapshots
        self._source = source
        self._trash = trash
        self._path = git.path

    async def build(self) -> None:
        """Clone the remotes and put the result in the mirror's place.

        Afterwards the new mirror is there or, on an error or a cancellation, whatever was there before.

        Raises:
            GitOperationError: the remote could not be cloned. EmptyRepositoryError: it has no commits.
        """
        pool_directory = self._path.rpartition("/")[0]
        temporary = f"{self._path}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        await self._host.apply([MakeDirectory(pool_directory)])
        # A dead builder's git outlives it, and would go on writing while what it made is removed.
        await self._host.end_processes(mark=f"{WORK_MARK}={self._path}", tree=None)
        await self._sweep_abandoned(pool_directory)
        built = False
        try:
            async with self._source.opened(None) as spawned:
                await self._git.clone(temporary)
            await self._carry_over(temporary)
            await self._snapshots.take(temporary, spawned=spawned)
            await self._host.apply(
                [Discard(self._path, self._trash), Rename(temporary, self._path)],
            )
            built = True
        finally:
            if not built:
                with anyio.CancelScope(shield=True):
                    await self._host.remove_tree(temporary)

    async def _carry_over(self, new: str) -> None:
        """Save what leases stand on and the remote no longer has; whatever is wrong there, the new mirror counts."""
        if await self._host.stat(self._path) is None:
            return
        try:
            carried = await carry_over(self._git.runner, self._host, old=self._path, new=new)
        except (GitOperationError, OSError) as error:
            _log.warning("%s: nothing could be saved from the old mirror: %s", self._git.repo_name, error)
            return
        if carried != Carried(saved=0, lost=0):
            _log.warning("%s: only the old mirror had some commits: %s", self._git.repo_name, carried)

    async def _sweep_abandoned(self, pool_directory: str) -> None:
        """Remove what a killed builder left; we hold the lock, so no builder is alive."""
        prefix = self._path.rpartition("/")[2] + ".tmp-"
        for name in await self._host.list_directory(pool_directory):
            if name.startswith(prefix):
                await self._host.remove_tree(f"{pool_directory}/{name}")
