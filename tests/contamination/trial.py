"""Plays vectors against a pool of one slot and other recipes: lease, contaminate, return, lease again, compare.

One `Bench` holds what trials share: the origin, fresh clones of its refs as references, and a pool on disk. After a
trial that leaked the pool is thrown away, so that every trial begins with a slot that is known to be clean. As a
program it plays vectors as another user and prints the outcomes as JSON, a line each:
`python -m tests.contamination.trial DIRECTORY UID REF VECTOR...`
"""

import asyncio
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
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
from tests.contamination.kit import NotPossibleError, Scene, wait_for
from tests.contamination.origin import SUBMODULE, Origin

POOL = "corpus"
REFS = ("main", "feature", "v1", "commit")
"""What is leased after a contamination; `commit` stands for a commit's full id."""

_NO_EVIDENCE = frozenset({"control", "late"})
"""What vectors themselves change outside after the return."""

_TRACES_OF_RECIPES = ("'git FETCH_HEAD'", "'git ORIG_HEAD'", "'logs ")
"""What fetching and resetting leave by themselves."""

_KEPT_FILE = "inside/kept.txt"

LOSING_WHAT_IS_KEPT = frozenset({"processes", "immutable_directory"})
"""Groups of vectors, and vectors, that may leave somebody in the tree, or what is kept where it cannot be moved."""

_PR_SET_DUMPABLE = 4
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


Recipe = Callable[[Path, str, Mapping[str, str]], None]
"""Makes a clone that somebody used show a ref to the next one, as well as it can."""


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
    """What trials in one directory share.

    Args:
        options: of the pool.
    """

    trial_seconds = 30.0

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory = directory
        self.options: dict[str, Any] = {"fetch_on_allocate": False, "git_timeout": _GIT_SECONDS, **options}
        self.environment = {**_ENVIRONMENT, "HOME": str(directory / "home"), "GIT_CONFIG_GLOBAL": "/dev/null"}
        for name in ("home", "references", "template"):
            (directory / name).mkdir(parents=True)
        self.kept: tuple[str, ...] = tuple(options.get("keep", ()))
        self.submodules = (SUBMODULE,) if options.get("submodules") else ()
        self.origin = Origin(directory, with_lfs=bool(options.get("lfs")), has_large_submodule=bool(self.submodules))
        if options.get("history"):
            allow = ["git", "-C", self.origin.url, "config", "uploadpack.allowFilter", "true"]
            subprocess.run(allow, check=True)
        self._make_template()
        self._references: dict[str, Evidence] = {}
        self._untouched: Evidence = {}

    def reference(self, then: str) -> Evidence:
        """Return the evidence of a fresh clone."""
        if then not in self._references:
            clone = self.directory / "references" / then
            fresh_clone(self.origin, clone, then, self.environment, self.options)
            self._references[then] = clone_evidence(clone, self.environment, self.submodules)
        return self._references[then]

    def fresh_outside(self) -> Path:
        """Return a directory that no trial has touched: what lies beside the pool and must not change."""
        outside = self.directory / "outside"
        if not self._untouched or directory_evidence(outside) != self._untouched:
            shutil.rmtree(outside, ignore_errors=True)
            shutil.copytree(self.directory / "template", outside, symlinks=True)
            self._untouched = directory_evidence(outside)
        return outside

    def scene(self, tree: Path, outside: Path, run: Callable[..., None]) -> Scene:
        """Return the scene for a vector."""
        return Scene(tree=tree, outside=outside, origin=self.origin.url, environment=dict(self.environment), run=run)

    def name_of(self, then: str) -> str:
        """Return what is asked of the pool for one of `REFS`."""
        return self.origin.first if then == "commit" else then

    # -- against a pool ------------------------------------------------------------------------------------------

    @property
    def workspaces(self) -> Path:
        """Where the pool lies."""
        return self.directory / "workspaces"

    async def play(self, vector: Vector, then: str, *, is_abandoned: bool = False, is_inside: bool = False) -> Outcome:
        """Play a vector in a leased slot, and look at what the next lessee gets.

        Args:
            is_abandoned: whether the lease is never given back, its holder ends, and another takes the slot over.
            is_inside: whether it is played in the submodule.

        Raises:
            NotPossibleError: it cannot be played here.
        """
        trial = _Trial(self, vector, then, is_inside=is_inside)
        try:
            async with asyncio.timeout(self.trial_seconds):
                async with self._manager() as manager:
                    await self._ensure_pool(manager)
                    await trial.contaminate(manager, is_abandoned=is_abandoned)
                    if not is_abandoned:
                        await trial.look(manager)
                if is_abandoned:
                    async with self._manager() as manager:
                        await trial.look(manager)
        except TimeoutError:
            trial.leaks.append(f"it took more than {self.trial_seconds:g} s")
        except Exception as error:
            if not trial.is_played:
                raise
            trial.leaks.append(f"{type(error).__name__}: {error}")
        finally:
            trial.end()
            if trial.leaks or vector.quarantine or vector.leaves_trash:
                self.throw_away_pool()
        return Outcome(vector.name, then, tuple(trial.leaks), tuple(trial.log))

    def _manager(self) -> AbstractAsyncContextManager[PoolManager]:
        return PoolManager(PoolConfig(workspaces_dir=self.workspaces, close_timeout=0.5))

    async def _ensure_pool(self, manager: PoolManager) -> None:
        if POOL not in await manager.list_pools():
            await manager.create_pool(POOL, self.origin.url, num_slots=1, **self.options)
            for then in REFS if self.options.get("history") == "blobless" else ():
                # What a check-out fetches is there from now on, so that a trial changes nothing of the mirror.
                async with manager.lease(POOL, ref=self.name_of(then)):
                    pass
                await manager.wait_clean()

    def throw_away_pool(self) -> None:
        """Make the next trial begin with a new pool."""
        subprocess.run(["rm", "-rf", self.workspaces], check=False, stderr=subprocess.DEVNULL)

    # -- against recipes -----------------------------------------------------------------------------------------

    def play_recipe(self, vector: Vector, recipe: Recipe, then: str) -> Outcome:
        """Play a vector in an ordinary clone that is then cleaned by a recipe, and look at it in the same way."""
        clone = self.directory / "recipe"
        subprocess.run(["rm", "-rf", clone], check=True)
        outside = self.fresh_outside()
        expected = self.expected(then)
        scene = self.scene_of_clone(clone, outside)
        if vector.before:
            vector.before(scene)
        self.make_clone(clone)
        try:
            vector.play(scene)
            clear(scene.canary)
            before = directory_evidence(outside, skip=_NO_EVIDENCE)
            leaks = []
            try:
                recipe(clone, self.name_of(then), self.environment)
            except (OSError, subprocess.SubprocessError) as error:
                leaks.append(f"the recipe failed: {error}")
            for act in scene.late:
                act()
            found = _compared(expected, lambda: self.look_at_clone(clone))
            leaks += [line for line in found if not line.startswith(_TRACES_OF_RECIPES)]
            leaks += _executed(scene)
            leaks += differences(before, directory_evidence(outside, skip=_NO_EVIDENCE))
        finally:
            scene.end()
        return Outcome(vector.name, then, tuple(leaks))

    def make_clone(self, clone: Path) -> None:
        """Make what a lessee is given where there is no pool."""
        fresh_clone(self.origin, clone, "main", self.environment)

    def look_at_clone(self, clone: Path) -> Evidence:
        """Return the evidence of what a lessee was given."""
        return clone_evidence(clone, self.environment)

    def expected(self, then: str) -> Evidence:
        """Return what that is to be compared with."""
        return self.reference(then)

    def scene_of_clone(self, clone: Path, outside: Path) -> Scene:
        """Return the scene for a vector where there is no pool."""
        return self.scene(
            clone, outside, lambda *argv, env=None: _run_plain(clone, argv, {**self.environment, **(env or {})})
        )

    def _make_template(self) -> None:
        template = self.directory / "template"
        for name in ("canary", "control", "late", "dir", "bin"):
            (template / name).mkdir()
        (template / "file").write_text("must stay\n")
        (template / "dir/precious").write_text("must stay\n")
        (template / "repo").mkdir()
        for command in ("init -q --template= -b main", "commit -q --allow-empty -m Elsewhere"):
            subprocess.run(["git", *command.split()], cwd=template / "repo", env=self.environment, check=True)
        (template / "repo/precious").write_text("must stay\n")


class _Trial:
    """One vector, from the first lease to the last look."""

    def __init__(self, bench: Bench, vector: Vector, then: str, *, is_inside: bool) -> None:
        self._is_inside = is_inside
        self.leaks: list[str] = []
        self.log: list[str] = []
        self.is_played = False
        self._bench = bench
        self._vector = vector
        self._then = then
        self._outside = bench.fresh_outside()
        self._scene: Scene | None = None
        self._left: list[str] = []
        self._slot_id = ""
        self._tree = Path()
        self._outside_before: Evidence = {}
        self._pool_before: Evidence = {}

    async def contaminate(self, manager: PoolManager, *, is_abandoned: bool) -> None:
        """Lease the slot, play the vector, and give the slot back, unless it is abandoned."""
        if self._vector.before:
            await self._make_older_things(manager, self._vector.before)
        slot = await manager.allocate_slot(POOL, ref="main", timeout=5)
        assert slot is not None
        self._slot_id, self._tree = slot.slot_id, Path(str(slot.path))
        for name in self._bench.kept:
            _fill(self._tree / name)
        self._scene = self._bench.scene(self._tree, self._outside, _runner(slot))
        if self._is_inside:
            self._scene = inside_submodule(self._scene)
        await asyncio.to_thread(self._vector.play, self._scene)
        self._left = [name for name in self._bench.kept if _is_filled(self._tree, name)]
        clear(self._scene.canary)
        self._outside_before = directory_evidence(self._outside, skip=_NO_EVIDENCE)
        self._pool_before = pool_evidence(self._tree.parents[2])
        self.is_played = True
        if not is_abandoned:
            await manager.release_slot(slot)

    async def look(self, manager: PoolManager) -> None:
        """Lease the slot again and look at everything."""
        await manager.recover()
        self.leaks += await self._not_available(manager)
        if not (self.leaks or await self._is_quarantined(manager)):
            async with manager.lease(POOL, ref=self._bench.name_of(self._then)) as slot:
                assert (slot.slot_id, Path(str(slot.path))) == (self._slot_id, self._tree)
                await asyncio.to_thread(self._look_into_the_tree)
            await manager.wait_clean()
            if self._then != "main":
                self.leaks += [str(problem) for problem in (await manager.check(POOL)).items()]
            self.leaks += await self._not_available(manager)
        await self._look_at_rests(manager)
        self._look_outside()
        entries = await manager.get_cleanup_log(self._slot_id, limit=4)
        self.log += [f"{entry.operation} {entry.rung or ''}: {', '.join(entry.steps)}" for entry in entries]

    async def _make_older_things(self, manager: PoolManager, before: Callable[[Scene], None]) -> None:
        async with manager.lease(POOL, ref="main") as slot:
            scene = self._bench.scene(Path(str(slot.path)), self._outside, _runner(slot))
            before(inside_submodule(scene) if self._is_inside else scene)
        await manager.wait_clean()

    def _look_into_the_tree(self) -> None:
        assert self._scene is not None
        for act in self._scene.late:
            act()
        self._look_for_what_is_kept()
        expected = with_borrowed_objects(self._bench.reference(self._then))
        bench = self._bench
        self.leaks += _compared(expected, lambda: clone_evidence(self._tree, bench.environment, bench.submodules))
        for name in self._scene.hidden_objects:
            if self._scene.git("cat-file", "-t", name, check=False):
                self.leaks.append(f"the object {name} can be read")

    def _look_for_what_is_kept(self) -> None:
        """What the vector left of kept directories must be there, and is taken away: all else must be as cloned."""
        for name in self._bench.kept:
            if _is_filled(self._tree, name):
                subprocess.run(["chmod", "-R", "u+rwx", self._tree / name], check=True)
                shutil.rmtree(self._tree / name)
            elif name in self._left and not {self._vector.group, self._vector.name} & LOSING_WHAT_IS_KEPT:
                self.leaks.append(f"{name} was not kept")

    def _look_outside(self) -> None:
        assert self._scene is not None
        self.leaks += _executed(self._scene)
        self.leaks += differences(self._outside_before, directory_evidence(self._outside, skip=_NO_EVIDENCE))
        self.leaks += differences(self._pool_before, pool_evidence(self._tree.parents[2]))

    async def _is_quarantined(self, manager: PoolManager) -> bool:
        status = await manager.get_slot_status(self._slot_id)
        return bool(self._vector.quarantine) and status.state is SlotState.ERROR

    async def _not_available(self, manager: PoolManager) -> list[str]:
        status = await manager.get_slot_status(self._slot_id)
        waits = status.state is SlotState.CLEANING and not self._bench.options.get("clean_on_release", True)
        if status.state is SlotState.AVAILABLE or waits or await self._is_quarantined(manager):
            return []
        return [f"the slot is {status.state}: {status.error}"]

    async def _look_at_rests(self, manager: PoolManager) -> None:
        """What was thrown away must be possible to delete, and nothing else may lie about."""
        await manager.recover()
        await manager.wait_clean()
        trash = self._tree.parents[2] / "trash"
        if not self._vector.leaves_trash and trash.exists():
            await asyncio.to_thread(wait_for, lambda: not list(trash.iterdir()), lambda: "trash remains")
        known = {"slot.json", "history.jsonl", "cleanup.jsonl", "pristine", "tree", "fence", "run"}
        known |= {"kept"} if self._bench.kept else set()
        self.leaks += [f"beside the tree lies {name}" for name in os.listdir(self._tree.parent) if name not in known]

    def end(self) -> None:
        if self._scene is not None:
            self._scene.end()


class _InnerScene(Scene):
    @property
    def git_dir(self) -> Path:
        return self.tree.parents[1] / ".git/modules" / SUBMODULE


def inside_submodule(scene: Scene) -> Scene:
    """Return the scene for a vector that does to the submodule what it usually does to the slot."""
    return _InnerScene(scene.tree / SUBMODULE, scene.outside, scene.origin, scene.environment, scene.run)


def fresh_clone(
    origin: Origin, clone: Path, then: str, environment: Mapping[str, str], options: Mapping[str, Any] | None = None
) -> None:
    """Clone as a user would who wants to see one ref, and what the options of a pool say."""

    options = options or {}
    branch = "v1" if then == "commit" else then  # that tag stands on that commit, and shows the same
    command = ["git"]
    recursive = ["--recurse-submodules"] if options.get("submodules") else []
    # Submodules take their templates from there only; the directory holds none.
    more = {"GIT_ALLOW_PROTOCOL": "file", "GIT_TEMPLATE_DIR": environment["HOME"]} if recursive else {}
    partial = ["--no-local", "--filter=blob:none"] if options.get("history") == "blobless" else []
    if options.get("lfs"):
        command += ["-c", "filter.lfs.process=git-lfs filter-process", "-c", "filter.lfs.required=true"]
    commands = [
        [*command, "clone", "-q", "--template=", *recursive, *partial, "--branch", branch, origin.url, str(clone)]
    ]
    if options.get("sparse"):
        commands.append(["git", "-C", str(clone), "sparse-checkout", "set", "--cone", *options["sparse"]])
    if options.get("lfs"):
        commands.append(["git", "-C", str(clone), "lfs", "install", "--local"])
    for command in commands:
        subprocess.run(command, env={**environment, **more}, check=True, capture_output=True)


def _fill(directory: Path) -> None:
    (directory / _KEPT_FILE).parent.mkdir(parents=True, exist_ok=True)
    (directory / _KEPT_FILE).write_text("kept")


def _is_filled(tree: Path, name: str) -> bool:
    path = tree / name / _KEPT_FILE
    try:
        path.lstat()
    except PermissionError:
        return True  # to be opened up, not to be lost
    except OSError:
        return False
    return not tree.is_symlink() and path.resolve() == tree.resolve() / name / _KEPT_FILE


def clear(directory: Path) -> None:
    """Forget what ran while a vector was being set up."""
    for path in directory.iterdir():
        path.unlink()


def _compared(reference: Evidence, look: Callable[[], Evidence]) -> list[str]:
    try:
        return differences(reference, look())
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


async def _play_all(directory: Path, then: str, names: Iterable[str]) -> None:
    bench = Bench(directory)
    for name in names:
        try:
            outcome = await bench.play(VECTORS[name], then)
        except NotPossibleError as error:
            outcome = Outcome(name, then, (), (str(error),))
        sys.stdout.write(json.dumps(attrs.asdict(outcome)) + "\n")


def _become(user: int, directory: Path) -> None:
    """Be an ordinary user from now on, who owns the directory."""
    os.chown(directory, user, user)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    # The kernel takes who changes users for somebody with secrets, and hides it from itself.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def main(directory: Path, user: int, then: str, names: Sequence[str]) -> None:
    """Play vectors as another user and print the outcomes, a line each; only root can."""
    # Once as root first: afterwards what is imported late may no longer be readable.
    asyncio.run(_play_all(directory / "root", then, names[:1]))
    own = directory / "user"
    own.mkdir()
    _become(user, own)
    asyncio.run(_play_all(own, then, names))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
