"""The corpus against pools that check out otherwise: the same comparison, with a fresh clone made the same way.

In the ordinary run a vector of each kind that matters to an option; the whole corpus is for the long run.
"""

import itertools
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contamination.corpus import VECTORS, Vector, for_user
from tests.contamination.test_contamination import IS_ROOT, leaks_of, made, named
from tests.contamination.trial import REFS, Bench

OPTIONS: dict[str, dict[str, Any]] = {
    "lfs": {"lfs": True},
    "sparse": {"sparse": ["src/pkg", "docs", "extra"]},
    "blobless": {"history": "blobless"},
}
CHOSEN = {
    "blobless": ("tracked_files_edited", "objects_emptied", "tree_deleted"),
    "lfs": ("tracked_files_edited", "filter_smudge_by_info", "tree_deleted"),
    "sparse": ("untracked_directories", "sparse_checkout_by_patterns", "sparse_index", "skip_worktree_hides_an_edit"),
}


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def option(request: pytest.FixtureRequest) -> str:
    if request.param == "lfs" and shutil.which("git-lfs") is None and not os.environ.get("REPOPOOL_CI"):
        pytest.skip("there is no git-lfs here")
    return str(request.param)


@pytest.fixture(scope="module")
def bench(option: str) -> Iterator[Bench]:
    with made(**OPTIONS[option]) as bench:
        yield bench


async def test_the_next_lessee_sees_a_fresh_clone_made_that_way(bench: Bench, option: str) -> None:
    others = itertools.cycle(("main", "feature", "v1"))
    found = {name: await leaks_of(bench, VECTORS[name], next(others)) for name in CHOSEN[option]}
    assert {name: leaks for name, leaks in found.items() if leaks} == {}


@pytest.mark.soak
@pytest.mark.parametrize("then", REFS)
@pytest.mark.parametrize("vector", named(for_user(is_root=IS_ROOT)))
async def test_also_after_every_contamination(bench: Bench, vector: Vector, then: str) -> None:
    try:
        leaks = await leaks_of(bench, vector, then)
    except (FileNotFoundError, AssertionError) as error:  # raised only where the vector itself could not be played
        pytest.skip(f"it is about what is not checked out: {error}")
    assert leaks == ()
