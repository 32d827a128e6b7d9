"""What pools can be told: the options with their defaults and checks, and what a whole `pools.yaml` says.

Every option is declared once, as a field of `PoolOptions` or `PoolConfig`; reading, refusing and describing follow
from it. All refusals are `ConfigError`s that name the key and, where there is a file, the line; credentials in URLs are
never shown. Not responsible for watching the file, for making pools, or for whether a URL answers.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import attrs

from repopool_async.config_coordination import COORDINATION, Coordination
from repopool_async.config_fields import cleanup_flag, default_of, option, table_of
from repopool_async.config_hosts import HostSpec, checked_hosts, chosen_hosts, read_host, refused_hosts
from repopool_async.config_kinds import (
    COMMAND,
    DIRECTORY,
    FLAG,
    INNER_PATHS,
    PROTOCOLS,
    REF,
    REMOTES,
    SECRET_TEXT,
    SIZE_LIMIT,
    TEXT,
    checked_directory,
    checked_url,
    choice,
    duration,
    integer,
    list_of,
    number,
    or_none,
    without_any_credentials,
)
from repopool_async.config_reader import Reader
from repopool_async.config_refusals import KeyPath, inside, located, shown, under
from repopool_async.config_values import protocol_of, validate_repo_name, without_credentials
from repopool_async.config_yaml import read_text
from repopool_async.exceptions import ConfigError


def _shown_urls(urls: Mapping[str, str]) -> str:
    return repr(without_any_credentials(urls))


@attrs.frozen
class PoolOptions:
    """Everything one pool can be told besides its name and URL; durations in seconds, sizes in bytes.

    Making one takes durations and sizes with units too, and raises `ConfigError` for a value out of its range, for
    values that mean nothing together, and for an option that this version does not support.
    """

    num_slots: int = option(integer(1, 10_000), 1, "how many slots the pool has")
    default_ref: str | None = option(or_none(REF), None, "what is leased when nothing is named; null: remote's default")
    remotes: Mapping[str, str] = option(REMOTES, attrs.Factory(dict), "fetched besides origin", repr=_shown_urls)
    fetch_on_allocate: bool = cleanup_flag("whether a lease begins with a fetch from all remotes")
    clean_on_release: bool = cleanup_flag("whether a slot is cleaned after its lease, not before the next")
    warmup_enabled: bool = cleanup_flag("whether idle slots are made ready ahead")
    lock_timeout: float = option(duration(), 30.0, "how long one slot's lock is waited for")
    cleanup_timeout: float = option(duration(), 600.0, "how long one clean-up may take")
    stale_lock_hours: float = option(number(87_600), 24.0, "age of a lease, in hours, at which it is warned of")
    enable_metrics: bool = option(FLAG, True, "whether allocation times are measured")
    max_slots: int | None = option(or_none(integer(1, 10_000)), None, "how far the pool may grow; null: it does not")
    idle_seconds: float | None = option(or_none(duration()), None, "idleness after which an extra slot goes")
    max_waiting: int | None = option(or_none(integer(0, 10**6)), None, "how many leases may wait; null: any number")
    acquire_timeout: float | None = option(
        or_none(duration(is_zero_allowed=True)), 30.0, "how long a lease is waited for; 0: one try; null: no limit"
    )
    max_lease_seconds: float | None = option(or_none(duration()), None, "age at which a lease is ended by force")
    fetch_max_age: float = option(duration(is_zero_allowed=True), 0.0, "age up to which the last fetch is new enough")
    keep: tuple[str, ...] = option(
        INNER_PATHS,
        (),
        "directories that stay between leases with whatever is in them, such as node_modules",
    )
    setup: tuple[str, ...] | None = option(
        or_none(COMMAND), None, "command run in a slot to fill kept paths when it is made"
    )
    setup_key: tuple[str, ...] = option(INNER_PATHS, (), "files whose change makes setup run again")
    setup_timeout: float = option(duration(), 300.0, "how long setup may take")
    salvage: Literal["never", "abnormal", "always"] = option(
        choice("never", "abnormal", "always"),
        "abnormal",
        "after which leases unpushed work is saved; abnormal: a crash, an expiry, a forced end, a close",
    )
    salvage_days: float = option(number(3650), 30.0, "how many days saved work is kept")
    salvage_limit: int = option(
        SIZE_LIMIT,
        1 << 30,
        "how much of one lease's work is saved: commits first, then the stash, changed files, untracked files",
    )
    disk_limit: int | None = option(or_none(SIZE_LIMIT), None, "how much disk the pool may use")
    isolation: Literal["shared", "full"] = option(
        choice("shared", "full"),
        "shared",
        "shared: slots borrow the mirror's objects; full: each has its own, at the price of twice the history's size a "
        "slot and of copying it once a return",
    )
    run_as: str | None = option(
        or_none(TEXT), None, "user that lessees' commands run as, on whichever host; only root there can do that"
    )
    submodules: bool = option(FLAG, False, "whether submodules are checked out, nested ones too")
    lfs: bool = option(FLAG, False, "whether Git LFS files are fetched; false: they are their pointers")
    sparse: tuple[str, ...] = option(
        INNER_PATHS, (), "the only directories to check out, besides files above them; none: all"
    )
    history: Literal["full", "blobless"] = option(
        choice("full", "blobless"),
        "full",
        "full: everything is fetched; blobless: file contents only as far as check-outs need them",
    )
    cleanup: Literal["background", "inline"] = option(
        choice("background", "inline"), "background", "whether leaving a lease waits for its clean-up"
    )
    rebuild_always: bool = option(
        FLAG, False, "whether every return makes the tree anew, in inodes nobody holds open; it costs a check-out"
    )
    leak_warning: float | None = option(or_none(duration()), None, "age at which a lease's origin is reported")
    hosts: tuple[str, ...] = option(list_of(TEXT), (), "hosts that hold the slots, by name or label; empty: local")
    webhooks: tuple[str, ...] = option(list_of(SECRET_TEXT), (), "URLs told of events", repr=False)
    git_timeout: float = option(duration(), 3600.0, "how long one git command may take")
    git_idle_timeout: float = option(duration(), 300.0, "how long one git command may be silent")
    fetch_attempts: int = option(integer(1, 100), 3, "how often a fetch or clone is tried")
    auto_repair: bool = option(FLAG, True, "whether the janitor tries to repair quarantined slots")

    def __attrs_post_init__(self) -> None:
        """Refuse values that mean nothing together."""
        if self.max_slots is not None and self.max_slots < self.num_slots:
            raise located(f"expected at least num_slots ({self.num_slots}), found {self.max_slots}", ("max_slots",))
        if self.idle_seconds is not None and self.max_slots is None:
            raise located("means nothing without max_slots", ("idle_seconds",))
        self._refuse_keeping()
        if self.isolation == "full" and self.history != "full":
            raise located("cannot be full where history is not: each slot would fetch the rest", ("isolation",))
        if any(re.search(r"[*?\[\]\\]", name) for name in self.sparse):
            raise located("takes directories, not patterns: none of * ? [ ] \\ may be in them", ("sparse",))
        if self.sparse and self.submodules:
            raise located(
                "cannot be had with submodules: git would check them out beside the selection too", ("sparse",)
            )
        if self.history != "full" and self.remotes:
            raise located("cannot be blobless with remotes: only origin promises what is missing", ("history",))
        if self.lfs and self.hosts:
            raise located("cannot be had where hosts are: the pool's filter runs on this machine", ("lfs",))
        longest = self.max_lease_seconds
        if self.leak_warning is not None and longest is not None and self.leak_warning >= longest:
            text = f"expected less than max_lease_seconds ({longest:g}), at which the lease is over"
            raise located(text, ("leak_warning",))

    def _refuse_keeping(self) -> None:
        """Refuse kept paths that lie in each other, or where nothing that a lessee had is used again; setup without."""
        if self.setup_key and self.setup is None:
            raise located("means nothing without setup", ("setup_key",))
        if self.setup is not None and not self.keep:
            raise located("means nothing without keep: what it makes would be cleaned away", ("setup",))
        names = [name.rstrip("/") for name in self.keep]
        for index, name in enumerate(names):
            if any(name == other or name.startswith(f"{other}/") for other in names[:index] + names[index + 1 :]):
                raise located(f"{shown(name)} is named twice, or lies in another of them", ("keep", f"[{index}]"))
        for option_name in ("run_as", "rebuild_always") if names else ():
            if getattr(self, option_name):
                text = f"cannot be combined with {option_name}: nothing that a lessee had is used again there"
                raise located(text, ("keep",))

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
        return {field.name: field.metadata["kind"].store(v) for field, v in pairs if v != default_of(field)}


def _options_over(base: PoolOptions, mapping: Mapping[str, object]) -> PoolOptions:
    reader = _reader()
    options = _options(reader, reader.section(mapping, ()), (), base)
    reader.finish()
    return options


def _spec_name(name: str) -> str:
    return str(under("repo_name", validate_repo_name, name))


def _spec_url(url: str) -> str:
    return str(under("repo_url", checked_url, url))


@attrs.frozen
class PoolSpec:
    """A pool that should exist. Its URL may hold credentials; its repr does not.

    Making one raises `ConfigError` for a name or URL that cannot be.
    """

    repo_name: str = attrs.field(converter=_spec_name)
    repo_url: str = attrs.field(converter=_spec_url, repr=lambda url: repr(without_credentials(url)))
    options: PoolOptions = attrs.field(factory=PoolOptions)


def _refused_urls(urls: Mapping[KeyPath, str], allowed: Sequence[str]) -> Iterator[tuple[KeyPath, str]]:
    """Yield the paths of the URLs whose protocol is not allowed, and why they are refused."""
    for path, url in urls.items():
        if (protocol := protocol_of(url)) not in allowed:
            yield path, f"the protocol {shown(protocol)} is not among allow_protocols ({', '.join(allowed)})"


def _urls_of(options: PoolOptions, path: KeyPath = ()) -> dict[KeyPath, str]:
    return {(*path, "remotes", name): url for name, url in options.remotes.items()}


def _all_urls(defaults: PoolOptions, pools: Mapping[str, PoolSpec]) -> dict[KeyPath, str]:
    urls = _urls_of(defaults, ("defaults",))
    for name, spec in pools.items():
        urls["pools", name, "repo_url"] = spec.repo_url
        urls |= _urls_of(spec.options, ("pools", name)) if spec.options.remotes != defaults.remotes else {}
    return urls


def _refused_choices(
    hosts: Mapping[str, HostSpec], defaults: PoolOptions, pools: Mapping[str, PoolSpec]
) -> Iterator[tuple[KeyPath, str]]:
    """Yield where a pool asks for a host that there is not, and why that is refused."""
    asked: dict[KeyPath, tuple[str, ...]] = {("defaults", "hosts"): defaults.hosts}
    for name, spec in pools.items():
        if spec.options.hosts != defaults.hosts:
            asked["pools", name, "hosts"] = spec.options.hosts
    for path, words in asked.items():
        try:
            chosen_hosts(words, hosts)
        except ConfigError as refusal:
            yield inside(path, refusal), refusal.message


def _refused(
    hosts: Mapping[str, HostSpec], defaults: PoolOptions, pools: Mapping[str, PoolSpec], allowed: Sequence[str]
) -> Iterator[tuple[KeyPath, str]]:
    """Yield what makes no sense together: where it stands, and why."""
    yield from refused_hosts(hosts)
    yield from _refused_choices(hosts, defaults, pools)
    yield from _refused_urls(_all_urls(defaults, pools), allowed)


def _copied(pools: Mapping[str, PoolSpec]) -> dict[str, PoolSpec]:
    return dict(pools)


def _workspaces_dir(value: str | os.PathLike[str] | None) -> Path:
    return Path(under("workspaces_dir", checked_directory, value))


@attrs.frozen
class PoolConfig:
    """Everything a manager can be told; durations in seconds.

    Making one does no I/O, and raises `ConfigError` for a value out of its range.

    Attributes:
        workspaces_dir: where everything lies; absolute. By default `REPOPOOL_WORKSPACES_DIR` from the environment, else
            the platform's user data directory.
        hosts: the machines that can hold slots besides the manager's own, by name.
        defaults: what pools are told that nothing else is said of. pools: those that come up at start, by name.
        source: the file all this came from.
    """

    workspaces_dir: Path = attrs.field(
        default=None,
        converter=_workspaces_dir,
        metadata={"kind": DIRECTORY, "help": "where everything lies; relative to the file's directory"},
    )
    hosts: Mapping[str, HostSpec] = attrs.field(factory=dict, converter=checked_hosts, kw_only=True)
    defaults: PoolOptions = attrs.field(factory=PoolOptions, kw_only=True)
    pools: Mapping[str, PoolSpec] = attrs.field(factory=dict, converter=_copied, kw_only=True)
    allow_network_filesystem: bool = option(FLAG, False, "whether workspaces_dir may lie on a network file system")
    close_timeout: float = option(duration(is_zero_allowed=True), 30.0, "grace period of close()")
    max_git_processes: int | None = option(
        or_none(integer(1, 10_000)), None, "how many git commands run at once; null: twice the cores"
    )
    janitor_interval: float = option(duration(), 60.0, "time between two sweeps for orphans")
    allow_protocols: tuple[str, ...] = option(
        PROTOCOLS, ("https", "http", "ssh", "git", "file"), "how repositories may be reached"
    )
    watch: Literal["auto", "poll", "never"] = option(
        choice("auto", "poll", "never"),
        "auto",
        "how changes of this file are noticed; poll: by reading it each second",
    )
    coordination: Coordination | None = option(  # noqa: RUF009 - a field, as above; it is what is in it that is new
        or_none(COORDINATION), None, "what the state of slots is kept in; null: files of workspaces_dir"
    )
    source: Path | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        """Refuse pools and hosts under another name than their own, and what makes no sense together."""
        for name, spec in self.pools.items():
            if name != spec.repo_name:
                raise located(f"expected the pool's own name, {shown(spec.repo_name)}", ("pools", name))
        for path, text in _refused(self.hosts, self.defaults, self.pools, self.allow_protocols):
            raise located(text, path)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "PoolConfig":
        """Return what a `pools.yaml` says. Blocks on the file; call it in a worker thread.

        Raises:
            ConfigError: the file cannot be read, is not UTF-8 or YAML, or says something that is refused. The message
                has a line for each problem; the attributes are the first one's.
        """
        source = Path(path)
        return cls.from_text(read_text(source), source)

    @classmethod
    def from_text(cls, text: str, source: str | os.PathLike[str] | None = None) -> "PoolConfig":
        """Return what the text of a `pools.yaml` says.

        Args:
            text: YAML; empty text is a configuration of defaults.
            source: the file it came from, for messages and as the base of a relative `workspaces_dir`.

        Raises:
            ConfigError: as `from_file`.
        """
        reader = _reader(None if source is None else Path(source))
        return _config(reader, reader.parse(text))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> "PoolConfig":
        """Return what a mapping of the shape of `pools.yaml` says.

        Raises:
            ConfigError: a key is unknown or a value refused.
        """
        return _config(_reader(), mapping)

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
            raise located(text, path)
        return options

    @property
    def git_process_limit(self) -> int:
        """How many git commands may run at once: `max_git_processes`, or twice the cores."""
        return self.max_git_processes or 2 * (os.cpu_count() or 1)


# Reading ----------------------------------------------------------------------------------------------------------


def _reader(source: Path | None = None) -> Reader:
    homes = dict.fromkeys(table_of(PoolConfig), "the top level")
    homes |= {"repo_url": "a pool"} | dict.fromkeys(table_of(PoolOptions), "a pool or to defaults")
    return Reader(homes, source)


def _options(reader: Reader, section: Mapping[str, Any], path: KeyPath, base: PoolOptions, *also: str) -> PoolOptions:
    values = reader.values(section, path, table_of(PoolOptions), *also)
    try:
        return attrs.evolve(base, **values)
    except ConfigError as refusal:
        reader.refuse(inside(path, refusal), refusal.message.removeprefix(f"{refusal.key}: "))
        return base


def _pool(reader: Reader, name: str, body: object, defaults: PoolOptions) -> PoolSpec | None:
    path: KeyPath = ("pools", str(name))
    section = reader.section(body, path)
    options = _options(reader, section, path, defaults, "repo_url")
    try:
        validate_repo_name(name)
        path = (*path, "repo_url")
        return PoolSpec(name, checked_url(section["repo_url"]), options)
    except KeyError:
        reader.refuse(path, "missing: expected the URL or path of a repository")
    except ConfigError as refusal:
        reader.refuse(path, refusal.message)
    return None


def _config(reader: Reader, root: object) -> PoolConfig:
    top = reader.section(root, ())
    values = reader.values(_beside_source(reader.source, top), (), table_of(PoolConfig), "hosts", "defaults", "pools")
    known = [read_host(reader, name, body) for name, body in reader.section(top.get("hosts"), ("hosts",)).items()]
    hosts = {spec.name: spec for spec in known if spec is not None}
    path = ("defaults",)
    defaults = _options(reader, reader.section(top.get("defaults"), path), path, PoolOptions())
    bodies = reader.section(top.get("pools"), ("pools",))
    specs = [_pool(reader, name, body, defaults) for name, body in bodies.items()]
    pools = {spec.repo_name: spec for spec in specs if spec is not None}
    allowed = values.get("allow_protocols", default_of(attrs.fields_dict(PoolConfig)["allow_protocols"]))
    is_readable = None not in known  # what refers to a host that was refused is not wrong itself
    for where, text in _refused(hosts, defaults, pools, allowed) if is_readable else ():
        reader.refuse(where, text)
    reader.finish()
    return PoolConfig(hosts=hosts, defaults=defaults, pools=pools, source=reader.source, **values)


def _beside_source(source: Path | None, top: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the top level with a relative `workspaces_dir` joined to the directory of the file."""
    given = top.get("workspaces_dir")
    if source is None or not isinstance(given, str) or not given or given.startswith("~") or "://" in given:
        return top
    return {**top, "workspaces_dir": str(source.parent / given)}


def refusal_in(source: Path, key: Sequence[str], text: str) -> ConfigError:
    """Return the refusal of a key of a file for a reason that only a running manager knows; blocks on the file."""
    reader = _reader(source)
    with suppress(ConfigError):  # it changed again meanwhile
        reader.parse(read_text(source))
    reader.refuse(tuple(key), text)
    return reader.problems[0]
