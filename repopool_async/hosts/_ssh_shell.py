"""Scripts run on a host: calls of the library answered in one execution, commands started, watched and really ended.

A host has one connection for the pool's own work, of whose channels a few are kept free for what must not wait: ending
processes. Commands of lessees run long and may be many; they share further connections. What the scripts mean is not
known here, files and fences are the business of `ssh`.
"""

import asyncio
import contextlib
import errno
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs

from repopool_async._aio import Deadline, TaskSet, shielded, together
from repopool_async._process import GRACE_SECONDS
from repopool_async.exceptions import HostUnreachableError, PlatformNotSupportedError
from repopool_async.hosts._scripts import (
    BOOTSTRAP,
    JOINED_BOOTSTRAP,
    Answer,
    Tools,
    answers,
    command,
    fenced,
    framed,
    inline,
    new_word,
    os_error,
    padded,
    under,
)
from repopool_async.hosts._ssh_connection import Breaker, Connection, SshOptions, Target
from repopool_async.hosts._ssh_joined import Asked, RemoteJoined, piece_of
from repopool_async.hosts._ssh_process import Refusal, Session, Sink
from repopool_async.hosts.base import Guard
from repopool_async.hosts.joined import Joined
from repopool_async.hosts.upkeep import upkeep_of

logger: Final = logging.getLogger("repopool")

_OPERATION_SECONDS: Final = 900.0
"""How long one call of the library may take; deleting a big tree may take minutes."""
_START_SECONDS: Final = 5.0
_END_SECONDS: Final = 15.0
"""For ending a group, beyond its grace period."""
_TICKS_PER_SECOND: Final = 50
_FENCES: Final = frozenset({"fence", "watch"})
_NOT_OURS: Final = 98
_RESERVED_CHANNELS: Final = 2

Call = Callable[[Tools], bytes]


@attrs.frozen
class Launch:
    """A command to be started.

    Attributes:
        make: given a word, returns what the channel executes and the script it reads.
        guard: of a lessee's command. upkeep: of one of the pool's own.
        word: what its script was made with already.
        is_lessees: whether it may run for long and must not be in the way of the pool's own work.
    """

    make: Callable[[str], tuple[str, bytes]]
    guard: Guard | None = None
    upkeep: Guard | None = None
    word: str | None = None
    keeps_stdin: bool = False
    is_lessees: bool = False


class Shell:
    """Runs scripts on one host, for one event loop: that of the first call."""

    def __init__(self, host_id: str, target: Target, options: SshOptions, *, max_connections: int) -> None:
        self._host_id = host_id
        self._target = target
        self._options = options
        self._tasks = TaskSet(f"ssh:{host_id}", on_error=_note_failure)
        self._breaker = Breaker(options.breaker_failures, options.first_pause_seconds)
        self._primary = self._new_connection()
        self._own_work = asyncio.Semaphore(max(1, options.max_channels - _RESERVED_CHANNELS))
        self._further: list[tuple[Connection, list[object]]] = []
        self._lessees_work = asyncio.Semaphore(max_connections * options.max_channels)
        self._tools: tuple[int, Tools] | None = None

    def _new_connection(self) -> Connection:
        return Connection(self._host_id, self._target, self._options, self._breaker, self._tasks)

    @property
    def exec_count(self) -> int:
        """How often something was executed on the host."""
        return sum(connection.exec_count for connection in self._connections())

    def _connections(self) -> list[Connection]:
        return [self._primary, *(connection for connection, _ in self._further)]

    async def close(self) -> None:
        """Close all connections."""
        await self._tasks.join(_END_SECONDS)
        await self._tasks.cancel()
        await together(*[connection.close for connection in self._connections()])

    # -- calls of the library ------------------------------------------------------------------------------------

    async def call(
        self,
        make: Call,
        *sections: str,
        is_repeatable: bool = False,
        is_confidential: bool = False,
        may_end_with: tuple[int, ...] = (0,),
    ) -> Answer:
        """Make one call, together with others where it is a piece of a joined block; else it finishes in any case.

        Args:
            sections: of the library that it needs.
            is_repeatable: whether it may be made once more where nobody knows whether it was.
            is_confidential: whether nobody who lists the host's processes may see it; costs a round trip more.
            may_end_with: with which exit codes it has not failed, so that a joined block goes on.

        Raises:
            HostUnreachableError: says whether it has certainly not begun.
            FencedError: it was upkeep of a slot that was taken over.
        """
        make_question = functools.partial(
            self._question, make, sections, is_confidential=is_confidential, may_end_with=may_end_with
        )
        piece = piece_of(self)
        if piece is not None:
            asked = await make_question()
            return self._admitted(asked, (await piece.ask([asked]))[0])
        return await shielded(self._call(make_question, is_repeatable=is_repeatable), name="ssh-call")

    @property
    def is_joining(self) -> bool:
        """Whether what is asked now is a piece of a joined block."""
        return piece_of(self) is not None

    async def ask(self, text: bytes, *, upkeep: Guard | None, timeout: float | None) -> Answer:
        """Have a command run as a piece of a joined block; raises as `call`."""
        piece = piece_of(self)
        assert piece is not None
        asked = Asked(text, ("starting",), upkeep, is_confidential=True, is_command=True, timeout=timeout)
        return self._admitted(asked, (await piece.ask([asked]))[0])

    def joined(self) -> Joined:
        """See `Host.joined`."""
        return RemoteJoined(self, self._execute_joined)

    async def _call(self, make_question: Callable[[], Coroutine[Any, Any, Asked]], *, is_repeatable: bool) -> Answer:
        asked = await make_question()
        try:
            answers = await self._execute([asked])
        except HostUnreachableError as error:
            if not is_repeatable or error.has_not_started:
                raise
            answers = await self._execute([asked])
        return self._admitted(asked, answers[0])

    async def _question(self, make: Call, sections: tuple[str, ...], **kind: Any) -> Asked:
        text = make(await self._known_tools())
        is_work = _FENCES.isdisjoint(sections)  # what moves a fence must not have to pass it
        return Asked(text, sections, upkeep_of([text]) if is_work else None, **kind)

    def _admitted(self, asked: Asked, answer: Answer) -> Answer:
        if asked.guard is not None and answer.status == _NOT_OURS:
            top = answer.stdout.decode(errors="replace")
            raise fenced(asked.guard.slot_directory, asked.guard.token, top, host_id=self._host_id)
        return answer

    async def tools(self) -> Tools:
        """Return what the host has, asked once per connection."""
        return await shielded(self._known_tools(), name="ssh-probe")

    async def _known_tools(self) -> Tools:
        await self._primary.connected()
        if self._tools is None or self._tools[0] != self._primary.generation:
            answer = (await self._execute([Asked(b"probe", ("probe",))]))[0]
            try:
                found = Tools.parse(answer.stdout)
            except (KeyError, ValueError) as error:
                raise PlatformNotSupportedError(
                    f"host {self._host_id} has no POSIX shell that the pool can use: {answer.stderr[-200:]!r}"
                ) from error
            self._tools = (self._primary.generation, found)
        return self._tools[1]

    async def _execute_joined(self, asked: Sequence[Asked]) -> list[Answer]:
        if any(one.is_command for one in asked):
            return await self._execute(asked)  # which ends them with whoever waits
        return await shielded(self._execute(asked), name="ssh-joined")

    async def _execute(self, asked: Sequence[Asked]) -> list[Answer]:
        """Make calls in order in one execution, up to the first that fails."""
        word = new_word()
        script = self._script(asked, word)
        stdout, stderr = bytearray(), bytearray()
        sinks: dict[int, Sink] = {1: stdout.extend, 2: stderr.extend}
        seconds = _OPERATION_SECONDS + sum(one.timeout or 0 for one in asked)
        deadline = Deadline.after(seconds)
        async with self._executing(asked, word, script, sinks) as session:
            limit = await session.watch(seconds, deadline, None)
            if limit is not None:
                self._tasks.spawn(self._end(session, None), name="end")
                raise OSError(errno.ETIMEDOUT, f"host {self._host_id} did not answer within {limit:g} s")
            if session.is_lost:
                raise self._primary.lost(session.loss)
        found = answers(word, bytes(stdout), bytes(stderr))
        if not found:
            text = bytes(stderr).decode(errors="replace").strip()[-200:]
            raise OSError(errno.EIO, f"host {self._host_id} could not run a script: {text or 'it said nothing'}")
        return found

    def _script(self, asked: Sequence[Asked], word: str) -> bytes:
        sections = {section: None for one in asked for section in one.sections}
        if any(one.guard is not None for one in asked):
            sections["fence"] = None
        return framed(
            [one.text if one.guard is None else under(one.guard, one.text) for one in asked],
            word,
            sections=tuple(sections),
            settings=b"" if self._tools is None else self._tools[1].settings(),
            stops=True,
            may_end_with=[one.may_end_with for one in asked],
        )

    @asynccontextmanager
    async def _executing(
        self, asked: Sequence[Asked], word: str, script: bytes, sinks: Mapping[int, Sink]
    ) -> AsyncIterator[Session]:
        if any(one.is_command for one in asked):
            async with self.started(Launch(lambda _: (JOINED_BOOTSTRAP, script), word=word), sinks) as session:
                yield session
            return
        execute = None if any(one.is_confidential for one in asked) else inline(script)
        bootstrap, sent = (BOOTSTRAP, script) if execute is None else (execute, b"")
        async with self._primary.channel(bootstrap, lambda: Session(word, sent, sinks)) as session:
            yield session

    # -- commands ------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def started(
        self, launch: Launch, sinks: Mapping[int, Sink], readers: Mapping[int, asyncio.StreamReader] | None = None
    ) -> AsyncIterator[Session]:
        """Have a command running while the block runs; afterwards its process group is gone.

        Raises:
            HostUnreachableError, FencedError, OSError: it was not started.
        """
        async with contextlib.AsyncExitStack() as stack:
            connection = await stack.enter_async_context(self._room(launch))
            word = launch.word or new_word()
            execute, script = launch.make(word)

            def make_session() -> Session:
                return Session(
                    word,
                    script,
                    sinks,
                    keeps_stdin=launch.keeps_stdin,
                    readers=readers,
                    on_abandoned=lambda session: self._end(session, launch.guard),
                )

            session = await stack.enter_async_context(connection.channel(execute, make_session))
            stack.push_async_callback(self._finish, session, launch)
            try:
                if not await session.wait_started():
                    raise connection.lost(session.loss)
            except Refusal as refusal:
                raise self._refused(refusal, launch.guard or launch.upkeep) from None
            yield session

    @asynccontextmanager
    async def _room(self, launch: Launch) -> AsyncIterator[Connection]:
        if not launch.is_lessees:
            async with self._own_work:
                yield self._primary
            return
        async with self._lessees_work:
            connection, users = self._with_room()
            user = object()
            users.append(user)
            try:
                yield connection
            finally:
                users.remove(user)

    def _with_room(self) -> tuple[Connection, list[object]]:
        for connection, users in self._further:
            if len(users) < self._options.max_channels:
                return connection, users
        self._further.append((self._new_connection(), []))
        return self._further[-1]

    def _refused(self, refusal: Refusal, guard: Guard | None) -> Exception:
        kind, detail = refusal.args
        if kind == "fenced" and guard is not None:
            return fenced(guard.slot_directory, guard.token, detail, host_id=self._host_id)
        path, _, _ = detail.rpartition(": ")
        return os_error(detail.encode(errors="surrogateescape"), path)

    async def _finish(self, session: Session, launch: Launch) -> None:
        """End what is left of a command.

        One of the pool's own that exited and closed its output is believed to have left nothing; a lessee's is not.
        """
        if session.started.done() and not session.started.cancelled() and session.started.exception() is not None:
            return
        is_over = session.closed.done() and session.exit_code is not None
        if not is_over or launch.guard is not None or launch.is_lessees:
            await shielded(self._end(session, launch.guard), name="ssh-end")

    async def _end(self, session: Session, guard: Guard | None) -> None:
        await asyncio.wait([session.started], timeout=_START_SECONDS)
        if not session.started.done() or session.started.cancelled() or session.started.exception() is not None:
            return
        try:
            async with asyncio.timeout(GRACE_SECONDS + _END_SECONDS):
                await self._end_group(session.started.result(), guard)
        except (TimeoutError, HostUnreachableError, OSError) as error:
            # What runs on behind a dead link is ended by the host's watchdog, or by whoever enters the slot next.
            logger.warning("host %s: a process group may still run: %s", self._host_id, error)

    async def _end_group(self, pid: int, guard: Guard | None) -> None:
        calls = [command("end_group", pid, round(GRACE_SECONDS * _TICKS_PER_SECOND))]
        if guard is not None:
            calls.append(command("rm", "-f", f"{guard.slot_directory}/run/{padded(guard.token)}.{pid}"))
        answer = (await self._execute([Asked(b" && ".join(calls), ("processes",))]))[0]
        if answer.status != 0:
            logger.error("host %s: process group %d could not be ended", self._host_id, pid)

    def lost(self, reason: Exception | None) -> HostUnreachableError:
        """Return the error of a command whose connection broke."""
        return self._primary.lost(reason)

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a process group, in the background."""
        self._tasks.spawn(self._execute([Asked(command("signal_group", number, pid), ("processes",))]), name="signal")


def _note_failure(name: str, failure: BaseException) -> None:
    # That a host cannot be reached is told to whoever waits for it.
    level = logging.DEBUG if isinstance(failure, HostUnreachableError) else logging.ERROR
    logger.log(level, "background task %s failed", name, exc_info=failure)
