"""The corpus of contaminations, played against the pool and against what others do to use a checkout again.

    python -m benchmarks.contamination [--vectors N]

Each vector does one thing to a checkout that a lessee could; it passes where the next lessee sees a fresh clone of
`main`, nothing planted ran, nothing outside changed, and the recipe did not fail. Prints how many pass, by group.
`--vectors N` plays every N-th vector only. Run as root it plays vectors that only root can.
"""

import argparse
import asyncio
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._report import write_json
from tests._scratch import scratch
from tests.contamination.corpus import Vector, for_user
from tests.contamination.kit import NotPossibleError
from tests.contamination.recipes import WorktreeBench, clean_and_reset, clone_again, like_actions_checkout
from tests.contamination.trial import Bench, Outcome

Player = Callable[[Vector], Outcome]

OURS = "repopool"


def players(directory: Path) -> dict[str, Player]:
    """Return who plays, by name, ours first."""
    bench, worktrees = Bench(directory / "clones"), WorktreeBench(directory / "worktrees")

    def by_pool(vector: Vector) -> Outcome:
        return asyncio.run(bench.play(vector, "main"))

    return {
        OURS: by_pool,
        "clean -fdx, reset --hard": lambda vector: bench.play_recipe(vector, clean_and_reset, "main"),
        "like actions/checkout": lambda vector: bench.play_recipe(vector, like_actions_checkout(bench), "main"),
        "worktree removed, added": lambda vector: worktrees.play_recipe(vector, worktrees.remove_and_add, "main"),
        "rm -rf, fresh clone": lambda vector: bench.play_recipe(vector, clone_again(bench), "main"),
    }


def play(player: Player, vector: Vector) -> list[str] | None:
    """Return what leaked, None where the vector cannot be played."""
    try:
        return list(player(vector).leaks)
    except NotPossibleError:
        return None
    except (OSError, AssertionError, subprocess.SubprocessError) as error:
        # It means nothing to this kind of checkout: a linked worktree's `.git` is no directory, say.
        return None if not isinstance(error, subprocess.TimeoutExpired) else [f"hung: {error}"]


def measure(vectors: Sequence[Vector]) -> dict[str, dict[str, list[str] | None]]:
    """Let everybody play every vector; return what leaked, by player and vector."""
    with scratch() as directory:
        found: dict[str, dict[str, list[str] | None]] = {}
        for name, player in players(directory).items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            found[name] = {vector.name: play(player, vector) for vector in vectors}
        return found


def table(vectors: Sequence[Vector], found: dict[str, dict[str, list[str] | None]]) -> str:
    """Return how many vectors pass, of how many that could be played, as a table in Markdown."""
    groups = {vector.name: vector.group for vector in vectors}
    rows = [["group", *found], ["---", *("---" for _ in found)]]
    passed = {name: Counter(groups[v] for v, leaks in own.items() if leaks == []) for name, own in found.items()}
    played = {name: Counter(groups[v] for v, leaks in own.items() if leaks is not None) for name, own in found.items()}
    rows += [
        [group, *(f"{passed[name][group]} of {played[name][group]}" for name in found)]
        for group in dict.fromkeys(groups.values())
    ]
    rows.append(["**all**", *(f"**{passed[name].total()} of {played[name].total()}**" for name in found)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1, metavar="N")
    options = parser.parse_args()
    logging.getLogger("repopool").addHandler(logging.NullHandler())  # what it warns of is what is done to it
    vectors = for_user(is_root=os.geteuid() == 0)[:: options.vectors]
    found = measure(vectors)
    print(table(vectors, found))
    leaked = {name: leaks for name, leaks in found[OURS].items() if leaks}
    for name, leaks in leaked.items():
        print(f"  ! {name}: {leaks[:3]}")
    data: dict[str, Any] = {"user": os.geteuid(), "leaks": found}
    print(f"written to {write_json('contamination', data)}")
    return 1 if leaked else 0


if __name__ == "__main__":
    raise SystemExit(main())
