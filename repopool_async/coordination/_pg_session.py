"""That this process is alive, told to the database, and what the database tells it.

A thread with its own event loop and its own connections, so that a blocked event loop costs no lease. It sends one
heartbeat for the whole process. How long the database surely takes us for alive is reckoned from when the last good
beat was *sent*, on a clock that also counts while the machine sleeps. The same thread listens for hand-offs, and proves
from a second connection, time and again, that what is sent does arrive; where it does not, those who wait poll.

What is held by the session is not known here.
"""

import asyncio
import json
import logging
import random
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final

from repopool_async._aio import TaskSet
from repopool_async._clock import boottime
from repopool_async.coordination._pg_errors import translated
from repopool_async.exceptions import CoordinatorUnavailableError, PoolManagerError

_log: Final = logging.getLogger("repopool")

Connection = Any
Connect = Callable[[], Awaitable[Connection]]

PROBE_SECONDS: Final = 30.0
"""How often it is tried out whether notifications arrive."""
_PROBE_WAIT_SECONDS: Final = 2.0
_PROBE: Final = "probe"

_OPEN: Final = """
    INSERT INTO repopool.session (session_id, owner, channel, ttl, expires_at)
    VALUES ($1, $2::jsonb, $3, $4, clock_timestamp() + $4)
"""
_BEAT: Final = "SELECT repopool.beat($1)"


class Session:
    """This process as the database knows it: one session at a time, each with an id that is never used again.

    Args:
        connect: makes the connection for the heartbeat, within the thread. listen: for notifications, None to do
            without. where: the database, for messages.
        owner: what is shown to people who ask who holds what. ttl: seconds without a beat after which others may take
            the process for dead.
        on_event: told `lease.unconfirmed` (the database may take us for dead: nothing new is claimed),
            `lease.confirmed` and `session.lost` (it did: all holds are lost). on_notice: told the payload of a
            notification. Both are called in the thread and must not raise.
    """

    def __init__(
        self,
        connect: Connect,
        listen: Connect | None,
        *,
        where: str,
        owner: Mapping[str, object],
        ttl: float,
        on_event: Callable[[str, dict[str, object]], object],
        on_notice: Callable[[str], object],
    ) -> None:
        self.session_id = uuid.uuid4()
        self.channel: Final = f"repopool_{uuid.uuid4().hex}"
        self.has_push = False
        self._connect = connect
        self._listen = listen
        self._where = where
        self._owner = json.dumps(dict(owner))
        self._ttl = ttl
        self._on_event = on_event
        self._on_notice = on_notice
        self._trusted_until = self._trusted_since = float("-inf")
        self._is_stopping = False
        self._is_told = False
        self._is_known = False
        self._connection: Connection = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._probed: asyncio.Event | None = None
        self._listens: asyncio.Event | None = None
        self._main_task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_trusted(self) -> bool:
        """Whether the database surely takes us for alive."""
        return boottime() < self._trusted_until

    @property
    def is_steady(self) -> bool:
        """Whether that has been so for one whole `ttl`."""
        return self.is_trusted and boottime() - self._trusted_since >= self._ttl

    def require_trust(self) -> None:
        """Refuse what must not be begun by a process that may be taken for dead.

        Raises:
            CoordinatorUnavailableError: it may.
        """
        if not self.is_trusted:
            raise CoordinatorUnavailableError(
                f"nothing new is leased: the database {self._where} has not confirmed for {self._ttl:g} s that it "
                f"takes this process for alive; try again once it answers"
            )

    async def start(self) -> None:
        """Open the session and keep it alive until `stop`.

        Raises:
            CoordinatorUnavailableError, StoreError: the database cannot be used.
        """
        self._ready = asyncio.get_running_loop().create_future()
        self._thread = threading.Thread(target=self._run, name="repopool-heartbeat", daemon=True)
        self._thread.start()
        await self._ready

    def check_now(self) -> None:
        """Beat at once, because there is reason to think that the session has ended; callable from any thread."""
        self._post(lambda: self._wake.set() if self._wake is not None else None)

    def listen(self) -> None:
        """Begin to listen, unless that has been done: a connection that who never waits does not need."""
        if not self.has_push:
            self._post(lambda: self._listens.set() if self._listens is not None else None)

    def stop(self) -> None:
        """End the thread and wait for it, which is not long; the session's row stays."""
        self._is_stopping = True
        self._post(lambda: self._main_task.cancel() if self._main_task is not None else None)
        if self._thread is not None:
            self._thread.join()

    # -- in the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(self._main())

    def _post(self, call: Callable[[], object]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed: the thread has ended
                self._loop.call_soon_threadsafe(call)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._main_task = asyncio.current_task()
        self._wake, self._probed, self._listens = asyncio.Event(), asyncio.Event(), asyncio.Event()
        if self._is_stopping:  # from before there was a loop to be told through
            return
        tasks = TaskSet("heartbeat")
        try:
            await self._open()
            self._tell_ready(None)
            tasks.spawn(self._listen_once_wanted(), name="listen")
            await self._beat_for_ever()
        except PoolManagerError as error:
            self._tell_ready(error)
        finally:
            await tasks.cancel()
            self._drop()

    def _tell_ready(self, failure: BaseException | None) -> None:
        ready = self._ready
        assert ready is not None

        def tell() -> None:
            if not ready.done():
                ready.set_exception(failure) if failure is not None else ready.set_result(None)

        with suppress(RuntimeError):  # whoever waited has ended, loop and all
            ready.get_loop().call_soon_threadsafe(tell)

    async def _open(self) -> None:
        sent = boottime()
        await self._execute(
            "open a session", _OPEN, self.session_id, self._owner, self.channel, timedelta(seconds=self._ttl)
        )
        self._is_known = True
        self._trust(sent)

    async def _beat_for_ever(self) -> None:
        assert self._wake is not None
        while True:
            pause = self._ttl / 3 * random.uniform(0.8, 1.0)  # noqa: S311 - jitter
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
                self._wake.clear()
            except TimeoutError:
                pass
            while not await self._beat():
                await self._pause(min(1.0, self._ttl / 10))

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    async def _beat(self) -> bool:
        """Beat once; return whether that is known to have come to something."""
        sent = boottime()
        try:
            is_alive = await self._execute("confirm that this process is alive", _BEAT, self.session_id)
            if not is_alive:
                await self._begin_anew()
                return True
        except PoolManagerError as error:
            if not self.is_trusted and not self._is_told:
                self._is_told = True
                self._on_event("lease.unconfirmed", {"session_id": str(self.session_id), "error": str(error)})
            return False
        self._trust(sent)
        return True

    def _trust(self, sent: float) -> None:
        if not self.is_trusted:
            self._trusted_since = boottime()
        self._trusted_until = sent + self._ttl * 0.9
        if self._is_told:
            self._is_told = False
            self._on_event("lease.confirmed", {"session_id": str(self.session_id)})

    async def _begin_anew(self) -> None:
        """We were taken for dead, so everything held is lost; go on as somebody new."""
        lost, self.session_id = self.session_id, uuid.uuid4()
        self._trusted_until = float("-inf")
        if self._is_known:
            self._is_known = False
            self._on_event("session.lost", {"session_id": str(lost)})
        await self._open()

    async def _execute(self, what: str, statement: str, *arguments: object) -> Any:
        with translated(self._where, what):
            try:
                async with asyncio.timeout(min(5.0, self._ttl / 3)):
                    if self._connection is None:
                        self._connection = await self._connect()
                    return await self._connection.fetchval(statement, *arguments)
            except BaseException:
                self._drop()
                raise

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    # Listening

    async def _listen_once_wanted(self) -> None:
        assert self._listens is not None
        await self._listens.wait()
        if self._listen is not None:
            await self._listen_for_ever()

    async def _listen_for_ever(self) -> None:
        pause = 1.0
        while True:
            was_proven = False
            try:
                with translated(self._where, "listen"):
                    async for _ in self._proofs():
                        was_proven, self.has_push = True, True
                        pause = 1.0
            except PoolManagerError as error:
                _log.info("notifications do not arrive, so waiting for a slot is polling: %s", error)
            self.has_push = False
            pause = pause if was_proven else min(pause * 2, 60.0)
            await self._pause(pause)

    async def _proofs(self) -> AsyncIterator[None]:
        """Listen, and yield each time that it was proven; ends, or raises, when it no longer works."""
        assert self._listen is not None
        assert self._probed is not None
        async with asyncio.timeout(10):
            connection = await self._listen()
        try:
            async with asyncio.timeout(10):
                await connection.add_listener(self.channel, self._notified)
            while True:
                await self._prove()
                yield
                await asyncio.sleep(PROBE_SECONDS * random.uniform(0.8, 1.0))  # noqa: S311 - jitter
        finally:
            connection.terminate()

    async def _prove(self) -> None:
        """Send something from another connection; from its own, a pooler would deliver it and nothing else."""
        assert self._probed is not None
        self._probed.clear()
        await self._notify_ourselves()
        async with asyncio.timeout(_PROBE_WAIT_SECONDS):
            await self._probed.wait()

    async def _notify_ourselves(self) -> None:
        async with asyncio.timeout(10):
            connection = await self._connect()
            try:
                await connection.fetchval("SELECT pg_notify($1, $2)", self.channel, _PROBE)
            finally:
                connection.terminate()

    def _notified(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        if payload == _PROBE:
            if self._probed is not None:
                self._probed.set()
        else:
            self._on_notice(str(payload))
