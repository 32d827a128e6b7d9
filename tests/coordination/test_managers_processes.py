"""Managers in processes of their own with one database, as on several machines: killed, stopped, and all at work."""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests._managers import Nursery, Process, Refused, nursery
from tests._postgres import eventually
from tests.coordination.conftest import TAKEOVER_SECONDS, TTL, Fleet


@pytest.fixture
def spawn(fleet: Fleet, origin: Path) -> Iterator[Callable[[int], Process]]:
    """Start the manager of a number in a process of its own."""
    with nursery(fleet.directory) as made:
        yield lambda number: _spawn(made, fleet, number)


def _spawn(made: Nursery, fleet: Fleet, number: int) -> Process:
    made.directory = fleet.directory / f"process{number}"
    made.directory.mkdir(exist_ok=True)
    made.set_clock(0.0)
    made.directory.joinpath("pools.yaml").write_text(
        json.dumps(
            {
                "workspaces_dir": "pools",
                "coordination": {"type": "postgres", "dsn": fleet.dsn, "session_ttl": TTL},
                "hosts": {n: {"address": "local", "workspaces_dir": str(fleet.directory / n)} for n in ("a", "b")},
                "watch": "never",
            }
        )
    )
    return made.spawn(follows_file=True)


async def call(process: Process, verb: str, **arguments: Any) -> Any:
    return await asyncio.to_thread(process.call, verb, **arguments)


async def test_two_processes_never_have_a_slot_at_the_same_time(
    spawn: Callable[[int], Process], origin: Path, tmp_path: Path
) -> None:
    one, two = await asyncio.to_thread(spawn, 1), await asyncio.to_thread(spawn, 2)
    await call(one, "create", url=str(origin), num_slots=3, hosts=["a", "b"])
    (marks := tmp_path / "marks").mkdir()
    work = {"times": 4, "at_once": 3, "marks": str(marks)}
    twice = await asyncio.gather(*[call(process, "lease_often", **work) for process in (one, two)])
    assert twice == [0, 0]
    assert os.listdir(marks) == []
    slots = await call(two, "slots")
    assert sum(token for _, token in slots.values()) >= 24


async def test_a_killed_managers_slots_come_back_through_the_other(
    spawn: Callable[[int], Process], origin: Path
) -> None:
    one, two = await asyncio.to_thread(spawn, 1), await asyncio.to_thread(spawn, 2)
    await call(one, "create", url=str(origin), num_slots=2, hosts=["a", "b"])
    leases = [await call(one, "allocate", timeout=0, ttl=None) for _ in range(2)]
    await call(one, "run", lease_id=leases[0]["lease_id"], argv=["sh", "-c", "echo work >unpushed.txt"])
    assert await call(two, "allocate", timeout=0, ttl=None) is None
    one.kill()
    again = [await call(two, "allocate", timeout=TAKEOVER_SECONDS, ttl=None) for _ in range(2)]
    assert {lease["slot_id"] for lease in again} == {lease["slot_id"] for lease in leases}
    tokens = {lease["slot_id"]: lease["token"] for lease in leases}
    assert all(lease["token"] > tokens[lease["slot_id"]] for lease in again)
    for lease in again:
        assert await call(two, "run", lease_id=lease["lease_id"], argv=["git", "status", "--porcelain"]) == ""
    assert leases[0]["lease_id"] in await call(two, "salvaged")


async def test_a_manager_that_was_stopped_finds_its_leases_lost_and_its_commands_refused(
    spawn: Callable[[int], Process], origin: Path
) -> None:
    one, two = await asyncio.to_thread(spawn, 1), await asyncio.to_thread(spawn, 2)
    await call(one, "create", url=str(origin), num_slots=1, hosts=["a"])
    lease = await call(one, "allocate", timeout=0, ttl=None)
    with _stopped(one):
        again = await call(two, "allocate", timeout=TAKEOVER_SECONDS, ttl=None)
        assert again["slot_id"] == lease["slot_id"]
    with pytest.raises(Refused, match=r"FencedError|LeaseLostError"):
        await call(one, "run", lease_id=lease["lease_id"], argv=["true"])
    await eventually(lambda: call(one, "is_lost", lease_id=lease["lease_id"]), TAKEOVER_SECONDS)
    assert one.outcome("release", lease_id=lease["lease_id"]) == "LeaseLostError"
    assert await call(two, "run", lease_id=again["lease_id"], argv=["echo", "mine"]) == "mine\n"
    await call(two, "release", lease_id=again["lease_id"])
    assert await call(one, "allocate", timeout=TAKEOVER_SECONDS, ttl=None) is not None


@contextmanager
def _stopped(process: Process) -> Iterator[None]:
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


async def test_a_host_drained_in_one_process_is_seen_in_the_other(
    spawn: Callable[[int], Process], origin: Path
) -> None:
    one, two = await asyncio.to_thread(spawn, 1), await asyncio.to_thread(spawn, 2)
    await call(one, "create", url=str(origin), num_slots=2, hosts=["a", "b"])
    await call(one, "drain_host", name="a")
    assert (await call(two, "hosts"))["a"] == "draining"
    lease = await call(two, "allocate", timeout=0, ttl=None)
    assert lease["host_id"] == "b"
    assert await call(two, "allocate", timeout=0, ttl=None) is None
