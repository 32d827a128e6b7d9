"""What a mirror remembers of its last fetch: the refs as a file for slots to copy, and the state that tells of it.

Both are replaced as a whole, so readers, of other processes too, run no git and take no lock. When a snapshot is taken,
and what is done where none can be read, is the mirror's business.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from typing import Final

import attrs

from repopool_async._identity import boot_id
from repopool_async.hosts.base import FileStat, Host, MakeDirectory, RemoveFile, WriteFile
from repopool_async.mirror_git import MirrorGit
from repopool_async.refs import REMOTE_HEAD, Advertised, RefsSnapshot, packed_refs, parse_packed_refs

_SNAPSHOT_LIMIT: Final = 512 * 1024 * 1024
_SNAPSHOTS_KEPT: Final = 8


@attrs.frozen
class MirrorState:
    """What `repopool/state.json` in the mirror holds; replaced as a whole after each fetch.

    Attributes:
        build: names this mirror; one that was made anew, or whose state was, has another.
        advertised: fingerprints of what the remotes had, by name.
    """

    generation: str
    default_branch: str | None
    head: str | None
    object_format: str
    boot_id: str
    spawned_boottime: float
    build: str = ""
    advertised: Mapping[str, str] = attrs.field(factory=dict)


class MirrorSnapshots:
    """The snapshots of one mirror."""

    def __init__(self, host: Host, git: MirrorGit) -> None:
        self._host = host
        self._git = git
        self._path = git.path
        self._read: FileStat | None = None

    async def stat(self) -> FileStat | None:
        """Return what the state's file is; None where there is no mirror, or a damaged one."""
        return await self._host.stat(self.state_path)

    @property
    def state_path(self) -> str:
        """Where the state lies; it is replaced whenever anything changes."""
        return f"{self._path}/repopool/state.json"

    async def state(self) -> MirrorState | None:
        """Return what the last fetch left; None where that cannot be read."""
        try:
            data = await self._host.read_bytes(f"{self._path}/repopool/state.json", limit=65536)
        except OSError:
            return None
        if data is None:
            return None
        try:
            return MirrorState(**json.loads(data))
        except (ValueError, TypeError):
            return None

    async def read(self, state: MirrorState, *, known: RefsSnapshot | None = None) -> RefsSnapshot | None:
        """Return the refs that a state tells of; None where they are not what was written.

        Args:
            known: what was read last, which is returned where it is still that.
        """
        path = f"{self._path}/repopool/refs-{state.generation}"
        stat = await self._host.stat(path)
        if known is not None and stat == self._read and _is_of(known, state):
            return known
        self._read = stat
        data = await self._host.read_bytes(path, limit=_SNAPSHOT_LIMIT)
        if data is None or _generation(data) != state.generation:
            return None
        branches, tags = parse_packed_refs(data.decode(errors="surrogateescape"))
        return RefsSnapshot(
            generation=state.generation,
            packed_refs=path,
            branches=branches,
            tags=tags,
            default_branch=state.default_branch,
            head=state.head,
            object_format=state.object_format,
            build=state.build,
            boot_id=state.boot_id,
            spawned_boottime=state.spawned_boottime,
        )

    async def take(self, directory: str, *, spawned: float, known: MirrorState | None = None) -> None:
        """Write down the refs of a mirror as they are now.

        Args:
            directory: the mirror, or what is to become it. spawned: boot time at which the fetch began.
            known: the state before; None where nothing is known, and all is asked of git anew.
        """
        listing = (await self._git.run(
            "for-each-ref", "--format=%(objectname) %(*objecttype) %(*objectname) %(refname)",
            "refs/heads", "refs/tags", "refs/remotes", REMOTE_HEAD, git_dir=directory,
        )).stdout.decode(errors="surrogateescape")  # fmt: skip
        packed, refs = packed_refs(await self._peel_nested_tags(listing, directory))
        generation = _generation(packed.encode(errors="surrogateescape"))
        default_branch, head = await self._find_head(directory, refs, known)
        object_format = known.object_format if known else await self._object_format(directory)
        build = known.build if known else secrets.token_hex(8)
        advertised = self._advertised(refs, head, default_branch)
        state = MirrorState(generation, default_branch, head, object_format, boot_id(), spawned, build, advertised)
        own = f"{directory}/repopool"
        steps: list[MakeDirectory | WriteFile] = [MakeDirectory(own)]
        if known is None or known.generation != generation:
            steps.append(WriteFile(f"{own}/refs-{generation}", packed.encode(errors="surrogateescape"), 0o666))
        steps.append(self._written(state, own))
        await self._host.apply(steps)
        if known is not None and known.generation != generation:
            await self._git.run("pack-refs", "--all", git_dir=directory)
            await self._drop_old_snapshots(own, keep=generation)

    async def confirm(self, state: MirrorState, *, spawned: float) -> None:
        """Write down that the remotes have nothing new; `spawned` as for `take`."""
        state = attrs.evolve(state, boot_id=boot_id(), spawned_boottime=spawned)
        await self._host.apply([self._written(state, f"{self._path}/repopool")])

    def _written(self, state: MirrorState, own: str) -> WriteFile:
        return WriteFile(f"{own}/state.json", json.dumps(attrs.asdict(state)).encode())

    def _advertised(self, refs: Mapping[str, str], head: str | None, default_branch: str | None) -> dict[str, str]:
        """Return the fingerprints that the remotes would have if they had just what is here."""
        found = {"origin": Advertised(refs, head, default_branch).fingerprint(branches_only=False)}
        for name in self._git.remotes:
            prefix = f"refs/remotes/{name}/"
            heads = {ref.removeprefix(prefix): commit for ref, commit in refs.items() if ref.startswith(prefix)}
            has = Advertised({f"refs/heads/{ref}": heads[ref] for ref in heads}, None, None)
            found[name] = has.fingerprint(branches_only=True)
        return found

    async def _peel_nested_tags(self, listing: str, directory: str) -> str:
        """Replace what a tag of a tag points to by what it means in the end; git before 2.45 peels once."""
        lines = listing.splitlines()
        for number, line in enumerate(lines):
            name, kind, _, ref = line.split(" ", 3)
            if kind == "tag":
                peeled = (await self._git.run("rev-parse", "--verify", f"{name}^{{}}", git_dir=directory)).text
                lines[number] = f"{name} object {peeled} {ref}"
        return "\n".join(lines)

    async def _find_head(
        self, directory: str, refs: Mapping[str, str], known: MirrorState | None
    ) -> tuple[str | None, str | None]:
        """Return the remote's default branch and the commit of its HEAD, asking the remote only where in doubt."""
        if known is None:
            branch = (await self._git.run("symbolic-ref", "-q", "--short", "HEAD", git_dir=directory, ok=(0, 1))).text
            head = await self._git.peel("HEAD", directory)
            return (branch if f"refs/heads/{branch}" in refs else None), head
        head = refs.get(REMOTE_HEAD, known.head)
        if known.default_branch and refs.get(f"refs/heads/{known.default_branch}") == head:
            return known.default_branch, head
        advertised = await self._git.runner.run(
            "ls-remote", "--symref", "--end-of-options", self._git.source.url or "origin", "HEAD",
            git_dir=directory, retry=True, repo_name=self._git.repo_name, env=self._git.source.environment,
        )  # fmt: skip
        match = re.search(r"^ref: refs/heads/(\S+)\tHEAD$", advertised.text, re.MULTILINE)
        branch_name = match[1] if match and f"refs/heads/{match[1]}" in refs else None
        if branch_name and branch_name != known.default_branch:
            await self._git.run("symbolic-ref", "HEAD", f"refs/heads/{branch_name}", git_dir=directory)
        return branch_name, head

    async def _object_format(self, directory: str) -> str:
        return (await self._git.run("rev-parse", "--show-object-format", git_dir=directory)).text or "sha1"

    async def _drop_old_snapshots(self, own: str, *, keep: str) -> None:
        """Remove all but the newest few: another process may be copying the one before."""
        names = [name for name in await self._host.list_directory(own) if name.startswith("refs-")]
        stats = {name: await self._host.stat(f"{own}/{name}") for name in names if name != f"refs-{keep}"}
        aged = sorted((stat.mtime_ns, name) for name, stat in stats.items() if stat)
        await self._host.apply([RemoveFile(f"{own}/{name}") for _, name in aged[: -_SNAPSHOTS_KEPT or None]])

    async def problems(self) -> list[str]:
        """Return what is wrong with the files, a line each."""
        state = await self.state()
        if state is None:
            return ["repopool/state.json is missing or unreadable"]
        name = f"refs-{state.generation}"
        try:
            data = await self._host.read_bytes(f"{self._path}/repopool/{name}", limit=_SNAPSHOT_LIMIT)
        except OSError as error:
            return [f"repopool/{name}: {error.strerror}"]
        is_right = data is not None and _generation(data) == state.generation
        return [] if is_right else [f"repopool/{name} is not what was written"]


def _is_of(snapshot: RefsSnapshot, state: MirrorState) -> bool:
    seen = (snapshot.generation, snapshot.build, snapshot.default_branch, snapshot.head, snapshot.object_format)
    return seen == (state.generation, state.build, state.default_branch, state.head, state.object_format)


def _generation(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()[:20]
