"""Submodules of a slot: mirrors of their own, trusted git directories of their own, cleaned by the rules of the top.

What a slot has is remembered beside its tree (`pristine/submodules.json`); the pool's git works on `tree/<path>` with
`pristine/modules/<name>`, never with anything that lies in the tree. The lessee's `.git/modules` is written anew like
its `.git`. Which submodules there are is read in `submodule_plan`; when all this happens is the strategy's business.

A slot differs from `git clone --template= --recurse-submodules` in that its submodules have no template files either,
borrow their objects, have their whole history (also where `.gitmodules` recommends a shallow one), show the refs of
when their mirror was last fetched (that is when a commit was missing), and no credentials in their URLs. A gitlink that
`.gitmodules` does not name stays an empty directory, inside of submodules too.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Self

import attrs

from repopool_async._aio import together
from repopool_async._clock import now
from repopool_async._git import GitRunner
from repopool_async._git_arguments import DEFAULT_PROTOCOLS
from repopool_async._newest import Newest
from repopool_async.exceptions import CleanupError, SubmoduleError
from repopool_async.git_directory import GitDirectory, lessee_steps, pristine_steps
from repopool_async.hosts.base import (
    Discard,
    FileKind,
    FileStep,
    Host,
    MakeDirectory,
    RemoveFile,
    Settled,
    WriteFile,
)
from repopool_async.mirror import Mirror
from repopool_async.models import GitResult, Slot
from repopool_async.workspaces.lfs import Lfs
from repopool_async.workspaces.nul_lists import split_names
from repopool_async.workspaces.slot_paths import SlotPaths
from repopool_async.workspaces.submodule_plan import Plan, PlanReader, Submodule

_PLANS_KEPT: Final = 64
_MANIFEST_LIMIT: Final = 16 * 1024 * 1024
_MARK: Final = "+"
"""Stands in the generation of refs that a slot of a pool with submodules shows, and in no other."""


@attrs.frozen
class Place:
    """Where one slot's things lie: its tree (perhaps one still being made), what is kept beside it, the trash."""

    slot_id: str
    tree: str
    pristine: str
    trash: str

    @classmethod
    def of(cls, slot: Slot, tree: str | None = None) -> Self:
        """Return a slot's; `tree` where another than its own is meant."""
        paths = SlotPaths(slot.path)
        return cls(slot.slot_id, tree or slot.path, paths.pristine, paths.trash)

    def git(self, submodule: Submodule) -> str:
        """Return the trusted git directory of a submodule."""
        return f"{self.pristine}/{submodule.git_path}"

    @property
    def manifest(self) -> str:
        """What says which submodules lie, or may lie, in the tree."""
        return f"{self.pristine}/submodules.json"


class Submodules:
    """The submodules of a pool's slots; where they are not wanted every method finds none and does nothing.

    Args:
        mirror: of the pool; it gives the submodules' mirrors. allow_protocols: by which these may be reached.
        is_wanted: whether submodules are checked out, asked anew at each use.
        lfs: how their LFS files are had, read and written.
    """

    def __init__(
        self,
        *,
        host: Host,
        git: GitRunner,
        mirror: Mirror,
        allow_protocols: Sequence[str] = DEFAULT_PROTOCOLS,
        is_wanted: Callable[[], bool] = lambda: False,
        lfs: Lfs | None = None,
    ) -> None:
        self._host = host
        self._git = git
        self._mirror = mirror
        self._allow_protocols = tuple(allow_protocols)
        self._asks_whether_wanted = is_wanted
        self._lfs = lfs or Lfs(host=host, git=git)
        self._plans: Newest[str, Plan] = Newest(_PLANS_KEPT)
        self._mirrors: dict[str, Mirror] = {}

    @property
    def is_wanted(self) -> bool:
        """Whether submodules are checked out."""
        return self._asks_whether_wanted()

    # -- planning ------------------------------------------------------------------------------------------------

    async def plan(self, commit: str) -> Plan:
        """Say which submodules a commit has, and have all their commits here; touches no slot.

        Raises as `PlanReader.plan` does.
        """
        if not self.is_wanted:
            return Plan()
        if commit not in self._plans:
            reading = PlanReader(self._mirror, self._git, self._allow_protocols)
            self._plans[commit] = await reading.plan(commit)
            self._mirrors |= reading.mirrors
        plan = self._plans[commit]
        for submodule in plan.submodules:
            await self._lfs.obtain(self._mirrors[submodule.url], submodule.commit)
        return plan

    async def generation(self, plan: Plan, generation: str) -> str:
        """Return which refs a slot shows: the pool's mirror's and those of every submodule's."""
        if plan.entries is None:
            return generation
        digest = hashlib.sha256()
        for submodule in plan.submodules:
            snapshot = await self._mirrors[submodule.url].snapshot()
            digest.update(f"{submodule.git_path}\0{snapshot.generation}\0".encode(errors="surrogateescape"))
        return f"{generation}{_MARK}{digest.hexdigest()[:20]}"

    def has_made(self, generation: str) -> bool:
        """Return whether a slot that shows these refs was made the way it is wanted now, with submodules or without."""
        return (_MARK in generation) == self.is_wanted

    async def rebuild(self) -> None:
        """Clone damaged mirrors anew."""
        self._plans.clear()
        await self._mirror.mend_submodules()

    # -- what lies in a slot -------------------------------------------------------------------------------------

    async def standing(self, place: Place) -> tuple[Submodule, ...]:
        """Return the submodules that lie in a tree, or may lie there after an interruption; the outer first."""
        if not self.is_wanted:
            return ()
        data = await self._host.read_bytes(place.manifest, limit=_MANIFEST_LIMIT)
        try:
            known = json.loads(data) if data else []
            return tuple(Submodule(**{**item, "places": tuple(item["places"])}) for item in known)
        except (ValueError, TypeError, KeyError) as error:
            raise CleanupError(f"{place.slot_id}: {place.manifest} is unreadable", slot_id=place.slot_id) from error

    async def unchanged_gitfiles(self, place: Place, since_ns: int, settled: Settled) -> frozenset[str]:
        """Return the `.git` of submodules that nobody changed since a mark, if each has one; else none."""
        unchanged = set()
        for submodule in await self.standing(place):
            stat = await self._host.stat(f"{place.tree}/{submodule.gitfile}")
            is_settled = submodule.gitfile in settled.names
            limit = max(since_ns, settled.since_ns) if is_settled else since_ns
            if stat is None or stat.kind is not FileKind.FILE or stat.ctime_ns >= limit:
                return frozenset()
            unchanged.add(submodule.gitfile)
        return frozenset(unchanged)

    async def remove_untracked(self, place: Place) -> int:
        """Remove what a lessee left in submodules that no index knows, links in the place of submodules included."""
        removed = 0
        for submodule in await self.standing(place):
            if await self._is_real(place.tree, submodule.path):
                names = await self._untracked(place, submodule)
                removed += await self._host.remove_entries(place.tree, names, trash=place.trash)
            elif await self._is_real(place.tree, submodule.path.rpartition("/")[0]):
                removed += await self._host.remove_entries(place.tree, [submodule.path], trash=place.trash)
        return removed

    async def differences(self, place: Place) -> list[str]:
        """Return what differs between the trees of submodules and their pristine indexes, both ways."""
        found: list[str] = []

        async def look(submodule: Submodule) -> None:
            if not await self._is_real(place.tree, submodule.path):
                found.append(f"missing: {submodule.path}")
                return
            listing = await self._run(place, submodule, "diff-files", "-z", "--name-only", "--ignore-submodules=all")
            found.extend(f"modified: {submodule.path}/{name}" for name in split_names(listing.stdout))
            found.extend(f"untracked: {name}" for name in await self._untracked(place, submodule))
            if await self._host.read_bytes(f"{place.tree}/{submodule.gitfile}", limit=65536) != _gitfile(submodule):
                found.append(f"modified: {submodule.gitfile}")

        await together(*[functools.partial(look, submodule) for submodule in await self.standing(place)])
        return found

    async def problems(self, place: Place) -> list[str]:
        """Return what is wrong with submodules' git directories as a lessee gets them, and with their LFS objects."""
        problems = []
        for submodule in await self.standing(place):
            head = await self._host.read_bytes(f"{place.tree}/.git/{submodule.git_path}/HEAD", limit=4096)
            if head is None or head.decode(errors="replace").strip() != submodule.commit:
                problems.append(f"HEAD of {submodule.path} is not {submodule.commit!r}")
            mirror = self._mirror.of_submodule(submodule.url)
            problems += await self._lfs.problems(mirror, place.git(submodule))
        return problems

    # -- bringing a slot to a commit -----------------------------------------------------------------------------

    async def make_way(self, place: Place, plan: Plan) -> tuple[Submodule, ...]:
        """Take out the submodules that another commit does not have at that place; return those that stay.

        From here on the tree counts as one that may have the new commit's submodules.
        """
        standing = await self.standing(place)
        kept = _kept(standing, plan)
        gone = [submodule for submodule in standing if submodule not in kept]
        if plan.entries is None or not (gone or plan.submodules):
            return kept
        await self._host.remove_entries(place.tree, [submodule.path for submodule in gone], trash=place.trash)
        await self._host.apply(
            [
                *(Discard(place.git(submodule), place.trash) for submodule in reversed(gone)),
                WriteFile(place.manifest, json.dumps([attrs.asdict(item) for item in plan.submodules]).encode()),
            ]
        )
        await self._unkeep(place, gone)
        return kept

    async def check_out(self, place: Place, plan: Plan, *, unchanged: Collection[Submodule] = ()) -> None:
        """Bring the submodules' trees and pristine indexes to the plan, the outer first.

        Args:
            unchanged: those that stand there and are known to be as they shall be.
        """
        wanted = [submodule for submodule in plan.submodules if submodule not in unchanged]
        for depth in sorted({submodule.depth for submodule in wanted}):
            level = [submodule for submodule in wanted if submodule.depth == depth]
            await together(*[functools.partial(self._bring, place, submodule) for submodule in level])

    async def lessee_steps(self, path: str, plan: Plan, *, pristine: str) -> list[FileStep]:
        """Return the steps that write the submodules' git directories into a lessee's git directory at `path`."""
        steps: list[FileStep] = []
        for submodule in plan.submodules:
            shows = await self._git_directory(submodule, plan)
            index = f"{pristine}/{submodule.git_path}/index"
            steps += lessee_steps(f"{path}/{submodule.git_path}", shows, index=index)
            steps += await self._lfs.lessee_steps(self._mirrors[submodule.url], f"{path}/{submodule.git_path}")
        return steps

    async def settled_names(self, before: Sequence[Submodule], plan: Plan) -> set[str]:
        """Return the entries of the tree that change when submodules are brought from one state to another."""
        kept = _kept(before, plan)
        names = {submodule.path for submodule in before if submodule not in kept}
        old = {submodule.path: submodule for submodule in kept}
        for submodule in plan.submodules:
            known = old.get(submodule.path)
            if known is not None and known.commit == submodule.commit:
                continue
            if known is None:
                listing = await self._read(submodule, "ls-tree", "-r", "-t", "-z", "--name-only", submodule.commit)
            else:
                options = ("-r", "-z", "--name-only", "--no-renames")
                listing = await self._read(submodule, "diff-tree", *options, known.commit, submodule.commit)
            names |= {submodule.path, submodule.gitfile}
            names |= {f"{submodule.path}/{name}" for name in split_names(listing.stdout)}
        return names

    async def discard(self, place: Place) -> None:
        """Forget what mirrors keep for a slot that is about to be deleted."""
        await self._unkeep(place, await self.standing(place))

    async def _bring(self, place: Place, submodule: Submodule) -> None:
        await self._make_directory(place, submodule)
        mirror = self._mirrors[submodule.url]
        git = place.git(submodule)
        object_format = (await mirror.snapshot()).object_format
        await self._host.apply(
            [
                *pristine_steps(git, alternates=mirror.objects, object_format=object_format),
                RemoveFile(f"{git}/index.lock"),
                WriteFile(f"{git}/HEAD", f"{submodule.commit}\n".encode()),
                *self._lfs.steps(mirror, submodule.commit, git),
            ]
        )
        await self._run(place, submodule, "read-tree", "--reset", "-u", submodule.commit)
        await self._host.apply(
            [
                *(MakeDirectory(f"{place.tree}/{inner}") for inner in submodule.places),
                WriteFile(f"{place.tree}/{submodule.gitfile}", _gitfile(submodule)),
            ]
        )
        await mirror.keep(_keep_name(place, submodule), submodule.commit)

    async def _make_directory(self, place: Place, submodule: Submodule) -> None:
        """Have a real directory at a submodule's place, with nothing but real directories on the way."""
        if await self._is_real(place.tree, submodule.path.rpartition("/")[0]):
            await self._host.apply([MakeDirectory(f"{place.tree}/{submodule.path}")])
            if await self._is_real(place.tree, submodule.path):
                return
        raise SubmoduleError(
            f"{place.slot_id}: submodule {submodule.path!r}: its place is reached through something that is no "
            f"directory; rename what stands in its way",
            path=submodule.path,
            slot_id=place.slot_id,
        )

    async def _is_real(self, tree: str, path: str) -> bool:
        """Return whether a path in the tree is a directory, with no link on the way."""
        reached = tree
        for part in path.split("/") if path else ():
            reached = f"{reached}/{part}"
            stat = await self._host.stat(reached)
            if stat is None or stat.kind is not FileKind.DIRECTORY:
                return False
        return True

    async def _untracked(self, place: Place, submodule: Submodule) -> list[str]:
        listing = await self._run(place, submodule, "ls-files", "-z", "--others", "--directory")
        return [f"{submodule.path}/{name}".rstrip("/") for name in split_names(listing.stdout)]

    async def _git_directory(self, submodule: Submodule, plan: Plan) -> GitDirectory:
        mirror = self._mirrors[submodule.url]
        snapshot = await mirror.snapshot()
        cloned = snapshot.branches[snapshot.default_branch] if snapshot.default_branch else snapshot.head
        return GitDirectory(
            commit=submodule.commit,
            branch=None,
            is_tracking=False,
            default_branch=snapshot.default_branch,
            default_commit=cloned,
            url=submodule.url,
            remotes={},
            packed_refs=snapshot.packed_refs,
            alternates=mirror.objects,
            object_format=snapshot.object_format,
            at=now(),
            submodules=(plan.entries or {}).get(submodule.git_path, ()),
            worktree=f"{_upwards(f'.git/{submodule.git_path}')}{submodule.path}",
            cloned_commit=cloned or submodule.commit,
            sections=self._lfs.section,
            more_alternates=self._lfs.alternates(mirror),
        )

    async def _unkeep(self, place: Place, submodules: Iterable[Submodule]) -> None:
        for submodule in submodules:
            await self._mirror.of_submodule(submodule.url).unkeep(_keep_name(place, submodule))

    async def _run(self, place: Place, submodule: Submodule, *args: str) -> GitResult:
        tree = f"{place.tree}/{submodule.path}"
        git = place.git(submodule)
        return await self._git.run(
            *args, git_dir=git, work_tree=tree, cwd=tree, slot_id=place.slot_id,
            config=self._lfs.config(self._mirror.of_submodule(submodule.url), git),
        )  # fmt: skip

    async def _read(self, submodule: Submodule, *args: str) -> GitResult:
        return await self._git.run(*args, git_dir=self._mirrors[submodule.url].path)


def _kept(standing: Iterable[Submodule], plan: Plan) -> tuple[Submodule, ...]:
    """Return which submodules, as they stand, another commit has at the same place, and all around them too."""
    wanted = {submodule.path: submodule for submodule in plan.submodules}
    kept: list[Submodule] = []
    gone: list[str] = []
    for submodule in standing:
        other = wanted.get(submodule.path)
        is_inside = any(submodule.path.startswith(f"{path}/") for path in gone)
        if other is not None and submodule.is_same_place(other) and not is_inside:
            kept.append(submodule)
        else:
            gone.append(submodule.path)
    return tuple(kept)


def _gitfile(submodule: Submodule) -> bytes:
    return f"gitdir: {_upwards(submodule.path)}.git/{submodule.git_path}\n".encode(errors="surrogateescape")


def _upwards(path: str) -> str:
    return "../" * (path.count("/") + 1)


def _keep_name(place: Place, submodule: Submodule) -> str:
    digest = hashlib.sha256(submodule.git_path.encode(errors="surrogateescape")).hexdigest()
    return f"{place.slot_id}.{digest[:12]}"
