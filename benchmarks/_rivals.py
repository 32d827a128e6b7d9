"""The same work without a pool: what people do to get a clean checkout, each with the commands of git itself.

`warmtree` is measured through its command where that is on PATH or beside the interpreter (Python 3.12 or newer:
`pip install warmtree`).
"""

import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import Final

from benchmarks._measure import Samples
from benchmarks._repositories import WHO, git
from repopool_async._process import run_process

WORKTREE: Final = "git worktree add"
CLONE: Final = "git clone"
SHARED: Final = "git clone --shared"
RECIPE: Final = "fetch, clean -fdx, reset --hard"
WARMTREE: Final = "warmtree take"
STATUS: Final = "git status --ignored"


class Rivals:
    """Plain clones of one repository and what is done with them.

    Args:
        url: the repository. scratch: a directory that is made. samples: where times are noted, as `<what>, <label>`.
    """

    def __init__(self, url: str, scratch: Path, samples: Samples, label: str) -> None:
        self.plain = scratch / "plain"
        self._url = url
        self._scratch = scratch
        self._samples = samples
        self._label = label
        self._branches = 0

    async def prepare(self) -> None:
        """Make the clone that worktrees are added to, and warmtree's slots."""
        self._scratch.mkdir(parents=True)
        await git(self._scratch, "clone", "-q", self._url, str(self.plain))
        if warmtree() is not None:
            await git(self._scratch, "clone", "-q", self._url, str(self._scratch / "warm"))
            await self._warmtree("init", "--no-skill", "--no-instructions")
            await self._warmtree("fill")

    async def make_checkouts(self) -> None:
        """Come to a clean checkout in every way there is."""
        await self.add_worktree()
        await self.clone()
        await self.recipe()
        await self.take_warm()

    async def add_worktree(self) -> None:
        """Add a worktree and remove it."""
        target = str(self._scratch / "worktree")
        await self._timed(WORKTREE, "worktree", "add", "-q", "--detach", target, directory=self.plain)
        await self._timed("git worktree remove", "worktree", "remove", "--force", target, directory=self.plain)

    async def clone(self) -> None:
        """Clone, as everybody does, and borrowing objects."""
        for name, options in ((CLONE, ()), (SHARED, ("--shared",))):
            target = self._scratch / "clone"
            await self._timed(name, "clone", "-q", *options, self._url, str(target), directory=self._scratch)
            await asyncio.to_thread(shutil.rmtree, target)

    async def recipe(self) -> None:
        """Clean a clone as continuous integration does."""
        await self._samples.timed(f"{RECIPE}, {self._label}", self._clean())

    async def take_warm(self) -> None:
        """Take a slot of warmtree's and release it."""
        if warmtree() is None:
            return
        self._branches += 1
        branch = f"b{self._branches}"
        await self._samples.timed(f"{WARMTREE}, {self._label}", self._warmtree("take", branch))
        await self._samples.timed(f"warmtree release, {self._label}", self._warmtree("release", branch))

    async def status(self) -> None:
        """Look at a clean tree: the floor of what cleaning costs."""
        await self._timed(STATUS, "status", "--ignored", "--porcelain", directory=self.plain)

    async def _clean(self) -> None:
        await git(self.plain, "fetch", "-q", "origin")
        await git(self.plain, "clean", "-ffdxq")
        await git(self.plain, "reset", "-q", "--hard", "origin/main")

    async def _timed(self, name: str, *args: str, directory: Path) -> None:
        await self._samples.timed(f"{name}, {self._label}", git(directory, *args))

    async def _warmtree(self, *args: str) -> None:
        command = warmtree()
        assert command is not None
        environment = {**os.environ, **WHO, "WARMTREE_AUTO_REFRESH": "off"}
        done = await run_process([command, *args], env=environment, cwd=str(self._scratch / "warm"))
        if done.exit_code != 0:
            raise RuntimeError(f"warmtree {args[0]}: {done.stderr.decode(errors='replace')}")


def warmtree() -> str | None:
    """Return the command, None where it is not installed."""
    beside = Path(sys.executable).with_name("warmtree")
    return str(beside) if beside.exists() else shutil.which("warmtree")
