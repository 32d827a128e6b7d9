"""Seals: the record that a slot was verified clean, what it proves, and when it proves nothing any more.

A seal holds a mark on the file system's own clock: whatever changed since has a later change time, which no process can
forge. What is made of that, and what lies in a tree, is not known here.
"""

from typing import Final

from repopool_async.exceptions import CleanupError
from repopool_async.hosts.base import ClockOffset, FileKind, FileStat, Host
from repopool_async.mirror import Mirror
from repopool_async.models import Seal, Slot
from repopool_async.refs import RefsSnapshot
from repopool_async.workspaces.base import Checkout, Mark
from repopool_async.workspaces.kept_paths import KeptPaths
from repopool_async.workspaces.slot_paths import SlotPaths
from repopool_async.workspaces.submodules import Submodules

_MANNER: Final = "~"
"""Stands before the manner in which files are written, in the generation of refs that a seal holds."""


class Seals:
    """Makes and judges the seals of a pool's slots.

    Args:
        manner: how the files of trees are written, as text without `~`; a tree that was written in another is no use.
    """

    def __init__(self, *, host: Host, mirror: Mirror, submodules: Submodules, kept: KeptPaths, manner: str) -> None:
        self._host = host
        self._mirror = mirror
        self._submodules = submodules
        self._kept = kept
        self._manner = f"{_MANNER}{manner}" if manner else ""

    async def make(
        self,
        slot: Slot,
        checkout: Checkout,
        *,
        keeps_mark: bool = False,
        since: Mark | None = None,
        refs: RefsSnapshot | None = None,
    ) -> Seal:
        """Return the record that a tree is clean now; arguments as for `WorkspaceStrategy.seal`.

        Args:
            refs: what the slot's git directory shows; what the mirror has now where missing.
        """
        refs = refs or await self._mirror.snapshot()
        generation = await self._generation(checkout.commit, refs)
        previous = slot.seal
        async with self._host.joined() as joined:
            # A mark within the tick of our own last write could not tell that write from a lessee's first.
            moved_on = joined(self._host.file_system_clock_ns(SlotPaths(slot.path).pristine, moves_on=True))
            clocks = joined(self._host.clock_offset())
            found = joined(self._host.stat(slot.path))
        root, offset = _directory(slot, found.result()), clocks.result().wall_minus_boot_ns
        settled = mark = moved_on.result()
        if keeps_mark and previous is not None:
            mark, offset = previous.mark_ns, previous.clock_offset_ns
        elif since is not None:
            mark, offset = since.ns, since.clock_offset_ns
        return Seal(
            commit=checkout.commit,
            branch=checkout.branch,
            refs_generation=generation,
            boot_id=await self._host.boot_id(),
            mark_ns=mark,
            settled_ns=settled,
            clock_offset_ns=offset,
            tree_device=root.device,
            tree_inode=root.inode,
            mirror_build=refs.build,
            kept=self._kept.names,
        )

    async def checked(self, slot: Slot) -> Seal:
        """Return the seal of a slot that still is what was sealed, as far as a few looks can tell.

        Raises:
            CleanupError: it is not.
        """
        root, head = await self._mirror.look(slot.path, f"{slot.path}/.git/HEAD")
        root = _directory(slot, root)
        is_same_boot = slot.seal is not None and slot.seal.boot_id == await self._host.boot_id()
        if slot.seal is None or not is_same_boot or not is_same_tree(root, slot.seal):
            raise CleanupError(f"{slot.slot_id}: the tree is not the one that was sealed", slot_id=slot.slot_id)
        seen = self._mirror.seen
        if seen is None or slot.seal.mirror_build != seen.build:
            raise CleanupError(f"{slot.slot_id}: was made of a mirror that was damaged since", slot_id=slot.slot_id)
        if head is None:
            raise CleanupError(f"{slot.slot_id}: the git directory is missing", slot_id=slot.slot_id)
        if not self.is_made_as_wanted(slot.seal):
            raise CleanupError(f"{slot.slot_id}: was made with other options", slot_id=slot.slot_id)
        return slot.seal

    async def trusted_mark(
        self, seal: Seal | None, *, offset: ClockOffset | None = None, refs: RefsSnapshot | None = None
    ) -> int | None:
        """Return the seal's mark, None where file times prove nothing.

        That is after another boot, where somebody set the clock, and where the mirror it was made of was damaged.

        Args:
            offset: how the host's clocks stand to each other. refs: of the mirror. Both where just asked.
        """
        if seal is None or seal.boot_id != await self._host.boot_id():
            return None
        if seal.mirror_build != (refs or await self._mirror.snapshot()).build:
            return None
        offset = offset or await self._host.clock_offset()
        moved = abs(offset.wall_minus_boot_ns - seal.clock_offset_ns)
        return seal.mark_ns if moved < offset.precision_ns else None

    async def generation(self, commit: str) -> str:
        """Return which refs a slot shows that is made now, those of submodules included."""
        return await self._generation(commit, await self._mirror.snapshot())

    async def _generation(self, commit: str, refs: RefsSnapshot) -> str:
        generation = await self._submodules.generation(await self._submodules.plan(commit), refs.generation)
        return f"{generation}{self._manner}"

    def is_made_as_wanted(self, seal: Seal | None) -> bool:
        """Return whether a slot was made by the options that hold now."""
        if seal is None or seal.kept != self._kept.names:
            return False
        return self.is_written_as_wanted(seal) and self._submodules.has_made(seal.refs_generation)

    def is_written_as_wanted(self, seal: Seal | None) -> bool:
        """Return whether a tree's files were written in the manner that holds now."""
        return seal is not None and seal.refs_generation.partition(_MANNER)[2] == self._manner.removeprefix(_MANNER)


def _directory(slot: Slot, root: FileStat | None) -> FileStat:
    if root is None or root.kind is not FileKind.DIRECTORY:
        raise CleanupError(f"{slot.slot_id}: the tree {slot.path} is gone", slot_id=slot.slot_id)
    return root


def is_same_tree(root: FileStat, seal: Seal | None) -> bool:
    """Return whether that is the very directory that was sealed."""
    return seal is not None and (root.device, root.inode) == (seal.tree_device, seal.tree_inode)
