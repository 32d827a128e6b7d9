"""Reading `/proc`, where everything may be gone before it is read. Synchronous; says nothing of what is looked for.

Every return of a slot goes through all processes of the machine, so what is read for each has to cost little.
"""
# Paths are text here: thousands of them are read, and most are gone before they are.
# ruff: noqa: PTH115, PTH208

import os
from collections.abc import Iterator
from typing import Final

_CHUNK_BYTES: Final = 16384


def pids() -> Iterator[int]:
    return (int(name) for name in names_in("/proc") if name.isdecimal())


def batches_of_pids() -> Iterator[list[int]]:
    """Name every process there is, then those started while these were looked at, and so on until there are none."""
    seen: set[int] = set()
    while unseen := [pid for pid in pids() if pid not in seen]:
        seen.update(unseen)
        yield unseen


def names_in(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def read(path: str) -> bytes:
    """Return what a file contains; nothing where it cannot be read."""
    try:
        return contents(path)
    except OSError:
        return b""


def contents(path: str) -> bytes:
    """Return what a file contains.

    Raises:
        OSError: it cannot be read, or what it tells of is gone.
    """
    # A third of what pathlib takes.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = b""
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            found += chunk
        return found
    finally:
        os.close(descriptor)


def link(path: str) -> str:
    """Return where a link leads; "" where there is none to be seen."""
    try:
        return os.readlink(path)
    except OSError:
        return ""
