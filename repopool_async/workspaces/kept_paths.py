"""Kept paths: directories of a tree, named by the pool's owner, that stay between leases with whatever is in them.

While a tree is cleaned or made anew they lie beside it (`slots/<slot>/kept/<path>`), where nothing that cleans looks;
a tree that nobody touched keeps them where they are. What a commit has at such a path wins: then the kept directory
waits beside the tree for a commit that leaves it room. Their contents are nobody's business here; when they are moved
is the strategy's.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from repopool_async._git import GitRunner
from repopool_async._newest import Newest
from repopool_async.exceptions import GitOperationError
from repopool_async.hosts.base import Discard, FileKind, Host, RemoveFile
from repopool_async.mirror import Mirror
from repopool_async.models import Slot
from repopool_async.refs import FULL_ID
from repopool_async.workspaces.slot_paths import SlotPaths

_COMMITS_REMEMBERED: Final = 256


class KeptPaths:
    """The kept paths of a pool's slots.

    Args:
        mirror: has the commits that slots show. names: relative to the tree, none inside another.
    """

    def __init__(self, *, host: Host, git: GitRunner, mirror: Mirror, names: Sequence[str] = ()) -> None:
        self.names: Final = tuple(name.rstrip("/") for name in names)
        self._host = host
        self._git = git
        self._mirror = mirror
        self._taken: Newest[str, frozenset[str]] = Newest(_COMMITS_REMEMBERED)

    async def of_commit(self, commit: str | None) -> tuple[str, ...]:
        """Return the kept paths that a commit leaves room for: it has nothing there, and no file on the way.

        None stands for a commit that nobody knows, which leaves none.
        """
        if not self.names or commit is None:
            return ()
        taken = await self._taken_by(commit)
        return tuple(name for name in self.names if name not in taken)

    async def standing(self, slot: Slot) -> str | None:
        """Return the commit that a tree was brought to last, None amid a check-out."""
        if not self.names:
            return None
        data = await self._host.read_bytes(f"{SlotPaths(slot.path).git}/HEAD", limit=4096)
        head = (data or b"").decode(errors="replace").strip()
        return head if FULL_ID.fullmatch(head) else None

    async def take_out(self, slot: Slot, standing: str | None, *, unless_kept_by: str | None = None) -> tuple[str, ...]:
        """Move kept directories from the tree to their place beside it, and return which.

        What is there and does not move (a link, something mounted, one for which another waits beside the tree) is no
        cache but part of what is cleaned away.

        Args:
            standing: the commit that the tree shows. unless_kept_by: let those stay that this commit leaves room for.
        """
        staying = await self.of_commit(unless_kept_by)
        names = [name for name in await self.of_commit(standing) if name not in staying]
        return await self._host.move_directories(slot.path, SlotPaths(slot.path).kept, names)

    async def put_back(self, slot: Slot, commit: str) -> tuple[str, ...]:
        """Move what waits beside a clean tree into it, as far as its commit leaves room, and return what was moved."""
        return await self._host.move_directories(SlotPaths(slot.path).kept, slot.path, await self.of_commit(commit))

    async def drop(self, slot: Slot) -> None:
        """Throw away what waits beside the tree."""
        paths = SlotPaths(slot.path)
        await self._host.apply([Discard(paths.kept, paths.trash), RemoveFile(paths.kept_stamp)])

    async def drop_former(self, slot: Slot) -> None:
        """Throw away what waits beside the tree and is not kept any more, since the pool's options changed."""
        paths = SlotPaths(slot.path)
        former = [name for name in (slot.seal.kept if slot.seal else ()) if name not in self.names]
        await self._host.apply([Discard(f"{paths.kept}/{name}", paths.trash) for name in former])

    async def without(self, untracked: Iterable[str], slot: Slot, commit: str | None) -> list[str]:
        """Return what is untracked in a tree besides its kept directories and the directories made for them."""
        names = await self.of_commit(commit)
        found: list[str] = []
        for name in untracked:
            found += await self._besides(name, slot.path, names)
        return found

    async def _besides(self, name: str, tree: str, names: Collection[str]) -> list[str]:
        inner = [kept for kept in names if kept == name or kept.startswith(f"{name}/")]
        stat = await self._host.stat(f"{tree}/{name}") if inner else None
        if stat is None or stat.kind is not FileKind.DIRECTORY:
            return [name]
        if name in inner:
            return []
        found: list[str] = []
        entries = await self._host.list_directory(f"{tree}/{name}")
        for entry in entries:
            found += await self._besides(f"{name}/{entry}", tree, inner)
        return found if entries else [name]

    async def _taken_by(self, commit: str) -> frozenset[str]:
        if commit not in self._taken:
            try:
                self._taken[commit] = await self._ask(commit)
            except GitOperationError:
                return frozenset(self.names)  # it is nowhere any more: nothing can be said of its tree
        return self._taken[commit]

    async def _ask(self, commit: str) -> frozenset[str]:
        places = sorted({place for name in self.names for place in (name, *_above(name))})
        listing = await self._git.run(
            *("ls-tree", "-t", "-z", commit, "--", *places),
            git_dir=self._mirror.path,
            env={"GIT_LITERAL_PATHSPECS": "1"},
        )
        entries = [line.partition(b"\t") for line in listing.stdout.split(b"\0") if line]
        kinds = {name.decode(errors="surrogateescape"): head.split(b" ")[1] for head, _, name in entries}
        return frozenset(
            name
            for name in self.names
            if name in kinds or any(kinds.get(place, b"tree") != b"tree" for place in _above(name))
        )


def _above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]
