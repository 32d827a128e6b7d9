"""Hosts of a simulated fleet: fences kept by the rules of `remote/fence.sh`, and processes that outlive their managers.

Between any two steps of a script a host may dawdle, so that scripts of several managers mix in every order. A reboot
ends every process and forgets the names that were not on the disk yet.
"""

import asyncio
import random
import uuid
from collections.abc import Callable
from typing import Final

import attrs

from benchmarks._fleet_judge import Judge
from repopool_async.exceptions import FencedError, HostUnreachableError

SYNC_SECONDS: Final = 5.0
"""How often a host writes to its disk which directories were made."""
_DAWDLES: Final = 0.05
_DAWDLE_SECONDS: Final = 0.3

Name = tuple[int, bool]
"""A name in a fence: the token, and whether it is the one above it that says `left`."""


@attrs.define(eq=False)
class Process:
    """A process group under a guard.

    Attributes:
        has_ended: told to whoever waits; is_killed: whether not by itself.
    """

    hold_id: uuid.UUID
    token: int
    has_ended: asyncio.Event = attrs.field(factory=asyncio.Event)
    is_running: bool = False
    is_killed: bool = False


@attrs.define
class Fence:
    """What lies beside a tree: `fence/` and `run/`."""

    made: dict[Name, float] = attrs.field(factory=dict)
    removed: dict[Name, tuple[float, float]] = attrs.field(factory=dict)
    boots: dict[int, int] = attrs.field(factory=dict)
    run: dict[Process, None] = attrs.field(factory=dict)

    @property
    def top(self) -> Name:
        """The highest name."""
        return max(self.made, default=(0, False))

    def remove_lower(self, token: int, at: float) -> None:
        """Remove the names below a token, as long as the disk may still have them to be found again."""
        lower = [name for name in self.made if name[0] < token]
        self.removed = {name: (self.made.pop(name), at) for name in lower}

    def forget_since(self, at: float) -> None:
        """Go back to what was on the disk at some moment."""
        kept = {name: made for name, made in self.made.items() if made <= at}
        back = {name: made for name, (made, removed) in self.removed.items() if made <= at < removed}
        self.made, self.removed = {**back, **kept}, {}
        self.run.clear()


class FleetHost:
    """One host.

    Args:
        checks: whether it refuses and kills at all; without, it only notes who works there.
    """

    def __init__(self, host_id: str, *, judge: Judge, time: Callable[[], float], chance: random.Random, checks: bool):
        self.id: Final = host_id
        self.is_up = True
        self.boot = 1
        self._judge = judge
        self._time = time
        self._chance = chance
        self._checks = checks
        self._fences: dict[str, Fence] = {}

    def fence(self, slot_directory: str) -> Fence:
        """Return what lies beside a tree."""
        fence = self._fences.get(slot_directory)
        if fence is None:
            fence = self._fences[slot_directory] = Fence()
        return fence

    def reboot(self) -> None:
        """End everything and forget what was not on the disk; scripts under way end where they are."""
        self.boot += 1
        last_sync = self._time() - self._chance.uniform(0, SYNC_SECONDS)
        for directory, fence in self._fences.items():
            for process in list(fence.run):
                self._end(directory, process, is_killed=True)
            fence.forget_since(last_sync)

    async def enter(self, directory: str, token: int, hold_id: uuid.UUID, *, kills: bool) -> None:
        """Do as `enter` of `fence.sh`; raises as `Host.enter`."""
        if not self._checks:
            self._judge.entered(directory, hold_id)
            return
        boot = self.boot
        fence = self.fence(directory)
        self._require_highest(directory, token)
        await self._step(boot)
        if (token, False) in fence.made:
            raise self._fenced(directory, token, is_used=True)
        fence.made[token, False] = self._time()
        await self._step(boot)
        if kills:
            self._kill_until(directory, token - 1)
        fence.boots[token] = boot
        await self._step(boot)
        if fence.top != (token, False):
            raise self._fenced(directory, token)
        fence.remove_lower(token, self._time())
        self._judge.note("entered", directory, f"hold {hold_id.int} token {token}{' kills' if kills else ''}")
        self._judge.entered(directory, hold_id)

    async def leave(self, directory: str, token: int, hold_id: uuid.UUID) -> None:
        """Do as `leave` of `fence.sh`; raises as `Host.leave`."""
        if not self._checks:
            self._judge.entered(directory, hold_id)
            self._end_all(directory, lambda process: process.hold_id == hold_id)
            return
        boot = self.boot
        self._require_highest(directory, token)
        await self._step(boot)
        self.fence(directory).made.setdefault((token, True), self._time())
        await self._step(boot)
        self._kill_until(directory, token)
        await self._step(boot)
        self._require_highest(directory, token)
        self._judge.note("left", directory, f"hold {hold_id.int} token {token}")
        self._judge.entered(directory, hold_id)

    async def start(
        self, directory: str, token: int, hold_id: uuid.UUID, *, seconds: float, is_maintenance: bool = False
    ) -> Process:
        """Register a process, look at the fence, and let it run for some seconds, whoever waits for it.

        Args:
            is_maintenance: it is of the pool's own cleaning: its hold may have left the slot, as cleaners have.

        Raises:
            FencedError: the token is not the present one.
        """
        boot = self.boot
        fence = self.fence(directory)
        process = Process(hold_id, token)
        fence.run[process] = None
        await self._step(boot)
        top = fence.top
        is_present = top == (token, False) or (is_maintenance and top == (token, True))
        if self._checks and not (is_present and fence.boots.get(token) == boot):
            fence.run.pop(process, None)
            self._judge.note("refused commands", directory, f"hold {hold_id.int} token {token}, top {top}")
            raise self._fenced(directory, token)
        await self._step(boot)
        if process.is_killed:
            return process
        process.is_running = True
        self._judge.started(directory, process)
        asyncio.get_running_loop().call_later(seconds, self._end, directory, process)
        return process

    def _kill_until(self, directory: str, last: int) -> None:
        self._end_all(directory, lambda process: process.token <= last)

    def _end_all(self, directory: str, is_meant: Callable[[Process], bool]) -> None:
        for process in list(self.fence(directory).run):
            if is_meant(process):
                self._judge.note("killed processes", directory, f"of hold {process.hold_id.int}")
                self._end(directory, process, is_killed=True)

    def _end(self, directory: str, process: Process, is_killed: bool = False) -> None:
        if process.has_ended.is_set():
            return
        process.is_running, process.is_killed = False, is_killed
        self.fence(directory).run.pop(process, None)
        self._judge.ended(directory, process)
        process.has_ended.set()

    def _require_highest(self, directory: str, token: int) -> None:
        if self.fence(directory).top[0] > token:
            raise self._fenced(directory, token)

    def _fenced(self, directory: str, token: int, *, is_used: bool = False) -> FencedError:
        top = self.fence(directory).top[0]
        return FencedError(
            f"{directory} on host {self.id}: token {token} is refused, the highest is {top}; take a new lease",
            slot_directory=directory,
            token=token,
            top=top,
            is_used=is_used,
        )

    async def _step(self, boot: int) -> None:
        """Go on after a while, or at once; a script does not outlive its host."""
        if self._chance.random() < _DAWDLES:
            await asyncio.sleep(self._chance.expovariate(1 / _DAWDLE_SECONDS))
        if self.boot != boot:
            raise HostUnreachableError(f"host {self.id} went down meanwhile; try again later", host_id=self.id)
