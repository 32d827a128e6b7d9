"""Runs the chaos, cancellation and state-machine tests many times in a row, under load, and counts.

    python -m benchmarks.endurance [--times 100] [--load 2] [--select EXPRESSION]

Load is so many processes that do nothing but compute. The first failure ends it: its output is printed, the exit status
is 1. What belongs to it bears the marker `endurance`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks._report import print_table, write_json

_ROOT = Path(__file__).parents[1]


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep so many processors busy for the block."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def run_once(select: str) -> "subprocess.CompletedProcess[str]":
    """Run the tests once, in a random order, with temporary files of their own."""
    with tempfile.TemporaryDirectory(prefix="repopool-endurance-", ignore_cleanup_errors=True) as directory:
        argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", select]
        return subprocess.run(
            [*argv, "--basetemp", f"{directory}/tests", "tests"], cwd=_ROOT, capture_output=True, text=True, check=False
        )


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--load", type=int, default=2, help="busy processes beside it (default: %(default)s)")
    parser.add_argument("--select", default="endurance and not soak", help="of pytest's markers (default: %(default)s)")
    options = parser.parse_args()
    seconds: list[float] = []
    failure = None
    with load(options.load):
        while failure is None and len(seconds) < options.times:
            started = time.monotonic()
            done = run_once(options.select)
            if done.returncode != 0:
                failure = done.stdout + done.stderr
                break
            seconds.append(time.monotonic() - started)
            print(f"{len(seconds)}: {done.stdout.splitlines()[-1]}", flush=True)
    passed = f"{len(seconds)} of {options.times}"
    print_table(f"load {options.load}", {"passed in a row": passed, "seconds": f"{sum(seconds):.0f}"})
    print(failure or f"  written to {write_json('endurance', {'options': vars(options), 'seconds': seconds})}")
    return 1 if failure else 0


if __name__ == "__main__":
    raise SystemExit(main())
