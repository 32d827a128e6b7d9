"""Keeps what lessees left unpushed: commits, stashes, changed and untracked files, one commit per lease.

That commit lies under `refs/salvage/<lease id>` in the pool's `salvage.git`, which borrows the mirror's objects and
which no slot borrows from. Its tree is the working tree, its first parent the lessee's HEAD, its further parents the
other branches and the stashes; what else is known is JSON in its message. Reading a lessee's remains is
`salvage_reader`'s business; when a lease's work is due to be saved is the keeper's.
"""

from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from datetime import datetime
from typing import Any, Final, Protocol
from uuid import uuid4

import attrs

from repopool_async._aio import shielded
from repopool_async._clock import now
from repopool_async._codec import CodecError, dumps, loads
from repopool_async._git import WORK_MARK, GitRunner, validate_branch_name
from repopool_async.exceptions import RefError, SalvageNotFoundError
from repopool_async.hosts.base import CopyFile, Discard, FileStep, Host, MakeDirectory, WriteFile
from repopool_async.mirror import Mirror
from repopool_async.models import CommandResult, GitResult, RestoredSalvage, SalvageRecord, Slot
from repopool_async.repository_lock import RepositoryLock
from repopool_async.salvage_reader import EXCLUDE_PROMISED, LeftWork, SalvageReader
from repopool_async.shared_state import Locks
from repopool_async.workspaces.base import WorkspaceStrategy

SALVAGE_LOCKS: Final = "salvage-"
"""How the locks of pools' saved work begin; whoever holds one next must know that its last holder died."""

_REFS: Final = "refs/salvage"
_IDENTITY: Final = {
    "GIT_AUTHOR_NAME": "repopool",
    "GIT_AUTHOR_EMAIL": "repopool@localhost",
    "GIT_COMMITTER_NAME": "repopool",
    "GIT_COMMITTER_EMAIL": "repopool@localhost",
}
_DURABLE: Final = {"core.fsync": "objects,reference"}
_SKIPPED_SHOWN: Final = 500
_BOUNDARY: Final = 200
_MOMENT_SECONDS: Final = 60.0
"""How long a git may take that only changes refs; more than a moment only where hooks of the lessee's do."""
_BUNDLE_BYTES: Final = 4 * 1024**3
"""How much saved work can be brought to another machine at once."""
_SHORT: Final = 8
_SHORTEST: Final = 4


class RunCommand(Protocol):
    """Runs a command where saved work shall be brought back to, raising where it fails."""

    def __call__(
        self,
        *argv: str,
        env: Mapping[str, str] | None = None,
        input: bytes | None = None,
        timeout: float | None = None,
    ) -> Coroutine[Any, Any, CommandResult]:
        """Run it to its end."""


class Salvage:
    """The saved work of one pool. Several processes may use one directory.

    Args:
        pool_directory: on the host, where everything lies. workspace: knows what a lessee's tree was like.
        git: the pool's. lock_id: another name for the lock than `salvage-<repo_name>`.
    """

    def __init__(
        self,
        repo_name: str,
        pool_directory: str,
        *,
        host: Host,
        git: GitRunner,
        mirror: Mirror,
        locks: Locks,
        workspace: WorkspaceStrategy,
        lock_id: str | None = None,
    ) -> None:
        self.path: Final = f"{pool_directory}/salvage.git"
        self.failed_path: Final = f"{pool_directory}/salvage-failed"
        self._repo_name = repo_name
        self._work_path = f"{pool_directory}/salvage-work"
        self._trash = f"{pool_directory}/trash"
        self._host = host
        self._git = git
        self._mirror = mirror
        self._workspace = workspace
        self._lock = RepositoryLock(self.path, host=host, locks=locks, lock_id=lock_id or f"{SALVAGE_LOCKS}{repo_name}")

    # -- saving --------------------------------------------------------------------------------------------------

    async def save(self, slot: Slot, *, limit_bytes: int) -> SalvageRecord | None:
        """Save the last lease's unpushed work, from a slot that is held and in which nothing of the lease runs.

        Args:
            limit_bytes: how much; what fits is taken in the order commits, stash, changed files, untracked files, and
                the record names the rest.

        Returns:
            None where there is nothing to save.

        Raises:
            PoolManagerError, OSError: it could not be saved; call `set_aside`.

        Nothing that the lessee planted is executed or believed. Special files and git directories inside the tree are
        taken out of it. Cancelled, it may be called again.
        """
        salvage_id = _id_of(slot)
        saved = await self._find_exactly(salvage_id)
        if saved is not None or not _was_handed_out(slot):
            return saved
        remains = await self._workspace.remains(slot)
        if remains is None:
            return None
        common = f"{self._work_path}/{salvage_id}"
        directory = f"{common}.{slot.token}"  # whoever takes the slot over meanwhile has a greater token
        reader = SalvageReader(
            slot, remains, directory, f"{common}/nested",
            host=self._host, git=self._git, mirror=self._mirror, limit_bytes=limit_bytes,
        )  # fmt: skip
        work = await reader.read()
        record = None
        if work is not None:
            record = await self._keep(_record(slot, salvage_id, remains.base, work), work, reader.repository)
        await self._host.apply([Discard(directory, self._trash), Discard(common, self._trash)])
        return record

    async def set_aside(self, slot: Slot, why: BaseException) -> str:
        """Move a tree whose work could not be saved out of the slot, as it is, and return where it lies now.

        Raises:
            OSError: it could not be moved.
        """
        salvage_id = _id_of(slot)
        target = f"{self.failed_path}/{salvage_id}"
        about = {"slot": slot.slot_id, "why": str(why) or type(why).__name__, "at": now().isoformat()}
        text = "".join(f"{name}: {value}\n" for name, value in about.items())
        common = f"{self._work_path}/{salvage_id}"
        await self._host.apply(
            [
                MakeDirectory(target),
                WriteFile(f"{target}/about.txt", text.encode(errors="surrogateescape")),
                # The tree last: without it whoever comes after a death here finds nothing to save, and this to sweep.
                Discard(f"{common}/nested", f"{target}/nested"),
                Discard(slot.path, f"{target}/trees"),
                Discard(f"{common}.{slot.token}", self._trash),
                Discard(common, self._trash),
            ]
        )
        return target

    async def _keep(self, record: SalvageRecord, work: LeftWork, repository: str) -> SalvageRecord:
        """Make the commit, bring it and all that it needs into `salvage.git`, and only then name it."""
        commit = await self._commit(record, work, repository)
        boundary = await self._boundary(commit, repository)
        promises = self._mirror.promises
        missing, promised = (("--missing=allow-promisor",), (EXCLUDE_PROMISED,)) if promises else ((), ())
        async with self._lock.alone():  # others would prune what was packed and is not named yet
            await self._make_repository()
            revisions = "".join(f"{line}\n" for line in (commit, "--not", *boundary)).encode()
            await self._git.run(
                *("pack-objects", "-q", *missing, "--revs", "--local", "--delta-base-offset"),
                f"{self.path}/objects/pack/pack",
                git_dir=repository, input=revisions, config={**_DURABLE, **promises}, repo_name=self._repo_name,
            )  # fmt: skip
            # The mirror's maintenance must not prune what the saved commits stand on.
            for number, base in enumerate(boundary):
                await self._mirror.keep(f"salvage-{record.salvage_id}-{number}", base)
            await self._run(
                "rev-list", "--objects", *promised, "--quiet", commit, "--not", "--alternate-refs", config=promises
            )
            await self._change("update-ref", "--no-deref", f"{_REFS}/{record.salvage_id}", commit)
        return attrs.evolve(record, commit=commit)

    async def _commit(self, record: SalvageRecord, work: LeftWork, repository: str) -> str:
        title = f"Work left in {record.slot_id} ({record.reason})"
        message = title.encode() + b"\n\n" + dumps(record)
        parents = [word for parent in work.parents for word in ("-p", parent)]
        made = await self._git.run(
            "commit-tree", *parents, "-F", "-", work.tree,
            git_dir=repository, input=message, env=_IDENTITY, repo_name=self._repo_name,
        )  # fmt: skip
        return made.text

    async def _boundary(self, commit: str, repository: str) -> list[str]:
        """Return the mirror's commits that the new ones stand on."""
        listing = await self._git.run(
            "rev-list", "--boundary", commit, "--not", "--alternate-refs",
            git_dir=repository, repo_name=self._repo_name,
        )  # fmt: skip
        return [line[1:] for line in listing.text.splitlines() if line.startswith("-")][:_BOUNDARY]

    async def _make_repository(self) -> None:
        if await self._host.stat(f"{self.path}/HEAD") is not None:
            return
        snapshot = await self._mirror.snapshot()
        is_sha1 = snapshot.object_format == "sha1"
        config = f"[core]\n\trepositoryformatversion = {0 if is_sha1 else 1}\n\tbare = true\n"
        config += "" if is_sha1 else f"[extensions]\n\tobjectformat = {snapshot.object_format}\n"
        steps: list[FileStep] = [
            *(MakeDirectory(f"{self.path}/{name}") for name in ("objects/info", "objects/pack", "refs/salvage")),
            WriteFile(f"{self.path}/config", config.encode()),
            WriteFile(
                f"{self.path}/objects/info/alternates", f"{self._mirror.objects}\n".encode(errors="surrogateescape")
            ),
            CopyFile(f"{self._mirror.path}/shallow", f"{self.path}/shallow", is_optional=True),
            WriteFile(f"{self.path}/HEAD", b"ref: refs/heads/none\n"),
        ]
        await self._host.apply(steps)

    # -- looking -------------------------------------------------------------------------------------------------

    async def records(self) -> list[SalvageRecord]:
        """Return everything that was saved, the oldest first."""
        return await self._read(_REFS)

    async def find(self, salvage_id: str) -> SalvageRecord:
        """Return what was saved under an id or the unique beginning of one.

        Raises:
            SalvageNotFoundError: there is no such id, or there are several.
        """
        found = [record for record in await self.records() if record.salvage_id.startswith(salvage_id)]
        if len(found) != 1 or len(salvage_id) < _SHORTEST:
            what = "several begin so" if len(found) > 1 else "there is none of that id"
            raise SalvageNotFoundError(
                f"{self._repo_name}: no saved work {salvage_id!r}: {what}; list_salvage tells the ids",
                repo_name=self._repo_name,
            )
        return found[0]

    async def describe(self, record: SalvageRecord) -> str:
        """Return what the files saved differ in from the lessee's HEAD, as git's table of changes."""
        listing = await self._run(
            "diff-tree", "--stat=120", "--summary", "--no-ext-diff", "--no-textconv", record.head, record.commit
        )
        return listing.stdout.decode(errors="replace").rstrip()

    async def _find_exactly(self, salvage_id: str) -> SalvageRecord | None:
        return next(iter(await self._read(f"{_REFS}/{salvage_id}")), None)

    async def _read(self, pattern: str) -> list[SalvageRecord]:
        if await self._host.stat(f"{self.path}/HEAD") is None:
            return []
        listing = await self._run("for-each-ref", "--format=%(objectname)%00%(contents:body)%00", pattern)
        words = listing.stdout.split(b"\0")
        records = []
        for commit, body in zip(words[0::2], words[1::2], strict=False):
            try:
                record = loads(SalvageRecord, body.strip())
            except CodecError:
                continue  # a ref that somebody else put there
            records.append(attrs.evolve(record, commit=commit.decode().strip()))
        return sorted(records, key=lambda record: record.created_at)

    # -- bringing back -------------------------------------------------------------------------------------------

    async def restore(
        self, record: SalvageRecord, run: RunCommand, *, branch: str | None, is_clean: bool, is_here: bool = True
    ) -> RestoredSalvage:
        """Bring saved work into a clone of the repository, as whoever `run` acts for.

        Args:
            branch: what to call the lessee's HEAD; `salvage/<short id>` where missing. Other branches are called
                `<branch>.<their name>`.
            is_clean: whether to check the files out and to make stash entries; otherwise the files become the branch
                `<branch>.files` and each stash a branch `<branch>.stash-<n>`.
            is_here: whether the clone lies where this does, and `run` acts for somebody who can read this. Otherwise it
                goes through this process's memory.

        Raises:
            RefError: no branch can be called so. PoolManagerError: git refused, because a branch of that name exists
            and is at another commit; then none has been made.

        Cancelled, it may be called again, and goes by what has been made by then.
        """
        name = validate_branch_name(branch or f"salvage/{record.salvage_id[:_SHORT]}")
        ref = f"{_REFS}/{record.salvage_id}"
        if is_here:
            await run(
                "git", "-c", "protocol.file.allow=always", "fetch", "--quiet", "--no-tags", "--no-write-fetch-head",
                "--no-recurse-submodules", "--no-auto-maintenance", "--end-of-options", self.path, ref,
                env={"GIT_ALLOW_PROTOCOL": "file"},
            )  # fmt: skip
        else:
            await self._send(record, ref, run)
        branches = _branches_of(record, name, with_files=not is_clean)
        await self._make_branches(branches, run, saved=f"update {ref} {record.commit}\n")
        if is_clean:
            await self._check_out(record, run, name)
        return RestoredSalvage(
            branch=name,
            branches=tuple(branches),
            stashes=len(record.stash_commits) if is_clean else 0,
            is_checked_out=is_clean,
        )

    async def _send(self, record: SalvageRecord, ref: str, run: RunCommand) -> None:
        """Bring what a clone lacks of saved work, which it cannot fetch, into it, in one pack."""
        commit = f"{record.commit}\n".encode()
        if b" missing" not in (await run("git", "cat-file", "--batch-check", input=commit)).stdout:
            return
        tips = (await run("git", "for-each-ref", "--format=^%(objectname)")).stdout
        bundle = await self._git.run(
            *("bundle", "create", "--quiet", "-", "--ignore-missing", "--stdin"),
            git_dir=self.path,
            input=f"{ref}\n".encode() + tips,
            repo_name=self._repo_name,
            stdout_limit=_BUNDLE_BYTES,
        )
        pack = bundle.stdout.partition(b"\n\n")[2]
        await run("git", "index-pack", "--fix-thin", "--stdin", input=pack)
        await run("git", "rev-list", "--quiet", "--objects", record.commit, "--not", "--all", "--")

    async def _make_branches(self, branches: Mapping[str, str], run: RunCommand, *, saved: str) -> None:
        """Make all of them or none; those that a call made which was cancelled afterwards stay.

        Args:
            saved: the line that makes the ref by which all that was saved stays.
        """
        listing = await run("git", "for-each-ref", "--format=%(refname) %(objectname)", "refs/heads/")
        present = set(listing.stdout.splitlines())
        wanted = [f"refs/heads/{name} {commit}".encode(errors="surrogateescape") for name, commit in branches.items()]
        missing = b"".join(b"create %s\n" % line for line in wanted if line not in present)
        command = ("git", "update-ref", "-m", "repopool: saved work brought back", "--stdin")
        await _undisturbed(run(*command, input=saved.encode() + missing, timeout=_MOMENT_SECONDS))

    async def _check_out(self, record: SalvageRecord, run: RunCommand, branch: str) -> None:
        await run("git", "checkout", "--quiet", "--no-recurse-submodules", branch, "--")
        if record.files_changed or record.untracked:
            await run("git", "restore", "--worktree", f"--source={record.commit}", "--", ":/")
        if not record.stash_commits:
            return
        present = (await run("git", "stash", "list", "--format=%H")).stdout.decode().split()
        for commit, message in reversed([*zip(record.stash_commits, record.stash_messages, strict=True)]):
            if commit in present:
                continue
            command = ("git", "stash", "store", "--quiet", "-m", message or "salvaged", commit)
            await _undisturbed(run(*command, timeout=_MOMENT_SECONDS))

    # -- forgetting ----------------------------------------------------------------------------------------------

    async def delete(self, salvage_id: str) -> None:
        """Delete saved work and the objects that only it needed.

        Raises:
            SalvageNotFoundError: there is none of that id.
        """
        await self._forget([(await self.find(salvage_id)).salvage_id])

    async def expire(self, before: datetime) -> list[str]:
        """Delete what was saved, or set aside, before a moment; return the ids."""
        old = [record.salvage_id for record in await self.records() if record.created_at < before]
        if old:
            await self._forget(old)
        for name in await self._host.list_directory(self.failed_path):
            about = await self._host.stat(f"{self.failed_path}/{name}/about.txt")
            if about is not None and about.mtime_ns < before.timestamp() * 1e9:
                await self._host.apply([Discard(f"{self.failed_path}/{name}", self._trash)])
                old.append(name)
        return old

    async def sweep(self, in_use: Callable[[], Awaitable[Collection[str]]]) -> None:
        """Discard what killed processes left half read, but for the leases that are still to be saved.

        Args:
            in_use: returns the ids of those leases, as they are when it is called.
        """
        names = await self._host.list_directory(self._work_path)
        if names:
            kept = await in_use()
            await self._host.apply(
                [
                    Discard(f"{self._work_path}/{name}", self._trash)
                    for name in names
                    if name.partition(".")[0] not in kept
                ]
            )

    async def _forget(self, salvage_ids: list[str]) -> None:
        async with self._lock.alone():
            asked = "".join(f"delete {_REFS}/{salvage_id}\n" for salvage_id in salvage_ids).encode()
            await self._change("update-ref", "--no-deref", "--stdin", input=asked)
            await self._change("repack", "-a", "-d", "-l", "-q", "--no-write-bitmap-index")
            await self._change("prune", "--expire=now")
        await self._mirror.unkeep_matching(*(f"salvage-{salvage_id}-*" for salvage_id in salvage_ids))

    async def _run(self, *args: str, config: Mapping[str, str] | None = None) -> GitResult:
        return await self._git.run(*args, git_dir=self.path, config=config, repo_name=self._repo_name)

    async def _change(self, *args: str, input: bytes | None = None) -> None:
        """Run git that writes; whoever holds the lock after our death ends it."""
        await self._git.run(
            *args, git_dir=self.path, input=input, config={**_DURABLE, **self._mirror.promises},
            repo_name=self._repo_name, env={WORK_MARK: self.path},
        )  # fmt: skip


async def _undisturbed(git: Coroutine[Any, Any, CommandResult]) -> None:
    """Have a git that changes refs finish: one that is killed just as it makes a lock file leaves that behind."""
    await shielded(git, name="restore-salvage")


def _id_of(slot: Slot) -> str:
    return slot.lease.lease_id if slot.lease is not None else uuid4().hex


def _was_handed_out(slot: Slot) -> bool:
    """Return False where the lessee's process died before it got the slot: the tree may be half checked out."""
    if slot.lease is None or slot.lease.commit is None or slot.seal is None:
        return True
    return slot.lease.commit == slot.seal.commit


def _record(slot: Slot, salvage_id: str, base: str, work: LeftWork) -> SalvageRecord:
    lease = slot.lease
    skipped = [*work.lost, *work.odd]
    if len(skipped) > _SKIPPED_SHOWN:
        skipped = [*skipped[:_SKIPPED_SHOWN], f"and {len(skipped) - _SKIPPED_SHOWN} more"]
    return SalvageRecord(
        salvage_id=salvage_id,
        repo_name=slot.repo_name,
        slot_id=slot.slot_id,
        lease_id=lease.lease_id if lease else "",
        commit="",
        reason=slot.unsaved or "",
        created_at=now(),
        base=base,
        head=work.head,
        branch=work.branch,
        ref=lease.ref if lease else None,
        token=lease.token if lease else slot.token,
        owner=lease.owner if lease else None,
        branches=work.branches,
        stash_commits=tuple(commit for commit, _ in work.stashes),
        stash_messages=tuple(message for _, message in work.stashes),
        files_changed=work.files_changed,
        untracked=work.untracked,
        commits=work.commits,
        stashes=len(work.stashes),
        skipped=tuple(skipped),
        size_bytes=work.size_bytes,
        metadata=lease.metadata if lease else {},
    )


def _branches_of(record: SalvageRecord, branch: str, *, with_files: bool) -> dict[str, str]:
    branches = {branch: record.head}
    for name, commit in record.branches.items():
        if name != record.branch and _can_be_branch(f"{branch}.{name}"):
            branches[f"{branch}.{name}"] = commit
    if with_files:
        if record.files_changed or record.untracked:
            branches[f"{branch}.files"] = record.commit
        branches |= {f"{branch}.stash-{number}": commit for number, commit in enumerate(record.stash_commits)}
    return branches


def _can_be_branch(name: str) -> bool:
    try:
        validate_branch_name(name)
    except RefError:
        return False
    return True
