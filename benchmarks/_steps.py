"""Dies by SIGKILL at a chosen step, without the program knowing.

Every change that a Python process makes to files goes by an audit hook of the interpreter first, as does every start
of a program; writing to an open file does not, so `os.write` and `os.pwrite` are replaced. Each such step below one
directory gets a name that is the same in every run (`rename slots/slotN/slot.json`). A process can list the steps it
takes, or be killed before the n-th of a name. The library needs no hook for that.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Final

_WRITING: Final = os.O_WRONLY | os.O_RDWR
_PLAIN: Final = [
    (re.compile(r"\.repopool-[0-9a-f-]+(\.tmp)?"), ".repopool-*"),
    (re.compile(r"\b[0-9]+-[0-9]+-[0-9a-f]{16}\b"), "*"),
    (re.compile(r"\.(new|tmp)-[0-9a-f-]+"), r".\1-*"),
    (re.compile(r"\b[0-9]{10,}-[0-9]+-[0-9a-f]+"), "*"),
    (re.compile(r"\.[0-9]+-[0-9]+\.fresh"), ".*.fresh"),
    (re.compile(r"\b[0-9a-f]{20,}\b(\.[0-9]+)?"), "*"),
    (re.compile(r"slot[0-9]+"), "slotN"),
    (re.compile(r"\bobjects/[0-9a-f]{2}\b"), "objects/NN"),
    (re.compile(r"\b(outgoing|pristine/git|tree/\w+)/[^ ]+"), r"\1/*"),
]
"""What differs from run to run in a path, or from one of many like files to the next, and what stands for it."""


class Steps:
    """The steps of this process below a directory.

    Args:
        die_at: the name of the step before which the process is killed, and its how many-th occurrence, from 1.
    """

    def __init__(self, directory: str, die_at: tuple[str, int] | None = None) -> None:
        self.seen: list[str] = []
        self._directory = directory
        self._die_at = die_at
        self._counts: Counter[str] = Counter()
        self._is_armed = False
        self._gate = threading.Lock()

    def arm(self) -> None:
        """Count from now on; the hooks stay until the process ends."""
        sys.addaudithook(self._audit)
        self._replace_writes()
        self._replace_spawn()
        self._is_armed = True

    def disarm(self) -> None:
        """Count no longer."""
        self._is_armed = False

    def step(self, name: str) -> None:
        """Take a step, perhaps the last one."""
        with self._gate:
            self._counts[name] += 1
            self.seen.append(name)
            if self._die_at == (name, self._counts[name]):
                os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_armed:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (_WRITING | os.O_CREAT):
                self._touch("open", path)
        elif event == "os.rename":
            self._touch("rename", arguments[0], arguments[1])
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"):
            self._touch(event.removeprefix("os."), arguments[0])
        elif event == "subprocess.Popen":
            self.step(f"spawn {_command(arguments[1])}")

    def _touch(self, what: str, *paths: object) -> None:
        texts = [os.fsdecode(path) for path in paths if isinstance(path, (str, bytes))]
        inside = [text for text in texts if text.startswith(self._directory)]
        if inside:
            self.step(f"{what} {' '.join(self._plain(text) for text in texts)}")
        elif texts and not texts[0].startswith("/"):
            self.step(f"{what} an entry of an open directory")

    def _plain(self, path: str) -> str:
        text = path.removeprefix(self._directory).strip("/")
        for pattern, replacement in _PLAIN:
            text = pattern.sub(replacement, text)
        return text

    def _replace_writes(self) -> None:
        write, pwrite = os.write, os.pwrite

        def stepping_write(descriptor: int, data: Any) -> int:
            path = self._path_of(descriptor)
            if path is None or not self._is_armed:
                return write(descriptor, data)
            self.step(f"write {path}")
            half_written = f"half-written {path}"
            if self._die_at == (half_written, self._counts[half_written] + 1):
                write(descriptor, bytes(data)[: len(data) // 2])
            self.step(half_written)
            return write(descriptor, data)

        def stepping_pwrite(descriptor: int, data: Any, offset: int) -> int:
            path = self._path_of(descriptor)
            if path is not None and self._is_armed:
                self.step(f"overwrite {path}")
            written = pwrite(descriptor, data, offset)
            if path is not None and self._is_armed:
                self.step(f"overwritten {path}")
            return written

        os.write, os.pwrite = stepping_write, stepping_pwrite

    def _path_of(self, descriptor: int) -> str | None:
        try:
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        except OSError:
            return None
        return self._plain(path) if path.startswith(self._directory) else None

    def _replace_spawn(self) -> None:
        start = subprocess.Popen.__init__

        def stepping_start(process: Any, *args: Any, **options: Any) -> None:
            start(process, *args, **options)
            self.step(f"spawned {_command(args[0] if args else options['args'])}")

        subprocess.Popen.__init__ = stepping_start  # type: ignore[assignment, method-assign]


def _command(argv: Any) -> str:
    words = [os.fsdecode(word) for word in argv] if isinstance(argv, (list, tuple)) else [str(argv)]
    named = [word for word in words[1:] if not word.startswith("-") and "/" not in word]
    return " ".join([words[0].rpartition("/")[2], *named[:1]])


def kill_with_descendants(pid: int) -> None:
    """Kill a process and everything it started, as the end of a container does: nobody survives to tidy up."""
    os.kill(pid, signal.SIGSTOP)
    for victim in [*_descendants(pid), pid]:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += [int(word) for word in (thread / "children").read_text().split()]
    except OSError:
        return []
    return [*(below for child in found for below in _descendants(child)), *found]
