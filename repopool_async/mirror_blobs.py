"""The file contents of a mirror without them (`history: blobless`): what a check-out needs is fetched in one batch.

A mirror of that kind has all commits and trees, and such contents as were asked for. Its own configuration does not
say that the rest is promised, so no other command of the pool ever fetches by itself, object by object; only fetches
and checks are told. Which commits are wanted is the business of those who check them out.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Final

from repopool_async._newest import Newest
from repopool_async.mirror_git import MirrorGit

_COMMITS_KEPT: Final = 64


class MirrorBlobs:
    """The file contents that one mirror has."""

    def __init__(self, git: MirrorGit) -> None:
        self._git = git
        self._known: Newest[tuple[str, str], None] = Newest(_COMMITS_KEPT)
        self._turn = asyncio.Lock()

    async def obtain(self, commit: str, build: str, includes: Callable[[str], bool]) -> None:
        """Have the contents of a commit's files here.

        Args:
            build: of the mirror; another one has to be asked again. includes: says of a path whether it is wanted.

        Raises:
            GitOperationError: they could not be fetched.
        """
        async with self._turn:
            if (build, commit) in self._known:
                return
            missing = await self._missing(commit, includes)
            if missing:
                await self._git.fetch_objects(missing)
            self._known[build, commit] = None

    async def _missing(self, commit: str, includes: Callable[[str], bool]) -> list[str]:
        listing = (await self._git.run("ls-tree", "-r", "-z", "--full-tree", commit)).stdout
        entries = (entry.partition(b"\t") for entry in listing.split(b"\0") if entry)
        described = (head.split(b" ") for head, _, path in entries if includes(os.fsdecode(path)))
        blobs = dict.fromkeys(words[2] for words in described if words[1] == b"blob")
        told = await self._git.run("cat-file", "--batch-check", input=b"".join(blob + b"\n" for blob in blobs))
        return [line.split(" ")[0] for line in told.text.splitlines() if line.endswith(" missing")]
