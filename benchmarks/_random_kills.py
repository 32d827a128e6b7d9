"""Kills processes that use pools at random moments, while others use them, and looks whether all of it is put right."""

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Final

import attrs

from benchmarks import _chaos_worker as worker
from benchmarks._chaos_operations import all_back
from benchmarks._chaos_origin import make_commit
from benchmarks._chaos_work import missing_work
from benchmarks._children import ask, fork
from benchmarks._findings import Findings, add
from benchmarks._steps import kill_with_descendants
from repopool_async import PoolManager, SlotState, SlotStore
from repopool_async.lock_manager import LockManager

_STUCK_SECONDS: Final = 30.0
_PAUSES: Final = (0.02, 0.05, 0.15, 0.4)
"""Between two kills, in seconds; each is made shorter or longer by up to a half."""


class RandomKills:
    """Kills workers at random moments and replaces them, until enough were killed or the time is over."""

    def __init__(self, root: Path, *, kills: int, seconds: float, workers: int, seed: int) -> None:
        self._root = root
        self._url = str(root / "origin")
        self._kills = kills
        self._deadline = time.monotonic() + seconds
        self._chance = random.Random(seed)
        self._store = SlotStore(root / "pools")
        self._locks = LockManager(self._store.locks_directory)
        self._pids: dict[int, int] = dict.fromkeys(range(workers), 0)
        self._idle_since: dict[tuple[str, int, str], float] = {}
        self.findings = Findings()

    def run(self) -> Findings:
        """Do so, then have a new process put everything right, and look at all of it."""
        ask(lambda: asyncio.run(self._prepare()), self._root / "log")
        try:
            while self.findings.kills < self._kills and time.monotonic() < self._deadline:
                self._replace_dead()
                self._watch(self._chance.choice(_PAUSES) * self._chance.uniform(0.5, 1.5))
                self._kill_one()
                if self.findings.kills % 10 == 0:
                    make_commit(self._url, self.findings.kills + 2)
        finally:
            for pid in self._pids.values():
                self._end(pid, is_group=False)
        self._judge()
        return self.findings

    async def _prepare(self) -> None:
        async with PoolManager(worker.config(self._root)) as manager:
            await manager.create_pool(worker.POOL, self._url, num_slots=worker.SLOTS)
        async with PoolManager.from_config_file(worker.write_config(self._root, self._url, 2)) as manager:
            await manager.wait_ready()

    def _replace_dead(self) -> None:
        for index, pid in list(self._pids.items()):
            if pid and os.waitpid(pid, os.WNOHANG)[0]:
                # Workers end by themselves only where something failed, and have said so.
                self._pids[index] = 0
            if not self._pids[index]:
                seed = self._chance.randrange(1 << 30)
                body = lambda index=index, seed=seed: worker.work_for_ever(self._root, self._url, index, seed)  # noqa: E731
                self._pids[index] = fork(body, self._root / "log")

    def _kill_one(self) -> None:
        index = self._chance.choice(list(self._pids))
        self._end(self._pids[index], is_group=self._chance.random() < 0.5)
        self._pids[index] = 0
        self.findings.kills += 1

    def _end(self, pid: int, *, is_group: bool) -> None:
        if not pid:
            return
        if is_group:
            kill_with_descendants(pid)
        else:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def _watch(self, seconds: float) -> None:
        """Let time pass, and note how long slots lie about that nobody has and nobody may lease."""
        until = time.monotonic() + seconds
        while True:
            self._look()
            if time.monotonic() >= until:
                return
            time.sleep(min(0.05, seconds))

    def _look(self) -> None:
        present = time.monotonic()
        idle: dict[tuple[str, int, str], float] = {}
        for slot in [slot for name in (worker.POOL, worker.FILED) for slot in self._store.list_slots_sync(name)]:
            if slot.state is SlotState.AVAILABLE or self._locks.is_locked_sync(slot.slot_id):
                continue
            key = (slot.slot_id, slot.token, str(slot.state))
            idle[key] = self._idle_since.get(key, present)
            if present - idle[key] > _STUCK_SECONDS:
                self.findings.slots_lost.append(f"{slot.slot_id} is {slot.state} and nobody takes it over")
                idle[key] = present
        taken_over = [since for key, since in self._idle_since.items() if key not in idle]
        self.findings.recovery_seconds += [present - since for since in taken_over]
        self._idle_since = idle

    def _judge(self) -> None:
        try:
            add(self.findings, ask(lambda: attrs.asdict(asyncio.run(judge(self._root))), self._root / "log"))
        except RuntimeError as error:
            self.findings.errors.append(f"the process that came afterwards: {error}")
        self.findings.take_accusations(self._root)


async def judge(root: Path) -> Findings:
    """As a new process, wait until all is well without asking for it, and look at everything."""
    found = Findings()
    async with PoolManager(worker.config(root)) as manager:
        for name in await manager.list_pools():
            found.slots_lost += await all_back(manager, name, slots=worker.SLOTS if name == worker.POOL else 1)
            await worker.lease_all(manager, root, name)
        found.half_made += [f"{slot_id}: {problems}" for slot_id, problems in (await manager.check()).items()]
        found.left_running = left_running(root)
        found.work_due, found.work_lost = await missing_work(manager, root, {worker.FILED})
    return found


def left_running(root: Path) -> list[str]:
    """Return the processes that stand in a tree or were started in a lease of it, though nobody has one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                where = str((entry / "cwd").readlink())
            except OSError:
                continue
            if where.startswith(f"{root}/pools/"):
                found.append(f"{entry.name} {(entry / 'comm').read_text().strip()} in {where}")
    return found
