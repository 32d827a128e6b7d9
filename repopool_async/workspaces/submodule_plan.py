"""Which submodules a commit has, nested ones too: read from mirrors, checked, and their commits fetched.

The result is a `Plan`. No slot is touched here, so that what is refused or cannot be had is known before one is; what
is refused is said in `gitmodules`, what becomes of a plan in `submodules`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from repopool_async._aio import together
from repopool_async._git import GitRunner
from repopool_async._git_arguments import split_credentials
from repopool_async.exceptions import (
    GitAccessError,
    GitDiskFullError,
    GitMirrorDamagedError,
    GitOperationError,
    GitTransientError,
    SubmoduleError,
    UnknownRefError,
)
from repopool_async.git_directory import SubmoduleEntry
from repopool_async.mirror import Mirror
from repopool_async.models import GitResult
from repopool_async.workspaces.gitmodules import Commit, Declared, RefusedError, declared, read_tree, resolved_url

_DEPTH_LIMIT: Final = 10
_COUNT_LIMIT: Final = 5000
_PASSES: Final = (GitTransientError, GitAccessError, GitDiskFullError, GitMirrorDamagedError)
"""Failures that mean the same whichever repository they are about."""


@attrs.frozen
class Submodule:
    """One submodule of a commit, checked out.

    Attributes:
        path: its place in the tree. git_path: of its git directory below `.git`, `modules/<name>`.
        url: without credentials. commit: that it stands at. depth: how many repositories it is inside of, less one.
        places: the places of its own submodules, checked out or not; in the tree, like `path`.
    """

    path: str
    git_path: str
    url: str
    commit: str
    depth: int = 0
    places: tuple[str, ...] = ()

    @property
    def gitfile(self) -> str:
        """The place of the file by which git finds the git directory from the submodule's files."""
        return f"{self.path}/.git"

    def is_same_place(self, other: "Submodule") -> bool:
        """Return whether another commit's submodule is this one, perhaps at another commit."""
        return (self.path, self.git_path, self.url) == (other.path, other.git_path, other.url)


@attrs.frozen
class Plan:
    """What a commit's submodules are.

    Attributes:
        submodules: those to be checked out; the outer before what is inside of them.
        entries: those that the configuration of a repository names, by its git directory ("" is the top); None where
            submodules are left alone.
    """

    submodules: tuple[Submodule, ...] = ()
    entries: Mapping[str, tuple[SubmoduleEntry, ...]] | None = None

    @property
    def places(self) -> tuple[str, ...]:
        """The places of submodules inside of submodules."""
        return tuple(place for submodule in self.submodules for place in submodule.places)


@attrs.frozen
class _Repository:
    """A repository at a commit, while its submodules are being read: the pool's, or a submodule itself."""

    mirror: Mirror
    commit: str
    path: str = ""
    git_path: str = ""
    depth: int = 0

    def inside(self, name: str) -> str:
        """Return what a path of the repository's is in the whole tree."""
        return f"{self.path}/{name}" if self.path else name


class PlanReader:
    """Reads one commit's submodules, repositories side by side.

    Args:
        mirror: of the pool; it gives the submodules' mirrors. allow_protocols: by which these may be reached.

    Attributes:
        mirrors: of the submodules found, by URL.
    """

    def __init__(self, mirror: Mirror, git: GitRunner, allow_protocols: Sequence[str]) -> None:
        self.mirrors: dict[str, Mirror] = {}
        self._mirror = mirror
        self._git = git
        self._allow_protocols = allow_protocols
        self._count = 0
        self._found: list[Submodule] = []
        self._entries: dict[str, tuple[SubmoduleEntry, ...]] = {}

    async def plan(self, commit: str) -> Plan:
        """Return a commit's plan; every commit in it is in its mirror then.

        Raises:
            SubmoduleError: one is refused, or its repository cannot be had. UnknownRefError: its commit is not there.
            GitTransientError, GitAccessError, GitDiskFullError, GitMirrorDamagedError: of its repository.
        """
        await self._read(_Repository(self._mirror, commit))
        return Plan(tuple(sorted(self._found, key=lambda submodule: submodule.path.split("/"))), self._entries)

    async def _read(self, repository: _Repository) -> tuple[str, ...]:
        """Note a repository's submodules and theirs; return the places of its own."""
        commit, found = await self._declared(repository)
        urls = {item.path: self._url(repository, item) for item in found}
        self._entries[repository.git_path] = tuple(
            SubmoduleEntry(item.name, split_credentials(urls[item.path])[0], item.update) for item in found
        )
        wanted = [item for item in found if item.update != "none"]
        self._count += len(wanted)
        if self._count > _COUNT_LIMIT:
            raise self._refused(repository, wanted[0], f"there are more than {_COUNT_LIMIT} submodules")
        if wanted and repository.depth >= _DEPTH_LIMIT:
            raise self._refused(repository, wanted[0], f"it lies inside of {_DEPTH_LIMIT} others")
        await together(*[functools.partial(self._add, repository, item, urls[item.path], commit) for item in wanted])
        return tuple(repository.inside(name) for name in commit.gitlinks)

    async def _add(self, repository: _Repository, item: Declared, url: str, commit: Commit) -> None:
        clean, credentials = split_credentials(url)
        # A user name alone is what a server would be asked with; who answers is the pool's credentials.
        mirror = self._mirror.of_submodule(clean, credentials if credentials and credentials.password else None)
        inner = _Repository(
            mirror=mirror,
            commit=commit.gitlinks[item.path],
            path=repository.inside(item.path),
            git_path=f"{repository.git_path}/modules/{item.name}".removeprefix("/"),
            depth=repository.depth + 1,
        )
        await self._obtain(inner)
        self.mirrors[clean] = mirror
        places = await self._read(inner)
        self._found.append(Submodule(inner.path, inner.git_path, clean, inner.commit, repository.depth, places))

    async def _declared(self, repository: _Repository) -> tuple[Commit, list[Declared]]:
        try:
            commit = read_tree((await self._run(repository, "ls-tree", "-r", "-z", repository.commit)).stdout)
            if not commit.gitlinks or commit.gitmodules is None:
                return commit, []
            listing = await self._run(
                repository, "config", f"--blob={commit.gitmodules}", "-z", "--list", ok=(0, 1, 3, 128)
            )
            return commit, declared(listing.stdout if listing.success else None, commit)
        except RefusedError as error:
            raise self._refused(repository, error, error.reason) from None
        except ValueError as error:
            where = f"submodule {repository.path!r}" if repository.path else "the repository"
            raise self._error(f"{where} at {repository.commit}: {error}", repository.path) from None

    def _url(self, repository: _Repository, item: Declared) -> str:
        try:
            return resolved_url(item.url, repository.mirror.url, self._allow_protocols)
        except ValueError as error:
            raise self._refused(repository, item, str(error)) from None

    async def _obtain(self, repository: _Repository) -> None:
        """Have a submodule's commit in its mirror; say of a failure which submodule it is about."""
        about = f"submodule {repository.path!r}"
        try:
            await repository.mirror.obtain(repository.commit)
        except UnknownRefError as error:
            raise UnknownRefError(
                f"{self._pool}: {about} stands at {repository.commit}, which {repository.mirror.url} does not have "
                f"(any more); push it there, or lease a commit whose submodule can be had",
                repo_name=self._pool,
                ref=repository.commit,
            ) from error
        except _PASSES as error:
            raise type(error)(
                f"{error.message} ({about})",
                operation=error.operation,
                exit_code=error.exit_code,
                stderr=error.stderr,
                attempts=error.attempts,
                repo_name=error.repo_name,
                slot_id=error.slot_id,
            ) from error
        except GitOperationError as error:
            raise self._error(f"{about} cannot be had: {error.message}", repository.path) from error

    async def _run(self, repository: _Repository, *args: str, ok: tuple[int, ...] = (0,)) -> GitResult:
        return await self._git.run(*args, git_dir=repository.mirror.path, ok_codes=ok, repo_name=self._pool)

    @property
    def _pool(self) -> str:
        return self._mirror.repo_name

    def _refused(self, repository: _Repository, item: Declared | RefusedError, reason: str) -> SubmoduleError:
        path = repository.inside(item.path)
        name = "" if item.name == item.path else f" (named {item.name[:100]!r})"
        return self._error(f"submodule {path[:200]!r}{name} of commit {repository.commit} is refused: {reason}", path)

    def _error(self, message: str, path: str) -> SubmoduleError:
        return SubmoduleError(f"{self._pool}: {message}", path=path, repo_name=self._pool)
