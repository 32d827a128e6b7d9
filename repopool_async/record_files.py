"""Records as files: read if they are what should be there, written whole, set aside where they are damaged.

Also what is listed around them. Where the files lie, and what a damaged record is replaced by, is not known here.
"""

import errno
import fcntl
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar, cast

from repopool_async import _files
from repopool_async._clock import now
from repopool_async._codec import CodecError, add_checksum, dumps, loads, remove_checksum
from repopool_async.models import Pool, Slot

T = TypeVar("T")

RECORD_LIMIT_BYTES: Final = 4 * 1024 * 1024
SLOT_RECORD_BYTES: Final = 4096
"""A slot's record is filled up to this size, so that it can be overwritten in place; a larger one is replaced."""
_RECORDS_REMEMBERED: Final = 256
_LOG_LIMIT_BYTES: Final = 64 * 1024 * 1024

_SLOT_NAME: Final = re.compile(r"slot([1-9][0-9]{0,17})")

NO_PLAIN_FILE: Final = (errno.ELOOP, errno.EISDIR, errno.EINVAL)
_UNREADABLE: Final = (*NO_PLAIN_FILE, errno.EFBIG, errno.EIO)


class _Remembered:
    """What the newest records' bytes say, as far as this process wrote or read them: decoding costs more than a lock.

    Records are frozen, so one may be given out many times. May be used from several threads.
    """

    def __init__(self) -> None:
        self._slots: OrderedDict[bytes, Slot] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, data: bytes, slot: Slot) -> None:
        with self._lock:
            self._slots[data] = slot
            if len(self._slots) > _RECORDS_REMEMBERED:
                self._slots.popitem(last=False)

    def get(self, data: bytes) -> Slot | None:
        with self._lock:
            return self._slots.get(data)


_remembered: Final = _Remembered()


class _CorruptError(Exception):
    """There is something, but it is not the record that should be there."""


def try_read(kind: type[T], path: str, *, is_settled: bool = False, **identity: str) -> tuple[T | None, str | None]:
    """Return the record, or None and what is wrong with what is there; None twice where there is nothing."""
    try:
        return _read_record(kind, path, is_settled, identity), None
    except _CorruptError as error:
        return None, str(error)


def _read_record(kind: type[T], path: str, is_settled: bool, identity: Mapping[str, str]) -> T | None:
    try:
        data = _files.read_regular(path, RECORD_LIMIT_BYTES, is_settled=is_settled)
        record = None if data is None else _decoded(kind, data)
    except NotADirectoryError:
        return None
    except OSError as error:
        if error.errno not in _UNREADABLE and not is_shut(path, error):
            raise
        raise _CorruptError(error.strerror) from error
    except CodecError as error:
        raise _CorruptError(str(error)) from error
    for name, expected in identity.items():
        if record is not None and getattr(record, name) != expected:
            raise _CorruptError(f"it is the record of {getattr(record, name)!r}")
    return record


def _decoded(kind: type[T], data: bytes) -> T:
    if kind is not Slot:
        return loads(kind, remove_checksum(data))
    slot = _remembered.get(data)
    if slot is None:
        slot = loads(Slot, remove_checksum(data))
        _remembered.put(data, slot)
    return cast("T", slot)


def write_slot(path: str, slot: Slot, *, is_durable: bool = False) -> None:
    """Write a slot's record, in place where that is possible.

    Raises:
        OSError: it could not be written. CodecError: it is too large.
    """
    data = add_checksum(encoded(slot), SLOT_RECORD_BYTES)
    if is_durable or len(data) != SLOT_RECORD_BYTES or not _files.overwrite(path, data):
        _files.write_atomic(path, data, durable=is_durable)
    _remembered.put(data, slot)


def encoded(record: Pool | Slot) -> bytes:
    """Return a record's text, without a checksum."""
    data = dumps(record)
    if len(data) > RECORD_LIMIT_BYTES - SLOT_RECORD_BYTES:
        raise CodecError(f"the record has {len(data)} bytes, more than {RECORD_LIMIT_BYTES}; keep its metadata small")
    return data


def is_shut(path: str, error: OSError) -> bool:
    """Return whether a file of our own forbids us to open it; another user's may well be intact."""
    return isinstance(error, PermissionError) and os.path.lexists(path) and os.lstat(path).st_uid == os.geteuid()


def set_aside(path: str) -> str | None:
    """Rename what is there, whatever it is; return the new path, None where there is nothing."""
    aside = f"{path}.corrupt-{now():%Y%m%dT%H%M%S.%fZ}"
    try:
        Path(path).rename(aside)
    except FileNotFoundError:
        return None
    return aside


def was_set_aside(directory: str) -> bool:
    """Return whether a pool's record was set aside there by somebody who then died."""
    is_aside = any(name.startswith("pool.json.corrupt-") for name in names_in(directory))
    return is_aside and os.path.lexists(f"{directory}/mirror.git/config")


def bytes_of(path: str) -> bytes:
    """Return what can be read of a file that may be anything."""
    try:
        return _files.read_regular(path, RECORD_LIMIT_BYTES) or b""
    except OSError:
        return b""


def log_bytes(path: str) -> bytes:
    """Return a log; an empty one where something is there that the next line will set aside."""
    try:
        return _files.read_regular(path, _LOG_LIMIT_BYTES) or b""
    except OSError as error:
        if error.errno not in _UNREADABLE and not is_shut(path, error):
            raise
        return b""


@contextmanager
def alone(directory: str) -> Iterator[Callable[[], bool]]:
    """Keep other processes from rebuilding in the same directory: the slower one would undo a lease given since.

    Gives a function that says whether the directory is still the one at that path.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems cannot lock a directory
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield lambda: _is_at(descriptor, directory)
    finally:
        with suppress(OSError):  # closing alone would leave it locked by a child that was forked meanwhile
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def make_directory(path: str) -> bool:
    """Make a directory and its missing parents, durably; return whether it was missing."""
    directory = Path(path)
    if directory.is_dir():
        return False
    make_directory(str(directory.parent))
    directory.mkdir(exist_ok=True)
    _files.sync_directory(str(directory.parent))
    return True


def names_in(directory: str) -> list[str]:
    """Return the names in a directory, none where there is none."""
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []


def numbers_named(directory: str, pattern: re.Pattern[str]) -> list[int]:
    """Return the numbers in the names of a directory, none where it cannot be read."""
    with suppress(OSError):
        return [int(match[1]) for match in map(pattern.fullmatch, names_in(directory)) if match]
    return []


def slot_numbers(directory: str) -> list[int]:
    """Return the numbers of the slots whose directories are there, in any order."""
    try:
        with os.scandir(directory) as entries:
            matches = [_SLOT_NAME.fullmatch(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [int(match[1]) for match in matches if match]
