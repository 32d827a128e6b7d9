"""What `coordination` of a `pools.yaml` may say, what is refused and where, and that no DSN is ever shown."""

import pytest

from repopool_async import ConfigError, Coordination, PoolConfig, PoolManager
from repopool_async.config_coordination import DSN_VARIABLE

DSN = "postgresql://me:hunter2@db.example/pools"


@pytest.fixture(autouse=True)
def _no_dsn_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DSN_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("coordination: null", None),
        ("coordination: files", Coordination(type="files")),
        (f"coordination: {DSN}", Coordination(dsn=DSN)),
        (f"coordination: {{dsn: {DSN}}}", Coordination(dsn=DSN)),
        (
            f"coordination:\n  type: postgres\n  dsn: {DSN}\n  listen_dsn: postgres://h/d\n  session_ttl: 1m",
            Coordination(type="postgres", dsn=DSN, listen_dsn="postgres://h/d", session_ttl=60.0),
        ),
    ],
)
def test_it_is_a_word_a_dsn_or_a_mapping(text: str, expected: Coordination | None) -> None:
    assert PoolConfig.from_text(text).coordination == expected


def test_what_the_file_does_not_say_the_environment_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DSN_VARIABLE, DSN)
    coordination = PoolConfig.from_text("coordination: {type: postgres}").coordination
    assert coordination is not None
    assert coordination.dsn == DSN
    assert PoolConfig.from_text("").coordination is None
    monkeypatch.setenv(DSN_VARIABLE, "mysql://me:hunter2@db")
    with pytest.raises(
        ConfigError, match=rf"coordination\.dsn: {DSN_VARIABLE} of the environment: expected a DSN"
    ) as no:
        PoolConfig.from_text("coordination: {type: postgres}")
    assert "hunter2" not in str(no.value)


@pytest.mark.parametrize(
    ("text", "key", "line", "what"),
    [
        ("coordination: 5", "coordination", 1, "expected files, a DSN"),
        ("coordination: mysql://h/d", "coordination", 1, "expected files, a DSN"),
        ("coordination:\n  type: etcd", "coordination.type", 2, 'expected "files" or "postgres"'),
        ("coordination:\n  type: postgres", "coordination.dsn", 1, f"or in {DSN_VARIABLE} of the environment"),
        (f"coordination:\n  type: files\n  dsn: {DSN}", "coordination.dsn", 3, "means nothing with type files"),
        (f"coordination:\n  dsn: {DSN}\n  session_ttl: 10ms", "coordination.session_ttl", 3, "expected at least 1"),
        (f"coordination:\n  dsn: {DSN}\n  tll: 1m", "coordination.tll", 3, 'unknown key "tll"; expected type, dsn'),
        ("coordination:\n  listen_dsn: [x]", "coordination.listen_dsn", 2, "expected a DSN"),
        (f"defaults:\n  coordination: {DSN}", "defaults.coordination", 2, "it belongs to the top level"),
        (f"pools:\n  a:\n    repo_url: /r\n    coordination: {DSN}", "pools.a.coordination", 4, "the top level"),
    ],
)
def test_what_cannot_be_is_refused_with_key_and_line(text: str, key: str, line: int, what: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        PoolConfig.from_text(text, "pools.yaml")
    assert (refusal.value.key, refusal.value.line) == (key, line)
    assert what in str(refusal.value)
    assert "hunter2" not in str(refusal.value)


def test_a_dsn_is_never_shown() -> None:
    config = PoolConfig("/srv/pools", coordination=Coordination(dsn=DSN, listen_dsn=DSN))
    assert "hunter2" not in repr(config)
    assert "hunter2" not in repr(PoolManager(config))
