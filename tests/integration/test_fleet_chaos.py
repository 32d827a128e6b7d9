"""A fleet that is ill-treated, managers, network and database, gives no slot twice and loses none."""

import os
import sys
from pathlib import Path

import pytest

from repopool_async._process import run_process
from tests._postgres import require

pytestmark = pytest.mark.endurance
ROOT = Path(__file__).parents[2]


async def run_chaos(*options: str) -> None:
    require("postgres", "postgresql")
    argv = [sys.executable, "-m", "benchmarks.fleet_chaos", *options]
    done = await run_process(argv, env=dict(os.environ), cwd=str(ROOT), timeout=3600)
    assert done.exit_code == 0, done.stdout.decode() + done.stderr.decode()


@pytest.mark.timeout(300)
async def test_a_fleet_stands_everything_once() -> None:
    await run_chaos("--seconds", "25", "--managers", "2", "--slots", "4")


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_fleet_stands_half_an_hour_of_it() -> None:
    await run_chaos("--seconds", "1800")
