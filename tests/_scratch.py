"""Where the temporary files of a run lie: in a directory that goes with the run, however that ends.

It is made in memory where there is room, because the tests write and sync many small files. Whoever sets TMPDIR has it
there instead; tests that need a file system of some kind choose their own place in any case.
"""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final

MEMORY: Final = Path("/dev/shm")
ROOM_BYTES: Final = 4 << 30
"""What a run may need at most, and several times what one was seen to need."""

_REMOVES: Final = """
cat
turns=0
until chmod -R u+rwX "$1" 2>&1; rm -rf "$1" || [ $turns = 100 ]; do sleep 0.1; turns=$((turns + 1)); done
"""
"""Whoever still ends may write meanwhile."""


def place() -> Path:
    """Return the directory in which temporary ones are made."""
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


class Scratch:
    """A new directory that any user may enter and write to; a process of its own removes it once this one is gone."""

    def __init__(self, parent: Path) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="repopool-", dir=parent))
        self.path.chmod(0o1777)
        # In a session of its own: who interrupts the run means the run. It learns of our end from its closed input.
        self._remover = subprocess.Popen(
            ["sh", "-c", _REMOVES, "sh", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def remove(self) -> None:
        """Remove it, and wait until that is done."""
        assert self._remover.stdin is not None
        self._remover.stdin.close()
        self._remover.wait(60)


def use(directory: Path) -> None:
    """Make temporary files of this process and its children there from now on."""
    os.environ["TMPDIR"] = str(directory)
    tempfile.tempdir = None
