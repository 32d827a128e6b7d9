"""A slot's own objects: a bare repository beside the tree, for pools whose slots share nothing.

It is filled from the mirror by git itself, as copies (never links), once whole and from then on with what is new. Only
the pool writes to it; a lessee gets copies of its packs. Where it is used, and when it is thrown away, is the workspace
strategy's business.
"""

import secrets
from typing import Final

import attrs

from repopool_async._git import GitRunner
from repopool_async.exceptions import CleanupError, GitOperationError
from repopool_async.hosts.base import Discard, Host, Rename, WriteFile
from repopool_async.mirror import Mirror
from repopool_async.mirror_repair import find_damage
from repopool_async.models import Slot
from repopool_async.refs import RefsSnapshot

_REFSPECS: Final = tuple(
    f"+refs/{part}/*:refs/{part}/*" for part in ("heads", "tags", "remotes", "repopool/fetch", "repopool/old")
)
_TRIES: Final = 4
_MANY_PACKS: Final = 30
_PACK_FILES: Final = (".pack", ".idx", ".rev")
_LOCAL: Final = {"GIT_ALLOW_PROTOCOL": "file"}


@attrs.frozen
class OwnObjects:
    """The object stores of a pool's slots."""

    host: Host
    git: GitRunner
    mirror: Mirror

    def path(self, slot: Slot) -> str:
        """Return where a slot's store lies."""
        return f"{slot.path.rpartition('/')[0]}/store.git"

    async def bring_up_to_date(self, slot: Slot, commit: str, *, trash: str) -> RefsSnapshot:
        """Fetch into a slot's store what it lacks, and return the refs that are complete in it, with `commit`.

        Raises:
            GitOperationError, OSError: mirror or store are damaged. CleanupError: the mirror never stood still.
        """
        store = self.path(slot)
        for _ in range(_TRIES):
            snapshot = await self.mirror.snapshot()
            build, generation = await self._stamp(store)
            if build != snapshot.build:
                # What came from a mirror that was damaged is not believed.
                await self._copy(slot, trash=trash)
            elif generation == snapshot.generation and await self._has(store, commit, snapshot):
                return snapshot
            else:
                await self._fetch(store, commit)
            if (await self.mirror.snapshot()).generation == snapshot.generation:
                stamp = f"{snapshot.build} {snapshot.generation}\n"
                await self.host.apply([WriteFile(f"{store}/repopool-stamp", stamp.encode())])
        raise CleanupError(f"{slot.slot_id}: {commit} cannot be brought into the slot", slot_id=slot.slot_id)

    async def pack_files(self, slot: Slot) -> list[str]:
        """Return the names of the files that hold a slot's objects, below `objects/pack` of its store."""
        names = await self.host.list_directory(f"{self.path(slot)}/objects/pack")
        return [name for name in names if name.startswith("pack-") and name.endswith(_PACK_FILES)]

    async def tidy(self, slot: Slot) -> None:
        """Join small packs once there are many."""
        if len(await self.pack_files(slot)) > _MANY_PACKS * len(_PACK_FILES):
            await self.git.run(
                "repack", "-d", "-q", "--geometric=2", "--no-write-bitmap-index", git_dir=self.path(slot)
            )

    async def find_damage(self, slot: Slot) -> list[str]:
        """Return what is wrong with a slot's objects, a line each (slow)."""
        return await find_damage(self.git, self.path(slot))

    # -- inside --------------------------------------------------------------------------------------------------

    async def _stamp(self, store: str) -> tuple[str | None, str | None]:
        data = await self.host.read_bytes(f"{store}/repopool-stamp", limit=4096)
        build, _, generation = (data or b"").decode(errors="replace").strip().partition(" ")
        return (build, generation) if data is not None else (None, None)

    async def _copy(self, slot: Slot, *, trash: str) -> None:
        store = self.path(slot)
        beside = f"{store}.new-{secrets.token_hex(4)}"
        try:
            await self.git.run(
                *("clone", "--bare", "--template=", "--no-hardlinks", "--quiet", "--end-of-options"),
                *(self.mirror.path, beside),
                env=_LOCAL,
                slot_id=slot.slot_id,
            )
            await self.git.run("repack", "-d", "-q", git_dir=beside)
            await self.host.apply([Discard(store, trash), Rename(beside, store)])
        except BaseException:
            await self.host.remove_tree(beside)
            raise

    async def _fetch(self, store: str, commit: str) -> None:
        await self._fetch_refs(store, *_REFSPECS)
        if not await self._is_there(store, commit):
            await self._fetch_refs(store, f"+{commit}:refs/repopool/fetch/{commit}")

    async def _fetch_refs(self, store: str, *refspecs: str) -> None:
        prune = ("--prune",) if refspecs == _REFSPECS else ()
        await self.git.run(
            *("fetch", *prune, "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--quiet"),
            *("--no-recurse-submodules", "--update-shallow", "--end-of-options", self.mirror.path, *refspecs),
            git_dir=store,
            env=_LOCAL,
        )

    async def _has(self, store: str, commit: str, snapshot: RefsSnapshot) -> bool:
        return commit in snapshot.branches.values() or await self._is_there(store, commit)

    async def _is_there(self, store: str, commit: str) -> bool:
        try:
            await self.git.run("cat-file", "-e", f"{commit}^{{commit}}", git_dir=store)
        except GitOperationError:
            return False
        return True
