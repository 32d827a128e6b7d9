"""One of the managers that `benchmarks.fleet_chaos` ill-treats: leases without end, and accuses whom it meets.

    python -m benchmarks._fleet_worker SETTINGS.json

In every slot it first looks whether it is clean. Then a command on the host holds a kernel lock, one for each slot,
while it dirties the slot: whoever finds the lock held has found another lessee alive in the same slot. What network,
database and the end of a lease may do to a lessee is no error.
"""

import asyncio
import faulthandler
import json
import os
import random
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from repopool_async import (
    CoordinatorUnavailableError,
    FencedError,
    HostSpec,
    HostUnreachableError,
    LeaseLostError,
    PoolConfig,
    PoolManager,
    PoolTimeoutError,
    SshHost,
)
from repopool_async.config_coordination import Coordination
from repopool_async.hosts._ssh_connection import SshOptions
from repopool_async.hosts.base import EndedProcesses

REPO: Final = "web"
_BUSY: Final = 42
_STAYS_SECONDS: Final = (0.1, 0.3)
_EXPECTED: Final = (
    CoordinatorUnavailableError,
    FencedError,
    HostUnreachableError,
    LeaseLostError,
    PoolTimeoutError,
)


async def main(settings: dict[str, Any]) -> None:
    """Work until SIGTERM, then give everything back; on SIGUSR1 and SIGUSR2 say where tasks and threads are."""
    if settings["is_unchecked"]:
        _switch_host_checks_off()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _print_tasks)
    faulthandler.register(signal.SIGUSR2)
    async with AsyncExitStack() as stack:
        manager = await _opened(settings, stack, stopping)
        root, longest = Path(settings["root"]), settings["longest_stay_seconds"]
        await asyncio.gather(*[_work(manager, root, longest, stopping) for _ in range(settings["tasks"])])


def _print_tasks() -> None:
    """Say what everybody is waiting for."""
    for task in asyncio.all_tasks():
        task.print_stack()


def _switch_host_checks_off() -> None:
    """Have hosts let everybody into every slot, and end nothing of those that were there before."""
    guarded = SshHost.run

    async def unguarded(self: SshHost, *args: Any, **options: Any) -> Any:
        return await guarded(self, *args, **{**options, "guard": None})

    async def nothing(*_: object, **__: object) -> EndedProcesses:
        return EndedProcesses()

    for name, replacement in {"run": unguarded, "enter": nothing, "leave": nothing, "end_processes": nothing}.items():
        setattr(SshHost, name, replacement)


async def _opened(settings: dict[str, Any], stack: AsyncExitStack, stopping: asyncio.Event) -> PoolManager:
    while True:
        try:
            return await stack.enter_async_context(await _manager(settings, stack))
        except CoordinatorUnavailableError:
            _note(Path(settings["root"]), "interrupted")
            await asyncio.sleep(0.2)
        if stopping.is_set():
            sys.exit(0)


async def _manager(settings: dict[str, Any], stack: AsyncExitStack) -> PoolManager:
    hosts = []
    for name, host in settings["hosts"].items():
        directory = host["directory"]
        reached = SshHost(
            "box",
            host_id=name,
            options=SshOptions(config=(host["config"],)),
            sessions_directory=f"{directory}/.sessions",
        )
        await stack.enter_async_context(reached)
        hosts.append(HostSpec(name, workspaces_dir=directory, host=reached))
    coordination = Coordination(dsn=settings["dsn"], session_ttl=settings["session_ttl"])
    config = PoolConfig(settings["workspaces_dir"], coordination=coordination, janitor_interval=5, close_timeout=10)
    return PoolManager(config, hosts=hosts)


async def _work(manager: PoolManager, root: Path, longest: float, stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        try:
            await _lease(manager, root, longest)
        except _EXPECTED:
            _note(root, "interrupted")
            await asyncio.sleep(0.1)
        except Exception as error:  # noqa: BLE001 - whatever it is, it was not expected, and is reported
            _accuse(root, "error", repr(error))


async def _lease(manager: PoolManager, root: Path, longest: float) -> None:
    async with manager.lease(REPO, timeout=20) as slot:
        status = await slot.run("git", "status", "--porcelain", "--ignored")
        if status.text:
            _accuse(root, "half made", f"{slot.slot_id} token {slot.token}: {status.text!r}")
        # Some stay longer than it takes to take a lease away, so that what is left running is met by the next lessee.
        seconds = random.choice((*_STAYS_SECONDS, longest))
        witness = f"{root}/witness/{slot.slot_id}"
        dirty = f"echo dirt >untracked; rm README; sleep {seconds}"
        done = await slot.run("flock", "-n", "-E", str(_BUSY), witness, "sh", "-c", dirty, check=False)
        if done.exit_code == _BUSY:
            _accuse(root, "double holder", f"{slot.slot_id} token {slot.token} by {os.getpid()}")
    _note(root, "leases")


def _note(root: Path, what: str) -> None:
    with (root / what).open("a") as file:
        file.write(".")


def _accuse(root: Path, kind: str, text: str) -> None:
    with (root / "accusations").open("a") as file:
        file.write(json.dumps({"kind": kind, "text": text}) + "\n")


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
