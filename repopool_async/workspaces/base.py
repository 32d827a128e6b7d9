"""How a tree comes to be and becomes clean again: one small protocol, so that strategies can be exchanged.

The cleaner, the pool and the allocator know trees only through it: nothing of alternates, indexes or mounts shows here.
A strategy never executes anything that lies in a tree, and never touches a path outside the slot's directory but the
pool's trash.
"""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from enum import IntEnum
from typing import Any, Protocol

import attrs

from repopool_async.hosts.base import TreeInspection
from repopool_async.models import Seal, Slot


class Rung(IntEnum):
    """The repair ladder; each rung trusts less of what is there than the one below."""

    CLEAN = 1
    """Bring the tree back in place."""
    REBUILD_GIT = 2
    """Forget the pool's own git directory and index of the slot, and rewrite every file."""
    RECREATE_TREE = 3
    """Make a new tree beside the old one (new inodes) and put it in its place."""
    RECLONE = 4
    """Forget the slot's own objects too and take them from the mirror again; passed over where it has none."""
    REBUILD_MIRROR = 5
    """Clone the mirror anew, then as before."""


@attrs.frozen
class Checkout:
    """What a tree shall show.

    Attributes:
        commit: the full id. branch: the local branch, None for a detached HEAD.
        is_tracking: whether the branch follows `origin/<branch>`.
    """

    commit: str
    branch: str | None = None
    is_tracking: bool = True


@attrs.frozen
class Mark:
    """A moment on the file system's own clock.

    Attributes:
        ns: of that clock. clock_offset_ns: wall clock minus boot clock then; see `Seal`.
    """

    ns: int
    clock_offset_ns: int


@attrs.frozen
class Work:
    """What a strategy did.

    Attributes:
        steps: in order, for the clean-up log. removed: untracked entries that went. restored: tracked files rewritten.
        warm: whether the tree stood there already.
        since: from when on changes count, what was done itself being noted elsewhere; None: from the seal on.
        seal: the record that the tree is clean, where it was made at once.
    """

    steps: tuple[str, ...] = ()
    removed: int = 0
    restored: int = 0
    warm: bool = False
    since: Mark | None = None
    seal: Seal | None = None


@attrs.frozen
class Remains:
    """What a strategy knows of a tree that a lessee had, for whoever saves the lessee's work from it.

    Attributes:
        base: the commit the tree showed when the lease began.
        index: path of the pool's own index of that tree, to be copied with its modification time.
        inspection: what one look at the tree found.
        knows_changes: whether `inspection.changed` names what changed since the lease began, and not just everything.
        is_untouched: whether nothing did.
        git_config: with what git must be run to read the tree with that index.
        kept: directories whose contents are kept anyway.
    """

    base: str
    index: str
    inspection: TreeInspection
    knows_changes: bool
    is_untouched: bool
    git_config: Mapping[str, str]
    kept: tuple[str, ...] = ()


@attrs.frozen
class Look:
    """What a strategy saw of a slot before anything of it was changed; each has its own."""


class WorkspaceStrategy(Protocol):
    """Makes trees and makes them clean again.

    Every method is given the slot as recorded. A cancelled or failed call leaves a tree that only `restore` may touch.
    """

    @property
    def owns_objects(self) -> bool:
        """Whether slots have objects of their own, so that `Rung.RECLONE` means something."""

    async def default_checkout(self) -> Checkout:
        """Return what a slot can show whose commit exists no more."""

    async def provision(self, slot: Slot, checkout: Checkout) -> Work:
        """Make the slot's tree from nothing, replacing whatever is there.

        Raises:
            GitOperationError, OSError: it could not be made.
        """

    async def prepare(self, slot: Slot, checkout: Checkout) -> Work:
        """Bring a sealed tree to another commit, branch or set of refs, before a lease.

        Raises:
            CleanupError: the tree is not the one that was sealed; `restore` it.
            GitOperationError, OSError: it could not be done.
        """

    async def looking(
        self, slot: Slot, *, rung: Rung, trust_untouched: bool
    ) -> Callable[[], Coroutine[Any, Any, Look]] | None:
        """Return a piece of work that looks at a sealed slot, so that `restore` need not; None where that is no use.

        The piece asks the host once. It raises `CleanupError` or `OSError` where `restore` would at the first rung.

        Args:
            rung, trust_untouched: as `restore` will be told.
        """

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
        """Bring a tree that a lessee had to `checkout`, removing everything that is not part of it.

        No process of the lease runs any more. Nothing of the lessee's is executed or believed.

        Args:
            rung: how little to trust. trust_untouched: whether a tree in which no inode changed since the seal may be
                taken as it is.
            keeps_paths: whether kept directories stay; they must not where somebody may still stand in one of them.
            look: what was seen since the lease ended, where that is known. seals: whether to `seal` at once as well.

        Raises:
            CleanupError: the tree is not clean afterwards; try the next rung.
            GitRefMissingError: at the last rung: the commit is nowhere any more; try `default_checkout`.
            GitOperationError, OSError: try the next rung.
        """

    async def seal(
        self, slot: Slot, checkout: Checkout, *, keeps_mark: bool = False, since: Mark | None = None
    ) -> Seal:
        """Return the record that the tree is clean now.

        Args:
            keeps_mark: keep counting changes from the previous seal on (after `prepare`, which did not look at the
                whole tree). since: count changes from then on, see `Work.since`.
        """

    async def verify(self, slot: Slot) -> Sequence[str]:
        """Return what is wrong with a sealed slot, a line each; nothing where all is well. Reads every inode."""

    async def free_space(self, slot: Slot) -> None:
        """Delete at once what was thrown away, as far as that is possible; elsewhere it waits for an idle moment."""

    async def remains(self, slot: Slot) -> Remains | None:
        """Look at what a lessee left in a tree that nobody cleaned yet; None where there is no tree.

        Raises:
            CleanupError: nothing is known of the tree. OSError: it cannot be looked at.
        """

    async def discard(self, slot: Slot) -> None:
        """Forget what the strategy keeps for the slot outside the slot's own directory."""
