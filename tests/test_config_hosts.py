"""What can be said of hosts in `pools.yaml`, what is refused, and where the refusal says that it stands."""

from pathlib import Path

import pytest

from repopool_async import ConfigError, HostSpec, PoolConfig
from repopool_async.config_hosts import chosen_hosts, with_local

TWO = """\
hosts:
  a: {address: local, workspaces_dir: /srv/a/, labels: [big, ssd], capacity: 8}
  b: {address: "me@box.example:2222", workspaces_dir: /srv/b, labels: [big]}
  c: {workspaces_dir: /srv/c, mirror_from: b}
pools:
  web: {repo_url: /tmp/r, hosts: [big]}
"""


def test_hosts_are_read_with_their_defaults() -> None:
    hosts = PoolConfig.from_text(TWO).hosts
    assert hosts["a"] == HostSpec("a", address="local", workspaces_dir="/srv/a", labels=("big", "ssd"), capacity=8)
    assert (hosts["b"].is_local, hosts["b"].mirror_from, hosts["b"].capacity) == (False, None, None)
    assert hosts["c"].mirror_from == "b"


def test_a_host_without_an_address_is_reached_by_its_name() -> None:
    spec = HostSpec("box", workspaces_dir="/srv/pools")
    assert (spec.reached_at, spec.is_local) == ("box", False)


def test_pools_choose_hosts_by_name_or_label_in_their_order() -> None:
    hosts = PoolConfig.from_text(TWO).hosts
    assert chosen_hosts([], hosts) == ["local"]
    assert chosen_hosts(["b", "big"], hosts) == ["b", "a"]
    assert chosen_hosts(["local", "ssd"], hosts) == ["local", "a"]
    assert list(with_local(hosts)) == ["local", "a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "key", "line", "what"),
    [
        ("hosts:\n  a: {address: local}", "hosts.a.workspaces_dir", 2, "an absolute path on the host"),
        ("hosts:\n  a: {workspaces_dir: here}", "hosts.a.workspaces_dir", 2, "an absolute path on the host"),
        ("hosts:\n  a:\n    workspaces_dir: /x\n    capacity: 0", "hosts.a.capacity", 4, "whole number from 1"),
        ("hosts:\n  a: {workspaces_dir: /x, colour: red}", "hosts.a.colour", 2, 'unknown key "colour"'),
        ("hosts:\n  a: {workspaces_dir: /x, address: '-oProxyCommand=x'}", "hosts.a.address", 2, "name of ssh_config"),
        ("hosts:\n  a: {workspaces_dir: /x, host_key: nonsense}", "hosts.a.host_key", 2, "as in a .pub file"),
        ("hosts:\n  a: {workspaces_dir: /x, mirror_from: b}", "hosts.a.mirror_from", 2, 'no host "b"'),
        ("hosts:\n  a: {workspaces_dir: /x, mirror_from: a}", "hosts.a.mirror_from", 2, "its own mirror"),
        ("hosts:\n  local: {workspaces_dir: /x}", "hosts.local", 2, "the manager's own machine"),
        ("hosts:\n  manager: {workspaces_dir: /x}", "hosts.manager", 2, "choose another name"),
        ("hosts:\n  a: {workspaces_dir: /x, mirror_from: manager}", "hosts.a.mirror_from", 2, "reached by SSH cannot"),
        ("hosts: [a]", "hosts", 1, "expected a mapping, found a list"),
        ("pools:\n  web:\n    repo_url: /r\n    hosts: [nowhere]", "pools.web.hosts[0]", 4, "label of a host (local)"),
        ("defaults:\n  hosts: [nowhere]", "defaults.hosts[0]", 2, "label of a host (local)"),
    ],
)
def test_what_cannot_be_is_refused_with_key_and_line(text: str, key: str, line: int, what: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        PoolConfig.from_text(text)
    assert (refusal.value.key, refusal.value.line) == (key, line)
    assert what in str(refusal.value)


def test_hosts_that_would_all_fetch_from_each_other_are_refused() -> None:
    text = "hosts:\n  a: {workspaces_dir: /x, mirror_from: b}\n  b: {workspaces_dir: /x, mirror_from: a}"
    with pytest.raises(ConfigError, match="leads back to the host itself"):
        PoolConfig.from_text(text)


def test_two_hosts_in_one_place_are_refused(tmp_path: Path) -> None:
    hosts = [HostSpec(name, address="local", workspaces_dir="/srv/x") for name in "ab"]
    with pytest.raises(ConfigError, match="a's as well"):
        PoolConfig(tmp_path, hosts=hosts)


def test_a_host_survives_being_stored() -> None:
    spec = HostSpec("a", address="me@box", workspaces_dir="/srv/a", labels=("big",), capacity=3)
    assert HostSpec.from_mapping("a", spec.changed()) == spec
