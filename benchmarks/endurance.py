"""Runs the chaos, cancellation and state-machine tests many times in a row, under load, and counts.

    python -m benchmarks.endurance [--times 100] [--at-once 1] [--load 2] [--select EXPRESSION]

Load is so many processes that do nothing but compute; rounds that run at once are each other's load, too. After the
first failure none begins: its output is printed, the exit status is 1. What belongs to it bears the marker `endurance`.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from benchmarks._report import print_table, write_json
from tests._scratch import scratch

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


def marked_files() -> list[str]:
    """Return the test files that name the marker: to collect all the others takes longer than some of these run."""
    found = [path for path in (_ROOT / "tests").rglob("test_*.py") if "mark.endurance" in path.read_text("utf-8")]
    return [str(path.relative_to(_ROOT)) for path in sorted(found)]


def run_once(select: str) -> tuple[float, "subprocess.CompletedProcess[str]"]:
    """Run the tests once, in a random order, with temporary files of their own; return the seconds it took as well."""
    started = time.monotonic()
    with scratch("repopool-endurance-") as directory:
        argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", select]
        argv += ["--basetemp", f"{directory}/tests", *marked_files()]
        done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, check=False)
    return time.monotonic() - started, done


def run_many(times: int, at_once: int, select: str) -> tuple[list[float], str | None]:
    """Run the rounds until one fails; return the seconds of those that passed and what the first failure printed."""
    seconds: list[float] = []
    with ThreadPoolExecutor(at_once) as executor:
        rounds = [executor.submit(run_once, select) for _ in range(times)]
        for took, done in (one.result() for one in as_completed(rounds)):
            if done.returncode != 0:
                executor.shutdown(cancel_futures=True)
                return seconds, done.stdout + done.stderr
            seconds.append(took)
            print(f"{len(seconds)}: {done.stdout.splitlines()[-1]}", flush=True)
    return seconds, None


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=1, help="rounds that run side by side (default: %(default)s)")
    parser.add_argument("--load", type=int, default=2, help="busy processes beside it (default: %(default)s)")
    parser.add_argument("--select", default="endurance and not soak", help="of pytest's markers (default: %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the load would go on when this is ended
    with load(options.load):
        seconds, failure = run_many(options.times, options.at_once, options.select)
    passed = f"{len(seconds)} of {options.times}"
    print_table(
        f"load {options.load}, {options.at_once} at once",
        {"passed in a row": passed, "seconds of a round": f"{statistics.median(seconds or [0]):.0f}"},
    )
    print(failure or f"  written to {write_json('endurance', {'options': vars(options), 'seconds': seconds})}")
    return 1 if failure else 0


if __name__ == "__main__":
    raise SystemExit(main())
