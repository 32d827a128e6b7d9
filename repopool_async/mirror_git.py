"""What a mirror asks of git: to clone, to fetch from the remotes, to say what a revision is.

Only the arguments are decided here. When the network is used, under which lock, and what is done with the result, is
the mirror's business.
"""

import os
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

from repopool_async._aio import together
from repopool_async._git import WORK_MARK, GitRunner
from repopool_async.exceptions import EmptyRepositoryError, GitRefMissingError
from repopool_async.models import GitResult
from repopool_async.refs import REMOTE_HEAD

_HEADS: Final = "+refs/heads/*:refs/heads/*"
_TAGS: Final = "+refs/tags/*:refs/tags/*"
_MIRROR_CONFIG: Final[Mapping[str, str]] = {
    "gc.auto": "0",
    "maintenance.auto": "false",
    "core.logAllRefUpdates": "false",
    "fetch.unpackLimit": "1",
    "core.packedRefsTimeout": "10000",
    "core.filesRefLockTimeout": "1000",
}


class MirrorGit:
    """Git on one mirror, or on the directory that is to become it.

    Attributes:
        path: where the mirror lies. url: of `origin`. remotes: further remotes, name to URL.
    """

    def __init__(self, runner: GitRunner, path: str, url: str, *, remotes: Mapping[str, str], repo_name: str) -> None:
        self.runner = runner
        self.path = path
        self.url = url
        self.remotes = remotes
        self.repo_name = repo_name
        self._known_remotes: dict[str, str] = {}

    async def run(self, *args: str, git_dir: str | None = None, ok: tuple[int, ...] = (0,)) -> GitResult:
        """Run git in the mirror, or in `git_dir`."""
        return await self.runner.run(*args, git_dir=git_dir or self.path, ok_codes=ok, repo_name=self.repo_name)

    async def change_refs(self, commands: bytes) -> None:
        """Do what `update-ref --stdin` takes."""
        await self.runner.run(
            "update-ref", "--stdin", git_dir=self.path, input=commands, repo_name=self.repo_name,
            env={WORK_MARK: self.path},
        )  # fmt: skip

    async def peel(self, revision: str, directory: str | None = None) -> str | None:
        """Return the commit that a revision leads to; None where there is none."""
        result = await self.run(
            "rev-parse", "-q", "--verify", "--end-of-options", f"{revision}^{{commit}}",
            git_dir=directory, ok=(0, 1, 128),
        )  # fmt: skip
        return result.text or None if result.success else None

    async def clone(self, directory: str) -> None:
        """Clone the remotes into a directory that does not exist.

        Raises:
            GitOperationError: that failed. EmptyRepositoryError: origin has no commits.
        """
        # Objects are copied, never linked: somebody who writes into the source must not write into the mirror.
        await self.runner.run(
            "clone", "--bare", "--template=", "--no-hardlinks", "--progress", *self._locality(), "--end-of-options",
            self.url, directory, retry=True, repo_name=self.repo_name, env={WORK_MARK: self.path},
        )  # fmt: skip
        has_refs = bool((await self.run("for-each-ref", "--count=1", git_dir=directory)).text)
        if not has_refs and await self.peel("HEAD", directory) is None:  # a detached HEAD needs no ref
            raise EmptyRepositoryError(
                f"{self.repo_name}: the repository at {self.url} has no commits; push one, then create the pool",
                operation="clone", repo_name=self.repo_name,
            )  # fmt: skip
        for key, value in _MIRROR_CONFIG.items():
            await self.run("config", key, value, git_dir=directory)
        await self.fetch_remotes(directory)

    def _locality(self) -> tuple[str, ...]:
        """Say how a local source is copied: one that borrows objects itself must be transferred, not copied."""
        borrows = self.url.startswith("/") and any(
            os.path.exists(f"{self.url}/{name}objects/info/alternates")  # noqa: PTH110 - the source, not a slot
            for name in ("", ".git/")
        )
        return ("--no-local",) if borrows else ()

    async def fetch_origin(self, *, with_head: bool) -> None:
        """Fetch the branches, the tags and, `with_head`, what the remote's HEAD is."""
        refspecs = [_HEADS, _TAGS, f"+HEAD:{REMOTE_HEAD}"] if with_head else [_HEADS, _TAGS]
        try:
            await self._fetch_from("origin", refspecs, self.path)
        except GitRefMissingError:
            # The remote's HEAD has gone (its branch was deleted); its branches are still worth having.
            await self._fetch_from("origin", refspecs[:2], self.path)

    async def fetch_remotes(self, directory: str) -> None:
        """Fetch the branches of the further remotes."""

        # Side by side is safe here: each remote has refs of its own, and git waits for the lock of packed-refs.
        def fetching(name: str) -> Callable[[], Coroutine[Any, Any, None]]:
            return lambda: self._fetch_from(name, [f"+refs/heads/*:refs/remotes/{name}/*"], directory)

        await self._know_remotes(directory)
        await together(*(fetching(name) for name in self.remotes))

    async def _know_remotes(self, directory: str) -> None:
        """Note the remotes' URLs where they are not noted yet: options may have changed since the mirror was built."""
        for name, url in self.remotes.items():
            key = f"remote.{name}.url"
            known = self._known_remotes.get(name)
            if known != url and (await self.run("config", "--get", key, git_dir=directory, ok=(0, 1))).text != url:
                await self.run("config", key, url, git_dir=directory)
        if directory == self.path:
            self._known_remotes = dict(self.remotes)

    async def _fetch_from(self, remote: str, refspecs: list[str], directory: str) -> None:
        await self.runner.run(
            "fetch", "--prune", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--progress",
            "--no-recurse-submodules", "--update-shallow", "--end-of-options", remote, *refspecs,
            git_dir=directory, retry=True, repo_name=self.repo_name, env={WORK_MARK: self.path},
        )  # fmt: skip

    async def fetch_ref(self, source: str, target: str) -> None:
        """Fetch one ref or commit that no refspec covers, into a ref of ours.

        Raises:
            GitRefMissingError: the remote does not have it.
        """
        await self.runner.run(
            "fetch", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--no-recurse-submodules",
            "--progress", "--update-shallow", "--end-of-options", "origin", f"+{source}:{target}",
            git_dir=self.path, retry=True, repo_name=self.repo_name, env={WORK_MARK: self.path},
        )  # fmt: skip
