"""One look at all that is to be known of a slot before anything of it is changed, asked of its host in one go.

Nothing is decided here but whether the tree is still the one that was sealed, and whether the pool's own git directory
of it is untouched: without either, what was seen is worth nothing.
"""

import errno
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

import attrs

from repopool_async.exceptions import CleanupError
from repopool_async.hosts.base import FileStat, Host, Inode, Known, Settled, TreeInspection
from repopool_async.mirror import Mirror
from repopool_async.models import Slot
from repopool_async.refs import FULL_ID
from repopool_async.workspaces.base import Look, Mark
from repopool_async.workspaces.kept_paths import KeptPaths
from repopool_async.workspaces.nul_lists import split_names
from repopool_async.workspaces.pristine_git import PristineGit
from repopool_async.workspaces.seals import Seals
from repopool_async.workspaces.settled import SettledNames
from repopool_async.workspaces.slot_paths import NAMES_LIMIT, SlotPaths
from repopool_async.workspaces.tracked_names import Tracked, TrackedNames

_REPLACED: Final = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


@attrs.frozen
class TreeLook(Look):
    """What was seen.

    Attributes:
        root: the tree's directory. standing: the commit that the pristine git directory stands on, None for none.
        places: where that commit has submodules.
        mark: the moment of it. since_ns: since when changes were looked for; None: everything counts as changed.
        settled, kept, tracked: what the tree was looked at with.
        inspection: of the tree. assumed: the commit for which `kept` and `tracked` hold.
    """

    root: FileStat
    standing: str | None
    places: tuple[str, ...]
    mark: Mark
    since_ns: int | None
    settled: Settled
    kept: tuple[str, ...]
    tracked: Tracked | None
    assumed: str | None
    inspection: TreeInspection


class TreeLooker:
    """Looks at a pool's slots."""

    def __init__(
        self,
        *,
        host: Host,
        mirror: Mirror,
        pristine: PristineGit,
        seals: Seals,
        settled: SettledNames,
        kept: KeptPaths,
        tracked: TrackedNames,
    ) -> None:
        self._host = host
        self._mirror = mirror
        self._pristine = pristine
        self._seals = seals
        self._settled = settled
        self._kept = kept
        self._tracked = tracked

    async def looking(
        self, slot: Slot, *, standing: str | None, tells_unknown: bool, is_over: bool
    ) -> Callable[[], Coroutine[Any, Any, TreeLook]] | None:
        """Have all that a look at a sealed slot needs, and return the look itself, a piece of work that asks once.

        Args:
            standing: what the tree is taken to show, for as long as the look has not told.
            tells_unknown: whether to look for what does not belong there, where the host can.
            is_over: whether nothing of the lease runs any more. Before that what belongs there is not read, as a lessee
                could write what is read, and None is returned where it is needed.

        Raises, as the look does:
            CleanupError: the tree, or the pool's own git directory, is not as it was sealed.
        """
        settled = await self._settled.of(slot)
        kept = await self._kept.of_commit(standing)
        is_told = tells_unknown and self._host.can_tell_unknown and not self._kept.names
        if not is_told or standing is None:
            return partial(self._look, slot, settled, kept, None, standing)
        if self._tracked.knows(standing):
            return partial(self._look, slot, settled, kept, self._tracked.known(standing), standing)
        if not is_over:
            return None
        if await self._seals.trusted_mark(slot.seal) is None or not await self._tracked.stands(slot, standing):
            return partial(self._look, slot, settled, kept, None, standing)
        await self._pristine.refuse_changed(slot)
        tracked = await self._tracked.read(slot, standing)

        async def look() -> TreeLook:
            seen = await self._look(slot, settled, kept, tracked, standing)
            if seen.since_ns is not None:  # the index has not changed until after it was read
                self._tracked.remember(standing, tracked)
            return seen

        return look

    async def _look(
        self, slot: Slot, settled: Settled, kept: tuple[str, ...], tracked: Tracked | None, assumed: str | None
    ) -> TreeLook:
        seal, paths = slot.seal, SlotPaths(slot.path)
        assert seal is not None
        known = tracked.names if tracked is not None else None
        async with self._host.joined() as joined:
            stats = joined(self._host.stat_many([slot.path, paths.git, self._mirror.state_path]))
            offset = joined(self._host.clock_offset())
            git = joined(self._pristine.inspect(slot))
            head = joined(self._host.read_bytes(f"{paths.git}/HEAD", limit=4096))
            places = joined(self._host.read_bytes(paths.gitlinks, limit=NAMES_LIMIT))
            mark = joined(self._host.file_system_clock_ns(paths.pristine))
            inspection = joined(self._inspect(slot, seal.mark_ns, settled, kept, known))
        root, own, state = stats.result()
        refs = await self._mirror.note(state)
        since = await self._seals.trusted_mark(seal, offset=offset.result(), refs=refs)
        if since is not None:
            self._pristine.require_unchanged(slot, own, git.result())
        if root is None:
            raise _replaced(slot)
        text = (head.result() or b"").decode(errors="replace").strip()
        return TreeLook(
            root=root,
            standing=text if FULL_ID.fullmatch(text) else None,
            places=tuple(split_names(places.result() or b"")),
            mark=Mark(mark.result(), offset.result().wall_minus_boot_ns),
            since_ns=since,
            settled=settled,
            kept=kept,
            tracked=tracked,
            assumed=assumed,
            inspection=inspection.result(),
        )

    async def look_anew(self, slot: Slot, *, standing: str | None, root: FileStat) -> TreeLook:
        """Look at a tree of which nothing is trusted: everything counts as changed."""
        kept = await self._kept.of_commit(standing)
        settled = await self._settled.of(slot)
        return TreeLook(
            root=root,
            standing=None,
            places=(),
            mark=Mark(0, 0),
            since_ns=None,
            settled=settled,
            kept=kept,
            tracked=None,
            assumed=standing,
            inspection=await self._inspect(slot, None, settled, kept, None),
        )

    async def _inspect(
        self, slot: Slot, since_ns: int | None, settled: Settled, kept: tuple[str, ...], known: Known | None
    ) -> TreeInspection:
        """Look at the tree, if it is the one that was sealed."""
        seal = slot.seal
        assert seal is not None
        only = Inode(seal.tree_device, seal.tree_inode)
        try:
            return await self._host.inspect_tree(
                slot.path, since_ns=since_ns, settled=settled, passed_over=kept, known=known, only=only
            )
        except OSError as error:
            if error.errno in _REPLACED:
                raise _replaced(slot) from error
            raise


def _replaced(slot: Slot) -> CleanupError:
    return CleanupError(f"{slot.slot_id}: the tree {slot.path} was deleted or replaced", slot_id=slot.slot_id)
