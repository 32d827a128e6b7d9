"""Pieces of work on a host reached over SSH, of which the next calls are made together, in one execution.

Every piece runs in a task of its own, one after another, up to the call that it waits for. Then all these calls become
one script, which ends at the first that fails; what was not reached is asked again once that piece has seen its
failure, if it goes on. Scripts are the business of `_ssh_shell`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import ContextVar
from typing import Any, Final, Self

import attrs

from repopool_async._aio import TaskSet
from repopool_async.hosts._scripts import Answer
from repopool_async.hosts.base import Guard
from repopool_async.hosts.joined import Joined

_present: Final[ContextVar["_Piece | None"]] = ContextVar("repopool-joined-piece", default=None)


@attrs.frozen
class Asked:
    """A call that a script makes.

    Attributes:
        text: the call. sections: of the library that it needs.
        guard: under which it is upkeep of a slot; None for what is not.
        is_confidential: whether nobody who lists the host's processes may see it.
        is_command: whether it runs a command, which is ended with whoever waits for it.
        may_end_with: with which exit codes it has not failed.
        timeout: seconds that it adds to what any call may take.
    """

    text: bytes
    sections: tuple[str, ...] = ()
    guard: Guard | None = None
    is_confidential: bool = False
    is_command: bool = False
    may_end_with: tuple[int, ...] = (0,)
    timeout: float | None = None


Execute = Callable[[Sequence[Asked]], Awaitable[list[Answer]]]
"""Makes calls in order in one execution, up to the first that fails, and returns the answers of those it made."""


def piece_of(owner: object) -> "_Piece | None":
    """Return the piece that the present task is part of, where its block is one of this owner's; None elsewhere."""
    piece = _present.get()
    return piece if piece is not None and piece.owner is owner and not piece.is_done else None


class RemoteJoined(Joined):
    """See `Joined`; within a piece of another block of the same owner it becomes part of that.

    Args:
        owner: whose calls are joined. execute: makes them.
    """

    def __init__(self, owner: object, execute: Execute) -> None:
        super().__init__()
        self._owner = owner
        self._execute = execute
        self._tasks = TaskSet("joined", on_error=_leave_to_the_block)

    async def __aenter__(self) -> Self:
        outer = piece_of(self._owner)
        if outer is not None:
            self._execute = outer.ask
        return self

    async def _finish(self) -> None:
        pieces = [_Piece(self._owner, self._tasks, work, outcome) for work, outcome in self._work]
        try:
            await self._do(pieces)
        finally:
            for piece in pieces:
                piece.give_up()
            await self._tasks.cancel()

    async def _do(self, pieces: Sequence["_Piece"]) -> None:
        while left := [piece for piece in pieces if not piece.is_settled]:
            asking: list[_Piece] = []
            for piece in left:
                await piece.proceed()
                if not piece.is_over:
                    asking.append(piece)
                elif asking and piece.has_failed:
                    break  # what comes before it is done first
                else:
                    piece.settle()
            await self._answer(asking)

    async def _answer(self, asking: Sequence["_Piece"]) -> None:
        questions = [(piece, question) for piece in asking for question in piece.questions]
        if not questions:
            return
        answers = await self._execute([one for _, question in questions for one in question.asked])
        reached: list[_Piece] = []
        for piece, question in questions:
            given, answers = answers[: len(question.asked)], answers[len(question.asked) :]
            if given:
                question.give(given)
                reached.append(piece)
        for piece in reached:
            piece.is_overtaken = piece is not reached[-1]


@attrs.frozen(eq=False)
class _Question:
    asked: tuple[Asked, ...]
    waiting: "list[_Question]"
    answered: asyncio.Future[list[Answer]]

    def give(self, answers: list[Answer]) -> None:
        self.waiting.remove(self)
        if not self.answered.done():
            self.answered.set_result(answers)


class _Piece:
    """One piece of work in its task, and what it waits to be told."""

    def __init__(
        self, owner: object, tasks: TaskSet, work: Coroutine[Any, Any, Any], outcome: asyncio.Future[Any]
    ) -> None:
        self.owner = owner
        self.is_overtaken = False  # what others asked has been done after its turn
        self.questions: list[_Question] = []
        self._tasks = tasks
        self._work = work
        self._outcome = outcome
        self._task: asyncio.Task[Any] | None = None
        self._changed = asyncio.Event()
        self._is_given_up = False

    @property
    def is_done(self) -> bool:
        """Whether it does nothing any more."""
        return self._task is not None and self._task.done()

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left, not even a question of a task that it has started."""
        return self.is_done and not self.questions

    async def proceed(self) -> None:
        """Have it go on until it asks, or is done."""
        if self._task is None:
            self._task = self._tasks.spawn(self._run(), name="piece")
            self._task.add_done_callback(lambda _: self._changed.set())
        while not self.questions and not self.is_done:
            self._changed.clear()
            await self._changed.wait()

    @property
    def has_failed(self) -> bool:
        """Whether it is done, and raised something."""
        return self._task is not None and self._task.done() and (self._task.cancelled() or bool(self._task.exception()))

    @property
    def is_settled(self) -> bool:
        """Whether its outcome has been told."""
        return self._outcome.done()

    def settle(self) -> None:
        """Tell its outcome; raises what it raised."""
        assert self._task is not None
        self._outcome.set_result(self._task.result())

    def give_up(self) -> None:
        """Answer nothing any more: what asks from behind a shield would wait for ever."""
        self._is_given_up = True
        for question in self.questions:
            question.answered.cancel()

    async def ask(self, asked: Sequence[Asked]) -> list[Answer]:
        """Have calls made together with those of the other pieces; returns the answers of those that were reached.

        Raises:
            asyncio.CancelledError: the block has ended before.
        """
        if self._is_given_up:
            raise asyncio.CancelledError
        if self.is_overtaken:
            raise RuntimeError("a piece of a joined block asks again after others had their turn")
        question = _Question(tuple(asked), self.questions, asyncio.get_running_loop().create_future())
        self.questions.append(question)
        self._changed.set()
        try:
            return await question.answered
        finally:
            if question in self.questions:  # whoever asked was cancelled
                self.questions.remove(question)

    async def _run(self) -> Any:
        _present.set(self)
        return await self._work


def _leave_to_the_block(name: str, failure: BaseException) -> None:
    """Say nothing: what a piece raises leaves the block."""
