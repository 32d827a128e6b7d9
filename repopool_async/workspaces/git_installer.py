"""Putting a fresh git directory into a tree, in one rename, in place of whatever a lessee left there, unread.

Which files make one is said by `git_directory`; when one is due is the strategy's business.
"""

import attrs

from repopool_async._clock import now
from repopool_async.git_directory import GitDirectory, lessee_steps, own_pack_steps
from repopool_async.hosts.base import Discard, FileStep, Host, Rename
from repopool_async.mirror import Mirror
from repopool_async.models import Slot
from repopool_async.refs import RefsSnapshot
from repopool_async.run_as import RunAs
from repopool_async.workspaces.base import Checkout
from repopool_async.workspaces.lfs import Lfs
from repopool_async.workspaces.own_objects import OwnObjects
from repopool_async.workspaces.pristine_git import PristineGit
from repopool_async.workspaces.slot_paths import SlotPaths
from repopool_async.workspaces.sparse import Sparse
from repopool_async.workspaces.submodule_plan import Plan
from repopool_async.workspaces.submodules import Submodules


class GitInstaller:
    """Makes the git directories that a pool's lessees get.

    Args:
        own: the slots' own objects; None where they borrow the mirror's.
        run_as: whom git directories belong to, where that is another user.
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
        own: OwnObjects | None,
        run_as: RunAs | None,
    ) -> None:
        self._host = host
        self._mirror = mirror
        self._pristine = pristine
        self._submodules = submodules
        self._lfs = lfs
        self._sparse = sparse
        self._own = own
        self._run_as = run_as

    async def install(
        self, slot: Slot, checkout: Checkout, *, is_sealed: bool = False, refs: RefsSnapshot | None = None
    ) -> None:
        """Put a fresh git directory into the tree, in one rename, after whatever was there is out of the way.

        Args:
            is_sealed: whether no lessee could have written to the one that is there.
            refs: what it shall show, as `PristineGit.obtain` returned it; asked for where missing.
        """
        paths = SlotPaths(slot.path)
        outgoing = f"{paths.pristine}/outgoing"
        plan = await self._submodules.plan(checkout.commit)
        extras = await self._lfs.lessee_steps(self._mirror, outgoing) + await self._sparse.lessee_steps(outgoing)
        for attempt in (1, 2):
            shown = refs if refs is not None and attempt == 1 else await self._pristine.obtain(slot, checkout.commit)
            shows = self._git_directory(slot, checkout, shown, plan)
            moves, shows = await self._object_steps(slot, shows, is_sealed=is_sealed)
            modules = await self._submodules.lessee_steps(outgoing, plan, pristine=paths.pristine)
            try:
                await self._host.apply(
                    [
                        Discard(outgoing, paths.trash),
                        *lessee_steps(outgoing, shows, index=f"{paths.git}/index"),
                        *moves,
                        *extras,
                        *modules,
                        *([] if self._run_as is None else [self._run_as.give(outgoing)]),
                        Discard(f"{slot.path}/.git", paths.trash),
                        Rename(outgoing, f"{slot.path}/.git"),
                    ]
                )
            except FileNotFoundError:
                # The snapshot's file was replaced by newer ones while we copied; the next look finds the newest.
                if attempt == 2:
                    raise
            else:
                return

    async def _object_steps(
        self, slot: Slot, shows: GitDirectory, *, is_sealed: bool
    ) -> tuple[list[FileStep], GitDirectory]:
        """Say how the lessee comes by objects of its own: those that lie in the sealed tree stay, new ones are copied.

        Returns:
            Steps to take after those of the git directory, and what that is to show.
        """
        if self._own is None:
            return [], shows
        packs = tuple(await self._own.pack_files(slot))
        present = await self._sealed_packs(slot) if is_sealed else frozenset()
        if not present or not present <= set(packs):
            return [], attrs.evolve(shows, own_packs=packs)
        outgoing = f"{SlotPaths(slot.path).pristine}/outgoing"
        added = attrs.evolve(shows, own_packs=tuple(name for name in packs if name not in present))
        steps: list[FileStep] = [
            Discard(f"{outgoing}/objects", SlotPaths(slot.path).trash),
            Rename(f"{slot.path}/.git/objects", f"{outgoing}/objects"),
            *own_pack_steps(outgoing, added),
        ]
        return steps, attrs.evolve(shows, own_packs=())

    async def _sealed_packs(self, slot: Slot) -> frozenset[str]:
        """Return the packs in a sealed tree that nobody has touched since the seal."""
        assert slot.seal is not None
        objects = f"{slot.path}/.git/objects"
        inspection = await self._host.inspect_tree(objects, since_ns=slot.seal.settled_ns, beside=slot.path)
        if inspection.changed or inspection.changed_directories or inspection.special:
            return frozenset()
        return frozenset(await self._host.list_directory(f"{objects}/pack"))

    def _git_directory(self, slot: Slot, checkout: Checkout, snapshot: RefsSnapshot, plan: Plan) -> GitDirectory:
        return GitDirectory(
            commit=checkout.commit,
            branch=checkout.branch,
            is_tracking=checkout.is_tracking and checkout.branch in snapshot.branches,
            default_branch=snapshot.default_branch,
            default_commit=snapshot.branches.get(snapshot.default_branch or ""),
            url=self._mirror.url,
            remotes=self._mirror.remotes,
            packed_refs=snapshot.packed_refs,
            alternates=self._pristine.objects(slot),
            object_format=snapshot.object_format,
            at=now(),
            submodules=plan.entries.get("", ()) if plan.entries is not None else None,
            sections=self._sparse.section + self._lfs.section,
            is_blobless=bool(self._mirror.promises),
            more_alternates=self._lfs.alternates(self._mirror),
        )
