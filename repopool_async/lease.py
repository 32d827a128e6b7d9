"""What a lessee holds: a proxy for one slot that dies with the lease.

It runs commands in the slot, offers the git verbs bound to its tree, and tells when the lease was taken away. Taking
and giving back are the pool's business; only the pool makes these objects.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, final

from repopool_async._git import LOCATION_VARIABLES
from repopool_async.exceptions import CommandFailedError, FencedError, LeaseReleasedError, SlotElsewhereError
from repopool_async.git_operations import GitOperations
from repopool_async.hosts.base import Guard, Host, HostProcess
from repopool_async.models import CommandResult, GitResult, Lease, Slot
from repopool_async.slot_cleaner import LEASE_MARK

_OUTPUT_LIMIT: Final = 64 * 1024 * 1024


@final
class LeasedSlot:
    """A leased slot, from `lease()` or `allocate_slot()`.

    Usable as a path on the slot's host (`os.fspath`, `open(slot / ...)` through `slot.path`). After the lease has ended
    everything but the identifying attributes raises `LeaseReleasedError`.

    Attributes:
        slot_id, lease_id, token, repo_name, host_id, metadata: who it is, and on which host; they stay readable.
        commit: the full id that HEAD was at when the lease began. branch: the local branch then, None when detached.
        lost: set once the lease has been taken away.
    """

    def __init__(
        self,
        slot: Slot,
        lease: Lease,
        *,
        host: Host,
        git: GitOperations,
        renew: Callable[[float | None], Coroutine[Any, Any, Lease]],
        inherited: Mapping[str, str] | None = None,
        is_here: bool = True,
        guard: Guard | None = None,
    ) -> None:
        self.slot_id: Final = slot.slot_id
        self.repo_name: Final = slot.repo_name
        self.host_id: Final = slot.host_id
        self.lease_id: Final = lease.lease_id
        self.token: Final = lease.token
        self.commit: Final = lease.commit or ""
        self.branch: Final = lease.branch
        self.metadata: Final = dict(lease.metadata)
        self.lost: Final = asyncio.Event()
        self._tree = slot.path
        self._host = host
        self._git = GitOperations(runner=git.runner.with_environment(**self._marks()))
        self._renew = renew
        self._inherited = inherited
        self._is_here = is_here
        self._guard = guard
        self._is_released = False

    def __repr__(self) -> str:
        state = "released" if self._is_released else "lost" if self.lost.is_set() else "held"
        return f"<LeasedSlot {self.slot_id} at {self.branch or 'detached'} {self.commit[:12]} [{state}]>"

    def __fspath__(self) -> str:
        tree = self._alive()
        if not self._is_here:
            raise SlotElsewhereError(
                f"{self.slot_id}: {tree} is a path on host {self.host_id}, not on this machine; use run() and "
                f"open_process(), which run there",
                slot_id=self.slot_id,
                repo_name=self.repo_name,
            )
        return tree

    @property
    def path(self) -> Path:
        """The working tree, as it is called on the slot's host."""
        return Path(self._alive())

    @property
    def is_released(self) -> bool:
        """Whether the lease has ended."""
        return self._is_released

    async def run(
        self,
        *argv: str | os.PathLike[str],
        check: bool = True,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        input: bytes | None = None,
        capture: bool = True,
    ) -> CommandResult:
        """Run a command in the slot, in a process group of its own that ends with the call.

        Args:
            argv: the command and its arguments; no shell.
            check: raise where the exit code is not 0.
            timeout: seconds.
            env: variables to add to this process's environment (with `run_as`, to the user's).
            input: given on standard input, which is otherwise empty.
            capture: keep output (the last 64 MiB) in the result; otherwise it goes to this process's own.

        Raises:
            CommandFailedError: the exit code was not 0. CommandTimeoutError: it took too long; it has been killed.
            LeaseLostError: the slot's host knows of a later lease; nothing was run. HostUnreachableError: it does not
            answer. LeaseReleasedError: the lease has ended. OSError: the command cannot be started.

        Cancelling kills the process group and waits for its end.
        """
        arguments = [os.fspath(argument) for argument in argv]
        if capture:
            with self._noticing_loss():
                result = await self._host.run(
                    arguments,
                    env=self._environment(env),
                    cwd=self._alive(),
                    input=input,
                    timeout=timeout,
                    stdout_limit=_OUTPUT_LIMIT,
                    guard=self._guard,
                )
        else:
            result = await self._run_inherited(arguments, timeout=timeout, env=env, input=input)
        if check and result.exit_code != 0:
            raise self._failure(arguments, result)
        return result

    def open_process(
        self,
        *argv: str | os.PathLike[str],
        env: Mapping[str, str] | None = None,
        stdin: bool = False,
        inherit: bool = False,
    ) -> AbstractAsyncContextManager[HostProcess]:
        """Run a command in the slot while the block runs, with streams; leaving the block ends its process group.

        Args:
            stdin: whether `write` will be used. inherit: connect it to this process's own standard streams.

        Raises:
            LeaseReleasedError: the lease has ended. OSError, on entering: the command cannot be started.
        """
        arguments = [os.fspath(argument) for argument in argv]
        opened = self._host.open_process(
            arguments, env=self._environment(env), cwd=self._alive(), stdin=stdin, inherit=inherit, guard=self._guard
        )
        return self._opened(opened)

    @asynccontextmanager
    async def _opened(self, process: AbstractAsyncContextManager[HostProcess]) -> AsyncIterator[HostProcess]:
        async with AsyncExitStack() as stack:
            with self._noticing_loss():
                entered = await stack.enter_async_context(process)
            yield entered

    @contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        try:
            yield
        except FencedError:
            self.lost.set()
            raise

    async def renew(self, ttl: float | None = None) -> None:
        """Extend a detached lease; confirm any other.

        Args:
            ttl: seconds from now; the former duration where missing.

        Raises:
            LeaseLostError: the lease has been taken away. LeaseReleasedError: it has ended.
        """
        self._alive()
        await self._renew(ttl)

    # -- the git verbs, bound to the tree and run as the lessee would ---------------------------------------------

    async def checkout(self, ref: str, *, create: bool = False, force: bool = False) -> GitResult:
        """Check out a branch, tag or commit (6.1); see `GitOperations.checkout`."""
        return await self._git.checkout(self._alive(), ref, create=create, force=force)

    async def get_current_branch(self) -> str | None:
        """Return the branch checked out, None for a detached HEAD (6.2)."""
        return await self._git.get_current_branch(self._alive())

    async def get_current_commit(self) -> str:
        """Return the full id HEAD is at (6.3)."""
        return await self._git.get_current_commit(self._alive())

    async def list_remote_branches(self, remote: str | None = None) -> list[str]:
        """Return the remote branches the slot knows (6.4)."""
        return await self._git.list_remote_branches(self._alive(), remote)

    async def is_clean_working_tree(self) -> bool:
        """Return whether nothing is modified, staged or untracked."""
        return await self._git.is_clean_working_tree(self._alive())

    async def reset_hard(self, ref: str | None = None) -> GitResult:
        """Discard changes to tracked files."""
        return await self._git.reset_hard(self._alive(), ref)

    async def clean(self) -> GitResult:
        """Remove untracked and ignored files."""
        return await self._git.clean(self._alive())

    async def fetch_all(self) -> GitResult:
        """Fetch the slot's remotes, into the slot alone."""
        return await self._git.fetch_all(self._alive())

    # -- for the pool --------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Make the proxy unusable; the pool calls this before it gives the slot on."""
        self._is_released = True

    def _alive(self) -> str:
        if self._is_released:
            raise LeaseReleasedError(
                f"{self.slot_id}: lease {self.lease_id} has ended; take a new one with lease()",
                slot_id=self.slot_id,
                repo_name=self.repo_name,
            )
        return self._tree

    def _environment(self, extra: Mapping[str, str] | None) -> dict[str, str]:
        source = os.environ if self._inherited is None else self._inherited
        inherited = {name: value for name, value in source.items() if name not in LOCATION_VARIABLES}
        return {**inherited, **(extra or {}), **self._marks(), "PWD": self._tree}

    def _marks(self) -> dict[str, str]:
        """Return the variables by which the lease's processes are known, and ended, when it ends."""
        return {LEASE_MARK: self.lease_id, "REPOPOOL_SLOT_ID": self.slot_id, "REPOPOOL_TOKEN": str(self.token)}

    async def _run_inherited(
        self, argv: list[str], *, timeout: float | None, env: Mapping[str, str] | None, input: bytes | None
    ) -> CommandResult:
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with asyncio.timeout(timeout):
            async with self.open_process(*argv, env=env, stdin=input is not None, inherit=True) as process:
                if input is not None:
                    await process.write(input)
                    await process.close_stdin()
                exit_code = await process.wait()
        return CommandResult(exit_code=exit_code, stdout=b"", stderr=b"", duration_seconds=loop.time() - started)

    def _failure(self, argv: list[str], result: CommandResult) -> CommandFailedError:
        words = result.stderr.decode(errors="replace").strip().splitlines()
        tail = f": {words[-1]}" if words else ""
        return CommandFailedError(
            f"{self.slot_id}: {argv[0]} exited with {result.exit_code}{tail}",
            argv=tuple(argv),
            exit_code=result.exit_code,
            stdout=result.stdout,
            stderr=result.stderr,
            repo_name=self.repo_name,
            slot_id=self.slot_id,
        )
