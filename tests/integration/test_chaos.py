"""Processes killed with SIGKILL, at random and at every step of what they do: the others put all of it right."""

import os
import sys
from pathlib import Path

import pytest

from repopool_async._process import run_process

ROOT = Path(__file__).parents[2]


async def run_chaos(*options: str) -> None:
    # A process of its own, because it forks.
    argv = [sys.executable, "-m", "benchmarks.chaos", *options]
    done = await run_process(argv, env=dict(os.environ), cwd=str(ROOT), timeout=3600)
    assert done.exit_code == 0, done.stdout.decode() + done.stderr.decode()


@pytest.mark.timeout(300)
async def test_fifty_kills_at_random_moments() -> None:
    await run_chaos("--kills", "50", "--workers", "3", "--steps", "none", "--seconds", "200")


@pytest.mark.timeout(300)
async def test_a_kill_at_each_step_of_leasing_returning_adding_and_removing() -> None:
    await run_chaos("--kills", "0", "--steps", "cycle")


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_thousand_kills_at_random_moments() -> None:
    await run_chaos("--kills", "1000", "--steps", "none", "--seconds", "3000")


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_kill_at_every_single_step_of_everything() -> None:
    await run_chaos("--kills", "0", "--steps", "all")
