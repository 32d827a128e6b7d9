"""Brings slots to a verified clean state, climbing the repair ladder where the first rung does not hold.

It ends what a lease left running, asks the workspace strategy to clean, calls the owner's callbacks, seals, and writes
the clean-up log. It moves no slot between states: callers hold the slot and record the outcome. It knows nothing of
alternates, indexes or mounts (the strategy's business).
"""

import asyncio
import errno
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

import attrs

from repopool_async._clock import boottime, now
from repopool_async._git import WORK_MARK
from repopool_async.exceptions import (
    CleanupError,
    GitAccessError,
    GitContentionError,
    GitDiskFullError,
    GitMirrorDamagedError,
    GitOperationError,
    GitRefMissingError,
    GitTimeoutError,
    GitTransientError,
    HostUnreachableError,
    LeaseLostError,
    LfsError,
    PoolManagerError,
    SetupError,
    SubmoduleError,
    UnknownRefError,
)
from repopool_async.git_operations import GitOperations
from repopool_async.hosts.base import EndedProcesses, Host, Moment
from repopool_async.lock_manager import LockManager
from repopool_async.mirror import Mirror
from repopool_async.models import CleanupResult, Seal, Slot
from repopool_async.run_as import RunAs
from repopool_async.shared_state import PoolRecords
from repopool_async.slot_setup import SlotSetup
from repopool_async.workspaces.base import Checkout, Look, Rung, Work, WorkspaceStrategy
from repopool_async.workspaces.clone import CloneWorkspace

_log: Final = logging.getLogger("repopool")

LEASE_MARK: Final = "REPOPOOL_LEASE_ID"
"""Environment variable that every process started in a lease bears."""

SlotCallback = Callable[[Slot], Awaitable[None] | None]
"""A callback of the pool's owner, sync or async; raising rejects the slot."""

_NOT_THE_SLOTS_FAULT: Final = (HostUnreachableError, SubmoduleError, LfsError, UnknownRefError)
_NOT_HELPED_BY_CLIMBING: Final = (GitDiskFullError, GitTransientError, GitAccessError, *_NOT_THE_SLOTS_FAULT)
_NOT_THE_MIRRORS: Final = (GitTimeoutError, GitContentionError)

T = TypeVar("T")

_DISK_TROUBLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@attrs.frozen
class Callbacks:
    """How custom clean-up plugs in.

    Attributes:
        configure: called with a slot after it was made, before its first seal.
        check: called before a slot is handed out. reset: called after cleaning, before the seal.
    """

    configure: SlotCallback | None = None
    check: SlotCallback | None = None
    reset: SlotCallback | None = None


@attrs.frozen
class Left:
    """What a lease was found to have left before its slot was cleaned.

    Attributes:
        ended: of its processes. look: at its tree. None: what is not known.
    """

    ended: EndedProcesses | None
    look: Look | None


class SlotCleaner:
    """Cleans, verifies, repairs and warms slots.

    Args:
        git: where git runs (`git.host`) and how (`git.runner`).
        workspace: the strategy; where missing, slots are clones in the layout of a workspaces directory, and each
            slot's mirror is found from its path.
        store: where the clean-up log is written; found from the slot's path where missing.
        callbacks: of the pool's owner. on_event: told of what happens, a kind and fields.
        rebuild_always: make the tree anew after every lease, whatever became of the old one.
        run_as: the user that lessees run as, where it is another.
        setup: what is run in slots before anybody gets them; nothing where missing.
    """

    def __init__(
        self,
        git: GitOperations,
        *,
        workspace: WorkspaceStrategy | None = None,
        store: PoolRecords | None = None,
        callbacks: Callbacks | None = None,
        on_event: Callable[[str, dict[str, object]], None] | None = None,
        rebuild_always: bool = False,
        run_as: RunAs | None = None,
        setup: SlotSetup | None = None,
    ) -> None:
        self._setup = setup
        self._run_as = run_as
        self.rebuild_always = rebuild_always
        self._git = git
        self._host: Host = git.runner.host
        self._workspace = workspace
        self._store = store
        self._callbacks = callbacks or Callbacks()
        self._on_event = on_event
        self._derived: dict[str, WorkspaceStrategy] = {}

    async def provision(self, slot: Slot, checkout: Checkout) -> CleanupResult:
        """Make a new slot's tree (1.2).

        Raises:
            CleanupError: it could not be made; the cause is chained. SetupError: the pool's setup failed in it.
        """
        log = _Log(slot, "provision")
        try:
            work = await self._strategy(slot).provision(slot, checkout)
            await _call(self._callbacks.configure, slot)
            result = await self._sealed(log, slot, checkout, work)
        except (PoolManagerError, OSError) as error:
            await self._failed(log, error)
            raise
        return await self._set_up(slot, checkout, result)

    async def cleanup_before_allocation(self, slot: Slot, checkout: Checkout | None = None) -> CleanupResult:
        """Bring a sealed slot to what a lease asked for; nothing is done where it stands there already.

        Args:
            slot: AVAILABLE or just claimed. checkout: what it shall show; what it was sealed at where missing.

        Raises:
            CleanupError: no rung of the ladder helped; quarantine the slot.
            SetupError: the pool's setup failed for that commit; the slot is clean.
        """
        wanted = checkout or _standing(slot)
        return await self._set_up(slot, wanted, await self._prepare(slot, wanted))

    async def _prepare(self, slot: Slot, wanted: Checkout) -> CleanupResult:
        log = _Log(slot, "prepare")
        try:
            work = await self._strategy(slot).prepare(slot, wanted)
        except _NOT_HELPED_BY_CLIMBING as error:
            await self._failed(log, error)
            raise
        except (PoolManagerError, OSError) as error:
            log.note(error)
            result = await self._climb(log, slot, wanted, first=Rung.CLEAN, is_negotiable=False)
            await self._check(log, slot)
            return result
        await self._check(log, slot)
        if work.warm and slot.seal is not None and work.steps == ("warm",):
            return log.result(wanted, work, slot.seal)  # nothing was done, so nothing is logged
        seal = await self._strategy(slot).seal(slot, wanted, keeps_mark=True)
        return await self._logged(log.result(wanted, work, seal))

    async def ending(self, slot: Slot, *, looks: bool) -> Callable[[], Coroutine[Any, Any, "Left"]]:
        """Return what `cleanup_after_release` begins with, as a piece of work that asks the host once.

        It ends what the last lease left running, so that this can be joined with what has to come before. What it
        cannot see is seen, or reported, by the cleaning.

        Args:
            looks: whether to look at the tree as well.
        """
        ending = await self._ending_processes(slot)
        looking = None
        if looks:
            with _left_to_the_cleaning(slot):
                rung, trusts = self._ordinary_rung, self._trusts_untouched
                looking = await self._strategy(slot).looking(slot, rung=rung, trust_untouched=trusts)

        async def end_and_look() -> Left:
            ended: asyncio.Future[EndedProcesses] | None = None
            look: asyncio.Future[Look] | None = None
            with _left_to_the_cleaning(slot):
                async with self._host.joined() as joined:
                    ended = joined(ending()) if ending is not None else None
                    look = joined(looking()) if looking is not None else None
            return Left(_outcome(ended), _outcome(look))

        return end_and_look

    async def cleanup_after_release(
        self, slot: Slot, checkout: Checkout | None = None, *, left: "Left | None" = None
    ) -> CleanupResult:
        """End what the last lease left running and remove every trace of it (3.2 to 3.4).

        Args:
            slot: not AVAILABLE; its last lease is in the record. checkout: what it shall show afterwards.
            left: what `ending` saw since, where that has been done.

        Raises:
            CleanupError: no rung of the ladder helped; quarantine the slot.
        """
        first, is_alone = await self._end_lease(slot, ended=left.ended if left is not None else None)
        result = await self._climb(
            _Log(slot, "return"),
            slot,
            checkout or _standing(slot),
            first=first,
            keeps_paths=is_alone,
            falls_back=True,
            look=left.look if left is not None else None,
        )
        return await self._set_up_ahead(slot, checkout, result)

    async def recover(self, slot: Slot, checkout: Checkout) -> CleanupResult:
        """Clean a slot whose owner died, wherever it was interrupted. Raises as `cleanup_after_release`."""
        await self._end_work(slot)
        first, is_alone = await self._end_lease(slot)
        result = await self._climb(
            _Log(slot, "recover"), slot, checkout, first=first, keeps_paths=is_alone, falls_back=True
        )
        return await self._set_up_ahead(slot, checkout, result)

    async def repair_slot(self, slot: Slot, checkout: Checkout | None = None) -> CleanupResult:
        """Make a damaged slot usable again, trusting nothing of its tree (9.2); kept directories go too.

        Raises as `cleanup_after_release`.
        """
        await self._end_lease(slot)
        first = Rung.RECLONE if self._strategy(slot).owns_objects else Rung.RECREATE_TREE
        result = await self._climb(
            _Log(slot, "repair"),
            slot,
            checkout or _standing(slot),
            first=first,
            keeps_paths=False,
            falls_back=True,
        )
        return await self._set_up_ahead(slot, checkout, result)

    async def verify_slot_integrity(self, slot: Slot) -> Sequence[str]:
        """Return what is wrong with a sealed slot, a line each; nothing where all is well. Reads every inode."""
        return await self._strategy(slot).verify(slot)

    async def warmup_slot(self, slot: Slot, checkout: Checkout) -> CleanupResult:
        """Bring a sealed, unleased slot to a commit, and set it up, ahead of the lease that will want it (10.3)."""
        result = await self.cleanup_before_allocation(slot, checkout)
        return attrs.evolve(result, operation="warmup")

    async def get_cleanup_log(self, slot_id: str, *, limit: int | None = None) -> list[CleanupResult]:
        """Return what was done to a slot, newest last (3.5).

        Args:
            limit: how many of the newest.
        """
        if self._store is None:
            raise CleanupError(f"{slot_id}: this cleaner was given no store, so there is no log to read")
        return await self._store.cleanup_log(slot_id, limit=limit)

    async def discard(self, slot: Slot) -> None:
        """Forget what is kept for a slot outside its directory; it is about to be deleted."""
        await self._strategy(slot).discard(slot)

    # -- the pool's setup ----------------------------------------------------------------------------------------

    async def is_setup_due(self, slot: Slot, checkout: Checkout) -> bool:
        """Return whether bringing a slot to a commit includes running the pool's setup in it."""
        return self._setup is not None and await self._setup.is_due(slot, checkout.commit, is_wanted=True)

    async def _set_up(self, slot: Slot, checkout: Checkout, result: CleanupResult) -> CleanupResult:
        """Run the pool's setup in a clean slot where it is due; where it fails the slot is clean all the same."""
        if not await self.is_setup_due(slot, checkout):
            return result
        result, failure = await self._run_setup(slot, checkout, result)
        if failure is not None:
            raise failure
        return result

    async def _set_up_ahead(self, slot: Slot, checkout: Checkout | None, result: CleanupResult) -> CleanupResult:
        """Spare the next lessee the setup; where it failed before, or fails now, whoever needs it is told."""
        wanted = checkout or _standing(slot)
        setup = self._setup
        if setup is None or not setup.is_ahead or result.commit != wanted.commit:
            return result
        if await setup.is_due(slot, wanted.commit, is_wanted=False):
            result, _ = await self._run_setup(slot, wanted, result)
        return result

    async def _run_setup(
        self, slot: Slot, checkout: Checkout, result: CleanupResult
    ) -> tuple[CleanupResult, SetupError | None]:
        assert self._setup is not None
        self._tell("slot.setup", slot_id=slot.slot_id, commit=checkout.commit)
        log = _Log(slot, "setup")
        failure: SetupError | None = None
        try:
            await self._setup.run(slot, checkout.commit, mark=LEASE_MARK)
        except SetupError as error:
            failure = error
            self._tell("slot.setup_failed", slot_id=slot.slot_id, commit=checkout.commit, error=_brief(error))
            await self._logged(log.failure(error))
        sealed = attrs.evolve(slot, seal=result.seal)
        first = Rung.CLEAN if failure is None else Rung.RECREATE_TREE
        result = await self._climb(log, sealed, checkout, first=first, keeps_paths=failure is None)
        await self._setup.note(slot, checkout.commit, failed=failure is not None)
        return result, failure

    # -- the ladder ----------------------------------------------------------------------------------------------

    async def _climb(
        self,
        log: "_Log",
        slot: Slot,
        checkout: Checkout,
        *,
        first: Rung,
        keeps_paths: bool = True,
        falls_back: bool = False,
        is_negotiable: bool = True,
        look: Look | None = None,
    ) -> CleanupResult:
        """Try rung after rung; where the commit is nowhere any more, and nobody insists on it, show the default.

        Args:
            keeps_paths: whether kept directories stay.
            falls_back: show the commit of the last seal where the one wanted cannot be had.
            look: what was seen of the tree since its lease ended, good for one try.
        """
        rung = first
        has_freed = False
        log.rung = None if first is self._ordinary_rung else first
        while True:
            try:
                seen, look = look, None
                return await self._try_rung(log, slot, checkout, rung, keeps_paths=keeps_paths, look=seen)
            except (PoolManagerError, OSError) as error:
                log.note(error)
                if isinstance(error, HostUnreachableError | LeaseLostError):
                    raise  # neither the tree nor what it is made from is to blame
                if _is_disk_full(error) and not has_freed:
                    # What filled it may be what this lessee left, by now in the trash.
                    await self._strategy(slot).free_space(slot)
                    has_freed = True
                    continue
                if isinstance(error, _NOT_HELPED_BY_CLIMBING) and falls_back and slot.seal is not None:
                    checkout, falls_back = _standing(slot), False
                    continue
                if isinstance(error, _NOT_THE_SLOTS_FAULT):
                    await self._failed(log, error)
                    raise
                if is_negotiable and rung is Rung.REBUILD_MIRROR and isinstance(error, GitRefMissingError):
                    return await self._show_default(log, slot, keeps_paths=keeps_paths)
                following = _next_rung(rung, error, owns_objects=self._strategy(slot).owns_objects)
                if following is None:
                    await self._failed(log, error)
                    if isinstance(error, GitRefMissingError):
                        raise  # the lessee asked for what is gone; the slot is not to blame
                    raise _quarantined(slot, error) from error
                rung = log.rung = following

    async def _show_default(self, log: "_Log", slot: Slot, *, keeps_paths: bool) -> CleanupResult:
        try:
            checkout = await self._strategy(slot).default_checkout()
            return await self._try_rung(log, slot, checkout, Rung.RECREATE_TREE, keeps_paths=keeps_paths)
        except (PoolManagerError, OSError) as error:
            log.note(error)
            await self._failed(log, error)
            raise _quarantined(slot, error) from error

    async def _try_rung(
        self,
        log: "_Log",
        slot: Slot,
        checkout: Checkout,
        rung: Rung,
        *,
        keeps_paths: bool,
        look: Look | None = None,
    ) -> CleanupResult:
        work = await self._strategy(slot).restore(
            slot,
            checkout,
            rung=rung,
            trust_untouched=self._trusts_untouched,
            keeps_paths=keeps_paths,
            look=look,
            seals=self._callbacks.reset is None,
        )
        await _call(self._callbacks.reset, slot)
        return await self._sealed(log, slot, checkout, work)

    @property
    def _trusts_untouched(self) -> bool:
        """Whether a tree that nobody changed is as it shall be: the owner's callbacks may want something else."""
        return self._callbacks.reset is None and self._callbacks.configure is None

    async def end_lease(self, slot: Slot) -> None:
        """End what the last lease, and whoever died at cleaning it, left running; cleaning does so by itself."""
        await self._end_work(slot)
        await self._end_lease(slot)

    async def _end_work(self, slot: Slot) -> None:
        """End the git of a dead owner: in a session of its own it outlives it, perhaps amid a check-out."""
        await self._host.end_processes(mark=f"{WORK_MARK}={slot.path}", tree=None)

    @property
    def _ordinary_rung(self) -> Rung:
        """Where every cleaning of this pool begins."""
        return Rung.RECREATE_TREE if self.rebuild_always or self._run_as is not None else Rung.CLEAN

    async def _ending_processes(self, slot: Slot) -> Callable[[], Coroutine[Any, Any, EndedProcesses]] | None:
        """Return what ends the last lease's processes; None where there is no such lease."""
        if slot.lease is None and self._run_as is None:
            return None
        mark = f"{LEASE_MARK}={slot.lease.lease_id if slot.lease else f'no lease of {slot.slot_id}'}"
        group = self._run_as.group_of(slot) if self._run_as is not None else None
        since = None
        if slot.lease is not None:
            since = Moment(slot.lease.owner.boot_id, slot.lease.acquired_boottime)
        return partial(self._host.end_processes, mark=mark, tree=slot.path, since=since, group=group)

    async def _end_lease(self, slot: Slot, *, ended: EndedProcesses | None = None) -> tuple[Rung, bool]:
        """End the last lease's processes; where others sit in the tree, only new inodes make it certain.

        Args:
            ended: what that did, where it has been done.

        Returns:
            The rung to begin with, and whether nobody sits there.
        """
        # A tree that another user had is made anew always: cleaning it in place would be a race with that user.
        first = self._ordinary_rung
        if ended is None:
            ending = await self._ending_processes(slot)
            if ending is None:
                return first, True
            ended = await ending()
        if ended.survivors and self._run_as is not None:
            raise CleanupError(
                f"{slot.slot_id}: processes of its last lease cannot be ended: {ended.survivors}; end them, then "
                f"repair_slot",
                slot_id=slot.slot_id,
                repo_name=slot.repo_name,
            )
        if ended.killed:
            self._tell("lease.processes_ended", slot_id=slot.slot_id, pids=ended.killed)
        if not ended.bystanders:
            return first, True
        self._tell("slot.bystanders", slot_id=slot.slot_id, processes=ended.bystanders)
        return Rung.RECREATE_TREE, False

    async def _sealed(self, log: "_Log", slot: Slot, checkout: Checkout, work: Work) -> CleanupResult:
        seal = work.seal or await self._strategy(slot).seal(slot, checkout, since=work.since)
        return await self._logged(log.result(checkout, work, seal))

    async def _check(self, log: "_Log", slot: Slot) -> None:
        try:
            await _call(self._callbacks.check, slot)
        except CleanupError as error:
            await self._failed(log, error)
            raise

    async def _failed(self, log: "_Log", error: BaseException) -> None:
        self._tell("slot.cleanup_failed", slot_id=log.slot.slot_id, error=_brief(error))
        await self._logged(log.failure(error))

    async def _logged(self, result: CleanupResult) -> CleanupResult:
        if self._store is not None:
            await self._store.append_cleanup(result)
        return result

    def _strategy(self, slot: Slot) -> WorkspaceStrategy:
        if self._workspace is not None:
            return self._workspace
        pool_directory = slot.path.rpartition("/slots/")[0]
        if pool_directory not in self._derived:
            mirror = Mirror(
                f"{pool_directory}/mirror.git",
                slot.repo_url,
                host=self._host,
                git=self._git.runner,
                locks=LockManager(f"{pool_directory.rpartition('/')[0]}/locks"),
                repo_name=slot.repo_name,
            )
            self._derived[pool_directory] = CloneWorkspace(host=self._host, git=self._git.runner, mirror=mirror)
        return self._derived[pool_directory]

    def _tell(self, kind: str, **fields: object) -> None:
        _log.info("%s %s", kind, fields)
        if self._on_event is not None:
            self._on_event(kind, fields)


@attrs.define
class _Log:
    """The log line of one cleaning, while it is being written."""

    slot: Slot
    operation: str
    rung: Rung | None = None
    notes: list[str] = attrs.field(factory=list)
    started: float = attrs.field(factory=boottime)

    def note(self, error: BaseException) -> None:
        self.notes.append(f"failed: {_brief(error)}")

    def result(self, checkout: Checkout, work: Work, seal: Seal) -> CleanupResult:
        return CleanupResult(
            slot_id=self.slot.slot_id,
            operation=self.operation,
            success=True,
            started_at=now(),
            duration_seconds=boottime() - self.started,
            commit=checkout.commit,
            steps=(*self.notes, *work.steps),
            removed=work.removed,
            restored=work.restored,
            rung=self.rung.name.lower() if self.rung else None,
            seal=seal,
        )

    def failure(self, error: BaseException) -> CleanupResult:
        return CleanupResult(
            slot_id=self.slot.slot_id,
            operation=self.operation,
            success=False,
            started_at=now(),
            duration_seconds=boottime() - self.started,
            steps=tuple(self.notes),
            rung=self.rung.name.lower() if self.rung else None,
            error=_brief(error),
        )


def _next_rung(rung: Rung, error: BaseException, *, owns_objects: bool) -> Rung | None:
    """Return the next rung worth trying after an error, None at the end of the ladder or where climbing cannot help."""
    if isinstance(error, OSError) and error.errno in _DISK_TROUBLE:
        return None
    if isinstance(error, _NOT_HELPED_BY_CLIMBING) or rung is Rung.REBUILD_MIRROR:
        return None
    if isinstance(error, GitMirrorDamagedError):
        # A wrong pointer to the objects looks the same: only once that is beyond suspicion is it the objects.
        if rung < Rung.REBUILD_GIT:
            return Rung.REBUILD_GIT
        return Rung.RECLONE if owns_objects and rung < Rung.RECLONE else Rung.REBUILD_MIRROR
    if rung >= Rung.RECREATE_TREE and (not isinstance(error, GitOperationError) or isinstance(error, _NOT_THE_MIRRORS)):
        return None  # other objects do not mend a file system or a callback
    following = Rung(rung + 1)
    return Rung.REBUILD_MIRROR if following is Rung.RECLONE and not owns_objects else following


def _quarantined(slot: Slot, error: BaseException) -> CleanupError:
    return CleanupError(
        f"{slot.slot_id}: could not be cleaned ({_brief(error)}); it is quarantined, see its clean-up log; "
        f"`repair_slot` tries again",
        slot_id=slot.slot_id,
        repo_name=slot.repo_name,
    )


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, GitDiskFullError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    )


def _outcome(future: asyncio.Future[T] | None) -> T | None:
    return future.result() if future is not None and future.done() else None


@contextmanager
def _left_to_the_cleaning(slot: Slot) -> Iterator[None]:
    """Pass over what the cleaning meets as well, and then knows what to do about."""
    try:
        yield
    except (PoolManagerError, OSError) as error:
        _log.debug("%s: not seen before it is cleaned: %s", slot.slot_id, error)


def _standing(slot: Slot) -> Checkout:
    if slot.seal is None:
        raise CleanupError(f"{slot.slot_id}: was never sealed; say which commit it shall show", slot_id=slot.slot_id)
    return Checkout(commit=slot.seal.commit, branch=slot.seal.branch)


async def _call(callback: SlotCallback | None, slot: Slot) -> None:
    if callback is None:
        return
    try:
        outcome = callback(slot)
        if inspect.isawaitable(outcome):
            await outcome
    except Exception as error:
        name = getattr(callback, "__name__", repr(callback))
        raise CleanupError(
            f"{slot.slot_id}: the callback {name} rejected the slot: {type(error).__name__}: {error}",
            slot_id=slot.slot_id,
        ) from error


def _brief(error: BaseException) -> str:
    return str(error) or type(error).__name__
