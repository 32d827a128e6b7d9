"""The schema `repopool` and how it comes to be the one that this version needs.

Each migration is a file of plain SQL, applied once, in order, in one transaction with the note that it was. One process
migrates at a time. A schema is never changed by opening a pool, only by `repopool db migrate`.
"""

import importlib.resources
import re
from typing import Any, Final

import attrs

from repopool_async.coordination._pg_connections import Connection
from repopool_async.coordination._pg_database import Database
from repopool_async.exceptions import StoreError

OLDEST_SERVER: Final = 14
_LOCK: Final = 1919250031
_FILE: Final = re.compile(r"(?P<number>[0-9]{4})(?:_[a-z0-9_]+)?\.sql")

_TABLE: Final = """
    CREATE SCHEMA IF NOT EXISTS repopool;
    CREATE TABLE IF NOT EXISTS repopool.migration (
        number integer PRIMARY KEY, name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
"""


@attrs.frozen
class Migration:
    """One step.

    Attributes:
        number: steps are applied in this order. name: of its file.
    """

    number: int
    name: str
    sql: str = attrs.field(repr=False)


@attrs.frozen
class SchemaStatus:
    """What of the schema is there.

    Attributes:
        version: the last migration applied, 0 for none. wanted: the one that this version of the library needs.
        server: the version of PostgreSQL. is_standby: whether it can only be read.
    """

    version: int
    wanted: int
    server: str
    is_standby: bool


def migrations() -> list[Migration]:
    """Return all that this version knows, in order."""
    folder = importlib.resources.files("repopool_async.coordination").joinpath("migrations")
    found = [(match, entry) for entry in folder.iterdir() if (match := _FILE.fullmatch(entry.name)) is not None]
    steps = [Migration(int(match["number"]), entry.name, entry.read_text(encoding="utf-8")) for match, entry in found]
    return sorted(steps, key=lambda step: step.number)


async def status(database: Database) -> SchemaStatus:
    """Look at a database.

    Raises:
        CoordinatorUnavailableError, StoreError: it cannot be read.
    """
    return await database.call("read the schema's version", _status)


async def migrate(database: Database) -> list[str]:
    """Apply what is missing and return the names of the migrations applied.

    Raises:
        StoreError: the schema is newer than this version knows, or a migration failed, of which then nothing is left.
        CoordinatorUnavailableError: the database cannot be used.
    """

    async def work(connection: Connection) -> list[str]:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            present = await _status(connection)
            _refuse_server(database.where, present)
            _refuse_newer(database.where, present)
            await connection.execute(_TABLE)
            missing = [step for step in migrations() if step.number > present.version]
            for step in missing:
                await connection.execute(step.sql)
                await connection.execute(
                    "INSERT INTO repopool.migration (number, name) VALUES ($1, $2)", step.number, step.name
                )
        return [step.name for step in missing]

    return await database.call("migrate the schema", work)


async def require_current(database: Database) -> None:
    """Refuse a database that this version cannot work with, naming the remedy.

    Raises:
        StoreError: its schema is older or newer, or the server is too old or a standby.
    """
    present = await status(database)
    _refuse_server(database.where, present)
    _refuse_newer(database.where, present)
    if present.version < present.wanted:
        found = f"is at version {present.version}" if present.version else "is missing"
        raise StoreError(
            f"the database {database.where}: schema repopool {found}, this version of repopool needs {present.wanted}; "
            f"run `repopool db migrate`"
        )


async def _status(connection: Connection) -> SchemaStatus:
    # Not to_regclass: it looks nothing up anew, and would not see what was made while the lock was waited for.
    row: Any = await connection.fetchrow(
        "SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = 'repopool' AND c.relname = 'migration') AS has_table, "
        "pg_is_in_recovery() AS is_standby, current_setting('server_version') AS server"
    )
    version = 0
    if row["has_table"]:
        version = await connection.fetchval("SELECT coalesce(max(number), 0) FROM repopool.migration")
    return SchemaStatus(version, migrations()[-1].number, row["server"], row["is_standby"])


def _refuse_server(where: str, present: SchemaStatus) -> None:
    if present.is_standby:
        raise StoreError(
            f"the database {where} is a standby (pg_is_in_recovery) and must not be written to; name the primary"
        )
    if int(re.split(r"\D", present.server, maxsplit=1)[0]) < OLDEST_SERVER:
        raise StoreError(
            f"the database {where} is PostgreSQL {present.server}; repopool needs {OLDEST_SERVER} or newer"
        )


def _refuse_newer(where: str, present: SchemaStatus) -> None:
    if present.version > present.wanted:
        raise StoreError(
            f"the database {where}: schema repopool is at version {present.version}, this version of repopool knows "
            f"{present.wanted}; install the newer repopool that migrated it"
        )
