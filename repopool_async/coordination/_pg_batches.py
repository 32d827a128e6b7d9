"""Calls of one kind that are executed as one statement, as many as were asked for while earlier ones are under way.

A statement costs the server and this process more than what it does to a row, and one that waits for the disk waits as
long for many rows. Who asks while nothing is under way does not wait. What the statements mean is not known here.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

import attrs

AT_ONCE: Final = 2
"""How many statements of one kind are under way: one may wait for the disk while the server works at another."""
MOST: Final = 64
"""How many calls are one statement at most."""


def by_place(rows: Sequence[Any]) -> Mapping[int, Any]:
    """Return rows that tell in their column `place`, counted from 1, which call they answer."""
    return {row["place"] - 1: row for row in rows}


@attrs.frozen
class Batched:
    """A statement that takes an array for each of a call's arguments.

    Attributes:
        answers: makes of its rows the first row of each call's answer, by the call's place; what is missing has none.
    """

    statement: str
    answers: Callable[[Sequence[Any]], Mapping[int, Any]] = by_place


@attrs.frozen(eq=False)
class _Call:
    arguments: tuple[object, ...]
    asked_at: float
    answer: "asyncio.Future[Any]"


Execute = Callable[[str, tuple[object, ...], float], Awaitable[Sequence[Any]]]
"""Executes a statement with its arguments until some moment of the loop's clock, and returns the rows."""


class Batches:
    """The calls of one batched statement.

    Args:
        execute: may raise anything. is_refusal: whether what it raised says that nothing was done; then calls that were
            executed together are executed one by one, so that none fails for another's sake. start: runs a task.
    """

    def __init__(
        self,
        batched: Batched,
        execute: Execute,
        *,
        is_refusal: Callable[[BaseException], bool],
        start: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"],
    ) -> None:
        self._batched = batched
        self._execute = execute
        self._is_refusal = is_refusal
        self._start = start
        self._waiting: deque[_Call] = deque()
        self._num_workers = 0

    def put(self, arguments: tuple[object, ...]) -> "asyncio.Future[Any]":
        """Ask, and return what will be the first row of the answer, None where there is none.

        The future is never to be cancelled by whoever waits for it, but given to `withdraw`. It ends as `execute` does,
        and is cancelled where that was.
        """
        loop = asyncio.get_running_loop()
        call = _Call(arguments, loop.time(), loop.create_future())
        call.answer.add_done_callback(_retrieve)
        self._waiting.append(call)
        self._start_worker()
        return call.answer

    def withdraw(self, answer: "asyncio.Future[Any]") -> bool:
        """Ask no more, if nothing has been sent yet; return whether that was so."""
        for call in self._waiting:
            if call.answer is answer:
                self._waiting.remove(call)
                return True
        return False

    def _start_worker(self) -> None:
        if self._waiting and self._num_workers < AT_ONCE:
            self._num_workers += 1
            self._start(self._work()).add_done_callback(self._worker_ended)

    def _worker_ended(self, worker: "asyncio.Task[None]") -> None:
        self._num_workers -= 1
        if worker.cancelled():
            while self._waiting:
                self._waiting.popleft().answer.cancel()
        self._start_worker()

    async def _work(self) -> None:
        while self._waiting:
            await self._do([self._waiting.popleft() for _ in range(min(len(self._waiting), MOST))])

    async def _do(self, calls: list[_Call]) -> None:
        try:
            await self._do_together(calls)
        finally:
            for call in calls:
                call.answer.cancel()  # which has no effect on those that have ended

    async def _do_together(self, calls: list[_Call]) -> None:
        columns = tuple(list(column) for column in zip(*(call.arguments for call in calls), strict=True))
        try:
            rows = await self._execute(self._batched.statement, columns, calls[0].asked_at)
        except Exception as error:  # noqa: BLE001 - raised where it was asked for
            if len(calls) > 1 and self._is_refusal(error):
                for call in calls:
                    await self._do_together([call])
                return
            for call in calls:
                call.answer.set_exception(error)
        else:
            answers = self._batched.answers(rows)
            for place, call in enumerate(calls):
                call.answer.set_result(answers.get(place))


def _retrieve(answer: "asyncio.Future[Any]") -> None:
    """Know of a failure also where whoever asked has gone."""
    if not answer.cancelled():
        answer.exception()
