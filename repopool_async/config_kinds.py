"""The kinds of values that options are declared with: what each wants, its final form, and how it is stored.

Which options there are, and where a refused value stood, is not known here.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from repopool_async.config_refusals import shown, unexpected
from repopool_async.config_values import (
    EXPECTED_DURATION,
    EXPECTED_SIZE,
    NAME,
    is_number,
    parse_duration,
    parse_size,
    without_credentials,
)
from repopool_async.exceptions import ConfigError

_MAX_SECONDS: Final = 3650 * 86400.0
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_BAD_IN_REF: Final = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/]|[/.]$|\.lock$|(?:^|/)\.|^$")


def _same(value: Any) -> Any:
    return value


@attrs.frozen
class Kind:
    """How an option is read.

    Attributes:
        expected: what it wants, in words.
        convert: returns the value in its final form, or raises `ConfigError` without saying where (its `key` then names
            the wrong part of the value). Its own results pass unchanged.
        store: returns the JSON form, free of credentials, that `convert` reads back.
    """

    expected: str
    convert: Callable[[Any], Any]
    store: Callable[[Any], Any] = _same


def _kind(expected: str, is_right: Callable[[Any], bool], store: Callable[[Any], Any] = _same) -> Kind:
    """Return a kind whose values stay as they are."""

    def convert(value: Any) -> Any:
        if not is_right(value):
            raise unexpected(expected, value)
        return value

    return Kind(expected, convert, store)


def text_kind(expected: str, is_right: Callable[[str], bool], store: Callable[[Any], Any] = _same) -> Kind:
    """Return the kind of text that is right."""
    return _kind(expected, lambda value: isinstance(value, str) and is_right(value), store)


def integer(low: int, high: int) -> Kind:
    """Return the kind of whole numbers within these limits."""
    expected = f"a whole number from {low} to {high}"
    return _kind(expected, lambda value: isinstance(value, int) and is_number(value) and low <= value <= high)


def number(high: float) -> Kind:
    """Return the kind of numbers greater than 0, at most `high`."""
    checked = _kind(f"a number greater than 0, at most {high:g}", lambda value: is_number(value) and 0 < value <= high)
    return attrs.evolve(checked, convert=lambda value: float(checked.convert(value)))


def duration(*, is_zero_allowed: bool = False) -> Kind:
    """Return the kind of durations, in seconds in their final form."""
    limits = "from 0 to 3650 days" if is_zero_allowed else "greater than 0, at most 3650 days"

    def convert(value: Any) -> float:
        seconds = parse_duration(value)
        if seconds > _MAX_SECONDS or not (seconds or is_zero_allowed):
            raise unexpected(f"a duration {limits}", value)
        return seconds

    return Kind(f"{EXPECTED_DURATION}, {limits}", convert)


def _bytes(value: Any) -> int:
    size = parse_size(value)
    if not 0 < size < 1 << 63:
        raise unexpected("a size greater than 0, less than 2**63 bytes", value)
    return size


def choice(*words: str) -> Kind:
    """Return the kind of these words."""
    return text_kind(" or ".join(map(shown, words)), lambda value: value in words)


def or_none(kind: Kind) -> Kind:
    """Return a kind that may be null too."""
    return Kind(
        f"{kind.expected}, or null",
        lambda value: None if value is None else kind.convert(value),
        lambda value: None if value is None else kind.store(value),
    )


def list_of(item: Kind, *, is_empty_allowed: bool = True) -> Kind:
    """Return the kind of lists of a kind, tuples in their final form."""
    expected = f"a list, each item {item.expected}"

    def convert(value: Any) -> tuple[Any, ...]:
        items = () if value is None else value  # what is left in YAML of a list whose items are all commented out
        if not isinstance(items, Sequence) or isinstance(items, str | bytes):
            raise unexpected(expected, value)
        if not (items or is_empty_allowed):
            raise ConfigError("expected at least one item")
        return tuple(_part(item, value, f"[{index}]") for index, value in enumerate(items))

    return Kind(expected, convert, lambda items: [item.store(value) for value in items])


def _part(kind: Kind, value: object, key: str) -> Any:
    try:
        return kind.convert(value)
    except ConfigError as refusal:
        raise ConfigError(refusal.message, key=key) from None


def _is_plain(text: str) -> bool:
    return bool(text.strip()) and not _CONTROL.search(text)


def _is_inner_path(text: str) -> bool:
    parts = text.rstrip("/").split("/")
    return _is_plain(text) and not any(part in {"", ".", ".."} or part.lower() == ".git" for part in parts)


def checked_url(value: object) -> str:
    """Return a URL or path that git could be given, unchanged."""
    if not isinstance(value, str):
        raise unexpected(URL.expected, value)
    if not value or value != value.strip() or value.startswith("-") or _CONTROL.search(value):
        # The value is not shown: it is too broken to tell where its password stands.
        flaws = 'empty, begins with "-", or has control characters or blanks at its ends'
        raise ConfigError(f"expected {URL.expected}, found text that is {flaws}")
    return value


def _remotes(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping | None):
        raise unexpected(REMOTES.expected, value)
    return {_remote_name(name): _part(URL, url, str(name)) for name, url in (value or {}).items()}


def _remote_name(name: object) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name) or _BAD_IN_REF.search(name):
        raise unexpected('a remote\'s name of letters, digits, ".", "_" or "-"', name, key=str(name))
    if name == "origin":
        raise ConfigError("origin is the remote that repo_url names; choose another name", key=name)
    return name


def _argv(value: Any) -> tuple[str, ...]:
    import shlex  # noqa: PLC0415 - importing this module must stay cheap

    words = value
    if isinstance(value, str):
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ConfigError(f"expected {COMMAND.expected}, found text that cannot be split: {error}") from None
    is_list = isinstance(words, Sequence) and not isinstance(words, bytes)
    if not (is_list and words and words[0] and all(isinstance(word, str) and "\0" not in word for word in words)):
        raise unexpected(COMMAND.expected, value)
    return tuple(words)


def checked_directory(value: str | os.PathLike[str] | None) -> Path:
    """Return an absolute path; None means the directory of the environment or of the platform."""
    given: object = _default_directory() if value is None else value
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if not (isinstance(text, str) and _is_plain(text) and "://" not in text):
        raise unexpected(DIRECTORY.expected, given if text is None else text)
    try:
        absolute = Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"{shown(text)} cannot be made absolute: {error}") from None
    return Path(os.path.normpath(absolute))


def _default_directory() -> str:
    from platformdirs import user_data_dir  # noqa: PLC0415 - importing this module must stay cheap

    return os.environ.get("REPOPOOL_WORKSPACES_DIR") or user_data_dir("repopool")


def without_any_credentials(urls: Mapping[str, str]) -> dict[str, str]:
    """Return the URLs without what may be secret."""
    return {name: without_credentials(url) for name, url in urls.items()}


FLAG: Final = _kind("true or false", lambda value: isinstance(value, bool))
TEXT: Final = text_kind("text", _is_plain)
SECRET_TEXT: Final = text_kind("text", _is_plain, without_credentials)
REF: Final = text_kind(
    "a branch, tag or commit (quoted, if it looks like a number)", lambda v: not _BAD_IN_REF.search(v)
)
SIZE_LIMIT: Final = Kind(EXPECTED_SIZE, _bytes)
INNER_PATHS: Final = list_of(text_kind("a relative path inside the repository, without .. or .git", _is_inner_path))
URL: Final = Kind("the URL or path of a repository", checked_url, without_credentials)
REMOTES: Final = Kind("a mapping of remote names to URLs", _remotes, without_any_credentials)
COMMAND: Final = Kind("a command, as a list of words or as text to be split into words (no shell)", _argv, list)
DIRECTORY: Final = Kind("a directory's path, without control characters", checked_directory, str)
PROTOCOLS: Final = list_of(choice("https", "http", "ssh", "git", "file"), is_empty_allowed=False)
