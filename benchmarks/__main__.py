"""Measures everything that has a target, beside plain git and other pools, and says what is reached.

    python -m benchmarks [--smoke]

Tables go to the terminal, figures as JSON and plots as SVG to `benchmarks/results/`. Repositories are generated once
and kept in the user's cache directory. The programs can be run one by one: `python -m benchmarks.test_...`.
"""

from benchmarks import test_allocation_performance, test_cleanup_performance, test_large_pool
from benchmarks._command import run_from_command_line

PROGRAMS = (test_allocation_performance.PROGRAM, test_cleanup_performance.PROGRAM, test_large_pool.PROGRAM)

if __name__ == "__main__":
    raise SystemExit(run_from_command_line(__doc__, PROGRAMS))
