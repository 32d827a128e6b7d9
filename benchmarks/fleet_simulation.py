"""A fleet of hosts and managers under pauses, deaths, partitions and lost commits, on a virtual clock: who is where.

    python -m benchmarks.fleet_simulation [--hosts 500] [--slots 100] [--minutes 10] [--seeds 1] [--seed 0]
        [--without-host-check]

Fences are entered and left, claims chosen, and slots taken over by the project's own functions; what is SQL, shell or
network is simulated (`_fleet_database`, `_fleet_hosts`, `_fleet_network`). No process of one hold may live in a slot
once another has entered it, and in the end every slot must be AVAILABLE: the exit status says whether that was so.
Without the host check it must not be: then the status is 0 where violations were seen.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

import attrs

from benchmarks._fleet_managers import Habits
from benchmarks._fleet_world import Outcome, Plan, simulate
from benchmarks._report import print_table, write_json

_SLOTS_FOR_EACH_MANAGER: Final = 500
_TOLD: Final = (
    "leases", "takeovers", "leases lost", "pauses", "kills", "partitions from the database", "partitions from hosts",
    "lost messages", "late messages", "reboots", "hosts parked", "failovers", "lost commits", "sessions reaped",
    "abandoned claims", "refused commands", "killed processes", "violations",
)  # fmt: skip


@attrs.frozen
class Run:
    """One seed's outcome, and the seconds of processor time it took."""

    outcome: Outcome
    cpu_seconds: float

    @property
    def is_sound(self) -> bool:
        """Whether nobody met anybody in a slot, and none was lost."""
        return not self.outcome.counts.get("violations") and not self.outcome.lost_slots


def plans(options: argparse.Namespace) -> list[Plan]:
    """Return what is to be simulated, one for each seed."""
    managers = max(2, options.hosts * options.slots // _SLOTS_FOR_EACH_MANAGER)
    return [
        Plan(
            hosts=options.hosts,
            slots=options.slots,
            managers=managers,
            seconds=60.0 * options.minutes,
            seed=options.seed + number,
            checks=not options.without_host_check,
            habits=Habits(lessees=options.lessees),
        )
        for number in range(options.seeds)
    ]


def run(plan: Plan) -> Run:
    """Simulate one fleet."""
    began = time.process_time()
    outcome = simulate(plan)
    return Run(outcome, time.process_time() - began)


def figures(runs: Sequence[Run]) -> dict[str, object]:
    """Return what all runs together came to."""
    total: Counter[str] = Counter()
    for one in runs:
        total.update(one.outcome.counts)
    rows: dict[str, object] = {kind: f"{total[kind]:,}" for kind in _TOLD}
    rows["slots AVAILABLE only once managers were started anew"] = sum(len(one.outcome.kept_slots) for one in runs)
    rows["slots not AVAILABLE in the end"] = sum(len(one.outcome.lost_slots) for one in runs)
    rows["longest until all were, in virtual seconds"] = max(one.outcome.settle_seconds for one in runs)
    rows["processor time, in seconds"] = f"{sum(one.cpu_seconds for one in runs):.0f}"
    rows["digests"] = " ".join(one.outcome.digest[:8] for one in runs)
    return rows


def tell(outcome: Outcome) -> None:
    """Print the first violation of a run, and what led to it."""
    for violation in outcome.violations[:1]:
        print(f"\nseed {outcome.plan.seed}, {violation.at:.3f} s, {violation.slot}: {violation.what}")
        print("\n".join(violation.story))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=500)
    parser.add_argument("--slots", type=int, default=100, help="of each host")
    parser.add_argument("--minutes", type=float, default=10.0, help="of trouble, on the virtual clock")
    parser.add_argument("--lessees", type=int, default=100, help="of each manager, one for every 500 slots")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs")
    parser.add_argument("--without-host-check", action="store_true", help="hosts refuse nothing and kill nobody")
    options = parser.parse_args()
    runs = []
    for plan in plans(options):
        runs.append(run(plan))
        if plan.checks:
            tell(runs[-1].outcome)
    rows = figures(runs)
    check = "hosts check nothing" if options.without_host_check else "hosts check tokens"
    print_table(f"{options.hosts} hosts, {options.slots} slots each, {options.minutes:g} minutes, {check}", rows)
    outcomes = [attrs.asdict(one.outcome) for one in runs]
    print(f"  written to {write_json('fleet-simulation', {'cores': os.cpu_count(), 'runs': outcomes})}")
    if options.without_host_check:
        return 0 if any(one.outcome.counts.get("violations") for one in runs) else 1
    return 0 if all(one.is_sound for one in runs) else 1


if __name__ == "__main__":
    raise SystemExit(main())
