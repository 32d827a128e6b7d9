"""Which commit a ref means in a mirror: looked up in its snapshot, and asked of the remote only where it must be.

How names are looked up is said in `refs`; fetching, and when the snapshot is renewed, is the mirror's business.
"""

import difflib
import re
from collections.abc import Awaitable, Callable
from typing import Final

from repopool_async._git_arguments import validate_ref
from repopool_async.exceptions import GitRefMissingError, UnknownRefError
from repopool_async.mirror_git import MirrorGit
from repopool_async.models import ResolvedRef
from repopool_async.refs import FULL_ID, RefsSnapshot, look_up

_SHORT_ID: Final = re.compile(r"[0-9a-f]{4,63}")


class RefResolver:
    """Resolves refs in one mirror.

    Args:
        snapshot: gives the refs. fetch_ref: fetches a ref or commit from origin into a ref of the mirror's own.
    """

    def __init__(
        self,
        git: MirrorGit,
        *,
        snapshot: Callable[[], Awaitable[RefsSnapshot]],
        fetch_ref: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._git = git
        self._snapshot = snapshot
        self._fetch_ref = fetch_ref
        self._known_commits: set[str] = set()

    def forget(self) -> None:
        """Forget which objects are commits, because the mirror was made anew."""
        self._known_commits.clear()

    async def resolve(self, ref: str | None) -> ResolvedRef:
        """See `Mirror.resolve`."""
        snapshot = await self._snapshot()
        if ref is None:
            return self._resolve_default(snapshot)
        validate_ref(ref)
        known = look_up(ref, snapshot)
        if known is not None:
            return known if known.branch else await self._checked_tag(known)
        if FULL_ID.fullmatch(ref):
            return await self.resolve_commit(ref)
        if ref.startswith("refs/") and not ref.startswith(("refs/heads/", "refs/tags/")):
            return await self._resolve_foreign(ref)
        if _SHORT_ID.fullmatch(ref):
            commit = await self._git.peel(ref)
            if commit is not None:
                return ResolvedRef(asked=ref, commit=commit)
        raise self._unknown(ref, snapshot)

    async def resolve_commit(self, ref: str) -> ResolvedRef:
        """Resolve a full commit id, having fetched the commit where it is not here yet.

        Raises:
            UnknownRefError: the remote does not have it either.
        """
        commit = await self._git.peel(ref)
        if commit is None:
            try:
                await self._fetch_ref(ref, f"refs/repopool/fetch/{ref}")
            except GitRefMissingError:
                raise self._unknown(ref, await self._snapshot()) from None
            commit = await self._git.peel(ref)
        if commit is None:
            raise self._unknown(ref, await self._snapshot())
        return ResolvedRef(asked=ref, commit=commit)

    def _resolve_default(self, snapshot: RefsSnapshot) -> ResolvedRef:
        if snapshot.default_branch:
            commit = snapshot.branches[snapshot.default_branch]
            return ResolvedRef(asked=snapshot.default_branch, commit=commit, branch=snapshot.default_branch)
        if snapshot.head:
            return ResolvedRef(asked="HEAD", commit=snapshot.head)
        raise self._unknown("HEAD", snapshot)

    async def _checked_tag(self, tag: ResolvedRef) -> ResolvedRef:
        """Refuse a tag of a tree or blob; asked of git once per object."""
        if tag.commit not in self._known_commits:
            if await self._git.peel(tag.commit) is None:
                raise UnknownRefError(
                    f"{self._git.repo_name}: the tag {tag.asked!r} names no commit and cannot be checked out",
                    repo_name=self._git.repo_name, ref=tag.asked,
                )  # fmt: skip
            self._known_commits.add(tag.commit)
        return tag

    async def _resolve_foreign(self, ref: str) -> ResolvedRef:
        """Resolve `refs/pull/7/head` and the like: always asked of the remote, since no fetch covers them."""
        target = f"refs/repopool/fetch/{ref.removeprefix('refs/')}"
        try:
            await self._fetch_ref(ref, target)
        except GitRefMissingError:
            raise self._unknown(ref, await self._snapshot()) from None
        commit = await self._git.peel(target)
        if commit is None:
            raise self._unknown(ref, await self._snapshot())
        return ResolvedRef(asked=ref, commit=commit)

    def _unknown(self, ref: str, snapshot: RefsSnapshot) -> UnknownRefError:
        short = ref.removeprefix("refs/heads/").removeprefix("refs/tags/")
        nearest = tuple(difflib.get_close_matches(short, [*snapshot.branches, *snapshot.tags], n=5, cutoff=0.5))
        hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
        return UnknownRefError(
            f"{self._git.repo_name}: {self._git.url} has no ref or commit {ref!r}{hint}",
            repo_name=self._git.repo_name, ref=ref, nearest=nearest,
        )  # fmt: skip
