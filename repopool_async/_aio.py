"""What asyncio lacks: operations that finish whatever cancels them, blocking work off the loop, kept tasks, deadlines.

The one place where tasks are made and where cancellation is held back. Everything held back must be bounded by itself:
a shield around something endless is a program that cannot be stopped. Nothing here knows of processes, files or slots.
"""

import asyncio
import contextvars
import functools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Final, Self, TypeVar, TypeVarTuple

import anyio
import attrs

logger: Final = logging.getLogger("repopool")

THREADS: Final = 16
"""How many blocking calls of one event loop run at once; more wait in order."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

ErrorCallback = Callable[[str, BaseException], None]

_executors: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ThreadPoolExecutor]] = (
    weakref.WeakKeyDictionary()
)
_lanes: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, "_Lane"]] = weakref.WeakKeyDictionary()
_AT_ONE_GO: Final = 16
"""How many calls `in_order` does before it tells how any of them ended."""


async def shielded(
    operation: Coroutine[Any, Any, T],
    *,
    name: str,
    on_abandoned: Callable[[T], Awaitable[object]] | None = None,
) -> T:
    """Run a bounded operation to its end, however often the caller is cancelled meanwhile, natively or through anyio.

    The operation is a task of its own with a copy of the caller's context, so no cancellation of the caller reaches it.
    Only an event loop that shuts down cancels it directly.

    Args:
        operation: what must finish.
        name: of the task, after `repopool:`.
        on_abandoned: given the result of a successful operation whose caller was cancelled and so will never see it;
            runs under the same shield. Its failure is logged.

    Returns:
        The operation's result.

    Raises:
        asyncio.CancelledError: the caller was cancelled; the operation has finished all the same. A failure of it is
            the error's cause and a note.
        BaseException: what the operation raised, where the caller was not cancelled.
    """
    task = _start(operation, name)
    # Without the scope anyio would cancel again at every turn of the loop for as long as the operation takes.
    with anyio.CancelScope(shield=True):
        cancellation = await _outlast(task)
        if cancellation is not None and on_abandoned is not None and _has_succeeded(task):
            abandonment = _start(_abandon(on_abandoned, task.result(), name), f"{name}:abandoned")
            await _outlast(abandonment)
    return _outcome(task, cancellation, name)


async def in_thread(func: Callable[[*Ts], T], *args: *Ts) -> T:
    """Call a blocking function in a worker thread; once called upon, it always runs, and finishes before this returns.

    Args:
        func: sees a copy of the caller's context. args: its arguments.

    Raises:
        asyncio.CancelledError: the caller was cancelled; the function has finished all the same. A failure of it is
            the error's cause and a note.
        BaseException: what the function raised, where the caller was not cancelled.
    """
    # A plain executor and no task: 0.10 ms a call where anyio.to_thread inside shielded() takes 0.15 ms.
    loop = asyncio.get_running_loop()
    return await _end_of(loop.run_in_executor(_executor(loop), _in_context(func, *args)), func)


async def in_order(func: Callable[[*Ts], T], *args: *Ts) -> T:
    """Do as `in_thread`, in the one thread that does all of these, in the order of the calls.

    For what is over in well under a millisecond and never waits for anybody: many threads that make short system calls
    get in each other's way more than they help (`in_turn` says why). To wake the thread and then the loop costs more
    than such a call, so what is asked for while it works is done at one go, and told at one go.
    """
    loop = asyncio.get_running_loop()
    if loop not in _lanes:
        _lanes[loop] = _Lane()
    lane = _lanes[loop]
    return await _end_of(lane.put(_in_context(func, *args)), func)


def _in_context(func: Callable[[*Ts], T], *args: *Ts) -> Callable[[], T]:
    return functools.partial(contextvars.copy_context().run, func, *args)


async def _end_of(future: asyncio.Future[T], func: Callable[..., T]) -> T:
    with anyio.CancelScope(shield=True):
        cancellation = await _outlast(future)
    return _outcome(future, cancellation, getattr(func, "__qualname__", "call"))


_End = tuple[Any, BaseException | None]
"""What a call returned, or what it raised."""


class _Lane:
    """Calls that one thread does in order; of one event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="repopool-order")
        self._waiting: deque[tuple[asyncio.Future[Any], Callable[[], Any]]] = deque()
        self._is_busy = False

    def put(self, call: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting.append((future, call))
        if not self._is_busy:
            self._go_on(loop)
        return future

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        now = [self._waiting.popleft() for _ in range(min(len(self._waiting), _AT_ONE_GO))]
        self._is_busy = bool(now)
        if not now:
            return
        futures, calls = [future for future, _ in now], [call for _, call in now]
        try:
            done = loop.run_in_executor(self._thread, _ends, calls)
        except RuntimeError as error:  # the interpreter is ending, and starts nothing in threads any more
            self._tell(loop, futures, [(None, error)] * len(now))
        else:
            done.add_done_callback(lambda done: self._tell(loop, futures, done.result()))

    def _tell(self, loop: asyncio.AbstractEventLoop, futures: list[asyncio.Future[Any]], ends: list[_End]) -> None:
        for future, (result, error) in zip(futures, ends, strict=True):
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        self._go_on(loop)


def _ends(calls: list[Callable[[], Any]]) -> list[_End]:
    return [_end(call) for call in calls]


def _end(call: Callable[[], Any]) -> _End:
    try:
        return call(), None
    except BaseException as error:  # noqa: BLE001 - raised where it was asked for
        return None, error


class _Turns:
    """Lets in one thread after the other; of a forked child, which has but one, none is still in."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _renew(self) -> None:
        self._lock = threading.Lock()


in_turn: Final = _Turns()
"""For work that is thousands of system calls of microseconds each, done in a thread: `with in_turn:`.

Each call gives up the interpreter and then wants it back. Two such threads hand it to each other at every call: sixteen
trees were cleaned with 40,000 switches of threads instead of 10,000, and in one and a half times the time. Nothing that
waits for anybody else may be done within.
"""


def _executor(loop: asyncio.AbstractEventLoop) -> ThreadPoolExecutor:
    """Return the loop's own threads: shared ones would be dead in a forked child. They end with the loop."""
    if loop not in _executors:
        _executors[loop] = ThreadPoolExecutor(THREADS, thread_name_prefix="repopool")
    return _executors[loop]


def _start(operation: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    return asyncio.create_task(operation, name=f"repopool:{name}")


async def _outlast(future: asyncio.Future[T]) -> asyncio.CancelledError | None:
    """Wait until the future is done and return the first cancellation that arrived meanwhile."""
    cancellation = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancellation = cancellation or error
    return cancellation


def _has_succeeded(future: asyncio.Future[T]) -> bool:
    return not future.cancelled() and future.exception() is None


def _outcome(future: asyncio.Future[T], cancellation: asyncio.CancelledError | None, name: str) -> T:
    if cancellation is None:
        return future.result()
    failure = None if future.cancelled() else future.exception()
    try:
        if failure is None:
            raise cancellation
        cancellation.add_note(f"{name} failed meanwhile: {failure!r}")
        raise cancellation from failure
    finally:
        del cancellation, failure  # the traceback holds this frame


async def _abandon(on_abandoned: Callable[[T], Awaitable[object]], result: T, name: str) -> None:
    try:
        await on_abandoned(result)
    except Exception:
        logger.exception("giving back the result of %s failed", name)


class TaskSet:
    """Background tasks that are kept alive, named, and whose failures are told at once.

    A task that ends by cancellation has not failed. The set may be made without a running loop.
    """

    def __init__(self, name: str, on_error: ErrorCallback | None = None) -> None:
        """Make an empty set.

        Args:
            name: the first part of the tasks' names. on_error: told the task's name and what it raised; logs when
                missing. It is called on the loop and must not raise.
        """
        self.name = name
        self._on_error = on_error or _log_failure
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"<TaskSet {self.name} [{', '.join(sorted(task.get_name() for task in self._tasks))}]>"

    def spawn(self, operation: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Start a task named `repopool:<set>:<name>`; the set holds it until it is done."""
        task = _start(operation, f"{self.name}:{name}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def join(self, timeout: float | None = None) -> bool:
        """Wait until no task is left, those spawned meanwhile included, or for so many seconds; cancels nothing.

        Returns:
            Whether the set is empty now (apart from the calling task).
        """
        deadline = Deadline.after(timeout)
        while tasks := self._others(asyncio.current_task()):
            if deadline.is_expired:
                return False
            await asyncio.wait(tasks, timeout=deadline.remaining())
        return True

    async def cancel(self) -> None:
        """Cancel every task but the calling one and wait until they are gone, even where the caller is cancelled."""
        await shielded(self._end(asyncio.current_task()), name=f"{self.name}:cancel")

    async def _end(self, caller: asyncio.Task[Any] | None) -> None:
        while tasks := self._others(caller):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _others(self, caller: asyncio.Task[Any] | None) -> set[asyncio.Task[Any]]:
        # A done task leaves the set one turn of the loop later, through its callback.
        return {task for task in self._tasks if task is not caller and not task.done()}

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        failure = task.exception()
        if failure is not None:
            self._on_error(task.get_name(), failure)


def _log_failure(name: str, failure: BaseException) -> None:
    logger.error("background task %s failed", name, exc_info=failure)


@attrs.frozen
class Deadline:
    """A moment until which something may take, or None for any time; on the clock of the event loops.

    Attributes:
        expires_at: in seconds of `time.monotonic`.
    """

    expires_at: float | None

    @classmethod
    def after(cls, seconds: float | None) -> Self:
        """Return the deadline so many seconds from now; None never expires."""
        return cls(None if seconds is None else time.monotonic() + seconds)

    @property
    def is_expired(self) -> bool:
        """Whether no time remains."""
        return self.expires_at is not None and time.monotonic() >= self.expires_at

    def remaining(self) -> float | None:
        """Return the seconds left, never negative; None for any."""
        return None if self.expires_at is None else max(0.0, self.expires_at - time.monotonic())

    def limit(self) -> asyncio.Timeout:
        """Return a context manager that raises `TimeoutError` from its block once the deadline has passed.

        An expired deadline still lets the block run up to its first suspension.
        """
        return asyncio.timeout(self.remaining())


class Interruptions:
    """Blocks of code in callers' tasks that can be ended from outside, with an error instead of a cancellation."""

    def __init__(self) -> None:
        self._limits: set[asyncio.Timeout] = set()
        self._interrupted: set[asyncio.Timeout] = set()
        self._gone = asyncio.Event()

    def __len__(self) -> int:
        return len(self._limits)

    @asynccontextmanager
    async def allowed(self, seconds: float | None, error: BaseException) -> AsyncIterator[None]:
        """Let the block be interrupted.

        Args:
            seconds: after which the block ends with `TimeoutError`. error: raised from a block that was interrupted.
        """
        is_interrupted: list[bool] = []
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
                    is_interrupted.append(limit in self._interrupted)
                    self._interrupted.discard(limit)
                    self._gone.set()
        except TimeoutError:
            if limit.expired() and is_interrupted == [True]:
                raise error from None
            raise

    def begin(self) -> None:
        """Interrupt every block; returns before they have ended."""
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if not limit.expired():
                self._interrupted.add(limit)
                limit.reschedule(now)

    async def interrupt(self) -> None:
        """Interrupt every block and wait until they have ended; called from within one, it is interrupted itself."""
        self.begin()
        while self._limits:
            self._gone.clear()
            await self._gone.wait()


async def together(*operations: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Run operations side by side in an anyio task group, and wait for all.

    Raises:
        the first failure itself, not a group; the others have been cancelled and awaited.
    """
    try:
        async with anyio.create_task_group() as group:
            for operation in operations:
                group.start_soon(operation)
    except BaseExceptionGroup as failures:
        raise _first_failure(failures) from None


def _first_failure(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    first = failures.exceptions[0]
    return _first_failure(first) if isinstance(first, BaseExceptionGroup) else first
