"""How an option is declared, once, as an attrs field with its kind; refusing and describing follow from that.

Which options there are is said by the classes in `config` that have such fields.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import attrs

from repopool_async.config_kinds import FLAG, Kind
from repopool_async.config_refusals import under
from repopool_async.exceptions import ConfigError

UNSUPPORTED: Final = frozenset(
    {
        "max_slots",
        "idle_seconds",
        "webhooks",
    }
)
"""Options of later versions: anything but their default is refused. Whoever makes one work removes its line here."""

Field: TypeAlias = "attrs.Attribute[Any]"
Table: TypeAlias = Mapping[str, "Field | Mapping[str, Field]"]


def option(kind: Kind, default: Any, help: str, *, group: str | None = None, repr: Any = True) -> Any:
    """Return an attrs field that is an option.

    Args:
        help: what it decides. group: the mapping that it stands in; it may also stand outside.
    """
    return attrs.field(
        default=default,
        converter=attrs.Converter(_checked, takes_field=True),
        metadata={"kind": kind, "help": help, "group": group},
        kw_only=True,
        repr=repr,
    )


def cleanup_flag(help: str) -> Any:
    """Return a flag of `cleanup_options`."""
    return option(FLAG, True, help, group="cleanup_options")


def _checked(value: object, field: Field) -> Any:
    return under(field.name, lambda given: accepted(given, field), value)


def accepted(value: object, field: Field) -> Any:
    """Return the value in its final form, or raise `ConfigError` without saying where."""
    kind: Kind = field.metadata["kind"]
    if field.name not in UNSUPPORTED:
        return kind.convert(value)
    default = default_of(field)
    try:
        is_default = kind.convert(value) == default
    except ConfigError:
        is_default = False
    if not is_default:
        raise ConfigError("this version does not support this option yet; leave it out")
    return default


def default_of(field: Field) -> Any:
    """Return what an option is when left out."""
    factory = getattr(field.default, "factory", None)
    return field.default if factory is None else factory()


@functools.cache
def table_of(kind: type[attrs.AttrsInstance]) -> dict[str, Any]:
    """Return the fields by their key in YAML, with the groups as tables of their own and their fields here as well."""
    table: dict[str, Any] = {field.name: field for field in attrs.fields(kind) if "kind" in field.metadata}
    for name, field in list(table.items()):
        if group := field.metadata.get("group"):
            table.setdefault(group, {})[name] = field
    return table


@attrs.frozen
class OptionInfo:
    """One key of `pools.yaml`.

    Attributes:
        key: as in the file, `cleanup_options.fetch_on_allocate`. name: as a keyword argument.
        expected: what it wants, in words. default: what it is when left out. help: what it decides.
        is_supported: False for options of later versions.
    """

    key: str
    name: str
    expected: str
    default: Any
    help: str
    is_supported: bool


def describe(kind: type[attrs.AttrsInstance]) -> tuple[OptionInfo, ...]:
    """Return every key of a pool (`PoolOptions`) or of the top level (`PoolConfig`), in the order of the fields."""
    return tuple(_info(field) for field in attrs.fields(kind) if "kind" in field.metadata)


def _info(field: Field) -> OptionInfo:
    group = field.metadata.get("group")
    return OptionInfo(
        key=f"{group}.{field.name}" if group else field.name,
        name=field.name,
        expected=field.metadata["kind"].expected,
        default=default_of(field),
        help=field.metadata["help"],
        is_supported=field.name not in UNSUPPORTED,
    )
