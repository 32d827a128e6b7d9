"""The configuration: what is read, what is refused, and that a refusal says where, what and nothing secret."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repopool_async.config import PoolConfig, PoolOptions, PoolSpec
from repopool_async.config_fields import describe
from repopool_async.exceptions import ConfigError

EVERYTHING = """\
workspaces_dir: /var/lib/repopool
allow_network_filesystem: true
close_timeout: 1m
max_git_processes: 7
janitor_interval: 2m
allow_protocols: [https, ssh]
defaults:
  num_slots: 2
  cleanup_options:
    fetch_on_allocate: false
pools:
  web:
    repo_url: https://example.org/web.git
    num_slots: 4
    cleanup_options: {warmup_enabled: false}
    remotes:
      upstream: git@example.org:up/web.git
    acquire_timeout: 1h30m
  docs:
    repo_url: ssh://git@example.org/docs.git
"""


def refusal(text: str, source: str | None = "pools.yaml") -> ConfigError:
    """Return the error that a file's text is refused with."""
    with pytest.raises(ConfigError) as caught:
        PoolConfig.from_text(text, source)
    return caught.value


def pool_refusal(body: str) -> ConfigError:
    """Return the error for one more line in a pool, which is line 4 of the file."""
    return refusal(f"pools:\n  web:\n    repo_url: /srv/web.git\n    {body}\n")


class TestPoolNames:
    def test_are_checked_where_they_stand_in_the_file(self) -> None:
        error = refusal("pools:\n  web: {repo_url: /a}\n  a/b: {repo_url: /b}\n")
        assert (error.key, error.line) == ("pools.a/b", 3)

    def test_that_yaml_takes_for_something_else_are_text(self) -> None:
        config = PoolConfig.from_text("pools:\n  404: {repo_url: /a}\n  on: {repo_url: /b}\n  1.10: {repo_url: /c}\n")
        assert list(config.pools) == ["404", "on", "1.10"]


class TestReading:
    def test_takes_every_part_of_a_file(self) -> None:
        config = PoolConfig.from_text(EVERYTHING, "etc/pools.yaml")
        assert config.workspaces_dir == Path("/var/lib/repopool")
        assert config.allow_network_filesystem is True
        assert (config.close_timeout, config.janitor_interval) == (60.0, 120.0)
        assert config.max_git_processes == config.git_process_limit == 7
        assert config.allow_protocols == ("https", "ssh")
        assert config.source == Path("etc/pools.yaml")
        assert config.defaults == PoolOptions(num_slots=2, fetch_on_allocate=False)
        assert config.pools["web"] == PoolSpec(
            "web",
            "https://example.org/web.git",
            PoolOptions(
                num_slots=4,
                fetch_on_allocate=False,
                warmup_enabled=False,
                remotes={"upstream": "git@example.org:up/web.git"},
                acquire_timeout=5400,
            ),
        )
        assert config.pools["docs"].options == config.defaults

    @pytest.mark.parametrize(
        "text", ["", "\n", "# nothing yet\n", "---\n", "pools:\n", "pools: {}\ndefaults:\n", "\ufeff"]
    )
    def test_an_empty_file_is_all_defaults(self, text: str) -> None:
        config = PoolConfig.from_text(text)
        assert (config.pools, config.defaults) == ({}, PoolOptions())

    def test_from_a_mapping_is_the_same_as_from_text(self) -> None:
        mapping = {
            "defaults": {"lock_timeout": "1m"},
            "pools": {"web": {"repo_url": "/srv/web.git", "cleanup_options": {"clean_on_release": False}}},
        }
        assert PoolConfig.from_mapping(mapping) == PoolConfig.from_text(json.dumps(mapping))

    def test_from_a_mapping_refuses_by_key_without_a_line(self) -> None:
        with pytest.raises(ConfigError) as caught:
            PoolConfig.from_mapping({"pools": {"web": {"repo_url": "/x", "num_slots": 0}}})
        assert str(caught.value) == "pools.web.num_slots: expected a whole number from 1 to 10000, found 0"
        assert (caught.value.key, caught.value.line, caught.value.source) == ("pools.web.num_slots", None, None)

    def test_a_file_is_read_with_its_path_as_source(self, tmp_path: Path) -> None:
        path = tmp_path / "pools.yaml"
        path.write_bytes(b"\xef\xbb\xbf" + EVERYTHING.encode())
        assert PoolConfig.from_file(path) == PoolConfig.from_text(EVERYTHING, path)
        assert PoolConfig.from_file(str(path)).source == path

    def test_anchors_aliases_and_merges_work_and_own_keys_win(self) -> None:
        config = PoolConfig.from_text(
            "defaults: &usual {num_slots: 3, lock_timeout: 5}\n"
            "pools:\n"
            "  a: {repo_url: &url /srv/a, num_slots: 4, <<: *usual}\n"
            "  b: {repo_url: *url, <<: [{num_slots: 9}, *usual]}\n"
        )
        assert (config.pools["a"].options.num_slots, config.pools["a"].options.lock_timeout) == (4, 5.0)
        assert (config.pools["b"].options.num_slots, config.pools["b"].options.lock_timeout) == (9, 5.0)
        assert config.pools["b"].repo_url == "/srv/a"

    def test_a_date_or_a_quoted_number_is_a_fine_ref(self) -> None:
        config = PoolConfig.from_text(
            'pools:\n  a: {repo_url: /a, default_ref: 2024-01-01}\n  b: {repo_url: /b, default_ref: "1.10"}'
        )
        assert [spec.options.default_ref for spec in config.pools.values()] == ["2024-01-01", "1.10"]

    def test_cleanup_options_may_stand_in_the_pool_itself(self) -> None:
        config = PoolConfig.from_text("defaults: {warmup_enabled: false}")
        assert config.defaults == PoolOptions(warmup_enabled=False)

    def test_importing_costs_none_of_the_slow_modules(self) -> None:
        script = (
            "import sys, asyncio, attrs; before = set(sys.modules); import repopool_async.config\n"
            "print(*sorted({'yaml', 'platformdirs', 'difflib', 'shlex', 'decimal'} & (set(sys.modules) - before)))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == ""


class TestRefusals:
    def test_a_wrong_value_says_file_line_key_what_was_expected_and_what_was_found(self) -> None:
        error = pool_refusal("lock_timeout: soon")
        assert str(error) == (
            'pools.yaml:4: pools.web.lock_timeout: expected a duration such as 30, "30s" or "5m", found "soon"'
        )
        assert (error.key, error.line, error.source) == ("pools.web.lock_timeout", 4, "pools.yaml")

    def test_survive_pickling(self) -> None:
        error = pool_refusal("lock_timeout: soon")
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.key, again.line) == (str(error), error.key, error.line)

    def test_text_without_a_file_has_lines_all_the_same(self) -> None:
        assert str(refusal("\nnope: 1\n", None)).startswith("line 2: nope: unknown key")

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("num_slots: 0", "expected a whole number from 1 to 10000, found 0"),
            ("num_slots: 10001", "expected a whole number from 1 to 10000, found 10001"),
            ("num_slots: 4.0", "expected a whole number from 1 to 10000, found 4.0"),
            ("num_slots: yes", "expected a whole number from 1 to 10000, found true"),
            ('num_slots: "4"', 'expected a whole number from 1 to 10000, found "4"'),
            ("num_slots: 010", 'expected a whole number from 1 to 10000, found "010"'),
            ("num_slots:", "expected a whole number from 1 to 10000, found nothing"),
            ("num_slots: [1]", "expected a whole number from 1 to 10000, found a list"),
            ("num_slots: {a: 1}", "expected a whole number from 1 to 10000, found a mapping"),
            ("num_slots: 0x" + "f" * 6000, "expected a whole number from 1 to 10000, found a huge number"),
            ("lock_timeout: 0", "expected a duration greater than 0, at most 3650 days, found 0"),
            ("lock_timeout: 1:30", 'expected a duration such as 30, "30s" or "5m", found "1:30"'),
            ("lock_timeout: .inf", 'expected a duration such as 30, "30s" or "5m", found ".inf"'),
            ("cleanup_timeout: 0s", 'expected a duration greater than 0, at most 3650 days, found "0s"'),
            ("cleanup_timeout: 3651d", 'expected a duration greater than 0, at most 3650 days, found "3651d"'),
            ("acquire_timeout: 3651d", 'expected a duration from 0 to 3650 days, found "3651d"'),
            ("git_timeout: null", "expected a duration such as"),
            ("stale_lock_hours: 0", "expected a number greater than 0, at most 87600, found 0"),
            ("max_waiting: -1", "expected a whole number from 0 to 1000000, found -1"),
            ("fetch_attempts: 0", "expected a whole number from 1 to 100, found 0"),
            ("enable_metrics: maybe", 'expected true or false, found "maybe"'),
            ("enable_metrics: 1", "expected true or false, found 1"),
            ("cleanup: later", 'expected "background" or "inline", found "later"'),
            ("default_ref: 1.10", "looks like a number), found 1.1"),
            ("default_ref: -x", 'found "-x"'),
            ("default_ref: a..b", 'found "a..b"'),
            ("default_ref: 'a b'", 'found "a b"'),
            ("default_ref: x.lock", 'found "x.lock"'),
            ("remotes: [a]", "expected a mapping of remote names to URLs, found a list"),
        ],
    )
    def test_of_a_value_name_what_is_allowed(self, body: str, words: str) -> None:
        error = pool_refusal(body)
        assert words in str(error)
        assert (error.key, error.line) == (f"pools.web.{body.partition(':')[0]}", 4)

    @pytest.mark.parametrize(
        ("body", "key"),
        [
            ("remotes: {origin: /x}", "pools.web.remotes.origin"),
            ("remotes: {a/b: /x}", "pools.web.remotes.a/b"),
            ("remotes: {a: ''}", "pools.web.remotes.a"),
            ("remotes: {a: --upload-pack=x}", "pools.web.remotes.a"),
            ("remotes: {a: 5}", "pools.web.remotes.a"),
            ("cleanup_options: {warmup_enabled: 5}", "pools.web.cleanup_options.warmup_enabled"),
            ("cleanup_options: [warmup_enabled]", "pools.web.cleanup_options"),
            ("cleanup_options: {num_slots: 5}", "pools.web.cleanup_options.num_slots"),
        ],
    )
    def test_of_a_part_of_a_value_name_the_part(self, body: str, key: str) -> None:
        error = pool_refusal(body)
        assert (error.key, error.line) == (key, 4)

    def test_find_the_line_inside_a_value_of_many_lines(self) -> None:
        assert pool_refusal("remotes:\n      up: /srv/up\n      bad: '-x'").line == 6
        error = refusal("allow_protocols:\n  - https\n  - ext\n")
        assert (error.key, error.line) == ("allow_protocols[1]", 3)
        assert 'found "ext"' in str(error)

    @pytest.mark.parametrize(
        ("text", "hint"),
        [
            ("polls: {}", 'unknown key "polls"; did you mean "pools"?'),
            ("workspace_dir: /x", 'unknown key "workspace_dir"; did you mean "workspaces_dir"?'),
            ("lock_timeout: 5", 'unknown key "lock_timeout" here; it belongs to a pool or to defaults'),
            ("defaults: {lock_timout: 5}", 'unknown key "lock_timout"; did you mean "lock_timeout"?'),
            ("defaults: {close_timeout: 5}", 'unknown key "close_timeout" here; it belongs to the top level'),
            ("defaults: {repo_url: /x}", 'unknown key "repo_url" here; it belongs to a pool'),
            ("defaults: {cleanup_options: {fetch_on_alocate: no}}", 'did you mean "fetch_on_allocate"?'),
            ("pools: {a: {repo_ur: /x}}", 'unknown key "repo_ur"; did you mean "repo_url"?'),
        ],
    )
    def test_of_an_unknown_key_say_where_it_should_be(self, text: str, hint: str) -> None:
        assert hint in str(refusal(text))

    @pytest.mark.parametrize(
        ("text", "key", "line"),
        [
            ("close_timeout: 1\nclose_timeout: 1\n", "close_timeout", 2),
            ("pools:\n  a: {repo_url: /a}\n  a: {repo_url: /b}\n", "pools.a", 3),
            ("defaults:\n  <<: {num_slots: 1}\n  <<: {num_slots: 2}\n", "defaults.<<", 3),
            (
                "defaults:\n  warmup_enabled: no\n  cleanup_options:\n    warmup_enabled: no\n",
                "defaults.cleanup_options.warmup_enabled",
                4,
            ),
        ],
    )
    def test_of_a_key_given_twice_point_at_the_second(self, text: str, key: str, line: int) -> None:
        error = refusal(text)
        assert "given twice" in str(error)
        assert (error.key, error.line) == (key, line)

    def test_of_several_mistakes_come_together_in_the_order_of_the_file(self) -> None:
        error = refusal("pools:\n  a:\n    num_slots: 0\n    lock_timout: 5\n  b: {repo_url: 5}\nclose_timeout: -1\n")
        lines = [text.split(": ")[:2] for text in str(error).splitlines()]
        assert lines == [
            ["pools.yaml:2", "pools.a.repo_url"],
            ["pools.yaml:3", "pools.a.num_slots"],
            ["pools.yaml:4", "pools.a.lock_timout"],
            ["pools.yaml:5", "pools.b.repo_url"],
            ["pools.yaml:6", "close_timeout"],
        ]
        assert (error.key, error.line) == ("pools.a.repo_url", 2)

    def test_of_very_many_mistakes_are_cut_short(self) -> None:
        error = refusal("\n".join(f"nope{number}: 1" for number in range(100)))
        assert len(str(error).splitlines()) == 21
        assert str(error).endswith("and 80 more")

    @pytest.mark.parametrize(
        ("text", "key"),
        [
            ("- a\n", None),
            ("just text\n", None),
            ("pools: [a]\n", "pools"),
            ("pools: {a: /srv/a}\n", "pools.a"),
            ("defaults: 5\n", "defaults"),
            ("defaults: {<<: 5}\n", "defaults.<<"),
        ],
    )
    def test_of_a_section_that_is_no_mapping_say_so(self, text: str, key: str | None) -> None:
        error = refusal(text)
        assert "expected a mapping, found " in str(error)
        assert (error.key, error.line) == (key, 1)

    @pytest.mark.parametrize("body", ["", "{}", "{num_slots: 3}"])
    def test_of_a_pool_without_a_url_say_it_is_missing(self, body: str) -> None:
        error = refusal(f"pools:\n  web: {body}\n")
        assert (error.key, error.line) == ("pools.web.repo_url", 2)
        assert "missing" in str(error)

    @pytest.mark.parametrize("url", ["''", "' /x'", "'-x'", '"/x\\ny"', '"/x\\0"', "5", "null", "[a]"])
    def test_of_a_url_that_cannot_be_name_the_key(self, url: str) -> None:
        error = refusal(f"pools:\n  web:\n    repo_url: {url}\n")
        assert (error.key, error.line) == ("pools.web.repo_url", 3)

    @settings(deadline=None)
    @given(
        st.from_regex(r"[a-z_]{1,40}", fullmatch=True).filter(
            lambda key: key not in {info.name for info in describe(PoolOptions)} | {"cleanup_options", "repo_url"}
        ),
        st.lists(st.sampled_from(["num_slots: 2", "lock_timeout: 5s", "cleanup: inline"]), unique=True),
        st.data(),
    )
    def test_of_any_unknown_key_name_it_and_its_line(self, key: str, others: list[str], data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(others)))
        body = ["repo_url: /srv/web", *others[:place], f"'{key}': x", *others[place:]]
        error = refusal("pools:\n  web:\n" + "".join(f"    {text}\n" for text in body))
        assert f'unknown key "{key}"' in str(error)
        assert (error.key, error.line) == (f"pools.web.{key}", 4 + place)

    def test_name_the_range_for_an_override_and_in_the_constructor_too(self) -> None:
        words = "num_slots: expected a whole number from 1 to 10000, found 0"
        with pytest.raises(ConfigError) as caught:
            PoolConfig().options_for(None, num_slots=0)
        assert (str(caught.value), caught.value.key) == (words, "num_slots")
        with pytest.raises(ConfigError) as caught:
            PoolOptions(num_slots=0)
        assert (str(caught.value), caught.value.key) == (words, "num_slots")


class TestCredentials:
    @pytest.mark.parametrize(
        "text",
        [
            "pools: {web: {repo_url: URL, nope: URL}}",
            "pools: {web: {repo_url: 'URL\n\n x'}}",
            "pools: {'URL': {repo_url: URL}}",
            "pools: {web: URL}",
            "pools: {web: {repo_url: [URL]}}",
            "pools: {web: {repo_url: /x, lock_timeout: URL, cleanup: 'URL', default_ref: 'URL'}}",
            "pools: {web: {repo_url: /x, remotes: {'URL': URL}}}",
            "pools: {web: {repo_url: /x, remotes: {a: '-URL'}}}",
            "pools: {web: {repo_url: /x, coordination: URL, webhooks: [URL], hosts: [URL]}}",
            "coordination: URL",
            "coordination: {dsn: URL, listen_dsn: [URL], 'URL': 1, type: 'URL'}",
            'workspaces_dir: "URL\\n"',
            "allow_protocols: [URL]",
            "allow_protocols: [git]\npools: {web: {repo_url: URL}}",
            "'URL': 1",
            "URL",
            "pools: {web: {repo_url: !URL x}}",
            "pools: {web: {repo_url: URL",
            "pools: {web: {repo_url: &URL x}}",
            "pools:\n  web: URL\n   x: y",
            "a: URL\n\tb",
            "a: 1\na: URL\n'URL': 1\n'URL': 2",
        ],
    )
    @pytest.mark.parametrize(
        "url",
        [
            "https://user:hunter2@host/web.git",
            "https://hunter2@host/web.git",
            "https://user:p/hunter2@host/" + "x" * 80,
            "https://" + "u" * 80 + ":hunter2@host/web.git",
            "https://host/web.git?private_token=hunter2",
            "user:hunter2@host",
        ],
    )
    def test_never_show_in_a_refusal(self, text: str, url: str) -> None:
        error = refusal(text.replace("URL", url))
        assert "hunter2" not in f"{error} {error!r} {error.key} {error.__dict__}"
        assert error.__suppress_context__ or error.__context__ is None

    def test_never_show_in_a_repr_nor_in_what_is_stored(self) -> None:
        options = PoolOptions(remotes={"up": "https://u:hunter2@host/up"})
        spec = PoolSpec("web", "https://u:hunter2@host/web", options)
        assert spec.repo_url == "https://u:hunter2@host/web"
        assert "hunter2" not in repr(spec)
        assert "hunter2" not in repr(PoolConfig("/srv", defaults=options, pools={"web": spec}))
        assert options.changed() == {"remotes": {"up": "https://host/up"}}


class TestProtocols:
    @pytest.mark.parametrize(
        "url",
        ["https://h/x", "HTTP://h/x", "ssh://git@h/x", "git://h/x", "file:///x", "/x", "./x", "git@h:x", "h:x", "/a:b"],
    )
    def test_of_ordinary_urls_are_allowed(self, url: str) -> None:
        assert PoolConfig(pools={"a": PoolSpec("a", url)}).pools["a"].repo_url == url

    @pytest.mark.parametrize("url", ["ext::sh -c true", "fd::7", "EXT::sh", "ftp://h/x", "helper::x", "helper://x"])
    def test_that_run_commands_or_are_unknown_are_refused(self, url: str) -> None:
        error = refusal(f"pools:\n  a:\n    repo_url: {json.dumps(url)}\n")
        assert "is not among allow_protocols (https, http, ssh, git, file)" in str(error)
        assert (error.key, error.line) == ("pools.a.repo_url", 3)

    def test_not_allowed_are_refused_for_every_url_there_is(self) -> None:
        error = refusal(
            "allow_protocols: [https]\n"
            "defaults: {remotes: {up: /x}}\n"
            "pools:\n"
            "  a: {repo_url: git@h:a}\n"
            "  b: {repo_url: https://h/b, remotes: {r: file:///r}}\n"
        )
        keys = [line.split(": ")[1] for line in str(error).splitlines()]
        assert keys == ["defaults.remotes.up", "pools.a.repo_url", "pools.b.remotes.r"]
        with pytest.raises(ConfigError, match=r"pools\.a\.repo_url: the protocol"):
            PoolConfig(allow_protocols=("https",), pools={"a": PoolSpec("a", "/x")})
        with pytest.raises(ConfigError, match=r"remotes\.up: the protocol"):
            PoolConfig(allow_protocols=("https",)).options_for(None, remotes={"up": "/x"})

    @pytest.mark.parametrize("value", ["[]", "[ext]", "[fd]", "[HTTPS]", "['']", "[1]", "https", "{https: 1}"])
    def test_lists_that_cannot_be_are_refused(self, value: str) -> None:
        assert "allow_protocols" in str(refusal(f"allow_protocols: {value}").key)


class TestWorkspacesDirectory:
    def test_comes_from_the_environment_else_from_the_platform(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("REPOPOOL_WORKSPACES_DIR", str(tmp_path))
        assert PoolConfig().workspaces_dir == PoolConfig.from_text("").workspaces_dir == tmp_path
        assert PoolConfig("/elsewhere").workspaces_dir == Path("/elsewhere")
        monkeypatch.setenv("REPOPOOL_WORKSPACES_DIR", "")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        found = PoolConfig().workspaces_dir
        assert found.name == "repopool"
        assert found.is_relative_to(tmp_path)

    def test_is_made_absolute_and_its_home_expanded(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert PoolConfig(workspaces_dir="~/x").workspaces_dir == tmp_path / "x"
        assert PoolConfig(workspaces_dir=Path("x/../y")).workspaces_dir == tmp_path / "y"
        assert PoolConfig.from_text("workspaces_dir: ~/x", "/etc/pools.yaml").workspaces_dir == tmp_path / "x"

    def test_in_a_file_is_relative_to_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "pools.yaml"
        path.write_text("workspaces_dir: here\n")
        assert PoolConfig.from_file(path).workspaces_dir == tmp_path / "here"

    @pytest.mark.parametrize("wrong", ["", " ", "/a\nb", "/a\0b", "/a\tb", "https://h/x", 5, b"/a", ["/a"]])
    def test_that_cannot_be_is_refused(self, wrong: Any) -> None:
        with pytest.raises(ConfigError, match=r"^workspaces_dir: expected a directory's path") as caught:
            PoolConfig(workspaces_dir=wrong)
        assert caught.value.key == "workspaces_dir"
        with pytest.raises(ConfigError, match=r"^workspaces_dir: expected a directory's path"):
            PoolConfig.from_mapping({"workspaces_dir": wrong})

    def test_of_an_unknown_user_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="cannot be made absolute"):
            PoolConfig("~no-such-user-here/x")

    def test_is_not_touched(self, tmp_path: Path) -> None:
        PoolConfig(tmp_path / "new")
        assert list(tmp_path.iterdir()) == []


class TestMerging:
    CONFIG = PoolConfig.from_text(EVERYTHING)

    def test_puts_overrides_over_the_pools_own_over_the_defaults(self) -> None:
        options = self.CONFIG.options_for("web", lock_timeout="5m", clean_on_release=False)
        assert (options.num_slots, options.lock_timeout) == (4, 300.0)
        assert (options.fetch_on_allocate, options.clean_on_release, options.warmup_enabled) == (False, False, False)

    @pytest.mark.parametrize("name", [None, "unheard-of"])
    def test_of_a_new_pool_begins_with_the_defaults(self, name: str | None) -> None:
        assert self.CONFIG.options_for(name) == self.CONFIG.defaults
        assert self.CONFIG.options_for(name, cleanup_options={"fetch_on_allocate": True}).fetch_on_allocate is True

    def test_refuses_an_unknown_override_with_a_suggestion(self) -> None:
        with pytest.raises(ConfigError, match='unknown key "num_slot"; did you mean "num_slots"') as caught:
            self.CONFIG.options_for("web", num_slot=3)
        assert caught.value.key == "num_slot"
        with pytest.raises(ConfigError, match='unknown key "repo_name"'):
            self.CONFIG.options_for("web", repo_name="x")

    def test_leaves_the_configuration_as_it_was(self) -> None:
        self.CONFIG.options_for("web", num_slots=9)
        assert PoolConfig.from_text(EVERYTHING) == self.CONFIG

    @pytest.mark.parametrize("value", [None, 0, "0s", 0.5])
    def test_lets_waiting_be_endless_or_one_try(self, value: object) -> None:
        expected = {None: None, "0s": 0.0}.get(value, value)  # type: ignore[call-overload]
        assert PoolConfig().options_for(None, acquire_timeout=value).acquire_timeout == expected


class TestOptions:
    def test_have_the_documented_defaults(self) -> None:
        options = PoolOptions()
        assert (options.num_slots, options.default_ref, options.remotes) == (1, None, {})
        assert options.fetch_on_allocate
        assert options.clean_on_release
        assert options.warmup_enabled
        assert (options.lock_timeout, options.cleanup_timeout, options.acquire_timeout) == (30.0, 600.0, 30.0)
        assert (options.git_timeout, options.git_idle_timeout, options.fetch_attempts) == (3600.0, 300.0, 3)
        assert (options.salvage, options.salvage_limit, options.cleanup) == ("abnormal", 1 << 30, "background")

    def test_cannot_be_changed(self) -> None:
        options = PoolOptions()
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            options.num_slots = 2  # type: ignore[misc]

    def test_do_not_follow_a_mapping_that_they_were_made_from(self) -> None:
        remotes = {"up": "/x"}
        pools = {"a": PoolSpec("a", "/a", PoolOptions(remotes=remotes))}
        config = PoolConfig(pools=pools)
        remotes.clear()
        pools.clear()
        assert config.pools["a"].options.remotes == {"up": "/x"}

    def test_survive_pickling(self) -> None:
        config = PoolConfig.from_text(EVERYTHING)
        assert pickle.loads(pickle.dumps(config)) == config

    names = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True).filter(lambda name: name != "origin")

    @settings(deadline=None)
    @given(
        st.fixed_dictionaries(
            {},
            optional={
                "num_slots": st.integers(1, 10_000),
                "default_ref": st.none() | names,
                "remotes": st.dictionaries(names, st.sampled_from(["/x", "https://h/x", "git@h:x"])),
                "fetch_on_allocate": st.booleans(),
                "clean_on_release": st.booleans(),
                "warmup_enabled": st.booleans(),
                "lock_timeout": st.floats(0.001, 1e8),
                "stale_lock_hours": st.floats(0.1, 1000),
                "max_waiting": st.none() | st.integers(0, 1000),
                "acquire_timeout": st.none() | st.floats(0, 1e8),
                "fetch_max_age": st.floats(0, 1e8),
                "cleanup": st.sampled_from(["background", "inline"]),
                "fetch_attempts": st.integers(1, 100),
            },
        )
    )
    def test_read_back_from_json_are_the_same(self, chosen: dict[str, Any]) -> None:
        options = PoolOptions(**chosen)
        stored = json.dumps(options.changed(), allow_nan=False)
        assert PoolOptions.from_mapping(json.loads(stored)) == options
        assert set(json.loads(stored)) <= set(chosen)
        assert PoolConfig.from_mapping({"defaults": chosen}).defaults == options

    def test_from_something_else_than_a_mapping_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"^expected a mapping, found a list$"):
            PoolOptions.from_mapping(["num_slots"])  # type: ignore[arg-type]


class TestSpecs:
    @pytest.mark.parametrize(
        ("name", "url", "key"), [("a/b", "/x", "repo_name"), ("a", "", "repo_url"), ("a", "-x", "repo_url")]
    )
    def test_a_spec_refuses_a_bad_name_or_url(self, name: str, url: str, key: str) -> None:
        with pytest.raises(ConfigError, match=f"^{key}: expected") as caught:
            PoolSpec(name, url)
        assert caught.value.key == key

    def test_a_pool_under_another_name_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r'^pools\.b: expected the pool\'s own name, "a"$'):
            PoolConfig(pools={"b": PoolSpec("a", "/x")})

    def test_git_processes_are_limited_to_twice_the_cores_unless_said_otherwise(self) -> None:
        assert PoolConfig().git_process_limit == 2 * (os.cpu_count() or 1)
        assert PoolConfig(max_git_processes=3).git_process_limit == 3
