"""The portable strategy: a clone that borrows the mirror's objects and whose git directory is replaced, not cleaned.

The pool's git runs with a trusted git directory *outside* the tree (`pristine/git`: no refs, no hooks, an index kept
from the last seal). A lessee gets a copy made for it, file by file; what it gave back is renamed into the trash unread.
Changes are found by the kernel's own change time of every inode since the seal, which a process cannot forge, and what
changed is rewritten, never merely refreshed.
"""

import secrets
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Final

import anyio
import attrs

from repopool_async._aio import together
from repopool_async._clock import now, wall_minus_boot_ns
from repopool_async._git import WORK_MARK, GitRunner
from repopool_async._identity import boot_id
from repopool_async.exceptions import CleanupError, GitOperationError, GitRefMissingError, PoolManagerError
from repopool_async.git_directory import GitDirectory, lessee_steps, own_pack_steps, pristine_steps
from repopool_async.hosts.base import (
    Discard,
    FileKind,
    FileStat,
    FileStep,
    Host,
    MakeDirectory,
    RemoveFile,
    Rename,
    Settled,
    TreeInspection,
    WriteFile,
)
from repopool_async.mirror import Mirror
from repopool_async.models import GitResult, Seal, Slot
from repopool_async.refs import FULL_ID, RefsSnapshot
from repopool_async.run_as import RunAs
from repopool_async.workspaces.base import Checkout, Remains, Rung, Work
from repopool_async.workspaces.own_objects import OwnObjects
from repopool_async.workspaces.submodule_plan import Plan, Submodule
from repopool_async.workspaces.submodules import Place, Submodules

_CLOCK_STEP_NS: Final = 5_000_000
"""A wall clock that moved by more than this against the boot clock was set; file times then prove nothing."""

_TICK_SECONDS: Final = 0.002
_ANY_MODE: Final = 0o777
"""What git makes directories with; the umask says the rest."""
_NOWHERE: Final = b"ref: refs/heads/none\n"
_NAMES_LIMIT: Final = 256 * 1024 * 1024


@attrs.frozen
class _Paths:
    """Where a slot's things lie."""

    tree: str

    @property
    def directory(self) -> str:
        return self.tree.rpartition("/")[0]

    @property
    def pristine(self) -> str:
        return f"{self.directory}/pristine"

    @property
    def git(self) -> str:
        return f"{self.pristine}/git"

    @property
    def gitlinks(self) -> str:
        return f"{self.pristine}/gitlinks"

    @property
    def settled(self) -> str:
        return f"{self.pristine}/settled"

    @property
    def trash(self) -> str:
        pool_directory = self.directory.rpartition("/slots/")[0]
        return f"{pool_directory}/trash"


class CloneWorkspace:
    """`WorkspaceStrategy` for a clone with borrowed objects.

    Args:
        host: where the slot's files lie. git: runs the pool's git. mirror: whose objects and refs the slot shows.
        submodules: checks them out; where missing, their places are empty directories.
        is_isolated: give every slot objects of its own instead.
        run_as: whom trees belong to, where that is another user; nothing that user ever had is used again.
    """

    def __init__(
        self,
        *,
        host: Host,
        git: GitRunner,
        mirror: Mirror,
        submodules: Submodules | None = None,
        is_isolated: bool = False,
        run_as: RunAs | None = None,
    ) -> None:
        self._run_as = run_as
        self._host = host
        self._git = git
        self._mirror = mirror
        self._submodules = submodules or Submodules(host=host, git=git, mirror=mirror)
        self._own = OwnObjects(host, git, mirror) if is_isolated else None

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
        paths = _Paths(slot.path)
        await self._secure(slot)
        await self._sweep_beside(paths)
        await self._renew_pristine(slot)
        try:
            await self._make_tree(slot, checkout)
        except (PoolManagerError, OSError):
            await self._sweep_beside(paths)
            raise
        await self._install(slot, checkout)
        await self._secure(slot)
        return Work(steps=("tree made anew",))

    async def _make_tree(self, slot: Slot, checkout: Checkout) -> None:
        beside = f"{slot.path}.new-{secrets.token_hex(4)}"
        await self._host.apply([MakeDirectory(beside, mode=_ANY_MODE)])
        await self._check_out(slot, checkout, tree=beside)
        await self._verify_clean(slot, tree=beside)
        await self._host.apply([Discard(slot.path, _Paths(slot.path).trash), Rename(beside, slot.path)])

    async def prepare(self, slot: Slot, checkout: Checkout) -> Work:
        """See `WorkspaceStrategy.prepare`."""
        seal = await self._checked_seal(slot)
        if seal.commit == checkout.commit:
            if seal.branch == checkout.branch and seal.refs_generation == await self._generation(checkout.commit):
                return Work(steps=("warm",), warm=True)
            await self._check_pristine(slot)
            await self._install(slot, checkout, is_sealed=True)
            return Work(steps=("refs renewed",), warm=True)
        await self._check_pristine(slot)
        submodules = await self._submodules.standing(_place(slot))
        rewritten = await self._check_out(slot, checkout, is_untouched=True)
        await self._note_settled(slot, seal, checkout.commit, submodules, all_files=rewritten)
        await self._install(slot, checkout, is_sealed=True)
        return Work(steps=("checked out",))

    async def restore(self, slot: Slot, checkout: Checkout, *, rung: Rung, trust_untouched: bool = True) -> Work:
        """See `WorkspaceStrategy.restore`."""
        if rung >= Rung.REBUILD_MIRROR:
            await self._mirror.rebuild()
            await self._submodules.rebuild()
            await self._require(slot, checkout)
        if rung >= Rung.RECLONE and self._own is not None:
            await self._host.apply([Discard(self._own.path(slot), _Paths(slot.path).trash)])
        if rung >= Rung.RECREATE_TREE or self._run_as is not None:
            return await self.provision(slot, checkout)
        paths = _Paths(slot.path)
        await self._submodules.plan(checkout.commit)  # refused or not to be had: while nothing has been touched
        root = await self._host.stat(slot.path)
        if root is None or root.kind is not FileKind.DIRECTORY or not _is_same_tree(root, slot.seal):
            raise CleanupError(f"{slot.slot_id}: the tree {slot.path} was deleted or replaced", slot_id=slot.slot_id)
        since = await self._trusted_mark(slot.seal) if rung is Rung.CLEAN else None
        if since is None:
            await self._renew_pristine(slot)
        else:
            await self._check_pristine(slot)
        if self._own is not None:
            await self._own.tidy(slot)
        settled = await self._settled(slot)
        inspection = await self._host.inspect_tree(slot.path, since_ns=since, settled=settled)
        await self._host.apply([Discard(f"{slot.path}/.git", paths.trash), RemoveFile(f"{paths.git}/index.lock")])
        is_quiet = since is not None and root.ctime_ns < settled.since_ns and self._is_made_as_wanted(slot.seal)
        gitfiles = await self._submodules.unchanged_gitfiles(_place(slot), since, settled) if since and is_quiet else ()
        if trust_untouched and is_quiet and _is_untouched(inspection, gitfiles):
            work = await self._switch_untouched(slot, checkout)
        else:
            work = await self._clean(slot, checkout, inspection)
        await self._install(slot, checkout)
        return work

    async def seal(self, slot: Slot, checkout: Checkout, *, keeps_mark: bool = False) -> Seal:
        """See `WorkspaceStrategy.seal`."""
        generation = await self._generation(checkout.commit)
        previous = slot.seal
        offset = wall_minus_boot_ns()
        settled = mark = await self._mark(slot)
        if keeps_mark and previous is not None:
            mark, offset = previous.mark_ns, previous.clock_offset_ns
        root = await self._root(slot)
        return Seal(
            commit=checkout.commit,
            branch=checkout.branch,
            refs_generation=generation,
            boot_id=boot_id(),
            mark_ns=mark,
            settled_ns=settled,
            clock_offset_ns=offset,
            tree_device=root.device,
            tree_inode=root.inode,
            mirror_build=(await self._mirror.snapshot()).build,
        )

    async def verify(self, slot: Slot) -> Sequence[str]:
        """See `WorkspaceStrategy.verify`."""
        try:
            seal = await self._checked_seal(slot)
        except CleanupError as error:
            return [error.message]
        try:
            await self._check_pristine(slot)
            problems = await self._differences(slot, tree=slot.path)
            own = await self._host.inspect_tree(f"{slot.path}/.git", since_ns=seal.settled_ns)
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
        problems += await self._submodules.head_problems(_place(slot))
        settled = await self._settled(slot)
        inspection = await self._host.inspect_tree(slot.path, since_ns=await self._trusted_mark(seal), settled=settled)
        problems += [f"changed since the seal: {name}" for name in inspection.changed]
        if self._run_as is None:  # otherwise all of it is another user's, and made anew at every return
            problems += [f"mode, owner or attributes changed: {name}" for name in inspection.irregular]
        problems += [f"something is mounted: {name}" for name in inspection.mounts]
        return problems

    async def free_space(self, slot: Slot) -> None:
        """See `WorkspaceStrategy.free_space`."""
        trash = _Paths(slot.path).trash
        for name in await self._host.list_directory(trash):
            with suppress(OSError):  # what cannot be deleted is met again, and reported, by whoever empties the trash
                await self._host.remove_tree(f"{trash}/{name}")

    async def remains(self, slot: Slot) -> Remains | None:
        """See `WorkspaceStrategy.remains`."""
        paths = _Paths(slot.path)
        root = await self._host.stat(slot.path)
        if root is None or root.kind is not FileKind.DIRECTORY:
            return None
        base = (await self._host.read_bytes(f"{paths.git}/HEAD", limit=4096) or b"").decode(errors="replace").strip()
        if FULL_ID.fullmatch(base) is None and slot.seal is not None:
            base = slot.seal.commit  # interrupted between two commits: what differs from the former is saved
        if FULL_ID.fullmatch(base) is None:
            raise CleanupError(f"{slot.slot_id}: nothing tells what the tree showed", slot_id=slot.slot_id)
        since = await self._trusted_mark(slot.seal) if _is_same_tree(root, slot.seal) else None
        settled = await self._settled(slot)
        inspection = await self._host.inspect_tree(slot.path, since_ns=since, settled=settled)
        is_quiet = since is not None and root.ctime_ns < settled.since_ns
        return Remains(
            base=base,
            index=f"{paths.git}/index",
            inspection=inspection,
            knows_changes=since is not None,
            is_untouched=is_quiet and _is_untouched(inspection),
        )

    async def discard(self, slot: Slot) -> None:
        """See `WorkspaceStrategy.discard`."""
        await self._mirror.unkeep(slot.slot_id)
        await self._submodules.discard(_place(slot))

    # -- cleaning in place ---------------------------------------------------------------------------------------

    async def _switch_untouched(self, slot: Slot, checkout: Checkout) -> Work:
        assert slot.seal is not None
        if slot.seal.commit == checkout.commit:
            return Work(steps=("untouched",), warm=True)
        await self._check_out(slot, checkout, is_untouched=True)
        await self._verify_clean(slot, tree=slot.path)
        return Work(steps=("untouched", "checked out"))

    async def _clean(self, slot: Slot, checkout: Checkout, inspection: TreeInspection) -> Work:
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
        trash = _Paths(slot.path).trash
        # Specials first: a fifo where git looks for a file would hang it. Planted repositories git would pass over.
        suspects = [*inspection.special, *inspection.repositories, *await self._gitlinks(slot)]
        removed = await self._host.remove_entries(slot.path, suspects, trash=trash)
        # Whole directories next, so that the time to available does not depend on what a lessee left in them.
        untracked = await self._untracked(slot, tree=slot.path)
        removed += await self._host.remove_entries(slot.path, untracked, trash=trash)
        removed += await self._submodules.remove_untracked(_place(slot))
        # A directory whose mode or attributes were changed is checked out anew as a whole.
        restored = await self._host.remove_entries(slot.path, [*inspection.irregular, *inspection.changed], trash=trash)
        await self._check_out(slot, checkout)
        await self._verify_clean(slot, tree=slot.path)
        return Work(steps=("cleaned", "checked out", "verified"), removed=removed, restored=restored)

    async def _check_out(
        self, slot: Slot, checkout: Checkout, *, tree: str | None = None, is_untouched: bool = False
    ) -> bool:
        """Bring tree and pristine index to a commit; missing files and files that differ are written anew.

        Args:
            is_untouched: whether the tree is known to be as it was sealed.

        Returns:
            Whether every file was written anew, because the commit's attributes are others.
        """
        paths = _Paths(slot.path)
        tree = tree or slot.path
        commit = checkout.commit
        await self._snapshot_with(slot, checkout)
        plan = await self._submodules.plan(commit)
        kept = await self._submodules.make_way(_place(slot, tree), plan)
        rewrites = await self._has_other_attributes(slot, commit)
        # Until all is done the pristine git directory stands nowhere, and whoever comes next cannot be mistaken.
        await self._host.apply([RemoveFile(f"{paths.git}/index.lock"), WriteFile(f"{paths.git}/HEAD", _NOWHERE)])
        await self._run(slot, "read-tree", "--reset", "-u", commit, tree=tree)
        if rewrites:
            await self._host.apply([RemoveFile(f"{paths.git}/index")])
            await self._run(slot, "read-tree", commit)
            await self._run(slot, "read-tree", "--reset", "-u", commit, tree=tree)
        gitlinks = await self._list_gitlinks(slot, commit)
        places = [*gitlinks, *plan.places]
        await self._host.apply(
            [
                *(MakeDirectory(f"{tree}/{name}", mode=_ANY_MODE) for name in gitlinks),
                WriteFile(paths.gitlinks, b"".join(name.encode(errors="surrogateescape") + b"\0" for name in places)),
                WriteFile(f"{paths.git}/HEAD", f"{commit}\n".encode()),
            ]
        )
        await self._submodules.check_out(_place(slot, tree), plan, unchanged=kept if is_untouched else ())
        await self._give(slot, tree)
        await self._mirror.keep(slot.slot_id, commit)
        return rewrites

    async def _has_other_attributes(self, slot: Slot, commit: str) -> bool:
        """Return whether a commit's attributes differ from those that the tree's files were written with.

        Line ends and the like may then be others in files that git, comparing blobs, would leave as they are.
        """
        git = _Paths(slot.path).git
        standing = await self._host.read_bytes(f"{git}/HEAD", limit=4096)
        if standing == f"{commit}\n".encode() or await self._host.stat(f"{git}/index") is None:
            return False
        attributes = ":(glob)**/.gitattributes"
        return bool((await self._run(slot, "diff-index", "--cached", "--name-only", commit, "--", attributes)).stdout)

    async def _secure(self, slot: Slot) -> None:
        """Keep the user's other leases out before a tree is given to it, and shut away what was made meanwhile."""
        if self._run_as is not None:
            await self._run_as.secure(slot)

    async def _give(self, slot: Slot, tree: str) -> None:
        """Give a tree to the user it is for; the index must know the new owner, or every file would look changed."""
        if self._run_as is not None:
            await self._host.apply([self._run_as.give(tree)])
            await self._run(slot, "update-index", "-q", "--refresh", tree=tree)

    async def _verify_clean(self, slot: Slot, *, tree: str) -> None:
        problems = await self._differences(slot, tree=tree)
        if problems:
            shown = ", ".join(problems[:5])
            raise CleanupError(f"{slot.slot_id}: not clean after cleaning: {shown}", slot_id=slot.slot_id)

    async def _differences(self, slot: Slot, *, tree: str) -> list[str]:
        """Return what differs between the tree and the pristine index, both ways."""
        found: list[str] = []

        async def modified() -> None:
            listing = await self._run(slot, "diff-files", "-z", "--name-only", "--ignore-submodules=all", tree=tree)
            found.extend(f"modified: {name}" for name in _names(listing.stdout))

        async def untracked() -> None:
            found.extend(f"untracked: {name}" for name in await self._untracked(slot, tree=tree))

        await together(modified, untracked)
        return found + await self._submodules.differences(_place(slot, tree))

    async def _untracked(self, slot: Slot, *, tree: str) -> list[str]:
        """List what the index does not know, ignored or not, directories as one entry."""
        listing = await self._run(slot, "ls-files", "-z", "--others", "--directory", tree=tree)
        return [name.rstrip("/") for name in _names(listing.stdout)]

    # -- submodule places: unless one is checked out there, nothing may lie in them, and git does not look there ---

    async def _gitlinks(self, slot: Slot) -> list[str]:
        """Return the submodule places that are not empty and ought to be, of the commit the slot stands on."""
        data = await self._host.read_bytes(_Paths(slot.path).gitlinks, limit=_NAMES_LIMIT)
        filled = {submodule.path for submodule in await self._submodules.standing(_place(slot))}
        names = [name for name in _names(data or b"") if name not in filled]
        return [name for name in names if await self._host.list_directory(f"{slot.path}/{name}")]

    async def _list_gitlinks(self, slot: Slot, commit: str) -> list[str]:
        listing = await self._run(slot, "ls-tree", "-r", "-d", "-z", commit)
        entries = [entry.partition(b"\t") for entry in listing.stdout.split(b"\0") if entry.startswith(b"160000 ")]
        return [name.decode(errors="surrogateescape") for _, _, name in entries]

    # -- what we changed ourselves after the mark, which is no lessee's work ------------------------------------

    async def _note_settled(
        self, slot: Slot, seal: Seal, commit: str, before: Sequence[Submodule], *, all_files: bool
    ) -> None:
        """Remember which entries a check-out before a lease touched: their change times are later than the mark."""
        listing = await self._run(slot, "diff-tree", "-r", "-z", "--name-only", "--no-renames", seal.commit, commit)
        names = set(_names(listing.stdout)) | (await self._settled(slot)).names
        names |= await self._submodules.settled_names(before, await self._submodules.plan(commit))
        if all_files:
            names.update(_names((await self._run(slot, "ls-tree", "-r", "-z", "--name-only", commit)).stdout))
        for name in list(names):
            while name := name.rpartition("/")[0]:
                names.add(name)
        data = b"".join(name.encode(errors="surrogateescape") + b"\0" for name in sorted(names))
        await self._host.apply([WriteFile(_Paths(slot.path).settled, data)])

    async def _settled(self, slot: Slot) -> Settled:
        seal = slot.seal
        if seal is None or seal.settled_ns == seal.mark_ns:
            return Settled(seal.mark_ns if seal else 0, frozenset())
        data = await self._host.read_bytes(_Paths(slot.path).settled, limit=_NAMES_LIMIT)
        return Settled(seal.settled_ns, frozenset(_names(data or b"")))

    # -- the git directories -------------------------------------------------------------------------------------

    async def _snapshot_with(self, slot: Slot, checkout: Checkout) -> RefsSnapshot:
        """Return the refs that the slot can show, having brought it what they lead to where it borrows nothing."""
        if self._own is None:
            return await self._mirror.snapshot()
        return await self._own.bring_up_to_date(slot, checkout.commit, trash=_Paths(slot.path).trash)

    def _objects(self, slot: Slot) -> str:
        return self._mirror.objects if self._own is None else f"{self._own.path(slot)}/objects"

    async def _renew_pristine(self, slot: Slot) -> None:
        paths = _Paths(slot.path)
        snapshot = await self._mirror.snapshot()
        steps = pristine_steps(paths.git, alternates=self._objects(slot), object_format=snapshot.object_format)
        await self._host.apply([Discard(paths.pristine, paths.trash), *steps])

    async def _check_pristine(self, slot: Slot) -> None:
        """Refuse to go by a git directory of ours that somebody else wrote to since the seal."""
        seal = slot.seal
        if seal is None or await self._trusted_mark(seal) is None:
            return
        git = _Paths(slot.path).git
        try:
            inspection = await self._host.inspect_tree(git, since_ns=seal.settled_ns)
            root = await self._host.stat(git)
        except OSError as error:
            raise CleanupError(f"{slot.slot_id}: {git} cannot be read: {error}", slot_id=slot.slot_id) from error
        changed = [*inspection.changed, *inspection.special, *inspection.changed_directories]
        if changed or root is None or root.ctime_ns >= seal.settled_ns:
            changed.append(".")
            raise CleanupError(
                f"{slot.slot_id}: {git}/{changed[0]} was changed since the slot was sealed", slot_id=slot.slot_id
            )

    async def _require(self, slot: Slot, checkout: Checkout) -> None:
        """Say plainly that a commit is gone: neither the remote nor the old mirror had it."""
        if not await self._mirror.has(checkout.commit):
            raise GitRefMissingError(
                f"{slot.slot_id}: {checkout.commit} is in neither the old mirror nor the remote any more",
                operation="restore",
                slot_id=slot.slot_id,
            )

    async def _install(self, slot: Slot, checkout: Checkout, *, is_sealed: bool = False) -> None:
        """Put a fresh git directory into the tree, in one rename, after whatever was there is out of the way.

        Args:
            is_sealed: whether no lessee could have written to the one that is there.
        """
        paths = _Paths(slot.path)
        outgoing = f"{paths.pristine}/outgoing"
        plan = await self._submodules.plan(checkout.commit)
        for attempt in (1, 2):
            shows = self._git_directory(slot, checkout, await self._snapshot_with(slot, checkout), plan)
            moves, shows = await self._object_steps(slot, shows, is_sealed=is_sealed)
            modules = await self._submodules.lessee_steps(outgoing, plan, pristine=paths.pristine)
            try:
                await self._host.apply(
                    [
                        Discard(outgoing, paths.trash),
                        *lessee_steps(outgoing, shows, index=f"{paths.git}/index"),
                        *moves,
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
        outgoing = f"{_Paths(slot.path).pristine}/outgoing"
        added = attrs.evolve(shows, own_packs=tuple(name for name in packs if name not in present))
        steps: list[FileStep] = [
            Discard(f"{outgoing}/objects", _Paths(slot.path).trash),
            Rename(f"{slot.path}/.git/objects", f"{outgoing}/objects"),
            *own_pack_steps(outgoing, added),
        ]
        return steps, attrs.evolve(shows, own_packs=())

    async def _sealed_packs(self, slot: Slot) -> frozenset[str]:
        """Return the packs in a sealed tree that nobody has touched since the seal."""
        assert slot.seal is not None
        objects = f"{slot.path}/.git/objects"
        inspection = await self._host.inspect_tree(objects, since_ns=slot.seal.settled_ns)
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
            alternates=self._objects(slot),
            object_format=snapshot.object_format,
            at=now(),
            submodules=plan.entries.get("", ()) if plan.entries is not None else None,
        )

    async def _generation(self, commit: str) -> str:
        """Return which refs a slot shows that is made now, those of submodules included."""
        snapshot = await self._mirror.snapshot()
        return await self._submodules.generation(await self._submodules.plan(commit), snapshot.generation)

    def _is_made_as_wanted(self, seal: Seal | None) -> bool:
        return seal is not None and self._submodules.has_made(seal.refs_generation)

    async def _trusted_mark(self, seal: Seal | None) -> int | None:
        """Return the seal's mark, None where file times prove nothing.

        That is after another boot, where somebody set the clock, and where the mirror it was made of was damaged.
        """
        if seal is None or seal.boot_id != boot_id() or seal.mirror_build != (await self._mirror.snapshot()).build:
            return None
        moved = abs(wall_minus_boot_ns() - seal.clock_offset_ns)
        return seal.mark_ns if moved < _CLOCK_STEP_NS else None

    # -- sealing -------------------------------------------------------------------------------------------------

    async def _mark(self, slot: Slot) -> int:
        """Return a time on the file system's clock after which every change of the tree shows.

        That clock ticks every few milliseconds: a mark within the tick of our own last write could not tell that write
        from a lessee's first.
        """
        paths = _Paths(slot.path)
        first = await self._host.file_system_clock_ns(paths.pristine)
        while (mark := await self._host.file_system_clock_ns(paths.pristine)) <= first:  # noqa: ASYNC110 - a clock
            await anyio.sleep(_TICK_SECONDS)
        return mark

    async def _checked_seal(self, slot: Slot) -> Seal:
        root = await self._root(slot)
        if slot.seal is None or slot.seal.boot_id != boot_id() or not _is_same_tree(root, slot.seal):
            raise CleanupError(f"{slot.slot_id}: the tree is not the one that was sealed", slot_id=slot.slot_id)
        if slot.seal.mirror_build != (await self._mirror.snapshot()).build:
            raise CleanupError(f"{slot.slot_id}: was made of a mirror that was damaged since", slot_id=slot.slot_id)
        if await self._host.stat(f"{slot.path}/.git/HEAD") is None:
            raise CleanupError(f"{slot.slot_id}: the git directory is missing", slot_id=slot.slot_id)
        if not self._is_made_as_wanted(slot.seal):
            raise CleanupError(f"{slot.slot_id}: was made with another option `submodules`", slot_id=slot.slot_id)
        return slot.seal

    async def _root(self, slot: Slot) -> FileStat:
        root = await self._host.stat(slot.path)
        if root is None or root.kind is not FileKind.DIRECTORY:
            raise CleanupError(f"{slot.slot_id}: the tree {slot.path} is gone", slot_id=slot.slot_id)
        return root

    async def _sweep_beside(self, paths: _Paths) -> None:
        """Discard trees that a killed process was making beside this one."""
        prefix = paths.tree.rpartition("/")[2] + ".new-"
        names = [name for name in await self._host.list_directory(paths.directory) if name.startswith(prefix)]
        await self._host.apply([Discard(f"{paths.directory}/{name}", paths.trash) for name in names])

    async def _run(self, slot: Slot, *args: str, tree: str | None = None) -> GitResult:
        return await self._git.run(
            *args,
            git_dir=_Paths(slot.path).git,
            work_tree=tree,
            cwd=tree,
            slot_id=slot.slot_id,
            env={WORK_MARK: slot.path},
        )


def _place(slot: Slot, tree: str | None = None) -> Place:
    paths = _Paths(slot.path)
    return Place(slot.slot_id, tree or slot.path, paths.pristine, paths.trash)


def _names(data: bytes) -> list[str]:
    return [name.decode(errors="surrogateescape") for name in data.split(b"\0") if name]


def _is_same_tree(root: FileStat, seal: Seal | None) -> bool:
    return seal is not None and (root.device, root.inode) == (seal.tree_device, seal.tree_inode)


def _is_untouched(inspection: TreeInspection, gitfiles: Collection[str] = ()) -> bool:
    return not any(
        (
            inspection.changed,
            inspection.changed_directories,
            inspection.special,
            set(inspection.repositories) != set(gitfiles),
            inspection.unlocked,
            inspection.mounts,
            inspection.irregular,
        )
    )
