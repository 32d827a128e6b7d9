"""Taking single files out of a directory that somebody else filled, believing nothing about what they are.

Synchronous; for one thread hop each. Directories are opened step by step from their parents' descriptors, never through
a link; files are opened without waiting and only regular ones are read. How much is read, copied and inflated is
bounded. Looking at whole trees and emptying them is the business of `_tree`.
"""
# Paths are text here: directory descriptors are what this module is about, and pathlib has none.
# ruff: noqa: PTH101, PTH103, PTH108, PTH118, PTH120

import contextlib
import hashlib
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from typing import Final

from repopool_async.hosts._descent import opened, step
from repopool_async.hosts.base import Collected, Wanted

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK_BYTES: Final = 1 << 20
_DEPTH: Final = 32
_ENTRIES: Final = 2_000_000
_NOTES: Final = 1000
_HEADER_BYTES: Final = 64
_HEADER: Final = re.compile(rb"(?:commit|tree|blob|tag) (0|[1-9][0-9]{0,18})\0")
_INFLATION: Final = 16
"""Inflated contents may be so many times the limit on bytes, all together."""


def collect_files(  # noqa: PLR0917 - called by `in_thread`
    root: str, inside: str, target: str, wanted: Sequence[Wanted], enter: str, limit_bytes: int, limit_files: int
) -> Collected:
    """See `Host.collect_files`."""
    return _Collection(target, wanted, enter, limit_bytes, limit_files).run(root, inside)


class _Refused(Exception):  # noqa: N818 - it never leaves this module
    """The file is not taken; the text says why."""


class _Collection:
    """One collection."""

    def __init__(self, target: str, wanted: Sequence[Wanted], enter: str, limit_bytes: int, limit_files: int) -> None:
        self._target = target
        self._wanted = [(re.compile(want.pattern, re.DOTALL), want) for want in wanted]
        self._enter = re.compile(enter, re.DOTALL)
        self._bytes_left = limit_bytes
        self._inflated_left = limit_bytes * _INFLATION
        self._files_left = limit_files
        self._entries_left = _ENTRIES
        self._device = 0
        self._names: list[str] = []
        self._contents: dict[str, bytes] = {}
        self._skipped: list[str] = []

    def run(self, root: str, inside: str) -> Collected:
        with opened(root, inside.split("/") if inside else ()) as descriptor:
            if descriptor is None:
                if os.path.lexists(os.path.join(root, inside)):
                    self._skip(".", "is no directory")
            else:
                self._device = os.fstat(descriptor).st_dev
                self._walk(descriptor, "", _DEPTH)
        return Collected(tuple(self._names), self._contents, tuple(self._skipped))

    def _walk(self, descriptor: int, prefix: str, depth: int) -> None:
        for name, is_directory in self._entries(descriptor, prefix):
            relative = prefix + name
            is_entered = self._enter.fullmatch(relative) is not None
            want = next((want for pattern, want in self._wanted if pattern.fullmatch(relative)), None)
            if is_directory and is_entered:
                self._descend(descriptor, name, relative, depth)
            elif want is not None and not is_directory:
                self._take(descriptor, name, relative, want)
            elif is_entered or want is not None:
                self._skip(relative, "is no directory" if is_entered else "is no regular file")

    def _entries(self, descriptor: int, prefix: str) -> Iterator[tuple[str, bool]]:
        listed = []
        with os.scandir(descriptor) as entries:
            for entry in entries:
                self._entries_left -= 1
                if self._entries_left < 0:
                    self._skip(prefix.rstrip("/") or ".", "has too many entries")
                    break
                listed.append((entry.name, entry.is_dir(follow_symlinks=False)))
        return iter(sorted(listed))

    def _descend(self, descriptor: int, name: str, relative: str, depth: int) -> None:
        child = step(descriptor, name) if depth else None
        if child is None:
            self._skip(relative, "cannot be entered")
            return
        try:
            if os.fstat(child).st_dev == self._device:
                self._walk(child, f"{relative}/", depth - 1)
            else:
                self._skip(relative, "is another file system")
        finally:
            os.close(child)

    def _take(self, descriptor: int, name: str, relative: str, want: Wanted) -> None:
        try:
            with _regular(descriptor, name) as source:
                self._admit(os.fstat(source).st_size, want)
                if want.is_read:
                    self._contents[relative] = b"".join(self._chunks(source, want.limit_bytes))
                else:
                    self._copy(source, relative, want)
                    self._names.append(relative)
        except _Refused as refusal:
            self._skip(relative, str(refusal))
        except OSError as error:
            self._skip(relative, error.strerror or str(error))

    def _admit(self, size: int, want: Wanted) -> None:
        if size > want.limit_bytes:
            raise _Refused(f"has {size} bytes, more than {want.limit_bytes}")
        if size > self._bytes_left or self._files_left <= 0:
            raise _Refused("is beyond the limit on files and bytes")
        self._files_left -= 1

    def _copy(self, source: int, relative: str, want: Wanted) -> None:
        path = f"{self._target}/{relative}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        check = _ObjectCheck(want.named_by, self._inflated_left) if want.named_by else None
        target = os.open(path, _CREATE, 0o600)
        try:
            for chunk in self._chunks(source, want.limit_bytes):
                if check is not None:
                    check.feed(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[os.write(target, view) :]
            if check is not None:
                check.finish(relative)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(target)
            if check is not None:
                self._inflated_left -= check.inflated

    def _chunks(self, source: int, limit: int) -> Iterator[bytes]:
        while chunk := os.read(source, _CHUNK_BYTES):
            limit -= len(chunk)
            self._bytes_left -= len(chunk)
            if limit < 0 or self._bytes_left < 0:
                raise _Refused("grew beyond the limit on bytes")
            yield chunk

    def _skip(self, name: str, reason: str) -> None:
        if len(self._skipped) < _NOTES:
            self._skipped.append(f"{name}: {reason}")


class _ObjectCheck:
    """Whether a file is what its name says: deflated, with a header of type and size, and named by its hash."""

    def __init__(self, algorithm: str, limit: int) -> None:
        self.inflated = 0
        self._limit = limit
        self._hash = hashlib.new(algorithm, usedforsecurity=False)
        self._inflate = zlib.decompressobj()
        self._head = b""

    def feed(self, chunk: bytes) -> None:
        data = chunk
        while data:
            try:
                out = self._inflate.decompress(data, _CHUNK_BYTES)
            except zlib.error:
                raise _Refused("is no intact object") from None
            self._note(out)
            if self._inflate.eof and (self._inflate.unused_data or not self._inflate.unconsumed_tail):
                if self._inflate.unused_data:
                    raise _Refused("has garbage at its end")
                return
            data = self._inflate.unconsumed_tail

    def finish(self, relative: str) -> None:
        header = _HEADER.match(self._head)
        if not self._inflate.eof or header is None or int(header[1]) != self.inflated - len(header[0]):
            raise _Refused("is no intact object")
        if self._hash.hexdigest() != "".join(relative.split("/")[-2:]):
            raise _Refused("is not what its name says")

    def _note(self, out: bytes) -> None:
        self.inflated += len(out)
        if self.inflated > self._limit:
            raise _Refused("inflates beyond the limit")
        self._hash.update(out)
        if len(self._head) < _HEADER_BYTES:
            self._head += out[:_HEADER_BYTES]


@contextlib.contextmanager
def _regular(parent: int, name: str) -> Iterator[int]:
    descriptor = os.open(name, _READ, dir_fd=parent)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _Refused("is no regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def measure_entries(root: str, names: Sequence[str]) -> list[int | None]:
    """See `Host.measure_entries`."""
    sizes: dict[str, int | None] = {}
    by_parent: dict[str, list[str]] = {}
    for name in names:
        by_parent.setdefault(name.rpartition("/")[0], []).append(name)
    for parent, entries in by_parent.items():
        with opened(root, parent.split("/") if parent else ()) as descriptor:
            for name in entries:
                sizes[name] = None if descriptor is None else _measure(descriptor, name.rpartition("/")[2])
    return [sizes[name] for name in names]


def _measure(parent: int, name: str) -> int | None:
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return None
    if stat.S_ISREG(status.st_mode):
        if not status.st_mode & stat.S_IRUSR:
            _let_read(parent, name)
        return status.st_size
    return status.st_size if stat.S_ISLNK(status.st_mode) else None


def _let_read(parent: int, name: str) -> None:
    """Give a regular file's owner the right to read it, where the platform can do so without following a link."""
    if not hasattr(os, "O_PATH"):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                os.chmod(f"/proc/self/fd/{descriptor}", stat.S_IMODE(mode) | stat.S_IRUSR)
        finally:
            os.close(descriptor)
