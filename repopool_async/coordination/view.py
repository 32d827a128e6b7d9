"""What this process last saw of a pool's slots, so that a claim need not read every record.

A hint and nothing more: whoever acts on a slot reads its record anew under the record lock. Nothing here locks, writes
or decides.
"""

import os
import re
import threading
import time
from typing import Final

import attrs

from repopool_async.exceptions import SlotNotFoundError
from repopool_async.models import Slot, make_slot_id
from repopool_async.slot_store import SlotStore

FRESH_SECONDS: Final = 0.05
"""How long a view is used before the files are looked at again, unless nothing in it could be claimed."""

_RACY_NS: Final = 20_000_000
_TRUST_SECONDS: Final = 5.0
_SLOT_NAME: Final = re.compile(r"slot([1-9][0-9]{0,17})")

_Stamp = tuple[int, int, int]


@attrs.frozen
class _Seen:
    slot: Slot
    stamp: _Stamp | None
    until: float = attrs.field(factory=lambda: time.monotonic() + _TRUST_SECONDS)

    def is_still(self, stamp: _Stamp | None) -> bool:
        return stamp is not None and self.stamp == stamp and time.monotonic() < self.until


class PoolView:
    """The slots of one pool as last seen; may be used from several threads.

    A record is read again only where its file changed (modification time, inode, size). A file that was younger than
    the file system's clock can tell apart when it was read counts as changed, and so does what was read long ago.
    """

    def __init__(self, store: SlotStore, repo_name: str) -> None:
        self._store = store
        self._repo_name = repo_name
        self._directory = f"{store.pool_directory(repo_name)}/slots"
        self._seen: dict[str, _Seen] = {}
        self._looked_at = float("-inf")
        self._lock = threading.Lock()

    @property
    def is_fresh(self) -> bool:
        """Whether the files were looked at within the last `FRESH_SECONDS`."""
        return time.monotonic() - self._looked_at < FRESH_SECONDS

    @property
    def is_recent(self) -> bool:
        """Whether the files were looked at within the last `_TRUST_SECONDS`."""
        return time.monotonic() - self._looked_at < _TRUST_SECONDS

    def slots(self) -> list[Slot]:
        """Return what was last seen, in no order."""
        return [seen.slot for seen in list(self._seen.values())]

    def refresh(self) -> list[Slot]:
        """Look at the files and return the slots, by number.

        Raises:
            StoreError: a record cannot be read.
        """
        with self._lock:
            started = time.monotonic()
            numbers = self._numbers()
            present = {make_slot_id(self._repo_name, number): number for number in numbers}
            for slot_id, number in present.items():
                self._look(slot_id, self._path(number))
            for slot_id in self._seen.keys() - present:
                self._seen.pop(slot_id, None)
            self._looked_at = started
        return [seen.slot for slot_id in present if (seen := self._seen.get(slot_id)) is not None]

    def put(self, slot: Slot) -> None:
        """Note a record that was just read or written; call it under the record lock."""
        self._seen[slot.slot_id] = _Seen(slot, _settled(_stamp(self._path(slot.number))))

    def forget(self, slot_id: str) -> None:
        """Note that a slot is gone."""
        self._seen.pop(slot_id, None)

    def _look(self, slot_id: str, path: str) -> None:
        stamp = _stamp(path)
        seen = self._seen.get(slot_id)
        if seen is not None and seen.is_still(stamp):
            return
        try:
            slot = self._store.read_slot_sync(slot_id)
        except SlotNotFoundError:
            self._seen.pop(slot_id, None)
        else:
            self._seen[slot_id] = _Seen(slot, _settled(stamp))

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self._directory)  # noqa: PTH208 - names are wanted
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for match in map(_SLOT_NAME.fullmatch, names) if match is not None)

    def _path(self, number: int) -> str:
        return f"{self._directory}/slot{number}/slot.json"


def _stamp(path: str) -> _Stamp | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - a hundred times a look
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _settled(stamp: _Stamp | None) -> _Stamp | None:
    # Two writes within one tick of the file system's clock leave the same time, and records are overwritten in place.
    return stamp if stamp is not None and time.time_ns() - stamp[0] > _RACY_NS else None
