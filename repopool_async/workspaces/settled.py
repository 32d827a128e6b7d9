"""What the pool itself changed in a tree after the seal's mark, and which is therefore no lessee's work.

A check-out before a lease does not look at the whole tree, so the slot's mark stays; the entries it touched are noted
beside the tree instead. How the notes are used is the host's business, when it looks at a tree.
"""

from collections.abc import Collection, Sequence
from typing import Final

from repopool_async._aio import in_thread
from repopool_async.hosts.base import Host, Settled, WriteFile
from repopool_async.models import Seal, Slot
from repopool_async.workspaces.nul_lists import join_names, split_names
from repopool_async.workspaces.slot_paths import NAMES_LIMIT, SlotPaths
from repopool_async.workspaces.submodule_plan import Submodule
from repopool_async.workspaces.submodules import Submodules

_FEW_NAMES: Final = 500
_NAMES_REMEMBERED: Final = 10_000
"""Of one slot; more are read again, which takes less than they do."""


class SettledNames:
    """The notes of a pool's slots."""

    def __init__(self, *, host: Host, submodules: Submodules) -> None:
        self._host = host
        self._submodules = submodules
        self._written: dict[str, frozenset[str]] = {}
        self._known: dict[str, Settled] = {}

    async def note_cleaned(self, slot: Slot, touched: Collection[str]) -> None:
        """Remember which entries a cleaning touched after its mark; what was noted before is of an older mark."""
        await self._write(slot, set(touched))

    async def note(self, slot: Slot, written: Collection[str], *, before: Sequence[Submodule], commit: str) -> None:
        """Remember which entries a check-out before a lease touched: their change times are later than the mark.

        Args:
            written: outside submodules. before: the submodules that stood there. commit: what was checked out.
        """
        names = {*written, *(await self.of(slot)).names}
        names |= await self._submodules.settled_names(before, await self._submodules.plan(commit))
        await self._write(slot, names)

    async def _write(self, slot: Slot, names: set[str]) -> None:
        # Of ten thousand names that takes longer than the event loop may be kept from others.
        text = await in_thread(_complete, names) if len(names) > _FEW_NAMES else _complete(names)
        self._known.pop(slot.path, None)
        await self._host.apply([WriteFile(SlotPaths(slot.path).settled, text)])
        self._written[slot.path] = frozenset(names)

    def note_seal(self, slot: Slot, seal: Seal) -> None:
        """Remember that what was noted last is of this seal, which nobody else has made."""
        names = self._written.pop(slot.path, None)
        if names is not None and len(names) <= _NAMES_REMEMBERED and seal.settled_ns != seal.mark_ns:
            self._known[slot.path] = Settled(seal.settled_ns, names)

    def forget(self, slot: Slot) -> None:
        """Forget a slot that goes."""
        self._known.pop(slot.path, None)
        self._written.pop(slot.path, None)

    async def of(self, slot: Slot) -> Settled:
        """Return what is noted of a slot, for `Host.inspect_tree`."""
        seal = slot.seal
        if seal is None or seal.settled_ns == seal.mark_ns:
            return Settled(seal.mark_ns if seal else 0, frozenset())
        known = self._known.get(slot.path)
        if known is not None and known.since_ns == seal.settled_ns:
            return known
        data = await self._host.read_bytes(SlotPaths(slot.path).settled, limit=NAMES_LIMIT)
        return Settled(seal.settled_ns, frozenset(split_names(data or b"")))


def _complete(names: set[str]) -> bytes:
    """Add to names the directories that they lie in, and return all as they are stored."""
    for name in list(names):
        above = name.rpartition("/")[0]
        while above and above not in names:  # what is above one that is there already is, or will be, seen to
            names.add(above)
            above = above.rpartition("/")[0]
    return join_names(sorted(names))
