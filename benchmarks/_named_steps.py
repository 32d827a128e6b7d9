"""Kills one process after another, each before another step of the same operation, and looks what becomes of it all."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks import _chaos_worker as worker
from benchmarks._chaos_operations import OPERATIONS, Operation, all_back, die_with_work, until_cancelled
from benchmarks._chaos_origin import make_commit, make_repository
from benchmarks._chaos_work import KILL_POINT, missing_work
from benchmarks._children import ask, fork
from benchmarks._findings import Findings, add
from benchmarks._steps import Steps
from repopool_async import PoolManager, SlotState, SlotStore

_SLOTS: Final = 2
_STUCK_SECONDS: Final = 30.0
_BRIEF: Final = ("lease and return", "recover")
_THOROUGH_EVERY: Final = 5
"""After how many kills every slot is leased; in between it is enough that all are AVAILABLE."""


def named_steps(directory: Path, which: str, *, seed: int) -> Findings:
    """Kill at every step: half of them while another process runs, half of them with none there.

    A `cycle` takes every eighth step only; which ones follows from the seed.
    """
    findings = Findings()
    parts = 16 if which == "cycle" else 2
    first = 2 * (seed % 8) if which == "cycle" else 0

    def lane(number: int) -> dict[str, Any]:
        root = directory / f"lane{number}"
        root.mkdir()
        make_repository(root)
        return attrs.asdict(NamedSteps(root, which=which, has_keeper=number == 0, share=(first + number, parts)).run())

    results = [directory / f"lane{number}.json" for number in range(2)]
    pids = [
        fork(lambda number=number, path=path: path.write_text(json.dumps(lane(number))), directory / f"log{number}")  # type: ignore[misc]
        for number, path in enumerate(results)
    ]
    for pid, path in zip(pids, results, strict=True):
        status = os.waitpid(pid, 0)[1]
        if status != 0:
            log = path.with_name(path.stem.replace("lane", "log"))
            findings.errors.append(f"{path.stem} failed: {log.read_text(errors='replace')[-3000:]}")
        else:
            add(findings, json.loads(path.read_text()))
    return findings


class NamedSteps:
    """Goes through the operations below a directory of its own.

    Args:
        which: `cycle`, `named` or `all`. has_keeper: whether a process that runs all the time puts things right, before
            a new one looks. share: this one's number among how many that divide the steps up.
    """

    def __init__(self, root: Path, *, which: str, has_keeper: bool, share: tuple[int, int]) -> None:
        self._root = root
        self._url = str(root / "origin")
        self._log = root / "log"
        self._is_every = which == "all"
        self._is_brief = which == "cycle"
        self._names = [name for name in OPERATIONS if not self._is_brief or name in _BRIEF]
        self._has_keeper = has_keeper
        self._share = share
        self.findings = Findings()

    def run(self) -> Findings:
        """Do so for every operation, and look for all work that was left."""
        ask(lambda: asyncio.run(self._prepare()), self._log)
        for name in self._names:
            with self._keeper(OPERATIONS[name]):
                self._settle(name, "before")
                self._kill_at_each_step(name)
        due, lost = ask(lambda: asyncio.run(self._missing_work()), self._log)
        self.findings.work_due += due
        self.findings.work_lost += lost
        self.findings.take_accusations(self._root)
        return self.findings

    async def _prepare(self) -> None:
        path = worker.write_config(self._root, self._url, _SLOTS)
        async with PoolManager.from_config_file(path) as manager:
            await manager.create_pool(worker.POOL, self._url, num_slots=_SLOTS)
            await manager.wait_ready(60)

    async def _missing_work(self) -> tuple[int, list[str]]:
        async with PoolManager(worker.config(self._root)) as manager:
            return await missing_work(manager, self._root, {worker.FILED})

    @contextmanager
    def _keeper(self, operation: Operation) -> Iterator[None]:
        """Have the process that puts things right run for the block, unless it would be in the operation's way."""
        if not (self._has_keeper and operation.bears_company):
            yield
            return
        config = worker.config(self._root, janitor_interval=0.1)
        pid = fork(lambda: asyncio.run(until_cancelled(PoolManager(config))), self._log)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    # Killing

    def _kill_at_each_step(self, name: str) -> None:
        seen = self._operate(name, None)
        assert seen is not None
        self._settle(name, "nowhere")
        chosen = [step for number, step in enumerate(self._chosen(seen)) if number % self._share[1] == self._share[0]]
        for step in chosen:
            self.findings.steps += 1
            where = f"{name}, {step[0]} ({step[1]})"
            try:
                was_survived = self._operate(name, step) is not None
            except RuntimeError as error:
                self.findings.errors.append(f"{where}: {error}")
                continue
            if was_survived:
                self.findings.steps_not_reached.append(where)
            else:
                self.findings.kills += 1
            self._settle(name, where)

    def _chosen(self, seen: list[str]) -> list[tuple[str, int]]:
        """Return the steps to die at, each with its number among those of its name."""
        counts: Counter[str] = Counter()
        steps = []
        for step in seen:
            counts[step] += 1
            if self._is_every or (counts[step] == 1 and self._is_told_apart(step)):
                steps.append((step, counts[step]))
        return steps

    def _is_told_apart(self, step: str) -> bool:
        """Return whether a brief run dies here: temporary files and empty directories tell others nothing."""
        return not self._is_brief or step.startswith(("rename ", "overwritten ", "spawned "))

    def _operate(self, name: str, die_at: tuple[str, int] | None) -> list[str] | None:
        """Do an operation in a child; return its steps, or None where it was killed at one."""
        make_commit(self._url, self.findings.steps + 2)
        os.environ[KILL_POINT] = f"{name}, {die_at}"
        operation = OPERATIONS[name]
        if operation.after_death_in is not None:
            ask(lambda: asyncio.run(self._die_with_work(operation)), self._log)
        told: list[str] | None = ask(lambda: asyncio.run(self._act(operation, die_at)), self._log)
        return told

    async def _die_with_work(self, operation: Operation) -> None:
        async with PoolManager(worker.config(self._root, janitor_interval=3600)) as manager:
            await die_with_work(manager, self._root, operation, leases=1 if self._is_brief else _SLOTS)

    async def _act(self, operation: Operation, die_at: tuple[str, int] | None) -> list[str]:
        steps = Steps(str(self._root / "pools"), die_at)
        is_opening_one = operation.after_death_in is not None
        if is_opening_one:
            steps.arm()
        async with self._manager(operation) as manager:
            if not is_opening_one:
                steps.arm()
            await operation.act(manager, self._root, self._url)
            steps.disarm()
        return steps.seen

    def _manager(self, operation: Operation) -> PoolManager:
        if operation.is_from_file:
            return PoolManager.from_config_file(self._root / "pools.yaml")
        return PoolManager(worker.config(self._root, janitor_interval=3600))

    # Looking

    def _settle(self, name: str, where: str) -> None:
        started = time.monotonic()
        operation = OPERATIONS[name]
        is_thorough = self.findings.steps % _THOROUGH_EVERY == 0 or operation.pools != (worker.POOL,)
        if self._has_keeper and operation.bears_company:
            if not self._was_put_right():
                self.findings.slots_lost.append(f"{where}: the running process did not put it right")
            elif not is_thorough and name != "remove":
                self.findings.recovery_seconds.append(time.monotonic() - started)
                return
        try:
            lost = ask(lambda: asyncio.run(self._settled(name, is_thorough=is_thorough)), self._log)
        except RuntimeError as error:
            self.findings.errors.append(f"{where}: {error}")
            return
        self.findings.recovery_seconds.append(time.monotonic() - started)
        self.findings.slots_lost += [f"{where}: {item}" for item in lost]

    def _was_put_right(self) -> bool:
        store = SlotStore(self._root / "pools")
        deadline = time.monotonic() + _STUCK_SECONDS
        while any(slot.state is not SlotState.AVAILABLE for slot in store.list_slots_sync(worker.POOL)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    async def _settled(self, name: str, *, is_thorough: bool) -> list[str]:
        """As a new process, see that all is well, use it, and make it ready for the next time; return what is not."""
        operation = OPERATIONS[name]
        lost: list[str] = []
        async with self._manager(operation) as manager:
            await manager.wait_ready(60)
            if worker.OTHER in operation.pools and worker.OTHER not in await manager.list_pools():
                await manager.create_pool(worker.OTHER, self._url, num_slots=1)
            for slot in await manager.list_slots(worker.POOL) if operation.is_detached else []:
                await manager.force_unlock(slot.slot_id)
            for pool in operation.pools:
                lost += await all_back(manager, pool, slots=_slots(manager, pool))
                if is_thorough:
                    await worker.lease_all(manager, self._root, pool)
            await self._make_ready(manager, name, is_thorough=is_thorough)
        return lost

    async def _make_ready(self, manager: PoolManager, name: str, *, is_thorough: bool) -> None:
        """Bring the pools to what the operation begins with."""
        operation = OPERATIONS[name]
        if name == "create":
            await manager.delete_pool(worker.OTHER)
        if worker.POOL in operation.pools and (is_thorough or name == "remove"):
            await manager.resize(worker.POOL, _SLOTS + (name == "remove"))
        if operation.is_from_file:
            worker.write_config(self._root, self._url, _SLOTS)
            await manager.reload()
            await manager.wait_ready(60)


def _slots(manager: PoolManager, name: str) -> int:
    """Return how many slots a pool must have at least: what the file says where the manager follows it."""
    if name in manager.config.pools:
        return manager.config.pools[name].options.num_slots
    return 1 if name == worker.OTHER else _SLOTS
