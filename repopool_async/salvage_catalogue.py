"""The saved work of several pools as one collection: listed, found by the beginning of an id, restored, deleted.

What saving takes, and where it lies, is `salvage`'s business, one pool at a time.
"""

import os
from collections.abc import Mapping, Sequence

import attrs

from repopool_async._git import lessee_environment
from repopool_async.exceptions import SalvageError, SalvageNotFoundError
from repopool_async.hosts.base import Host
from repopool_async.lease import LeasedSlot
from repopool_async.models import CommandResult, RestoredSalvage, SalvageRecord
from repopool_async.repo_pool import RepoPool
from repopool_async.salvage import Salvage


@attrs.frozen
class SalvageCatalogue:
    """What was saved of the leases of some pools; see `PoolManager` for what each verb promises.

    Attributes:
        host: where the clones are that saved work is restored into.
    """

    pools: Sequence[RepoPool]
    host: Host

    async def records(self) -> list[SalvageRecord]:
        """Return all of it, the oldest first."""
        records = [record for _, salvage in await self._all() for record in await salvage.records()]
        return sorted(records, key=lambda record: record.created_at)

    async def restore(self, salvage_id: str, slot: LeasedSlot, *, branch: str | None) -> RestoredSalvage:
        """Bring saved work back into a leased slot."""
        _, salvage, record = await self._find(salvage_id)
        is_clean = await slot.is_clean_working_tree()
        return await salvage.restore(record, slot.run, branch=branch, is_clean=is_clean)

    async def restore_into(
        self, salvage_id: str, directory: str | os.PathLike[str], *, branch: str | None
    ) -> RestoredSalvage:
        """Bring saved work into any clone of the repository as branches."""
        pool, salvage, record = await self._find(salvage_id)

        async def run(
            *argv: str, env: Mapping[str, str] | None = None, input: bytes | None = None, timeout: float | None = None
        ) -> CommandResult:
            environment = {**lessee_environment(), **(env or {})}
            where = os.path.abspath(directory)  # noqa: ASYNC240, PTH100
            done = await self.host.run(argv, env=environment, cwd=where, input=input, timeout=timeout)
            if done.exit_code != 0:
                words = done.stderr.decode(errors="replace").strip()
                raise SalvageError(f"{record.salvage_id[:8]}: cannot be restored: {words}", repo_name=pool.name)
            return done

        return await salvage.restore(record, run, branch=branch, is_clean=False)

    async def describe(self, salvage_id: str) -> tuple[SalvageRecord, str]:
        """Return saved work, and git's table of the files that differ from the lessee's HEAD."""
        _, salvage, record = await self._find(salvage_id)
        return record, await salvage.describe(record)

    async def delete(self, salvage_id: str) -> None:
        """Delete saved work for good."""
        _, salvage, record = await self._find(salvage_id)
        await salvage.delete(record.salvage_id)

    async def _all(self) -> list[tuple[RepoPool, Salvage]]:
        return [(pool, salvage) for pool in self.pools for salvage in await pool.salvages()]

    async def _find(self, salvage_id: str) -> tuple[RepoPool, Salvage, SalvageRecord]:
        failure: SalvageNotFoundError | None = None
        for pool, salvage in await self._all():
            try:
                return pool, salvage, await salvage.find(salvage_id)
            except SalvageNotFoundError as error:
                failure = error
        raise failure or SalvageNotFoundError(f"no saved work {salvage_id!r}: there are no pools")
