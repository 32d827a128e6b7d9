"""Leaves the corpus' long runs out, unless they are asked for, and plays it on the path that large trees take."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from repopool_async.hosts import _survey


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" in config.option.markexpr:
        return
    left_out = [
        item for item in items if Path(__file__).parent in item.path.parents and item.get_closest_marker("soak")
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="session")
def _surveyed() -> Iterator[None]:
    """Look at the corpus' small trees as at large ones; the rest of the tests look at theirs entry by entry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_survey, "MANY_FILES", 0)
        patch.setattr(_survey, "FEW_DIRECTORIES", 0)
        yield
