"""Files that are no YAML, or hostile YAML: refused with the line, and nothing in them runs."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repopool_async.config import PoolConfig
from repopool_async.exceptions import ConfigError


def refusal(text: str) -> ConfigError:
    """Return the error that a file's text is refused with."""
    with pytest.raises(ConfigError) as caught:
        PoolConfig.from_text(text, "pools.yaml")
    return caught.value


class TestBadFiles:
    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("a: [b\n", 2),
            ("a: 1\n\tb: 2\n", 2),
            ("a: 1\n b: 2\n", 2),
            ("a: *nowhere\n", 1),
            ("a: 1\n---\nb: 2\n", 2),
            ("a: 1\nb: \x00\n", 2),
            ('a: "open\n', 2),
            ("a: \ud800\n", 1),
        ],
    )
    def test_with_a_syntax_error_are_refused_with_the_line(self, text: str, line: int) -> None:
        error = refusal(text)
        assert str(error).startswith(f"pools.yaml:{line}: not valid YAML: ")
        assert error.line == line

    def test_with_an_escape_that_the_parser_trips_over_are_refused(self) -> None:
        assert "not valid YAML" in str(refusal('a: "\\UFFFFFFFF"\n'))

    @pytest.mark.parametrize(
        "value",
        ["!!python/object/apply:os.system [true]", "!!binary aGk=", "!!set {a}", "!mine x", "!!omap [a: 1]", "!!map x"],
    )
    def test_with_foreign_tags_are_refused_and_nothing_runs(self, value: str) -> None:
        error = refusal(f"defaults:\n  default_ref: {value}\n")
        assert "not allowed here" in str(error) or "expected" in str(error)
        assert error.line == 2

    def test_with_a_mapping_as_a_key_are_refused(self) -> None:
        assert "expected plain text as a key" in str(refusal("? {a: b}\n: c\n"))

    @pytest.mark.parametrize("shape", ["[{}]", "{{<<: [{}]}}"])
    def test_that_explode_through_aliases_are_refused_soon(self, shape: str) -> None:
        lines = ["a0: &a0 {k: v}"]
        lines += [f"a{n}: &a{n} {shape.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, 30)]
        assert "expected at most 200000 values" in str(refusal("\n".join(lines)))

    @pytest.mark.parametrize(
        "text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}", "a: " + "[" * 50_000, "- " * 50_000, "{a: " * 50_000]
    )
    def test_without_a_bottom_are_refused(self, text: str) -> None:
        assert "nested too deeply" in str(refusal(text))

    def test_that_are_not_utf8_are_refused_with_the_line(self, tmp_path: Path) -> None:
        path = tmp_path / "pools.yaml"
        path.write_bytes("# fine\npools: # caf\xe9\n".encode("latin-1"))
        with pytest.raises(ConfigError, match="expected UTF-8 text, found the byte 0xe9") as caught:
            PoolConfig.from_file(path)
        assert (caught.value.line, caught.value.source) == (2, str(path))

    def test_that_are_missing_or_directories_are_refused_by_name(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.yaml", tmp_path):
            with pytest.raises(ConfigError, match="cannot be read: ") as caught:
                PoolConfig.from_file(path)
            assert str(caught.value).startswith(f"{path}: ")
            assert caught.value.source == str(path)
        with pytest.raises(ConfigError, match="cannot be read: "):
            PoolConfig.from_file("nul\0.yaml")

    def test_that_are_far_too_long_are_refused_unread(self) -> None:
        with pytest.raises(ConfigError, match="expected at most 1048576 bytes of text"):
            PoolConfig.from_file("/dev/zero")

    @settings(deadline=None)
    @given(st.text(alphabet=st.sampled_from(list("ab:-[]{}&*<!|>'\"#?%@\\ \n\t,\x00é1.~")), max_size=60))
    def test_of_any_text_are_read_or_refused_but_never_crash(self, text: str) -> None:
        with contextlib.suppress(ConfigError):
            PoolConfig.from_text(text)
