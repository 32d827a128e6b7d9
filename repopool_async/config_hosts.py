"""What a manager can be told about the machines that hold its slots: `hosts:` of `pools.yaml`.

Only what can be said of one machine, and whether all of it makes sense together. How a machine is reached, and what
becomes of it, is not known here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from repopool_async.config_fields import default_of, option, table_of
from repopool_async.config_kinds import Kind, integer, list_of, or_none, text_kind
from repopool_async.config_reader import Reader
from repopool_async.config_refusals import KeyPath, located, shown, under, unexpected
from repopool_async.exceptions import ConfigError
from repopool_async.models import LOCAL_HOST

MANAGER: Final = "manager"
"""As `mirror_from`: the manager's own mirror, whether or not the manager's machine holds slots."""

_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_ADDRESS: Final = re.compile(
    r"(?:[^\s@:\[\]-][^\s@:\[\]]*@)?(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
)
_KEY: Final = re.compile(r"(?:ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/]+=*(?: [^\n]*)?")


def _is_host_path(text: str) -> bool:
    return text.startswith("/") and text.isprintable() and ".." not in text.split("/")


HOST_NAME: Final = text_kind(
    'a host\'s name of letters, digits, ".", "_" or "-"', lambda text: _NAME.fullmatch(text) is not None
)
_LABELS: Final = list_of(
    text_kind('a label of letters, digits, ".", "_" or "-"', lambda v: _NAME.fullmatch(v) is not None)
)
_HOST_ADDRESS: Final = text_kind(
    '"local", a name of ssh_config, or user@host:port', lambda text: _ADDRESS.fullmatch(text) is not None
)
_HOST_KEY: Final = text_kind("a host key as in a .pub file", lambda text: _KEY.fullmatch(text) is not None)
_HOST_DIRECTORY: Final = text_kind("an absolute path on the host, without ..", _is_host_path)


def _without_slash(kind: Kind) -> Kind:
    return attrs.evolve(kind, convert=lambda value: kind.convert(value).rstrip("/") or "/")


def _spec_name(name: str) -> str:
    return str(under("name", HOST_NAME.convert, name))


@attrs.frozen
class HostSpec:
    """A machine that can hold slots.

    Making one raises `ConfigError` for what cannot be.

    Attributes:
        name: what records, `hosts` of a pool and `repopool hosts` call it. The name `local` is the manager's own
            machine and workspaces directory, which is always there.
        host: how it is reached, where that is not by its address; anything that fulfils `Host`.
    """

    name: str = attrs.field(converter=_spec_name)
    address: str | None = option(
        or_none(_HOST_ADDRESS), None, "`local`, a name of ssh_config, or user@host:port; null: the host's own name"
    )
    workspaces_dir: str | None = option(
        or_none(_without_slash(_HOST_DIRECTORY)), None, "where everything lies on the host; an absolute path there"
    )
    labels: tuple[str, ...] = option(_LABELS, (), "words by which pools choose hosts")
    capacity: int | None = option(
        or_none(integer(1, 1_000_000)),
        None,
        "how many slots it can hold, of all pools; slots are spread in proportion; null: no limit, counted as 100",
    )
    host_key: str | None = option(or_none(_HOST_KEY), None, "the only host key accepted, as in a .pub file")
    mirror_from: str | None = option(
        or_none(HOST_NAME), None, "the host, or `manager`, whose mirror it fetches from; null: from the origin"
    )
    host: Any = attrs.field(default=None, kw_only=True, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        """Refuse values that mean nothing together."""
        if self.name == MANAGER:
            raise located(f"{MANAGER} is what mirror_from calls the manager itself; choose another name", ())
        if self.name == LOCAL_HOST and (not self.is_local or self.workspaces_dir is not None):
            raise located(f"{LOCAL_HOST} is the manager's own machine and workspaces_dir; choose another name", ())
        if self.name != LOCAL_HOST and self.workspaces_dir is None:
            raise located("missing: expected an absolute path on the host", ("workspaces_dir",))
        if self.mirror_from == self.name:
            raise located("a host cannot fetch from its own mirror", ("mirror_from",))
        if self.host_key is not None and self.is_local:
            raise located("means nothing without an address that SSH reaches", ("host_key",))

    @property
    def is_local(self) -> bool:
        """Whether it is the manager's machine."""
        return self.reached_at == LOCAL_HOST

    @property
    def reached_at(self) -> str:
        """The address, or the name where none is given."""
        return self.address or self.name

    @classmethod
    def from_mapping(cls, name: str, mapping: Mapping[str, object]) -> "HostSpec":
        """Return the host that a mapping as in `pools.yaml` describes.

        Raises:
            ConfigError: a key is unknown or a value refused.
        """
        reader = Reader({})
        spec = read_host(reader, name, mapping)
        reader.finish()
        assert spec is not None
        return spec

    def changed(self) -> dict[str, Any]:
        """Return what differs from the defaults, as JSON values that `from_mapping` reads back."""
        fields = [field for field in attrs.fields(type(self)) if "kind" in field.metadata]
        pairs = [(field, getattr(self, field.name)) for field in fields]
        return {field.name: field.metadata["kind"].store(v) for field, v in pairs if v != default_of(field)}


def read_host(reader: Reader, name: str, body: object) -> HostSpec | None:
    """Return a host as a mapping describes it; None, and refusals, where it cannot be."""
    path: KeyPath = ("hosts", str(name))
    before = len(reader.problems)
    values = reader.values(reader.section(body, path), path, table_of(HostSpec))
    if len(reader.problems) > before:
        return None
    try:
        return HostSpec(name, **values)
    except ConfigError as refusal:
        text = refusal.message.removeprefix(f"{refusal.key}: ")
        reader.refuse((*path, refusal.key) if refusal.key not in (None, "name") else path, text)
        return None


def checked_hosts(hosts: Mapping[str, HostSpec] | Sequence[HostSpec] | None) -> dict[str, HostSpec]:
    """Return hosts by name; raises `ConfigError` where two have one name."""
    if isinstance(hosts, Mapping):
        return dict(hosts)
    by_name: dict[str, HostSpec] = {}
    for spec in hosts or ():
        if not isinstance(spec, HostSpec):
            raise located(f"expected a HostSpec, found {shown(spec)}", ("hosts",))
        if spec.name in by_name:
            raise located("given twice", ("hosts", spec.name))
        by_name[spec.name] = spec
    return by_name


def with_local(hosts: Mapping[str, HostSpec]) -> dict[str, HostSpec]:
    """Return the hosts and the manager's own machine, which is always among them."""
    return {LOCAL_HOST: HostSpec(LOCAL_HOST), **hosts}


def chosen_hosts(wanted: Sequence[str], hosts: Mapping[str, HostSpec]) -> list[str]:
    """Return the names of the hosts that a pool's `hosts` means: by name or by label, each once, in that order.

    Raises:
        ConfigError: a word is neither a name nor a label; its `key` is where it stands in the list.
    """
    known = with_local(hosts)
    for index, word in enumerate(wanted):
        if not _meant(word, known):
            words = sorted({*known, *(label for spec in known.values() for label in spec.labels)})
            raise unexpected(f"the name or a label of a host ({', '.join(words)})", word, key=f"[{index}]")
    return present_hosts(wanted, hosts)


def present_hosts(wanted: Sequence[str], hosts: Mapping[str, HostSpec]) -> list[str]:
    """Return what `chosen_hosts` does, passing over hosts that are not there (any more)."""
    known = with_local(hosts)
    return list(dict.fromkeys(name for word in wanted or (LOCAL_HOST,) for name in _meant(word, known)))


def _meant(word: str, known: Mapping[str, HostSpec]) -> list[str]:
    return [word] if word in known else [name for name, spec in known.items() if word in spec.labels]


def refused_hosts(hosts: Mapping[str, HostSpec]) -> Iterator[tuple[KeyPath, str]]:
    """Yield what makes no sense of all hosts together: where it stands, and why."""
    for name, spec in hosts.items():
        if name != spec.name:
            yield ("hosts", name), f"expected the host's own name, {shown(spec.name)}"
        if spec.mirror_from is None:
            continue
        path = ("hosts", name, "mirror_from")
        if spec.mirror_from not in {MANAGER, *with_local(hosts)}:
            yield path, f"there is no host {shown(spec.mirror_from)}; expected one of them, or {MANAGER}"
        elif not spec.is_local and with_local(hosts).get(spec.mirror_from, HostSpec(LOCAL_HOST)).is_local:
            yield path, "is on the manager's machine, which a host reached by SSH cannot fetch from; name such a host"
        elif _is_circular(name, hosts):
            yield path, "leads back to the host itself, so nobody would fetch from the origin"
    for name, other in _same_places(hosts):
        yield ("hosts", name, "workspaces_dir"), f"is {other}'s as well; each host needs its own"


def _is_circular(name: str, hosts: Mapping[str, HostSpec]) -> bool:
    seen = {name}
    source = hosts[name].mirror_from
    while source is not None and source in hosts:
        if source in seen:
            return True
        seen.add(source)
        source = hosts[source].mirror_from
    return False


def _same_places(hosts: Mapping[str, HostSpec]) -> Iterator[tuple[str, str]]:
    seen: dict[tuple[str, str | None], str] = {}
    for name, spec in hosts.items():
        if spec.host is None and (other := seen.setdefault((spec.reached_at, spec.workspaces_dir), name)) != name:
            yield name, other
