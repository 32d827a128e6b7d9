"""From whatever asyncpg raises to this library's errors; the one place where that is decided.

There are two kinds: the database cannot be used now (`CoordinatorUnavailableError`: try again, nothing is known of what
was under way), and it will not do this, however often it is asked (`StoreError`, with the remedy). What asyncpg raises
when a connection dies under it is of no one family (asyncpg issues 784 and 1069), so everything unknown is of the first
kind. Nothing here retries, and no message contains more of a DSN than host and database.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit

from repopool_async.exceptions import CoordinatorUnavailableError, PoolManagerError, StoreError

SESSION_EXPIRED: Final = "RP001"

_PASSING_CLASSES: Final = ("08", "40", "53", "57", "58", "XX")
_PASSING: Final = ("25006", "55P03")
_NO_SCHEMA: Final = ("3F000", "42P01", "42883", "42703")
_NO_DSN: Final = ("ClientConfigurationError", "ValueError")
_REMEDIES: Final = {
    "3D000": "create the database, then run `repopool db migrate`",
    "42501": "grant the role what `repopool db migrate` made: usage of schema repopool and all its tables and routines",
    "22P05": "texts that it is to keep (metadata, refs) must not contain NUL characters",
    "22P02": "texts that it is to keep (metadata, refs) must be Unicode",
    "53100": "free some space on its disk",
}


class SessionExpiredError(Exception):
    """The database took this process for dead."""


@contextmanager
def translated(where: str, what: str) -> Iterator[None]:
    """Turn everything that is raised in the block, but for this library's own errors, into one of its errors.

    Args:
        where: the database, as `shown` names it. what: was being done.

    Raises:
        CoordinatorUnavailableError, StoreError: as above. SessionExpiredError: our session has ended.
    """
    try:
        yield
    except (PoolManagerError, SessionExpiredError):
        raise
    except Exception as error:
        raise _translate(error, where, what) from error


def _translate(error: Exception, where: str, what: str) -> Exception:
    sqlstate = getattr(error, "sqlstate", None)
    if sqlstate == SESSION_EXPIRED:
        return SessionExpiredError(str(error))
    said = str(error).split("\n", maxsplit=1)[0] or type(error).__name__
    if isinstance(error, TimeoutError):
        said = "no answer in time"
    if type(error).__name__ in _NO_DSN:
        return StoreError(f"cannot {what}: that is no DSN of PostgreSQL; one is postgresql://user@host:5432/database")
    if type(error).__name__ == "TargetServerAttributeNotMatched":
        return CoordinatorUnavailableError(
            f"cannot {what}: the database {where} is a standby (pg_is_in_recovery) and must not be written to; name "
            f"the primary, or all servers, in the DSN"
        )
    if not isinstance(sqlstate, str) and not isinstance(error, ValueError):
        return _unavailable(where, what, said)
    if isinstance(sqlstate, str) and (sqlstate.startswith(_PASSING_CLASSES) or sqlstate in _PASSING):
        return _unavailable(where, what, said)
    if sqlstate in _NO_SCHEMA:
        remedy = "its schema is missing or of another version: run `repopool db migrate`"
    elif isinstance(sqlstate, str) and sqlstate.startswith("28"):
        remedy = "check the user and password that the DSN names, and pg_hba.conf"
    else:
        remedy = _REMEDIES.get(sqlstate or "", "check the DSN, and the database's log")
    return StoreError(f"cannot {what}: the database {where} says: {said}; {remedy}")


def _unavailable(where: str, what: str, said: str) -> CoordinatorUnavailableError:
    return CoordinatorUnavailableError(
        f"cannot {what}: the database {where} cannot be used now ({said}); try again once it answers"
    )


def shown(dsn: str) -> str:
    """Return what of a DSN may be shown to anybody: host, port and database."""
    try:
        parts = urlsplit(dsn)
    except ValueError:
        return "(unreadable DSN)"
    if parts.scheme not in ("postgresql", "postgres"):
        return "(unreadable DSN)"
    return f"{parts.netloc.rpartition('@')[2] or 'local'}{parts.path}"
