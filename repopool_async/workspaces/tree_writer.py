"""Bringing a tree and the pool's index of it to a commit: which files are written, how, and for whom.

The tree may be the slot's or one that is still being made beside it. What a lessee left in it, and whether it is clean
afterwards, is the cleaner's business.
"""

from collections.abc import Collection
from typing import Final, Self

import attrs

from repopool_async._aio import together
from repopool_async._newest import Newest
from repopool_async.hosts.base import FileStep, Host, MakeDirectory, RemoveFile, WriteFile
from repopool_async.hosts.joined import Joined
from repopool_async.mirror import Mirror
from repopool_async.models import Slot
from repopool_async.run_as import RunAs
from repopool_async.workspaces.base import Checkout
from repopool_async.workspaces.lfs import Lfs
from repopool_async.workspaces.nul_lists import join_names, split_names
from repopool_async.workspaces.pristine_git import PristineGit
from repopool_async.workspaces.slot_paths import ANY_MODE, SlotPaths
from repopool_async.workspaces.sparse import Sparse
from repopool_async.workspaces.submodule_plan import Plan, Submodule
from repopool_async.workspaces.submodules import Place, Submodules

_NOWHERE: Final = b"ref: refs/heads/none\n"
_GITLINK: Final = b"160000"
_COMMITS_REMEMBERED: Final = 256


@attrs.frozen
class Difference:
    """What two commits differ in.

    Attributes:
        names: of files and gitlinks. has_attributes: whether attributes are among them, by which other files are
            written. has_gitlinks: whether the place of another repository is.
    """

    names: frozenset[str]
    has_attributes: bool
    has_gitlinks: bool

    @classmethod
    def parsed(cls, listing: bytes) -> Self:
        """Read what `git diff-tree -r -z --raw` printed: `:<mode> <mode> <id> <id> <status>`, then the name."""
        words = listing.split(b"\0")
        modes = [word[1:].split(b" ", 2)[:2] for word in words[:-1:2]]
        names = frozenset(name.decode(errors="surrogateescape") for name in words[1::2])
        return cls(
            names=names,
            has_attributes=any(name.rpartition("/")[2] == ".gitattributes" for name in names),
            has_gitlinks=any(_GITLINK in pair for pair in modes),
        )


@attrs.frozen
class Ready:
    """What is known of a check-out before it begins.

    Attributes:
        rewrites: whether files are written otherwise than those that are there, so that all are written anew.
        gitlinks: where the commit has other repositories.
    """

    commit: str
    plan: Plan
    rewrites: bool
    gitlinks: tuple[str, ...]


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
        self._known_gitlinks: Newest[str, tuple[str, ...]] = Newest(_COMMITS_REMEMBERED)

    async def obtain(self, commit: str) -> None:
        """Have everything here, besides a commit's own objects, that its check-out needs; no tree is touched.

        Raises:
            SubmoduleError, UnknownRefError, LfsError: it is refused, or cannot be had.
            GitOperationError: likewise.
        """
        await self._mirror.obtain_contents(commit, self._sparse.includes)
        await self._lfs.obtain(self._mirror, commit)
        await self._submodules.plan(commit)

    async def get_ready(self, slot: Slot, checkout: Checkout, *, standing: str | None = None) -> "Ready":
        """Have and know all that checking a commit out takes; neither tree nor index are touched.

        Args:
            standing: the commit that the pristine git directory is known to stand on.
        """
        commit = checkout.commit
        await self._pristine.bring(slot, commit)
        await self.obtain(commit)
        return Ready(
            commit,
            plan=await self._submodules.plan(commit),
            rewrites=standing != commit and await self._has_other_attributes(slot, commit),
            gitlinks=await self._gitlinks(slot, commit),
        )

    async def write(self, slot: Slot, ready: "Ready", *, tree: str | None = None) -> None:
        """Check out what has been made ready; where there are no submodules that is a piece that asks once."""
        tree = tree or slot.path
        commit = ready.commit
        await self._submodules.make_way(Place.of(slot, tree), ready.plan)
        async with self._host.joined() as joined:
            joined(self._leave(slot, commit))
            joined(self._pristine.run(slot, "read-tree", "--reset", "-u", commit, tree=tree))
            if ready.rewrites:
                joined(self._rewrite(slot, commit, tree))
            joined(self._host.apply(_gitlink_steps(slot, ready.plan, ready.gitlinks, tree)))
            self._arrive(joined, slot, commit)
            joined(self._end(slot, ready.plan, tree))

    async def switch(self, slot: Slot, standing: str, checkout: Checkout) -> frozenset[str]:
        """Bring a tree that is as it was sealed, and its pristine index, from one commit to another.

        Only what the commits differ in is looked at, the rest not even by git.

        Args:
            standing: the commit that the tree shows.

        Returns:
            The names of the entries that changed, those in submodules not included.

        Raises:
            GitOperationError: an entry that was to change is not as it was sealed.
        """
        commit = checkout.commit
        await self._pristine.bring(slot, commit)
        await self.obtain(commit)
        plan = await self._submodules.plan(commit)
        kept = await self._submodules.make_way(Place.of(slot), plan)
        await self._leave(slot, commit, head=f"{standing}\n".encode())
        found: list[Difference] = []

        async def compare() -> None:
            found.append(await self._difference(slot, standing, commit))

        async def write() -> None:
            # Of all commands that do this the one that neither looks at every file nor forgets the trees in the index.
            await self._pristine.run(slot, "reset", "--quiet", "--keep", commit, tree=slot.path)

        await together(compare, write)
        names = found[0].names
        if found[0].has_attributes:
            await self._rewrite(slot, commit, slot.path)
            names |= frozenset(split_names((await self._pristine.run(slot, "ls-files", "-z")).stdout))
        gitlinks = await self._gitlinks(slot, commit) if found[0].has_gitlinks else None
        async with self._host.joined() as joined:
            if gitlinks is not None:
                joined(self._host.apply(_gitlink_steps(slot, plan, gitlinks, slot.path)))
            self._arrive(joined, slot, commit)
        await self._end(slot, plan, slot.path, unchanged=kept)
        return names

    async def write_files(self, slot: Slot, names: Collection[str]) -> None:
        """Write files of the commit that a tree shows, replacing what lies there."""
        if names:
            await self._pristine.run(
                slot, "checkout-index", "-z", "--stdin", "-f", "-u", tree=slot.path, input=join_names(sorted(names))
            )

    async def _leave(self, slot: Slot, commit: str, *, head: bytes = _NOWHERE) -> None:
        """Begin to leave a commit for another.

        Args:
            head: where the pristine git directory stands until git has moved it; nowhere, so that who comes next is
                not mistaken, unless all that differs from there shows by its change time.
        """
        git = SlotPaths(slot.path).git
        lfs = self._lfs.steps(self._mirror, commit, git)
        await self._host.apply([RemoveFile(f"{git}/index.lock"), WriteFile(f"{git}/HEAD", head), *lfs])

    async def _rewrite(self, slot: Slot, commit: str, tree: str) -> None:
        """Write every file anew, whatever git believes of it."""
        async with self._host.joined() as joined:
            joined(self._host.apply([RemoveFile(f"{SlotPaths(slot.path).git}/index")]))
            joined(self._pristine.run(slot, "read-tree", commit))
            joined(self._pristine.run(slot, "read-tree", "--reset", "-u", commit, tree=tree))

    def _arrive(self, joined: Joined, slot: Slot, commit: str) -> None:
        """Note that a tree shows a commit."""
        joined(self._host.apply([WriteFile(f"{SlotPaths(slot.path).git}/HEAD", f"{commit}\n".encode())]))
        joined(self._mirror.keep(slot.slot_id, commit))

    async def _end(self, slot: Slot, plan: Plan, tree: str, *, unchanged: Collection[Submodule] = ()) -> None:
        """Bring a tree's submodules and its owner to what they shall be."""
        await self._submodules.check_out(Place.of(slot, tree), plan, unchanged=unchanged)
        await self._give(slot, tree)

    async def _difference(self, slot: Slot, one: str, other: str) -> "Difference":
        listing = await self._pristine.run(slot, "diff-tree", "-r", "-z", "--raw", "--no-renames", one, other)
        return Difference.parsed(listing.stdout)

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

    async def _gitlinks(self, slot: Slot, commit: str) -> tuple[str, ...]:
        """Return where a commit has other repositories."""
        if commit not in self._known_gitlinks:
            listing = await self._pristine.run(slot, "ls-tree", "-r", "-d", "-z", commit)
            entries = [entry.partition(b"\t") for entry in listing.stdout.split(b"\0") if entry.startswith(_GITLINK)]
            names = [name.decode(errors="surrogateescape") for _, _, name in entries]
            self._known_gitlinks[commit] = tuple(name for name in names if self._sparse.includes(name))
        return self._known_gitlinks[commit]

    async def _give(self, slot: Slot, tree: str) -> None:
        """Give a tree to the user it is for; the index must know the new owner, or every file would look changed."""
        if self._run_as is not None:
            async with self._host.joined() as joined:
                joined(self._host.apply([self._run_as.give(tree)]))
                joined(self._pristine.run(slot, "update-index", "-q", "--refresh", tree=tree))


def _gitlink_steps(slot: Slot, plan: Plan, gitlinks: Collection[str], tree: str) -> list[FileStep]:
    """Return the steps that write down where a commit has other repositories, and make those directories."""
    return [
        *(MakeDirectory(f"{tree}/{name}", mode=ANY_MODE) for name in gitlinks),
        WriteFile(SlotPaths(slot.path).gitlinks, join_names([*gitlinks, *plan.places])),
    ]
