"""Records to JSON and back, strictly: compact, keys sorted, times in ISO 8601 UTC, enums by value, bytes as text.

What is read must have exactly the types the record says; unknown top-level keys of records that have an `extra` go
there and are written back, so a newer version's records survive an older one. Knows nothing of files. The converter is
built on first use, because importing cattrs is slow.
"""

import functools
import json
import math
import zlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs

if TYPE_CHECKING:
    from cattrs import Converter

T = TypeVar("T")

_CHECKSUM: Final = b',"checksum":"'
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), sort_keys=True, allow_nan=False)


class CodecError(ValueError):
    """The bytes are no such record, or the record holds what JSON cannot."""


def dumps(record: object) -> bytes:
    """Return a record as one line of JSON with its newline.

    Raises:
        CodecError: a time has no time zone, or a mapping holds what JSON cannot (numbers that are not finite included).
    """
    try:
        raw = _converter().unstructure(record)
        return _ENCODER.encode(raw).encode("ascii") + b"\n"
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CodecError(f"{type(record).__name__} cannot be written as JSON: {error}") from error


def loads(kind: type[T], data: bytes) -> T:
    """Return the record that `dumps` made `data` of; missing keys take their defaults.

    Raises:
        CodecError: the bytes are no JSON, a required key is missing, or a value has another type than the record says.
    """
    try:
        raw = _decoder().decode(data.decode("utf-8"))
        return _converter().structure(raw, kind)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CodecError(f"no valid {kind.__name__}: {type(error).__name__}: {error}") from error


def add_checksum(line: bytes, size: int) -> bytes:
    """Return what `dumps` wrote with a checksum as its last key, filled up with spaces to `size` bytes; still JSON."""
    body = line.rstrip()
    text = body[:-1] + _CHECKSUM + b'%08x"}' % zlib.crc32(body)
    return text.ljust(size - 1) + b"\n"


def remove_checksum(data: bytes) -> bytes:
    """Return the JSON without checksum and filling; what has no checksum is returned as it is.

    Raises:
        CodecError: the checksum does not match, or is missing from what was filled up.
    """
    text = data.rstrip()
    end = len(text) - 10 - len(_CHECKSUM)
    if end < 0 or not text.startswith(_CHECKSUM, end):
        # Filled up it was written with one: two records mixed can be JSON with a key that neither has.
        if data.endswith(b" \n"):
            raise CodecError("the checksum is missing")
        return data
    body = text[:end] + b"}"
    if text[-10:] != b'%08x"}' % zlib.crc32(body):
        raise CodecError("the checksum does not match")
    return body


@functools.cache
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


@functools.cache
def _converter() -> "Converter":
    from cattrs import Converter  # noqa: PLC0415 - a fifth of the whole package's import time

    converter = Converter(detailed_validation=False)
    for primitive in (str, int, bool):
        converter.register_structure_hook(primitive, _exactly(primitive))
    converter.register_structure_hook(StrEnum, lambda value, kind: kind(value))
    converter.register_structure_hook(float, _to_float)
    converter.register_structure_hook(bytes, _to_bytes)
    converter.register_unstructure_hook(bytes, _from_bytes)
    converter.register_structure_hook(datetime, _to_datetime)
    converter.register_unstructure_hook(datetime, _from_datetime)
    converter.register_structure_hook_func(_is_mapping, _exactly(dict))
    converter.register_unstructure_hook_func(_is_mapping, dict)
    converter.register_structure_hook_func(_is_strings, _to_strings)
    converter.register_structure_hook_factory(_has_extra, lambda kind: _structure_with_extra(converter, kind))
    converter.register_unstructure_hook_factory(_has_extra, lambda kind: _unstructure_with_extra(converter, kind))
    return converter


def _exactly(kind: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        # Not isinstance: a bool is no number here.
        if type(value) is not kind:
            raise TypeError(f"{kind.__name__} expected, not {type(value).__name__}")
        return value

    return structure


def _to_float(value: Any, _: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise TypeError(f"number expected, not {type(value).__name__}")
    return float(value)


def _to_bytes(value: Any, _: Any) -> bytes:
    return str.encode(value, errors="surrogateescape")


def _from_bytes(data: bytes) -> str:
    # As readable as output can be; what is no UTF-8 comes back all the same.
    return data.decode(errors="surrogateescape")


def _to_datetime(value: Any, _: Any) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError(f"{value} has no time zone")
    return moment.astimezone(UTC)


def _from_datetime(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise ValueError(f"{moment} has no time zone")
    return moment.astimezone(UTC).isoformat()


def _to_strings(value: Any, _: Any) -> tuple[str, ...]:
    if type(value) is not list or not all(type(item) is str for item in value):
        raise TypeError("list of strings expected")
    return tuple(value)


def _is_mapping(kind: Any) -> bool:
    return bool(kind == Mapping[str, Any])


def _is_strings(kind: Any) -> bool:
    return bool(kind == tuple[str, ...])


def _has_extra(kind: Any) -> bool:
    return attrs.has(kind) and "extra" in attrs.fields_dict(kind)


def _structure_with_extra(converter: "Converter", kind: type[Any]) -> Callable[[Any, Any], Any]:
    from cattrs.gen import make_dict_structure_fn  # noqa: PLC0415 - as above

    structure = make_dict_structure_fn(kind, converter)
    known = attrs.fields_dict(kind).keys() - {"extra"}

    def structure_with_extra(raw: Any, _: Any) -> Any:
        if not raw.keys() <= known:
            extra = {key: value for key, value in raw.items() if key not in known}
            raw = {key: value for key, value in raw.items() if key in known} | {"extra": extra}
        return structure(raw, kind)

    return structure_with_extra


def _unstructure_with_extra(converter: "Converter", kind: type[Any]) -> Callable[[Any], dict[str, Any]]:
    from cattrs.gen import make_dict_unstructure_fn, override  # noqa: PLC0415 - as above

    unstructure = make_dict_unstructure_fn(kind, converter, extra=override(omit=True))

    def unstructure_with_extra(record: Any) -> dict[str, Any]:
        raw = unstructure(record)
        return {**record.extra, **raw} if record.extra else raw

    return unstructure_with_extra
