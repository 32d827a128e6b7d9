"""Pool records, allocation history and clean-up log in the database: what `SlotStore` keeps on files.

Where a slot's files lie is not told here, nor are they touched: deleting a pool deletes what the database knows of it.
"""

from typing import Any

import attrs

from repopool_async.coordination._pg_changes import no_slot
from repopool_async.coordination._pg_link import Link
from repopool_async.coordination._pg_rows import decoded, encoded
from repopool_async.coordination._pg_ticket import no_pool
from repopool_async.models import AllocationRecord, CleanupResult, Pool


class PostgresRecords:
    """See `shared_state.PoolRecords`; every verb may also raise `CoordinatorUnavailableError`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def save_pool(self, pool: Pool) -> None:
        """See `PoolRecords.save_pool`. The next slot's number never goes back."""
        await self._link.database.execute(
            f"save pool {pool.repo_name}",
            "INSERT INTO repopool.pool AS p (name, record, next_slot_number) VALUES ($1, $2::jsonb, $3) "
            "ON CONFLICT (name) DO UPDATE SET record = excluded.record, "
            "next_slot_number = greatest(p.next_slot_number, excluded.next_slot_number)",
            *(pool.repo_name, encoded(pool), pool.next_slot_number),
        )

    async def load_pool(self, repo_name: str) -> Pool:
        """See `PoolRecords.load_pool`."""
        row = await self._link.ask(
            f"load pool {repo_name}",
            "SELECT record::text AS record, next_slot_number FROM repopool.pool WHERE name = $1",
            repo_name,
        )
        if row is None:
            raise no_pool(repo_name)
        pool: Pool = decoded(Pool, row["record"])
        return attrs.evolve(pool, next_slot_number=row["next_slot_number"])

    async def list_pools(self) -> list[str]:
        """See `PoolRecords.list_pools`."""
        rows = await self._link.database.fetch("list pools", 'SELECT name FROM repopool.pool ORDER BY name COLLATE "C"')
        return [row["name"] for row in rows]

    async def delete_pool(self, repo_name: str) -> None:
        """See `PoolRecords.delete_pool`."""
        row = await self._link.ask(
            f"delete pool {repo_name}",
            "WITH logs AS (DELETE FROM repopool.history h USING repopool.slot s "
            "WHERE s.pool = $1 AND h.slot_id = s.slot_id) "
            "DELETE FROM repopool.pool WHERE name = $1 RETURNING name",
            repo_name,
        )
        if row is None:
            raise no_pool(repo_name)

    async def append_cleanup(self, result: CleanupResult) -> None:
        """See `PoolRecords.append_cleanup`."""
        row = await self._link.ask(
            f"log the cleaning of {result.slot_id}",
            "INSERT INTO repopool.history (slot_id, kind, record) "
            "SELECT slot_id, 'cleanup', $2::jsonb FROM repopool.slot WHERE slot_id = $1 RETURNING slot_id",
            *(result.slot_id, encoded(result)),
        )
        if row is None:
            raise no_slot(result.slot_id)

    async def history(self, slot_id: str, *, limit: int | None = None) -> list[AllocationRecord]:
        """See `PoolRecords.history`. At least the last 2,000 lines are kept."""
        return await self._log(slot_id, "allocation", AllocationRecord, limit)

    async def cleanup_log(self, slot_id: str, *, limit: int | None = None) -> list[CleanupResult]:
        """See `PoolRecords.cleanup_log`. At least the last 2,000 lines are kept."""
        return await self._log(slot_id, "cleanup", CleanupResult, limit)

    async def _log(self, slot_id: str, kind: str, record: type[Any], limit: int | None) -> list[Any]:
        rows = await self._link.database.fetch(
            f"read the log of {slot_id}",
            "SELECT (CASE WHEN h.event IS NULL THEN h.record "
            "ELSE h.record - '{acquired_at,acquired_boottime,expires_boottime,is_detached}'::text[] "
            "|| jsonb_build_object('event', h.event, 'slot_id', s.slot_id, 'at', repopool.in_iso(h.at), "
            "'wait_seconds', h.wait_seconds, 'held_seconds', h.held_seconds) END)::text AS record "
            "FROM repopool.slot s "
            "LEFT JOIN LATERAL (SELECT * FROM repopool.history h WHERE h.slot_id = s.slot_id AND h.kind = $2 "
            "ORDER BY h.id DESC LIMIT $3) h ON true WHERE s.slot_id = $1 ORDER BY h.id",
            *(slot_id, kind, limit),
        )
        if not rows:
            raise no_slot(slot_id)
        return [decoded(record, row["record"]) for row in rows if row["record"] is not None]
