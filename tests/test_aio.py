import asyncio
import contextvars
import functools
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from repopool_async._aio import THREADS, Deadline, TaskSet, in_order, in_thread, in_turn, shielded, together
from tests._forks import child_of_ours

CallIn = Callable[..., Coroutine[Any, Any, Any]]


class Operation:
    """Something that takes until it is let go, and knows whether it has finished."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.gate = asyncio.Event()
        self.is_finished = False

    async def run(self) -> str:
        self.started.set()
        await self.gate.wait()
        self.is_finished = True
        return "result"


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def _fail_beside(operation: Operation) -> None:
    await operation.started.wait()
    asyncio.get_running_loop().call_later(0.02, operation.gate.set)
    raise ValueError("sibling")


def _cancellations() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


@pytest.fixture
def operation() -> Operation:
    return Operation()


class TestShielded:
    async def test_returns_the_result(self, operation: Operation) -> None:
        operation.gate.set()
        assert await shielded(operation.run(), name="x") == "result"

    async def test_raises_what_the_operation_raised(self) -> None:
        async def fail() -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await shielded(fail(), name="x")

    async def test_names_its_task(self) -> None:
        async def name() -> str:
            task = asyncio.current_task()
            assert task is not None
            return task.get_name()

        assert await shielded(name(), name="claim") == "repopool:claim"

    async def test_operation_sees_the_callers_context(self) -> None:
        variable = contextvars.ContextVar("variable", default=0)
        variable.set(7)

        async def read() -> int:
            return variable.get()

        assert await shielded(read(), name="x") == 7

    @pytest.mark.parametrize("cancels", [1, 2, 3])
    async def test_finishes_however_often_it_is_cancelled_natively(self, operation: Operation, cancels: int) -> None:
        task = asyncio.create_task(shielded(operation.run(), name="x"))
        await operation.started.wait()
        for _ in range(cancels):
            task.cancel()
            await turns(3)
            assert not task.done()
        operation.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert operation.is_finished
        assert task.cancelled()

    async def test_finishes_inside_a_cancelled_anyio_scope_without_spinning(self) -> None:
        async def slow() -> str:
            await asyncio.sleep(0.2)
            return "result"

        used = time.thread_time()
        with anyio.CancelScope() as scope:
            scope.cancel()
            result = await shielded(slow(), name="x")
            await anyio.lowlevel.checkpoint()
            pytest.fail("the scope has been cancelled")
        assert result == "result"
        assert scope.cancelled_caught
        assert time.thread_time() - used < 0.05

    async def test_finishes_when_an_anyio_scope_and_the_task_are_cancelled(self, operation: Operation) -> None:
        scopes: list[anyio.CancelScope] = []

        async def work() -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await shielded(operation.run(), name="x")

        task = asyncio.create_task(work())
        await operation.started.wait()
        scopes[0].cancel()
        await turns(3)
        task.cancel()
        await turns(3)
        operation.gate.set()
        await asyncio.wait([task])
        assert operation.is_finished
        assert task.cancelled()

    async def test_leaves_native_timeouts_as_they_are(self, operation: Operation) -> None:
        async def work() -> None:
            async with asyncio.timeout(0.01):
                asyncio.get_running_loop().call_later(0.05, operation.gate.set)
                await shielded(operation.run(), name="x")

        with pytest.raises(TimeoutError):
            await work()
        assert operation.is_finished
        assert _cancellations() == 0

    async def test_leaves_anyio_timeouts_as_they_are(self, operation: Operation) -> None:
        async def work() -> None:
            with anyio.fail_after(0.01):
                asyncio.get_running_loop().call_later(0.05, operation.gate.set)
                await shielded(operation.run(), name="x")
                await anyio.lowlevel.checkpoint()

        with pytest.raises(TimeoutError):
            await work()
        assert operation.is_finished
        assert _cancellations() == 0

    async def test_leaves_native_task_groups_as_they_are(self, operation: Operation) -> None:
        async def work() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(shielded(operation.run(), name="x"))
                group.create_task(_fail_beside(operation))

        with pytest.raises(ExceptionGroup) as raised:
            await work()
        assert [str(error) for error in raised.value.exceptions] == ["sibling"]
        assert operation.is_finished

    async def test_leaves_anyio_task_groups_as_they_are(self, operation: Operation) -> None:
        async def run() -> None:
            await shielded(operation.run(), name="x")

        async def work() -> None:
            async with anyio.create_task_group() as group:
                group.start_soon(run)
                group.start_soon(_fail_beside, operation)

        with pytest.raises(ExceptionGroup) as raised:
            await work()
        assert [str(error) for error in raised.value.exceptions] == ["sibling"]
        assert operation.is_finished

    async def test_failure_of_a_cancelled_operation_is_attached(self, operation: Operation) -> None:
        async def fail() -> None:
            await operation.run()
            raise ValueError("no")

        task = asyncio.create_task(shielded(fail(), name="end"))
        await operation.started.wait()
        task.cancel()
        await turns(2)
        operation.gate.set()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        cancellation: BaseException = raised.value
        while cancellation.__cause__ is None:
            assert cancellation.__context__ is not None
            cancellation = cancellation.__context__
        assert isinstance(cancellation.__cause__, ValueError)
        assert cancellation.__notes__ == ["end failed meanwhile: ValueError('no')"]

    async def test_gives_back_an_abandoned_result_also_when_cancelled_again(self, operation: Operation) -> None:
        given_back: list[str] = []
        is_giving, may_give = asyncio.Event(), asyncio.Event()

        async def give_back(result: str) -> None:
            is_giving.set()
            await may_give.wait()
            given_back.append(result)

        task = asyncio.create_task(shielded(operation.run(), name="x", on_abandoned=give_back))
        await operation.started.wait()
        task.cancel()
        operation.gate.set()
        await is_giving.wait()
        task.cancel()
        await turns(3)
        assert not task.done()
        may_give.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert given_back == ["result"]

    async def test_gives_back_what_was_finished_in_the_turn_of_the_cancellation(self, operation: Operation) -> None:
        given_back: list[str] = []

        async def give_back(result: str) -> None:
            given_back.append(result)

        task = asyncio.create_task(shielded(operation.run(), name="x", on_abandoned=give_back))
        await operation.started.wait()
        operation.gate.set()
        while not operation.is_finished:
            await turns(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert given_back == ["result"]

    async def test_logs_a_failure_to_give_back(self, operation: Operation, caplog: pytest.LogCaptureFixture) -> None:
        async def give_back(result: str) -> None:
            raise ValueError(result)

        task = asyncio.create_task(shielded(operation.run(), name="claim", on_abandoned=give_back))
        await operation.started.wait()
        task.cancel()
        operation.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert "giving back the result of claim failed" in caplog.text

    async def test_operation_cancelled_by_itself_raises(self) -> None:
        async def cancelled() -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await shielded(cancelled(), name="x")

    @settings(max_examples=300, deadline=None)
    @given(
        length=st.integers(0, 6),
        events=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["native", "scope"])), max_size=3),
        has_failure=st.booleans(),
    )
    @example(length=2, events=[(1, "scope"), (1, "native")], has_failure=False)
    @example(length=2, events=[(2, "native"), (3, "native")], has_failure=True)
    def test_every_result_is_delivered_or_given_back(
        self, length: int, events: list[tuple[int, str]], has_failure: bool
    ) -> None:
        asyncio.run(_check_delivery(length, events, has_failure=has_failure))


async def _check_delivery(length: int, events: list[tuple[int, str]], *, has_failure: bool) -> None:
    finished: list[str] = []
    delivered: list[str] = []
    given_back: list[str] = []
    scope = anyio.CancelScope()
    has_begun = False

    async def operation() -> str:
        await turns(length)
        finished.append("result")
        if has_failure:
            raise ValueError("no")
        return "result"

    async def give_back(result: str) -> None:
        await turns(2)
        given_back.append(result)

    async def work() -> None:
        nonlocal has_begun
        with scope:
            has_begun = True
            delivered.append(await shielded(operation(), name="x", on_abandoned=give_back))

    task = asyncio.create_task(work())
    was_native = False
    for turn in range(12):
        for at, kind in events:
            if at == turn and not task.done():
                was_native = was_native or kind == "native"
                task.cancel() if kind == "native" else scope.cancel()
        await turns(1)
    await asyncio.wait([task])
    # A task cancelled before its first turn never gets as far as the operation.
    assert len(finished) == has_begun
    assert len(delivered) + len(given_back) == (has_begun and not has_failure)
    if was_native and not delivered:
        assert task.cancelled()
    elif has_failure and not events:
        assert isinstance(task.exception(), ValueError)


@pytest.mark.parametrize("call_in", [in_thread, in_order])
class TestInAnyThread:
    async def test_calls_with_arguments_off_the_loop_thread(self, call_in: CallIn) -> None:
        def call(first: int, second: str) -> tuple[int, str, bool]:
            return first, second, threading.current_thread() is threading.main_thread()

        assert await call_in(call, 1, "b") == (1, "b", False)

    async def test_raises_what_the_function_raised(self, call_in: CallIn) -> None:
        with pytest.raises(ValueError, match="invalid literal"):
            await call_in(int, "x")

    async def test_function_sees_the_callers_context(self, call_in: CallIn) -> None:
        variable = contextvars.ContextVar("variable", default=0)
        variable.set(7)
        assert await call_in(variable.get) == 7

    async def test_function_finishes_before_a_cancelled_call_ends(self, call_in: CallIn) -> None:
        loop = asyncio.get_running_loop()
        is_running, may_end, has_ended = asyncio.Event(), threading.Event(), threading.Event()

        def call() -> None:
            loop.call_soon_threadsafe(is_running.set)
            may_end.wait()
            has_ended.set()

        task = asyncio.create_task(call_in(call))
        await is_running.wait()
        for _ in range(2):
            task.cancel()
            await turns(3)
            assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert has_ended.is_set()

    async def test_runs_inside_a_cancelled_scope(self, call_in: CallIn) -> None:
        calls: list[int] = []
        with anyio.CancelScope() as scope:
            scope.cancel()
            await call_in(calls.append, 1)
        assert calls == [1]

    def test_works_in_one_loop_after_another(self, call_in: CallIn) -> None:
        async def text(number: int) -> str:
            return str(await call_in(str, number))

        assert [asyncio.run(text(number)) for number in range(3)] == ["0", "1", "2"]

    def test_works_in_a_forked_child(self, call_in: CallIn) -> None:
        async def text() -> str:
            return str(await call_in(str, 1))

        assert asyncio.run(text()) == "1"
        child_of_ours(lambda: asyncio.run(text()))

    def test_fails_at_once_where_the_interpreter_is_ending(self, call_in: CallIn) -> None:
        program = f"""
import asyncio, threading
from repopool_async._aio import {call_in.__name__} as call_in

async def call_until_that_fails():
    try:
        while True:
            await call_in(str)
    except RuntimeError as error:
        print(error)

threading.Thread(target=asyncio.run, args=[call_until_that_fails()]).start()
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
        assert "shutdown" in done.stdout, done.stderr


class TestInThread:
    async def test_limits_how_many_run_at_once(self) -> None:
        running, most, lock = 0, 0, threading.Lock()
        barrier = threading.Barrier(THREADS)

        def call() -> None:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            barrier.wait(10)
            with lock:
                running -= 1

        await asyncio.gather(*(in_thread(call) for _ in range(THREADS * 2)))
        assert most == THREADS


class TestInOrder:
    async def test_calls_are_made_one_at_a_time_in_the_order_in_which_they_were_asked_for(self) -> None:
        made: list[tuple[int, int]] = []

        await asyncio.gather(*(in_order(_note, made, number) for number in range(100)))

        assert [number for number, _ in made] == list(range(100))
        assert len({thread for _, thread in made}) == 1

    async def test_what_is_asked_for_meanwhile_is_told_at_one_go(self) -> None:
        may_begin = threading.Event()
        ended: list[int] = []
        first = asyncio.create_task(in_order(may_begin.wait))
        await turns(3)
        tasks = [asyncio.create_task(in_order(str, number)) for number in range(3)]
        for number, task in enumerate(tasks):
            task.add_done_callback(functools.partial(_add, ended, number))
        await turns(3)
        may_begin.set()
        await asyncio.wait([*tasks, first], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await turns(3)

        assert ended == [0, 1, 2]

    async def test_a_failure_is_its_callers_alone(self) -> None:
        results = await asyncio.gather(*(in_order(int, text) for text in ("1", "x", "3")), return_exceptions=True)

        assert (results[0], type(results[1]), results[2]) == (1, ValueError, 3)

    async def test_a_cancelled_caller_leaves_the_others_alone(self) -> None:
        may_begin = threading.Event()
        made: list[tuple[int, int]] = []
        first = asyncio.create_task(in_order(may_begin.wait))
        tasks = [asyncio.create_task(in_order(_note, made, number)) for number in range(3)]
        await turns(3)
        tasks[1].cancel()
        await turns(3)
        may_begin.set()
        ends = await asyncio.gather(first, *tasks, return_exceptions=True)

        assert [type(end) for end in ends] == [bool, type(None), asyncio.CancelledError, type(None)]
        assert [number for number, _ in made] == [0, 1, 2], "once asked for, it is done"


def _add(ended: list[int], number: int, _task: object) -> None:
    ended.append(number)


def _note(made: list[tuple[int, int]], number: int) -> None:
    made.append((number, threading.get_ident()))


class TestInTurn:
    async def test_lets_in_one_thread_after_the_other(self) -> None:
        inside: list[int] = []
        most: list[int] = []

        def call(number: int) -> None:
            with in_turn:
                inside.append(number)
                time.sleep(0.001)  # gives the interpreter up, as a system call does
                most.append(len(inside))
                inside.remove(number)

        await asyncio.gather(*(in_thread(call, number) for number in range(THREADS)))
        assert most == [1] * THREADS

    def test_a_forked_child_need_not_wait_for_a_thread_that_it_does_not_have(self) -> None:
        def enter() -> None:
            signal.alarm(10)  # the child would wait for ever
            with in_turn:
                pass

        with in_turn:
            child_of_ours(enter)


class TestTaskSet:
    async def test_names_and_holds_its_tasks(self, operation: Operation) -> None:
        tasks = TaskSet("web")
        task = tasks.spawn(operation.run(), name="cleaner-0")
        assert task.get_name() == "repopool:web:cleaner-0"
        assert repr(tasks) == "<TaskSet web [repopool:web:cleaner-0]>"
        assert len(tasks) == 1
        operation.gate.set()
        assert await task == "result"
        await turns(1)
        assert len(tasks) == 0

    async def test_tells_of_a_failure_at_once(self) -> None:
        told: list[tuple[str, str]] = []
        tasks = TaskSet("web", lambda name, error: told.append((name, repr(error))))

        async def fail() -> None:
            raise ValueError("no")

        tasks.spawn(fail(), name="cleaner")
        assert await tasks.join()
        assert told == [("repopool:web:cleaner", "ValueError('no')")]

    async def test_logs_a_failure_that_nobody_is_told_of(self, caplog: pytest.LogCaptureFixture) -> None:
        async def fail() -> None:
            raise ValueError("no")

        tasks = TaskSet("web")
        with caplog.at_level(logging.ERROR, "repopool"):
            tasks.spawn(fail(), name="cleaner")
            await tasks.join()
        assert "background task repopool:web:cleaner failed" in caplog.text
        assert "ValueError: no" in caplog.text

    async def test_a_cancelled_task_has_not_failed(self, operation: Operation) -> None:
        told: list[str] = []
        tasks = TaskSet("web", lambda name, _error: told.append(name))
        tasks.spawn(operation.run(), name="x")
        await operation.started.wait()
        await tasks.cancel()
        assert told == []
        assert len(tasks) == 0

    async def test_join_waits_for_tasks_spawned_meanwhile_and_cancels_none(self) -> None:
        tasks, done = TaskSet("web"), []

        async def second() -> None:
            await turns(5)
            done.append("second")

        async def first() -> None:
            await turns(5)
            tasks.spawn(second(), name="second")

        tasks.spawn(first(), name="first")
        assert await tasks.join(10)
        assert done == ["second"]

    async def test_join_gives_up_after_its_time(self, operation: Operation) -> None:
        tasks = TaskSet("web")
        task = tasks.spawn(operation.run(), name="x")
        assert not await tasks.join(0.01)
        assert not await tasks.join(0)
        assert not task.done()
        operation.gate.set()
        assert await tasks.join()

    async def test_cancel_waits_for_what_tasks_do_about_it(self) -> None:
        tasks, done, started = TaskSet("web"), [], asyncio.Event()

        async def work() -> None:
            try:
                started.set()
                await asyncio.Event().wait()
            finally:
                await turns(5)
                tasks.spawn(late(), name="late")
                done.append("cleaned")

        async def late() -> None:
            await asyncio.Event().wait()

        tasks.spawn(work(), name="x")
        await started.wait()
        canceller = asyncio.create_task(tasks.cancel())
        await turns(3)
        canceller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await canceller
        assert done == ["cleaned"]
        assert len(tasks) == 0

    async def test_a_task_may_cancel_all_others(self, operation: Operation) -> None:
        tasks = TaskSet("web")
        tasks.spawn(operation.run(), name="other")

        async def end() -> str:
            await tasks.cancel()
            assert await tasks.join()
            return "alive"

        assert await tasks.spawn(end(), name="end") == "alive"

    def test_may_be_made_without_a_loop(self) -> None:
        assert len(TaskSet("web")) == 0


class TestDeadline:
    def test_none_never_expires(self) -> None:
        deadline = Deadline.after(None)
        assert deadline.remaining() is None
        assert not deadline.is_expired

    def test_remaining_falls_to_zero_and_stays(self) -> None:
        assert 9 < (Deadline.after(10).remaining() or 0) <= 10
        assert Deadline.after(-1).remaining() == 0.0
        assert Deadline.after(0).is_expired

    async def test_limit_ends_a_block(self) -> None:
        deadline = Deadline.after(0.01)
        with pytest.raises(TimeoutError):
            async with deadline.limit():
                await asyncio.Event().wait()
        assert deadline.is_expired
        with pytest.raises(TimeoutError):
            async with deadline.limit():
                await asyncio.Event().wait()

    async def test_no_limit_lets_a_block_run(self) -> None:
        async with Deadline.after(None).limit():
            await turns(1)


class TestTogether:
    async def test_waits_for_all(self) -> None:
        done: list[int] = []

        def operation(number: int) -> Callable[[], Coroutine[Any, Any, None]]:
            async def run() -> None:
                await turns(number)
                done.append(number)

            return run

        await together(operation(3), operation(1), operation(2))
        assert sorted(done) == [1, 2, 3]

    async def test_raises_the_first_failure_itself_and_ends_the_others(self, operation: Operation) -> None:
        was_cancelled = asyncio.Event()

        async def fail() -> None:
            await operation.started.wait()
            raise ValueError("no")

        async def other() -> None:
            try:
                await operation.run()
            except asyncio.CancelledError:
                was_cancelled.set()
                raise

        with pytest.raises(ValueError, match="no"):
            await together(fail, other)
        assert was_cancelled.is_set()
