"""What the pool itself changed in a tree after the seal's mark, and which is therefore no lessee's work.

A check-out before a lease does not look at the whole tree, so the slot's mark stays; the entries it touched are noted
beside the tree instead. How the notes are used is the host's business, when it looks at a tree.
"""

from collections.abc import Iterable, Sequence

from repopool_async.hosts.base import Host, Settled, WriteFile
from repopool_async.models import Seal, Slot
from repopool_async.workspaces.nul_lists import join_names, split_names
from repopool_async.workspaces.pristine_git import PristineGit
from repopool_async.workspaces.slot_paths import NAMES_LIMIT, SlotPaths
from repopool_async.workspaces.submodule_plan import Submodule
from repopool_async.workspaces.submodules import Submodules


class SettledNames:
    """The notes of a pool's slots."""

    def __init__(self, *, host: Host, pristine: PristineGit, submodules: Submodules) -> None:
        self._host = host
        self._pristine = pristine
        self._submodules = submodules

    async def note(
        self,
        slot: Slot,
        seal: Seal,
        commit: str,
        before: Sequence[Submodule],
        *,
        all_files: bool,
        also: Iterable[str] = (),
    ) -> None:
        """Remember which entries a check-out before a lease touched: their change times are later than the mark.

        Args:
            seal: of the slot as it was. before: the submodules that stood there then.
            all_files: whether every file was written anew. also: what came or went besides.
        """
        listing = await self._pristine.run(
            slot, "diff-tree", "-r", "-z", "--name-only", "--no-renames", seal.commit, commit
        )
        names = {*split_names(listing.stdout), *also} | (await self.of(slot)).names
        names |= await self._submodules.settled_names(before, await self._submodules.plan(commit))
        if all_files:
            names.update(
                split_names((await self._pristine.run(slot, "ls-tree", "-r", "-z", "--name-only", commit)).stdout)
            )
        for name in list(names):
            while name := name.rpartition("/")[0]:
                names.add(name)
        await self._host.apply([WriteFile(SlotPaths(slot.path).settled, join_names(sorted(names)))])

    async def of(self, slot: Slot) -> Settled:
        """Return what is noted of a slot, for `Host.inspect_tree`."""
        seal = slot.seal
        if seal is None or seal.settled_ns == seal.mark_ns:
            return Settled(seal.mark_ns if seal else 0, frozenset())
        data = await self._host.read_bytes(SlotPaths(slot.path).settled, limit=NAMES_LIMIT)
        return Settled(seal.settled_ns, frozenset(split_names(data or b"")))
