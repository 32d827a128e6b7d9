"""What README.md says is so: its files exist, its code compiles, its tables are those of the code."""

import ast
import builtins
import re
from pathlib import Path

import pytest

import repopool_async
from repopool_async.cli import ExitStatus
from repopool_async.config import PoolConfig, PoolOptions
from repopool_async.config_coordination import Coordination
from repopool_async.config_fields import OptionInfo, describe
from repopool_async.config_hosts import HostSpec

TOP = Path(__file__).parents[1]
README = (TOP / "README.md").read_text()
UNITS = (("h", 3600), ("m", 60), ("s", 1))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def default_in_yaml(info: OptionInfo) -> str:
    value = info.default
    if isinstance(value, float) and "duration" in info.expected:
        return next((f"{value / size:g}{unit}" for unit, size in UNITS if value and value % size == 0), f"{value:g}")
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower()


def row(info: OptionInfo) -> str:
    return f"| `{info.key}` | `{default_in_yaml(info)}` | {info.help} |"


@pytest.mark.parametrize("kind", [PoolConfig, HostSpec, Coordination, PoolOptions])
def test_every_option_is_in_the_table_with_its_default(
    kind: type[PoolConfig] | type[HostSpec] | type[Coordination] | type[PoolOptions],
) -> None:
    rows = [row(info) for info in describe(kind) if info.is_supported]

    assert "\n".join(rows) in README


def test_the_configuration_file_is_accepted() -> None:
    (text,) = blocks("yaml")

    config = PoolConfig.from_text(text, TOP / "pools.yaml")

    assert set(config.pools) == {"app", "docs"}
    assert config.pools["app"].options.num_slots == 4


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_in_it_compiles(number: int) -> None:
    compile(blocks("python")[number], "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_files_it_names_exist() -> None:
    named = set(re.findall(r"\]\(([^)#:]+)\)|`((?:tests|examples|benchmarks)/[^`]+)`", README))
    paths = {link or code for link, code in named}
    paths.discard("benchmarks/results/")  # made by the first benchmark that is run

    assert {path for path in paths if not (TOP / path).exists()} == set()
    assert "examples/basic_pool_usage.py" in paths


def test_errors_in_the_table_are_what_it_says() -> None:
    table = README.partition("## Errors")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]

    for names, bases in rows:
        for name in re.findall(r"`(\w+)`", names):
            error = getattr(repopool_async, name)
            assert issubclass(error, repopool_async.PoolManagerError)
            for base in re.findall(r"`(\w+)`", bases):
                assert issubclass(error, getattr(repopool_async, base, None) or getattr(builtins, base))


def test_exit_statuses_in_the_table_are_those_of_the_command() -> None:
    table = README.partition("## Exit statuses")[2].partition("\n## ")[0]
    numbers = {int(number) for line in table.splitlines() for number in re.findall(r"\b\d{2,3}\b", line[:30])}

    assert {64, 70, 75, 78, 126, 127, 141} <= {*numbers}
    assert numbers - {128} <= {*ExitStatus}


def test_its_commands_are_single_lines_marked_for_the_checks() -> None:
    for mark in ("run", "test"):
        (command,) = re.findall(rf"^<!-- ci:{mark} -->\n```sh\n(.+)\n```$", README, re.MULTILINE)
        assert command.startswith("python3 -m venv .venv && ")
