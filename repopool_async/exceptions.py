"""The exception tree: everything this library raises on purpose is a `PoolManagerError`.

Each error keeps what it knows as attributes, survives pickling (process pools carry them between processes), is also a
`LookupError`, `TimeoutError` or `ValueError` where that is what it is, and says in its message which pool or slot it is
about and what to do next. Raisers pass credential-free text.
"""

from typing import Any, Self


class PoolManagerError(Exception):
    """Something went wrong in the pool; the root of the tree.

    Attributes:
        repo_name: the pool concerned. slot_id: the slot concerned. Either may be None.
    """

    def __init__(self, message: str, *, repo_name: str | None = None, slot_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.repo_name = repo_name
        self.slot_id = slot_id

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception.__reduce__ would call __init__ with args only and lose the keyword-only fields' defaults.
        return (_rebuild, (type(self), self.args, dict(self.__dict__)))


def _rebuild(kind: type[PoolManagerError], args: tuple[Any, ...], fields: dict[str, Any]) -> PoolManagerError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class ConfigError(PoolManagerError, ValueError):
    """The configuration is refused.

    Attributes:
        key: dotted path of the offending key. line: its line in the file, counted from 1. source: the file.
    """

    def __init__(
        self, message: str, *, key: str | None = None, line: int | None = None, source: str | None = None
    ) -> None:
        super().__init__(message)
        self.key = key
        self.line = line
        self.source = source


class PlatformNotSupportedError(PoolManagerError):
    """This machine cannot run the pool: no POSIX, git missing or too old, network file system, too few open files."""


class ManagerClosedError(PoolManagerError):
    """The manager is not open: not yet, or not any more. It cannot be reopened."""


class PoolNotFoundError(PoolManagerError, LookupError):
    """There is no pool of that name."""


class PoolExistsError(PoolManagerError):
    """There is already a pool of that name, for another repository or with other options."""


class PoolInUseError(PoolManagerError):
    """The pool still has leased slots."""


class SlotNotFoundError(PoolManagerError, LookupError):
    """There is no slot of that id."""


class HostNotFoundError(PoolManagerError, LookupError):
    """There is no host of that name."""


class SlotElsewhereError(PoolManagerError, TypeError):
    """A slot on another machine was used as a path on this one."""


class SlotInUseError(PoolManagerError):
    """The slot is leased."""


class SlotAllocationError(PoolManagerError):
    """A slot could not be given."""


class NoAvailableSlotError(SlotAllocationError):
    """No slot is free."""


class PoolTimeoutError(NoAvailableSlotError, TimeoutError):
    """The deadline passed before the lease could begin.

    Attributes:
        timeout_seconds: what the caller allowed. phase: `queue`, `fetch` or `checkout`.
        holders: who holds the slots, a line each; of this process's leases also which task took it, and where.
        is_self_wait: whether the waiting task itself, or tasks that wait as well, hold all slots: a deadlock.
    """

    def __init__(
        self,
        message: str,
        *,
        repo_name: str | None = None,
        slot_id: str | None = None,
        timeout_seconds: float | None = None,
        phase: str = "queue",
        holders: tuple[str, ...] = (),
        is_self_wait: bool = False,
    ) -> None:
        super().__init__(message, repo_name=repo_name, slot_id=slot_id)
        self.is_self_wait = is_self_wait
        self.timeout_seconds = timeout_seconds
        self.phase = phase
        self.holders = holders


class TooManyRequestsError(SlotAllocationError):
    """The queue already has `max_waiting` waiters."""


class LeaseReleasedError(PoolManagerError):
    """The lease has ended; this `LeasedSlot` is of no more use."""


class LeaseLostError(PoolManagerError):
    """The lease was taken away (expired, forced), or the token is not the present one."""


class FencedError(LeaseLostError):
    """The slot's host refused a token: it is not the present one there. Whoever holds the slot now has a higher one.

    Attributes:
        slot_directory: on the host. token: what was refused.
        top: the highest token that the host knows of this slot, 0 for none; only a higher one can enter.
        is_used: whether the token itself has entered before (a store that lost its last commits gives one twice).
    """

    def __init__(
        self,
        message: str,
        *,
        slot_directory: str = "",
        token: int = 0,
        top: int = 0,
        is_used: bool = False,
        slot_id: str | None = None,
    ) -> None:
        super().__init__(message, slot_id=slot_id)
        self.slot_directory = slot_directory
        self.token = token
        self.top = top
        self.is_used = is_used


class UnkillableError(PoolManagerError):
    """Processes of an earlier lease do not die (stuck in the kernel, or another user's); the slot cannot be used."""


class HostUnreachableError(PoolManagerError):
    """A host does not answer, or the connection to it was lost.

    Attributes:
        host_id: which. has_not_started: whether the command has certainly not begun to run; otherwise nobody knows.
        is_passing: whether trying later may help without anybody doing anything.
    """

    def __init__(
        self, message: str, *, host_id: str = "", has_not_started: bool = False, is_passing: bool = True
    ) -> None:
        super().__init__(message)
        self.host_id = host_id
        self.has_not_started = has_not_started
        self.is_passing = is_passing


class HostKeyError(HostUnreachableError):
    """A host's SSH key is not known, or is another than the one known; nothing was sent to it."""


class RefError(PoolManagerError, ValueError):
    """The text cannot be a ref."""


class UnknownRefError(PoolManagerError, LookupError):
    """The repository has no such ref or commit.

    Attributes:
        ref: what was asked for. nearest: similar names that exist.
    """

    def __init__(
        self, message: str, *, repo_name: str | None = None, ref: str = "", nearest: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, repo_name=repo_name)
        self.ref = ref
        self.nearest = nearest


class RepositoryUrlError(PoolManagerError, ValueError):
    """The text is no repository URL that the pool accepts."""


class SubmoduleError(PoolManagerError):
    """A commit's submodules are refused or cannot be had; the slot is not to blame.

    Attributes:
        path: of the submodule in the tree, "" where it is about all of them.
    """

    def __init__(
        self, message: str, *, path: str = "", repo_name: str | None = None, slot_id: str | None = None
    ) -> None:
        super().__init__(message, repo_name=repo_name, slot_id=slot_id)
        self.path = path


class LfsError(PoolManagerError):
    """A commit's LFS files cannot be had; the slot is not to blame."""


class CommandFailedError(PoolManagerError):
    """A command that a lessee ran in its slot exited with a status other than 0.

    Attributes:
        argv: the command. exit_code, stdout, stderr: what it left.
    """

    def __init__(
        self,
        message: str,
        *,
        argv: tuple[str, ...] = (),
        exit_code: int = 0,
        stdout: bytes = b"",
        stderr: bytes = b"",
        repo_name: str | None = None,
        slot_id: str | None = None,
    ) -> None:
        super().__init__(message, repo_name=repo_name, slot_id=slot_id)
        self.argv = argv
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr


class SetupError(CommandFailedError):
    """The pool's `setup` command failed or took too long in a slot; neither slot nor lessee is to blame."""


class CommandTimeoutError(PoolManagerError, TimeoutError):
    """A command ran longer, or was silent for longer, than it was allowed; it and its process group have been killed.

    Attributes:
        argv: the command. timeout_seconds: the limit. is_idle: whether it was the limit on silence.
        stderr: its last words.
    """

    def __init__(
        self,
        message: str,
        *,
        argv: tuple[str, ...] = (),
        timeout_seconds: float = 0.0,
        is_idle: bool = False,
        stderr: bytes = b"",
    ) -> None:
        super().__init__(message)
        self.argv = argv
        self.timeout_seconds = timeout_seconds
        self.is_idle = is_idle
        self.stderr = stderr


class GitOperationError(PoolManagerError):
    """A git command of the pool failed.

    Attributes:
        operation: which. exit_code, stderr: what git said, free of credentials. attempts: how often it was tried.
    """

    def __init__(
        self,
        message: str,
        *,
        operation: str = "",
        exit_code: int | None = None,
        stderr: str = "",
        attempts: int = 1,
        repo_name: str | None = None,
        slot_id: str | None = None,
    ) -> None:
        super().__init__(message, repo_name=repo_name, slot_id=slot_id)
        self.operation = operation
        self.exit_code = exit_code
        self.stderr = stderr
        self.attempts = attempts

    def about(self, *, repo_name: str | None = None, slot_id: str | None = None) -> Self:
        """Note which pool and slot the command ran for, once, and return self."""
        prefix = slot_id or repo_name
        if prefix is not None and self.slot_id is None and self.repo_name is None:
            self.message = f"{prefix}: {self.message}"
        self.repo_name = self.repo_name or repo_name
        self.slot_id = self.slot_id or slot_id
        return self


class GitTransientError(GitOperationError):
    """The network or the server failed in a way that passes; it was retried in vain."""


class GitTimeoutError(GitOperationError, TimeoutError):
    """A git command took longer than it was allowed; it and its helpers have been ended. Not retried."""


class GitContentionError(GitOperationError):
    """Another git process held a lock of the repository for too long."""


class GitAccessError(GitOperationError):
    """Authentication, host key or certificate refused, or no such repository; not retried."""


class GitRefMissingError(GitOperationError):
    """The remote has no such ref, or does not serve that object."""


class GitDiskFullError(GitOperationError):
    """No space left; free some and call `repair_slot` or wait for recovery."""


class GitSlotDamagedError(GitOperationError):
    """A slot's git directory is unusable; the pool rebuilds it."""


class GitMirrorDamagedError(GitOperationError):
    """Objects of the mirror are missing or corrupt; the pool climbs the repair ladder."""


class EmptyRepositoryError(GitOperationError):
    """The repository has no commits; push one, then create the pool."""


class CleanupError(PoolManagerError):
    """A slot could not be brought to a verified clean state; it is quarantined."""


class LockTimeoutError(PoolManagerError, TimeoutError):
    """A slot's lock was not free within the time allowed."""


class StoreError(PoolManagerError):
    """Pool or slot records cannot be read or written (permissions, disk full, read-only)."""


class CoordinatorUnavailableError(StoreError):
    """The database that machines share cannot be used now; try again. What was under way is settled by itself."""


class SalvageError(PoolManagerError):
    """Work could not be saved or brought back."""


class SalvageNotFoundError(PoolManagerError, LookupError):
    """There is no saved work of that id."""
