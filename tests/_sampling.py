"""What of the tests takes turns: those marked `sampled` are too many, and too alike, to be run each time.

The ordinary run has a part of them that follows from the seed of its order, which is printed, so that every one has its
turn; long runs have them all. Whoever names a test gets it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest


def is_long(config: pytest.Config) -> bool:
    """Return whether the long runs are asked for."""
    return "soak" in config.option.markexpr.replace("not soak", "")


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out what has no turn in this run; in a long one, mark what takes turns as belonging to it."""
    sampled = [item for item in items if item.get_closest_marker("sampled")]
    if is_long(config):
        for item in sampled:
            item.add_marker("soak")
    elif not (any("::" in argument for argument in config.args) or config.option.keyword):
        left_out = set(_without_turn(sampled, config.getoption("randomly_seed", 0)))
        if left_out:
            config.hook.pytest_deselected(items=list(left_out))
            items[:] = [item for item in items if item not in left_out]


def _without_turn(sampled: Sequence[pytest.Item], seed: int) -> Iterable[pytest.Item]:
    by_function = defaultdict(list)
    for item in sorted(sampled, key=lambda item: item.nodeid):  # they may have been shuffled
        by_function[item.nodeid.partition("[")[0]].append(item)
    for ours in by_function.values():
        mark = ours[0].get_closest_marker("sampled")
        assert mark is not None
        one_in = mark.kwargs["one_in"]
        yield from (item for number, item in enumerate(ours) if number % one_in != seed % one_in)
