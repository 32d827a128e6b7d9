"""On which host a pool's next slot is made: a plain rule, so that everybody can say beforehand where slots will be.

Each slot goes to the host that is the least full with it: that has the smallest (slots of the pool there + 1) /
capacity, the first in the pool's order among equals. So a pool's first n slots are spread like a pool of n slots, the
last ones go first when it shrinks, and a slot never moves. Which slot is leased is not decided here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Final

from repopool_async.exceptions import SlotAllocationError

USUAL_CAPACITY: Final = 100
"""What a host counts as of whose capacity nothing is said."""


def spread(
    count: int,
    hosts: Sequence[str],
    *,
    capacities: Mapping[str, int | None],
    present: Mapping[str, int],
    in_use: Mapping[str, int] | None = None,
) -> list[str]:
    """Return the hosts of a pool's next slots, in the order of their numbers.

    Args:
        count: how many slots. hosts: those that the pool chooses and that can be used, in its order.
        capacities: of the hosts; None for no limit. present: how many slots of the pool each has.
        in_use: how many slots of all pools each has; as `present` where missing.

    Raises:
        SlotAllocationError: the hosts cannot hold so many.
    """
    there = Counter(present)
    used = Counter(there if in_use is None else in_use)
    chosen: list[str] = []
    for _ in range(count):
        free = [host for host in hosts if (limit := capacities[host]) is None or used[host] < limit]
        if not free:
            raise SlotAllocationError(
                f"{count} more slots are wanted, and the pool's hosts that are up ({', '.join(hosts) or 'none'}) have "
                f"room for {len(chosen)}; raise their capacity or add hosts"
            )
        best = min(free, key=lambda host: Fraction(there[host] + 1, capacities[host] or USUAL_CAPACITY))
        there[best] += 1
        used[best] += 1
        chosen.append(best)
    return chosen
