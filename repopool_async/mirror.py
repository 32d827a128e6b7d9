"""The pool's bare repository: the only place the network writes to, and whose objects every slot borrows.

It is built once, in a temporary directory renamed into place, and fetched by one git at a time: whoever asks before
that git is spawned shares it, whoever asks later joins the next one, across processes too. It resolves refs from a
snapshot it takes after each fetch, without running git. Nothing that a lease may reference is ever pruned: there is no
garbage collection here, only repacking. Slots, leases and cleaning are not its business.
"""

import asyncio
import difflib
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import attrs

from repopool_async._aio import TaskSet, together
from repopool_async._clock import boottime
from repopool_async._git import WORK_MARK, GitRunner, with_credentials
from repopool_async._git_arguments import Credentials, validate_ref
from repopool_async._identity import boot_id
from repopool_async.exceptions import (
    EmptyRepositoryError,
    GitMirrorDamagedError,
    GitOperationError,
    GitRefMissingError,
    GitSlotDamagedError,
    ManagerClosedError,
    UnknownRefError,
)
from repopool_async.hosts.base import Discard, FileStat, Host, MakeDirectory, RemoveFile, Rename, WriteFile
from repopool_async.lock_manager import LockManager
from repopool_async.mirror_repair import Carried, carry_over, find_damage
from repopool_async.models import GitResult, ResolvedRef
from repopool_async.refs import FULL_ID, REMOTE_HEAD, RefsSnapshot, look_up, packed_refs, parse_packed_refs

_log: Final = logging.getLogger("repopool")

_HEADS: Final = "+refs/heads/*:refs/heads/*"
_TAGS: Final = "+refs/tags/*:refs/tags/*"
MIRROR_LOCKS: Final = "mirror-"
"""How the names of mirrors' locks begin; who takes one after a dead holder puts right what that left."""

_COLLECT_SECONDS: Final = 0.025
_SNAPSHOT_LIMIT: Final = 512 * 1024 * 1024
_SNAPSHOTS_KEPT: Final = 8
_REBUILD_PAUSE_SECONDS: Final = 60.0
"""How soon a fetch that finds damage may clone anew again: what the remote itself is missing no clone mends."""
_LONG_AGO: Final = -1e15
_DAMAGE: Final = (GitMirrorDamagedError, GitSlotDamagedError)
_SHORT_ID: Final = re.compile(r"[0-9a-f]{4,63}")
_MIRROR_CONFIG: Final[Mapping[str, str]] = {
    "gc.auto": "0",
    "maintenance.auto": "false",
    "core.logAllRefUpdates": "false",
    "fetch.unpackLimit": "1",
    "core.packedRefsTimeout": "10000",
    "core.filesRefLockTimeout": "1000",
}


@attrs.frozen
class _State:
    """What `repopool/state.json` in the mirror holds; replaced as a whole after each fetch.

    Attributes:
        build: names this mirror; one that was made anew, or whose state was, has another.
    """

    generation: str
    default_branch: str | None
    head: str | None
    object_format: str
    boot_id: str
    spawned_boottime: float
    build: str = ""


@attrs.define(eq=False)
class _Flight:
    """One fetch that several requests share.

    Attributes:
        last_request: boot time of the newest request; another process's fetch serves us only if spawned after it.
        waiters: who still wants it; the last one leaving cancels it.
    """

    last_request: float
    is_joinable: bool = True
    waiters: int = 0
    task: asyncio.Task[None] | None = None


class Mirror:
    """A pool's bare repository.

    Args:
        path: where it lies, `<pool>/mirror.git`. url: of `origin`, without credentials.
        git: runs git with the pool's environment (and credentials, if any).
        remotes: further remotes, name to URL, each fetched into `refs/remotes/<name>/*`.
        repo_name: for messages and the name of the lock. lock_id: another name for the lock.
        trash: where a replaced mirror goes; `trash` beside it where missing.
    """

    def __init__(
        self,
        path: str,
        url: str,
        *,
        host: Host,
        git: GitRunner,
        locks: LockManager,
        repo_name: str,
        remotes: Mapping[str, str] | None = None,
        lock_id: str | None = None,
        trash: str | None = None,
    ) -> None:
        self.path = path
        self.url = url
        self.remotes: Mapping[str, str] = dict(remotes or {})
        self._host = host
        self._git = git
        self._locks = locks
        self._repo_name = repo_name
        self._tasks = TaskSet(f"mirror-{repo_name}", on_error=_told_to_waiters)
        self._flight: _Flight | None = None
        self._turn = asyncio.Lock()
        self._snapshot: RefsSnapshot | None = None
        self._snapshot_stamp: tuple[int, int] | None = None
        self._known_commits: set[str] = set()
        self._built_at = _LONG_AGO
        self._known_remotes: dict[str, str] = {}
        self.fetch_count = 0
        self._lock_id = lock_id or f"{MIRROR_LOCKS}{repo_name}"
        self._trash = trash or f"{path.rpartition('/')[0]}/trash"
        self._submodules: dict[tuple[str, bool], Mirror] = {}

    @property
    def repo_name(self) -> str:
        """The pool's name."""
        return self._repo_name

    @property
    def objects(self) -> str:
        """The object directory that slots borrow from."""
        return f"{self.path}/objects"

    async def ensure(self) -> None:
        """Build the mirror where there is none.

        Several processes may ask at once: one builds, the others wait and find it there. Afterwards the mirror is
        complete or, on an error or a cancellation, absent.

        Raises:
            GitOperationError: the remote could not be cloned. EmptyRepositoryError: it has no commits.
        """
        if await self._host.stat(f"{self.path}/repopool/state.json") is not None:
            return
        async with self._alone():
            if await self._host.stat(f"{self.path}/repopool/state.json") is None:
                await self._build()

    async def rebuild(self) -> None:
        """Clone the mirror anew beside the old one and swap the two (the last rung before giving up).

        Slots that borrow from it keep their path, and commits that only the old one had, as far as they are whole.
        Where somebody else has just done it, nothing is done again. On an error the old one stays as it was.

        Raises:
            GitOperationError: the remote could not be cloned.
        """
        seen = await self._host.stat(self.path)
        async with self._alone():
            if _is_same(seen, await self._host.stat(self.path)):
                await self._build()

    async def repair(self) -> None:
        """Bring back what `check` found wrong: what can be told from the refs here, anything else from the remote.

        Raises:
            GitOperationError: the remote could not be cloned; nothing has changed.
        """
        self._snapshot = None  # looked at anew, whatever we remember
        await self.snapshot()
        if await find_damage(self._git, self.path):
            await self.rebuild()

    async def fetch(self) -> None:
        """Bring the mirror up to date with all its remotes, sharing one git with everybody who asks at the same time.

        What the remotes had when this was called, or newer, is there afterwards. Cancelling one of several waiters
        leaves the fetch to the others; cancelling the last ends it and its processes.

        Raises:
            GitOperationError: the fetch failed, after the attempts that made sense.
        """
        flight = self._flight
        if flight is None or not flight.is_joinable:
            flight = self._flight = _Flight(last_request=boottime())
            flight.task = self._tasks.spawn(self._fly(flight), name=f"fetch-{self._repo_name}")
        flight.last_request = boottime()
        flight.waiters += 1
        task = flight.task
        assert task is not None
        try:
            await asyncio.wait([task])
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not task.done():
                flight.is_joinable = False
                task.cancel()
        if task.cancelled():
            raise ManagerClosedError(
                f"{self._repo_name}: the pool was closed during a fetch", repo_name=self._repo_name
            )
        task.result()

    async def refresh(self, *, max_age: float) -> bool:
        """Fetch unless a fetch was begun within the last `max_age` seconds, here or in another process.

        Returns:
            Whether a fetch was made or shared.
        """
        if max_age > 0:
            state = await self._read_state()
            if state is not None and state.boot_id == boot_id() and boottime() - state.spawned_boottime <= max_age:
                return False
        await self.fetch()
        return True

    async def snapshot(self) -> RefsSnapshot:
        """Return the refs as of the last fetch, this process's or another's; cheap when nothing changed.

        Where they cannot be read, the mirror is mended, if need be from the remote.

        Raises:
            GitOperationError: there is no usable mirror, and none could be made.
        """
        stat = await self._host.stat(f"{self.path}/repopool/state.json")
        stamp = (stat.inode, stat.mtime_ns) if stat else None
        if self._snapshot is None or stamp is None or stamp != self._snapshot_stamp:
            self._snapshot = await self._load_snapshot()
            self._snapshot_stamp = stamp
        return self._snapshot

    async def resolve(self, ref: str | None) -> ResolvedRef:
        """Say which commit a ref means: a full name, a full commit id, a branch, a tag, a unique short id.

        A full name outside branches and tags, and a commit that is not here yet, are fetched on demand.

        Args:
            ref: None means the remote's default branch.

        Raises:
            RefError: the text cannot be a ref. UnknownRefError: nothing of that name; it lists the nearest ones.
        """
        snapshot = await self.snapshot()
        if ref is None:
            return self._resolve_default(snapshot)
        validate_ref(ref)
        known = look_up(ref, snapshot)
        if known is not None:
            return known if known.branch else await self._checked_tag(known)
        if FULL_ID.fullmatch(ref):
            return await self._resolve_commit(ref)
        if ref.startswith("refs/") and not ref.startswith(("refs/heads/", "refs/tags/")):
            return await self._resolve_foreign(ref)
        if _SHORT_ID.fullmatch(ref):
            commit = await self._peel(ref)
            if commit is not None:
                return ResolvedRef(asked=ref, commit=commit)
        raise self._unknown(ref, snapshot)

    async def obtain(self, commit: str) -> None:
        """Have a commit here; the remote is asked only while it is missing.

        Raises:
            UnknownRefError: the remote does not have it either. GitOperationError: the remote could not be asked.
        """
        await self.ensure()
        if await self._peel(commit) is None:
            await self.fetch()
            await self._resolve_commit(commit)

    async def keep(self, slot_id: str, commit: str) -> None:
        """Protect the commit a slot stands on from any later maintenance."""
        path = f"{self.path}/refs/repopool/keep/{slot_id}"
        await self._host.apply([MakeDirectory(path.rpartition("/")[0]), WriteFile(path, f"{commit}\n".encode())])

    async def unkeep(self, slot_id: str) -> None:
        """Forget the commit a removed slot stood on."""
        await self._host.apply([RemoveFile(f"{self.path}/refs/repopool/keep/{slot_id}")])

    async def maintain(self) -> None:
        """Repack incrementally and pack refs; nothing is pruned. Call it when the pool is idle."""
        async with self._alone():
            await self._run("repack", "-d", "-q", "--geometric=2", "--no-write-bitmap-index")
            await self._run("pack-refs", "--all")

    async def check(self) -> list[str]:
        """Return what is wrong with the mirror, a line each; nothing where all is well.

        Slow: every object is read and compared with its name, and every ref's history followed.
        """
        if await self._host.stat(f"{self.path}/HEAD") is None:
            return [f"{self.path} is missing"]
        return [*await self._state_problems(), *await find_damage(self._git, self.path)]

    async def has(self, commit: str) -> bool:
        """Return whether a commit is here."""
        return await self._peel(commit) is not None

    async def aclose(self) -> None:
        """End a fetch under way, of submodules too; its waiters are told."""
        await self._tasks.cancel()
        for mirror in self._submodules.values():
            await mirror.aclose()

    # -- submodules ----------------------------------------------------------------------------------------------

    def of_submodule(self, url: str, credentials: Credentials | None = None) -> "Mirror":
        """Return the mirror of a submodule's repository, one for each URL of the pool, which may yet have to be built.

        Args:
            url: without credentials. credentials: offered to that URL's server, instead of the pool's own.
        """
        digest = hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()[:20]
        key = (digest, credentials is not None)
        if key not in self._submodules:
            pool_directory = self.path.rpartition("/")[0]
            environment = with_credentials(self._git.environment, credentials)
            self._submodules[key] = Mirror(
                f"{pool_directory}/submodules/{digest}.git",
                url,
                host=self._host,
                git=self._git.bind(environment=environment),
                locks=self._locks,
                repo_name=self._repo_name,
                lock_id=f"{self._lock_id}.{digest}.git",  # no pool's name ends so
                trash=self._trash,
            )
        return self._submodules[key]

    async def mend_submodules(self) -> None:
        """Clone those mirrors of submodules anew in which something is damaged (slow: reads everything)."""
        for mirror in self._submodules.values():
            try:
                await mirror.check()
            except GitOperationError:
                await mirror.rebuild()

    # -- building ------------------------------------------------------------------------------------------------

    async def _build(self) -> None:
        pool_directory = self.path.rpartition("/")[0]
        temporary = f"{self.path}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        await self._host.apply([MakeDirectory(pool_directory)])
        # A dead builder's git outlives it, and would go on writing while what it made is removed.
        await self._host.end_processes(mark=f"{WORK_MARK}={self.path}", tree=self.path)
        await self._sweep_abandoned(pool_directory)
        built = False
        try:
            spawned = boottime()
            await self._clone_into(temporary)
            await self._carry_over(temporary)
            await self._take_snapshot(temporary, spawned=spawned)
            await self._host.apply(
                [Discard(self.path, self._trash), Rename(temporary, self.path)],
            )
            built = True
            self._known_commits.clear()
        finally:
            if not built:
                with anyio.CancelScope(shield=True):
                    await self._host.remove_tree(temporary)

    async def _carry_over(self, new: str) -> None:
        """Save what leases stand on and the remote no longer has; whatever is wrong there, the new mirror counts."""
        if await self._host.stat(self.path) is None:
            return
        try:
            carried = await carry_over(self._git, self._host, old=self.path, new=new)
        except (GitOperationError, OSError) as error:
            _log.warning("%s: nothing could be saved from the old mirror: %s", self._repo_name, error)
            return
        if carried != Carried(saved=0, lost=0):
            _log.warning("%s: only the old mirror had some commits: %s", self._repo_name, carried)

    async def _sweep_abandoned(self, pool_directory: str) -> None:
        """Remove what a killed builder left; we hold the lock, so no builder is alive."""
        prefix = self.path.rpartition("/")[2] + ".tmp-"
        for name in await self._host.list_directory(pool_directory):
            if name.startswith(prefix):
                await self._host.remove_tree(f"{pool_directory}/{name}")

    async def _clone_into(self, directory: str) -> None:
        # Objects are copied, never linked: somebody who writes into the source must not write into the mirror.
        await self._git.run(
            "clone", "--bare", "--template=", "--no-hardlinks", "--progress", *self._locality(), "--end-of-options",
            self.url, directory, retry=True, repo_name=self._repo_name, env={WORK_MARK: self.path},
        )  # fmt: skip
        has_refs = bool((await self._run("for-each-ref", "--count=1", git_dir=directory)).text)
        if not has_refs and await self._peel("HEAD", directory) is None:  # a detached HEAD needs no ref
            raise EmptyRepositoryError(
                f"{self._repo_name}: the repository at {self.url} has no commits; push one, then create the pool",
                operation="clone", repo_name=self._repo_name,
            )  # fmt: skip
        for key, value in _MIRROR_CONFIG.items():
            await self._run("config", key, value, git_dir=directory)
        await self._fetch_remotes(directory)

    def _locality(self) -> tuple[str, ...]:
        """Say how a local source is copied: one that borrows objects itself must be transferred, not copied."""
        borrows = self.url.startswith("/") and any(
            os.path.exists(f"{self.url}/{name}objects/info/alternates")  # noqa: PTH110 - the source, not a slot
            for name in ("", ".git/")
        )
        return ("--no-local",) if borrows else ()

    # -- fetching ------------------------------------------------------------------------------------------------

    async def _fly(self, flight: _Flight) -> None:
        await asyncio.sleep(_COLLECT_SECONDS)
        async with self._turn:
            flight.is_joinable = False
            async with self._alone():
                state = await self._read_state() or await self._mend()
                if state.boot_id != boot_id() or state.spawned_boottime < flight.last_request:
                    await self._fetch_now(state)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Hold the mirror's lock for the block, after whatever a dead holder left is out of the way."""
        async with self._locks.acquire_slot_lock(self._lock_id, timeout=None) as held:
            if held.was_left:
                await self._clear_up()
            yield

    async def _clear_up(self) -> None:
        """End the git of a holder that died, and remove the locks that a killed git leaves; we hold the lock."""
        await self._host.end_processes(mark=f"{WORK_MARK}={self.path}", tree=self.path)
        stale = [f"{self.path}/{name}.lock" for name in ("packed-refs", "HEAD", "shallow", "config")]
        await self._host.apply([RemoveFile(path) for path in [*stale, *await self._locks_below(f"{self.path}/refs")]])

    async def _locks_below(self, directory: str) -> list[str]:
        found: list[str] = []
        for name in await self._host.list_directory(directory):
            path = f"{directory}/{name}"
            found += [path] if name.endswith(".lock") else await self._locks_below(path)
        return found

    async def _fetch_now(self, state: _State) -> None:
        spawned = boottime()
        self.fetch_count += 1
        refspecs = [_HEADS, _TAGS] if state.head is None else [_HEADS, _TAGS, f"+HEAD:{REMOTE_HEAD}"]
        try:
            await together(lambda: self._fetch_origin(refspecs), lambda: self._fetch_remotes(self.path))
            await self._take_snapshot(self.path, spawned=spawned, known=state)
        except _DAMAGE as error:
            await self._build_after(error)

    async def _build_after(self, error: GitOperationError) -> None:
        """Clone anew because of damage, unless that has been done just now and so cannot be what helps."""
        if boottime() - self._built_at < _REBUILD_PAUSE_SECONDS:
            raise error
        _log.warning("%s: the mirror is damaged and cloned anew: %s", self._repo_name, error)
        await self._build()
        self._built_at = boottime()

    async def _fetch_origin(self, refspecs: list[str]) -> None:
        try:
            await self._fetch_from("origin", refspecs, self.path)
        except GitRefMissingError:
            # The remote's HEAD has gone (its branch was deleted); its branches are still worth having.
            await self._fetch_from("origin", refspecs[:2], self.path)

    async def _fetch_remotes(self, directory: str) -> None:
        # Side by side is safe here: each remote has refs of its own, and git waits for the lock of packed-refs.
        def fetching(name: str) -> Callable[[], Coroutine[Any, Any, None]]:
            return lambda: self._fetch_from(name, [f"+refs/heads/*:refs/remotes/{name}/*"], directory)

        await self._know_remotes(directory)
        await together(*(fetching(name) for name in self.remotes))

    async def _know_remotes(self, directory: str) -> None:
        """Note the remotes' URLs where they are not noted yet: options may have changed since the mirror was built."""
        for name, url in self.remotes.items():
            key = f"remote.{name}.url"
            known = self._known_remotes.get(name)
            if known != url and (await self._run("config", "--get", key, git_dir=directory, ok=(0, 1))).text != url:
                await self._run("config", key, url, git_dir=directory)
        if directory == self.path:
            self._known_remotes = dict(self.remotes)

    async def _fetch_from(self, remote: str, refspecs: list[str], directory: str) -> None:
        await self._git.run(
            "fetch", "--prune", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--progress",
            "--no-recurse-submodules", "--update-shallow", "--end-of-options", remote, *refspecs,
            git_dir=directory, retry=True, repo_name=self._repo_name, env={WORK_MARK: self.path},
        )  # fmt: skip

    async def _fetch_extra(self, source: str, target: str) -> None:
        """Fetch one ref or commit that no refspec covers, into a ref of ours."""

        async def fetch() -> None:
            await self._git.run(
                "fetch", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--no-recurse-submodules",
                "--progress", "--update-shallow", "--end-of-options", "origin", f"+{source}:{target}",
                git_dir=self.path, retry=True, repo_name=self._repo_name, env={WORK_MARK: self.path},
            )  # fmt: skip

        async with self._turn, self._alone():
            try:
                await fetch()
            except _DAMAGE as error:
                await self._build_after(error)
                await fetch()

    # -- the snapshot --------------------------------------------------------------------------------------------

    async def _take_snapshot(self, directory: str, *, spawned: float, known: _State | None = None) -> None:
        listing = (await self._run(
            "for-each-ref", "--format=%(objectname) %(*objecttype) %(*objectname) %(refname)",
            "refs/heads", "refs/tags", "refs/remotes", REMOTE_HEAD, git_dir=directory,
        )).stdout.decode(errors="surrogateescape")  # fmt: skip
        packed, refs = packed_refs(await self._peel_nested_tags(listing, directory))
        generation = _generation(packed.encode(errors="surrogateescape"))
        default_branch, head = await self._find_head(directory, refs, known)
        object_format = known.object_format if known else await self._object_format(directory)
        build = known.build if known else secrets.token_hex(8)
        state = _State(generation, default_branch, head, object_format, boot_id(), spawned, build)
        own = f"{directory}/repopool"
        steps: list[MakeDirectory | WriteFile] = [MakeDirectory(own)]
        if known is None or known.generation != generation:
            steps.append(WriteFile(f"{own}/refs-{generation}", packed.encode(errors="surrogateescape"), 0o666))
        steps.append(WriteFile(f"{own}/state.json", json.dumps(attrs.asdict(state)).encode()))
        await self._host.apply(steps)
        if known is not None and known.generation != generation:
            await self._run("pack-refs", "--all", git_dir=directory)
            await self._drop_old_snapshots(own, keep=generation)

    async def _peel_nested_tags(self, listing: str, directory: str) -> str:
        """Replace what a tag of a tag points to by what it means in the end; git before 2.45 peels once."""
        lines = listing.splitlines()
        for number, line in enumerate(lines):
            name, kind, _, ref = line.split(" ", 3)
            if kind == "tag":
                peeled = (await self._run("rev-parse", "--verify", f"{name}^{{}}", git_dir=directory)).text
                lines[number] = f"{name} object {peeled} {ref}"
        return "\n".join(lines)

    async def _find_head(
        self, directory: str, refs: Mapping[str, str], known: _State | None
    ) -> tuple[str | None, str | None]:
        """Return the remote's default branch and the commit of its HEAD, asking the remote only where in doubt."""
        if known is None:
            branch = (await self._run("symbolic-ref", "-q", "--short", "HEAD", git_dir=directory, ok=(0, 1))).text
            head = await self._peel("HEAD", directory)
            return (branch if f"refs/heads/{branch}" in refs else None), head
        head = refs.get(REMOTE_HEAD, known.head)
        if known.default_branch and refs.get(f"refs/heads/{known.default_branch}") == head:
            return known.default_branch, head
        advertised = await self._git.run(
            "ls-remote", "--symref", "--end-of-options", "origin", "HEAD",
            git_dir=directory, retry=True, repo_name=self._repo_name,
        )  # fmt: skip
        match = re.search(r"^ref: refs/heads/(\S+)\tHEAD$", advertised.text, re.MULTILINE)
        branch_name = match[1] if match and f"refs/heads/{match[1]}" in refs else None
        if branch_name and branch_name != known.default_branch:
            await self._run("symbolic-ref", "HEAD", f"refs/heads/{branch_name}", git_dir=directory)
        return branch_name, head

    async def _object_format(self, directory: str) -> str:
        return (await self._run("rev-parse", "--show-object-format", git_dir=directory)).text or "sha1"

    async def _drop_old_snapshots(self, own: str, *, keep: str) -> None:
        """Remove all but the newest few: another process may be copying the one before."""
        names = [name for name in await self._host.list_directory(own) if name.startswith("refs-")]
        stats = {name: await self._host.stat(f"{own}/{name}") for name in names if name != f"refs-{keep}"}
        aged = sorted((stat.mtime_ns, name) for name, stat in stats.items() if stat)
        await self._host.apply([RemoveFile(f"{own}/{name}") for _, name in aged[: -_SNAPSHOTS_KEPT or None]])

    async def _read_state(self) -> _State | None:
        try:
            data = await self._host.read_bytes(f"{self.path}/repopool/state.json", limit=65536)
        except OSError:
            return None
        if data is None:
            return None
        try:
            return _State(**json.loads(data))
        except (ValueError, TypeError):
            return None

    async def _load_snapshot(self) -> RefsSnapshot:
        state = await self._read_state()
        if state is None:
            async with self._locks.acquire_slot_lock(self._lock_id, timeout=None):
                state = await self._read_state() or await self._mend()
        path = f"{self.path}/repopool/refs-{state.generation}"
        data = await self._host.read_bytes(path, limit=_SNAPSHOT_LIMIT)
        if data is None or _generation(data) != state.generation:
            await self._take_snapshot(
                self.path, spawned=state.spawned_boottime, known=attrs.evolve(state, generation="")
            )
            return await self._load_snapshot()
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
        )

    # -- mending -------------------------------------------------------------------------------------------------

    async def _mend(self) -> _State:
        """Write the state anew, from the refs where they can be read, else from the remote; we hold the lock."""
        try:
            await self._take_snapshot(self.path, spawned=_LONG_AGO)
        except (GitOperationError, OSError) as error:
            _log.warning("%s: the mirror is damaged or missing and cloned anew: %s", self._repo_name, error)
            await self._build()
        state = await self._read_state()
        if state is None:
            raise GitMirrorDamagedError(
                f"{self._repo_name}: {self.path}/repopool/state.json does not stay; see who writes there",
                operation="snapshot", repo_name=self._repo_name,
            )  # fmt: skip
        return state

    async def _state_problems(self) -> list[str]:
        state = await self._read_state()
        if state is None:
            return ["repopool/state.json is missing or unreadable"]
        name = f"refs-{state.generation}"
        try:
            data = await self._host.read_bytes(f"{self.path}/repopool/{name}", limit=_SNAPSHOT_LIMIT)
        except OSError as error:
            return [f"repopool/{name}: {error.strerror}"]
        is_right = data is not None and _generation(data) == state.generation
        return [] if is_right else [f"repopool/{name} is not what was written"]

    # -- resolving -----------------------------------------------------------------------------------------------

    def _resolve_default(self, snapshot: RefsSnapshot) -> ResolvedRef:
        if snapshot.default_branch:
            commit = snapshot.branches[snapshot.default_branch]
            return ResolvedRef(asked=snapshot.default_branch, commit=commit, branch=snapshot.default_branch)
        if snapshot.head:
            return ResolvedRef(asked="HEAD", commit=snapshot.head)
        raise self._unknown("HEAD", snapshot)

    async def _checked_tag(self, tag: ResolvedRef) -> ResolvedRef:
        """Refuse a tag of a tree or blob; asked of git once per object."""
        if tag.commit not in self._known_commits:
            if await self._peel(tag.commit) is None:
                raise UnknownRefError(
                    f"{self._repo_name}: the tag {tag.asked!r} names no commit and cannot be checked out",
                    repo_name=self._repo_name, ref=tag.asked,
                )  # fmt: skip
            self._known_commits.add(tag.commit)
        return tag

    async def _resolve_commit(self, ref: str) -> ResolvedRef:
        commit = await self._peel(ref)
        if commit is None:
            try:
                await self._fetch_extra(ref, f"refs/repopool/fetch/{ref}")
            except GitRefMissingError:
                raise self._unknown(ref, await self.snapshot()) from None
            commit = await self._peel(ref)
        if commit is None:
            raise self._unknown(ref, await self.snapshot())
        return ResolvedRef(asked=ref, commit=commit)

    async def _resolve_foreign(self, ref: str) -> ResolvedRef:
        """Resolve `refs/pull/7/head` and the like: always asked of the remote, since no fetch covers them."""
        target = f"refs/repopool/fetch/{ref.removeprefix('refs/')}"
        try:
            await self._fetch_extra(ref, target)
        except GitRefMissingError:
            raise self._unknown(ref, await self.snapshot()) from None
        commit = await self._peel(target)
        if commit is None:
            raise self._unknown(ref, await self.snapshot())
        return ResolvedRef(asked=ref, commit=commit)

    async def _peel(self, revision: str, directory: str | None = None) -> str | None:
        result = await self._run(
            "rev-parse", "-q", "--verify", "--end-of-options", f"{revision}^{{commit}}",
            git_dir=directory, ok=(0, 1, 128),
        )  # fmt: skip
        return result.text or None if result.success else None

    def _unknown(self, ref: str, snapshot: RefsSnapshot) -> UnknownRefError:
        short = ref.removeprefix("refs/heads/").removeprefix("refs/tags/")
        nearest = tuple(difflib.get_close_matches(short, [*snapshot.branches, *snapshot.tags], n=5, cutoff=0.5))
        hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
        return UnknownRefError(
            f"{self._repo_name}: {self.url} has no ref or commit {ref!r}{hint}",
            repo_name=self._repo_name, ref=ref, nearest=nearest,
        )  # fmt: skip

    async def _run(self, *args: str, git_dir: str | None = None, ok: tuple[int, ...] = (0,)) -> GitResult:
        return await self._git.run(*args, git_dir=git_dir or self.path, ok_codes=ok, repo_name=self._repo_name)


def _generation(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()[:20]


def _is_same(one: FileStat | None, other: FileStat | None) -> bool:
    return (one and (one.device, one.inode)) == (other and (other.device, other.inode))


def _told_to_waiters(name: str, error: BaseException) -> None:
    """A fetch's failure is raised to everybody who waits for it; there is nothing more to report."""
