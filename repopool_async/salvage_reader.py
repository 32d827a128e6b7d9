"""Reads what a lessee left: its refs as text, its objects as suspects, its files as files.

The lessee's git directory is never given to git. Its refs are read here, as text; its loose objects are taken only
where they are what their names say, its packs are indexed anew, and both go into a repository of ours that is thrown
away afterwards. Whether history is complete is asked of git there, beside the mirror's objects. What becomes of all
that is the business of `salvage`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import attrs

from repopool_async._git import WORK_MARK, GitRunner, validate_branch_name
from repopool_async.exceptions import RefError, SalvageError
from repopool_async.git_directory import pristine_steps
from repopool_async.hosts.base import CopyFile, Discard, Host, MakeDirectory, RemoveFile, Wanted, WriteFile
from repopool_async.mirror import Mirror
from repopool_async.models import GitResult, Slot
from repopool_async.refs import FULL_ID
from repopool_async.workspaces.base import Remains

_MIB: Final = 1 << 20
_REF_BYTES: Final = 4096
_REFS: Final = (
    Wanted(r"HEAD|refs/stash|refs/heads/.{1,1000}", _REF_BYTES, is_read=True),
    Wanted("logs/refs/stash", 16 * _MIB, is_read=True),
    Wanted("packed-refs", 256 * _MIB, is_read=True),
)
_REFS_ENTERED: Final = r"refs(/heads(/.{1,1000})?)?|logs(/refs)?"
_REFS_BYTES: Final = 512 * _MIB
_REFS_FILES: Final = 10_000
_PACK: Final = r"objects/pack/[0-9A-Za-z-]{1,200}\.pack"
_OBJECTS_ENTERED: Final = r"objects(/(pack|[0-9a-f]{2}))?"
_OBJECTS_FILES: Final = 500_000
_OBJECTS_SLACK: Final = 4
"""What lies in a lessee's object directory may be so many times the limit: unreachable objects are not saved."""
_TIPS: Final = 500
EXCLUDE_PROMISED: Final = "--exclude-promisor-objects"
"""Makes git take what the remote promised for there, and fetch none of it."""
_RAW: Final = b"* -text -eol -ident -filter -working-tree-encoding\n"


@attrs.frozen
class Refs:
    """A lessee's refs, as far as they make sense.

    Attributes:
        head: the commit HEAD is at. branch: the branch it is on.
        branches: local branches, name to id. stashes: ids and messages, newest first.
    """

    head: str | None
    branch: str | None
    branches: Mapping[str, str]
    stashes: Sequence[tuple[str, str]]


@attrs.define
class LeftWork:
    """What there is to save, all of it in the objects of a repository of ours.

    Attributes:
        head: the first parent. tree: of the working tree's files. branch: what HEAD was on.
        branches: those with commits that the mirror lacks. stashes: newest first.
        parents: every tip that must be kept, `head` first.
        lost: what there was and could not be saved. odd: what was passed over and is no loss of itself.
    """

    head: str
    tree: str
    branch: str | None
    branches: dict[str, str]
    stashes: list[tuple[str, str]]
    parents: list[str]
    files_changed: int = 0
    untracked: int = 0
    commits: int = 0
    size_bytes: int = 0
    lost: list[str] = attrs.field(factory=list)
    odd: list[str] = attrs.field(factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing worth a record."""
        return not (self.files_changed or self.untracked or self.commits or self.stashes or self.lost)


@attrs.frozen
class _Tip:
    what: str
    commit: str


class SalvageReader:
    """Reads one lease's remains into `directory`, which is the reader's own until it is discarded.

    Args:
        nested: where the git directories of repositories inside the tree are moved; nothing else keeps them.
        git: the pool's. limit_bytes: how much may be saved.

    Attributes:
        repository: a git directory of ours that holds what was read.
    """

    def __init__(
        self,
        slot: Slot,
        remains: Remains,
        directory: str,
        nested: str,
        *,
        host: Host,
        git: GitRunner,
        mirror: Mirror,
        limit_bytes: int,
    ) -> None:
        self.repository: Final = f"{directory}/git"
        self._nested = nested
        self._directory = directory
        self._slot = slot
        self._remains = remains
        self._host = host
        self._git = git
        self._mirror = mirror
        self._limit_bytes = limit_bytes
        self._lost: list[str] = []
        self._odd: list[str] = []

    async def read(self) -> LeftWork | None:
        """Return what there is to save, None where there is nothing.

        Raises:
            GitOperationError, OSError, SalvageError: it could not be read; nothing of the slot was lost, though git
            directories inside the tree may lie in `nested` now.
        """
        refs = await self._read_refs()
        tips = _tips(refs)
        if self._remains.is_untouched and not self._lost and await self._are_known(tips):
            return None
        await self._make_repository()
        kinds = await self._kinds(tips, self._mirror.path)
        new = [tip for tip in tips if kinds[tip.commit] != "commit"]
        accepted, size = await self._accept(new) if new else ([], 0)
        work = await self._arrange(refs, {tip.commit for tip in tips if tip not in new}, accepted)
        work.size_bytes = size
        await self._read_files(work)
        work.lost, work.odd = self._lost, self._odd
        return None if work.is_empty else work

    # -- refs, as text -------------------------------------------------------------------------------------------

    async def _read_refs(self) -> Refs:
        found = await self._host.collect_files(
            self._slot.path, ".git", self._directory, _REFS,
            enter=_REFS_ENTERED, limit_bytes=_REFS_BYTES, limit_files=_REFS_FILES,
        )  # fmt: skip
        self._lost += [f".git/{line}" for line in found.skipped]
        return parse_refs(found.contents)

    async def _are_known(self, tips: Sequence[_Tip]) -> bool:
        """Return whether the mirror's own refs name every tip; cheaper than asking git."""
        wanted = {tip.commit for tip in tips} - {self._remains.base}
        if not wanted:
            return True
        snapshot = await self._mirror.snapshot()
        return wanted <= {*snapshot.branches.values(), *snapshot.tags.values()}

    # -- objects -------------------------------------------------------------------------------------------------

    async def _make_repository(self) -> None:
        snapshot = await self._mirror.snapshot()
        steps = pristine_steps(self.repository, alternates=self._mirror.objects, object_format=snapshot.object_format)
        shallow = CopyFile(f"{self._mirror.path}/shallow", f"{self.repository}/shallow", is_optional=True)
        index = CopyFile(self._remains.index, f"{self.repository}/index")
        trash = f"{self._directory}/old"
        await self._host.apply([Discard(self.repository, trash), *steps, shallow, index, MakeDirectory(self._nested)])

    async def _import_objects(self) -> None:
        snapshot = await self._mirror.snapshot()
        length = 62 if snapshot.object_format == "sha256" else 38
        limit = self._limit_bytes * _OBJECTS_SLACK
        wanted = (
            Wanted(f"objects/[0-9a-f]{{2}}/[0-9a-f]{{{length}}}", limit, named_by=snapshot.object_format),
            Wanted(_PACK, limit),
        )
        found = await self._host.collect_files(
            self._slot.path, ".git", self.repository, wanted,
            enter=_OBJECTS_ENTERED, limit_bytes=limit, limit_files=_OBJECTS_FILES,
        )  # fmt: skip
        self._odd += [f".git/{line}" for line in found.skipped]
        await self._index_packs([name for name in found.names if name.endswith(".pack")])

    async def _index_packs(self, packs: list[str]) -> None:
        """Index packs anew; those that need objects of others are tried again without that check.

        That their history is complete is asked later, of everything together.
        """
        for check in ("--strict", "--fsck-objects"):
            failed = []
            for pack in packs:
                done = await self._run("index-pack", check, f"{self.repository}/{pack}", is_checked=False)
                if not done.success:
                    failed.append(pack)
            packs = failed
        for pack in packs:
            self._odd.append(f".git/{pack}: is no intact pack")
            await self._host.apply([RemoveFile(f"{self.repository}/{pack}")])

    async def _kinds(self, tips: Iterable[_Tip], repository: str) -> dict[str, str]:
        """Return what the tips are in a repository: `commit`, another type, or `missing`."""
        ids = list(dict.fromkeys(tip.commit for tip in tips))
        if not ids:
            return {}
        asked = "".join(f"{one}\n" for one in ids).encode()
        listing = await self._git.run(
            "cat-file", "--batch-check=%(objecttype)", git_dir=repository, input=asked, slot_id=self._slot.slot_id
        )
        kinds = [line.split()[-1] if line.split() else "missing" for line in listing.text.splitlines()]
        return dict(zip(ids, kinds, strict=True))

    async def _accept(self, tips: list[_Tip]) -> tuple[list[_Tip], int]:
        """Return the tips whose history is complete and within the limit, in order, and the bytes they take."""
        await self._import_objects()
        kinds = await self._kinds(tips, self.repository)
        whole = [tip for tip in tips if kinds[tip.commit] == "commit"]
        self._lost += [f"{tip.what} {tip.commit[:12]}: is {kinds[tip.commit]}" for tip in tips if tip not in whole]
        if not whole:
            return [], 0
        size = await self._closure(whole)
        if size is not None and size <= self._limit_bytes:
            return whole, size
        accepted: list[_Tip] = []
        used = 0
        for tip in whole:
            size = await self._closure([tip], accepted)
            if size is None:
                self._lost.append(f"{tip.what} {tip.commit[:12]}: objects of its history are missing")
            elif used + size > self._limit_bytes:
                self._lost.append(f"{tip.what} {tip.commit[:12]}: {size} bytes are beyond the limit")
            else:
                accepted.append(tip)
                used += size
        return accepted, used

    async def _closure(self, tips: Sequence[_Tip], beyond: Sequence[_Tip] = ()) -> int | None:
        """Return the bytes of all objects that only these tips need, None where any is missing."""
        revisions = [*(tip.commit for tip in tips), *(f"^{tip.commit}" for tip in beyond)]
        done = await self._list("--objects", "--disk-usage", revisions=revisions, is_checked=False)
        return int(done.text or 0) if done.success else None

    async def _list(self, *options: str, revisions: Iterable[str], is_checked: bool = True) -> GitResult:
        """Run rev-list over revisions, leaving out all that the mirror's refs reach."""
        asked = "".join(f"{revision}\n" for revision in revisions).encode()
        promises = self._mirror.promises
        promised = (EXCLUDE_PROMISED,) if promises and "--objects" in options else ()
        return await self._git.run(
            *("rev-list", *options, *promised, "--stdin", "--not", "--alternate-refs"),
            git_dir=self.repository, input=asked, check=is_checked, config=promises, slot_id=self._slot.slot_id,
        )  # fmt: skip

    async def _arrange(self, refs: Refs, old: set[str], accepted: list[_Tip]) -> LeftWork:
        """Say what is the lessee's HEAD, and which tips are to be kept beside it."""
        kept = {tip.commit for tip in accepted}
        known = old | kept
        head = refs.head if refs.head in known else None
        branches = {name: commit for name, commit in refs.branches.items() if commit in kept}
        stashes = [(commit, message) for commit, message in refs.stashes if commit in known]
        own = [*([head] if head in kept else []), *branches.values()]
        count = int((await self._list("--count", revisions=own)).text) if own else 0
        first = head or self._remains.base
        return LeftWork(
            head=first,
            tree="",
            branch=refs.branch,
            branches=branches,
            stashes=stashes,
            parents=list(dict.fromkeys([first, *branches.values(), *(commit for commit, _ in stashes)])),
            commits=count,
        )

    # -- files ---------------------------------------------------------------------------------------------------

    async def _read_files(self, work: LeftWork) -> None:
        """Write a tree of the lessee's files: tracked ones, then others that are not ignored, as far as they fit."""
        await self._clear_the_way()
        if work.head != self._remains.base:
            await self._show_head(work.head)
        await self._forget_what_changed()
        await self._dissolve_submodules()
        await self._run_in_tree("update-index", "-q", "--ignore-submodules", "--refresh", ok_codes=(0, 1))
        listing = await self._run_in_tree("diff-files", "-z", "--name-status", "--ignore-submodules=all")
        words = _words(listing.stdout)
        changes = dict(zip(words[1::2], words[::2], strict=True))
        kept = [f"--exclude=/{_as_pattern(name)}/" for name in self._remains.kept]
        others = _words((await self._run_in_tree("ls-files", "-z", "--others", "--exclude-standard", *kept)).stdout)
        deleted = [name for name, status in changes.items() if status == "D"]
        changed = await self._fitting([name for name in changes if name not in set(deleted)], work)
        untracked = await self._fitting(others, work)
        refused = await self._add(deleted, [*changed, *untracked])
        work.files_changed = len(deleted) + len([name for name in changed if name not in refused])
        work.untracked = len([name for name in untracked if name not in refused])
        # What the mirror was never asked for is no loss.
        work.tree = (await self._run("write-tree", *(["--missing-ok"] if self._mirror.promises else []))).text

    async def _clear_the_way(self) -> None:
        """Take out of the tree what would hang git or make it look into another repository.

        Specials hold nothing; git directories are kept in `nested` until everything else is saved.
        """
        inspection = self._remains.inspection
        if inspection.mounts:
            raise SalvageError(
                f"{self._slot.slot_id}: a file system is mounted at {inspection.mounts[0]!r} in the tree",
                slot_id=self._slot.slot_id,
            )
        root = self._slot.path
        await self._host.remove_entries(root, inspection.special, trash=f"{self._directory}/old")
        await self._host.remove_entries(root, inspection.repositories, trash=self._nested)
        self._odd += [f"{name}: is a fifo, socket or device" for name in inspection.special]
        self._odd += [f"{name}: is a repository of its own; its files are saved, not its history"
                      for name in inspection.repositories]  # fmt: skip

    async def _show_head(self, head: str) -> None:
        """Make the index that of another commit, keeping what is known of the files that are equal in both."""
        done = await self._run_in_tree("read-tree", "-i", "-m", self._remains.base, head, is_checked=False)
        if not done.success:
            await self._run_in_tree("read-tree", "--reset", head)

    async def _forget_what_changed(self) -> None:
        """Make git read the files whose inodes changed; by size and times alone it could miss an edit."""
        if not self._remains.knows_changes or not self._remains.inspection.changed:
            return
        changed = {name.encode(errors="surrogateescape") for name in self._remains.inspection.changed}
        listing = await self._run("ls-files", "-s", "-z")
        entries = [entry for entry in listing.stdout.split(b"\0") if entry.partition(b"\t")[2] in changed]
        await self._update_index("--index-info", entries)

    async def _dissolve_submodules(self) -> None:
        """Forget the submodules in which something changed, so that their files are taken for files."""
        listing = await self._run("ls-files", "-s", "-z")
        links = [entry.partition(b"\t")[2] for entry in listing.stdout.split(b"\0") if entry.startswith(b"160000 ")]
        if not links:
            return
        changed = [name.encode(errors="surrogateescape") for name in self._remains.inspection.changed]
        dissolved = [link for link in links if any(name.startswith(link + b"/") for name in changed)]
        await self._update_index("--force-remove", dissolved)

    async def _fitting(self, names: list[str], work: LeftWork) -> list[str]:
        """Return the files that fit into what is left of the limit, the smaller ones first, and count them."""
        sizes = await self._host.measure_entries(self._slot.path, names)
        fitting = []
        for size, name in sorted((-1 if size is None else size, name) for name, size in zip(names, sizes, strict=True)):
            if size < 0:
                self._odd.append(f"{name}: is neither a file nor a link")
            elif work.size_bytes + size > self._limit_bytes:
                self._lost.append(f"{name}: {size} bytes are beyond the limit")
            else:
                work.size_bytes += size
                fitting.append(name)
        return fitting

    async def _add(self, deleted: list[str], present: list[str]) -> set[str]:
        """Bring the index to the files; return those that git refuses to know."""
        await self._update_index("--force-remove", [name.encode(errors="surrogateescape") for name in deleted])
        # Byte for byte: only to tell what changed may git look through line endings and the like.
        own = f"{self.repository}/info"
        await self._host.apply([MakeDirectory(own), WriteFile(f"{own}/attributes", _RAW)])
        names = [name.encode(errors="surrogateescape") for name in present]
        done = await self._update_index("--add", names, "--remove", "--replace")
        known = set(_words((await self._run("ls-files", "-z")).stdout)) if "Ignoring path" in done else None
        refused = {name for name in present if known is not None and name not in known}
        self._lost += [f"{name}: git does not take such a name" for name in sorted(refused)]
        return refused

    async def _update_index(self, mode: str, lines: Sequence[bytes], *options: str) -> str:
        if not lines:
            return ""
        asked = b"".join(line + b"\0" for line in lines)
        how = ["-z", mode] if mode == "--index-info" else [mode, *options, "-z", "--stdin"]
        return (await self._run_in_tree("update-index", *how, input=asked)).stderr

    # -- running git ---------------------------------------------------------------------------------------------

    async def _run(self, *args: str, input: bytes | None = None, is_checked: bool = True) -> GitResult:
        return await self._git.run(
            *args, git_dir=self.repository, input=input, check=is_checked, slot_id=self._slot.slot_id,
            env={WORK_MARK: self._slot.path},
        )  # fmt: skip

    async def _run_in_tree(
        self, *args: str, input: bytes | None = None, is_checked: bool = True, ok_codes: tuple[int, ...] = (0,)
    ) -> GitResult:
        tree = self._slot.path
        return await self._git.run(
            *args, git_dir=self.repository, work_tree=tree, cwd=tree, input=input, check=is_checked, ok_codes=ok_codes,
            config=self._remains.git_config, slot_id=self._slot.slot_id, env={WORK_MARK: tree},
        )  # fmt: skip


def parse_refs(contents: Mapping[str, bytes]) -> Refs:
    """Return what the texts of a lessee's refs say, by file name; what makes no sense is left out."""
    refs = _packed(contents.get("packed-refs", b""))
    for name, data in contents.items():
        if name.startswith("refs/"):
            refs[name] = _text(data)
    ids = {name: value for name, value in refs.items() if FULL_ID.fullmatch(value) and value.strip("0")}
    branches = {
        name.removeprefix("refs/heads/"): value for name, value in ids.items() if name.startswith("refs/heads/")
    }
    head = _text(contents.get("HEAD", b""))
    target = head.removeprefix("ref:").strip()
    branch = (
        target.removeprefix("refs/heads/") if head.startswith("ref:") and target.startswith("refs/heads/") else None
    )
    commit = branches.get(branch) if branch is not None else head
    return Refs(
        head=commit if commit is not None and FULL_ID.fullmatch(commit) else None,
        branch=branch if branch is not None and _is_branch(branch) else None,
        branches=branches,
        stashes=_stashes(contents.get("logs/refs/stash", b""), ids.get("refs/stash")),
    )


def _packed(data: bytes) -> dict[str, str]:
    refs = {}
    for line in data.split(b"\n"):
        value, _, name = line.partition(b" ")
        if name.startswith(b"refs/heads/") or name == b"refs/stash":
            refs[_text(name)] = _text(value)
    return refs


def _stashes(log: bytes, newest: str | None) -> list[tuple[str, str]]:
    stashes: dict[str, str] = {}
    for line in reversed(log.split(b"\n")):
        front, _, message = line.partition(b"\t")
        words = _text(front).split(" ")
        if len(words) > 1 and FULL_ID.fullmatch(words[1]) and words[1].strip("0"):
            stashes.setdefault(words[1], _text(message)[:500])
    if newest is not None and newest not in stashes:
        stashes = {newest: "", **stashes}
    return list(stashes.items())[:_TIPS]


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape").strip()


def _is_branch(name: str) -> bool:
    try:
        validate_branch_name(name)
    except RefError:
        return False
    return True


def _tips(refs: Refs) -> list[_Tip]:
    """Return what must be kept, the most wanted first."""
    tips = [_Tip("HEAD", refs.head)] if refs.head else []
    tips += [_Tip(f"branch {name}", commit) for name, commit in sorted(refs.branches.items())][:_TIPS]
    tips += [_Tip(f"stash@{{{number}}}", commit) for number, (commit, _) in enumerate(refs.stashes)]
    unique = {tip.commit: tip for tip in reversed(tips)}
    return [tip for tip in tips if unique[tip.commit] is tip]


def _words(data: bytes) -> list[str]:
    return [word.decode(errors="surrogateescape") for word in data.split(b"\0") if word]


def _as_pattern(name: str) -> str:
    """Return the pattern of git that matches this name alone."""
    return re.sub(r"([\\*?\[\]!# ])", r"\\\1", name)
