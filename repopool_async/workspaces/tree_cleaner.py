"""Finding and removing what a tree that a lessee had differs in from what it shall show.

Nothing in the tree is believed or run: what the host found by change times is checked out anew, what the pool's index
does not know goes into the trash, and afterwards both are compared once more. Git directories are not its business, nor
is the decision how little to trust.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Final

import attrs

from repopool_async._aio import together
from repopool_async.exceptions import CleanupError
from repopool_async.hosts.base import Discard, FileStep, Host, RemoveFile, TreeInspection
from repopool_async.hosts.joined import Joined
from repopool_async.models import Slot
from repopool_async.workspaces.base import Checkout, Work
from repopool_async.workspaces.kept_paths import KeptPaths
from repopool_async.workspaces.nul_lists import split_names
from repopool_async.workspaces.pristine_git import PristineGit
from repopool_async.workspaces.slot_paths import NAMES_LIMIT, SlotPaths
from repopool_async.workspaces.sparse import Sparse
from repopool_async.workspaces.submodules import Place, Submodules
from repopool_async.workspaces.tracked_names import Tracked
from repopool_async.workspaces.tree_look import TreeLook
from repopool_async.workspaces.tree_writer import Ready, TreeWriter

_FEW_DIRECTORIES: Final = 50
"""Up to how many directories git is told to look at; at more it looks at all, which costs it less."""


@attrs.frozen
class Begun:
    """A cleaning of which the first part is done.

    Attributes:
        ready: the check-out to come. inspection: what was found in the tree. removed: how many entries went.
        untracked: what else has to go.
    """

    ready: Ready
    inspection: TreeInspection
    removed: int
    untracked: Sequence[str]


class TreeCleaner:
    """Cleans the trees of a pool's slots in place."""

    def __init__(
        self,
        *,
        host: Host,
        pristine: PristineGit,
        submodules: Submodules,
        sparse: Sparse,
        writer: TreeWriter,
        kept: KeptPaths,
    ) -> None:
        self._host = host
        self._pristine = pristine
        self._submodules = submodules
        self._sparse = sparse
        self._writer = writer
        self._kept = kept

    async def switch_untouched(self, slot: Slot, checkout: Checkout) -> Work:
        """Bring a tree that nobody changed since its seal to another commit.

        Raises:
            CleanupError: it is not clean afterwards.
        """
        assert slot.seal is not None
        if slot.seal.commit == checkout.commit:
            return Work(steps=("untouched",), warm=True)
        await self._writer.switch(slot, slot.seal.commit, checkout)
        await self.require_clean(slot, tree=slot.path, commit=checkout.commit)
        return Work(steps=("untouched", "checked out"))

    async def clean_ordinary(self, slot: Slot, tracked: Tracked, inspection: TreeInspection) -> tuple[Work, set[str]]:
        """Bring a tree in which nothing odd was done back to its commit, touching only what is not as it shall be.

        Args:
            inspection: what one look at the tree found, given `tracked`; `is_ordinary`.

        Returns:
            What was done, and the names of what has been touched since that look, whoever did it.

        Raises:
            CleanupError: it is not clean afterwards.
        """
        trash = SlotPaths(slot.path).trash
        await self._host.apply(_first_steps(slot))
        removed = await self._host.remove_entries(slot.path, inspection.unknown, trash=trash)
        restored = await self._host.remove_entries(slot.path, inspection.changed, trash=trash)
        missing = set(inspection.changed) | await self._not_as_sealed(slot, inspection)
        await self._writer.write_files(slot, missing)
        touched = {*inspection.changed_directories, ""}
        touched.update(name.rpartition("/")[0] for name in (*missing, *inspection.unknown))
        left = await self._host.find_unknown(slot.path, touched, tracked.names)
        if left:
            raise CleanupError(
                f"{slot.slot_id}: not clean after cleaning: untracked: {', '.join(left[:5])}", slot_id=slot.slot_id
            )
        work = Work(steps=("cleaned in place", "verified"), removed=removed, restored=restored)
        return work, touched | missing

    async def _not_as_sealed(self, slot: Slot, inspection: TreeInspection) -> set[str]:
        """Return the files that are missing, or lie in another inode than the one that was sealed.

        Files that were moved without their directory have another change time, and are known already. A directory that
        was moved brings files along that have not, but it has itself.
        """
        if inspection.is_complete and not inspection.changed_directories:
            return set()
        is_limited = inspection.is_complete and len(inspection.changed_directories) <= _FEW_DIRECTORIES
        where = [f":(literal){name}" for name in inspection.changed_directories] if is_limited else []
        return set(await self._modified(slot, *where, tree=slot.path))

    async def _modified(self, slot: Slot, *where: str, tree: str) -> list[str]:
        """List the files that are not as the index has them, in all of the tree where nothing is said."""
        listing = await self._pristine.run(
            slot, "diff-files", "-z", "--name-only", "--ignore-submodules=all", "--", *where, tree=tree
        )
        return split_names(listing.stdout)

    async def begin(self, slot: Slot, checkout: Checkout, seen: TreeLook) -> "Begun":
        """Begin to bring a tree to `checkout`, whatever was done to it: see what `clean` has to do.

        Args:
            seen: what one look at the tree found, before its kept directories were taken out.

        Raises:
            CleanupError: it cannot be cleaned in place.
        """
        inspection, paths = seen.inspection, SlotPaths(slot.path)
        if inspection.mounts:
            raise CleanupError(
                f"{slot.slot_id}: a file system is mounted at {inspection.mounts[0]!r} in the tree; unmount it, then "
                f"repair_slot",
                slot_id=slot.slot_id,
            )
        if "." in inspection.irregular:
            raise CleanupError(
                f"{slot.slot_id}: mode, owner or attributes of the tree {slot.path} itself were changed",
                slot_id=slot.slot_id,
            )
        ready = await self._writer.get_ready(slot, checkout, standing=seen.standing)
        suspects = [*inspection.special, *inspection.repositories, *await self._gitlinks(slot, seen.places)]
        suspects += await self._sparse.outside(slot.path, seen.places)
        async with self._host.joined() as joined:
            joined(self._host.apply(_first_steps(slot)))
            # Specials first: a fifo where git looks for a file would hang it. Planted repositories git would pass over.
            removed = joined(self._host.remove_entries(slot.path, suspects, trash=paths.trash))
            untracked = joined(self._untracked(slot, tree=slot.path))
        return Begun(ready, inspection, removed.result(), untracked.result())

    def clean(self, joined: Joined, slot: Slot, begun: "Begun") -> Callable[[], Work]:
        """Hand over the pieces that finish what was begun, and return what says, once they are done, what was done.

        The last of them raises `CleanupError` where the tree is not clean then.
        """
        trash = SlotPaths(slot.path).trash
        # Whole directories next, so that the time to available does not depend on what a lessee left in them.
        removed = joined(self._host.remove_entries(slot.path, begun.untracked, trash=trash))
        inside = joined(self._submodules.remove_untracked(Place.of(slot)))
        # A directory whose mode or attributes were changed is checked out anew as a whole.
        seen = begun.inspection
        suspects = dict.fromkeys((*seen.irregular, *seen.changed, *seen.multiply_linked))
        restored = joined(self._host.remove_entries(slot.path, tuple(suspects), trash=trash))
        joined(self._writer.write(slot, begun.ready))
        joined(self.require_clean(slot, tree=slot.path))
        return lambda: Work(
            steps=("cleaned", "checked out", "verified"),
            removed=begun.removed + removed.result() + inside.result(),
            restored=restored.result(),
        )

    async def require_whole(self, slot: Slot, *, tree: str) -> None:
        """Look whether all of a tree is there that has just been made beside the slot's, and nothing else.

        What is in the files is not read again: git has written them a moment ago, where nobody else could.

        Raises:
            CleanupError: something is missing, or too much.
        """
        listing = await self._pristine.run(slot, "ls-files", "-z", "--others", "--deleted", "--directory", tree=tree)
        problems = [*split_names(listing.stdout), *await self._outside(slot, tree=tree)]
        problems += await self._submodules.differences(Place.of(slot, tree))
        if problems:
            raise CleanupError(f"{slot.slot_id}: not as it was made: {', '.join(problems[:5])}", slot_id=slot.slot_id)

    async def require_clean(self, slot: Slot, *, tree: str, commit: str | None = None) -> None:
        """Compare a tree with the pristine index; arguments as for `differences`.

        Raises:
            CleanupError: they differ.
        """
        problems = await self.differences(slot, tree=tree, commit=commit)
        if problems:
            shown = ", ".join(problems[:5])
            raise CleanupError(f"{slot.slot_id}: not clean after cleaning: {shown}", slot_id=slot.slot_id)

    async def differences(self, slot: Slot, *, tree: str, commit: str | None = None) -> list[str]:
        """Return what differs between the tree and the pristine index, both ways.

        Args:
            commit: what the tree shows, where its kept directories lie in it; they are no difference.
        """
        found: list[str] = []

        async def modified() -> None:
            found.extend(f"modified: {name}" for name in await self._modified(slot, tree=tree))

        async def untracked() -> None:
            names = await self._kept.without(await self._untracked(slot, tree=tree), slot, commit)
            found.extend(f"untracked: {name}" for name in names)

        await together(modified, untracked)
        outside = await self._kept.without(await self._outside(slot, tree=tree), slot, commit)
        found += [f"untracked: {name}" for name in outside]
        return found + await self._submodules.differences(Place.of(slot, tree))

    async def _untracked(self, slot: Slot, *, tree: str) -> list[str]:
        """List what the index does not know, ignored or not, directories as one entry."""
        listing = await self._pristine.run(slot, "ls-files", "-z", "--others", "--directory", tree=tree)
        return [name.rstrip("/") for name in split_names(listing.stdout)]

    async def _gitlinks(self, slot: Slot, places: Collection[str]) -> list[str]:
        """Return the submodule places that are not empty and ought to be, of the commit the slot stands on.

        Unless a submodule is checked out there nothing may lie in them, and git does not look there.
        """
        filled = {submodule.path for submodule in await self._submodules.standing(Place.of(slot))}
        names = [name for name in places if name not in filled]
        return [name for name in names if await self._host.list_directory(f"{slot.path}/{name}")]

    async def _outside(self, slot: Slot, *, tree: str) -> list[str]:
        """Return the directories that are no part of what the pool checks out."""
        if not self._sparse.is_wanted:
            return []
        places = await self._host.read_bytes(SlotPaths(slot.path).gitlinks, limit=NAMES_LIMIT)
        return await self._sparse.outside(tree, split_names(places or b""))


def _first_steps(slot: Slot) -> list[FileStep]:
    """Return what comes before any git: a lessee's git directory goes, and the lock that a git of ours died with."""
    paths = SlotPaths(slot.path)
    return [Discard(f"{slot.path}/.git", paths.trash), RemoveFile(f"{paths.git}/index.lock")]


def is_ordinary(inspection: TreeInspection) -> bool:
    """Return whether a look at a tree found nothing that needs more than files written and entries removed."""
    return not any(
        (inspection.special, inspection.repositories, inspection.unlocked, inspection.mounts, inspection.irregular)
    )


def is_untouched(inspection: TreeInspection, gitfiles: Collection[str] = ()) -> bool:
    """Return whether a look at a tree found nothing that somebody changed.

    Args:
        gitfiles: the `.git` of submodules, where those are as they shall be.
    """
    return not any(
        (
            inspection.changed,
            inspection.changed_directories,
            inspection.unknown,
            inspection.special,
            set(inspection.repositories) != set(gitfiles),
            inspection.unlocked,
            inspection.mounts,
            inspection.irregular,
        )
    )
