"""Processes whose parents have gone, in sessions of their own, as lessees leave them."""

import asyncio
import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

from repopool_async._identity import process_start_time
from repopool_async.hosts.base import Host

FOREVER: Final = "1000"
"""How long something sleeps that is to be ended, in seconds."""
ENV: Final = {"PATH": os.environ["PATH"]}


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for a condition; fail where it does not come true."""
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.005)


def relay_in(directory: Path) -> Path:
    """Write a script that hands itself on to a new session so many times, and ends each time."""
    relay = directory / "relay"
    relay.write_text(f"sleep 0.02; [ $1 = 0 ] || setsid sh {relay} $(($1 - 1)) &\n")
    return relay


class Daemons:
    """Starts processes in sessions of their own whose parents have gone."""

    def __init__(self, host: Host) -> None:
        self.name = f"REPOPOOL_TEST_{uuid.uuid4().hex}"
        self.mark = f"{self.name}=lease"
        self._host = host
        self._started: list[tuple[int, int | None]] = []

    async def start(self, script: str, *, value: str | None = "lease", cwd: Path | None = None) -> int:
        """Start a script, which goes on after a command `ready` of its own; return its pid."""
        env = ENV if value is None else {**ENV, self.name: value}
        outer = 'pid=$(setsid -f sh -c "$1" </dev/null 2>/dev/null); echo $pid'
        inner = script.replace("ready", "echo $$; exec >/dev/null")
        result = await self._host.run(["sh", "-c", outer, "sh", inner], env=env, cwd=None if cwd is None else str(cwd))
        pid = int(result.stdout)
        self._started.append((pid, process_start_time(pid)))
        if script.endswith(f"exec sleep {FOREVER}"):
            await until(lambda: Path(f"/proc/{pid}/comm").read_text() != "sh\n")
        return pid

    def running(self) -> list[int]:
        """Return the pids of those that still run; of one that is gone somebody else may have the number."""
        return [pid for pid, began in self._started if began is not None and process_start_time(pid) == began]

    def close(self) -> None:
        for pid in self.running():
            os.kill(pid, signal.SIGKILL)
