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
from repopool_async.models import LOCAL_HOST, CommandResult, RestoredSalvage, SalvageRecord
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
        records = [record for found in await self._all() for record in await found.salvage.records()]
        return sorted(records, key=lambda record: record.created_at)

    async def restore(self, salvage_id: str, slot: LeasedSlot, *, branch: str | None) -> RestoredSalvage:
        """Bring saved work back into a leased slot."""
        found, record = await self._find(salvage_id)
        is_clean = await slot.is_clean_working_tree()
        is_here = found.host_id == slot.host_id and found.pool.options.run_as is None
        return await found.salvage.restore(record, slot.run, branch=branch, is_clean=is_clean, is_here=is_here)

    async def restore_into(
        self, salvage_id: str, directory: str | os.PathLike[str], *, branch: str | None
    ) -> RestoredSalvage:
        """Bring saved work into any clone of the repository as branches."""
        found, record = await self._find(salvage_id)

        async def run(
            *argv: str, env: Mapping[str, str] | None = None, input: bytes | None = None, timeout: float | None = None
        ) -> CommandResult:
            environment = {**lessee_environment(), **(env or {})}
            where = os.path.abspath(directory)  # noqa: ASYNC240, PTH100
            done = await self.host.run(argv, env=environment, cwd=where, input=input, timeout=timeout)
            if done.exit_code != 0:
                words = done.stderr.decode(errors="replace").strip()
                raise SalvageError(f"{record.salvage_id[:8]}: cannot be restored: {words}", repo_name=found.pool.name)
            return done

        is_here = found.host_id == LOCAL_HOST
        return await found.salvage.restore(record, run, branch=branch, is_clean=False, is_here=is_here)

    async def describe(self, salvage_id: str) -> tuple[SalvageRecord, str]:
        """Return saved work, and git's table of the files that differ from the lessee's HEAD."""
        found, record = await self._find(salvage_id)
        return record, await found.salvage.describe(record)

    async def delete(self, salvage_id: str) -> None:
        """Delete saved work for good."""
        found, record = await self._find(salvage_id)
        await found.salvage.delete(record.salvage_id)

    async def _all(self) -> list["_Place"]:
        return [_Place(pool, *item) for pool in self.pools for item in (await pool.salvages()).items()]

    async def _find(self, salvage_id: str) -> tuple["_Place", SalvageRecord]:
        failure: SalvageNotFoundError | None = None
        for place in await self._all():
            try:
                return place, await place.salvage.find(salvage_id)
            except SalvageNotFoundError as error:
                failure = error
        raise failure or SalvageNotFoundError(f"no saved work {salvage_id!r}: there are no pools")


@attrs.frozen
class _Place:
    """Where saved work of one pool lies."""

    pool: RepoPool
    host_id: str
    salvage: Salvage
