"""The records of pools and slots as JSON files on the manager's machine, in the layout of the workspaces directory.

One verb is one hop to a thread. A record that cannot be read never stops the pool: it is set aside, reported and
rebuilt from what else is on disk, as a slot that must be cleaned. Exclusion is not done here (`lock_manager`), nor are
state transitions (`slot_allocator`, `coordination`); a slot's tree is never looked into.
"""

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from repopool_async import _files
from repopool_async._aio import in_thread
from repopool_async._clock import boottime, now
from repopool_async._codec import CodecError, add_checksum, dumps, loads, remove_checksum
from repopool_async.config_values import validate_repo_name, without_credentials
from repopool_async.exceptions import ConfigError, PoolNotFoundError, SlotNotFoundError, StoreError
from repopool_async.models import (
    AllocationRecord,
    CleanupResult,
    Lease,
    LeaseEnd,
    Pool,
    Slot,
    make_slot_id,
    parse_slot_id,
)

T = TypeVar("T")
OnEvent = Callable[[str, Mapping[str, object]], None]
"""Told a kind and its fields, in whichever thread it happened; must not raise."""

LOG_ROTATE_BYTES: Final = 1024 * 1024
RECORD_LIMIT_BYTES: Final = 4 * 1024 * 1024
SLOT_RECORD_BYTES: Final = 4096
"""A slot's record is filled up to this size, so that it can be overwritten in place; a larger one is replaced."""
_LOG_LIMIT_BYTES: Final = 64 * 1024 * 1024

_SLOT_NAME: Final = re.compile(r"slot([1-9][0-9]{0,17})")
# Only what could be a token or a slot number: garbage must not drive them out of every integer type.
_TOKEN_NAME: Final = re.compile(r"0*([0-9]{1,15})(?:\.[0-9]+)?")

_NO_PLAIN_FILE: Final = (errno.ELOOP, errno.EISDIR, errno.EINVAL)
_UNREADABLE: Final = (*_NO_PLAIN_FILE, errno.EFBIG, errno.EIO)
_REMEDIES: Final = {
    errno.EACCES: "give user {user} read and write permission there",
    errno.EPERM: "give user {user} read and write permission there (an immutable file also refuses)",
    errno.EROFS: "mount it read-write, or choose another workspaces_dir",
    errno.ENOSPC: "free some space on that file system",
    errno.EDQUOT: "free some of user {user}'s disk quota",
    errno.ENOTDIR: "something that is no directory is in its way; move it elsewhere",
    errno.EEXIST: "something that is no directory is in its way; move it elsewhere",
    errno.EISDIR: "a directory is in its way; move it elsewhere",
    errno.EBUSY: "unmount what is mounted there",
    errno.EXDEV: "a pool's directory must lie on one file system; unmount what is mounted inside",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit on open files",
    errno.ENAMETOOLONG: "choose a shorter workspaces_dir",
}


class SlotStore:
    """Pools, slots and their logs below one directory.

    Verbs that write are atomic: a reader or a crash sees the old record or the new one. A cancelled verb has either
    happened or not; it is never left half done, save for a deletion, which has then deleted a part of what is already
    out of sight in the trash. Where the same record is read, changed and written by several, the caller excludes the
    others (`LockManager`).

    Every verb raises `StoreError` where a directory cannot be read or written, naming the path and the remedy, and
    `ConfigError` where a pool's name is none.
    """

    def __init__(self, workspaces_dir: str | os.PathLike[str], *, on_event: OnEvent | None = None) -> None:
        """Do no I/O; the directory is made when the first pool is saved.

        Args:
            on_event: is told of `store.corrupt`: the fields are `path`, `set_aside`, `reason`, `repo_name`, `slot_id`
                and, of a slot, the new `token`, of a pool, what was `lost`.
        """
        self._root = str(Path(workspaces_dir).expanduser().absolute())
        self._on_event = on_event

    # Where things are

    @property
    def workspaces_directory(self) -> str:
        """The directory of all pools, absolute."""
        return self._root

    @property
    def locks_directory(self) -> str:
        """Where the lock files of all slots lie."""
        return f"{self._root}/locks"

    def pool_directory(self, repo_name: str) -> str:
        """Return a pool's directory.

        Raises:
            ConfigError: that can be no pool's name.
        """
        return f"{self._root}/{validate_repo_name(repo_name)}"

    def mirror_path(self, repo_name: str) -> str:
        """Return where a pool's mirror lies."""
        return f"{self.pool_directory(repo_name)}/mirror.git"

    def trash_path(self, repo_name: str) -> str:
        """Return the directory into which a pool's files are renamed to be deleted."""
        return f"{self.pool_directory(repo_name)}/trash"

    def slot_directory(self, slot_id: str) -> str:
        """Return the directory of a slot's records and files.

        Raises:
            SlotNotFoundError: that can be no slot's id.
        """
        repo_name, number = _parse(slot_id)
        return f"{self._root}/{repo_name}/slots/slot{number}"

    def tree_path(self, slot_id: str) -> str:
        """Return a slot's working tree."""
        return f"{self.slot_directory(slot_id)}/tree"

    def pristine_path(self, slot_id: str) -> str:
        """Return where a slot's next trusted git directory lies."""
        return f"{self.slot_directory(slot_id)}/pristine"

    # Pools

    async def save_pool(self, pool: Pool) -> None:
        """Write a pool's record; its directory is made, durably, where it is missing."""
        await in_thread(self.save_pool_sync, pool)

    async def load_pool(self, repo_name: str) -> Pool:
        """Return a pool's record.

        A corrupt one is rebuilt from the mirror's configuration, or from a slot's record, and the slots that are there;
        options are then lost.

        Raises:
            PoolNotFoundError: there is no such pool, or nothing to rebuild its corrupt record from.
        """
        return await in_thread(self.load_pool_sync, repo_name)

    async def list_pools(self) -> list[str]:
        """Return the names of all pools, sorted."""
        return await in_thread(self.list_pools_sync)

    async def delete_pool(self, repo_name: str) -> None:
        """Delete a pool's directory and all that is in it; its name is free at once.

        Raises:
            PoolNotFoundError: there is no such directory.
        """
        await in_thread(self.delete_pool_sync, repo_name)

    # Slots

    async def save_slot(self, slot: Slot) -> None:
        """Write a slot's record; its directory is made, durably, where it is missing."""
        await in_thread(self.save_slot_sync, slot)

    async def load_slot(self, slot_id: str) -> Slot:
        """Return a slot's record; a corrupt one is rebuilt.

        Raises:
            SlotNotFoundError: there is no such slot.
        """
        return await in_thread(self.read_slot_sync, slot_id)

    async def list_slots(self, repo_name: str) -> list[Slot]:
        """Return the records of a pool's slots by number, none where there is no such pool; rebuild corrupt ones."""
        return await in_thread(self.list_slots_sync, repo_name)

    async def delete_slot(self, slot_id: str) -> None:
        """Delete a slot's directory completely, whatever a lessee put there; it is out of sight at once.

        Raises:
            SlotNotFoundError: there is no such slot.
        """
        await in_thread(self.delete_slot_sync, slot_id)

    # Logs

    async def append_history(self, record: AllocationRecord) -> None:
        """Add a line to its slot's allocation history.

        Raises:
            SlotNotFoundError: there is no such slot.
        """
        await in_thread(self.append_history_sync, record)

    async def history(self, slot_id: str, *, limit: int | None = None) -> list[AllocationRecord]:
        """Return a slot's allocation history, oldest first.

        Args:
            limit: return only so many, the newest. At least the last MiB of lines is kept.

        Raises:
            SlotNotFoundError: there is no such slot.
        """
        return await in_thread(self._read_log, slot_id, "history.jsonl", AllocationRecord, limit)

    async def append_cleanup(self, result: CleanupResult) -> None:
        """Add a line to its slot's clean-up log.

        Raises:
            SlotNotFoundError: there is no such slot.
        """
        await in_thread(self.append_cleanup_sync, result)

    async def cleanup_log(self, slot_id: str, *, limit: int | None = None) -> list[CleanupResult]:
        """Return a slot's clean-up log, oldest first; `limit` and errors as for `history`."""
        return await in_thread(self._read_log, slot_id, "cleanup.jsonl", CleanupResult, limit)

    # The same, for callers that are in a thread already

    def save_pool_sync(self, pool: Pool) -> None:
        """Do as `save_pool`."""
        directory = self.pool_directory(pool.repo_name)
        path = f"{directory}/pool.json"
        with _translated(path, "write", repo_name=pool.repo_name):
            is_new = _make_directory(directory) or not os.path.lexists(path)
            _files.write_atomic(path, _encoded(pool), durable=is_new)

    def load_pool_sync(self, repo_name: str) -> Pool:
        """Do as `load_pool`."""
        path = f"{self.pool_directory(repo_name)}/pool.json"
        with _translated(path, "read", repo_name=repo_name):
            pool, _ = _try_read(Pool, path, repo_name=repo_name)
            pool = pool or self._rebuild_pool(repo_name)
        if pool is None:
            raise _no_pool(repo_name, self._root)
        return pool

    def list_pools_sync(self) -> list[str]:
        """Do as `list_pools`."""
        with _translated(self._root, "read"):
            return sorted(name for name in _names(self._root) if self._is_pool(name))

    def delete_pool_sync(self, repo_name: str) -> None:
        """Do as `delete_pool`."""
        directory = self.pool_directory(repo_name)
        trash = f"{self._root}/.trash"  # a dot-directory is no pool
        with _translated(directory, "delete", repo_name=repo_name):
            is_linked = Path(directory).is_symlink() and self._is_pool(repo_name)
            elsewhere = Path(directory).resolve() if is_linked else None
            entry = _files.move_to_trash(directory, trash)
            if entry is None:
                raise _no_pool(repo_name, self._root)
            _files.remove_tree(entry)
            if elsewhere is not None:
                _files.remove_tree(str(elsewhere))
        with suppress(OSError):  # what killed deletions left there
            _files.remove_tree(trash)

    def save_slot_sync(self, slot: Slot) -> None:
        """Do as `save_slot`."""
        directory = self.slot_directory(slot.slot_id)
        path = f"{directory}/slot.json"
        with _translated(path, "write", slot_id=slot.slot_id):
            is_new = _make_directory(directory) or not os.path.lexists(path)
            self._reaching(slot.slot_id, lambda: _write_slot(path, slot, is_durable=is_new))

    def write_slot_sync(self, slot: Slot) -> None:
        """Write the record of a slot that is there.

        Raises:
            SlotNotFoundError: its directory is not, or no longer, there; it is not made anew.
        """
        path = f"{self.slot_directory(slot.slot_id)}/slot.json"
        with _translated(path, "write", slot_id=slot.slot_id):
            self._reaching(slot.slot_id, lambda: _write_slot(path, slot))

    def read_slot_sync(self, slot_id: str) -> Slot:
        """Do as `load_slot`."""
        with _translated(f"{self.slot_directory(slot_id)}/slot.json", "read", slot_id=slot_id):
            slot = self._reaching(slot_id, lambda: self._read_or_rebuild(slot_id))
        if slot is None:
            raise _no_slot(slot_id)
        return slot

    def list_slots_sync(self, repo_name: str) -> list[Slot]:
        """Do as `list_slots`."""
        directory = f"{self.pool_directory(repo_name)}/slots"
        with _translated(directory, "read", repo_name=repo_name):
            numbers = sorted(_slot_numbers(directory))
        slots = []
        for number in numbers:
            with suppress(SlotNotFoundError):  # an empty directory, or somebody has just deleted it
                slots.append(self.read_slot_sync(make_slot_id(repo_name, number)))
        return slots

    def delete_slot_sync(self, slot_id: str) -> None:
        """Do as `delete_slot`."""
        directory = self.slot_directory(slot_id)
        with _translated(directory, "delete", slot_id=slot_id):
            entry = _files.move_to_trash(directory, self.trash_path(_parse(slot_id)[0]))
            if entry is None:
                raise _no_slot(slot_id)
            _files.remove_tree(entry)

    def append_history_sync(self, record: AllocationRecord) -> None:
        """Do as `append_history`."""
        self._append_log(record.slot_id, "history.jsonl", record)

    def append_cleanup_sync(self, result: CleanupResult) -> None:
        """Do as `append_cleanup`."""
        self._append_log(result.slot_id, "cleanup.jsonl", result)

    # Pools, inside

    def _is_pool(self, name: str) -> bool:
        try:
            directory = self.pool_directory(name)
        except ConfigError:
            return False
        return os.path.lexists(f"{directory}/pool.json") or _was_set_aside(directory)

    def _rebuild_pool(self, repo_name: str) -> Pool | None:
        """Make a pool's record anew where it is corrupt, or was so when somebody died rebuilding it."""
        directory = self.pool_directory(repo_name)
        path = f"{directory}/pool.json"
        if not os.path.lexists(path) and not _was_set_aside(directory):
            return None
        with _alone(directory):
            pool, reason = _try_read(Pool, path, repo_name=repo_name)
            if pool is not None:
                return pool  # somebody else was faster
            text = _bytes_of(path)
            aside = _set_aside(path)
            pool = self._guess_pool(repo_name, text)
            if pool is not None:
                _files.write_atomic(path, _encoded(pool), durable=True)
        lost = "options" if pool else "everything: neither mirror nor slot tells the repository's URL"
        self._report(path, aside, reason, repo_name=repo_name, slot_id=None, lost=lost)
        return pool

    def _guess_pool(self, repo_name: str, text: bytes) -> Pool | None:
        directory = self.pool_directory(repo_name)
        numbers = sorted(_slot_numbers(f"{directory}/slots"))
        ids = [make_slot_id(repo_name, number) for number in numbers]
        read = [_try_read(Slot, f"{self.slot_directory(slot_id)}/slot.json", slot_id=slot_id)[0] for slot_id in ids]
        slots = [slot for slot in read if slot is not None]
        url = _origin_url(f"{directory}/mirror.git/config") or next((slot.repo_url for slot in slots), "")
        if not url:
            return None
        # Lock files are never unlinked, so they tell of slots that are gone, whose numbers are not used again either.
        lock = re.compile(re.escape(f"workspace-{repo_name}-slot") + r"([1-9][0-9]{0,14})\.lock")
        used = [*numbers, *_numbers_named(self.locks_directory, lock)]
        return Pool(
            repo_name=repo_name,
            repo_url=without_credentials(url),
            num_slots=len(numbers),
            created_at=min((slot.created_at for slot in slots), default=now()),
            next_slot_number=max([1, *(number + 1 for number in used), *_numbers_in(text, b"next_slot_number")]),
        )

    # Slots, inside

    def _reaching(self, slot_id: str, act: Callable[[], T]) -> T:
        """Act within a slot's directory, opening it up where a lessee has shut it."""
        try:
            try:
                return act()
            except PermissionError:
                if not _files.open_up(self.slot_directory(slot_id)):
                    raise
                return act()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _no_slot(slot_id) from error

    def _read_or_rebuild(self, slot_id: str) -> Slot | None:
        path = f"{self.slot_directory(slot_id)}/slot.json"
        slot, _ = _try_read(Slot, path, slot_id=slot_id)
        return slot or self._rebuild_slot(slot_id, path)

    def _rebuild_slot(self, slot_id: str, path: str) -> Slot | None:
        """Make a slot's record anew; None where the directory holds nothing of a slot."""
        directory = self.slot_directory(slot_id)
        if all(_files.is_temporary_name(name) for name in _names(directory)):
            return None
        with _alone(directory):
            slot, reason = _try_read(Slot, path, is_settled=True, slot_id=slot_id)
            if slot is not None:
                return slot  # it was being written, or somebody else has rebuilt it and it may be leased since
            text = _bytes_of(path)
            aside = _set_aside(path)
            slot = self._guess_slot(slot_id, text)
            _write_slot(path, slot)
        self._report(path, aside, reason, repo_name=slot.repo_name, slot_id=slot_id, token=slot.token)
        return slot

    def _guess_slot(self, slot_id: str, text: bytes) -> Slot:
        """Return a slot to be cleaned, with a token higher than any that was ever given."""
        repo_name, _ = _parse(slot_id)
        directory = self.slot_directory(slot_id)
        records: list[AllocationRecord] = []
        with suppress(OSError):
            records = self._log_lines(slot_id, "history.jsonl", AllocationRecord, None)
        given = [record for record in records if record.event == "allocated"]
        tokens = [record.token for record in records] + _numbers_in(text, b"token")
        tokens += _numbers_named(f"{directory}/fence", _TOKEN_NAME) + _numbers_named(f"{directory}/run", _TOKEN_NAME)
        pool, _ = _try_read(Pool, f"{self.pool_directory(repo_name)}/pool.json", repo_name=repo_name)
        url = pool.repo_url if pool else _origin_url(f"{self.mirror_path(repo_name)}/config")
        return Slot(
            slot_id=slot_id,
            repo_name=repo_name,
            repo_url=without_credentials(url),
            path=self.tree_path(slot_id),
            created_at=min((record.at for record in records), default=now()),
            # History is written after the record, so it may lack the last tokens. No slot is leased once a second on
            # average, so the seconds since 1970 are ahead of any count of leases.
            token=max([int(time.time()), *(token + 1 for token in tokens)]),
            lease=_lease_of(given[-1]) if given and given[-1] is records[-1] else None,
            unsaved=LeaseEnd.CRASHED if given and given[-1] is records[-1] else None,
            last_used_at=records[-1].at if records else None,
            last_branch=given[-1].branch if given else None,
            allocation_count=len(given),
            total_allocated_seconds=sum(record.held_seconds or 0.0 for record in records),
        )

    # Logs, inside

    def _append_log(self, slot_id: str, name: str, record: AllocationRecord | CleanupResult) -> None:
        path = f"{self.slot_directory(slot_id)}/{name}"
        with _translated(path, "write", slot_id=slot_id):
            line = dumps(record)
            self._reaching(slot_id, lambda: self._append_line(slot_id, path, line))

    def _append_line(self, slot_id: str, path: str, line: bytes) -> None:
        try:
            _files.append_line(path, line, rotate_bytes=LOG_ROTATE_BYTES)
        except OSError as error:
            if error.errno not in _NO_PLAIN_FILE and not _is_shut(path, error):
                raise
            self._report(path, _set_aside(path), str(error), repo_name=_parse(slot_id)[0], slot_id=slot_id)
            _files.append_line(path, line, rotate_bytes=LOG_ROTATE_BYTES)

    def _read_log(self, slot_id: str, name: str, kind: type[T], limit: int | None) -> list[T]:
        directory = self.slot_directory(slot_id)
        with _translated(f"{directory}/{name}", "read", slot_id=slot_id):
            self._reaching(slot_id, lambda: os.scandir(directory).close())
            return self._log_lines(slot_id, name, kind, limit)

    def _log_lines(self, slot_id: str, name: str, kind: type[T], limit: int | None) -> list[T]:
        """Return the newest readable lines; a line that was cut off or overwritten is passed over."""
        found: list[T] = []
        for path in (f"{self.slot_directory(slot_id)}/{name}", f"{self.slot_directory(slot_id)}/{name}.1"):
            for line in reversed(_log_bytes(path).split(b"\n")):
                if limit is not None and len(found) >= limit:
                    return found[::-1]
                with suppress(CodecError):
                    found.append(loads(kind, line))
        return found[::-1]

    def _report(self, path: str, set_aside: str | None, reason: str | None, **fields: object) -> None:
        if self._on_event is not None:
            about = {"path": path, "set_aside": set_aside, "reason": reason or "it was missing"}
            self._on_event("store.corrupt", {**about, **fields})


# Ids and errors


def _parse(slot_id: str) -> tuple[str, int]:
    try:
        repo_name, number = parse_slot_id(slot_id)
        return validate_repo_name(repo_name), number
    except ValueError as error:
        raise SlotNotFoundError(f"there is no slot {slot_id!r}: {error}", slot_id=slot_id) from error


def _no_slot(slot_id: str) -> SlotNotFoundError:
    repo_name, _ = _parse(slot_id)
    message = f"there is no slot {slot_id}; list_slots({repo_name!r}) tells which there are"
    return SlotNotFoundError(message, repo_name=repo_name, slot_id=slot_id)


def _no_pool(repo_name: str, root: str) -> PoolNotFoundError:
    message = f"there is no pool {repo_name!r} in {root}; create_pool makes one, list_pools tells which there are"
    return PoolNotFoundError(message, repo_name=repo_name)


@contextmanager
def _translated(path: str, verb: str, *, repo_name: str | None = None, slot_id: str | None = None) -> Iterator[None]:
    """Say what failed, where, and what helps."""
    if slot_id is not None:
        repo_name, _ = _parse(slot_id)
    about = f"{slot_id or repo_name}: " if repo_name else ""
    try:
        yield
    except CodecError as error:
        raise StoreError(f"{about}{path}: {error}", repo_name=repo_name, slot_id=slot_id) from error
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the disk and its file system")
        remedy = remedy.format(user=os.geteuid())
        where = error.filename if verb == "delete" and isinstance(error.filename, str) else path
        message = f"{about}cannot {verb} {where}: {error.strerror}; {remedy}"
        raise StoreError(message, repo_name=repo_name, slot_id=slot_id) from error


# Records


class _CorruptError(Exception):
    """There is something, but it is not the record that should be there."""


def _try_read(kind: type[T], path: str, *, is_settled: bool = False, **identity: str) -> tuple[T | None, str | None]:
    """Return the record, or None and what is wrong with what is there; None twice where there is nothing."""
    try:
        return _read_record(kind, path, is_settled, identity), None
    except _CorruptError as error:
        return None, str(error)


def _read_record(kind: type[T], path: str, is_settled: bool, identity: Mapping[str, str]) -> T | None:
    try:
        data = _files.read_regular(path, RECORD_LIMIT_BYTES, is_settled=is_settled)
        record = None if data is None else loads(kind, remove_checksum(data))
    except NotADirectoryError:
        return None
    except OSError as error:
        if error.errno not in _UNREADABLE and not _is_shut(path, error):
            raise
        raise _CorruptError(error.strerror) from error
    except CodecError as error:
        raise _CorruptError(str(error)) from error
    for name, expected in identity.items():
        if record is not None and getattr(record, name) != expected:
            raise _CorruptError(f"it is the record of {getattr(record, name)!r}")
    return record


def _write_slot(path: str, slot: Slot, *, is_durable: bool = False) -> None:
    data = add_checksum(_encoded(slot), SLOT_RECORD_BYTES)
    if is_durable or len(data) != SLOT_RECORD_BYTES or not _files.overwrite(path, data):
        _files.write_atomic(path, data, durable=is_durable)


def _encoded(record: Pool | Slot) -> bytes:
    data = dumps(record)
    if len(data) > RECORD_LIMIT_BYTES - SLOT_RECORD_BYTES:
        raise CodecError(f"the record has {len(data)} bytes, more than {RECORD_LIMIT_BYTES}; keep its metadata small")
    return data


def _is_shut(path: str, error: OSError) -> bool:
    """Return whether a file of our own forbids us to open it; another user's may well be intact."""
    return isinstance(error, PermissionError) and os.path.lexists(path) and os.lstat(path).st_uid == os.geteuid()


def _set_aside(path: str) -> str | None:
    """Rename what is there, whatever it is; return the new path, None where there is nothing."""
    aside = f"{path}.corrupt-{now():%Y%m%dT%H%M%S.%fZ}"
    try:
        Path(path).rename(aside)
    except FileNotFoundError:
        return None
    return aside


def _was_set_aside(directory: str) -> bool:
    is_aside = any(name.startswith("pool.json.corrupt-") for name in _names(directory))
    return is_aside and os.path.lexists(f"{directory}/mirror.git/config")


def _bytes_of(path: str) -> bytes:
    """Return what can be read of a file that may be anything."""
    try:
        return _files.read_regular(path, RECORD_LIMIT_BYTES) or b""
    except OSError:
        return b""


def _log_bytes(path: str) -> bytes:
    """Return a log; an empty one where something is there that the next line will set aside."""
    try:
        return _files.read_regular(path, _LOG_LIMIT_BYTES) or b""
    except OSError as error:
        if error.errno not in _UNREADABLE and not _is_shut(path, error):
            raise
        return b""


def _numbers_in(text: bytes, key: bytes) -> list[int]:
    """Return the numbers that a key had in JSON which can no longer be parsed."""
    return [int(number) for number in re.findall(rb'"%b":([0-9]{1,15})(?![0-9])' % key, text)]


def _lease_of(record: AllocationRecord) -> Lease:
    age = (now() - record.at).total_seconds()
    return Lease(
        lease_id=record.lease_id,
        token=record.token,
        owner=record.owner,
        acquired_at=record.at,
        acquired_boottime=max(0.0, boottime() - age),
        ref=record.ref,
        commit=record.commit,
        branch=record.branch,
        metadata=record.metadata,
    )


# Directories


@contextmanager
def _alone(directory: str) -> Iterator[None]:
    """Keep other processes from rebuilding in the same directory: the slower one would undo a lease given since."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems cannot lock a directory
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # closing alone would leave it locked by a child that was forked meanwhile
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _make_directory(path: str) -> bool:
    """Make a directory and its missing parents, durably; return whether it was missing."""
    directory = Path(path)
    if directory.is_dir():
        return False
    _make_directory(str(directory.parent))
    directory.mkdir(exist_ok=True)
    _files.sync_directory(str(directory.parent))
    return True


def _names(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _numbers_named(directory: str, pattern: re.Pattern[str]) -> list[int]:
    """Return the numbers in the names of a directory, none where it cannot be read."""
    with suppress(OSError):
        return [int(match[1]) for match in map(pattern.fullmatch, _names(directory)) if match]
    return []


def _slot_numbers(directory: str) -> list[int]:
    try:
        with os.scandir(directory) as entries:
            matches = [_SLOT_NAME.fullmatch(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [int(match[1]) for match in matches if match]


# The mirror's configuration


def _origin_url(path: str) -> str:
    """Return the URL of `origin` in a git configuration file, read as text; empty where there is none."""
    is_origin = False
    for line in _bytes_of(path).decode(errors="surrogateescape").splitlines():
        text = line.strip()
        if text.startswith("["):
            header, _, text = text[1:].partition("]")
            kind, _, name = header.strip().partition(" ")
            is_origin = kind.lower() == "remote" and name.strip() == '"origin"'
        key, equals, value = text.partition("=")
        if is_origin and equals and key.strip().lower() == "url":
            return _config_value(value)
    return ""


def _config_value(text: str) -> str:
    value, is_quoted = "", False
    for escaped, mark, plain in re.findall(r'\\(.)|(["#;])|([^\\"#;]+)', text.strip()):
        if mark == '"':
            is_quoted = not is_quoted
        elif mark and not is_quoted:
            break
        else:
            value += {"n": "\n", "t": "\t", "b": "\b"}.get(escaped, escaped) or mark or plain
    return value.strip()
