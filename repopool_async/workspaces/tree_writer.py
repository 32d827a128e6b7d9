"""Bringing a tree and the pool's index of it to a commit: which files are written, how, and for whom.

The tree may be the slot's or one that is still being made beside it. What a lessee left in it, and whether it is clean
afterwards, is the cleaner's business.
"""

from typing import Final

from repopool_async.hosts.base import Host, MakeDirectory, RemoveFile, WriteFile
from repopool_async.mirror import Mirror
from repopool_async.models import Slot
from repopool_async.run_as import RunAs
from repopool_async.workspaces.base import Checkout
from repopool_async.workspaces.lfs import Lfs
from repopool_async.workspaces.nul_lists import join_names
from repopool_async.workspaces.pristine_git import PristineGit
from repopool_async.workspaces.slot_paths import ANY_MODE, SlotPaths
from repopool_async.workspaces.sparse import Sparse
from repopool_async.workspaces.submodules import Place, Submodules

_NOWHERE: Final = b"ref: refs/heads/none\n"


class TreeWriter:
    """Writes the trees of a pool's slots.

    Args:
        run_as: whom trees belong to, where that is another user.
    """

    def __init__(
        self,
        *,
        host: Host,
        mirror: Mirror,
        pristine: PristineGit,
        submodules: Submodules,
        lfs: Lfs,
        sparse: Sparse,
        run_as: RunAs | None,
    ) -> None:
        self._host = host
        self._mirror = mirror
        self._pristine = pristine
        self._submodules = submodules
        self._lfs = lfs
        self._sparse = sparse
        self._run_as = run_as

    async def obtain(self, commit: str) -> None:
        """Have everything here, besides a commit's own objects, that its check-out needs; no tree is touched.

        Raises:
            SubmoduleError, UnknownRefError, LfsError: it is refused, or cannot be had.
            GitOperationError: likewise.
        """
        await self._mirror.obtain_contents(commit, self._sparse.includes)
        await self._lfs.obtain(self._mirror, commit)
        await self._submodules.plan(commit)

    async def check_out(
        self, slot: Slot, checkout: Checkout, *, tree: str | None = None, is_untouched: bool = False
    ) -> bool:
        """Bring tree and pristine index to a commit; missing files and files that differ are written anew.

        Args:
            is_untouched: whether the tree is known to be as it was sealed.

        Returns:
            Whether every file was written anew, because the commit's attributes are others.
        """
        paths = SlotPaths(slot.path)
        tree = tree or slot.path
        commit = checkout.commit
        await self._pristine.obtain(slot, commit)
        await self.obtain(commit)
        plan = await self._submodules.plan(commit)
        kept = await self._submodules.make_way(Place.of(slot, tree), plan)
        rewrites = await self._has_other_attributes(slot, commit)
        # Until all is done the pristine git directory stands nowhere, and whoever comes next cannot be mistaken.
        await self._host.apply(
            [
                RemoveFile(f"{paths.git}/index.lock"),
                WriteFile(f"{paths.git}/HEAD", _NOWHERE),
                *self._lfs.steps(self._mirror, commit, paths.git),
            ]
        )
        await self._pristine.run(slot, "read-tree", "--reset", "-u", commit, tree=tree)
        if rewrites:
            await self._host.apply([RemoveFile(f"{paths.git}/index")])
            await self._pristine.run(slot, "read-tree", commit)
            await self._pristine.run(slot, "read-tree", "--reset", "-u", commit, tree=tree)
        gitlinks = await self._list_gitlinks(slot, commit)
        places = [*gitlinks, *plan.places]
        await self._host.apply(
            [
                *(MakeDirectory(f"{tree}/{name}", mode=ANY_MODE) for name in gitlinks),
                WriteFile(paths.gitlinks, join_names(places)),
                WriteFile(f"{paths.git}/HEAD", f"{commit}\n".encode()),
            ]
        )
        await self._submodules.check_out(Place.of(slot, tree), plan, unchanged=kept if is_untouched else ())
        await self._give(slot, tree)
        await self._mirror.keep(slot.slot_id, commit)
        return rewrites

    async def _has_other_attributes(self, slot: Slot, commit: str) -> bool:
        """Return whether a commit's attributes differ from those that the tree's files were written with.

        Line ends and the like may then be others in files that git, comparing blobs, would leave as they are.
        """
        git = SlotPaths(slot.path).git
        standing = await self._host.read_bytes(f"{git}/HEAD", limit=4096)
        if standing == f"{commit}\n".encode() or await self._host.stat(f"{git}/index") is None:
            return False
        attributes = ":(glob)**/.gitattributes"
        return bool(
            (await self._pristine.run(slot, "diff-index", "--cached", "--name-only", commit, "--", attributes)).stdout
        )

    async def _list_gitlinks(self, slot: Slot, commit: str) -> list[str]:
        listing = await self._pristine.run(slot, "ls-tree", "-r", "-d", "-z", commit)
        entries = [entry.partition(b"\t") for entry in listing.stdout.split(b"\0") if entry.startswith(b"160000 ")]
        names = [name.decode(errors="surrogateescape") for _, _, name in entries]
        return [name for name in names if self._sparse.includes(name)]

    async def _give(self, slot: Slot, tree: str) -> None:
        """Give a tree to the user it is for; the index must know the new owner, or every file would look changed."""
        if self._run_as is not None:
            await self._host.apply([self._run_as.give(tree)])
            await self._pristine.run(slot, "update-index", "-q", "--refresh", tree=tree)
