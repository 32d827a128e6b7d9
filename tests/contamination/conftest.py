"""Leaves the corpus' long runs out, unless they are asked for, and plays it on the path that large trees take."""

from collections.abc import Iterator

import pytest

from repopool_async.hosts import _survey
from tests._sampling import is_long


def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> list[pytest.Item] | None:
    """Do not even make the thousands of tests that would be left out: it takes a second of each process."""
    if not is_long(collector.config) and any(mark.name == "soak" for mark in getattr(obj, "pytestmark", ())):
        return []
    return None


@pytest.fixture(autouse=True, scope="session")
def _surveyed() -> Iterator[None]:
    """Look at the corpus' small trees as at large ones; the rest of the tests look at theirs entry by entry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_survey, "MANY_FILES", 0)
        patch.setattr(_survey, "FEW_DIRECTORIES", 0)
        yield
