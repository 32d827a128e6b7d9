"""Where a mirror fetches from: the origin, or another host's mirror, which is brought up to date first.

Another host that does not answer is no reason to give nobody anything: then the origin is asked.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Protocol

import attrs

from repopool_async._clock import boottime
from repopool_async.exceptions import HostUnreachableError
from repopool_async.mirror_git import MirrorGit, Source

_log: Final = logging.getLogger("repopool")


class SharedMirror(Protocol):
    """A mirror that others fetch from; see `Mirror`."""

    async def bring(self, as_of: float) -> float:
        """Have there what the remotes had at a moment."""

    async def fetch_ref(self, source: str, target: str) -> None:
        """Fetch one ref or commit that no refspec covers."""


@attrs.frozen
class Upstream:
    """Another host's mirror of the same repository.

    Attributes:
        url: how git on this mirror's host reaches it.
    """

    mirror: SharedMirror
    url: str


class MirrorSource:
    """What one mirror fetches from. Used under the mirror's lock."""

    def __init__(self, git: MirrorGit, upstream: Upstream | None) -> None:
        self._git = git
        self._upstream = upstream

    @asynccontextmanager
    async def opened(self, as_of: float | None) -> AsyncIterator[float]:
        """Have the mirror's git fetch from the right place in the block; gives when what is there was asked for.

        Args:
            as_of: what the origin had then, or newer, must be there; None for the present.
        """
        spawned = boottime()
        if self._upstream is not None:
            try:
                spawned = await self._upstream.mirror.bring(spawned if as_of is None else as_of)
                self._git.source = self._source_of(self._upstream)
            except HostUnreachableError as error:
                _log.warning("%s: fetched from the origin, because %s", self._git.repo_name, error)
        try:
            yield spawned
        finally:
            self._git.source = Source()

    async def bring_ref(self, source: str, target: str) -> str:
        """Have a ref that no refspec covers where this mirror fetches from; returns what it is called there."""
        if self._upstream is None:
            return source
        try:
            await self._upstream.mirror.fetch_ref(source, target)
        except HostUnreachableError:
            return source
        return target

    def _source_of(self, upstream: Upstream) -> Source:
        allowed = self._git.runner.environment.get("GIT_ALLOW_PROTOCOL", "")
        needed = "file" if upstream.url.startswith("/") else "ssh"
        return Source(upstream.url, {"GIT_ALLOW_PROTOCOL": f"{allowed}:{needed}"})
