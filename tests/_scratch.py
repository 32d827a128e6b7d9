"""Directories for temporary files that go with the process that asked for them, however that ends.

Those of a test run are made in memory where there is room, because the tests write and sync many small files. Whoever
sets TMPDIR has them there instead; tests that need a file system of some kind choose their own place in any case.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

MEMORY: Final = Path("/dev/shm")
ROOM_BYTES: Final = 4 << 30
"""What a run may need at most, and several times what one was seen to need."""

_REMOVES: Final = """
read -r told
turns=0
until chmod -R u+rwX "$1"; rm -rf "$1" || [ $turns = 100 ]; do sleep 0.1; turns=$((turns + 1)); done
"""
"""Again and again, because those that end with the process may still write."""


def fast_place() -> Path:
    """Return where temporary files are made: in memory, unless TMPDIR says otherwise or there is no room."""
    if "TMPDIR" not in os.environ and _has_room(MEMORY):
        return MEMORY
    return Path(tempfile.gettempdir())


def _has_room(memory: Path) -> bool:
    """Return whether a directory is in memory of which there is enough, and programs may be run there."""
    try:
        status = os.statvfs(memory)
        told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available_bytes = int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return False
    is_usable = not status.f_flag & os.ST_NOEXEC and os.access(memory, os.W_OK | os.X_OK)
    return is_usable and min(status.f_bavail * status.f_frsize, available_bytes) > ROOM_BYTES


@contextmanager
def scratch(prefix: str = "repopool-", *, place: Path | None = None) -> Iterator[Path]:
    """Have a new directory for the block; a process of its own removes it, also where this one is killed.

    Args:
        prefix: of its name. place: in which it is made; the usual one where missing.
    """
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    # In a session of its own, because who interrupts us means us. Its input ends with us and whom we forked.
    remover = subprocess.Popen(
        ["sh", "-c", _REMOVES, "sh", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    try:
        yield directory
    finally:
        with suppress(BrokenPipeError):
            remover.communicate(b"\n", timeout=60)


def use(directory: Path) -> None:
    """Make temporary files of this process and its children there from now on; any user may."""
    directory.chmod(0o1777)
    os.environ["TMPDIR"] = str(directory)
    tempfile.tempdir = None
