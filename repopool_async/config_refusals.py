"""The words in which configuration is refused: what was expected, what was found, and where it stands.

Credentials in values never show. What is refused, and why, is decided by whoever raises these errors.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from repopool_async.exceptions import ConfigError

MAX_SHOWN: Final = 60
_SECRET: Final = re.compile(r"(://).*@|\S*:\S*@", re.DOTALL)
_SECRET_QUERY: Final = re.compile(r"(://[^?]*\?).*", re.DOTALL)

KeyPath: TypeAlias = tuple[str, ...]


def shown(value: object, limit: int = MAX_SHOWN) -> str:
    """Return how a value appears in a message: in YAML's words, short, without credentials."""
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    if isinstance(value, str):
        # Before shortening: a cut between a password and its @ would hide what gives the password away.
        text = _SECRET_QUERY.sub(r"\1***", _SECRET.sub(r"\1***@", value))
        text = text.encode(errors="backslashreplace").decode()
        return json.dumps(text if len(text) <= limit else text[:limit] + "…", ensure_ascii=False)
    if isinstance(value, int | float):
        # Python refuses to write out a very long integer.
        return repr(value) if isinstance(value, float) or abs(value) < 1 << 128 else "a huge number"
    kinds = ((Mapping, "a mapping"), (Sequence, "a list"))
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


def unexpected(expected: str, value: object, *, key: str | None = None) -> ConfigError:
    """Return the refusal of a value; `key` names the part of it that is wrong."""
    return ConfigError(f"expected {expected}, found {shown(value)}", key=key)


def located(text: str, path: KeyPath = (), *, line: int | None = None, source: Path | None = None) -> ConfigError:
    """Return the error `source:line: dotted.path: text`, without the parts that are not known."""
    key = ".".join(shown(part, limit=200)[1:-1] for part in path).replace(".[", "[")
    where = [] if source is None else [str(source)]
    if line is not None:
        where.append(str(line) if where else f"line {line}")
    message = ": ".join(part for part in (":".join(where), key, text) if part)
    return ConfigError(message, key=key or None, line=line, source=None if source is None else str(source))


def under(key: str, convert: Callable[[Any], Any], value: object) -> Any:
    """Return the converted value; a refusal says that it is the key's."""
    try:
        return convert(value)
    except ConfigError as refusal:
        raise located(refusal.message, inside((key,), refusal)) from None


def inside(path: KeyPath, refusal: ConfigError) -> KeyPath:
    """Return where the part stands that a refusal of the value at `path` is about."""
    return path if refusal.key is None else (*path, refusal.key)
