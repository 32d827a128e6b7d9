"""What others do to use a checkout again, transcribed to be compared with: never part of the product.

Each recipe is given a clone that somebody used, the ref wanted next and the environment, and raises where the real one
would fail its job. Where the real one begins anew when it is in trouble, so does the transcription.
"""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.contamination.evidence import Evidence, clone_evidence
from tests.contamination.kit import Scene
from tests.contamination.trial import Bench, Recipe, fresh_clone

_GIT_SECONDS = 20
_SHARED = ("hooks", "info", "config", "refs", "packed-refs", "objects", "shallow", "modules")
"""What the worktrees of a repository have in common."""


def _git(directory: Path, environment: Mapping[str, str], *args: str) -> str:
    done = subprocess.run(
        ["git", *args], cwd=directory, env=dict(environment), stdin=subprocess.DEVNULL,
        check=True, capture_output=True, timeout=_GIT_SECONDS,
    )  # fmt: skip
    return done.stdout.decode(errors="surrogateescape").strip()


def clean_and_reset(clone: Path, ref: str, environment: Mapping[str, str]) -> None:
    """Fetch, clean, reset: what everybody writes first."""
    for args in (["fetch", "-q"], ["clean", "-fdxq"], ["reset", "-q", "--hard"]):
        _git(clone, environment, *args)


def like_actions_checkout(bench: Bench) -> Recipe:
    """Return what actions/checkout does on a machine that stays, with `clean: true` and `fetch-depth: 0`."""

    def recipe(clone: Path, ref: str, environment: Mapping[str, str]) -> None:
        def git(*args: str) -> str:
            return _git(clone, environment, *args)

        try:
            if git("config", "--get", "remote.origin.url") != bench.origin.url or not (clone / ".git").is_dir():
                raise FileNotFoundError(clone)
            for lock in ("index.lock", "shallow.lock"):
                (clone / ".git" / lock).unlink(missing_ok=True)
            git("checkout", "--detach")
            for branch in git("for-each-ref", "--format=%(refname:short)", "refs/heads").splitlines():
                git("branch", "--delete", "--force", branch)
            git("clean", "-ffdx")
            git("reset", "--hard", "HEAD")
        except (OSError, subprocess.SubprocessError):
            clone_again(bench)(clone, ref, environment)
            return
        git(
            *("-c", "protocol.version=2", "fetch", "--prune", "--no-recurse-submodules", "origin"),
            *("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"),
        )
        git("checkout", "--progress", "--force", "-B", ref, f"refs/remotes/origin/{ref}")

    return recipe


def clone_again(bench: Bench) -> Recipe:
    """Return the recipe of those who trust nothing: delete all, clone anew."""

    def recipe(clone: Path, ref: str, environment: Mapping[str, str]) -> None:
        subprocess.run(["rm", "-rf", clone], check=True, capture_output=True)
        fresh_clone(bench.origin, clone, ref, environment)

    return recipe


class WorktreeBench(Bench):
    """Gives lessees a linked worktree each, of one repository whose main worktree nobody uses."""

    @property
    def repository(self) -> Path:
        """The repository that all worktrees are of."""
        return self.directory / "repository"

    def make_clone(self, clone: Path) -> None:
        """Make repository and worktree anew."""
        subprocess.run(["rm", "-rf", self.repository], check=True)
        fresh_clone(self.origin, self.repository, "main", self.environment)
        _git(self.repository, self.environment, "checkout", "-q", "--detach")
        _git(self.repository, self.environment, "worktree", "add", "-q", str(clone), "main")

    def look_at_clone(self, clone: Path) -> Evidence:
        """Return the worktree's evidence, with what its repository's worktrees share in place of a git directory.

        What only the main worktree has is left out, which is to the recipe's advantage.
        """
        own = {name: text for name, text in clone_evidence(clone, self.environment).items() if name.startswith("tree ")}
        common = clone_evidence(self.repository, self.environment)
        shared = tuple(f"git {name}" for name in _SHARED)
        kept = {name: text for name, text in common.items() if name.startswith((*shared, "says config", "says refs"))}
        said = {
            f"says {args[0]}": _git(clone, self.environment, *args)
            for args in (["status", "--porcelain=v2", "--branch", "--ignored"], ["ls-files", "--stage", "-v"])
        }
        return {**own, **kept, **said}

    def expected(self, then: str) -> Evidence:
        """Return the evidence of a worktree that was just added to a repository just cloned."""
        if then not in self._references:
            clone = self.directory / "references" / then
            self.make_clone(clone)
            self._references[then] = self.look_at_clone(clone)
        return self._references[then]

    def scene_of_clone(self, clone: Path, outside: Path) -> Scene:
        """Return a scene whose git directory is the repository's, where what matters to worktrees lies."""
        usual = super().scene_of_clone(clone, outside)
        return _WorktreeScene(
            usual.tree, usual.outside, usual.origin, usual.environment, usual.run, repository=self.repository
        )

    def remove_and_add(self, clone: Path, ref: str, environment: Mapping[str, str]) -> None:
        """Remove the worktree, by force if need be, and add it again."""
        try:
            _git(self.repository, environment, "worktree", "remove", "--force", "--force", str(clone))
        except subprocess.SubprocessError:
            subprocess.run(["rm", "-rf", clone], check=True, capture_output=True)
        shutil.rmtree(clone, ignore_errors=True)
        _git(self.repository, environment, "worktree", "prune")
        _git(self.repository, environment, "worktree", "add", "-q", "--force", str(clone), ref)


class _WorktreeScene(Scene):
    def __init__(self, *args: object, repository: Path) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._repository = repository

    @property
    def git_dir(self) -> Path:
        return self._repository / ".git"
