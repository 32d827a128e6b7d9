"""What the managers of one database agree on about hosts: their conditions, and which directory each name means.

A condition is a text here. What it means, and what lies in such a directory, is not known.
"""

import uuid
from collections.abc import Callable
from typing import Final

from repopool_async.coordination._pg_connections import Connection
from repopool_async.coordination._pg_link import Link
from repopool_async.exceptions import StoreError
from repopool_async.shared_state import Place

_SETTLE: Final = """
    INSERT INTO repopool.host AS h (name, place, described) VALUES ($1, $2, $3)
    ON CONFLICT (name) DO UPDATE SET place = excluded.place, described = excluded.described WHERE h.place IS NULL
"""
_UNIQUE: Final = "23505"


class PostgresHosts:
    """See `shared_state.SharedHosts`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def identity(self) -> str:
        """See `SharedHosts.identity`."""
        row = await self._link.ask("ask which database it is", "SELECT identity FROM repopool.identity")
        return str(row["identity"].hex)

    @property
    def where(self) -> str:
        """See `SharedHosts.where`."""
        return self._link.database.where

    async def records(self) -> dict[str, str]:
        """See `SharedHosts.records`."""
        rows = await self._link.database.fetch(
            "look at the hosts",
            "SELECT name, record::text AS record FROM repopool.host WHERE record IS NOT NULL ORDER BY name",
        )
        return {row["name"]: row["record"] for row in rows}

    async def change(self, name: str, decide: Callable[[str | None], str | None]) -> bool:
        """See `SharedHosts.change`; the row is locked meanwhile."""

        async def work(connection: Connection) -> bool:
            async with connection.transaction():
                await connection.execute("INSERT INTO repopool.host (name) VALUES ($1) ON CONFLICT DO NOTHING", name)
                before = await connection.fetchval(
                    "SELECT record::text FROM repopool.host WHERE name = $1 FOR UPDATE", name
                )
                after = decide(before)
                if after == before:
                    return False
                await connection.execute("UPDATE repopool.host SET record = $2::jsonb WHERE name = $1", name, after)
            return True

        return await self._link.database.call(f"change host {name}", work)

    async def settle(self, name: str, place: uuid.UUID, described: str) -> Place | None:
        """See `SharedHosts.settle`."""
        try:
            await self._link.ask(f"settle where host {name} is", _SETTLE, name, place, described)
        except StoreError as error:
            if getattr(error.__cause__, "sqlstate", None) != _UNIQUE:
                raise
        found = await self._link.database.fetch(
            f"ask where host {name} is",
            "SELECT name, place, described FROM repopool.host WHERE place IS NOT NULL AND (name = $1 OR place = $2)",
            *(name, place),
        )
        others = [Place(row["name"], row["place"], row["described"]) for row in found]
        return next((one for one in others if (one.name, one.place) != (name, place)), None)

    async def forget(self, name: str) -> None:
        """See `SharedHosts.forget`."""
        await self._link.database.execute(
            f"forget where host {name} is",
            "UPDATE repopool.host SET place = NULL, described = NULL WHERE name = $1",
            name,
        )
