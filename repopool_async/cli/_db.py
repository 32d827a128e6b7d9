"""The verb `db`: the schema of the database that machines share, brought up to date or looked at."""

import os
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

from repopool_async.cli._common import configuration
from repopool_async.cli._signals import Handler, Interruption
from repopool_async.config_coordination import DSN_VARIABLE
from repopool_async.coordination._pg_database import Database
from repopool_async.coordination._pg_migrations import SchemaStatus, migrate, status
from repopool_async.exceptions import ConfigError

NOT_CURRENT: Final = 1

_MIGRATION_SECONDS: Final = 3600.0


async def db(arguments: Namespace, _: Interruption) -> int:
    """Do what the action says."""
    return await _ACTIONS[arguments.action](_dsn(arguments))


async def _migrate(dsn: str) -> int:
    async with _opened(dsn) as database:
        applied = await migrate(database)
        present = await status(database)
    for name in applied:
        print(f"applied {name}")
    print(f"{database.where}: {_in_words(present)}")
    return 0


async def _status(dsn: str) -> int:
    async with _opened(dsn) as database:
        present = await status(database)
    print(f"{database.where}: {_in_words(present)}")
    return 0 if present.version == present.wanted and not present.is_standby else NOT_CURRENT


@asynccontextmanager
async def _opened(dsn: str) -> AsyncIterator[Database]:
    database = Database(dsn, max_connections=1, call_seconds=_MIGRATION_SECONDS)
    try:
        await database.open()
        yield database
    finally:
        await database.close()


def _in_words(present: SchemaStatus) -> str:
    if present.version == present.wanted:
        schema = f"schema version {present.version}, which is the one wanted"
    elif present.version > present.wanted:
        schema = f"schema version {present.version}; this repopool knows {present.wanted}: install a newer one"
    else:
        schema = f"schema version {present.version or 'none'}, wanted is {present.wanted}: run `repopool db migrate`"
    return f"PostgreSQL {present.server}{', a standby' if present.is_standby else ''}, {schema}"


def _dsn(arguments: Namespace) -> str:
    """Return the DSN that is given, of the configuration file or the environment; `ConfigError` where there is none."""
    configured = configuration(arguments).coordination if arguments.config is not None else None
    given = arguments.dsn or (configured and configured.dsn) or os.environ.get(DSN_VARIABLE)
    if not given:
        raise ConfigError(
            f"which database? give --dsn or a --config with coordination, or set {DSN_VARIABLE}, which other users of "
            f"this machine cannot read"
        )
    return str(given)


_ACTIONS: Final[Mapping[str, Callable[[str], Awaitable[int]]]] = {"migrate": _migrate, "status": _status}
HANDLERS: Final[Mapping[str, Handler]] = {"db": db}
