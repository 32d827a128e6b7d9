"""Git LFS: the objects that a commit's files stand for, in a store of the pool beside the mirror.

They are fetched by git-lfs, all that one commit needs at once and before a tree is touched, in a git directory of ours
that has neither files nor a HEAD: so no `.lfsconfig` and no other word of the repository says where from. Into a tree
they come by the filter in `lfs_filter`. When a commit is wanted is the business of those who check it out.

That git directory is one that slots borrow objects from, and so where a lessee's git-lfs looks for what it does not
have itself.
"""

import asyncio
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from repopool_async._git import GitRunner
from repopool_async._newest import Newest
from repopool_async.exceptions import (
    GitAccessError,
    GitDiskFullError,
    GitOperationError,
    GitTransientError,
    LfsError,
)
from repopool_async.git_directory import pristine_steps
from repopool_async.hosts.base import CopyFile, FileStep, Host, MakeDirectory, Rename, WriteFile
from repopool_async.mirror import Mirror
from repopool_async.workspaces.lfs_pointers import Pointer, manifest, read_pointers

_COMMITS_KEPT: Final = 64
_FILTER: Final = str(Path(__file__).with_name("lfs_filter.py"))
_PASSES: Final = (GitTransientError, GitAccessError, GitDiskFullError)
"""Failures that mean the same whatever they are about."""
_SECTION: Final = """\
[lfs]
\trepositoryformatversion = 0
[filter "lfs"]
\tclean = git-lfs clean -- %f
\tsmudge = git-lfs smudge -- %f
\tprocess = git-lfs filter-process
\trequired = true
"""
_ENVIRONMENT: Final = {"GIT_LFS_FORCE_PROGRESS": "1"}
"""A transfer that gets on says so: silence is what it is ended for."""


class Lfs:
    """The LFS files of a pool's slots, submodules included; where they are not wanted, nothing is done.

    Args:
        git: the pool's, with its credentials. is_wanted: whether files come in place of their pointers.
        includes: says of a path whether it is wanted.
    """

    def __init__(
        self,
        *,
        host: Host,
        git: GitRunner,
        is_wanted: bool = False,
        includes: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._host = host
        self._git = git
        self.is_wanted: Final = is_wanted
        self._includes = includes
        self._pointers: Newest[tuple[str, str], tuple[Pointer, ...]] = Newest(_COMMITS_KEPT)
        self._turn = asyncio.Lock()

    # -- having the objects --------------------------------------------------------------------------------------

    async def obtain(self, mirror: Mirror, commit: str) -> None:
        """Have everything in the store that a commit's files stand for; no tree is touched.

        Args:
            mirror: whose commit it is; the objects come from its `origin` only.

        Raises:
            LfsError: there is no git-lfs, or the remote lacks an object. GitTransientError, GitAccessError,
            GitDiskFullError: fetching failed.
        """
        key = (mirror.path, commit)
        if not self.is_wanted or key in self._pointers:
            return
        async with self._turn:
            directory = await self._directory(mirror)
            found = await read_pointers(self._git, self._host, directory, commit)
            pointers = tuple(one for one in found if self._includes(os.fsdecode(one.path)))
            if pointers:
                await self._fetch(mirror, directory, commit, pointers)
        self._pointers[key] = pointers

    def forget(self) -> None:
        """Look again for what is in the store: something there was damaged."""
        self._pointers.clear()

    async def _fetch(self, mirror: Mirror, directory: str, commit: str, pointers: Sequence[Pointer]) -> None:
        # A tree of ours with just these files: what else looks like a pointer is not fetched, and names do not matter.
        blobs = sorted({pointer.blob for pointer in pointers})
        listing = "".join(f"100644 blob {blob}\t{blob}\n" for blob in blobs).encode()
        tree = (await self._git.run("mktree", git_dir=directory, input=listing)).text
        try:
            await self._git.run(
                *("lfs", "fetch", "origin", tree), git_dir=directory, retry=True, env=_ENVIRONMENT,
                repo_name=mirror.repo_name,
            )  # fmt: skip
        except GitOperationError as error:
            if isinstance(error, _PASSES):
                raise
            raise LfsError(
                f"{mirror.repo_name}: the LFS files of {commit} cannot be had from {mirror.url}: {_reason(error)}; "
                f"push them there (git lfs push --all), lease another commit, or give the pool lfs=false",
                repo_name=mirror.repo_name,
            ) from error

    async def _directory(self, mirror: Mirror) -> str:
        """Return the git directory that git-lfs runs in, and from which the slots' hooks come; made where missing."""
        directory = _directory_of(mirror)
        if await self._host.stat(directory) is not None:
            return directory
        beside = f"{directory}-{secrets.token_hex(4)}"
        object_format = (await mirror.snapshot()).object_format
        config = {"core.bare": "true", "remote.origin.url": mirror.url}
        try:
            await self._host.apply(pristine_steps(beside, alternates=mirror.objects, object_format=object_format))
            for key, value in config.items():
                await self._git.run("config", key, value, git_dir=beside)
            await self._install(mirror, beside)
            await self._host.apply([Rename(beside, directory)])
        except OSError:
            if await self._host.stat(directory) is None:  # not another process's
                raise
        finally:
            await self._host.remove_tree(beside)
        return directory

    async def _install(self, mirror: Mirror, directory: str) -> None:
        try:
            await self._git.run(
                "lfs", "install", "--local", git_dir=directory, config={"core.hooksPath": f"{directory}/hooks"}
            )
        except GitOperationError as error:
            if "is not a git command" not in error.stderr:
                raise
            raise LfsError(
                f"{mirror.repo_name}: lfs needs git-lfs on {self._host.id}; install it (Debian: apt-get install "
                f"git-lfs) or give the pool lfs=false",
                repo_name=mirror.repo_name,
            ) from error

    # -- in a tree -----------------------------------------------------------------------------------------------

    def config(self, mirror: Mirror, git_dir: str) -> Mapping[str, str]:
        """Return the configuration with which git, run with a trusted git directory, reads and writes LFS files."""
        if not self.is_wanted:
            return {}
        return {"filter.lfs.process": shlex.join(self._filter(mirror, git_dir)), "filter.lfs.required": "true"}

    def steps(self, mirror: Mirror, commit: str, git_dir: str) -> list[FileStep]:
        """Return the steps that tell the filter of a trusted git directory what the files of a commit stand for."""
        if not self.is_wanted:
            return []
        return [WriteFile(_manifest(git_dir), manifest(self._pointers[mirror.path, commit]))]

    async def problems(self, mirror: Mirror, git_dir: str) -> list[str]:
        """Return which objects in the store, of those that a tree was made of, are damaged, a line each (slow)."""
        if not self.is_wanted:
            return []
        done = await self._host.run([*self._filter(mirror, git_dir), "check"], env={})
        found = done.stdout.decode(errors="replace").splitlines()
        if found:
            self.forget()
        return found

    # -- in a lessee's git directory -----------------------------------------------------------------------------

    @property
    def section(self) -> str:
        """What `git lfs install --local` writes into a repository's configuration."""
        return _SECTION if self.is_wanted else ""

    def alternates(self, mirror: Mirror) -> tuple[str, ...]:
        """Return the further object directories that a lessee's repository borrows from."""
        return (f"{_directory_of(mirror)}/objects",) if self.is_wanted else ()

    async def lessee_steps(self, mirror: Mirror, path: str) -> list[FileStep]:
        """Return the steps that put the hooks of `git lfs install --local` into a lessee's git directory at `path`."""
        if not self.is_wanted:
            return []
        hooks = f"{await self._directory(mirror)}/hooks"
        names = await self._host.list_directory(hooks)
        return [
            MakeDirectory(f"{path}/hooks", 0o777),
            *(CopyFile(f"{hooks}/{name}", f"{path}/hooks/{name}") for name in names),
        ]

    def _filter(self, mirror: Mirror, git_dir: str) -> list[str]:
        return [sys.executable, "-ISB", _FILTER, f"{_directory_of(mirror)}/lfs", _manifest(git_dir)]


def _reason(error: GitOperationError) -> str:
    """Return the first thing that git-lfs complained of; the last one is only that it failed."""
    lines = [line for line in error.stderr.splitlines() if not line.startswith("fetch: ")]
    return lines[0] if lines else error.message


def _directory_of(mirror: Mirror) -> str:
    return f"{mirror.path.removesuffix('.git')}-lfs.git"


def _manifest(git_dir: str) -> str:
    return f"{git_dir}/repopool-lfs"
