"""Git verbs on any checkout, each taking its directory first, run as whoever calls would run them by hand.

The user's configuration, hooks and keys are in force, prompts are not; a verb acts on the directory it is given and
never on a repository around it. Errors worth it are tried three times. The pool does not clean its slots with these
(their git directories are a lessee's): that is `workspaces`; leases, locks and mirrors are not known here.
"""

import os
import posixpath
import re
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from repopool_async._aio import in_thread, shielded, together
from repopool_async._git import (
    DEFAULT_PROTOCOLS,
    Credentials,
    GitRunner,
    lessee_environment,
    split_credentials,
    validate_branch_name,
    validate_ref,
    validate_url,
    with_credentials,
)
from repopool_async.exceptions import ConfigError, EmptyRepositoryError, GitOperationError, GitSlotDamagedError
from repopool_async.hosts.base import FileKind, FileStep, Host, MakeDirectory, Rename
from repopool_async.models import GitResult

StrPath = str | os.PathLike[str]

_FULL_ID: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REVISION: Final = re.compile(r"(?P<name>.*?)(?:[~^][0-9]*)*", re.DOTALL)
_PATTERN_CHARACTERS: Final = re.compile(r"([\\*?\[ ])")


class GitOperations:
    """Git on checkouts of your own, or of your slot.

    Every verb raises a `GitOperationError` whose class says what went wrong (`GitSlotDamagedError` where the directory
    has no usable git directory of its own), and `PlatformNotSupportedError` where there is no git. Cancelling one ends
    git and all it started; a lock file that git could not remove any more is then left behind.

    Args:
        host: where the directories lie; this machine by default.
        runner: how git is run, instead of in the caller's own environment (`host` is then the runner's).
    """

    def __init__(self, host: Host | None = None, *, runner: GitRunner | None = None) -> None:
        if runner is None:
            runner = GitRunner(host or _local_host(), environment=lessee_environment())
        self.runner: Final = runner

    def __repr__(self) -> str:
        return f"<GitOperations on {self.runner.host.id}>"

    # -- getting -------------------------------------------------------------------------------------------------

    async def clone_repo(
        self,
        url: str,
        directory: StrPath,
        *,
        ref: str | None = None,
        reference: StrPath | None = None,
        depth: int | None = None,
        allow_protocols: Sequence[str] = DEFAULT_PROTOCOLS,
    ) -> GitResult:
        """Clone a repository; afterwards the directory is a complete clone or, on an error, as it was before.

        Args:
            url: credentials in a web URL are used and not stored (pass them to `fetch_all` again).
            directory: absent or empty; missing parents are made.
            ref: what to check out: branch, tag, full name or full commit id; the remote's HEAD where missing.
            reference: a local repository to borrow objects from; it must live as long as the clone.
            depth: how many commits of each history to get.

        Raises:
            RepositoryUrlError, RefError: the text is none. GitRefMissingError: the remote has no such ref.
        """
        clean_url, credentials = split_credentials(validate_url(url, allow_protocols))
        later = ref is not None and (ref.startswith("refs/") or _FULL_ID.fullmatch(ref) is not None)
        options = ["--progress", *(["--no-checkout"] if later else [])]
        if ref is not None and validate_ref(ref) and not later:
            options += ["--branch", ref]
        if reference is not None:
            options += ["--reference", await _absolute(reference)]
        if depth is not None:
            options += ["--depth", str(int(depth))]
        runner = self._with(credentials)
        async with self._made_beside(await _absolute(directory)) as beside:
            result = await runner.run(
                "clone", *options, "--end-of-options", clean_url, beside, retry=True, remove_before_retry=beside
            )
            if ref is not None and later:
                await self._check_out_unborn(runner, beside, ref)
        return result

    async def _check_out_unborn(self, runner: GitRunner, clone: str, ref: str) -> None:
        """Check out what `clone --branch` does not take: a full name, or a commit that no branch may lead to."""
        branch = ref.removeprefix("refs/heads/")
        if branch != ref:
            await self._run(clone, "checkout", branch, "--", runner=runner)
            return
        wanted = ref
        known = await self._run(clone, "cat-file", "-e", "--end-of-options", f"{ref}^{{commit}}", ok_codes=(0, 1, 128))
        if not known.success:
            await self._run(clone, "fetch", "--progress", "--end-of-options", "origin", ref, runner=runner)
            wanted = "FETCH_HEAD"
        await self._run(clone, "checkout", "--detach", wanted, "--", runner=runner)

    @asynccontextmanager
    async def _made_beside(self, target: str) -> AsyncIterator[str]:
        """Give a path to make a directory at, and put it in the target's place once that has succeeded."""
        host = self.runner.host
        there = await host.stat(target)
        if there is not None and (there.kind is not FileKind.DIRECTORY or await host.list_directory(target)):
            raise GitOperationError(
                f"git clone refused: {target} exists and is not an empty directory; remove it, or clone elsewhere",
                operation="clone",
            )
        beside = f"{target}.clone-{secrets.token_hex(4)}"
        await self._apply(MakeDirectory(target.rpartition("/")[0] or "/"))
        try:
            yield beside
            await self._apply(Rename(beside, target))
        except BaseException as failure:
            try:
                await shielded(host.remove_tree(beside), name="remove-half-clone")
            except OSError as error:
                failure.add_note(f"{beside} could not be removed: {error}")
            raise

    async def _apply(self, step: FileStep) -> None:
        try:
            await self.runner.host.apply([step])
        except OSError as error:
            raise GitOperationError(f"git clone failed: {error}", operation="clone") from error

    async def fetch_all(
        self, directory: StrPath, *, prune: bool = True, credentials: Credentials | None = None
    ) -> GitResult:
        """Fetch all remotes: side by side where each has remote-tracking branches of its own, else one by one.

        Measured: fetches of one repository side by side never disturbed each other as long as their refs were apart
        (180 of 180, pruning and the same tags included), and failed always where they were not (30 of 30).

        Args:
            prune: forget remote-tracking branches that the remote no longer has.
            credentials: offered to the server they belong to.

        Returns:
            One result for all remotes; `attempts` is the most that one of them took.
        """
        names = (await self._run(directory, "remote")).text.split()
        runner = self._with(credentials)
        results: dict[str, GitResult] = {}

        def fetching(name: str) -> Callable[[], Coroutine[Any, Any, None]]:
            async def fetch() -> None:
                results[name] = await self._run(
                    directory,
                    *("fetch", "--progress", "--no-write-fetch-head", "--no-auto-maintenance"),
                    *(["--prune"] if prune else []),
                    *("--end-of-options", name),
                    runner=runner,
                )

            return fetch

        if await self._are_refs_apart(directory, names):
            await together(*[fetching(name) for name in names])
        else:
            for name in names:
                await fetching(name)()
        return _merged([results[name] for name in names])

    async def _are_refs_apart(self, directory: StrPath, remotes: Sequence[str]) -> bool:
        """Say whether every refspec ends in its own remote's part of `refs/remotes`, and no part lies in another."""
        configured = await self._run(directory, "config", "-z", "--get-regexp", r"^remote\..*\.fetch$", ok_codes=(0, 1))
        for entry in configured.stdout.decode(errors="surrogateescape").split("\0"):
            key, _, refspec = entry.partition("\n")
            name = key.removeprefix("remote.").removesuffix(".fetch")
            if entry and not refspec.partition(":")[2].startswith(f"refs/remotes/{name}/"):
                return False
        return not any(one.startswith(f"{other}/") for one in remotes for other in remotes)

    # -- changing ------------------------------------------------------------------------------------------------

    async def clean(self, directory: StrPath, keep: Sequence[str] = ()) -> GitResult:
        """Remove what git does not track, ignored files and nested repositories included.

        Args:
            keep: paths relative to the directory that stay, with all they contain.

        Raises:
            ConfigError: a path to keep leads out of the directory.
        """
        excluded = [f"--exclude={_pattern(path)}" for path in keep]
        return await self._run(directory, "clean", "-ffdx", *excluded)

    async def reset_hard(self, directory: StrPath, ref: str | None = None) -> GitResult:
        """Make index and tracked files those of a commit; the current branch moves there.

        Args:
            ref: branch, tag or commit, also with `~1` or `^`; HEAD where missing.
        """
        return await self._run(directory, "reset", "--hard", _revision(ref or "HEAD"), "--")

    async def checkout(
        self, directory: StrPath, ref: str, *, create: bool = False, force: bool = False, start: str | None = None
    ) -> GitResult:
        """Check out a branch, tag or commit; a branch that only one remote has becomes a local one that tracks it.

        Args:
            create: make a new branch of that name first. start: where it begins; HEAD where missing.
            force: throw away changes that are in the way.

        Raises:
            GitRefMissingError: there is no such ref. RefError: the text is none.
        """
        options = ["--force"] if force else []
        if not create:
            return await self._run(directory, "checkout", *options, _revision(ref), "--")
        begin = [_revision(start), "--"] if start is not None else []
        return await self._run(directory, "checkout", *options, "-b", validate_branch_name(ref), *begin)

    # -- asking --------------------------------------------------------------------------------------------------

    async def get_current_branch(self, directory: StrPath) -> str | None:
        """Return the branch checked out, None where HEAD is detached."""
        result = await self._run(directory, "symbolic-ref", "--quiet", "HEAD", ok_codes=(0, 1))
        return result.text.removeprefix("refs/heads/") or None

    async def get_current_commit(self, directory: StrPath) -> str:
        """Return the full id of the commit HEAD is at.

        Raises:
            EmptyRepositoryError: there is no commit yet.
        """
        result = await self._run(directory, "rev-parse", "--quiet", "--verify", "HEAD^{commit}", ok_codes=(0, 1))
        if not result.success:
            raise EmptyRepositoryError(
                f"{os.fspath(directory)} has no commit yet; make one, or check out a branch that has",
                operation="rev-parse",
                exit_code=result.exit_code,
            )
        return result.text

    async def list_remote_branches(self, directory: StrPath, remote: str | None = None) -> list[str]:
        """Return the remote-tracking branches, `origin/main` and so on, as of the last fetch.

        Args:
            remote: only those of this remote.
        """
        prefix = "refs/remotes" if remote is None else f"refs/remotes/{validate_ref(remote)}"
        result = await self._run(directory, "for-each-ref", "--format=%(refname) %(symref)", "--end-of-options", prefix)
        found = (line.partition(" ") for line in result.text.splitlines())
        return [name.removeprefix("refs/remotes/") for name, _, target in found if not target.strip()]

    async def is_clean_working_tree(self, directory: StrPath, *, include_ignored: bool = False) -> bool:
        """Return whether nothing is modified, staged or untracked (nor ignored, where that counts)."""
        result = await self._run(
            directory,
            *("status", "--porcelain=v2", "-z", "--untracked-files=normal", "--no-renames"),
            *(["--ignored"] if include_ignored else []),
            env={"GIT_OPTIONAL_LOCKS": "0"},
        )
        return not result.stdout

    # -- running -------------------------------------------------------------------------------------------------

    async def _run(
        self,
        directory: StrPath,
        *args: str,
        runner: GitRunner | None = None,
        ok_codes: Sequence[int] = (0,),
        env: Mapping[str, str] | None = None,
    ) -> GitResult:
        path = await _absolute(directory)
        runner = runner or self.runner
        if await runner.host.stat(f"{path}/.git") is None:
            raise GitSlotDamagedError(
                f"git {args[0]} refused: {path} is no git checkout (it has no .git); clone_repo makes one",
                operation=args[0],
            )
        # Looking for the git directory in `path` alone keeps git's check of its owner; the tree is named because a
        # configuration may say that it lies elsewhere; a bare repository among the files is nobody's git directory.
        return await runner.run(
            *args,
            work_tree=path,
            cwd=path,
            config={"safe.bareRepository": "explicit"},
            ok_codes=ok_codes,
            env=env,
            retry=True,
        )

    def _with(self, credentials: Credentials | None) -> GitRunner:
        return self.runner.bind(environment=with_credentials(self.runner.environment, credentials))


def _local_host() -> Host:
    from repopool_async.hosts.local import LocalHost  # noqa: PLC0415 - only where no other host is given

    return LocalHost()


async def _absolute(path: StrPath) -> str:
    """Return a path as the host wants it; links are not followed."""
    text = os.fspath(path)
    return posixpath.normpath(text) if text.startswith("/") else await in_thread(os.path.abspath, text)


def _revision(text: str) -> str:
    """Return a revision that git may be given: a ref, with any number of `~1` and `^` behind it."""
    match = _REVISION.fullmatch(text)
    validate_ref(match["name"] if match else text)
    return text


def _pattern(path: str) -> str:
    """Return the ignore pattern that means exactly one path."""
    parts = path.strip("/").split("/")
    if path.startswith("/") or {"", ".", ".."} & set(parts) or "\n" in path:
        raise ConfigError(f"{path!r} cannot be kept: give a path inside the directory, relative to it", key="keep")
    return "/" + _PATTERN_CHARACTERS.sub(r"\\\1", "/".join(parts))


def _merged(results: Sequence[GitResult]) -> GitResult:
    return GitResult(
        args=("fetch", "--all"),
        exit_code=max((result.exit_code for result in results), default=0),
        stdout=b"".join(result.stdout for result in results),
        stderr="\n".join(result.stderr for result in results if result.stderr),
        duration_seconds=max((result.duration_seconds for result in results), default=0.0),
        attempts=max((result.attempts for result in results), default=1),
    )
