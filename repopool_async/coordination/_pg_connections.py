"""Connections to a database, at most so many, kept for whoever needs one next.

The driver's own pool makes a task for every connection given back and a proxy for every call: a third of what a claim
costs this process. When a connection is no good any more its user says; who may take how long is not known here.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

from repopool_async._clock import boottime

Connection = Any
"""An asyncpg connection; asyncpg comes without types."""

_IDLE_SECONDS: Final = 300.0
"""After which a connection that nobody needed is ended."""


class Connections:
    """Connections that are made when they are needed, the most recently used first.

    Args:
        connect: makes one. limit: how many there are at once.
    """

    def __init__(self, connect: Callable[[], Awaitable[Connection]], *, limit: int) -> None:
        self._connect = connect
        self._room = asyncio.Semaphore(limit)
        self._idle: deque[tuple[Connection, float]] = deque()
        self._taken: set[Connection] = set()
        self._is_closed = False

    async def take(self) -> Connection:
        """Return a connection, to be given to `put` whatever becomes of it; cancelled, none has been taken.

        Raises:
            ConnectionError: they were ended. Otherwise whatever connecting raises.
        """
        await self._room.acquire()
        try:
            self._require_open()
            connection = self._idle_one() or await self._connect()
        except BaseException:
            self._room.release()
            raise
        self._taken.add(connection)
        return connection

    def put(self, connection: Connection) -> None:
        """Take a connection back; one that is closed is forgotten."""
        self._taken.discard(connection)
        if not connection.is_closed():
            self._idle.append((connection, boottime()))
        self._room.release()
        while self._idle and self._idle[0][1] < boottime() - _IDLE_SECONDS:
            self._idle.popleft()[0].terminate()

    def terminate(self) -> None:
        """End all connections at once, those that are in use too, and make no more."""
        self._is_closed = True
        while self._idle:
            self._idle.pop()[0].terminate()
        for connection in self._taken:
            connection.terminate()

    def _require_open(self) -> None:
        if self._is_closed:
            raise ConnectionError("this process has closed its connections")

    def _idle_one(self) -> Connection | None:
        while self._idle:
            connection, _ = self._idle.pop()
            if not connection.is_closed():
                return connection
        return None
