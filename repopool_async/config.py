"""What pools can be told: the options, their defaults and checks, and the `pools.yaml` that holds them.

Every option is declared once, as a field of `PoolOptions` or `PoolConfig`; reading, refusing and describing follow
from it. All refusals are `ConfigError`s that name the key and, where there is a file, the line; credentials in URLs are
never shown. Not responsible for watching the file, for making pools, or for whether a URL answers.
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import attrs

from repopool_async.exceptions import ConfigError

if TYPE_CHECKING:
    import yaml

UNSUPPORTED: Final = frozenset(
    {
        "max_slots",
        "idle_seconds",
        "keep",
        "setup",
        "setup_key",
        "lfs",
        "sparse",
        "history",
        "hosts",
        "coordination",
        "webhooks",
    }
)
"""Options of later versions: anything but their default is refused. Whoever makes one work removes its line here."""

_MAX_FILE_BYTES: Final = 1 << 20
_MAX_NODES: Final = 200_000
_MAX_SHOWN: Final = 60
_MAX_PROBLEMS: Final = 20
_MAX_SECONDS: Final = 3650 * 86400.0

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HELPER_OR_SCHEME: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9+.-]*)(?:::|://)")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_RESERVED_ENDINGS: Final = (".git", ".lock", ".record")
_BAD_IN_REF: Final = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/]|[/.]$|\.lock$|(?:^|/)\.|^$")
_SECRET: Final = re.compile(r"(://).*@|\S*:\S*@", re.DOTALL)
_SECRET_QUERY: Final = re.compile(r"(://[^?]*\?).*", re.DOTALL)
_AMOUNT: Final = r"([0-9]+(?:\.[0-9]+)?)\s*"
_SIZE: Final = re.compile(_AMOUNT + "([kmgt]?)(i?b)?", re.IGNORECASE)
_DURATION: Final = re.compile("".join(rf"(?:{_AMOUNT}{unit}\s*)?" for unit in ("d", "h", "m(?!s)", "s", "ms")))
_UNIT_SECONDS: Final = (86400, 3600, 60, 1, 0.001)

_EXPECTED_DURATION: Final = 'a duration such as 30, "30s" or "5m"'
_EXPECTED_SIZE: Final = 'a size such as 1048576, "500MB" or "1.5GiB"'

_KeyPath: TypeAlias = tuple[str, ...]
_Field: TypeAlias = "attrs.Attribute[Any]"
_Table: TypeAlias = Mapping[str, "_Field | Mapping[str, _Field]"]


# Words for refusals -----------------------------------------------------------------------------------------------


def _shown(value: object, limit: int = _MAX_SHOWN) -> str:
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


def _unexpected(expected: str, value: object, *, key: str | None = None) -> ConfigError:
    return ConfigError(f"expected {expected}, found {_shown(value)}", key=key)


def _located(text: str, path: _KeyPath = (), *, line: int | None = None, source: Path | None = None) -> ConfigError:
    """Return the error `source:line: dotted.path: text`, without the parts that are not known."""
    key = ".".join(_shown(part, limit=200)[1:-1] for part in path).replace(".[", "[")
    where = [] if source is None else [str(source)]
    if line is not None:
        where.append(str(line) if where else f"line {line}")
    message = ": ".join(part for part in (":".join(where), key, text) if part)
    return ConfigError(message, key=key or None, line=line, source=None if source is None else str(source))


# Single values ----------------------------------------------------------------------------------------------------


def parse_duration(value: object) -> float:
    """Return a duration in seconds.

    Args:
        value: seconds as a number, or text: `"30"`, `"500ms"`, `"30s"`, `"5m"`, `"1.5h"`, `"7d"`, or several of these
            from the largest unit to the smallest, such as `"1h30m"`.

    Raises:
        ConfigError: the value is none of these, negative, infinite or not a number.
    """
    seconds = math.nan
    if isinstance(value, str) and len(value) <= _MAX_SHOWN:
        seconds = _seconds_of_text(value.strip())
    elif _is_number(value):
        seconds = _to_float(value)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise _unexpected(_EXPECTED_DURATION, value)
    return seconds + 0.0  # makes minus zero plain


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _to_float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _seconds_of_text(text: str) -> float:
    if re.fullmatch(_AMOUNT, text):
        return float(text)
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        return math.nan
    parts = zip(match.groups(), _UNIT_SECONDS, strict=True)
    # Rounded, because 1.1 * 3600 is not 3960 in binary.
    return round(math.fsum(float(amount) * unit for amount, unit in parts if amount), 9)


def parse_size(value: object) -> int:
    """Return a size in bytes.

    Args:
        value: bytes as a whole number, or text: `"500MB"` and the like count in thousands, `"1.5GiB"` in steps of 1024,
            as does `"1.5G"` (git's own convention). Upper and lower case mean the same; fractions of a byte go.

    Raises:
        ConfigError: the value is none of these, negative, infinite or not a number.
    """
    if isinstance(value, str) and len(value) <= _MAX_SHOWN and (match := _SIZE.fullmatch(value.strip())):
        whole, _, fraction = match[1].partition(".")
        step = 1000 if (match[3] or "").lower() == "b" else 1024
        unit: int = step ** " kmgt".index(match[2].lower() or " ")
        return int(whole + fraction) * unit // int("1" + "0" * len(fraction))
    if isinstance(value, int | float) and _is_number(value) and value >= 0 and value % 1 == 0:
        return int(value)
    raise _unexpected(_EXPECTED_SIZE, value)


def validate_repo_name(name: object) -> str:
    """Return the name of a pool, unchanged.

    It becomes a directory and part of slot ids, so it is 1 to 100 ASCII letters, digits, dots, underscores and hyphens,
    begins with a letter or digit, and does not end in `.git`, `.lock` or `.record`; `locks`
    is reserved.

    Raises:
        ConfigError: it is not such a name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower().endswith(_RESERVED_ENDINGS):
        endings = " or ".join(f'"{ending}"' for ending in _RESERVED_ENDINGS)
        rule = f'1 to 100 letters, digits, ".", "_" or "-", first a letter or digit, not ending in {endings}'
        raise _unexpected(f"a pool name: {rule}", name)
    if name.lower() == "locks":
        raise ConfigError(f"the pool name {_shown(name)} is reserved; choose another")
    return name


def without_credentials(url: str) -> str:
    """Return the URL without what may be secret: the whole user part of HTTP and FTP, the password of anything else."""
    scheme, mark, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, host = authority.rpartition("@")
    if not (mark and at):
        return url
    is_token_possible = scheme.lower().endswith(("http", "https", "ftp", "ftps"))
    kept = "" if is_token_possible else user.partition(":")[0] + "@"
    return f"{scheme}://{kept}{host}{rest[len(authority) :]}"


def _protocol_of(url: str) -> str:
    """Return the name by which git's `GIT_ALLOW_PROTOCOL` knows how the URL is reached."""
    if match := _HELPER_OR_SCHEME.match(url):
        return match[1].lower()
    return "ssh" if ":" in url.partition("/")[0] else "file"


# Kinds of values: what an option's field is declared with ---------------------------------------------------------


def _same(value: Any) -> Any:
    return value


@attrs.frozen
class _Kind:
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


def _kind(expected: str, is_right: Callable[[Any], bool], store: Callable[[Any], Any] = _same) -> _Kind:
    """Return a kind whose values stay as they are."""

    def convert(value: Any) -> Any:
        if not is_right(value):
            raise _unexpected(expected, value)
        return value

    return _Kind(expected, convert, store)


def _text_kind(expected: str, is_right: Callable[[str], bool], store: Callable[[Any], Any] = _same) -> _Kind:
    return _kind(expected, lambda value: isinstance(value, str) and is_right(value), store)


def _integer(low: int, high: int) -> _Kind:
    expected = f"a whole number from {low} to {high}"
    return _kind(expected, lambda value: isinstance(value, int) and _is_number(value) and low <= value <= high)


def _number(high: float) -> _Kind:
    checked = _kind(f"a number greater than 0, at most {high:g}", lambda value: _is_number(value) and 0 < value <= high)
    return attrs.evolve(checked, convert=lambda value: float(checked.convert(value)))


def _duration(*, is_zero_allowed: bool = False) -> _Kind:
    limits = "from 0 to 3650 days" if is_zero_allowed else "greater than 0, at most 3650 days"

    def convert(value: Any) -> float:
        seconds = parse_duration(value)
        if seconds > _MAX_SECONDS or not (seconds or is_zero_allowed):
            raise _unexpected(f"a duration {limits}", value)
        return seconds

    return _Kind(f"{_EXPECTED_DURATION}, {limits}", convert)


def _bytes(value: Any) -> int:
    size = parse_size(value)
    if not 0 < size < 1 << 63:
        raise _unexpected("a size greater than 0, less than 2**63 bytes", value)
    return size


def _choice(*words: str) -> _Kind:
    return _text_kind(" or ".join(map(_shown, words)), lambda value: value in words)


def _or_none(kind: _Kind) -> _Kind:
    return _Kind(
        f"{kind.expected}, or null",
        lambda value: None if value is None else kind.convert(value),
        lambda value: None if value is None else kind.store(value),
    )


def _list_of(item: _Kind, *, is_empty_allowed: bool = True) -> _Kind:
    expected = f"a list, each item {item.expected}"

    def convert(value: Any) -> tuple[Any, ...]:
        items = () if value is None else value  # what is left in YAML of a list whose items are all commented out
        if not isinstance(items, Sequence) or isinstance(items, str | bytes):
            raise _unexpected(expected, value)
        if not (items or is_empty_allowed):
            raise ConfigError("expected at least one item")
        return tuple(_part(item, value, f"[{index}]") for index, value in enumerate(items))

    return _Kind(expected, convert, lambda items: [item.store(value) for value in items])


def _part(kind: _Kind, value: object, key: str) -> Any:
    try:
        return kind.convert(value)
    except ConfigError as refusal:
        raise ConfigError(refusal.message, key=key) from None


def _is_plain(text: str) -> bool:
    return bool(text.strip()) and not _CONTROL.search(text)


def _is_inner_path(text: str) -> bool:
    parts = text.rstrip("/").split("/")
    return _is_plain(text) and not any(part in {"", ".", ".."} or part.lower() == ".git" for part in parts)


def _url(value: object) -> str:
    if not isinstance(value, str):
        raise _unexpected(_URL.expected, value)
    if not value or value != value.strip() or value.startswith("-") or _CONTROL.search(value):
        # The value is not shown: it is too broken to tell where its password stands.
        flaws = 'empty, begins with "-", or has control characters or blanks at its ends'
        raise ConfigError(f"expected {_URL.expected}, found text that is {flaws}")
    return value


def _remotes(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping | None):
        raise _unexpected(_REMOTES.expected, value)
    return {_remote_name(name): _part(_URL, url, str(name)) for name, url in (value or {}).items()}


def _remote_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _BAD_IN_REF.search(name):
        raise _unexpected('a remote\'s name of letters, digits, ".", "_" or "-"', name, key=str(name))
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
            raise ConfigError(f"expected {_COMMAND.expected}, found text that cannot be split: {error}") from None
    is_list = isinstance(words, Sequence) and not isinstance(words, bytes)
    if not (is_list and words and words[0] and all(isinstance(word, str) and "\0" not in word for word in words)):
        raise _unexpected(_COMMAND.expected, value)
    return tuple(words)


def _directory(value: str | os.PathLike[str] | None) -> Path:
    """Return an absolute path; None means the directory of the environment or of the platform."""
    given: object = _default_directory() if value is None else value
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if not (isinstance(text, str) and _is_plain(text) and "://" not in text):
        raise _unexpected(_DIRECTORY.expected, given if text is None else text)
    try:
        absolute = Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"{_shown(text)} cannot be made absolute: {error}") from None
    return Path(os.path.normpath(absolute))


def _default_directory() -> str:
    from platformdirs import user_data_dir  # noqa: PLC0415 - importing this module must stay cheap

    return os.environ.get("REPOPOOL_WORKSPACES_DIR") or user_data_dir("repopool")


def _without_any_credentials(urls: Mapping[str, str]) -> dict[str, str]:
    return {name: without_credentials(url) for name, url in urls.items()}


_FLAG: Final = _kind("true or false", lambda value: isinstance(value, bool))
_TEXT: Final = _text_kind("text", _is_plain)
_SECRET_TEXT: Final = _text_kind("text", _is_plain, without_credentials)
_REF: Final = _text_kind(
    "a branch, tag or commit (quoted, if it looks like a number)", lambda v: not _BAD_IN_REF.search(v)
)
_SIZE_LIMIT: Final = _Kind(_EXPECTED_SIZE, _bytes)
_INNER_PATHS: Final = _list_of(_text_kind("a relative path inside the repository, without .. or .git", _is_inner_path))
_URL: Final = _Kind("the URL or path of a repository", _url, without_credentials)
_REMOTES: Final = _Kind("a mapping of remote names to URLs", _remotes, _without_any_credentials)
_COMMAND: Final = _Kind("a command, as a list of words or as text to be split into words (no shell)", _argv, list)
_DIRECTORY: Final = _Kind("a directory's path, without control characters", _directory, str)
_PROTOCOLS: Final = _list_of(_choice("https", "http", "ssh", "git", "file"), is_empty_allowed=False)


# The options ------------------------------------------------------------------------------------------------------


def _default_of(field: _Field) -> Any:
    factory = getattr(field.default, "factory", None)
    return field.default if factory is None else factory()


def _accepted(value: object, field: _Field) -> Any:
    """Return the value in its final form, or raise `ConfigError` without saying where."""
    kind: _Kind = field.metadata["kind"]
    if field.name not in UNSUPPORTED:
        return kind.convert(value)
    default = _default_of(field)
    try:
        is_default = kind.convert(value) == default
    except ConfigError:
        is_default = False
    if not is_default:
        raise ConfigError("this version does not support this option yet; leave it out")
    return default


def _checked(value: object, field: _Field) -> Any:
    return _under(field.name, lambda given: _accepted(given, field), value)


def _under(key: str, convert: Callable[[Any], Any], value: object) -> Any:
    """Return the converted value; a refusal says that it is the key's."""
    try:
        return convert(value)
    except ConfigError as refusal:
        raise _located(refusal.message, _inside((key,), refusal)) from None


def _inside(path: _KeyPath, refusal: ConfigError) -> _KeyPath:
    return path if refusal.key is None else (*path, refusal.key)


def _option(kind: _Kind, default: Any, help: str, *, group: str | None = None, repr: Any = True) -> Any:
    return attrs.field(
        default=default,
        converter=attrs.Converter(_checked, takes_field=True),
        metadata={"kind": kind, "help": help, "group": group},
        kw_only=True,
        repr=repr,
    )


def _cleanup_flag(help: str) -> Any:
    return _option(_FLAG, True, help, group="cleanup_options")


def _shown_urls(urls: Mapping[str, str]) -> str:
    return repr(_without_any_credentials(urls))


@attrs.frozen
class PoolOptions:
    """Everything one pool can be told besides its name and URL; durations in seconds, sizes in bytes.

    Making one takes durations and sizes with units too, and raises `ConfigError` for a value out of its range, for
    values that mean nothing together, and for an option that this version does not support.
    """

    num_slots: int = _option(_integer(1, 10_000), 1, "how many slots the pool has")
    default_ref: str | None = _option(
        _or_none(_REF), None, "what is leased when nothing is named; null: remote's default"
    )
    remotes: Mapping[str, str] = _option(_REMOTES, attrs.Factory(dict), "fetched besides origin", repr=_shown_urls)
    fetch_on_allocate: bool = _cleanup_flag("whether a lease begins with a fetch from all remotes")
    clean_on_release: bool = _cleanup_flag("whether a slot is cleaned after its lease, not before the next")
    warmup_enabled: bool = _cleanup_flag("whether idle slots are made ready ahead")
    lock_timeout: float = _option(_duration(), 30.0, "how long one slot's lock is waited for")
    cleanup_timeout: float = _option(_duration(), 600.0, "how long one clean-up may take")
    stale_lock_hours: float = _option(_number(87_600), 24.0, "age of a lease, in hours, at which it is warned of")
    enable_metrics: bool = _option(_FLAG, True, "whether allocation times are measured")
    max_slots: int | None = _option(_or_none(_integer(1, 10_000)), None, "how far the pool may grow; null: it does not")
    idle_seconds: float | None = _option(_or_none(_duration()), None, "idleness after which an extra slot goes")
    max_waiting: int | None = _option(_or_none(_integer(0, 10**6)), None, "how many leases may wait; null: any number")
    acquire_timeout: float | None = _option(
        _or_none(_duration(is_zero_allowed=True)), 30.0, "how long a lease is waited for; 0: one try; null: no limit"
    )
    max_lease_seconds: float | None = _option(_or_none(_duration()), None, "age at which a lease is ended by force")
    fetch_max_age: float = _option(_duration(is_zero_allowed=True), 0.0, "age up to which the last fetch is new enough")
    keep: tuple[str, ...] = _option(_INNER_PATHS, (), "paths that stay between leases, such as node_modules")
    setup: tuple[str, ...] | None = _option(_or_none(_COMMAND), None, "command run in a slot when it is made")
    setup_key: tuple[str, ...] = _option(_INNER_PATHS, (), "files whose change makes setup run again")
    salvage: Literal["never", "abnormal", "always"] = _option(
        _choice("never", "abnormal", "always"),
        "abnormal",
        "after which leases unpushed work is saved; abnormal: a crash, an expiry, a forced end, a close",
    )
    salvage_days: float = _option(_number(3650), 30.0, "how many days saved work is kept")
    salvage_limit: int = _option(
        _SIZE_LIMIT,
        1 << 30,
        "how much of one lease's work is saved: commits first, then the stash, changed files, untracked files",
    )
    disk_limit: int | None = _option(_or_none(_SIZE_LIMIT), None, "how much disk the pool may use")
    isolation: Literal["shared", "full"] = _option(
        _choice("shared", "full"),
        "shared",
        "shared: slots borrow the mirror's objects; full: each has its own, at the price of twice the history's size a "
        "slot and of copying it once a return",
    )
    run_as: str | None = _option(_or_none(_TEXT), None, "user that lessees' commands run as; only root can do that")
    submodules: bool = _option(_FLAG, False, "whether submodules are checked out, nested ones too")
    lfs: bool = _option(_FLAG, False, "whether Git LFS files are fetched")
    sparse: tuple[str, ...] = _option(_INNER_PATHS, (), "the only directories to check out")
    history: Literal["full", "blobless"] = _option(
        _choice("full", "blobless"), "full", "whether old file contents are fetched in advance"
    )
    cleanup: Literal["background", "inline"] = _option(
        _choice("background", "inline"), "background", "whether leaving a lease waits for its clean-up"
    )
    rebuild_always: bool = _option(
        _FLAG, False, "whether every return makes the tree anew, in inodes nobody holds open; it costs a check-out"
    )
    leak_warning: float | None = _option(_or_none(_duration()), None, "age at which a lease's origin is reported")
    hosts: tuple[str, ...] = _option(_list_of(_TEXT), (), "machines that hold the slots")
    coordination: str | None = _option(_or_none(_SECRET_TEXT), None, "database that machines share", repr=False)
    webhooks: tuple[str, ...] = _option(_list_of(_SECRET_TEXT), (), "URLs told of events", repr=False)
    git_timeout: float = _option(_duration(), 3600.0, "how long one git command may take")
    git_idle_timeout: float = _option(_duration(), 300.0, "how long one git command may be silent")
    fetch_attempts: int = _option(_integer(1, 100), 3, "how often a fetch or clone is tried")
    auto_repair: bool = _option(_FLAG, True, "whether the janitor tries to repair quarantined slots")

    def __attrs_post_init__(self) -> None:
        """Refuse values that mean nothing together."""
        if self.max_slots is not None and self.max_slots < self.num_slots:
            raise _located(f"expected at least num_slots ({self.num_slots}), found {self.max_slots}", ("max_slots",))
        if self.idle_seconds is not None and self.max_slots is None:
            raise _located("means nothing without max_slots", ("idle_seconds",))
        if self.setup_key and self.setup is None:
            raise _located("means nothing without setup", ("setup_key",))
        if self.isolation == "full" and self.history != "full":
            raise _located("cannot be full where history is not: each slot would fetch the rest", ("isolation",))
        longest = self.max_lease_seconds
        if self.leak_warning is not None and longest is not None and self.leak_warning >= longest:
            text = f"expected less than max_lease_seconds ({longest:g}), at which the lease is over"
            raise _located(text, ("leak_warning",))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> "PoolOptions":
        """Return the options that a mapping describes, the rest being defaults.

        Keys are as in `pools.yaml`; the clean-up options may also stand outside `cleanup_options`.

        Raises:
            ConfigError: a key is unknown or a value refused.
        """
        return _options_over(cls(), mapping)

    def changed(self) -> dict[str, Any]:
        """Return what differs from the defaults, as JSON values that `from_mapping` reads back.

        Credentials in URLs are left out, so that the result can be stored.
        """
        pairs = [(field, getattr(self, field.name)) for field in attrs.fields(type(self))]
        return {field.name: field.metadata["kind"].store(v) for field, v in pairs if v != _default_of(field)}


def _options_over(base: PoolOptions, mapping: Mapping[str, object]) -> PoolOptions:
    reader = _Reader()
    options = reader.options(reader.section(mapping, ()), (), base)
    reader.finish()
    return options


def _spec_name(name: str) -> str:
    return str(_under("repo_name", validate_repo_name, name))


def _spec_url(url: str) -> str:
    return str(_under("repo_url", _url, url))


@attrs.frozen
class PoolSpec:
    """A pool that should exist. Its URL may hold credentials; its repr does not.

    Making one raises `ConfigError` for a name or URL that cannot be.
    """

    repo_name: str = attrs.field(converter=_spec_name)
    repo_url: str = attrs.field(converter=_spec_url, repr=lambda url: repr(without_credentials(url)))
    options: PoolOptions = attrs.field(factory=PoolOptions)


def _refused_urls(urls: Mapping[_KeyPath, str], allowed: Sequence[str]) -> Iterator[tuple[_KeyPath, str]]:
    """Yield the paths of the URLs whose protocol is not allowed, and why they are refused."""
    for path, url in urls.items():
        if (protocol := _protocol_of(url)) not in allowed:
            yield path, f"the protocol {_shown(protocol)} is not among allow_protocols ({', '.join(allowed)})"


def _urls_of(options: PoolOptions, path: _KeyPath = ()) -> dict[_KeyPath, str]:
    return {(*path, "remotes", name): url for name, url in options.remotes.items()}


def _all_urls(defaults: PoolOptions, pools: Mapping[str, PoolSpec]) -> dict[_KeyPath, str]:
    urls = _urls_of(defaults, ("defaults",))
    for name, spec in pools.items():
        urls["pools", name, "repo_url"] = spec.repo_url
        urls |= _urls_of(spec.options, ("pools", name)) if spec.options.remotes != defaults.remotes else {}
    return urls


def _copied(pools: Mapping[str, PoolSpec]) -> dict[str, PoolSpec]:
    return dict(pools)


def _workspaces_dir(value: str | os.PathLike[str] | None) -> Path:
    return Path(_under("workspaces_dir", _directory, value))


@attrs.frozen
class PoolConfig:
    """Everything a manager can be told; durations in seconds.

    Making one does no I/O, and raises `ConfigError` for a value out of its range.

    Attributes:
        workspaces_dir: where everything lies; absolute. By default `REPOPOOL_WORKSPACES_DIR` from the environment, else
            the platform's user data directory.
        defaults: what pools are told that nothing else is said of. pools: those that come up at start, by name.
        source: the file all this came from.
    """

    workspaces_dir: Path = attrs.field(
        default=None,
        converter=_workspaces_dir,
        metadata={"kind": _DIRECTORY, "help": "where everything lies; relative to the file's directory"},
    )
    defaults: PoolOptions = attrs.field(factory=PoolOptions, kw_only=True)
    pools: Mapping[str, PoolSpec] = attrs.field(factory=dict, converter=_copied, kw_only=True)
    allow_network_filesystem: bool = _option(_FLAG, False, "whether workspaces_dir may lie on a network file system")
    close_timeout: float = _option(_duration(is_zero_allowed=True), 30.0, "grace period of close()")
    max_git_processes: int | None = _option(
        _or_none(_integer(1, 10_000)), None, "how many git commands run at once; null: twice the cores"
    )
    janitor_interval: float = _option(_duration(), 60.0, "time between two sweeps for orphans")
    allow_protocols: tuple[str, ...] = _option(
        _PROTOCOLS, ("https", "http", "ssh", "git", "file"), "how repositories may be reached"
    )
    watch: Literal["auto", "poll", "never"] = _option(
        _choice("auto", "poll", "never"),
        "auto",
        "how changes of this file are noticed; poll: by reading it each second",
    )
    source: Path | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        """Refuse pools under another name than their own, and URLs that the protocols rule out."""
        for name, spec in self.pools.items():
            if name != spec.repo_name:
                raise _located(f"expected the pool's own name, {_shown(spec.repo_name)}", ("pools", name))
        for path, text in _refused_urls(_all_urls(self.defaults, self.pools), self.allow_protocols):
            raise _located(text, path)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "PoolConfig":
        """Return what a `pools.yaml` says. Blocks on the file; call it in a worker thread.

        Raises:
            ConfigError: the file cannot be read, is not UTF-8 or YAML, or says something that is refused. The message
                has a line for each problem; the attributes are the first one's.
        """
        source = Path(path)
        return cls.from_text(_read_text(source), source)

    @classmethod
    def from_text(cls, text: str, source: str | os.PathLike[str] | None = None) -> "PoolConfig":
        """Return what the text of a `pools.yaml` says.

        Args:
            text: YAML; empty text is a configuration of defaults.
            source: the file it came from, for messages and as the base of a relative `workspaces_dir`.

        Raises:
            ConfigError: as `from_file`.
        """
        reader = _Reader(None if source is None else Path(source))
        return reader.config(reader.parse(text))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> "PoolConfig":
        """Return what a mapping of the shape of `pools.yaml` says.

        Raises:
            ConfigError: a key is unknown or a value refused.
        """
        return _Reader().config(mapping)

    def options_for(self, repo_name: str | None, /, **overrides: object) -> PoolOptions:
        """Return the options of a pool: the overrides, over its own in this configuration, over the defaults.

        Args:
            repo_name: None, or a name that this configuration does not know, means the defaults alone.
            overrides: keys and values as in `pools.yaml`; the clean-up options may also stand outside
                `cleanup_options`.

        Raises:
            ConfigError: a key is unknown or a value refused.
        """
        spec = self.pools.get(repo_name) if repo_name is not None else None
        options = _options_over(self.defaults if spec is None else spec.options, overrides)
        for path, text in _refused_urls(_urls_of(options), self.allow_protocols):
            raise _located(text, path)
        return options

    @property
    def git_process_limit(self) -> int:
        """How many git commands may run at once: `max_git_processes`, or twice the cores."""
        return self.max_git_processes or 2 * (os.cpu_count() or 1)


# Describing -------------------------------------------------------------------------------------------------------


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


def describe(kind: type[PoolOptions] | type[PoolConfig]) -> tuple[OptionInfo, ...]:
    """Return every key of a pool (`PoolOptions`) or of the top level (`PoolConfig`), in the order of the fields."""
    return tuple(_info(field) for field in attrs.fields(kind) if "kind" in field.metadata)


def _info(field: _Field) -> OptionInfo:
    group = field.metadata.get("group")
    return OptionInfo(
        key=f"{group}.{field.name}" if group else field.name,
        name=field.name,
        expected=field.metadata["kind"].expected,
        default=_default_of(field),
        help=field.metadata["help"],
        is_supported=field.name not in UNSUPPORTED,
    )


# Reading ----------------------------------------------------------------------------------------------------------


@functools.cache
def _table(kind: type[PoolOptions] | type[PoolConfig]) -> dict[str, Any]:
    """Return the fields by their key in YAML, with the groups as tables of their own and their fields here as well."""
    table: dict[str, Any] = {field.name: field for field in attrs.fields(kind) if "kind" in field.metadata}
    for name, field in list(table.items()):
        if group := field.metadata.get("group"):
            table.setdefault(group, {})[name] = field
    return table


def _unknown(key: object, known: Sequence[str]) -> str:
    import difflib  # noqa: PLC0415 - importing this module must stay cheap

    text = f"unknown key {_shown(str(key))}"
    if key in _table(PoolOptions):
        return f"{text} here; it belongs to a pool or to defaults"
    if key == "repo_url":
        return f"{text} here; it belongs to a pool"
    if key in _table(PoolConfig):
        return f"{text} here; it belongs to the top level"
    close = difflib.get_close_matches(str(key), known, 1)
    return f'{text}; did you mean "{close[0]}"?' if close else text


class _Reader:
    """Turns a mapping or the text of a file into options; collects what is wrong instead of stopping at the first."""

    def __init__(self, source: Path | None = None) -> None:
        self.source = source
        self.lines: dict[_KeyPath, int] = {}
        self.problems: list[ConfigError] = []

    def parse(self, text: str) -> object:
        """Return the plain value of YAML text, noting the line of every key."""
        if len(text) > _MAX_FILE_BYTES:
            raise _located(f"expected at most {_MAX_FILE_BYTES} bytes of text", source=self.source)
        try:
            return _YamlWalk(self).root(text)
        except RecursionError:
            raise _located("nested too deeply", source=self.source) from None

    def refuse(self, path: _KeyPath, text: str) -> None:
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        self.problems.append(_located(text, path, line=self.lines.get(known), source=self.source))

    def finish(self) -> None:
        """Raise what was refused, if anything was, as one error."""
        if not self.problems:
            return
        problems = sorted(self.problems, key=lambda problem: problem.line or 0)
        texts = [problem.message for problem in problems[:_MAX_PROBLEMS]]
        if len(problems) > len(texts):
            texts.append(f"and {len(problems) - len(texts)} more")
        first = problems[0]
        raise ConfigError("\n".join(texts), key=first.key, line=first.line, source=first.source)

    def section(self, value: object, path: _KeyPath) -> Mapping[str, Any]:
        if not isinstance(value, Mapping | None):
            self.refuse(path, f"expected a mapping, found {_shown(value)}")
            return {}
        return value or {}

    def values(self, section: Mapping[str, Any], path: _KeyPath, table: _Table, *also: str) -> dict[str, Any]:
        """Return the section's values in their final form, by field name; `also` names keys read elsewhere."""
        result: dict[str, Any] = {}
        for key, value in section.items():
            here = (*path, str(key))
            entry = table.get(key)
            if isinstance(entry, Mapping):
                inner = self.section(value, here)
                for name in inner.keys() & section.keys() & entry.keys():
                    self.refuse((*here, name), f"given twice: it also stands outside {key}")
                result |= self.values(inner, here, entry)
            elif entry is not None:
                self.accept(value, here, entry, result)
            elif key not in also:
                self.refuse(here, _unknown(key, [*table, *also]))
        return result

    def accept(self, value: object, path: _KeyPath, field: _Field, into: dict[str, Any]) -> None:
        try:
            into[field.name] = _accepted(value, field)
        except ConfigError as refusal:
            self.refuse(_inside(path, refusal), refusal.message)

    def options(self, section: Mapping[str, Any], path: _KeyPath, base: PoolOptions, *also: str) -> PoolOptions:
        values = self.values(section, path, _table(PoolOptions), *also)
        try:
            return attrs.evolve(base, **values)
        except ConfigError as refusal:
            self.refuse(_inside(path, refusal), refusal.message.removeprefix(f"{refusal.key}: "))
            return base

    def pool(self, name: str, body: object, defaults: PoolOptions) -> PoolSpec | None:
        path: _KeyPath = ("pools", str(name))
        section = self.section(body, path)
        options = self.options(section, path, defaults, "repo_url")
        try:
            validate_repo_name(name)
            path = (*path, "repo_url")
            return PoolSpec(name, _url(section["repo_url"]), options)
        except KeyError:
            self.refuse(path, "missing: expected the URL or path of a repository")
        except ConfigError as refusal:
            self.refuse(path, refusal.message)
        return None

    def config(self, root: object) -> PoolConfig:
        top = self.section(root, ())
        values = self.values(self.beside_source(top), (), _table(PoolConfig), "defaults", "pools")
        path = ("defaults",)
        defaults = self.options(self.section(top.get("defaults"), path), path, PoolOptions())
        bodies = self.section(top.get("pools"), ("pools",))
        specs = [self.pool(name, body, defaults) for name, body in bodies.items()]
        pools = {spec.repo_name: spec for spec in specs if spec is not None}
        allowed = values.get("allow_protocols", _default_of(attrs.fields_dict(PoolConfig)["allow_protocols"]))
        for where, text in _refused_urls(_all_urls(defaults, pools), allowed):
            self.refuse(where, text)
        self.finish()
        return PoolConfig(defaults=defaults, pools=pools, source=self.source, **values)

    def beside_source(self, top: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the top level with a relative `workspaces_dir` joined to the directory of the file."""
        given = top.get("workspaces_dir")
        if self.source is None or not isinstance(given, str) or not given or given.startswith("~") or "://" in given:
            return top
        return {**top, "workspaces_dir": str(self.source.parent / given)}


def refusal_in(source: Path, key: Sequence[str], text: str) -> ConfigError:
    """Return the refusal of a key of a file for a reason that only a running manager knows; blocks on the file."""
    reader = _Reader(source)
    with suppress(ConfigError):  # it changed again meanwhile
        reader.parse(_read_text(source))
    reader.refuse(tuple(key), text)
    return reader.problems[0]


def _read_text(source: Path) -> str:
    try:
        with source.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _located(f"cannot be read: {reason}", source=source) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        text = f"expected UTF-8 text, found the byte 0x{data[error.start]:02x}"
        raise _located(text, line=line, source=source) from None


_TAGS: Final = {
    "MappingNode": {"map"},
    "SequenceNode": {"seq"},
    "ScalarNode": {"null", "bool", "int", "float", "str", "timestamp", "value"},
}


class _YamlWalk:
    """Turns PyYAML's nodes into plain values, and notes for a reader where each key stands.

    PyYAML's own constructor knows no lines, lets the last of two equal keys win, and turns `1:30` into 90.
    """

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader
        self.nodes_left = _MAX_NODES

    def root(self, text: str) -> object:
        import yaml  # noqa: PLC0415 - importing this module must stay cheap

        try:
            node = yaml.SafeLoader(text).get_single_node()
        except yaml.YAMLError as error:
            raise self.bad_yaml(error, text) from None
        except (ValueError, OverflowError) as error:  # from escapes and numbers that PyYAML does not check
            raise _located(f"not valid YAML: {error}", source=self.reader.source) from None
        return None if node is None else self.noted(node, ())

    def bad_yaml(self, error: "yaml.YAMLError", text: str) -> ConfigError:
        mark = getattr(error, "problem_mark", None)
        line = text.count("\n", 0, getattr(error, "position", 0)) if mark is None else mark.line
        # Not str(error): it quotes the line, and with it what may be a password.
        words = (getattr(error, name, None) for name in ("context", "problem", "reason"))
        reason = ", ".join(word for word in words if word)
        return _located(f"not valid YAML: {reason}", line=line + 1, source=self.reader.source)

    def refusal(self, node: "yaml.Node", path: _KeyPath, text: str) -> ConfigError:
        return _located(text, path, line=node.start_mark.line + 1, source=self.reader.source)

    def value(self, node: "yaml.Node", path: _KeyPath) -> object:
        self.nodes_left -= 1  # aliases are followed each time: a few lines of them can stand for billions of nodes
        if self.nodes_left < 0:
            raise self.refusal(node, (), f"expected at most {_MAX_NODES} values, aliases followed")
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag not in _TAGS[type(node).__name__]:
            raise self.refusal(node, path, f"the tag {_shown(node.tag)} is not allowed here")
        if tag == "map":
            return self.mapping(node, path)
        if tag == "seq":
            return [self.noted(item, (*path, f"[{index}]")) for index, item in enumerate(node.value)]
        return _scalar(tag, node.value)

    def noted(self, node: "yaml.Node", path: _KeyPath) -> object:
        self.reader.lines[path] = node.start_mark.line + 1
        return self.value(node, path)

    def mapping(self, node: "yaml.Node", path: _KeyPath) -> dict[str, object]:
        own: set[str] = set()
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise self.refusal(key_node, path, "expected plain text as a key")
            if key in own:
                raise self.refusal(key_node, (*path, key), "given twice")
            own.add(key)
            if key_node.tag.endswith(":merge"):
                result = self.merged(value_node, path)
        for key_node, value_node in node.value:
            if not key_node.tag.endswith(":merge"):
                self.reader.lines[*path, key_node.value] = key_node.start_mark.line + 1
                result[key_node.value] = self.value(value_node, (*path, key_node.value))
        return result

    def merged(self, node: "yaml.Node", path: _KeyPath) -> dict[str, object]:
        """Return what `<<` brings in: a mapping, or several of which the first wins."""
        result: dict[str, object] = {}
        for part in reversed(node.value if type(node).__name__ == "SequenceNode" else [node]):
            value = self.value(part, path)
            if not isinstance(value, dict):
                raise self.refusal(part, (*path, "<<"), f"expected a mapping, found {_shown(value)}")
            result |= value
        return result


def _scalar(tag: str, text: str) -> object:
    """Return a scalar's value; text that only YAML 1.1 takes for a number (`1:30`, `010`) or a date stays text."""
    if tag == "null":
        return None
    if tag == "bool":
        return {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}.get(
            text.lower(), text
        )
    try:
        if tag == "int":
            return int(text.replace("_", ""), 0)
        return float(text) if tag == "float" else text
    except ValueError:
        return text
