"""Reading `/proc`, where everything may be gone before it is read. Synchronous; says nothing of what is looked for."""
# Paths are text here: thousands of them are read, and most are gone before they are.
# ruff: noqa: PTH115, PTH208

import os
from collections.abc import Iterator
from pathlib import Path


def pids() -> Iterator[int]:
    return (int(name) for name in names_in("/proc") if name.isdecimal())


def names_in(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def link(path: str) -> str:
    """Return where a link leads; "" where there is none to be seen."""
    try:
        return os.readlink(path)
    except OSError:
        return ""
