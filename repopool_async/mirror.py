"""The pool's bare repository: the only place the network writes to, and whose objects every slot borrows.

It is built once, in a temporary directory renamed into place, and fetched by one git at a time: whoever asks before
that git is spawned shares it, whoever asks later joins the next one, across processes too. It resolves refs from a
snapshot it takes after each fetch, without running git. Nothing that a lease may reference is ever pruned: there is no
garbage collection here, only repacking. Slots, leases and cleaning are not its business.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Final

import attrs

from repopool_async._aio import TaskSet, together
from repopool_async._clock import boottime
from repopool_async._git import GitRunner, with_credentials
from repopool_async._git_arguments import Credentials
from repopool_async._identity import boot_id
from repopool_async.exceptions import (
    GitMirrorDamagedError,
    GitOperationError,
    GitSlotDamagedError,
    ManagerClosedError,
    UnknownRefError,
)
from repopool_async.hosts.base import FileStat, Host, MakeDirectory, RemoveFile, WriteFile
from repopool_async.mirror_blobs import MirrorBlobs
from repopool_async.mirror_builder import MirrorBuilder
from repopool_async.mirror_git import PROMISES, MirrorGit
from repopool_async.mirror_snapshots import MirrorSnapshots, MirrorState
from repopool_async.mirror_sources import MirrorSource, Upstream
from repopool_async.models import ResolvedRef
from repopool_async.ref_resolver import RefResolver
from repopool_async.refs import RefsSnapshot
from repopool_async.repository_lock import RepositoryLock
from repopool_async.shared_state import Locks

_log: Final = logging.getLogger("repopool")

MIRROR_LOCKS: Final = "mirror-"
"""How the names of mirrors' locks begin; who takes one after a dead holder puts right what that left."""

_FOREIGN_REFS: Final = 1000
"""From how many refs besides branches and tags on, a fetch, which does not ask for them, is cheaper than a look."""
_REBUILD_PAUSE_SECONDS: Final = 60.0
"""How soon a fetch that finds damage may clone anew again: what the remote itself is missing no clone mends."""
_LONG_AGO: Final = -1e15
_DAMAGE: Final = (GitMirrorDamagedError, GitSlotDamagedError)


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
        is_blobless: fetch file contents only when a check-out needs them.
        trash: where a replaced mirror goes; `trash` beside it where missing.
        trust_seconds: how long refs are believed that were looked at; not at all where looking costs nothing.
        upstream: another host's mirror of the same repository, which is fetched from instead of the origin.
    """

    def __init__(
        self,
        path: str,
        url: str,
        *,
        host: Host,
        git: GitRunner,
        locks: Locks,
        repo_name: str,
        remotes: Mapping[str, str] | None = None,
        is_blobless: bool = False,
        lock_id: str | None = None,
        trash: str | None = None,
        upstream: Upstream | None = None,
        trust_seconds: float = 0.0,
    ) -> None:
        self.path = path
        self.url = url
        self.remotes: Mapping[str, str] = dict(remotes or {})
        self._host = host
        self._git = MirrorGit(git, path, url, remotes=self.remotes, repo_name=repo_name, is_blobless=is_blobless)
        self._blobs = MirrorBlobs(self._git)
        self._snapshots = MirrorSnapshots(host, self._git)
        self._trash = trash or f"{path.rpartition('/')[0]}/trash"
        self._source = MirrorSource(self._git, upstream)
        self._builder = MirrorBuilder(host, self._git, self._snapshots, self._source, trash=self._trash)
        self._resolver = RefResolver(self._git, snapshot=self.snapshot, fetch_ref=self.fetch_ref)
        self._locks = locks
        self._repo_name = repo_name
        self._tasks = TaskSet(f"mirror-{repo_name}", on_error=_told_to_waiters)
        self._flight: _Flight | None = None
        self._turn = asyncio.Lock()
        self._snapshot: RefsSnapshot | None = None
        self._snapshot_stamp: tuple[int, int] | None = None
        self._trust_seconds = trust_seconds
        self._believed_until = _LONG_AGO
        self._built_at = _LONG_AGO
        self._asks_first = True
        self.fetch_count = 0
        self._lock_id = lock_id or f"{MIRROR_LOCKS}{repo_name}"
        self._lock = RepositoryLock(path, host=host, locks=locks, lock_id=self._lock_id)
        self._submodules: dict[tuple[str, bool], Mirror] = {}

    @property
    def repo_name(self) -> str:
        """The pool's name."""
        return self._repo_name

    @property
    def promises(self) -> Mapping[str, str]:
        """The configuration by which git knows that what is missing is promised by `origin`; empty where nothing is."""
        return PROMISES if self._git.is_blobless else {}

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
        if await self._snapshots.stat() is not None:
            return
        async with self._lock.alone():
            if await self._snapshots.stat() is None:
                await self._build()

    async def rebuild(self) -> None:
        """Clone the mirror anew beside the old one and swap the two (the last rung before giving up).

        Slots that borrow from it keep their path, and commits that only the old one had, as far as they are whole.
        Where somebody else has just done it, nothing is done again. On an error the old one stays as it was.

        Raises:
            GitOperationError: the remote could not be cloned.
        """
        seen = await self._host.stat(self.path)
        async with self._lock.alone():
            if _is_same(seen, await self._host.stat(self.path)):
                await self._build()

    async def repair(self) -> None:
        """Bring back what `check` found wrong: what can be told from the refs here, anything else from the remote.

        Raises:
            GitOperationError: the remote could not be cloned; nothing has changed.
        """
        self._snapshot = None  # looked at anew, whatever we remember
        await self.snapshot()
        if await self._git.find_damage():
            await self.rebuild()

    async def fetch(self, *, as_of: float | None = None) -> None:
        """Bring the mirror up to date with all its remotes, sharing one git with everybody who asks at the same time.

        What the remotes had when this was called (or `as_of`, seconds since boot), or newer, is there afterwards.
        Cancelling one of several waiters
        leaves the fetch to the others; cancelling the last ends it and its processes.

        Raises:
            GitOperationError: the fetch failed, after the attempts that made sense.
        """
        wanted = boottime() if as_of is None else as_of
        flight = self._flight
        if flight is None or not flight.is_joinable:
            flight = self._flight = _Flight(last_request=wanted)
            flight.task = self._tasks.spawn(self._fly(flight), name=f"fetch-{self._repo_name}")
        flight.last_request = max(flight.last_request, wanted)
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
            seen = self._snapshot
            if seen is not None and seen.boot_id == boot_id() and boottime() - seen.spawned_boottime <= max_age:
                self._believed_until = boottime() + self._trust_seconds
                return False
            state = await self._snapshots.state()
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
        if self._snapshot is not None and boottime() < self._believed_until:
            return self._snapshot
        return await self.note(await self._snapshots.stat())

    async def look(self, *paths: str) -> list[FileStat | None]:
        """Return what lies at paths on the mirror's host and, in the same hop, see whether the refs are still these."""
        *found, state = await self._host.stat_many([*paths, self.state_path])
        await self.note(state)
        return found

    @property
    def state_path(self) -> str:
        """The file that changes whenever the refs do; what lies there is for `note`."""
        return self._snapshots.state_path

    async def note(self, state: FileStat | None) -> RefsSnapshot:
        """Take note of what lies at `state_path` now, and return the refs, read anew where they are others."""
        stamp = (state.inode, state.mtime_ns) if state else None
        if self._snapshot is None or stamp is None or stamp != self._snapshot_stamp:
            self._snapshot = await self._load_snapshot()
            self._snapshot_stamp = stamp
        self._believed_until = boottime() + self._trust_seconds
        return self._snapshot

    async def resolve(self, ref: str | None) -> ResolvedRef:
        """Say which commit a ref means: a full name, a full commit id, a branch, a tag, a unique short id.

        A full name outside branches and tags, and a commit that is not here yet, are fetched on demand.

        Args:
            ref: None means the remote's default branch.

        Raises:
            RefError: the text cannot be a ref. UnknownRefError: nothing of that name; it lists the nearest ones.
        """
        return await self._resolver.resolve(ref)

    async def bring(self, as_of: float) -> float:
        """Have here what the remotes had at a moment (seconds since boot), or newer; returns of which moment it is.

        Raises:
            GitOperationError: the mirror could not be built or fetched.
        """
        await self.ensure()
        state = await self._snapshots.state()
        if state is None or state.boot_id != boot_id() or state.spawned_boottime < as_of:
            await self.fetch(as_of=as_of)
            state = await self._snapshots.state()
        return _LONG_AGO if state is None else state.spawned_boottime

    async def catch_up(self, seen: RefsSnapshot, resolved: ResolvedRef) -> None:
        """Have a commit here that another mirror of the repository resolved, and refs not older than it saw.

        Fetches only where one of them is missing.

        Args:
            seen: the other mirror's refs when it did.

        Raises:
            UnknownRefError: the commit is not to be had. GitOperationError: the mirror could not be built or fetched.
        """
        own = await self.snapshot()
        is_older = seen.boot_id != own.boot_id or own.spawned_boottime < seen.spawned_boottime
        if own.generation != seen.generation and is_older:
            is_known = seen.boot_id == boot_id()  # otherwise its clock says nothing here
            await self.fetch(as_of=seen.spawned_boottime if is_known else None)
            own = await self.snapshot()
        if not own.has_commit(resolved.commit) and await self._git.peel(resolved.commit) is None:
            try:
                await self._resolver.resolve_commit(resolved.commit)
            except UnknownRefError:
                await self._resolver.resolve(resolved.asked)  # servers give some refs only by their names

    @property
    def seen(self) -> RefsSnapshot | None:
        """The refs that the last look found, without any I/O."""
        return self._snapshot

    async def obtain(self, commit: str) -> None:
        """Have a commit here; the remote is asked only while it is missing.

        Raises:
            UnknownRefError: the remote does not have it either. GitOperationError: the remote could not be asked.
        """
        await self.ensure()
        if await self._git.peel(commit) is None:
            await self.fetch()
            await self._resolver.resolve_commit(commit)

    async def obtain_contents(self, commit: str, includes: Callable[[str], bool]) -> None:
        """Have the contents of a commit's files here, where the mirror does not have all contents anyway.

        Args:
            includes: says of a path whether it is wanted.

        Raises:
            GitOperationError: they could not be fetched.
        """
        if self._git.is_blobless:
            await self._blobs.obtain(commit, (await self.snapshot()).build, includes)

    async def keep(self, slot_id: str, commit: str) -> None:
        """Protect the commit a slot stands on from any later maintenance."""
        path = f"{self.path}/refs/repopool/keep/{slot_id}"
        await self._host.apply([MakeDirectory(path.rpartition("/")[0]), WriteFile(path, f"{commit}\n".encode())])

    async def unkeep(self, slot_id: str) -> None:
        """Forget the commit a removed slot stood on."""
        await self._host.apply([RemoveFile(f"{self.path}/refs/repopool/keep/{slot_id}")])

    async def unkeep_matching(self, *patterns: str) -> None:
        """Forget the commits kept under names that match, packed refs or not."""
        async with self._lock.alone():
            named = [f"refs/repopool/keep/{pattern}" for pattern in patterns]
            kept = await self._git.run("for-each-ref", "--format=delete %(refname)", *named)
            await self._git.change_refs(kept.stdout)

    async def maintain(self) -> None:
        """Repack incrementally and pack refs; nothing is pruned. Call it when the pool is idle."""
        async with self._lock.alone():
            names = await self._host.list_directory(f"{self.objects}/pack")
            await self._git.repack(sum(name.endswith(".pack") for name in names))
            await self._git.run("pack-refs", "--all")

    async def check(self) -> list[str]:
        """Return what is wrong with the mirror, a line each; nothing where all is well.

        Slow: every object is read and compared with its name, and every ref's history followed.
        """
        if await self._host.stat(f"{self.path}/HEAD") is None:
            return [f"{self.path} is missing"]
        return [*await self._snapshots.problems(), *await self._git.find_damage()]

    async def has(self, commit: str) -> bool:
        """Return whether a commit is here."""
        return await self._git.peel(commit) is not None

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
            environment = with_credentials(self._git.runner.environment, credentials)
            self._submodules[key] = Mirror(
                f"{pool_directory}/submodules/{digest}.git",
                url,
                host=self._host,
                git=self._git.runner.bind(environment=environment),
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
        await self._builder.build()
        self._resolver.forget()
        self._believed_until = _LONG_AGO

    # -- fetching ------------------------------------------------------------------------------------------------

    async def _fly(self, flight: _Flight) -> None:
        async with self._turn:
            flight.is_joinable = False
            async with self._lock.alone():
                state = await self._snapshots.state() or await self._mend()
                if state.boot_id != boot_id() or state.spawned_boottime < flight.last_request:
                    await self._fetch_now(state, flight.last_request)
        self._believed_until = _LONG_AGO  # what this fetch brought, or another process's that served us

    async def _fetch_now(self, state: MirrorState, as_of: float) -> None:
        self.fetch_count += 1
        with_head = state.head is not None
        try:
            async with self._source.opened(as_of) as spawned:
                if await self._has_all(state):
                    await self._snapshots.confirm(state, spawned=spawned)
                    return
                await together(
                    lambda: self._git.fetch_origin(with_head=with_head), lambda: self._git.fetch_remotes(self.path)
                )
                await self._snapshots.take(self.path, spawned=spawned, known=state)
        except _DAMAGE as error:
            await self._build_after(error)

    async def _has_all(self, state: MirrorState) -> bool:
        """Return whether the remotes have nothing that is not here, as far as it is cheaper to ask than to fetch."""
        if not self._asks_first or self._git.source.url:  # another mirror is asked by fetching
            return False
        answers = await self._git.advertised()
        if answers is None:
            return False
        self._asks_first = all(answer.foreign_refs < _FOREIGN_REFS for answer in answers.values())
        return all(
            state.advertised.get(name) == answer.fingerprint(branches_only=name != "origin")
            for name, answer in answers.items()
        )

    async def _build_after(self, error: GitOperationError) -> None:
        """Clone anew because of damage, unless that has been done just now and so cannot be what helps."""
        if boottime() - self._built_at < _REBUILD_PAUSE_SECONDS:
            raise error
        _log.warning("%s: the mirror is damaged and cloned anew: %s", self._repo_name, error)
        await self._build()
        self._built_at = boottime()

    async def fetch_ref(self, source: str, target: str) -> None:
        """Fetch one ref or commit that no refspec covers, into a ref of ours, alone.

        Raises:
            GitRefMissingError: the remote does not have it.
        """
        await self.ensure()
        named = await self._source.bring_ref(source, target)
        async with self._turn, self._lock.alone():
            try:
                await self._fetch_ref_now(named, target)
            except _DAMAGE as error:
                await self._build_after(error)
                await self._fetch_ref_now(named, target)

    async def _fetch_ref_now(self, source: str, target: str) -> None:
        async with self._source.opened(_LONG_AGO):
            await self._git.fetch_ref(source, target)

    # -- the snapshot --------------------------------------------------------------------------------------------

    async def _load_snapshot(self) -> RefsSnapshot:
        state = await self._snapshots.state()
        if state is None:
            async with self._lock.alone():
                state = await self._snapshots.state() or await self._mend()
        snapshot = await self._snapshots.read(state, known=self._snapshot)
        if snapshot is not None:
            return snapshot
        forgotten = attrs.evolve(state, generation="")
        await self._snapshots.take(self.path, spawned=state.spawned_boottime, known=forgotten)
        return await self._load_snapshot()

    # -- mending -------------------------------------------------------------------------------------------------

    async def _mend(self) -> MirrorState:
        """Write the state anew, from the refs where they can be read, else from the remote; we hold the lock."""
        try:
            await self._snapshots.take(self.path, spawned=_LONG_AGO)
        except (GitOperationError, OSError) as error:
            _log.warning("%s: the mirror is damaged or missing and cloned anew: %s", self._repo_name, error)
            await self._build()
        state = await self._snapshots.state()
        if state is None:
            raise GitMirrorDamagedError(
                f"{self._repo_name}: {self.path}/repopool/state.json does not stay; see who writes there",
                operation="snapshot", repo_name=self._repo_name,
            )  # fmt: skip
        return state


def _is_same(one: FileStat | None, other: FileStat | None) -> bool:
    return (one and (one.device, one.inode)) == (other and (other.device, other.inode))


def _told_to_waiters(name: str, error: BaseException) -> None:
    """A fetch's failure is raised to everybody who waits for it; there is nothing more to report."""
