"""Exclusive locks by lock files, between processes and within one (4.1 to 4.5).

Each id has two: the *slot lock*, held for as long as a slot is somebody's, and the *record lock*, held for the
microseconds of one read-modify-write. Both are kernel locks taken through filelock's functions for descriptors, so
they die with their holder, and their files are never unlinked. Nothing here knows states, leases or tokens, or reads a
record.

A lock is worth what its file is worth: `force_unlock` renames a fresh file into place, and from then on the old holder
locks an inode that nobody looks at. `HeldLock.is_current` tells, and is to be asked under the record lock.
"""

import asyncio
import errno
import functools
import itertools
import os
import random
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from repopool_async._aio import Deadline, in_thread, shielded
from repopool_async._codec import CodecError, dumps, loads
from repopool_async._flock import OPEN_FLAGS, identity_of, is_flocked, lock_files
from repopool_async._identity import current_owner
from repopool_async.exceptions import LockTimeoutError, PoolManagerError, StoreError
from repopool_async.models import Owner, StaleLock

DEFAULT_TIMEOUT_SECONDS: Final = 30.0
POLL_SECONDS: Final = (0.002, 0.1)
"""The first and the longest pause between attempts; jittered."""

RECORD_TIMEOUT_SECONDS: Final = 10.0
_RECORD_POLL_SECONDS: Final = (0.00002, 0.002)
_UNSIGNED_SECONDS: Final = 0.5  # looking takes microseconds, but on a busy machine whoever looks may be interrupted
_TEXT_BYTES: Final = 256
_SECONDS_PER_HOUR: Final = 3600.0

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_LOCK_NAME: Final = re.compile(r"(?P<id>[A-Za-z0-9].*(?<!\.record))\.lock")
_FRESH_NAME: Final = re.compile(r"\..+\.[0-9]+-[0-9]+\.fresh")
_counter: Final = itertools.count()

_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class HeldLock:
    """A slot lock that this process holds, until `release`, until nobody has this object, or until the process ends.

    It is bound to no task or thread. In a forked child it is not held, and releasing it there does nothing.

    Attributes:
        was_left: whether the last holder ended without releasing it, and so perhaps amid something.
    """

    def __init__(
        self,
        slot_id: str,
        path: str,
        descriptor: int,
        identity: tuple[int, int],
        *,
        was_left: bool = False,
    ) -> None:
        self.slot_id: Final = slot_id
        self.was_left: Final = was_left
        self._path = path
        # A list, because its pop is the one step in which a second release must lose.
        self._descriptors = [descriptor]
        self._identity = identity
        self._pid = os.getpid()
        self._is_left = False

    def __del__(self) -> None:
        # Whoever lost it cannot give it up any more; what the slot's record says is then left to recovery.
        self.release_sync()

    def __repr__(self) -> str:
        return f"<HeldLock {self.slot_id} [{'held' if self.is_held else 'released'}]>"

    @property
    def is_held(self) -> bool:
        """Whether it has not been released; says nothing of whether it was taken away."""
        return bool(self._descriptors) and self._pid == os.getpid()

    def is_current(self) -> bool:
        """Return whether it is held and still excludes others: its file is the one that the path leads to.

        Only under the record lock is the answer still true when it arrives.
        """
        return self.is_held and identity_of(self._path) == self._identity

    def leave(self) -> None:
        """Have the next holder find `was_left`, as after a death: it knows best what to do about a half done thing."""
        self._is_left = True

    def release_sync(self) -> None:
        """Give the lock up; a second call does nothing."""
        try:
            descriptor = self._descriptors.pop()
        except IndexError:
            return
        if self._pid != os.getpid():
            return  # closed in the child, where the number may be another file's by now
        try:
            if not self._is_left:
                _write_text(descriptor, b"")
        finally:
            lock_files.close(descriptor)

    async def release(self) -> None:
        """Do as `release_sync`; it is released also where this is cancelled."""
        await in_thread(self.release_sync)


class LockManager:
    """The locks below one directory, which is made when the first is taken.

    Verbs ending in `_sync` are for callers that are in a worker thread already. Every verb raises `StoreError` where a
    lock file cannot be opened, and `ValueError` for an id that can be no file's name.

    Args:
        locks_dir: where the lock files lie; on a local file system.
        poll: seconds between attempts, the first and the longest.
    """

    def __init__(self, locks_dir: str | os.PathLike[str], *, poll: tuple[float, float] = POLL_SECONDS) -> None:
        self._directory = str(Path(locks_dir).expanduser().absolute())
        self._poll = poll
        self._gates: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()

    # Slot locks

    @asynccontextmanager
    async def acquire_slot_lock(
        self, slot_id: str, timeout: float | None = DEFAULT_TIMEOUT_SECONDS
    ) -> AsyncIterator[HeldLock]:
        """Hold a slot's lock for the block.

        Within a process (and event loop) waiters are served in order and the next one is woken at once; between
        processes the first of each polls. Cancelled while waiting, it holds nothing.

        Args:
            timeout: seconds to wait at most, 0 for one attempt, None for any time.

        Raises:
            LockTimeoutError: somebody else held it all that time.
        """
        deadline = Deadline.after(timeout)
        gate = self._gate(slot_id)
        await self._enter(gate, slot_id, deadline, timeout)
        try:
            held = await self._poll_for(slot_id, deadline, timeout)
            try:
                yield held
            finally:
                await held.release()
        finally:
            gate.release()

    async def try_acquire(self, slot_id: str) -> HeldLock | None:
        """Take a slot's lock where it is free, else return None. Cancelled, it holds nothing."""
        return await shielded(
            in_thread(self.try_acquire_sync, slot_id), name=f"lock-{slot_id}", on_abandoned=_release_if_held
        )

    def try_acquire_sync(self, slot_id: str, *, is_signed: bool = True) -> HeldLock | None:
        """Do as `try_acquire`.

        Args:
            is_signed: False for who needs exclusion alone, and can do without a signature on a disk that is full.
        """
        path = self._path(slot_id)
        with _translated(path, slot_id):
            deadline = time.monotonic() + _UNSIGNED_SECONDS
            pauses = _pauses(*_RECORD_POLL_SECONDS)
            while (held := _try_lock(slot_id, path, path, is_signed=is_signed)) is None:
                # A holder signs the file. Where it is not signed somebody is just taking, releasing or looking at it.
                if _read_text(path) or time.monotonic() > deadline:
                    break
                time.sleep(next(pauses))
        return held

    async def is_locked(self, slot_id: str) -> bool:
        """Return whether anybody, this process included, holds a slot's lock (4.5); disturbs nobody."""
        return await in_thread(self.is_locked_sync, slot_id)

    def is_locked_sync(self, slot_id: str) -> bool:
        """Do as `is_locked`."""
        path = self._path(slot_id)
        with _translated(path, slot_id):
            return is_flocked(path)

    def holder_sync(self, slot_id: str) -> Owner | None:
        """Return who signed the lock file last and has not released it; perhaps dead by now."""
        return _parse_owner(_read_text(self._path(slot_id)))

    def known_ids_sync(self) -> list[str]:
        """Return every id that was ever locked, sorted."""
        with _translated(self._directory, None):
            names = _names_in(self._directory)
        return sorted(match["id"] for match in map(_LOCK_NAME.fullmatch, names) if match is not None)

    # Record locks

    @contextmanager
    def record_lock_sync(self, slot_id: str, *, patience: float = RECORD_TIMEOUT_SECONDS) -> Iterator[None]:
        """Hold a slot's record lock for the block, which must be over in microseconds and must not take another.

        Args:
            patience: seconds to wait for it at most.

        Raises:
            LockTimeoutError: it was not free for so long: its holder is stopped, or the disk hangs.
        """
        path = f"{self._path(slot_id).removesuffix('.lock')}.record.lock"
        with _translated(path, slot_id):
            descriptor = self._lock_record(path, slot_id, patience)
        try:
            yield
        finally:
            lock_files.close(descriptor)

    # Taking locks away

    async def force_unlock(self, slot_id: str) -> bool:
        """Make a slot's lock free, whoever holds it; return whether anybody did.

        The holder is not stopped and does not notice by itself: its `HeldLock.is_current` is False from now on. Where
        records with tokens exist, use the coordinator's verb of this name, which also invalidates the token.
        """
        return await in_thread(self._force_unlock_sync, slot_id)

    def replace_sync(self, slot_id: str) -> None:
        """Put a fresh, free lock file into place. Call it under the record lock."""
        path = self._path(slot_id)
        with _translated(path, slot_id):
            fresh = self._fresh_path(slot_id)
            lock_files.close(lock_files.open(fresh, OPEN_FLAGS | os.O_EXCL))
            Path(fresh).replace(path)

    def seize_sync(self, slot_id: str) -> HeldLock:
        """Take a slot's lock away from whoever holds it. Call it under the record lock."""
        path = self._path(slot_id)
        with _translated(path, slot_id):
            fresh = self._fresh_path(slot_id)
            held = _try_lock(slot_id, fresh, path, is_signed=False)
            if held is None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), fresh)
            Path(fresh).replace(path)
        return held

    async def detect_stale_locks(self, *, older_than_hours: float | None = None) -> list[StaleLock]:
        """Return the locks whose holder ended without releasing them (4.4).

        The kernel has freed them already; what is stale is the signature in the file, which says who left a slot
        behind.

        Args:
            older_than_hours: only those signed longer ago than this, by the wall clock.
        """
        return await in_thread(self._stale_locks, older_than_hours, False)

    async def cleanup_stale_locks(
        self, *, older_than_hours: float | None = None, spared_prefix: str | tuple[str, ...] = ()
    ) -> list[StaleLock]:
        """Erase the signatures that `detect_stale_locks` finds and return them (9.4).

        Args:
            spared_prefix: locks whose names begin so (with any of several) keep theirs, because their next holder must
                know (`was_left`).
        """
        return await in_thread(self._stale_locks, older_than_hours, True, spared_prefix)

    # Inside

    def _path(self, slot_id: str) -> str:
        if _ID.fullmatch(slot_id) is None or slot_id.endswith(".record"):
            raise ValueError(f"{slot_id!r} can be no lock's name: 1 to 200 letters, digits, '.', '_' or '-'")
        return f"{self._directory}/{slot_id}.lock"

    def _fresh_path(self, slot_id: str) -> str:
        Path(self._directory).mkdir(parents=True, exist_ok=True)
        return f"{self._directory}/.{slot_id}.{os.getpid()}-{next(_counter)}.fresh"

    def _gate(self, slot_id: str) -> asyncio.Lock:
        key = (id(asyncio.get_running_loop()), slot_id)
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates[key] = asyncio.Lock()
        return gate

    async def _enter(self, gate: asyncio.Lock, slot_id: str, deadline: Deadline, timeout: float | None) -> None:
        try:
            async with deadline.limit():
                await gate.acquire()
        except TimeoutError:
            raise await self._timed_out(slot_id, timeout) from None

    async def _poll_for(self, slot_id: str, deadline: Deadline, timeout: float | None) -> HeldLock:
        for pause in _pauses(*self._poll):
            held = await self.try_acquire(slot_id)
            if held is not None:
                return held
            if deadline.is_expired:
                break
            remaining = deadline.remaining()
            await asyncio.sleep(pause if remaining is None else min(pause, remaining))
        raise await self._timed_out(slot_id, timeout)

    async def _timed_out(self, slot_id: str, timeout: float | None) -> LockTimeoutError:
        owner = await in_thread(self.holder_sync, slot_id)
        who = f"process {owner.pid} on {owner.host}" if owner else "another process"
        waited = "" if timeout is None else f" within {timeout:g} s"
        message = f"{slot_id}: its lock was not free{waited}; {who} holds it: wait longer, end it, or force_unlock"
        return LockTimeoutError(message, slot_id=slot_id)

    def _lock_record(self, path: str, slot_id: str, patience: float) -> int:
        deadline = time.monotonic() + patience
        for pause in _pauses(*_RECORD_POLL_SECONDS):
            descriptor = lock_files.take(path)
            if descriptor is not None:
                return descriptor
            if time.monotonic() >= deadline:
                break
            time.sleep(pause)
        raise LockTimeoutError(
            f"{slot_id}: its record was locked for {patience:g} s by a process that must be stopped or "
            f"stuck on its disk; continue or end it (fuser {path})",
            slot_id=slot_id,
        )

    def _force_unlock_sync(self, slot_id: str) -> bool:
        with self.record_lock_sync(slot_id):
            is_locked = self.is_locked_sync(slot_id)
            if is_locked:
                self.replace_sync(slot_id)
        return is_locked

    def _stale_locks(
        self, older_than_hours: float | None, is_erased: bool, spared_prefix: str | tuple[str, ...] = ()
    ) -> list[StaleLock]:
        found = []
        with _translated(self._directory, None):
            for name in sorted(_names_in(self._directory)):
                match = _LOCK_NAME.fullmatch(name)
                if match is not None and not match["id"].startswith(spared_prefix):
                    stale = _stale_lock(match["id"], f"{self._directory}/{name}")
                    if stale is not None and _is_older(stale, older_than_hours):
                        found.append(stale)
                elif is_erased and _FRESH_NAME.fullmatch(name):
                    _remove_left_over(f"{self._directory}/{name}")
        return [stale for stale in found if not is_erased or self._erase(stale)]

    def _erase(self, stale: StaleLock) -> bool:
        held = self.try_acquire_sync(stale.slot_id)
        if held is None:
            return False
        held.release_sync()
        return True


def _try_lock(slot_id: str, path: str, final_path: str, *, is_signed: bool) -> HeldLock | None:
    """Make one attempt to lock `path`, which is or will be `final_path`, and sign it, or at least try to."""
    descriptor = lock_files.take(path)
    if descriptor is None:
        return None
    try:
        status = os.fstat(descriptor)
        was_left = bool(os.pread(descriptor, _TEXT_BYTES, 0).strip())
        has_signed = _sign(descriptor, is_signed=is_signed)
    except BaseException:
        lock_files.close(descriptor)
        raise
    held = HeldLock(slot_id, final_path, descriptor, (status.st_dev, status.st_ino), was_left=was_left)
    if not has_signed:
        held.leave()  # there is no signature to erase, and no room for the blanks
    return held


def _sign(descriptor: int, *, is_signed: bool) -> bool:
    """Write our name into a lock file, and return whether it is there."""
    try:
        _write_text(descriptor, _owner_text(os.getpid()))
    except OSError as error:
        if is_signed or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return True


@functools.lru_cache(maxsize=1)
def _owner_text(pid: int) -> bytes:  # noqa: ARG001 - a forked child is somebody else
    return dumps(current_owner()).strip()


def _write_text(descriptor: int, text: bytes) -> None:
    # Blanks, not a shorter file: ext4 flushes a truncated file to disk when it is closed.
    os.pwrite(descriptor, text.ljust(_TEXT_BYTES - 1) + b"\n", 0)


def _read_text(path: str) -> bytes:
    try:
        descriptor = os.open(path, _READ)  # never locked, so a forked child may have it
    except FileNotFoundError:
        return b""
    try:
        return os.read(descriptor, 4 * _TEXT_BYTES).split(b"\n")[0].strip()
    finally:
        os.close(descriptor)


def _parse_owner(text: bytes) -> Owner | None:
    try:
        return loads(Owner, text) if text else None
    except CodecError:
        return None


def _stale_lock(slot_id: str, path: str) -> StaleLock | None:
    text = _read_text(path)
    if not text or is_flocked(path):
        return None
    try:
        age = max(0.0, time.time() - Path(path).stat().st_mtime)
    except FileNotFoundError:
        return None
    return StaleLock(slot_id=slot_id, path=path, owner=_parse_owner(text), age_seconds=age)


def _is_older(stale: StaleLock, hours: float | None) -> bool:
    return hours is None or (stale.age_seconds or 0.0) > hours * _SECONDS_PER_HOUR


def _remove_left_over(path: str) -> None:
    """Remove a fresh lock file whose maker was killed before it was renamed into place."""
    with suppress(FileNotFoundError):
        if time.time() - Path(path).stat().st_mtime > _SECONDS_PER_HOUR:
            Path(path).unlink()


def _names_in(directory: str) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208 - names are wanted
    except FileNotFoundError:
        return []


def _pauses(first: float, longest: float) -> Iterator[float]:
    pause = first
    while True:
        yield pause * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        pause = min(2 * pause, longest)


async def _release_if_held(held: HeldLock | None) -> None:
    if held is not None:
        await held.release()


@contextmanager
def _translated(path: str, slot_id: str | None) -> Iterator[None]:
    try:
        yield
    except PoolManagerError:  # some are also OSError, as time-outs
        raise
    except OSError as error:
        about = f"{slot_id}: " if slot_id else ""
        message = (
            f"{about}cannot use the lock file {path}: {error.strerror}; its directory must be on a local file system "
            f"that this user may write to, with space left, and open files within the limit (ulimit -n)"
        )
        raise StoreError(message, slot_id=slot_id) from error
