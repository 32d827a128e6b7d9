"""What a manager can be told about where the state of its slots is kept: `coordination:` of `pools.yaml`.

Files on one machine are the default; managers on several machines share a database. Whether that answers is not known
here.
"""

import os
from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs

from repopool_async.config_fields import accepted, option, table_of
from repopool_async.config_kinds import Kind, choice, duration, or_none, text_kind
from repopool_async.config_refusals import located, shown, unexpected
from repopool_async.exceptions import ConfigError

DSN_VARIABLE: Final = "REPOPOOL_DSN"

_SCHEMES: Final = ("postgresql://", "postgres://")
_SHORTEST_TTL: Final = 1.0


def _is_dsn(text: str) -> bool:
    return text.startswith(_SCHEMES) and text.isprintable()


_DSN: Final = text_kind("a DSN such as postgresql://user@host:5432/database", _is_dsn)


@attrs.frozen
class Coordination:
    """Where the state of slots is kept, so that all managers that share it agree.

    Making one raises `ConfigError` for what means nothing.
    """

    type: Literal["files", "postgres"] = option(
        choice("files", "postgres"), "postgres", "files: of workspaces_dir, for one machine; postgres: for many"
    )
    dsn: str | None = option(
        or_none(_DSN), None, f"the database, or a pooler before it; null: {DSN_VARIABLE} of the environment", repr=False
    )
    listen_dsn: str | None = option(
        or_none(_DSN), None, "the database itself where dsn is a pooler's; null: who waits polls then", repr=False
    )
    session_ttl: float = option(duration(), 30.0, "silence after which a manager is taken for dead; at least 1s")

    def __attrs_post_init__(self) -> None:
        """Refuse values that mean nothing together, and find the DSN where it is not given."""
        if self.type == "files":
            for name in ("dsn", "listen_dsn"):
                if getattr(self, name) is not None:
                    raise located("means nothing with type files", (name,))
        elif self.session_ttl < _SHORTEST_TTL:
            raise located(f"expected at least {_SHORTEST_TTL:g}, found {self.session_ttl:g}", ("session_ttl",))
        elif self.dsn is None:
            object.__setattr__(self, "dsn", _dsn_of_environment())


def _dsn_of_environment() -> str:
    given = os.environ.get(DSN_VARIABLE)
    if given is None:
        raise located(f"missing: expected {_DSN.expected}, here or in {DSN_VARIABLE} of the environment", ("dsn",))
    try:
        return str(_DSN.convert(given))
    except ConfigError as refusal:
        raise located(f"{DSN_VARIABLE} of the environment: {refusal.message}", ("dsn",)) from None


_EXPECTED: Final = "files, a DSN postgresql://…, or a mapping with type, dsn, listen_dsn, session_ttl"


def _convert(value: Any) -> Coordination:
    if isinstance(value, Coordination):
        return value
    if value == "files":
        given: Mapping[str, Any] = {"type": "files"}
    elif isinstance(value, str) and _is_dsn(value):
        given = {"dsn": value}
    elif isinstance(value, Mapping):
        given = {name: _part(name, part) for name, part in value.items()}
    else:
        raise unexpected(_EXPECTED, value)
    try:
        return Coordination(**given)
    except ConfigError as refusal:
        raise ConfigError(refusal.message.removeprefix(f"{refusal.key}: "), key=refusal.key) from None


def _part(name: object, value: object) -> Any:
    field = table_of(Coordination).get(str(name))
    if field is None:
        raise ConfigError(
            f"unknown key {shown(str(name))}; expected {', '.join(table_of(Coordination))}", key=shown(str(name))[1:-1]
        )
    try:
        return accepted(value, field)
    except ConfigError as refusal:
        raise ConfigError(refusal.message, key=field.name) from None


COORDINATION: Final = Kind(_EXPECTED, _convert)
