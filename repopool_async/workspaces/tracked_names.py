"""What belongs in a tree, by name: the files of the commit it shows, as the pool's own index of it has them.

Whatever else lies there can then be found, and passed over, by looking at the tree once. Where a name says too little
(other repositories lie in the tree) nothing is said. No tree is looked at here.
"""

from typing import Final

import attrs

from repopool_async._aio import in_thread
from repopool_async._newest import Newest
from repopool_async.hosts.base import Host, Known
from repopool_async.models import Slot
from repopool_async.workspaces.nul_lists import split_names
from repopool_async.workspaces.pristine_git import PristineGit
from repopool_async.workspaces.slot_paths import SlotPaths

_COMMITS_REMEMBERED: Final = 2
"""Slots mostly stand at the same few commits; each costs some megabytes where there are many files."""
_GITLINK: Final = "160000 "
_ABSENT: Final = "S "
"""How git marks what the index has and the tree, being sparse, has not."""


@attrs.frozen
class Tracked:
    """What belongs in a tree that shows a commit."""

    commit: str
    names: Known


class TrackedNames:
    """Knows it of a pool's slots, all of which are made with the same options."""

    def __init__(self, *, host: Host, pristine: PristineGit) -> None:
        self._host = host
        self._pristine = pristine
        self._known: Newest[str, Tracked | None] = Newest(_COMMITS_REMEMBERED)

    def knows(self, commit: str) -> bool:
        """Return whether `known` can say what belongs in a tree that shows a commit."""
        return commit in self._known

    def known(self, commit: str) -> Tracked | None:
        """Return what belongs in a tree that shows a commit; None where that cannot be said by names."""
        return self._known[commit]

    def remember(self, commit: str, tracked: Tracked | None) -> None:
        """Know from now on what was read; for slots of any lessee, so nobody may have had a hand in it."""
        self._known[commit] = tracked

    async def stands(self, slot: Slot, commit: str) -> bool:
        """Return whether a slot's index is of a commit."""
        head = await self._host.read_bytes(f"{SlotPaths(slot.path).git}/HEAD", limit=4096)
        return head == f"{commit}\n".encode()

    async def read(self, slot: Slot, commit: str) -> Tracked | None:
        """Read from a slot's index what `known` says.

        Only once its lease is over and `PristineGit.refuse_changed` has passed: git runs in what a lessee could write.
        """
        listing = await self._pristine.run(slot, "ls-files", "-z", "-s", "-t")
        names = await in_thread(_names, listing.stdout)
        return Tracked(commit, names) if names is not None else None


def _names(listing: bytes) -> Known | None:
    entries = [entry for entry in split_names(listing) if not entry.startswith(_ABSENT)]
    if any(entry[2:].startswith(_GITLINK) for entry in entries):
        return None
    return Known.of(entry.partition("\t")[2] for entry in entries)
