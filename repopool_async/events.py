"""What happened and who is told: one bus per manager, any number of listeners, none of which can hold up the pool.

Lower floors report through a callback they are given and do not import this. Every event is also one log line of the
logger `repopool`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final

import attrs

from repopool_async._clock import now

_log: Final = logging.getLogger("repopool")

_WARNINGS: Final = (
    "slot.quarantined",
    "lease.long",
    "slot.cleanup_failed",
    "slot.bystanders",
    "lease.lost",
    "store.corrupt",
    "pool.failed",
    "slot.salvage_failed",
    "config.refused",
    "lease.expired",
    "lease.deadlock",
    "lease.unconfirmed",
    "session.lost",
    "host.refused",
    "host.unfit",
    "pool.over_disk_limit",
    "pool.short",
    "host.parked",
    "slot.files_left",
)
_NOTICES: Final = (
    "config.applied",
    "pool.drained",
    "janitor.swept",
    "slot.repairing",
    "slot.removed",
    "slot.added",
    "host.resumed",
)
_BACKLOG: Final = 1000


@attrs.frozen
class Event:
    """Something that happened.

    Attributes:
        kind: dotted, such as `slot.allocated`. at: for people. fields: what it is about (`repo_name`, `slot_id`, …).
    """

    kind: str
    at: datetime
    fields: Mapping[str, Any]


class EventBus:
    """Hands events to listeners; a listener that falls 1,000 events behind loses the oldest."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[Event | None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    def open(self) -> None:
        """Bind to the running event loop, so that worker threads may emit."""
        self._loop = asyncio.get_running_loop()

    def emit(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Tell everybody who listens; callable from any thread, never blocks."""
        event = Event(kind=kind, at=now(), fields=dict(fields))
        _log.log(_level_of(kind), "%s %s", kind, event.fields)
        if not self._queues or self._loop is None or self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._hand_out, event)

    async def listen(self) -> AsyncIterator[Event]:
        """Yield events from now on until the bus is closed; cancelling the iteration ends it."""
        with self._listening() as queue:
            while (event := await queue.get()) is not None:
                yield event

    def close(self) -> None:
        """End every listener's iteration once it has seen what was emitted before."""
        self._is_closed = True
        for queue in self._queues:
            _put(queue, None)

    @contextmanager
    def _listening(self) -> Iterator[asyncio.Queue[Event | None]]:
        queue: asyncio.Queue[Event | None] = asyncio.Queue(_BACKLOG)
        self._queues.add(queue)
        if self._is_closed:
            _put(queue, None)
        try:
            yield queue
        finally:
            self._queues.discard(queue)

    def _hand_out(self, event: Event) -> None:
        for queue in self._queues:
            _put(queue, event)


def _level_of(kind: str) -> int:
    if kind in _WARNINGS:
        return logging.WARNING
    return logging.INFO if kind in _NOTICES else logging.DEBUG


def _put(queue: asyncio.Queue[Event | None], event: Event | None) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(event)
