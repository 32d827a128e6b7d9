"""Cancelling a coroutine at each of its suspensions, and seeing that nothing of it is left.

`covers` notes which public coroutines a test does that to; `public_coroutines` returns all there are.
"""

import asyncio
import contextlib
import inspect
import itertools
import os
import random
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

from repopool_async import PoolManager
from tests import _children

Operation = Callable[[], Coroutine[Any, Any, object]]
Settle = Callable[[], Awaitable[None]]
Test = TypeVar("Test", bound=Callable[..., object])

COVERED: set[str] = set()
"""The public coroutines that some test cancels everywhere, as `<class>.<name>`."""


def covers(*names: str) -> Callable[[Test], Test]:
    """Note that a test cancels these public coroutines at each of their suspensions."""

    def note(test: Test) -> Test:
        COVERED.update(names)
        return test

    return note


def public_coroutines(*classes: type) -> set[str]:
    """Return what of some classes a user can await, iterate over or enter, and so cancel while it waits."""
    return {
        f"{one.__name__}.{name}"
        for one in classes
        for name, member in inspect.getmembers(one, inspect.isfunction)
        if (not name.startswith("_") or name in ("__aenter__", "__aexit__")) and _can_be_cancelled(member)
    }


def _can_be_cancelled(member: Callable[..., object]) -> bool:
    returned = str(inspect.signature(member).return_annotation)
    return inspect.iscoroutinefunction(member) or "AsyncIterator" in returned or "AsyncContextManager" in returned


class Stepper:
    """Runs a coroutine in the present task and cancels that task at chosen suspensions, counted from 1."""

    def __init__(self, cancel_at: tuple[int, ...] = ()) -> None:
        self.count = 0
        self._cancel_at = cancel_at

    @types.coroutine
    def run(self, coroutine: Coroutine[Any, Any, object]) -> Generator[Any, Any, object]:
        error: BaseException | None = None
        while True:
            try:
                waiting_for = coroutine.send(None) if error is None else coroutine.throw(error)
            except StopIteration as done:
                return done.value
            error = None
            self.count += 1
            if self.count in self._cancel_at:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                yield waiting_for
            except BaseException as thrown:  # noqa: BLE001 - handed on to the coroutine
                error = thrown


async def count_suspensions(operation: Operation) -> int:
    stepper = Stepper()
    await stepper.run(operation())
    return stepper.count


async def run_cancelled(operation: Operation, cancel_at: tuple[int, ...]) -> bool:
    """Return whether the operation was cancelled (it may also have finished just before)."""

    async def body() -> None:
        await Stepper(cancel_at).run(operation())

    task = asyncio.get_running_loop().create_task(body())
    await asyncio.wait([task], timeout=60)
    assert task.done(), f"hangs when cancelled at {cancel_at}"
    if task.cancelled():
        return True
    task.result()
    return False


async def for_each_suspension(operation: Operation, settle: Settle) -> int:
    """Cancel at every suspension, at every other one together with the following; return how many there were.

    Chance says which are those, so that another run does to each what this one does not.
    """
    count = await count_suspensions(operation)
    await settle()
    cancelled = 0
    first = random.randrange(2)
    for at in range(1, count + 1):
        cancelled += await run_cancelled(operation, (at,) if at % 2 == first else (at, at + 1))
        await settle()
    assert cancelled > 0
    return count


def open_descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return {path for path in found if path.endswith(".lock")}


async def no_lock_held() -> None:
    """See that no lock is held, but for moments by whoever watches leases meanwhile."""
    for _ in range(1000):
        if not open_descriptors():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"locks are still held: {open_descriptors()}")


async def nothing_left() -> None:
    """See that nothing is held or running."""
    await no_lock_held()
    assert _children.left() == set()


def settling(manager: PoolManager, *, slots: int | None = 2) -> Settle:
    """Return what puts a manager's pool `app` right and sees that nothing is lost, held or running.

    Every other time it leases a slot as well: one that is of no use stays so until then, and it takes longer than all
    the rest.
    """
    leases = itertools.cycle((True, False))

    async def settle() -> None:
        await manager.recover()
        await manager.wait_clean()
        pool = await manager.get_pool("app")
        summary = await pool.summary()
        assert summary.available == summary.total_slots, summary
        assert slots is None or summary.total_slots == slots
        assert pool.stats() | {"fetches": 0} == {"leased": 0, "returning": 0, "waiting": 0, "fetches": 0}
        await no_lock_held()
        if next(leases):
            async with pool.lease(timeout=20) as slot:
                assert slot.branch == "main"
            await manager.wait_clean()
        assert _children.left() == set()

    return settle
