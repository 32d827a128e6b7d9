"""Sparse check-outs: some directories of a commit, as `git sparse-checkout set --cone` on a fresh clone shows them.

The selection is the pool's; what a lessee makes of it goes with its git directory. Git itself writes the files that say
it, once, in a repository of ours, so that they are what the git at hand writes. Which bits an index has is git's
business too; here is said which directories must not be there, for neither an index nor git's own lists show those.
"""

import hashlib
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from repopool_async._git import GitRunner
from repopool_async.hosts.base import CopyFile, FileKind, FileStep, Host, MakeDirectory, Rename
from repopool_async.mirror import Mirror

_CONFIG: Final = {"core.sparseCheckout": "true", "core.sparseCheckoutCone": "true", "index.sparse": "false"}


class Sparse:
    """The selection of a pool; where there is none every method does nothing.

    Args:
        directories: relative to the root of the tree; none means everything.
    """

    def __init__(self, *, host: Host, git: GitRunner, mirror: Mirror, directories: Sequence[str] = ()) -> None:
        self._host = host
        self._git = git
        self._mirror = mirror
        self._whole = frozenset(name.strip("/") for name in directories)
        self._partly = frozenset({"", *_above(self._whole)}) - self._whole
        self._digest = hashlib.sha256("\0".join(sorted(self._whole)).encode(errors="surrogateescape")).hexdigest()[:20]

    @property
    def is_wanted(self) -> bool:
        """Whether there is a selection at all."""
        return bool(self._whole)

    @property
    def manner(self) -> str:
        """What tells trees of this selection from others."""
        return f"sparse-{self._digest}" if self._whole else ""

    @property
    def config(self) -> Mapping[str, str]:
        """The configuration with which git, run with a trusted git directory, keeps to the selection."""
        return _CONFIG if self._whole else {}

    @property
    def section(self) -> str:
        """What git writes into the configuration of a repository with a selection."""
        return "[extensions]\n\tworktreeConfig = true\n" if self._whole else ""

    def includes(self, path: str) -> bool:
        """Return whether a file is part of the selection."""
        directory = path.rpartition("/")[0]
        return not self._whole or directory in self._partly or not self._whole.isdisjoint({directory, *_above([path])})

    async def pristine_steps(self, git_dir: str) -> list[FileStep]:
        """Return the steps that tell a trusted git directory of the selection."""
        return await self._steps(git_dir, "info/sparse-checkout")

    async def lessee_steps(self, path: str) -> list[FileStep]:
        """Return the steps that tell a lessee's git directory at `path` of the selection."""
        return await self._steps(path, "info/sparse-checkout", "config.worktree")

    async def outside(self, tree: str, gitlinks: Collection[str]) -> list[str]:
        """Return the directories of a tree that are beside the selection; git sees none that only those files have.

        Args:
            gitlinks: the places of submodules, which count as files.
        """
        found = []
        for parent in sorted(self._partly) if self._whole else ():
            where = f"{tree}/{parent}".rstrip("/")
            if not await self._is_directory(where):
                continue
            for name in await self._host.list_directory(where):
                path = f"{parent}/{name}".lstrip("/")
                if path in self._whole or path in self._partly or path in gitlinks or path == ".git":
                    continue
                if await self._is_directory(f"{tree}/{path}"):
                    found.append(path)
        return found

    async def _is_directory(self, path: str) -> bool:
        stat = await self._host.stat(path)
        return stat is not None and stat.kind is FileKind.DIRECTORY

    async def _steps(self, path: str, *names: str) -> list[FileStep]:
        if not self._whole:
            return []
        template = f"{await self._template()}/.git"
        copies = [CopyFile(f"{template}/{name}", f"{path}/{name}") for name in names]
        return [MakeDirectory(f"{path}/info", 0o777), *copies]

    async def _template(self) -> str:
        """Return the repository in which git wrote the selection; made where it is missing."""
        template = f"{self._mirror.path}/repopool/{self.manner}"
        if await self._host.stat(template) is not None:
            return template
        beside = f"{template}.new-{secrets.token_hex(4)}"
        try:
            await self._git.run("init", "--quiet", "--template=", "--end-of-options", beside)
            await self._git.run(
                *("sparse-checkout", "set", "--cone", "--", *sorted(self._whole)),
                git_dir=f"{beside}/.git", work_tree=beside, cwd=beside, repo_name=self._mirror.repo_name,
            )  # fmt: skip
            await self._host.apply([Rename(beside, template)])
        except OSError:
            if await self._host.stat(template) is None:  # not another process's
                raise
        finally:
            await self._host.remove_tree(beside)
        return template


def _above(paths: Iterable[str]) -> set[str]:
    """Return all directories that paths lie in, but the root."""
    return {path[:at] for path in paths for at, letter in enumerate(path) if letter == "/"}
