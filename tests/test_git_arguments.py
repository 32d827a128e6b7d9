"""What git may be given is told from what it must not."""

import os
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from repopool_async._git_arguments import (
    Credentials,
    split_credentials,
    validate_branch_name,
    validate_ref,
    validate_url,
)
from repopool_async.exceptions import RefError, RepositoryUrlError


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/django/django.git",
        "https://host:8443/a/b",
        "http://[::1]:8080/a",
        "https://ada:token@host/a.git",
        "ssh://git@host:2222/a/b.git",
        "ssh://host/~ada/b.git",
        "git://host/a.git",
        "file:///srv/a b.git".replace(" ", "%20"),
        "file://localhost/srv/a.git",
        "git@github.com:django/django.git",
        "host:a.git",
        "[::1]:a.git",
        "git@[2001:db8::1]:a.git",
        "my_alias:a b.git",
        "/srv/git/a b.git",
        "/srv/a:b.git",
        "HTTPS://HOST/a",
    ],
)
def test_urls_that_git_may_be_given(url: str) -> None:
    assert validate_url(url) == url


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert validate_url("./a.git") == f"{tmp_path}/a.git"
    assert validate_url(".") == str(tmp_path)
    assert validate_url("../a") == f"{tmp_path.parent}/a"
    assert validate_url("~/a.git") == f"{tmp_path}/home/a.git"
    assert validate_url("/srv/../a/") == "/a"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "empty"),
        ("--upload-pack=touch /tmp/x", "begins with '-'"),
        ("-oProxyCommand=x@host:a", "begins with '-'"),
        ("https://host/a\nb", "control characters"),
        ("/srv/a\0b", "control characters"),
        ("ext::sh -c id", "remote helpers run commands"),
        ("fd::17/foo", "remote helpers run commands"),
        ("https::https://host/a", "remote helpers run commands"),
        ("ftp://host/a", "the scheme 'ftp' is unknown"),
        ("git+ssh://host/a", "is unknown"),
        ("javascript://host/a", "is unknown"),
        ("https://host/a%0ahost=evil", "control characters"),
        ("https://host/a b", "spaces"),
        ("https://host\\@evil/a", "backslashes"),
        ("https:///a", "names no proper host"),
        ("https://*/a", "names no proper host"),
        ("ssh://-oProxyCommand=id/a", "names no proper host"),
        ("ssh://git@-oProxyCommand=id/a", "names no proper host"),
        ("ssh://-oProxyCommand=id@host/a", "only web URLs"),
        ("ssh://git:pw@host/a", "only web URLs"),
        ("git:pw@host:a", "takes no password"),
        ("https://host/a?private_token=x", "a token in the query"),
        ("git@-oProxyCommand=id:a", "neither a URL nor a path"),
        ("host:-a", "neither a URL nor a path"),
        ("repository", "neither a URL nor a path"),
        ("some/where", "neither a URL nor a path"),
        ("file://host/a", "three slashes"),
        ("file:a", None),
        ("https://host:port/a", "host or port cannot be read"),
        ("https://[::1/a", "host or port cannot be read"),
    ],
)
def test_urls_that_it_must_not_be_given(url: str, reason: str | None) -> None:
    if reason is None:
        assert validate_url(url) == url  # a host called file, to git as to us
        return
    with pytest.raises(RepositoryUrlError) as caught:
        validate_url(url)
    assert reason in str(caught.value)
    assert "allowed are git, http, https, ssh URLs, and local paths" in str(caught.value)


@pytest.mark.parametrize("url", ["/srv/a", "./a", "file:///srv/a", "http://host/a", "git://host/a"])
def test_protocols_can_be_forbidden(url: str) -> None:
    with pytest.raises(RepositoryUrlError, match=r"the protocol \w+ is not allowed; allowed are https, ssh URLs$"):
        validate_url(url, ["https", "ssh"])
    assert validate_url("host:a", ["https", "ssh"]) == "host:a"


@pytest.mark.parametrize(
    "url",
    [
        "https://ada:hunter2@host:port/a",
        "https://ada:hun/ter2@host/a",
        "https://ada:hunter2@ho st/a",
        "ssh://git:hunter2@host/a",
        "git:hunter2@host:a",
        "ftp://ada:hunter2@host/a",
        "https://ada:hunter2@[host/a",
        "https://ada:hunter2@host\N{FULLWIDTH COLON}/a",
    ],
)
def test_a_refused_url_does_not_tell_its_password(url: str) -> None:
    with pytest.raises(RepositoryUrlError) as caught:
        validate_url(url) and split_credentials(url)
    assert "ter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "clean", "credentials"),
    [
        ("https://ada:pw@host/a.git", "https://host/a.git", Credentials("https://host", "ada", "pw")),
        ("https://ada:p%40w%3A@Host:8443/a", "https://Host:8443/a", Credentials("https://host:8443", "ada", "p@w:")),
        ("https://ada:p@w@host/a", "https://host/a", Credentials("https://host", "ada", "p@w")),
        ("http://token@host/a?b#c", "http://host/a?b#c", Credentials("http://host", "token", "")),
        ("https://:pw@host/a", "https://host/a", Credentials("https://host", "", "pw")),
        ("https://@host/a", "https://host/a", None),
        ("https://host/@scope/a", "https://host/@scope/a", None),
        ("ssh://git@host/a", "ssh://git@host/a", None),
        ("git@host:a", "git@host:a", None),
        ("/srv/a@b", "/srv/a@b", None),
    ],
)
def test_credentials_are_taken_out_of_web_urls(url: str, clean: str, credentials: Credentials | None) -> None:
    assert split_credentials(url) == (clean, credentials)


def test_credentials_with_a_line_break_are_refused() -> None:
    with pytest.raises(RepositoryUrlError, match="control characters"):
        split_credentials("https://ada:pw%0ahost=evil@host/a")


def test_credentials_do_not_show() -> None:
    assert repr(Credentials("https://host", "ada", "pw")) == "Credentials(scope='https://host')"


@pytest.mark.parametrize(
    "ref", ["main", "feature/x", "refs/pull/7/head", "v1.0", "HEAD", "a" * 40, "ünïcode", "x@y", "a.b"]
)
def test_refs_that_git_may_be_given(ref: str) -> None:
    assert validate_ref(ref) == ref


@pytest.mark.parametrize(
    "ref",
    [
        *("", "@", "-x", "--force", ".x", "/a", "a/", "a.", "a//b", "a/.x", "x.lock", "x.lock/y", "x" * 1001),
        *("a..b", "a b", "a~1", "a^", "a:b", "a@{1}", "a\nb", "a\0b", "a\\b", "a*", "a?", "a["),
    ],
)
def test_refs_that_it_must_not_be_given(ref: str) -> None:
    with pytest.raises(RefError, match=r"cannot be a ref: give a branch, a tag"):
        validate_ref(ref)


def _git_accepts(ref: str) -> bool:
    return subprocess.run(["git", "check-ref-format", "--allow-onelevel", ref], check=False).returncode == 0


@settings(max_examples=150, deadline=None)
@example("a/.b")
@example("a.lock")
@example("@")
@example("@{")
@example("é\udcff")
@given(st.text(alphabet=st.sampled_from(string.ascii_letters[:4] + "./@{~^:?*[\\ -\x7f\x01é"), min_size=1, max_size=8))
def test_our_rules_are_those_of_git(ref: str) -> None:
    try:
        validate_ref(ref)
    except RefError:
        is_valid = False
    else:
        is_valid = True
    # git leaves the leading '-' to its callers.
    assert is_valid is (_git_accepts(ref) and not ref.startswith("-"))


@pytest.mark.parametrize("name", ["HEAD", "refs/heads/x", "a" * 40, "0123456789abcdef" * 4, "A" * 40, "-x", "a b"])
def test_names_that_no_branch_may_have(name: str) -> None:
    with pytest.raises(RefError):
        validate_branch_name(name)


def test_names_that_a_branch_may_have() -> None:
    for name in ("agent/x", "deadbeef", "a" * 39, "heads/refs", "HEAD2"):
        assert validate_branch_name(name) == name
    assert os.fsencode(validate_branch_name("\udcff")) == b"\xff"
