"""Durations, sizes, pools' names and URLs: what they mean, and what is none."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repopool_async.config_values import parse_duration, parse_size, validate_repo_name, without_credentials
from repopool_async.exceptions import ConfigError


class TestDurations:
    @pytest.mark.parametrize(
        ("given_value", "seconds"),
        [
            (0, 0.0),
            (30, 30.0),
            (0.25, 0.25),
            (-0.0, 0.0),
            ("30", 30.0),
            ("0.5", 0.5),
            ("500ms", 0.5),
            ("30s", 30.0),
            ("5m", 300.0),
            ("1.1h", 3960.0),
            ("7d", 604800.0),
            ("1h30m", 5400.0),
            (" 1 h 30 m ", 5400.0),
            ("1d2h3m4s5ms", 93784.005),
        ],
    )
    def test_are_read_with_and_without_units(self, given_value: object, seconds: float) -> None:
        assert parse_duration(given_value) == seconds
        assert math.copysign(1, parse_duration(given_value)) == 1

    @pytest.mark.parametrize(
        "wrong",
        [
            *(
                "soon",
                "",
                " ",
                "m",
                "5 minutes",
                "1m1h",
                "1h1h",
                "-5s",
                "+5s",
                "1:30",
                "1e3",
                "inf",
                "nan",
                ".5s",
                "٣s",
            ),
            *("1" * 400 + "d", "1h" + " " * 10_000 + "x", -1, -0.001, math.inf, math.nan, 10**400),
            *(True, None, [], {}, b"5s"),
        ],
    )
    def test_that_are_none_are_refused_with_an_example(self, wrong: object) -> None:
        with pytest.raises(ConfigError, match=r'^expected a duration such as 30, "30s" or "5m", found '):
            parse_duration(wrong)

    @settings(deadline=None)
    @given(st.tuples(*[st.integers(0, 99_999)] * 5).filter(any), st.sampled_from(["", " "]))
    def test_are_the_sum_of_their_parts(self, amounts: tuple[int, ...], space: str) -> None:
        parts = list(zip(amounts, ("d", "h", "m", "s", "ms"), (86_400_000, 3_600_000, 60_000, 1000, 1), strict=True))
        text = space.join(f"{amount}{space}{unit}" for amount, unit, _ in parts if amount)
        assert parse_duration(text) == sum(amount * scale for amount, _, scale in parts) / 1000

    @settings(deadline=None)
    @given(st.floats(0, 1e9))
    def test_read_back_what_they_were(self, seconds: float) -> None:
        assert parse_duration(parse_duration(seconds)) == seconds
        assert parse_duration(f"{seconds:.6f}s") == pytest.approx(seconds, abs=1e-6)


class TestSizes:
    @pytest.mark.parametrize(
        ("given_value", "size"),
        [
            (0, 0),
            (1024, 1024),
            (1e9, 10**9),
            ("12", 12),
            ("12 B", 12),
            ("500MB", 500_000_000),
            ("500 mb", 500_000_000),
            ("1.5GiB", 1_610_612_736),
            ("1.5G", 1_610_612_736),
            ("2k", 2048),
            ("0.1KiB", 102),
            ("3TB", 3 * 10**12),
            ("9007199254740993", 9_007_199_254_740_993),
        ],
    )
    def test_are_read_with_and_without_units(self, given_value: object, size: int) -> None:
        assert parse_size(given_value) == size

    @pytest.mark.parametrize(
        "wrong", ["big", "", "MB", "5 megabytes", "-1", "1e9", "1,5GB", -1, 1.5, math.inf, math.nan, True, None, []]
    )
    def test_that_are_none_are_refused_with_an_example(self, wrong: object) -> None:
        with pytest.raises(ConfigError, match=r'^expected a size such as 1048576, "500MB" or "1.5GiB", found '):
            parse_size(wrong)

    @settings(deadline=None)
    @given(st.integers(0, 10**12), st.sampled_from("KMGT"))
    def test_count_in_thousands_or_in_1024(self, amount: int, prefix: str) -> None:
        power = "KMGT".index(prefix) + 1
        assert parse_size(f"{amount}{prefix}B") == amount * 1000**power
        assert parse_size(f"{amount}{prefix}iB") == parse_size(f"{amount}{prefix}") == amount * 1024**power


class TestPoolNames:
    @pytest.mark.parametrize("name", ["a", "django", "Web-2.0_x", "0", "a" * 100, "git", "a.git.b", "lock", "locks2"])
    def test_that_are_fine_are_returned(self, name: str) -> None:
        assert validate_repo_name(name) == name

    @pytest.mark.parametrize(
        "name",
        [
            *("", ".", "..", ".a", "-a", "_a", "a/b", "a b", "a\n", "a\0", "é", "a" * 101, "a.git", "a.GIT", "a.lock"),
            *("locks", "Locks", 5, None, b"a"),
        ],
    )
    def test_that_would_be_trouble_are_refused(self, name: object) -> None:
        with pytest.raises(ConfigError, match="pool name"):
            validate_repo_name(name)


class TestCredentials:
    @pytest.mark.parametrize(
        ("url", "plain"),
        [
            ("https://host/x.git", "https://host/x.git"),
            ("https://user:pass@host/x.git", "https://host/x.git"),
            ("https://token@host:8443/x@y.git", "https://host:8443/x@y.git"),
            ("https://a@b:c@host/x", "https://host/x"),
            ("HTTPS://u:p@host", "HTTPS://host"),
            ("ssh://git@host/x", "ssh://git@host/x"),
            ("ssh://git:pass@host:22/x", "ssh://git@host:22/x"),
            ("postgresql://me:pass@db/x", "postgresql://me@db/x"),
            ("git@host:x.git", "git@host:x.git"),
            ("/srv/x@y.git", "/srv/x@y.git"),
            ("https://host?a@b", "https://host?a@b"),
        ],
    )
    def test_are_taken_out_of_urls(self, url: str, plain: str) -> None:
        assert without_credentials(url) == plain
