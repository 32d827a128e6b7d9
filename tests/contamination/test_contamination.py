"""Whatever a lessee does, the next one sees a fresh clone, nothing planted ran, and nothing outside changed.

The vectors of the corpus take turns: at the same ref; those that touch what a check-out touches also at a change of
ref, and those that a user's rights matter to also as an ordinary user, where the tests run as root. The same
comparison is held against the recipe that everybody writes first, to show that it can fail.
"""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.contamination.corpus import VECTORS, Vector, for_user
from tests.contamination.kit import NotPossibleError, Scene
from tests.contamination.trial import REFS, Bench

IS_ROOT = os.geteuid() == 0
NOBODY = 65534
CORPUS = for_user(is_root=IS_ROOT)

OF_BOTH = {"special files", "hard links", "names", "submodules", "tree"}
OF_A_CHECK_OUT = OF_BOTH | {"files", "edits", "links", "kinds", "index"}
OF_A_USER = OF_BOTH | {"modes", "attributes", "processes", "git directory"}
PARTS = 4

ROOT = Path(__file__).parents[2]


@contextmanager
def made(**options: Any) -> Iterator[Bench]:
    # Not below the usual temporary directory, whose long names leave no room for paths at the limit.
    directory = Path(tempfile.mkdtemp(prefix="repopool-"))
    try:
        yield (bench := Bench(directory, **options))
        bench.throw_away_pool()
    finally:
        subprocess.run(["rm", "-rf", directory], check=False)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with made() as bench:
        yield bench


@pytest.fixture(scope="module")
def bench_that_cleans_on_demand() -> Iterator[Bench]:
    with made(clean_on_release=False) as bench:
        yield bench


async def leaks_of(bench: Bench, vector: Vector, then: str, *, is_abandoned: bool = False) -> tuple[str, ...]:
    try:
        return (await bench.play(vector, then, is_abandoned=is_abandoned)).leaks
    except NotPossibleError as error:
        pytest.skip(str(error))


def named(vectors: list[Vector]) -> list[object]:
    return [pytest.param(vector, id=vector.name) for vector in vectors]


def test_the_corpus_is_what_it_says() -> None:
    groups = {vector.group for vector in VECTORS.values()}
    assert len(VECTORS) >= 350
    assert groups >= OF_A_CHECK_OUT | OF_A_USER


@pytest.mark.sampled(one_in=3)
@pytest.mark.parametrize("vector", named(CORPUS))
async def test_the_next_lessee_sees_a_fresh_clone(bench: Bench, vector: Vector) -> None:
    assert await leaks_of(bench, vector, "main") == ()


def with_other_refs(vectors: list[Vector]) -> list[object]:
    others = itertools.cycle(REFS[1:])
    return [
        pytest.param(vector, then, id=f"{vector.name}-{then}") for vector, then in zip(vectors, others, strict=False)
    ]


@pytest.mark.sampled(one_in=3)
@pytest.mark.parametrize(
    ("vector", "then"), with_other_refs([vector for vector in CORPUS if vector.group in OF_A_CHECK_OUT])
)
async def test_also_when_the_next_lessee_wants_another_ref(bench: Bench, vector: Vector, then: str) -> None:
    assert await leaks_of(bench, vector, then) == ()


@pytest.mark.sampled(one_in=4)
@pytest.mark.skipif(not IS_ROOT, reason="the whole corpus ran as an ordinary user")
@pytest.mark.parametrize("part", range(PARTS))
def test_also_as_an_ordinary_user(part: int) -> None:
    names = [vector.name for vector in for_user(is_root=False) if vector.group in OF_A_USER][part::PARTS]
    directory = Path(tempfile.mkdtemp(prefix="repopool-"))
    directory.chmod(0o755)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.contamination.trial", directory, str(NOBODY), "main", *names],
            cwd=ROOT, capture_output=True, check=False, timeout=110,
        )  # fmt: skip
    finally:
        shutil.rmtree(directory)
    assert done.returncode == 0, done.stderr.decode()
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [outcome["vector"] for outcome in outcomes] == [names[0], *names]
    assert {outcome["vector"]: outcome["leaks"] for outcome in outcomes if outcome["leaks"]} == {}


def _together(number: int) -> Vector:
    choice = random.Random(number).sample([v for v in CORPUS if not (v.before or v.quarantine or v.leaves_trash)], 6)
    choice.sort(key=lambda vector: "fifo" in vector.name)  # earlier, the others would wait for them

    def act(scene: Scene) -> None:
        for vector in choice:
            try:
                vector.act(scene)
            except (OSError, AssertionError, subprocess.SubprocessError):
                continue  # one is in another's way

    return Vector(" and ".join(vector.name for vector in choice), "several", act)


@pytest.mark.parametrize("vector", named([_together(number) for number in range(15)]))
async def test_several_contaminations_at_once(bench: Bench, vector: Vector) -> None:
    assert await leaks_of(bench, vector, random.Random(vector.name).choice(REFS)) == ()


ABANDONED = (
    "untracked_directories", "tracked_files_edited", "same_size_same_time_edit_in_place", "skip_worktree_hides_an_edit",
    "rebase_with_conflict", "stash", "fsmonitor", "filter_smudge_by_attributes", "git_directory_is_a_gitfile",
    "submodule_place_has_a_repository", "tree_replaced_by_a_link", "process_left_writing",
    "unmarked_process_left_writing",
)  # fmt: skip


@pytest.mark.parametrize("name", ABANDONED)
async def test_also_when_the_holder_died(bench: Bench, name: str) -> None:
    assert await leaks_of(bench, VECTORS[name], "main", is_abandoned=True) == ()


@pytest.mark.parametrize("name", ABANDONED)
async def test_also_when_the_slot_is_cleaned_for_the_next_lessee_only(
    bench_that_cleans_on_demand: Bench, name: str
) -> None:
    assert await leaks_of(bench_that_cleans_on_demand, VECTORS[name], "v1") == ()


@pytest.mark.parametrize("umask", [0o002, 0o077])
async def test_also_under_another_umask(umask: int) -> None:
    before = os.umask(umask)
    try:
        with made() as bench:
            for name in ("tracked_directories_deleted", "tracked_directory_with_mode_1755", "tree_deleted"):
                for then in ("main", "feature"):
                    assert await leaks_of(bench, VECTORS[name], then) == ()
    finally:
        os.umask(before)


def fill_the_disk(scene: Scene) -> None:
    (scene.tree / "junk").mkdir()
    for size in (1 << 16, 1):
        with suppress(OSError), (scene.tree / f"junk/{size}").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(size))


@pytest.mark.skipif(not IS_ROOT, reason="mounting a small file system is for root")
async def test_a_lessee_that_fills_the_disk() -> None:
    with made() as bench:
        bench.workspaces.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(bench.workspaces)]
        if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
            pytest.skip("nothing can be mounted here")
        try:
            outcome = await bench.play(Vector("disk", "disk", fill_the_disk), "main")
        finally:
            subprocess.run(["umount", "-l", bench.workspaces], check=True)
        assert outcome.leaks == ()


# -- the comparison can fail -----------------------------------------------------------------------------------------


def plain_recipe(clone: Path, ref: str, environment: Mapping[str, str]) -> None:
    """Clean a clone as everybody does at first."""
    for command in (["fetch", "-q"], ["clean", "-ffdxq"], ["reset", "-q", "--hard"]):
        subprocess.run(["git", *command], cwd=clone, env=dict(environment), check=True, capture_output=True, timeout=20)


@pytest.mark.parametrize("name", ["untracked_file", "ignored_files", "tracked_files_edited", "tracked_files_deleted"])
def test_the_plain_recipe_passes_where_it_should(bench: Bench, name: str) -> None:
    assert bench.play_recipe(VECTORS[name], plain_recipe, "main").leaks == ()


@pytest.mark.parametrize(
    ("name", "leak"),
    [
        ("skip_worktree_hides_an_edit", "'tree README.md' is"),
        ("hooks_of_every_kind", "'git hooks/post-checkout' is there"),
        ("hooks_of_every_kind", "executed: post-index-change"),
        ("filter_smudge_by_info", "executed: smudge"),
        ("config_user_name", "'says config' is"),
        ("stash", "'says refs' is"),
        ("remote_head_moved", "'git refs/remotes/origin/HEAD' is"),
        ("rebase_with_conflict", "'git rebase-merge' is there"),
        ("extended_attribute_on_src_pkg", "'tree src/pkg' is"),
        ("tracked_directory_with_mode_0777", "'tree src' is"),
        ("empty_git_directories_below_the_root", "'tree src/.git' is there"),
        ("lock_refs_heads_main_lock", "'git refs/heads/main.lock' is there"),
        ("worktree_leads_outside", "'dir/precious' is missing"),
        ("lock_index_lock", "the recipe failed"),
        ("replaced_blob", "'tree README.md' is"),
        ("objects_emptied", "'says fsck' is"),
        ("unreachable_secret", "is there: 'an object'"),
        ("submodule_place_filled", "'tree vendor/lib/file' is there"),
        ("process_left_writing", "late.txt' is there"),
    ],
)
def test_the_plain_recipe_is_found_to_leak(bench: Bench, name: str, leak: str) -> None:
    found = bench.play_recipe(VECTORS[name], plain_recipe, "main").leaks
    assert any(leak in line for line in found), found


def no_recipe(clone: Path, ref: str, environment: Mapping[str, str]) -> None:
    """Clean nothing."""


@pytest.mark.soak
@pytest.mark.parametrize("vector", named(CORPUS))
def test_every_vector_shows_where_nothing_is_cleaned(bench: Bench, vector: Vector) -> None:
    try:
        assert bench.play_recipe(vector, no_recipe, "main").leaks != ()
    except NotPossibleError as error:
        pytest.skip(str(error))
