"""A fleet that is ill-treated, managers, network and database, gives no slot twice and loses none."""

import os
import sys
from pathlib import Path

import pytest

from repopool_async._process import run_process
from tests._postgres import require

pytestmark = [pytest.mark.endurance, pytest.mark.fleet]
ROOT = Path(__file__).parents[2]


async def run_chaos(*options: str) -> str:
    """Run it, and return what it says was found wrong."""
    require("postgres", "postgresql")
    argv = [sys.executable, "-m", "benchmarks.fleet_chaos", *options]
    done = await run_process(argv, env=dict(os.environ), cwd=str(ROOT), timeout=3600)
    wrong = "".join(line for line in done.text.splitlines(keepends=True) if line.startswith("  ! "))
    assert done.exit_code == bool(wrong), done.text + done.stderr.decode()
    return wrong


@pytest.mark.timeout(300)
async def test_a_fleet_stands_everything_once() -> None:
    assert await run_chaos("--seconds", "8", "--tasks", "3", "--slots", "3") == ""


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_fleet_stands_half_an_hour_of_it() -> None:
    assert await run_chaos("--seconds", "1800") == ""


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_it_would_be_seen_if_hosts_let_everybody_in() -> None:
    found = await run_chaos("--unchecked", "--seconds", "90", "--tasks", "3", "--slots", "3")
    assert "double holder" in found
