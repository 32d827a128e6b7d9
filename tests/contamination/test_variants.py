"""The corpus against pools with kept paths, with submodules, inside a submodule, and at a change of ref.

Those vectors that such a pool might treat in another way take turns in the ordinary run; the soak run plays all.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.contamination.corpus import Vector, for_user
from tests.contamination.kit import NotPossibleError
from tests.contamination.trial import REFS, Bench

CORPUS = for_user(is_root=os.geteuid() == 0)

OF_KEPT_PATHS = {"links", "kinds", "hard links", "special files", "mounts", "tree"}
OF_SUBMODULES = {"submodules", "repositories", "kinds", "objects"}
OF_INNER_ONES = {"executing", "index", "git directory", "hard links", "special files", "objects"}
TURN = pytest.mark.sampled(one_in=8)
"""For vectors of the groups that matter."""

MEANINGLESS_INSIDE = (OSError, AssertionError, subprocess.SubprocessError)
"""What a vector meets that is not made for a place where `.git` is a file."""


@contextmanager
def made(**options: Any) -> Iterator[Bench]:
    directory = Path(tempfile.mkdtemp(prefix="repopool-"))
    try:
        yield (bench := Bench(directory, **options))
        bench.throw_away_pool()
    finally:
        subprocess.run(["rm", "-rf", directory], check=False)


@pytest.fixture(scope="module")
def keeping() -> Iterator[Bench]:
    with made(keep=["cache", "src/cache"]) as bench:
        yield bench


@pytest.fixture(scope="module")
def with_submodules() -> Iterator[Bench]:
    with made(submodules=True) as bench:
        yield bench


@pytest.fixture(scope="module")
def usual() -> Iterator[Bench]:
    with made() as bench:
        yield bench


def chosen(groups: set[str]) -> list[object]:
    """Return the corpus, of which some groups take turns in the ordinary run, and the others are for the long one."""
    return [
        pytest.param(vector, id=vector.name, marks=TURN if vector.group in groups else pytest.mark.soak)
        for vector in CORPUS
    ]


async def leaks_of(bench: Bench, vector: Vector, then: str = "main", *, is_inside: bool = False) -> tuple[str, ...]:
    try:
        return (await bench.play(vector, then, is_inside=is_inside)).leaks
    except NotPossibleError as error:
        pytest.skip(str(error))
    except MEANINGLESS_INSIDE as error:
        if not bench.submodules:
            raise
        bench.throw_away_pool()
        pytest.skip(f"means nothing where there is a submodule: {error}")


@pytest.mark.parametrize("vector", chosen(OF_KEPT_PATHS))
async def test_kept_paths_stay_and_nothing_else_reaches_the_next(keeping: Bench, vector: Vector) -> None:
    assert await leaks_of(keeping, vector) == ()


@pytest.mark.parametrize("vector", chosen(OF_SUBMODULES))
async def test_a_pool_with_submodules_shows_a_recursive_clone(with_submodules: Bench, vector: Vector) -> None:
    assert await leaks_of(with_submodules, vector) == ()


@pytest.mark.parametrize("vector", chosen(OF_INNER_ONES))
async def test_nor_does_what_was_done_to_a_submodule_reach_the_next(with_submodules: Bench, vector: Vector) -> None:
    assert await leaks_of(with_submodules, vector, is_inside=True) == ()


@pytest.mark.soak
@pytest.mark.parametrize("then", REFS[1:])
@pytest.mark.parametrize("vector", CORPUS, ids=lambda vector: vector.name)
async def test_every_vector_also_at_a_change_of_ref(usual: Bench, vector: Vector, then: str) -> None:
    assert await leaks_of(usual, vector, then) == ()


@pytest.mark.soak
@pytest.mark.parametrize("vector", CORPUS, ids=lambda vector: vector.name)
async def test_every_vector_where_paths_are_kept_and_the_ref_changes(keeping: Bench, vector: Vector) -> None:
    assert await leaks_of(keeping, vector, "feature") == ()
