"""Leaves the corpus' long runs out, unless they are asked for, and plays it on the path that large trees take.

What is marked `sampled` takes turns: the ordinary run plays a part that follows from the seed of its order, which is
printed, and the rest is left to long runs. Whoever names a test gets it.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from repopool_async.hosts import _survey


def _is_long(config: pytest.Config) -> bool:
    return "soak" in config.option.markexpr.replace("not soak", "")


def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> list[pytest.Item] | None:
    """Do not even make the thousands of tests that would be left out: it takes a second of each process."""
    if not _is_long(collector.config) and any(mark.name == "soak" for mark in getattr(obj, "pytestmark", ())):
        return []
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if not (any("::" in argument for argument in config.args) or config.option.keyword):
        _sample(here, config.getoption("randomly_seed", 0))
    left_out = {item for item in here if item.get_closest_marker("soak")}
    if left_out and not _is_long(config):
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def _sample(items: list[pytest.Item], seed: int) -> None:
    by_function = defaultdict(list)
    for item in sorted(items, key=lambda item: item.nodeid):  # they may have been shuffled
        by_function[item.nodeid.partition("[")[0]].append(item)
    for ours in by_function.values():
        if mark := ours[0].get_closest_marker("sampled"):
            for number, item in enumerate(ours):
                if number % mark.kwargs["one_in"] != seed % mark.kwargs["one_in"]:
                    item.add_marker("soak")


@pytest.fixture(autouse=True, scope="session")
def _surveyed() -> Iterator[None]:
    """Look at the corpus' small trees as at large ones; the rest of the tests look at theirs entry by entry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_survey, "MANY_FILES", 0)
        patch.setattr(_survey, "FEW_DIRECTORIES", 0)
        yield
