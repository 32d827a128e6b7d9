"""Kills processes that use pools, at random and at every step, and looks whether the others put all of it right.

    python -m benchmarks.chaos [--kills 300] [--seconds 600] [--workers 4] [--steps cycle|named|all|none]

First workers lease, work, return, add and remove slots, make and delete pools and reload their configuration. They are
killed with SIGKILL at random moments, every second time together with every process they started, and a quarter of what
they do is cancelled, once or twice. Then one process at a time is killed at each step of making a pool, of a lease and
its return, of recovering what a dead, robbed, expired or cut-off lessee left, of adding and removing slots, reloading
and deleting a pool (`named`: the first of every name; `cycle`: of leasing and recovering only, by turns, of those
that others can tell from what is on disk; `all`: every single step). The library is not told: what is a step is in
`benchmarks._steps`.

After each kill a process that runs already, or a new one, must bring every slot back to AVAILABLE without help, and
what the dead lessee had not pushed must be in the saved work. Prints kills and cancellations survived, slots lost,
double holders, things half made, work lost and unexpected errors (all must be 0) and exits with status 1 where one is
not.
"""

import argparse
import random
import time
from pathlib import Path

import attrs

from benchmarks._chaos_origin import make_repository
from benchmarks._findings import Findings, add
from benchmarks._named_steps import named_steps
from benchmarks._random_kills import RandomKills
from benchmarks._report import describe_ms, print_table, write_json
from tests._scratch import scratch


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="at random moments (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600.0, help="at most, for these (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="that are killed (default: %(default)s)")
    parser.add_argument("--steps", choices=["cycle", "named", "all", "none"], default="named")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    started = time.monotonic()
    with scratch("repopool-chaos-") as directory:
        done, at_steps = measure(directory, options)
    return report(options, done, at_steps, time.monotonic() - started)


def measure(directory: Path, options: argparse.Namespace) -> tuple[Findings, Findings]:
    """Do what the options say."""
    done = at_steps = Findings()
    if options.kills > 0:
        make_repository(directory)
        done = RandomKills(
            directory, kills=options.kills, seconds=options.seconds, workers=options.workers, seed=options.seed
        ).run()
    if options.steps != "none":
        at_steps = named_steps(directory, options.steps, seed=options.seed)
    return done, at_steps


def report(options: argparse.Namespace, done: Findings, at_steps: Findings, seconds: float) -> int:
    """Print and write the figures; return the exit status."""
    both = Findings()
    add(both, attrs.asdict(done))
    if at_steps is not done:
        add(both, attrs.asdict(at_steps))
    print_table(
        f"{options.workers} workers, seed {options.seed}, {seconds:.0f} s",
        {
            "kills survived": f"{both.kills} ({done.kills} at random, {at_steps.kills} at {at_steps.steps} steps)",
            "cancellations survived": both.cancellations,
            "slots lost": len(both.slots_lost),
            "double holders": len(both.double_holders),
            "half made and used": len(both.half_made),
            "work lost": f"{len(both.work_lost)} of {both.work_due} leases that left any",
            "processes left running": len(both.left_running),
            "unexpected errors": len(both.errors),
            "from a random kill to a slot in good hands": describe_ms(done.recovery_seconds),
            "from a kill at a step to all slots AVAILABLE": describe_ms(at_steps.recovery_seconds),
            "steps that were not reached again": len(both.steps_not_reached),
        },
    )
    for line in both.violations[:20]:
        print(f"  ! {line}")
    figures = {"options": vars(options), "seconds": seconds, **attrs.asdict(both), "random_kills": done.kills}
    print(f"  written to {write_json('chaos', figures)}")
    return 1 if both.violations or done.kills < options.kills else 0


if __name__ == "__main__":
    raise SystemExit(main())
