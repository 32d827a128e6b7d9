"""What a database and its driver cost by themselves: a claim and a release as two bare statements on a bare table.

No sessions, records, history or waiters: the floor that `benchmarks.claims` measures the coordinator against.
"""

import uuid
from types import TracebackType
from typing import Any, Final, Self

import asyncpg

_MAKE: Final = """
    CREATE TABLE {table} (
        slot_id bigint PRIMARY KEY, pool text NOT NULL, state text NOT NULL DEFAULT 'free',
        fence bigint NOT NULL DEFAULT 0, session_id uuid, lease_id text, leased_at timestamptz
    ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
    CREATE INDEX ON {table} (pool);
    INSERT INTO {table} (slot_id, pool) SELECT number, '{pool}' FROM generate_series(1, {num_slots}) number;
"""
_CLAIM: Final = """
    WITH pick AS MATERIALIZED (
        SELECT slot_id FROM {table} WHERE pool = $1 AND state = 'free' LIMIT 1 FOR UPDATE SKIP LOCKED)
    UPDATE {table} s SET state = 'leased', fence = fence + 1, session_id = $2, lease_id = $3,
        leased_at = clock_timestamp()
    FROM pick WHERE s.slot_id = pick.slot_id RETURNING s.*
"""
_RELEASE: Final = """
    UPDATE {table} SET state = 'free', session_id = NULL, lease_id = NULL, leased_at = NULL
    WHERE slot_id = $1 AND fence = $2 AND session_id = $3 AND state = 'leased' RETURNING slot_id
"""


class BareTable:
    """A pool of slots in a table that is there for the block.

    Args:
        dsn: of a database in which the role may make tables. max_connections: at once.
    """

    def __init__(self, dsn: str, *, num_slots: int, max_connections: int) -> None:
        self._dsn = dsn
        self._num_slots = num_slots
        self._max_connections = max_connections
        self._table: Final = f"repopool.bare_{uuid.uuid4().hex[:8]}"
        self._session_id: Final = uuid.uuid4()
        self._claim: Final = _CLAIM.format(table=self._table)
        self._release: Final = _RELEASE.format(table=self._table)
        self._pool: Any = None

    async def __aenter__(self) -> Self:
        self._pool = await asyncpg.create_pool(self._dsn, min_size=0, max_size=self._max_connections, reset=_nothing)
        await self._pool.execute(_MAKE.format(table=self._table, pool="p", num_slots=self._num_slots))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._pool.execute(f"DROP TABLE {self._table}")
        await self._pool.close()

    async def claim(self, lease_id: str) -> Any:
        """Lease a slot and return its row."""
        return await self._pool.fetchrow(self._claim, "p", self._session_id, lease_id)

    async def release(self, row: Any) -> None:
        """Give a slot back."""
        done = await self._pool.fetchrow(self._release, row["slot_id"], row["fence"], self._session_id)
        assert done is not None


async def _nothing(_connection: object) -> None:
    """Reset a connection: none is in a state, and the coordinator resets none either."""
