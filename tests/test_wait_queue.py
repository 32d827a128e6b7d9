"""Turns are given in order, handed on when a waiter is cancelled at any moment, and refused when the pool closes."""

import asyncio
import random

import pytest

from repopool_async.wait_queue import WaitQueue


async def _hold(queue: WaitQueue, name: str, order: list[str], gate: asyncio.Event, priority: int = 0) -> None:
    async with queue.turn(priority):
        order.append(name)
        await gate.wait()


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_turns_come_in_order_of_arrival_within_a_priority() -> None:
    queue, order, gate = WaitQueue(), list[str](), asyncio.Event()
    names = [("first", 0), ("low", -1), ("a", 0), ("b", 0), ("urgent", 5)]
    tasks = []
    for name, priority in names:
        tasks.append(asyncio.create_task(_hold(queue, name, order, gate, priority)))
        await _settle()
    assert len(queue) == 5
    gate.set()
    await asyncio.gather(*tasks)
    assert order == ["first", "urgent", "a", "b", "low"]
    assert len(queue) == 0


async def test_a_waiter_cancelled_in_the_instant_it_is_called_passes_the_turn_on() -> None:
    queue, order, gate = WaitQueue(), list[str](), asyncio.Event()
    head = asyncio.create_task(_hold(queue, "head", order, gate))
    await _settle()
    called = asyncio.create_task(_hold(queue, "called", order, gate))
    behind = asyncio.create_task(_hold(queue, "behind", order, gate))
    await _settle()
    gate.set()
    while not head.done():
        await asyncio.sleep(0)
    called.cancel()  # its future is filled, it has not run yet
    await asyncio.gather(called, return_exceptions=True)
    await asyncio.wait_for(behind, 5)
    assert order[-1] == "behind"


async def test_random_cancellations_never_lose_the_turn() -> None:
    rng = random.Random(7)
    queue, order = WaitQueue(), list[str]()
    gate = asyncio.Event()
    gate.set()
    for _ in range(200):
        tasks = [asyncio.create_task(_hold(queue, str(n), order, gate)) for n in range(5)]
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        for task in rng.sample(tasks, 3):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(queue) == 0
    async with asyncio.timeout(5), queue.turn():
        pass


async def test_refusing_fails_those_who_wait_and_those_who_come() -> None:
    queue, order, gate = WaitQueue(), list[str](), asyncio.Event()
    holder = asyncio.create_task(_hold(queue, "holder", order, gate))
    await _settle()
    waiter = asyncio.create_task(_hold(queue, "waiter", order, gate))
    await _settle()
    queue.refuse(ConnectionAbortedError("closed"))
    with pytest.raises(ConnectionAbortedError):
        await waiter
    with pytest.raises(ConnectionAbortedError):
        await _hold(queue, "late", order, gate)
    gate.set()
    await holder
    assert order == ["holder"]
