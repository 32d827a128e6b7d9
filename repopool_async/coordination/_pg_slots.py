"""The table of slots as a whole: listing, making and deleting its rows, and what befalls all slots of a host.

Who may, and what becomes of a slot that somebody holds, is not decided here.
"""

import uuid
from typing import Final

from repopool_async.coordination._pg_changes import no_slot
from repopool_async.coordination._pg_link import Link
from repopool_async.coordination._pg_rows import LOOK, Reader, Row, abandoning, encoded
from repopool_async.coordination._pg_ticket import no_pool
from repopool_async.coordination.base import HOST_UNREACHABLE
from repopool_async.exceptions import StoreError
from repopool_async.models import Slot

_NO_SUCH_POOL: Final = "23503"


class SlotTable:
    """See the `Coordinator` verbs of the same names."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._reader = Reader()

    async def list_slots(self, repo_name: str) -> list[Slot]:
        """Return a pool's slots by number."""
        rows = await self._link.database.fetch(
            f"list the slots of {repo_name}",
            "SELECT slot_id, record::text AS record FROM repopool.slot WHERE pool = $1 ORDER BY number",
            repo_name,
        )
        return [self._reader.read(row["slot_id"], row["record"]) for row in rows]

    async def get_slot(self, slot_id: str) -> Slot:
        """Return a slot's record."""
        row = await self._link.ask(
            f"read {slot_id}", "SELECT record::text AS record FROM repopool.slot WHERE slot_id = $1", slot_id
        )
        if row is None:
            raise no_slot(slot_id)
        return self._reader.read(slot_id, row["record"])

    async def orphans(self, repo_name: str) -> list[Slot]:
        """Return the slots that must be cleaned, and nobody is at that."""
        rows = await self._link.database.fetch(
            f"look for orphans of {repo_name}",
            LOOK + "WHERE s.pool = $1 AND s.state NOT IN ('error', 'parked')"
            " AND (s.state <> 'available' OR s.sealed_commit IS NULL) ORDER BY s.number",
            repo_name,
        )
        return [row.slot for row in map(Row.of, rows) if row.is_orphan]

    async def next_number(self, repo_name: str) -> int:
        """Return a number that no slot of the pool ever had."""
        row = await self._link.ask(
            f"number a slot of {repo_name}",
            "UPDATE repopool.pool SET next_slot_number = next_slot_number + 1 WHERE name = $1 "
            "RETURNING next_slot_number - 1 AS number",
            repo_name,
        )
        if row is None:
            raise no_pool(repo_name)
        return int(row["number"])

    async def insert(self, slot: Slot, hold_id: uuid.UUID) -> None:
        """Make a slot's row, held.

        Raises:
            ValueError: there is one already. PoolNotFoundError: there is no such pool.
        """
        try:
            row = await self._link.begin(
                f"make {slot.slot_id}",
                "INSERT INTO repopool.slot "
                "(slot_id, pool, number, host_id, labels, state, token, session_id, hold_id, record) "
                "VALUES ($1, $2, $3, $4, $5, 'cleaning', $6, $7, $8, $9::jsonb) ON CONFLICT (slot_id) DO NOTHING "
                "RETURNING slot_id",
                *(slot.slot_id, slot.repo_name, slot.number, slot.host_id, list(slot.labels), slot.token),
                *(self._link.session.session_id, hold_id, encoded(slot)),
                debt=abandoning(slot.repo_name, hold_id, is_new=True),
            )
        except StoreError as error:
            if getattr(error.__cause__, "sqlstate", None) == _NO_SUCH_POOL:
                raise no_pool(slot.repo_name) from error
            raise
        if row is None:
            raise ValueError(f"{slot.slot_id}: exists already; slot numbers are never used again")

    async def delete(self, slot_id: str, hold_id: uuid.UUID) -> bool:
        """Delete a held slot's row and logs; return whether they are gone."""
        row = await self._link.insist(
            f"delete {slot_id}",
            "WITH gone AS (DELETE FROM repopool.slot WHERE slot_id = $1 AND hold_id = $2 RETURNING slot_id), "
            "logs AS (DELETE FROM repopool.history h USING gone WHERE h.slot_id = gone.slot_id) "
            "SELECT EXISTS (SELECT FROM gone) OR $3 AS is_gone",
            *(slot_id, hold_id),
            tells_repetition=True,
        )
        self._reader.forget(slot_id)
        return bool(row["is_gone"])

    async def park_host(self, host_id: str) -> list[str]:
        """Take every slot of a host out of use."""
        rows = await self._link.database.fetch(
            f"park host {host_id}", "SELECT repopool.park_host($1, $2) AS slot_id", host_id, HOST_UNREACHABLE
        )
        return [row["slot_id"] for row in rows]

    async def unpark_host(self, host_id: str) -> list[str]:
        """Make orphans of a host's parked slots."""
        rows = await self._link.database.fetch(
            f"unpark host {host_id}", "SELECT repopool.unpark_host($1) AS slot_id", host_id
        )
        return [row["slot_id"] for row in rows]
