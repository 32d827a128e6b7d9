"""The records of pools and slots as JSON files on the manager's machine, in the layout of the workspaces directory.

One verb is one hop to a thread. A record that cannot be read never stops the pool: it is set aside, reported and
rebuilt from what else is on disk, as a slot that must be cleaned. Exclusion is not done here (`lock_manager`), nor are
state transitions (`slot_allocator`, `coordination`); a slot's tree is never looked into.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from repopool_async import _files, _removal
from repopool_async._aio import in_thread
from repopool_async._codec import CodecError, dumps, loads
from repopool_async.exceptions import ConfigError, SlotNotFoundError
from repopool_async.models import AllocationRecord, CleanupResult, Pool, Slot, make_slot_id
from repopool_async.record_files import (
    NO_PLAIN_FILE,
    alone,
    bytes_of,
    encoded,
    is_shut,
    log_bytes,
    make_directory,
    names_in,
    set_aside,
    slot_numbers,
    try_read,
    was_set_aside,
    write_slot,
)
from repopool_async.record_guesses import guess_pool, guess_slot
from repopool_async.store_errors import no_pool, no_slot, translated
from repopool_async.store_layout import StoreLayout, parse_id

T = TypeVar("T")
OnEvent = Callable[[str, Mapping[str, object]], None]
"""Told a kind and its fields, in whichever thread it happened; must not raise."""

LOG_ROTATE_BYTES: Final = 1024 * 1024


class SlotStore(StoreLayout):
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
        super().__init__(workspaces_dir)
        self._on_event = on_event

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
        with translated(path, "write", repo_name=pool.repo_name):
            is_new = make_directory(directory) or not os.path.lexists(path)
            _files.write_atomic(path, encoded(pool), durable=is_new)

    def load_pool_sync(self, repo_name: str) -> Pool:
        """Do as `load_pool`."""
        path = f"{self.pool_directory(repo_name)}/pool.json"
        with translated(path, "read", repo_name=repo_name):
            pool, _ = try_read(Pool, path, repo_name=repo_name)
            pool = pool or self._rebuild_pool(repo_name)
        if pool is None:
            raise no_pool(repo_name, self._root)
        return pool

    def list_pools_sync(self) -> list[str]:
        """Do as `list_pools`."""
        with translated(self._root, "read"):
            return sorted(name for name in names_in(self._root) if self._is_pool(name))

    def delete_pool_sync(self, repo_name: str) -> None:
        """Do as `delete_pool`."""
        directory = self.pool_directory(repo_name)
        trash = f"{self._root}/.trash"  # a dot-directory is no pool
        with translated(directory, "delete", repo_name=repo_name):
            is_linked = Path(directory).is_symlink() and self._is_pool(repo_name)
            elsewhere = Path(directory).resolve() if is_linked else None
            entry = _removal.move_to_trash(directory, trash)
            if entry is None:
                raise no_pool(repo_name, self._root)
            _removal.remove_tree(entry)
            if elsewhere is not None:
                _removal.remove_tree(str(elsewhere))
        with suppress(OSError):  # what killed deletions left there
            _removal.remove_tree(trash)

    def save_slot_sync(self, slot: Slot) -> None:
        """Do as `save_slot`."""
        directory = self.slot_directory(slot.slot_id)
        path = f"{directory}/slot.json"
        with translated(path, "write", slot_id=slot.slot_id):
            is_new = make_directory(directory) or not os.path.lexists(path)
            self._reaching(slot.slot_id, lambda: write_slot(path, slot, is_durable=is_new))

    def write_slot_sync(self, slot: Slot) -> None:
        """Write the record of a slot that is there.

        Raises:
            SlotNotFoundError: its directory is not, or no longer, there; it is not made anew.
        """
        path = f"{self.slot_directory(slot.slot_id)}/slot.json"
        with translated(path, "write", slot_id=slot.slot_id):
            self._reaching(slot.slot_id, lambda: write_slot(path, slot))

    def read_slot_sync(self, slot_id: str) -> Slot:
        """Do as `load_slot`."""
        with translated(f"{self.slot_directory(slot_id)}/slot.json", "read", slot_id=slot_id):
            slot = self._reaching(slot_id, lambda: self._read_or_rebuild(slot_id))
        if slot is None:
            raise no_slot(slot_id)
        return slot

    def list_slots_sync(self, repo_name: str) -> list[Slot]:
        """Do as `list_slots`."""
        directory = f"{self.pool_directory(repo_name)}/slots"
        with translated(directory, "read", repo_name=repo_name):
            numbers = sorted(slot_numbers(directory))
        slots = []
        for number in numbers:
            with suppress(SlotNotFoundError):  # an empty directory, or somebody has just deleted it
                slots.append(self.read_slot_sync(make_slot_id(repo_name, number)))
        return slots

    def delete_slot_sync(self, slot_id: str) -> None:
        """Do as `delete_slot`."""
        directory = self.slot_directory(slot_id)
        with translated(directory, "delete", slot_id=slot_id):
            entry = _removal.move_to_trash(directory, self.trash_path(parse_id(slot_id)[0]))
            if entry is None:
                raise no_slot(slot_id)
            _removal.remove_tree(entry)

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
        return os.path.lexists(f"{directory}/pool.json") or was_set_aside(directory)

    def _rebuild_pool(self, repo_name: str) -> Pool | None:
        """Make a pool's record anew where it is corrupt, or was so when somebody died rebuilding it."""
        directory = self.pool_directory(repo_name)
        path = f"{directory}/pool.json"
        if not os.path.lexists(path) and not was_set_aside(directory):
            return None
        with alone(directory):
            pool, reason = try_read(Pool, path, repo_name=repo_name)
            if pool is not None:
                return pool  # somebody else was faster
            text = bytes_of(path)
            aside = set_aside(path)
            pool = guess_pool(self, repo_name, text)
            if pool is not None:
                _files.write_atomic(path, encoded(pool), durable=True)
        lost = "options" if pool else "everything: neither mirror nor slot tells the repository's URL"
        self._report(path, aside, reason, repo_name=repo_name, slot_id=None, lost=lost)
        return pool

    # Slots, inside

    def _reaching(self, slot_id: str, act: Callable[[], T]) -> T:
        """Act within a slot's directory, opening it up where a lessee has shut it."""
        try:
            try:
                return act()
            except PermissionError:
                if not _removal.open_up(self.slot_directory(slot_id)):
                    raise
                return act()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise no_slot(slot_id) from error

    def _read_or_rebuild(self, slot_id: str) -> Slot | None:
        path = f"{self.slot_directory(slot_id)}/slot.json"
        slot, _ = try_read(Slot, path, slot_id=slot_id)
        return slot or self._rebuild_slot(slot_id, path)

    def _rebuild_slot(self, slot_id: str, path: str) -> Slot | None:
        """Make a slot's record anew; None where the directory holds nothing of a slot."""
        directory = self.slot_directory(slot_id)
        if _is_bare(directory):
            return None
        with alone(directory) as is_still:
            slot, reason = try_read(Slot, path, is_settled=True, slot_id=slot_id)
            if slot is not None:
                return slot  # it was being written, or somebody else has rebuilt it and it may be leased since
            text = bytes_of(path)
            if not is_still() or _is_bare(directory):
                return None  # deleted since we looked; what is there now is being made, and not ours to write
            if reason is None and os.path.lexists(path):
                return try_read(Slot, path, slot_id=slot_id)[0]  # written since we looked
            aside = set_aside(path)
            slot = guess_slot(self, slot_id, text, self._known_history(slot_id))
            write_slot(path, slot)
        self._report(path, aside, reason, repo_name=slot.repo_name, slot_id=slot_id, token=slot.token)
        return slot

    # Logs, inside

    def _known_history(self, slot_id: str) -> list[AllocationRecord]:
        with suppress(OSError):
            return self._log_lines(slot_id, "history.jsonl", AllocationRecord, None)
        return []

    def _append_log(self, slot_id: str, name: str, record: AllocationRecord | CleanupResult) -> None:
        path = f"{self.slot_directory(slot_id)}/{name}"
        with translated(path, "write", slot_id=slot_id):
            line = dumps(record)
            self._reaching(slot_id, lambda: self._append_line(slot_id, path, line))

    def _append_line(self, slot_id: str, path: str, line: bytes) -> None:
        try:
            _files.append_line(path, line, rotate_bytes=LOG_ROTATE_BYTES)
        except OSError as error:
            if error.errno not in NO_PLAIN_FILE and not is_shut(path, error):
                raise
            self._report(path, set_aside(path), str(error), repo_name=parse_id(slot_id)[0], slot_id=slot_id)
            _files.append_line(path, line, rotate_bytes=LOG_ROTATE_BYTES)

    def _read_log(self, slot_id: str, name: str, kind: type[T], limit: int | None) -> list[T]:
        directory = self.slot_directory(slot_id)
        with translated(f"{directory}/{name}", "read", slot_id=slot_id):
            self._reaching(slot_id, lambda: os.scandir(directory).close())
            return self._log_lines(slot_id, name, kind, limit)

    def _log_lines(self, slot_id: str, name: str, kind: type[T], limit: int | None) -> list[T]:
        """Return the newest readable lines; a line that was cut off or overwritten is passed over."""
        found: list[T] = []
        for path in (f"{self.slot_directory(slot_id)}/{name}", f"{self.slot_directory(slot_id)}/{name}.1"):
            for line in reversed(log_bytes(path).split(b"\n")):
                if limit is not None and len(found) >= limit:
                    return found[::-1]
                with suppress(CodecError):
                    found.append(loads(kind, line))
        return found[::-1]

    def _report(self, path: str, set_aside: str | None, reason: str | None, **fields: object) -> None:
        if self._on_event is not None:
            about = {"path": path, "set_aside": set_aside, "reason": reason or "it was missing"}
            self._on_event("store.corrupt", {**about, **fields})


def _is_bare(directory: str) -> bool:
    """Return whether a directory holds nothing of a slot: its first record may be under way."""
    return all(_files.is_temporary_name(name) for name in names_in(directory))
