"""Kills processes that use a pool, at random and at every step, and looks whether the others put all of it right.

    python -m benchmarks.chaos [--kills 300] [--seconds 600] [--workers 4] [--steps cycle|named|all|none]

First workers lease, work, return, add and remove slots, make and delete pools, and are killed with SIGKILL at random
moments, every second time together with every process they started. Then one process at a time is killed at each step
of making a pool, a lease and its return, adding and removing a slot and deleting a pool (`named`: the first of every
name; `cycle`: of a lease, adding and removing only, and no temporary files; `all`: every single step). The library is
not told: what is a step is in `benchmarks._steps`.

After each kill a process that runs already, or a new one, must bring every slot back to AVAILABLE without help. Prints
kills survived, slots lost, double holders, things half made, work lost and unexpected errors (all must be 0) and exits
with status 1 where one is not.
"""

import argparse
import asyncio
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks import _chaos_worker as worker
from benchmarks._report import describe_ms, print_table, write_json
from benchmarks._steps import Steps, kill_with_descendants
from repopool_async import PoolManager, SlotState, SlotStore
from repopool_async.lock_manager import LockManager

_STUCK_SECONDS: Final = 30.0
_WAIT_SECONDS: Final = 60.0
_FILES: Final = 20


@attrs.define
class Findings:
    """What a run saw; everything but the first two must be empty in the end."""

    kills: int = 0
    recovery_seconds: list[float] = attrs.field(factory=list)
    slots_lost: list[str] = attrs.field(factory=list)
    double_holders: list[str] = attrs.field(factory=list)
    half_made: list[str] = attrs.field(factory=list)
    errors: list[str] = attrs.field(factory=list)
    work_lost: list[str] | None = None
    left_running: list[str] = attrs.field(factory=list)
    steps: int = 0
    steps_not_reached: list[str] = attrs.field(factory=list)

    @property
    def violations(self) -> list[str]:
        """Everything that must not be."""
        groups = {
            "slot lost": self.slots_lost, "double holder": self.double_holders, "half made": self.half_made,
            "error": self.errors, "work lost": self.work_lost or [], "left running": self.left_running,
        }  # fmt: skip
        return [f"{name}: {item}" for name, items in groups.items() for item in items]

    def take_accusations(self, root: Path) -> None:
        """Sort in what the workers wrote down."""
        path = root / "accusations"
        lists = {"double holder": self.double_holders, "half made": self.half_made}
        for line in path.read_text().splitlines() if path.exists() else []:
            entry = json.loads(line)
            lists.get(entry["kind"], self.errors).append(entry["text"])


# Children: forked, because importing everything anew for each kill would take most of the time


def fork(body: Callable[[], object], log: Path) -> int:
    """Run something in a forked child, its output in a log, and return its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        body()
        status = 0
    except BaseException:  # noqa: BLE001 - a forked child must not return
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ask(body: Callable[[], Any], log: Path, *, seconds: float = 300.0) -> Any:
    """Run something in a child and return its result, which JSON can hold; None where it was killed.

    Raises:
        RuntimeError: it failed, or took too long; the message is its log's end.
    """
    reading, writing = os.pipe()

    def answer() -> None:
        os.write(writing, json.dumps(body()).encode())

    pid = fork(answer, log)
    os.close(writing)
    try:
        data = _read_until(reading, time.monotonic() + seconds)
    finally:
        os.close(reading)
    if data is None:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if data is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if data is None or status != 0:
        raise RuntimeError(log.read_text(errors="replace")[-3000:] if data is not None else f"hung: {log}")
    return json.loads(data)


def _read_until(descriptor: int, deadline: float) -> bytes | None:
    chunks: list[bytes] = []
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        chunk = os.read(descriptor, 1 << 20)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


# Random kills


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
                self._watch(self._chance.choice((0.02, 0.1, 0.3, 0.6)) * self._chance.uniform(0.5, 1.5))
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
        for slot in self._store.list_slots_sync(worker.POOL):
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
            told = ask(lambda: asyncio.run(judge(self._root)), self._root / "log")
        except RuntimeError as error:
            told = {"errors": [f"the process that came afterwards: {error}"]}
        for name, items in told.items():
            if items is not None:
                setattr(self.findings, name, [*(getattr(self.findings, name) or []), *items])
        self.findings.take_accusations(self._root)


async def judge(root: Path) -> dict[str, list[str] | None]:
    """As a new process, wait until all is well without asking for it, and look at everything."""
    told: dict[str, list[str] | None] = {"slots_lost": [], "errors": [], "half_made": [], "left_running": []}
    lost, half_made = told["slots_lost"], told["half_made"]
    assert lost is not None
    assert half_made is not None
    async with PoolManager(worker.config(root)) as manager:
        for name in await manager.list_pools():
            lost += await all_slots_back(manager, name, worker.SLOTS if name == worker.POOL else 1)
            await worker.lease_all(manager, root, name)
        half_made += [f"{slot_id}: {problems}" for slot_id, problems in (await manager.check()).items()]
        told["left_running"] = left_running(root)
        if hasattr(manager, "list_salvage"):
            saved = {record.lease_id for record in await manager.list_salvage()}
            told["work_lost"] = worker.unsaved_work(root, saved)
    return told


async def all_slots_back(manager: PoolManager, name: str, expected: int = 1) -> list[str]:
    """Return what is missing of a pool once there was time to put it right."""
    lost = await worker.all_available(manager, name, _WAIT_SECONDS)
    count = len(await manager.list_slots(name))
    return lost if count >= expected else [*lost, f"{name} has {count} slots of {expected}"]


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


# Named steps

Operation = Callable[[PoolManager, str], Coroutine[Any, Any, None]]
_NAMED_SLOTS: Final = 2


async def _create(manager: PoolManager, url: str) -> None:
    await manager.create_pool(worker.OTHER, url, num_slots=1)


async def _lease_and_return(manager: PoolManager, _url: str) -> None:
    async with manager.lease(worker.POOL, ref="feature", timeout=60) as slot:
        (slot.path / "untracked").mkdir()
        (slot.path / "untracked/file").write_text("")
        (slot.path / "README").write_text("changed\n")
    await manager.wait_clean()


async def _add(manager: PoolManager, _url: str) -> None:
    await manager.add_slot(worker.POOL)


async def _remove(manager: PoolManager, _url: str) -> None:
    await manager.remove_slot((await manager.list_slots(worker.POOL))[-1].slot_id)


async def _delete(manager: PoolManager, _url: str) -> None:
    await manager.delete_pool(worker.OTHER)


OPERATIONS: Final[dict[str, Operation]] = {
    "create": _create, "lease and return": _lease_and_return, "add": _add, "remove": _remove, "delete": _delete,
}  # fmt: skip
_CYCLE: Final = ("lease and return", "add", "remove")
_THOROUGH_EVERY: Final = 5
"""After how many kills every slot is leased; in between it is enough that all are AVAILABLE."""


class NamedSteps:
    """Kills one process after another, each before another step.

    Args:
        root: a directory of its own. has_keeper: whether a process that runs all the time puts things right, before a
            new one looks. share: this one's number among how many that divide the steps up.
    """

    def __init__(self, root: Path, *, which: str, has_keeper: bool, share: tuple[int, int]) -> None:
        self._root = root
        self._url = str(root / "origin")
        self._log = root / "log"
        self._is_every = which == "all"
        self._is_brief = which == "cycle"
        self._operations = [name for name in OPERATIONS if which != "cycle" or name in _CYCLE]
        self._has_keeper = has_keeper
        self._share = share
        self.findings = Findings()

    def run(self) -> Findings:
        """Do so for every operation."""
        ask(lambda: asyncio.run(self._prepare()), self._log)
        keeper = fork(lambda: asyncio.run(self._keep()), self._log) if self._has_keeper else 0
        try:
            for name in self._operations:
                self._settle(name, "before")
                self._kill_at_each_step(name)
        finally:
            if keeper:
                os.kill(keeper, signal.SIGKILL)
                os.waitpid(keeper, 0)
        self.findings.take_accusations(self._root)
        return self.findings

    def _kill_at_each_step(self, name: str) -> None:
        self._new_commit()
        seen = self._operate(name, None)
        assert seen is not None
        self._settle(name, "nowhere")
        counts: dict[str, int] = {}
        steps: list[tuple[str, int]] = []
        for step in seen:
            counts[step] = counts.get(step, 0) + 1
            steps.append((step, counts[step]))
        chosen = [step for step in steps if self._is_every or (step[1] == 1 and self._is_told_apart(step[0]))]
        for number, (step, occurrence) in enumerate(chosen):
            if number % self._share[1] != self._share[0]:
                continue
            self._new_commit()
            self.findings.steps += 1
            try:
                was_survived = self._operate(name, (step, occurrence)) is not None
            except RuntimeError as error:
                self.findings.errors.append(f"{name}, {step}: {error}")
                continue
            if was_survived:
                self.findings.steps_not_reached.append(f"{name}: {step} ({occurrence})")
            else:
                self.findings.kills += 1
            self._settle(name, f"{step} ({occurrence})")

    def _is_told_apart(self, step: str) -> bool:
        """Return whether others can tell from what is on disk that it came so far: temporary files they cannot."""
        return not self._is_brief or not step.startswith(("open ", "write ", "half-written ", "spawn ", "mkdir locks"))

    def _new_commit(self) -> None:
        make_commit(self._url, self.findings.steps + 2)

    def _operate(self, name: str, die_at: tuple[str, int] | None) -> list[str] | None:
        """Do an operation in a child; return its steps, or None where it was killed at one."""
        steps = Steps(str(self._root / "pools"), die_at)

        async def body() -> list[str]:
            async with PoolManager(worker.config(self._root, janitor_interval=3600)) as manager:
                steps.arm()
                await OPERATIONS[name](manager, self._url)
                steps.disarm()
            return steps.seen

        told: list[str] | None = ask(lambda: asyncio.run(body()), self._log)
        return told

    def _settle(self, name: str, where: str) -> None:
        started = time.monotonic()
        if self._has_keeper and not self._was_put_right():
            self.findings.slots_lost.append(f"{name}, killed at {where}: the running process did not put it right")
        try:
            is_thorough = self.findings.steps % _THOROUGH_EVERY == 0 or name in ("create", "delete")
            lost = ask(lambda: asyncio.run(settle(self._root, self._url, name, is_thorough=is_thorough)), self._log)
        except RuntimeError as error:
            self.findings.errors.append(f"{name}, killed at {where}: {error}")
            return
        self.findings.recovery_seconds.append(time.monotonic() - started)
        self.findings.slots_lost += [f"{name}, killed at {where}: {item}" for item in lost]

    def _was_put_right(self) -> bool:
        store = SlotStore(self._root / "pools")
        deadline = time.monotonic() + _STUCK_SECONDS
        while any(slot.state is not SlotState.AVAILABLE for slot in store.list_slots_sync(worker.POOL)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    async def _prepare(self) -> None:
        async with PoolManager(worker.config(self._root)) as manager:
            await manager.create_pool(worker.POOL, self._url, num_slots=_NAMED_SLOTS)

    async def _keep(self) -> None:
        async with PoolManager(worker.config(self._root, janitor_interval=0.1)):
            await asyncio.Event().wait()


async def settle(root: Path, url: str, operation: str, *, is_thorough: bool) -> list[str]:
    """As a new process, see that all is well, use it, and make it ready for the next time; return what is missing."""
    async with PoolManager(worker.config(root, janitor_interval=3600)) as manager:
        lost = await all_slots_back(manager, worker.POOL, _NAMED_SLOTS)
        if is_thorough:
            await worker.lease_all(manager, root, worker.POOL)
        if operation in ("create", "delete"):
            await manager.create_pool(worker.OTHER, url, num_slots=1)
            lost += await all_slots_back(manager, worker.OTHER)
            await worker.lease_all(manager, root, worker.OTHER)
        if operation == "create":
            await manager.delete_pool(worker.OTHER)
        if is_thorough or operation == "remove":
            await manager.resize(worker.POOL, _NAMED_SLOTS + (operation == "remove"))
    return lost


def named_steps(directory: Path, which: str) -> Findings:
    """Kill at every step: half of them while another process runs, half of them with none there."""
    findings = Findings()

    def lane(number: int) -> dict[str, Any]:
        root = directory / f"lane{number}"
        root.mkdir()
        make_repository(root)
        lane = NamedSteps(root, which=which, has_keeper=number == 0, share=(number, 2))
        return attrs.asdict(lane.run())

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


def add(findings: Findings, more: Mapping[str, Any]) -> None:
    """Add what another run saw."""
    for name, value in more.items():
        present = getattr(findings, name)
        if value is not None:
            setattr(findings, name, value if present is None else present + value)


# The repository


def make_repository(root: Path) -> None:
    """Make a bare repository with branches `main` and `feature` and a tag `first`."""
    path = root / "origin"
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(path)], check=True)
    make_commit(str(path), 1)
    subprocess.run(["git", "-C", str(path), "tag", "first", "main"], check=True)


def make_commit(url: str, serial: int) -> None:
    """Commit to both branches; every file tells which commit it is of, so that a mixture shows."""
    stream = ""
    for branch, text in (("main", f"main {serial}\n"), ("feature", f"feature {serial}\n")):
        stream += f"commit refs/heads/{branch}\ncommitter chaos <chaos@localhost> {1700000000 + serial} +0000\n"
        stream += f"data <<.\n{serial}\n.\n" + (f"from refs/heads/{branch}^0\n" if serial > 1 else "") + "deleteall\n"
        files = {"README": "a repository\n", "SERIAL": text} | {f"file-{n}": text * 20 for n in range(_FILES)}
        stream += "".join(f"M 644 inline {name}\ndata {len(data)}\n{data}\n" for name, data in files.items())
    subprocess.run(["git", "-C", url, "fast-import", "--quiet", "--force"], input=stream.encode(), check=True)


# The command


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="at random moments (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600.0, help="at most, for these (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="that are killed (default: %(default)s)")
    parser.add_argument("--steps", choices=["cycle", "named", "all", "none"], default="named")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="repopool-chaos-", ignore_cleanup_errors=True) as directory:
        done, at_steps = measure(Path(directory), options)
    return report(options, done, at_steps, time.monotonic() - started)


def measure(directory: Path, options: argparse.Namespace) -> tuple[Findings, Findings]:
    """Do what the options say."""
    done = at_steps = Findings()
    if options.kills > 0:
        make_repository(directory)
        done = RandomKills(
            directory, kills=options.kills, seconds=options.seconds, workers=options.workers, seed=options.seed
        ).run()
    if options.steps != "none":
        at_steps = named_steps(directory, options.steps)
    return done, at_steps


def report(options: argparse.Namespace, done: Findings, at_steps: Findings, seconds: float) -> int:
    """Print and write the figures; return the exit status."""
    both = Findings()
    add(both, attrs.asdict(done))
    if at_steps is not done:
        add(both, attrs.asdict(at_steps))
    print_table(
        f"{options.workers} workers, seed {options.seed}, {seconds:.0f} s",
        {
            "kills survived": f"{both.kills} ({done.kills} at random, {at_steps.kills} at {at_steps.steps} steps)",
            "slots lost": len(both.slots_lost),
            "double holders": len(both.double_holders),
            "half made and used": len(both.half_made),
            "work lost": "not measured" if both.work_lost is None else len(both.work_lost),
            "processes left running": len(both.left_running),
            "unexpected errors": len(both.errors),
            "from a random kill to a slot in good hands": describe_ms(done.recovery_seconds),
            "from a kill at a step to all slots AVAILABLE": describe_ms(at_steps.recovery_seconds),
            "steps that were not reached again": len(both.steps_not_reached),
        },
    )
    for line in both.violations[:20]:
        print(f"  ! {line}")
    figures = {"options": vars(options), "seconds": seconds, **attrs.asdict(both), "random_kills": done.kills}
    print(f"  written to {write_json('chaos', figures)}")
    return 1 if both.violations or done.kills < options.kills else 0


if __name__ == "__main__":
    raise SystemExit(main())
