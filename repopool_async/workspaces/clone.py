"""The portable strategy: a clone that borrows the mirror's objects and whose git directory is replaced, not cleaned.

The pool's git runs with a trusted git directory *outside* the tree (`pristine/git`: no refs, no hooks, an index kept
from the last seal). A lessee gets a copy made for it, file by file; what it gave back is renamed into the trash unread.
Changes are found by the kernel's own change time of every inode since the seal, which a process cannot forge, and what
changed is rewritten, never merely refreshed.
"""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import attrs

from repopool_async._git import GitRunner
from repopool_async.exceptions import CleanupError, GitOperationError, GitRefMissingError, PoolManagerError
from repopool_async.hosts.base import Discard, FileKind, Host, MakeDirectory, Rename
from repopool_async.hosts.joined import Joined
from repopool_async.mirror import Mirror
from repopool_async.models import Seal, Slot
from repopool_async.refs import FULL_ID
from repopool_async.run_as import RunAs
from repopool_async.workspaces.base import Checkout, Look, Mark, Remains, Rung, Work
from repopool_async.workspaces.git_installer import GitInstaller
from repopool_async.workspaces.kept_paths import KeptPaths
from repopool_async.workspaces.lfs import Lfs
from repopool_async.workspaces.own_objects import OwnObjects
from repopool_async.workspaces.pristine_git import PristineGit
from repopool_async.workspaces.seals import Seals, is_same_tree
from repopool_async.workspaces.settled import SettledNames
from repopool_async.workspaces.slot_paths import ANY_MODE, SlotPaths
from repopool_async.workspaces.sparse import Sparse
from repopool_async.workspaces.submodules import Place, Submodules
from repopool_async.workspaces.tracked_names import Tracked, TrackedNames
from repopool_async.workspaces.tree_cleaner import TreeCleaner, is_ordinary, is_untouched
from repopool_async.workspaces.tree_look import TreeLook, TreeLooker
from repopool_async.workspaces.tree_writer import TreeWriter


class CloneWorkspace:
    """`WorkspaceStrategy` for a clone with borrowed objects.

    Args:
        host: where the slot's files lie. git: runs the pool's git. mirror: whose objects and refs the slot shows.
        submodules: checks them out; where missing, their places are empty directories.
        lfs: has, reads and writes LFS files; where missing, they are their pointers.
        sparse: which directories are checked out; where missing, all are.
        is_isolated: give every slot objects of its own instead.
        run_as: whom trees belong to, where that is another user; nothing that user ever had is used again.
        kept: what stays in trees between leases; nothing where missing.
    """

    def __init__(
        self,
        *,
        host: Host,
        git: GitRunner,
        mirror: Mirror,
        submodules: Submodules | None = None,
        lfs: Lfs | None = None,
        sparse: Sparse | None = None,
        is_isolated: bool = False,
        run_as: RunAs | None = None,
        kept: KeptPaths | None = None,
    ) -> None:
        own = OwnObjects(host, git, mirror) if is_isolated else None
        submodules = submodules or Submodules(host=host, git=git, mirror=mirror)
        lfs = lfs or Lfs(host=host, git=git)
        sparse = sparse or Sparse(host=host, git=git, mirror=mirror)
        manner = " ".join(filter(None, ("lfs" if lfs.is_wanted else "", sparse.manner)))
        kept = kept or KeptPaths(host=host, git=git, mirror=mirror)
        seals = Seals(host=host, mirror=mirror, submodules=submodules, kept=kept, manner=manner)
        pristine = PristineGit(host=host, git=git, mirror=mirror, seals=seals, lfs=lfs, sparse=sparse, own=own)
        writer = TreeWriter(
            host=host, mirror=mirror, pristine=pristine, submodules=submodules, lfs=lfs, sparse=sparse, run_as=run_as
        )
        self._host = host
        self._mirror = mirror
        self._submodules = submodules
        self._lfs = lfs
        self._own = own
        self._run_as = run_as
        self._kept = kept
        self._seals = seals
        self._pristine = pristine
        self._writer = writer
        self._sparse = sparse
        self._settled = SettledNames(host=host, submodules=submodules)
        self._looker = TreeLooker(
            host=host,
            mirror=mirror,
            pristine=pristine,
            seals=seals,
            settled=self._settled,
            kept=kept,
            tracked=TrackedNames(host=host, pristine=pristine),
        )
        self._cleaner = TreeCleaner(
            host=host, pristine=pristine, submodules=submodules, sparse=sparse, writer=writer, kept=kept
        )
        self._installer = GitInstaller(
            host=host,
            mirror=mirror,
            pristine=pristine,
            submodules=submodules,
            lfs=lfs,
            sparse=sparse,
            own=own,
            run_as=run_as,
        )

    @property
    def owns_objects(self) -> bool:
        """See `WorkspaceStrategy.owns_objects`."""
        return self._own is not None

    async def default_checkout(self) -> Checkout:
        """See `WorkspaceStrategy.default_checkout`."""
        resolved = await self._mirror.resolve(None)
        return Checkout(commit=resolved.commit, branch=resolved.branch)

    async def provision(self, slot: Slot, checkout: Checkout) -> Work:
        """See `WorkspaceStrategy.provision`."""
        return await self._make_anew(slot, checkout, seals=False)

    async def _make_anew(self, slot: Slot, checkout: Checkout, *, seals: bool) -> Work:
        """Make a tree beside the slot's, whatever that is, and put it in its place."""
        await self._mirror.snapshot()  # which the pieces then need not ask for
        if self._run_as is not None:
            await self._run_as.require_own_group(slot)
        paths = SlotPaths(slot.path)
        try:
            left, tree = await self._make_beside(slot, checkout)
            refs = await self._pristine.shown(slot, checkout.commit)
            await self._kept.of_commit(checkout.commit)  # which is then known
            seal: asyncio.Future[Seal] | None = None
            async with self._block() as joined:
                joined(self._host.apply([*left, Discard(slot.path, paths.trash), Rename(tree, slot.path)]))
                joined(self._kept.put_back(slot, checkout.commit))
                joined(self._installer.install(slot, checkout, refs=refs))
                joined(self._secure(slot))
                if seals:
                    seal = joined(self._seals.make(slot, checkout, refs=refs))
        except (PoolManagerError, OSError):
            await self._host.apply(await self._sweeping(paths))
            raise
        return Work(steps=("tree made anew",), seal=self._sealed(slot, seal.result()) if seal is not None else None)

    async def _make_beside(self, slot: Slot, checkout: Checkout) -> tuple[list[Discard], str]:
        """Make a tree; return where it is, and what sweeps up those that killed processes were making there."""
        tree = f"{slot.path}.new-{secrets.token_hex(4)}"
        async with self._block() as joined:
            joined(self._secure(slot))
            left = joined(self._sweeping(SlotPaths(slot.path)))
            joined(self._pristine.renew(slot))
            joined(self._host.apply([MakeDirectory(tree, mode=ANY_MODE)]))
            joined(self._check_out_whole(slot, checkout, tree))
        return left.result(), tree

    async def _check_out_whole(self, slot: Slot, checkout: Checkout, tree: str) -> None:
        # Nothing is there that could have been written otherwise.
        ready = await self._writer.get_ready(slot, checkout, standing=checkout.commit)
        async with self._block() as joined:
            joined(self._writer.write(slot, ready, tree=tree))
            joined(self._cleaner.require_whole(slot, tree=tree))

    async def prepare(self, slot: Slot, checkout: Checkout) -> Work:
        """See `WorkspaceStrategy.prepare`."""
        seal = await self._seals.checked(slot)
        if seal.commit == checkout.commit:
            if seal.branch == checkout.branch and seal.refs_generation == await self._seals.generation(checkout.commit):
                return Work(steps=("warm",), warm=True)
            await self._pristine.refuse_changed(slot)
            await self._installer.install(slot, checkout, is_sealed=True)
            return Work(steps=("refs renewed",), warm=True)
        await self._pristine.refuse_changed(slot)
        submodules = await self._submodules.standing(Place.of(slot))
        moved = await self._kept.take_out(slot, seal.commit, unless_kept_by=checkout.commit)
        written = await self._writer.switch(slot, seal.commit, checkout)
        moved += await self._kept.put_back(slot, checkout.commit)
        await self._settled.note(slot, {*written, *moved}, before=submodules, commit=checkout.commit)
        await self._installer.install(slot, checkout, is_sealed=True)
        return Work(steps=("checked out",))

    async def restore(
        self,
        slot: Slot,
        checkout: Checkout,
        *,
        rung: Rung,
        trust_untouched: bool = True,
        keeps_paths: bool = True,
        look: Look | None = None,
        seals: bool = False,
    ) -> Work:
        """See `WorkspaceStrategy.restore`."""
        await self._forget(slot, checkout, rung)
        if not keeps_paths:
            await self._kept.drop(slot)
        await self._kept.drop_former(slot)
        if rung >= Rung.RECREATE_TREE or self._run_as is not None:
            if keeps_paths:
                await self._kept.take_out(slot, await self._kept.standing(slot))
            return await self._make_anew(slot, checkout, seals=seals)
        await self._writer.obtain(checkout.commit)  # refused or not to be had: while nothing has been touched
        seen = await self._seen(slot, look, rung=rung, trust_untouched=trust_untouched)
        if self._own is not None:
            await self._own.tidy(slot)
        since, settled = seen.since_ns, seen.settled
        is_quiet = (
            since is not None and seen.root.ctime_ns < settled.since_ns and self._seals.is_made_as_wanted(slot.seal)
        )
        gitfiles = (
            await self._submodules.unchanged_gitfiles(Place.of(slot), since, settled) if since and is_quiet else ()
        )
        if trust_untouched and is_quiet and is_untouched(seen.inspection, gitfiles):
            await self._kept.take_out(slot, seen.standing, unless_kept_by=checkout.commit)
            work = await self._cleaner.switch_untouched(slot, checkout)
            return await self._finish(slot, checkout, lambda _: lambda: work, seals=seals)
        if since is not None and seen.tracked is not None and is_ordinary(seen.inspection):
            work = await self._clean_ordinary(slot, checkout, seen.tracked, seen)
            return await self._finish(slot, checkout, lambda _: lambda: work, since=work.since, seals=seals)
        await self._kept.take_out(slot, seen.standing)
        begun = await self._cleaner.begin(slot, checkout, seen)
        return await self._finish(slot, checkout, lambda joined: self._cleaner.clean(joined, slot, begun), seals=seals)

    async def looking(
        self, slot: Slot, *, rung: Rung, trust_untouched: bool
    ) -> Callable[[], Coroutine[Any, Any, Look]] | None:
        """See `WorkspaceStrategy.looking`; of a tree that is made anew in any case, only at what it is made from."""
        if rung >= Rung.RECREATE_TREE or self._run_as is not None:
            return self._look_at_mirror
        return await self._looking(slot, trust_untouched=trust_untouched, is_over=False)

    async def _look_at_mirror(self) -> Look:
        await self._mirror.look()
        return Look()

    async def _looking(
        self, slot: Slot, *, trust_untouched: bool, is_over: bool
    ) -> Callable[[], Coroutine[Any, Any, TreeLook]] | None:
        if slot.seal is None or not self._seals.is_written_as_wanted(slot.seal):
            return None
        standing = slot.seal.commit
        return await self._looker.looking(slot, standing=standing, tells_unknown=trust_untouched, is_over=is_over)

    async def _seen(self, slot: Slot, look: Look | None, *, rung: Rung, trust_untouched: bool) -> TreeLook:
        """Return what there is to be seen, by as much as a rung trusts."""
        seen = None
        if rung is Rung.CLEAN and isinstance(look, TreeLook):
            seen = look
        elif rung is Rung.CLEAN:
            looking = await self._looking(slot, trust_untouched=trust_untouched, is_over=True)
            seen = await looking() if looking is not None else None
        if seen is not None:
            if seen.standing != seen.assumed:  # a check-out was interrupted, or could not be noted
                again = await self._looker.looking(
                    slot, standing=seen.standing, tells_unknown=trust_untouched, is_over=True
                )
                assert again is not None  # the lease is over
                seen = attrs.evolve(await again(), assumed=seen.standing)
            if seen.since_ns is not None:
                return seen
        root = await self._host.stat(slot.path)
        if root is None or root.kind is not FileKind.DIRECTORY or not is_same_tree(root, slot.seal):
            raise CleanupError(f"{slot.slot_id}: the tree {slot.path} was deleted or replaced", slot_id=slot.slot_id)
        standing = await self._kept.standing(slot)
        await self._kept.take_out(slot, standing)  # while it is known what the tree shows
        await self._pristine.renew(slot)
        return await self._looker.look_anew(slot, standing=standing, root=root)

    async def _finish(
        self,
        slot: Slot,
        checkout: Checkout,
        clean: Callable[[Joined], Callable[[], Work]],
        *,
        since: Mark | None = None,
        seals: bool,
    ) -> Work:
        """Do the last pieces of cleaning, put the git directory in, and seal where that is wanted."""
        refs = await self._pristine.shown(slot, checkout.commit)
        await self._kept.of_commit(checkout.commit)  # which is then known
        seal: asyncio.Future[Seal] | None = None
        async with self._block() as joined:
            outcome = clean(joined)
            joined(self._kept.put_back(slot, checkout.commit))
            joined(self._installer.install(slot, checkout, refs=refs))
            if seals:
                seal = joined(self._seals.make(slot, checkout, since=since, refs=refs))
        return attrs.evolve(outcome(), seal=self._sealed(slot, seal.result()) if seal is not None else None)

    def _block(self) -> Joined:
        """Return a block for pieces that ask once where slots are plain clones; otherwise they may take many steps."""
        more = (self._own is not None, self._submodules.is_wanted, self._lfs.is_wanted, self._sparse.is_wanted)
        return Joined() if any(more) else self._host.joined()

    def _sealed(self, slot: Slot, seal: Seal) -> Seal:
        self._settled.note_seal(slot, seal)
        return seal

    async def _forget(self, slot: Slot, checkout: Checkout, rung: Rung) -> None:
        """Throw away, and have anew, what a rung does not trust of all that lies outside the tree."""
        if rung > Rung.CLEAN:
            self._lfs.forget()
        if rung >= Rung.REBUILD_MIRROR:
            await self._mirror.rebuild()
            await self._submodules.rebuild()
            await self._require(slot, checkout)
        if rung >= Rung.RECLONE and self._own is not None:
            await self._host.apply([Discard(self._own.path(slot), SlotPaths(slot.path).trash)])

    async def _clean_ordinary(self, slot: Slot, checkout: Checkout, tracked: Tracked, seen: TreeLook) -> Work:
        work, touched = await self._cleaner.clean_ordinary(slot, tracked, seen.inspection)
        if tracked.commit != checkout.commit:
            touched |= await self._writer.switch(slot, tracked.commit, checkout)
        await self._settled.note_cleaned(slot, touched)
        return attrs.evolve(work, since=seen.mark)

    async def seal(
        self, slot: Slot, checkout: Checkout, *, keeps_mark: bool = False, since: Mark | None = None
    ) -> Seal:
        """See `WorkspaceStrategy.seal`."""
        return self._sealed(slot, await self._seals.make(slot, checkout, keeps_mark=keeps_mark, since=since))

    async def verify(self, slot: Slot) -> Sequence[str]:
        """See `WorkspaceStrategy.verify`."""
        try:
            seal = await self._seals.checked(slot)
        except CleanupError as error:
            return [error.message]
        try:
            await self._pristine.refuse_changed(slot)
            problems = await self._cleaner.differences(slot, tree=slot.path, commit=seal.commit)
            # A directory made in the tree would cost its next cleaning, and stay there where we are killed.
            own = await self._host.inspect_tree(f"{slot.path}/.git", since_ns=seal.settled_ns, beside=slot.path)
            problems += [f"changed since the seal: .git/{name}" for name in own.changed]
            if self._own is not None:
                problems += await self._own.find_damage(slot)
        except (CleanupError, GitOperationError, OSError) as error:
            return [str(error)]
        head = await self._host.read_bytes(f"{slot.path}/.git/HEAD", limit=4096)
        expected = f"ref: refs/heads/{seal.branch}" if seal.branch else seal.commit
        if head is None or head.decode(errors="replace").strip() != expected:
            problems.append(f"HEAD is not {expected!r}")
        index = await self._host.stat(f"{slot.path}/.git/index")
        if index is None:
            problems.append("the index is missing")
        problems += await self._submodules.problems(Place.of(slot))
        problems += await self._lfs.problems(self._mirror, SlotPaths(slot.path).git)
        settled = await self._settled.of(slot)
        inspection = await self._host.inspect_tree(
            slot.path,
            since_ns=await self._seals.trusted_mark(seal),
            settled=settled,
            passed_over=await self._kept.of_commit(seal.commit),
        )
        problems += [f"changed since the seal: {name}" for name in inspection.changed]
        if self._run_as is None:  # otherwise all of it is another user's, and made anew at every return
            problems += [f"mode, owner or attributes changed: {name}" for name in inspection.irregular]
        problems += [f"something is mounted: {name}" for name in inspection.mounts]
        return problems

    async def free_space(self, slot: Slot) -> None:
        """See `WorkspaceStrategy.free_space`."""
        trash = SlotPaths(slot.path).trash
        for name in await self._host.list_directory(trash):
            with suppress(OSError):  # what cannot be deleted is met again, and reported, by whoever empties the trash
                await self._host.remove_tree(f"{trash}/{name}")

    async def remains(self, slot: Slot) -> Remains | None:
        """See `WorkspaceStrategy.remains`."""
        paths = SlotPaths(slot.path)
        root = await self._host.stat(slot.path)
        if root is None or root.kind is not FileKind.DIRECTORY:
            return None
        base = (await self._host.read_bytes(f"{paths.git}/HEAD", limit=4096) or b"").decode(errors="replace").strip()
        if FULL_ID.fullmatch(base) is None and slot.seal is not None:
            base = slot.seal.commit  # interrupted between two commits: what differs from the former is saved
        if FULL_ID.fullmatch(base) is None:
            raise CleanupError(f"{slot.slot_id}: nothing tells what the tree showed", slot_id=slot.slot_id)
        since = await self._seals.trusted_mark(slot.seal) if is_same_tree(root, slot.seal) else None
        settled = await self._settled.of(slot)
        kept = await self._kept.of_commit(await self._kept.standing(slot))
        inspection = await self._host.inspect_tree(slot.path, since_ns=since, settled=settled, passed_over=kept)
        is_quiet = since is not None and root.ctime_ns < settled.since_ns
        return Remains(
            base=base,
            index=f"{paths.git}/index",
            inspection=inspection,
            git_config=self._pristine.config(slot),
            knows_changes=since is not None,
            is_untouched=is_quiet and is_untouched(inspection),
            kept=kept,
        )

    async def discard(self, slot: Slot) -> None:
        """See `WorkspaceStrategy.discard`."""
        self._settled.forget(slot)
        await self._mirror.unkeep(slot.slot_id)
        await self._submodules.discard(Place.of(slot))

    async def _secure(self, slot: Slot) -> None:
        """Keep the user's other leases out before a tree is given to it, and shut away what was made meanwhile."""
        if self._run_as is not None:
            await self._run_as.secure(slot)

    async def _require(self, slot: Slot, checkout: Checkout) -> None:
        """Say plainly that a commit is gone: neither the remote nor the old mirror had it."""
        if not await self._mirror.has(checkout.commit):
            raise GitRefMissingError(
                f"{slot.slot_id}: {checkout.commit} is in neither the old mirror nor the remote any more",
                operation="restore",
                slot_id=slot.slot_id,
            )

    async def _sweeping(self, paths: SlotPaths) -> list[Discard]:
        """Return the steps that discard trees which somebody was making beside this one."""
        prefix = paths.tree.rpartition("/")[2] + ".new-"
        names = [name for name in await self._host.list_directory(paths.directory) if name.startswith(prefix)]
        return [Discard(f"{paths.directory}/{name}", paths.trash) for name in names]
