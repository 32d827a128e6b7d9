"""What the measuring programs share: samples by name, how much is measured, what holds up the event loop."""

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Self, TypeVar

import attrs

T = TypeVar("T")

Tell = Callable[[str], None]
"""Told what is measured next."""


@attrs.frozen
class Scale:
    """How much is measured.

    Attributes:
        sizes: of the repositories, files and directories each, the smallest first.
        rounds: how many samples every median is of; of what takes very long `slow_rounds`.
        ignored_files: what a lessee leaves that git ignores.
        slots: sizes of the pools that allocation is compared in. claim_seconds: how long each claiming run takes.
        together: how many slots are cleaned at once, of a repository of `together_files`.
        crowd: how many lease at once. pack_megabytes: of the heavy repository. trees: how many slots its pool has.
        shares: of the files that a lessee changes, to see how cleaning grows with them.
    """

    sizes: tuple[tuple[int, int], ...] = ((500, 40), (5_000, 400), (50_000, 4_000))
    rounds: int = 20
    slow_rounds: int = 5
    ignored_files: int = 100_000
    new_files: int = 1_000
    slots: tuple[int, ...] = (10, 100, 1_000)
    claim_seconds: float = 3.0
    processes: tuple[int, ...] = (1, 2, 4, 8)
    together: int = 16
    together_files: int = 2_000
    crowd: int = 100
    pack_megabytes: int = 300
    trees: int = 10
    shares: tuple[float, ...] = (0.001, 0.01, 0.05, 0.2)


FULL: Final = Scale()
SMOKE: Final = Scale(
    sizes=((20, 4),),
    rounds=1,
    slow_rounds=1,
    ignored_files=20,
    new_files=5,
    slots=(1, 2),
    claim_seconds=0.1,
    processes=(1, 2),
    together=2,
    together_files=20,
    crowd=5,
    pack_megabytes=10,
    trees=2,
    shares=(0.1,),
)
"""Enough to see that a program works; its figures mean nothing."""


def processor_seconds() -> float:
    """Return what this process and those of its children that have ended have computed, the kernel's part included."""
    return sum(os.times()[:4])


class Samples:
    """Times by name, in seconds."""

    def __init__(self) -> None:
        self.by_name: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        """Note one time."""
        self.by_name.setdefault(name, []).append(seconds)

    async def timed(self, name: str, work: Awaitable[T]) -> T:
        """Wait for something, note how long it took, and return what it returned."""
        started = time.perf_counter()
        outcome = await work
        self.add(name, time.perf_counter() - started)
        return outcome

    def median(self, name: str) -> float:
        """Return the median of a name's times."""
        return statistics.median(self.by_name[name])

    def ratio(self, name: str, floor: str) -> float:
        """Return how many times one median is another."""
        return self.median(name) / self.median(floor)


class LoopWatch:
    """How long one callback held up the event loop at most, while the block runs.

    Attributes:
        wall_seconds: what other programs and threads took from it included. cpu_seconds: what it computed itself.
        what: the callback that took the most wall time.
    """

    def __init__(self) -> None:
        self.wall_seconds = 0.0
        self.cpu_seconds = 0.0
        self.what = ""

    def __enter__(self) -> Self:
        self._run = run = asyncio.Handle._run  # noqa: SLF001 - the one place that every callback goes through

        def watched(handle: asyncio.Handle) -> None:
            wall, cpu = time.perf_counter(), time.thread_time()
            run(handle)
            self._note(time.perf_counter() - wall, time.thread_time() - cpu, handle)

        asyncio.Handle._run = watched  # type: ignore[method-assign,assignment]  # noqa: SLF001 - as above
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.Handle._run = self._run  # type: ignore[method-assign]  # noqa: SLF001 - as above

    def _note(self, wall: float, cpu: float, handle: asyncio.Handle) -> None:
        self.cpu_seconds = max(self.cpu_seconds, cpu)
        if wall > self.wall_seconds:
            self.wall_seconds, self.what = wall, repr(handle)[:200]


class _Spawns:
    def __init__(self) -> None:
        self.count = 0
        sys.addaudithook(self._audit)

    def _audit(self, event: str, _arguments: tuple[Any, ...]) -> None:
        self.count += event == "subprocess.Popen"


_spawns: list[_Spawns] = []


@contextmanager
def counting_spawns() -> Iterator[Callable[[], int]]:
    """Give a function that says how many processes were started in the block so far."""
    if not _spawns:
        _spawns.append(_Spawns())  # an audit hook stays until the process ends
    before = _spawns[0].count
    yield lambda: _spawns[0].count - before
