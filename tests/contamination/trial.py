"""Plays vectors against a pool of one slot, and against other recipes: lease, contaminate, return, lease again, compare.

One `Bench` holds what trials share: the origin, fresh clones of its refs as references, and a pool on disk. After a
trial that leaked the pool is thrown away, so that every trial begins with a slot that is known to be clean. As a
program it plays vectors as whoever runs it and prints what leaked, as JSON: `python -m tests.contamination.trial
DIRECTORY REF VECTOR...`
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from repopool_async import LeasedSlot, PoolConfig, PoolManager, SlotState
from tests.contamination.corpus import VECTORS, Vector
from tests.contamination.evidence import (
    Evidence,
    clone_evidence,
    differences,
    directory_evidence,
    pool_evidence,
    with_borrowed_objects,
)
from tests.contamination.kit import Scene, wait_for
from tests.contamination.origin import Origin

POOL = "corpus"
REFS = ("main", "feature", "v1", "commit")
"""What is leased after a contamination; `commit` stands for a commit's full id."""

_TRIAL_SECONDS = 30.0
_GIT_SECONDS = 10.0

_ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "LC_ALL": "C",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_AUTHOR_NAME": "Lessee",
    "GIT_AUTHOR_EMAIL": "lessee@example.com",
    "GIT_COMMITTER_NAME": "Lessee",
    "GIT_COMMITTER_EMAIL": "lessee@example.com",
    "GIT_EDITOR": "true",
}


@attrs.frozen
class Outcome:
    """What one trial showed.

    Attributes:
        leaks: what the next holder saw, what ran, what changed outside; nothing where all is well.
        log: the steps of the clean-up, of all cleanings of the trial.
    """

    vector: str
    then: str
    leaks: tuple[str, ...]
    log: tuple[str, ...] = ()


class Bench:
    """What trials in one directory share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**_ENVIRONMENT, "HOME": str(directory / "home"), "GIT_CONFIG_GLOBAL": "/dev/null"}
        for name in ("home", "references", "template"):
            (directory / name).mkdir(parents=True)
        self.origin = Origin(directory)
        self._make_template()
        self._references: dict[str, Evidence] = {}

    def reference(self, then: str) -> Evidence:
        """Return the evidence of a fresh clone, as it is when it borrows its objects."""
        if then not in self._references:
            clone = self.directory / "references" / then
            fresh_clone(self.origin, clone, then, self.environment)
            self._references[then] = with_borrowed_objects(clone_evidence(clone, self.environment))
        return self._references[then]

    def fresh_outside(self) -> Path:
        """Return a directory that no trial has seen: what lies beside the pool and must not change."""
        outside = self.directory / "outside"
        shutil.rmtree(outside, ignore_errors=True)
        shutil.copytree(self.directory / "template", outside, symlinks=True)
        return outside

    def scene(self, tree: Path, outside: Path, run: Callable[..., None]) -> Scene:
        """Return the scene for a vector."""
        return Scene(tree=tree, outside=outside, origin=self.origin.url, environment=dict(self.environment), run=run)

    def name_of(self, then: str) -> str:
        """Return what is asked of the pool for one of `REFS`."""
        return self.origin.first if then == "commit" else then

    # -- against a pool ------------------------------------------------------------------------------------------

    @property
    def _workspaces(self) -> Path:
        return self.directory / "workspaces"

    async def play(self, vector: Vector, then: str) -> Outcome:
        """Play a vector in a leased slot, and look at what the next lessee gets."""
        trial = _Trial(self, vector, then)
        try:
            async with asyncio.timeout(_TRIAL_SECONDS):
                async with PoolManager(PoolConfig(workspaces_dir=self._workspaces, close_timeout=1)) as manager:
                    await self._ensure_pool(manager)
                    await trial.run(manager)
        except TimeoutError:
            trial.leaks.append(f"it took more than {_TRIAL_SECONDS:g} s")
        except Exception as error:
            if not trial.is_played:
                raise
            trial.leaks.append(f"{type(error).__name__}: {error}")
        finally:
            trial.end()
            if trial.leaks or vector.quarantine or vector.leaves_trash:
                self.throw_away_pool()
        return Outcome(vector.name, then, tuple(trial.leaks), tuple(trial.log))

    async def _ensure_pool(self, manager: PoolManager) -> None:
        if POOL not in await manager.list_pools():
            options: dict[str, Any] = {"fetch_on_allocate": False, "git_timeout": _GIT_SECONDS, "acquire_timeout": 20}
            await manager.create_pool(POOL, self.origin.url, num_slots=1, **options)

    def throw_away_pool(self) -> None:
        """Make the next trial begin with a new pool."""
        subprocess.run(["rm", "-rf", self._workspaces], check=False, stderr=subprocess.DEVNULL)

    # -- against recipes -----------------------------------------------------------------------------------------

    def play_recipe(self, vector: Vector, recipe: Callable[[Path, str, Mapping[str, str]], None], then: str) -> Outcome:
        """Play a vector in an ordinary clone that is then cleaned by a recipe, and look at it in the same way."""
        clone = self.directory / "recipe"
        subprocess.run(["rm", "-rf", clone], check=True)
        outside = self.fresh_outside()
        scene = self.scene(clone, outside, lambda *argv, env: _run_plain(clone, argv, {**self.environment, **env}))
        if vector.before:
            vector.before(scene)
        fresh_clone(self.origin, clone, "main", self.environment)
        try:
            vector.act(scene)
            clear(scene.canary)
            before = directory_evidence(outside, skip="control")
            leaks = []
            try:
                recipe(clone, self.name_of(then), self.environment)
            except (OSError, subprocess.SubprocessError) as error:
                leaks.append(f"the recipe failed: {error}")
            for act in scene.late:
                act()
            leaks += _compared(self._reference_of_a_whole_clone(then), clone, self.environment)
            leaks += _executed(scene)
            leaks += differences(before, directory_evidence(outside, skip="control"))
        finally:
            scene.end()
        return Outcome(vector.name, then, tuple(leaks))

    def _reference_of_a_whole_clone(self, then: str) -> Evidence:
        return {name: text for name, text in self.reference(then).items() if name != "git objects/info/alternates"}

    def _make_template(self) -> None:
        template = self.directory / "template"
        for name in ("canary", "control", "dir", "bin"):
            (template / name).mkdir()
        (template / "file").write_text("must stay\n")
        (template / "dir/precious").write_text("must stay\n")
        for command in (["init", "-q", "-b", "main"], ["commit", "-q", "--allow-empty", "-m", "Elsewhere"]):
            if command[0] == "init":
                (template / "repo").mkdir()
            subprocess.run(["git", *command], cwd=template / "repo", env=self.environment, check=True)
        (template / "repo/precious").write_text("must stay\n")


class _Trial:
    """One vector, from the first lease to the last look."""

    def __init__(self, bench: Bench, vector: Vector, then: str) -> None:
        self.leaks: list[str] = []
        self.log: list[str] = []
        self.is_played = False
        self._bench = bench
        self._vector = vector
        self._then = then
        self._outside = bench.fresh_outside()
        self._scene: Scene | None = None

    async def run(self, manager: PoolManager) -> None:
        if self._vector.before:
            await self._make_older_things(manager, self._vector.before)
        async with manager.lease(POOL, ref="main") as slot:
            slot_id, tree = slot.slot_id, slot.path
            scene = self._scene = self._bench.scene(tree, self._outside, _runner(slot))
            await asyncio.to_thread(self._vector.act, scene)
            clear(scene.canary)
            outside = directory_evidence(self._outside, skip="control")
            pool = pool_evidence(tree.parents[2])
            self.is_played = True
        await manager.wait_clean()
        self.leaks += await self._not_available(manager, slot_id)
        if not (self.leaks or await self._is_quarantined(manager, slot_id)):
            async with manager.lease(POOL, ref=self._bench.name_of(self._then)) as slot:
                assert (slot.slot_id, slot.path) == (slot_id, tree)
                await asyncio.to_thread(self._look, tree)
            await manager.wait_clean()
            self.leaks += await self._not_available(manager, slot_id)
        self.leaks += _executed(scene)
        self.leaks += differences(outside, directory_evidence(self._outside, skip="control"))
        self.leaks += differences(pool, pool_evidence(tree.parents[2]))
        await self._look_at_rests(manager, tree)
        entries = await manager.get_cleanup_log(slot_id, limit=4)
        self.log += [f"{entry.operation} {entry.rung or ''}: {', '.join(entry.steps)}" for entry in entries]

    async def _make_older_things(self, manager: PoolManager, before: Callable[[Scene], None]) -> None:
        async with manager.lease(POOL, ref="main") as slot:
            before(self._bench.scene(slot.path, self._outside, _runner(slot)))
        await manager.wait_clean()

    def _look(self, tree: Path) -> None:
        assert self._scene is not None
        for act in self._scene.late:
            act()
        self.leaks += _compared(self._bench.reference(self._then), tree, self._bench.environment)
        for name in self._scene.hidden_objects:
            if self._scene.git("cat-file", "-t", name, check=False):
                self.leaks.append(f"the object {name} can be read")

    async def _is_quarantined(self, manager: PoolManager, slot_id: str) -> bool:
        return bool(self._vector.quarantine) and (await manager.get_slot_status(slot_id)).state is SlotState.ERROR

    async def _not_available(self, manager: PoolManager, slot_id: str) -> list[str]:
        status = await manager.get_slot_status(slot_id)
        if status.state is SlotState.AVAILABLE or await self._is_quarantined(manager, slot_id):
            return []
        return [f"the slot is {status.state}: {status.error}"]

    async def _look_at_rests(self, manager: PoolManager, tree: Path) -> None:
        """What was thrown away must be possible to delete, and nothing else may lie about."""
        await manager.recover()
        trash = tree.parents[2] / "trash"
        if not self._vector.leaves_trash and trash.exists():
            await asyncio.to_thread(wait_for, lambda: not list(trash.iterdir()), lambda: "trash remains")
        known = {"slot.json", "history.jsonl", "cleanup.jsonl", "pristine", "tree", "fence", "run"}
        self.leaks += [f"beside the tree lies {name}" for name in os.listdir(tree.parent) if name not in known]

    def end(self) -> None:
        if self._scene is not None:
            self._scene.end()


def fresh_clone(origin: Origin, clone: Path, then: str, environment: Mapping[str, str]) -> None:
    """Clone as a user would who wants to see one ref."""

    branch = "v1" if then == "commit" else then  # that tag stands on that commit, and shows the same
    command = ["git", "clone", "-q", "--template=", "--branch", branch, origin.url, str(clone)]
    subprocess.run(command, env=dict(environment), check=True, capture_output=True)


def clear(directory: Path) -> None:
    """Forget what ran while a vector was being set up."""
    for path in directory.iterdir():
        path.unlink()


def _compared(reference: Evidence, clone: Path, environment: Mapping[str, str]) -> list[str]:
    try:
        return differences(reference, clone_evidence(clone, environment))
    except (OSError, subprocess.SubprocessError) as error:
        return [f"it cannot be looked at: {error}"]


def _executed(scene: Scene) -> list[str]:
    return [f"executed: {path.name}" for path in scene.canary.iterdir()]


def _runner(slot: LeasedSlot) -> Callable[..., None]:
    loop = asyncio.get_running_loop()

    def run(*argv: str, env: Mapping[str, str] | None = None) -> None:
        asyncio.run_coroutine_threadsafe(slot.run(*argv, env=env), loop).result()

    return run


def _run_plain(clone: Path, argv: tuple[str, ...], environment: Mapping[str, str]) -> None:
    subprocess.run(argv, cwd=clone, env=dict(environment), check=True)


async def _main(directory: Path, then: str, names: list[str]) -> None:
    bench = Bench(directory)
    for name in names:
        outcome = await bench.play(VECTORS[name], then)
        print(json.dumps(attrs.asdict(outcome)), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
