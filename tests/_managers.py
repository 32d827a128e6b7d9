"""Managers in processes of their own, told what to do a line at a time, so that tests can kill them for real.

`python -m tests._managers SOCKET` forks one for each connection, because importing everything anew would take most of
a test's time. Their boot-time clock is ahead by what a file says, so time passes for all of them when a test says so.
"""

import asyncio
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from repopool_async import LeasedSlot, PoolConfig, PoolManager, _clock
from repopool_async._identity import new_lease_id

ROOT = Path(__file__).parents[1]
REPO = "web"


class Refused(Exception):  # noqa: N818 - it says what a manager raised, by name
    """A manager raised an error of ours; `kind` is its name."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@attrs.define
class Process:
    """A process with a manager.

    Attributes:
        handle: by which it can be signalled, and not who has its number once it is gone; None where it has been ended.
    """

    pid: int
    connection: socket.socket
    handle: int | None = None

    def call(self, verb: str, **arguments: Any) -> Any:
        """Have it do something and return what came of it; None where it died of that."""
        self.connection.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
        reply = self._read()
        if reply is None or "error" not in reply:
            return reply and reply["result"]
        raise Refused(*reply["error"])

    def outcome(self, verb: str, **arguments: Any) -> str | None:
        """Have it do something and return the name of the error that it raised, None where it raised none."""
        try:
            self.call(verb, **arguments)
        except Refused as refused:
            return refused.kind
        return None

    def kill(self) -> None:
        self.end()
        assert self._read() is None
        self.connection.close()

    def end(self) -> None:
        """Kill it where it still runs."""
        if self.handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            os.close(self.handle)
            self.handle = None

    def has_ended(self) -> bool:
        return self.handle is None or bool(select.select([self.handle], [], [], 0)[0])

    def _read(self) -> dict[str, Any] | None:
        data = b""
        while not data.endswith(b"\n"):
            chunk = self.connection.recv(1 << 16)
            if not chunk:
                return None
            data += chunk
        reply: dict[str, Any] = json.loads(data)
        return reply


@attrs.define
class Nursery:
    """Where processes with managers come from, all of the directory named at the time."""

    directory: Path
    socket_path: Path
    _living: list[Process] = attrs.field(factory=list)

    def spawn(self, *, follows_file: bool = False) -> Process:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(60)
        connection.connect(str(self.socket_path))
        process = Process(0, connection)
        for gone in [one for one in self._living if one.has_ended()]:
            gone.end()
            self._living.remove(gone)
        process.pid = process.call("begin", directory=str(self.directory), follows_file=follows_file)
        process.handle = os.pidfd_open(process.pid)
        self._living.append(process)
        return process

    def kill_all(self) -> None:
        for process in self._living:
            process.connection.close()
            process.end()
        self._living.clear()

    def set_clock(self, ahead: float) -> None:
        new = self.directory / "ahead.new"
        new.write_bytes(struct.pack("d", ahead))
        new.replace(self.directory / "ahead")


@contextmanager
def nursery(directory: Path) -> Iterator[Nursery]:
    """Have processes with managers of `directory`/pools; those still running at the end are killed."""
    path = directory / "socket"
    made = Nursery(directory, path)
    argv = [sys.executable, "-m", "tests._managers", str(path)]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        try:
            yield made
        finally:
            made.kill_all()
            process.kill()


# In those processes


def main(path: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(path)
        listening.listen()
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                try:
                    asyncio.run(_serve(connection))
                finally:
                    os._exit(0)
            connection.close()


async def _serve(connection: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    begin = json.loads(await reader.readline())
    directory = Path(begin["directory"])
    _follow_clock(directory / "ahead")
    async with _manager(directory, begin["follows_file"]) as manager:
        await manager.wait_ready(60)
        served = _Served(manager)
        _reply(writer, {"result": os.getpid()})
        while line := await reader.readline():
            request = json.loads(line)
            try:
                _reply(writer, {"result": await getattr(served, request.pop("verb"))(**request)})
            except Exception as error:  # noqa: BLE001 - the test judges it
                _reply(writer, {"error": [type(error).__name__, str(error)]})
            if manager.closed:
                return


def _manager(directory: Path, follows_file: bool) -> PoolManager:
    if follows_file:
        return PoolManager.from_config_file(directory / "pools.yaml")
    return PoolManager(PoolConfig(workspaces_dir=directory / "pools", janitor_interval=3600))


def _reply(writer: asyncio.StreamWriter, reply: dict[str, Any]) -> None:
    writer.write(json.dumps(reply).encode() + b"\n")


def _follow_clock(path: Path) -> None:
    def clock_gettime(clock: int) -> float:
        return time.clock_gettime(clock) + float(struct.unpack("d", path.read_bytes())[0])

    shifted = types.SimpleNamespace(
        clock_gettime=clock_gettime, clock_gettime_ns=time.clock_gettime_ns, time_ns=time.time_ns
    )
    setattr(_clock, "time", shifted)  # noqa: B010


class _Served:
    """What a process can be told to do; the names are the verbs."""

    def __init__(self, manager: PoolManager) -> None:
        self._manager = manager
        self._leases: dict[str, LeasedSlot] = {}

    async def create(self, url: str, num_slots: int, **options: Any) -> None:
        await self._manager.create_pool(REPO, url, num_slots=num_slots, fetch_on_allocate=False, **options)

    async def allocate(self, timeout: float, ttl: float | None) -> dict[str, Any] | None:
        slot = await self._manager.allocate_slot(REPO, timeout=timeout, detached=ttl is not None, ttl=ttl)
        if slot is None:
            return None
        self._leases[slot.lease_id] = slot
        return {
            "slot_id": slot.slot_id,
            "token": slot.token,
            "lease_id": slot.lease_id,
            "path": str(slot.path),
            "host_id": slot.host_id,
        }

    async def run(self, lease_id: str, *, argv: list[str]) -> str:
        return (await self._leases[lease_id].run(*argv)).text

    async def lease_often(self, times: int, at_once: int, marks: str) -> int:
        """Take and give back slots, several at once; returns how often another had a slot at the same time."""
        counts = await asyncio.gather(*[self._lease_in_turn(times, Path(marks)) for _ in range(at_once)])
        return sum(counts)

    async def _lease_in_turn(self, times: int, marks: Path) -> int:
        twice = 0
        for _ in range(times):
            async with self._manager.lease(REPO, timeout=60) as slot:
                mark = marks / slot.slot_id
                try:
                    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    twice += 1
                    continue
                await slot.run("sh", "-c", "echo dirt >untracked; git rev-parse HEAD")
                mark.unlink()
        return twice

    async def is_lost(self, lease_id: str) -> bool:
        return self._leases[lease_id].lost.is_set()

    async def drain_host(self, name: str) -> None:
        await self._manager.drain_host(name)

    async def hosts(self) -> dict[str, str]:
        return {host.host_id: host.condition for host in await self._manager.list_hosts()}

    async def salvaged(self) -> list[str]:
        return [record.lease_id for record in await self._manager.list_salvage(REPO)]

    async def release(self, lease_id: str) -> None:
        await self._manager.release_slot(self._leases[lease_id])

    async def release_by_id(self, slot_id: str, token: int | None) -> None:
        await self._manager.release_slot(slot_id, token=token)

    async def renew(self, slot_id: str, token: int, ttl: float) -> None:
        await self._manager.renew_slot(slot_id, token, ttl)

    async def force(self, slot_id: str) -> None:
        await self._manager.force_unlock(slot_id)

    async def add(self) -> str:
        return (await self._manager.add_slot(REPO)).slot_id

    async def remove(self, slot_id: str) -> None:
        await self._manager.remove_slot(slot_id)

    async def resize(self, num_slots: int) -> None:
        await self._manager.resize(REPO, num_slots)

    async def reload(self) -> None:
        await self._manager.reload()
        await self._manager.wait_ready(60)

    async def recover(self) -> None:
        await self._manager.recover()

    async def slots(self) -> dict[str, tuple[str, int]]:
        return {slot.slot_id: (str(slot.state), slot.token) for slot in await self._manager.list_slots(REPO)}

    async def close(self) -> None:
        await self._manager.close(0)

    async def die_leasing(self) -> None:
        """Claim a slot and die before it is handed out."""
        coordinator = self._manager._shared.coordinator
        await coordinator.claim(REPO, commit=None, branch=None, lease_id=new_lease_id())
        os.kill(os.getpid(), signal.SIGKILL)

    async def die_returning(self, lease_id: str) -> None:
        """End a lease as whoever gives a slot back does, and die before it is cleaned."""
        pool = await self._manager.get_pool(REPO)
        opened = pool._leases.end(lease_id)
        assert opened is not None
        await self._manager._shared.coordinator.begin_return(opened.grant)
        os.kill(os.getpid(), signal.SIGKILL)

    async def die_recovering(self) -> None:
        """Take over what dead owners left, and die before any of it is saved."""
        for orphan in await self._manager._shared.coordinator.orphans(REPO):
            await self._manager._shared.coordinator.recover_orphan(orphan.slot_id)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
