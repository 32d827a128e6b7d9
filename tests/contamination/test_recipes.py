"""The recipes that the corpus is played against for comparison do clean a checkout, and leak where they are said to."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from benchmarks.contamination import OURS, Player, players
from tests.contamination.corpus import VECTORS, Vector
from tests.contamination.kit import Scene


def write_by_name_later(scene: Scene) -> None:
    """Unlike whoever stands in the tree it need not be quicker than what deletes that."""
    script = f"ready()\ntold()\nopen({str(scene.tree / 'late.txt')!r}, 'w').close()\ndone()\n"
    scene.leave(script, cwd=Path("/"))


NOTHING = Vector("nothing", "nothing", lambda _scene: None)
LEAKING = {
    "clean -fdx, reset --hard": VECTORS["hooks_of_every_kind"],
    "like actions/checkout": VECTORS["config_user_name"],
    "worktree removed, added": VECTORS["stash"],
    "rm -rf, fresh clone": Vector("write_by_name_later", "processes", write_by_name_later),
}


@pytest.fixture(scope="module")
def everybody() -> Iterator[dict[str, Player]]:
    with TemporaryDirectory(prefix="repopool-", ignore_cleanup_errors=True) as directory:
        yield players(Path(directory))


@pytest.mark.parametrize("name", LEAKING)
def test_a_recipe_passes_what_it_should_and_is_found_to_leak(everybody: dict[str, Player], name: str) -> None:
    assert everybody[name](NOTHING).leaks == ()
    assert everybody[name](VECTORS["untracked_file"]).leaks == ()
    assert everybody[name](LEAKING[name]).leaks != ()


def test_everybody_is_compared_with_the_pool(everybody: dict[str, Player]) -> None:
    assert set(everybody) == {OURS, *LEAKING}
