"""Options of later versions are known and refused, and every option describes itself."""

import json
from typing import Any

import attrs
import pytest

from repopool_async import config_fields
from repopool_async.config import PoolConfig, PoolOptions
from repopool_async.config_fields import UNSUPPORTED, describe
from repopool_async.exceptions import ConfigError

SAMPLES: dict[str, Any] = {
    "max_slots": 8,
    "idle_seconds": "10m",
    "max_lease_seconds": "1h",
    "keep": ["node_modules"],
    "setup": "npm ci",
    "setup_key": ["package-lock.json"],
    "salvage": "always",
    "salvage_days": 3,
    "salvage_limit": "5GB",
    "disk_limit": "50GiB",
    "isolation": "full",
    "run_as": "nobody",
    "submodules": True,
    "lfs": True,
    "sparse": ["src"],
    "history": "blobless",
    "rebuild_always": True,
    "leak_warning": "5m",
    "hosts": ["build1"],
    "webhooks": ["https://example.org/hook"],
}


@pytest.fixture
def all_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the options of later versions through, to see that their checks stand ready."""
    monkeypatch.setattr(config_fields, "UNSUPPORTED", frozenset())


class TestUnsupportedOptions:
    def test_are_known_options_each_with_a_sample_here(self) -> None:
        assert set(SAMPLES) >= UNSUPPORTED
        assert set(PoolOptions().changed()) == set()
        assert {info.name for info in describe(PoolOptions)} >= UNSUPPORTED

    @pytest.mark.parametrize("name", sorted(UNSUPPORTED))
    def test_are_refused_honestly_everywhere(self, name: str) -> None:
        value = SAMPLES[name]
        text = f"pools:\n  web:\n    repo_url: /srv/web.git\n    {name}: {json.dumps(value)}\n"
        with pytest.raises(ConfigError) as caught:
            PoolConfig.from_text(text, "pools.yaml")
        assert str(caught.value).startswith(
            f"pools.yaml:4: pools.web.{name}: this version does not support this option"
        )
        with pytest.raises(ConfigError, match="does not support"):
            PoolConfig().options_for(None, **{name: value})
        with pytest.raises(ConfigError, match="does not support"):
            PoolOptions(**{name: value})

    @pytest.mark.parametrize("name", sorted(UNSUPPORTED))
    def test_may_be_set_to_what_they_are_anyway(self, name: str) -> None:
        default = getattr(PoolOptions(), name)
        assert PoolConfig.from_mapping({"defaults": {name: default}}).defaults == PoolOptions()

    @pytest.mark.parametrize("name", sorted(SAMPLES))
    def test_have_their_checks_ready(self, name: str, all_supported: None) -> None:
        companions: dict[str, dict[str, Any]] = {
            "idle_seconds": {"max_slots": 8},
            "setup": {"keep": ["a"]},
            "setup_key": {"setup": ["true"], "keep": ["a"]},
        }
        options = PoolConfig().options_for(None, **{name: SAMPLES[name], **companions.get(name, {})})
        assert name in options.changed()
        assert PoolOptions.from_mapping(json.loads(json.dumps(options.changed()))) == options

    @pytest.mark.parametrize(
        ("key", "mapping"),
        [
            ("max_slots", {"num_slots": 5, "max_slots": 4}),
            ("idle_seconds", {"idle_seconds": 5}),
            ("setup_key", {"setup_key": ["a"]}),
            ("setup", {"setup": "echo 'open"}),
            ("setup", {"setup": ""}),
            ("setup", {"setup": "true"}),
            ("setup", {"setup": []}),
            ("setup", {"setup": ["a", 1]}),
            ("keep", {"keep": "node_modules"}),
            ("keep[1]", {"keep": ["a", "../b"]}),
            ("keep[0]", {"keep": ["/a"]}),
            ("keep[0]", {"keep": [".git/x"]}),
            ("keep[0]", {"keep": ["."]}),
            ("keep[0]", {"keep": [""]}),
            ("keep[0]", {"keep": ["a/b", "c", "a"]}),
            ("keep[0]", {"keep": ["a", "a/"]}),
            ("keep", {"keep": ["a"], "run_as": "nobody"}),
            ("keep", {"keep": ["a"], "rebuild_always": True}),
            ("disk_limit", {"disk_limit": 0}),
            ("salvage_limit", {"salvage_limit": "lots"}),
            ("salvage", {"salvage": "sometimes"}),
        ],
    )
    def test_refuse_what_means_nothing(self, key: str, mapping: dict[str, Any], all_supported: None) -> None:
        with pytest.raises(ConfigError) as caught:
            PoolOptions.from_mapping(mapping)
        assert caught.value.key == key
        assert str(caught.value).count(f"{key}: ") == 1

    def test_split_a_command_without_a_shell(self, all_supported: None) -> None:
        assert PoolOptions.from_mapping({"keep": ["x"], "setup": "sh -c 'a; b' $HOME"}).setup == (
            "sh",
            "-c",
            "a; b",
            "$HOME",
        )

    def test_take_a_list_with_all_items_commented_out_as_empty(self) -> None:
        assert PoolConfig.from_text("defaults:\n  keep:\n  #  - node_modules\n  remotes:\n").defaults == PoolOptions()


class TestDescriptions:
    def test_every_option_is_described_once_with_words(self) -> None:
        described = describe(PoolOptions)
        assert [info.name for info in described] == [field.name for field in attrs.fields(PoolOptions)]
        assert all(info.expected and info.help for info in described)
        by_key = {info.key: info for info in described}
        assert by_key["cleanup_options.warmup_enabled"].name == "warmup_enabled"
        assert by_key["lfs"].is_supported is True
        assert by_key["webhooks"].is_supported is False
        assert by_key["num_slots"].default == 1

    def test_every_top_level_key_is_described(self) -> None:
        assert [info.key for info in describe(PoolConfig)] == [
            "workspaces_dir",
            "allow_network_filesystem",
            "close_timeout",
            "max_git_processes",
            "janitor_interval",
            "allow_protocols",
            "watch",
            "coordination",
        ]
