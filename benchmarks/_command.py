"""Runs measuring programs from the command line: options, a directory to work in, a progress bar, tables."""

import argparse
import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import attrs

from benchmarks._measure import FULL, SMOKE, Scale, Tell
from benchmarks._report import Report, progress, publish
from tests._scratch import scratch


@attrs.frozen
class Program:
    """One measuring program.

    Attributes:
        steps: how many it tells of, at a scale. measure: runs it in an empty directory.
    """

    title: str
    steps: Callable[[Scale], int]
    measure: Callable[[Scale, Path, Tell], Coroutine[Any, Any, Report]]

    def run(self, scale: Scale) -> Report:
        """Measure, showing how far it is."""
        with scratch("repopool-benchmark-") as directory, progress(self.title, self.steps(scale)) as tell:
            return asyncio.run(self.measure(scale, directory, tell))


def run_from_command_line(explanation: str | None, programs: Sequence[Program]) -> int:
    """Measure and publish; the exit status is 0 whatever was measured."""
    parser = argparse.ArgumentParser(description=explanation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="only see that it works; the figures mean nothing")
    is_smoke = parser.parse_args().smoke
    for program in programs:
        publish(program.run(SMOKE if is_smoke else FULL), prefix="smoke-" if is_smoke else "")
    return 0
