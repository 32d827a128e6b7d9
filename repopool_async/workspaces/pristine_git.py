"""The pool's own git directory of a slot: outside the tree, without refs or hooks, with an index kept between leases.

All of the pool's git commands on a tree run with it, never with what lies in the tree. The objects it borrows are the
mirror's, or the slot's own. Which commands are run, and when it is made anew, is decided by those who use it.
"""

from collections.abc import Mapping
from typing import Final

from repopool_async._git import WORK_MARK, GitRunner
from repopool_async.exceptions import CleanupError
from repopool_async.git_directory import pristine_steps
from repopool_async.hosts.base import Discard, FileStat, Host, TreeInspection
from repopool_async.mirror import Mirror
from repopool_async.models import GitResult, Slot
from repopool_async.refs import RefsSnapshot
from repopool_async.workspaces.lfs import Lfs
from repopool_async.workspaces.own_objects import OwnObjects
from repopool_async.workspaces.seals import Seals
from repopool_async.workspaces.slot_paths import SlotPaths
from repopool_async.workspaces.sparse import Sparse

_WRITING: Final[Mapping[str, str]] = {
    "core.logAllRefUpdates": "false",
    # Of what it takes to write a file most is the kernel's part, which several processes have done side by side; of a
    # few files it is not worth it, and where many small trees are written at once the processors are busy anyway.
    "checkout.workers": "4",
    "checkout.thresholdForParallelism": "2500",
}


class PristineGit:
    """The trusted git directories of a pool's slots.

    Args:
        lfs: how git reads and writes LFS files. sparse: which files there are.
        own: the slots' own objects; None where they borrow the mirror's.
    """

    def __init__(
        self,
        *,
        host: Host,
        git: GitRunner,
        mirror: Mirror,
        seals: Seals,
        lfs: Lfs,
        sparse: Sparse,
        own: OwnObjects | None,
    ) -> None:
        self._host = host
        self._git = git
        self._mirror = mirror
        self._seals = seals
        self._lfs = lfs
        self._sparse = sparse
        self._own = own

    async def run(self, slot: Slot, *args: str, tree: str | None = None, input: bytes | None = None) -> GitResult:
        """Run git with a slot's trusted git directory, on `tree` where one is given."""
        return await self._git.run(
            *args,
            git_dir=SlotPaths(slot.path).git,
            work_tree=tree,
            cwd=tree,
            input=input,
            slot_id=slot.slot_id,
            env={WORK_MARK: slot.path},
            config={**self.config(slot), **_WRITING},
        )

    def config(self, slot: Slot) -> Mapping[str, str]:
        """Return what git must be told of how the slot's tree is made, to read it with the pool's index of it."""
        return {**self._lfs.config(self._mirror, SlotPaths(slot.path).git), **self._sparse.config}

    async def renew(self, slot: Slot) -> None:
        """Make it from nothing, and forget all that was known of the tree."""
        paths = SlotPaths(slot.path)
        refs = self._mirror.seen or await self._mirror.snapshot()
        steps = pristine_steps(paths.git, alternates=self.objects(slot), object_format=refs.object_format)
        selection = await self._sparse.pristine_steps(paths.git)
        await self._host.apply([Discard(paths.pristine, paths.trash), *steps, *selection])

    async def refuse_changed(self, slot: Slot) -> None:
        """Refuse to go by a git directory of ours that somebody else wrote to since the seal.

        Raises:
            CleanupError: somebody did, or it cannot be read.
        """
        if await self._seals.trusted_mark(slot.seal) is None:
            return
        git = SlotPaths(slot.path).git
        async with self._host.joined() as joined:
            inspection = joined(self.inspect(slot))
            root = joined(self._host.stat(git))
        self.require_unchanged(slot, root.result(), inspection.result())

    async def inspect(self, slot: Slot) -> TreeInspection:
        """Look at the git directory of a sealed slot, which `require_unchanged` judges.

        Raises:
            CleanupError: it cannot be read.
        """
        assert slot.seal is not None
        git = SlotPaths(slot.path).git
        try:
            return await self._host.inspect_tree(git, since_ns=slot.seal.settled_ns, beside=slot.path)
        except OSError as error:
            raise CleanupError(f"{slot.slot_id}: {git} cannot be read: {error}", slot_id=slot.slot_id) from error

    def require_unchanged(self, slot: Slot, root: FileStat | None, inspection: TreeInspection) -> None:
        """Refuse to go by the git directory where somebody else wrote to it since the seal.

        Args:
            root: what it is. inspection: what was seen in it.

        Raises:
            CleanupError: somebody did.
        """
        seal, git = slot.seal, SlotPaths(slot.path).git
        assert seal is not None
        changed = [*inspection.changed, *inspection.special, *inspection.changed_directories]
        if changed or root is None or root.ctime_ns >= seal.settled_ns:
            changed.append(".")
            raise CleanupError(
                f"{slot.slot_id}: {git}/{changed[0]} was changed since the slot was sealed", slot_id=slot.slot_id
            )

    def objects(self, slot: Slot) -> str:
        """Return the object directory that it borrows from."""
        return self._mirror.objects if self._own is None else f"{self._own.path(slot)}/objects"

    async def bring(self, slot: Slot, commit: str) -> None:
        """Have what a commit leads to in the slot's own objects, where it borrows none."""
        if self._own is not None:
            await self.obtain(slot, commit)

    async def obtain(self, slot: Slot, commit: str) -> RefsSnapshot:
        """Return the refs that the slot can show, having brought it what they lead to where it borrows nothing."""
        if self._own is None:
            return await self._mirror.snapshot()
        return await self._own.bring_up_to_date(slot, commit, trash=SlotPaths(slot.path).trash)

    async def shown(self, slot: Slot, commit: str) -> RefsSnapshot:
        """Return likewise what the last look at the mirror found, which is asked for nothing where that is enough."""
        seen = self._mirror.seen
        return seen if self._own is None and seen is not None else await self.obtain(slot, commit)
