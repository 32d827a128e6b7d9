"""What a mirror asks of git: to clone, to fetch from the remotes, to say what a revision is.

Only the arguments are decided here. When the network is used, under which lock, and what is done with the result, is
the mirror's business.
"""

import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

import attrs

from repopool_async._aio import together
from repopool_async._git import WORK_MARK, GitRunner, with_config
from repopool_async.exceptions import EmptyRepositoryError, GitOperationError, GitRefMissingError
from repopool_async.mirror_repair import find_damage
from repopool_async.models import GitResult
from repopool_async.refs import REMOTE_HEAD, Advertised

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


PROMISES: Final[Mapping[str, str]] = {"remote.origin.promisor": "true", "remote.origin.partialCloneFilter": "blob:none"}
"""The configuration that says that contents which are missing can be had from `origin`."""
_MANY_PACKS: Final = 50

_log: Final = logging.getLogger("repopool")


@attrs.frozen
class Source:
    """Where a mirror is cloned and fetched from now.

    Attributes:
        url: of another mirror; empty for the origin itself. environment: further variables that git needs for it.
    """

    url: str = ""
    environment: Mapping[str, str] = attrs.field(factory=dict)


class MirrorGit:
    """Git on one mirror, or on the directory that is to become it.

    Args:
        is_blobless: whether file contents are left at the remote. Only commands that are to know are told of it.

    Attributes:
        path: where the mirror lies. url: of `origin`. remotes: further remotes, name to URL.
        source: where it fetches from; replaced under the mirror's lock.
    """

    def __init__(
        self,
        runner: GitRunner,
        path: str,
        url: str,
        *,
        remotes: Mapping[str, str],
        repo_name: str,
        is_blobless: bool = False,
    ) -> None:
        self.runner = runner
        self.is_blobless = is_blobless
        self.path = path
        self.url = url
        self.remotes = remotes
        self.repo_name = repo_name
        self.source = Source()
        self._known_remotes: dict[str, str] = {}

    @property
    def _promising(self) -> GitRunner:
        """Git that knows what is promised; its environment is the present one, for credentials may change."""
        if not self.is_blobless:
            return self.runner
        return self.runner.bind(environment=with_config(self.runner.environment, PROMISES))

    async def run(
        self, *args: str, git_dir: str | None = None, ok: tuple[int, ...] = (0,), input: bytes | None = None
    ) -> GitResult:
        """Run git in the mirror, or in `git_dir`."""
        return await self.runner.run(
            *args, git_dir=git_dir or self.path, ok_codes=ok, input=input, repo_name=self.repo_name
        )

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
        url = self.source.url or self.url
        written = [f"--config={key}={value}" for key, value in _MIRROR_CONFIG.items()]
        done = await self.runner.run(
            "clone", "--bare", "--template=", "--no-hardlinks", "--progress", *self._locality(url), *written,
            "--end-of-options", url, directory, retry=True, repo_name=self.repo_name, env=self._network_environment(),
        )  # fmt: skip
        if url != self.url:
            await self.run("config", "remote.origin.url", self.url, git_dir=directory)
        if self.is_blobless:
            await self._forget_promises(directory)
            if "filtering not recognized" in done.stderr:
                _log.warning("%s: %s does not serve partial clones; everything was fetched", self.repo_name, self.url)
        has_refs = bool((await self.run("for-each-ref", "--count=1", git_dir=directory)).text)
        if not has_refs and await self.peel("HEAD", directory) is None:  # a detached HEAD needs no ref
            raise EmptyRepositoryError(
                f"{self.repo_name}: the repository at {self.url} has no commits; push one, then create the pool",
                operation="clone", repo_name=self.repo_name,
            )  # fmt: skip
        await self.fetch_remotes(directory)

    def _network_environment(self) -> dict[str, str]:
        return {**self.source.environment, WORK_MARK: self.path}

    def _locality(self, url: str) -> tuple[str, ...]:
        """Say how the source is copied: one that borrows objects itself must be transferred; and how much of it."""
        if self.is_blobless:
            return ("--no-local", f"--filter={PROMISES['remote.origin.partialCloneFilter']}")
        borrows = url.startswith("/") and any(
            os.path.exists(f"{url}/{name}objects/info/alternates")  # noqa: PTH110 - the source, not a slot
            for name in ("", ".git/")
        )
        return ("--no-local",) if borrows else ()

    async def _forget_promises(self, directory: str) -> None:
        for key in (*PROMISES, "extensions.partialClone"):
            await self.run("config", "--unset-all", key, git_dir=directory, ok=(0, 5))

    async def fetch_objects(self, ids: Sequence[str]) -> None:
        """Fetch objects by their names, all at once, and nothing with them."""
        await self._promising.run(
            "fetch", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--no-recurse-submodules",
            "--progress", "--stdin", "--end-of-options", "origin", git_dir=self.path, retry=True,
            repo_name=self.repo_name, input="".join(f"{one}\n" for one in ids).encode(),
            config={"fetch.negotiationAlgorithm": "noop"},
        )  # fmt: skip

    async def find_damage(self) -> list[str]:
        """Return what is wrong with the mirror's objects, a line each (slow)."""
        return await find_damage(self._promising, self.path)

    async def repack(self, packs: int) -> None:
        """Join packs; nothing is pruned.

        Args:
            packs: how many there are. Where contents are promised, joining reads everything, and waits for many.
        """
        if not self.is_blobless:
            await self.run("repack", "-d", "-q", "--geometric=2", "--no-write-bitmap-index")
        elif packs > _MANY_PACKS:
            await self._promising.run("repack", "-a", "-d", "-k", "-q", "--no-write-bitmap-index", git_dir=self.path)

    async def advertised(self) -> dict[str, Advertised] | None:
        """Ask all remotes what they have, by name; None where one does not answer, which a fetch shall explain."""
        answers: dict[str, Advertised] = {}

        def asking(name: str) -> Callable[[], Coroutine[Any, Any, None]]:
            async def ask() -> None:
                listing = await self.runner.run(
                    "ls-remote", "--symref", "--end-of-options", name, git_dir=self.path, repo_name=self.repo_name
                )
                answers[name] = Advertised.parsed(listing.stdout.decode(errors="surrogateescape"))

            return ask

        try:
            await self._know_remotes(self.path)
            await together(*(asking(name) for name in ("origin", *self.remotes)))
        except GitOperationError:
            return None
        return answers

    async def fetch_origin(self, *, with_head: bool) -> None:
        """Fetch the branches, the tags and, `with_head`, what the remote's HEAD is."""
        refspecs = [_HEADS, _TAGS, f"+HEAD:{REMOTE_HEAD}"] if with_head else [_HEADS, _TAGS]
        try:
            await self._fetch_from(self.source.url or "origin", refspecs, self.path)
        except GitRefMissingError:
            # The remote's HEAD has gone (its branch was deleted); its branches are still worth having.
            await self._fetch_from(self.source.url or "origin", refspecs[:2], self.path)

    async def fetch_remotes(self, directory: str) -> None:
        """Fetch the branches of the further remotes; another mirror has fetched them already."""
        if self.source.url:
            if self.remotes:
                await self._fetch_from(self.source.url, ["+refs/remotes/*:refs/remotes/*"], directory)
            return

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
        await self._promising.run(
            "fetch", "--prune", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--progress",
            "--no-recurse-submodules", "--update-shallow", "--end-of-options", remote, *refspecs,
            git_dir=directory, retry=True, repo_name=self.repo_name, env=self._network_environment(),
        )  # fmt: skip

    async def fetch_ref(self, source: str, target: str) -> None:
        """Fetch one ref or commit that no refspec covers, into a ref of ours.

        Raises:
            GitRefMissingError: the remote does not have it.
        """
        await self._promising.run(
            "fetch", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--no-recurse-submodules",
            "--progress", "--update-shallow", "--end-of-options", self.source.url or "origin", f"+{source}:{target}",
            git_dir=self.path, retry=True, repo_name=self.repo_name, env=self._network_environment(),
        )  # fmt: skip
