"""Turns between processes: one locked file per waiting process, oldest first.

Within a process the pool's queue decides who is next, and only its head competes with other processes. It draws a
ticket: a file named by the boot-time clock, locked for as long as it is held. A kernel lock dies with its process, so a
ticket that nobody locks is dead, and whoever sees it removes it.

Why nobody starves: who claims must be first among the live tickets, and a newcomer who sees any stands back and draws
one. A process that was served draws a younger ticket next time, so ahead of a given ticket there are only the finitely
many that were there before it. A process that is alive but stopped (SIGSTOP, a blocked event loop) would hold up all
others; each ticket therefore carries the time its holder last asked for its turn, and one that was silent for
`SILENCE_SECONDS` is passed over, without losing its place, until its holder asks again.

Tickets only order the attempts. Exclusion is the slot lock's: two that both believe to be first harm nobody.
"""

import itertools
import os
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from repopool_async._aio import in_thread, shielded
from repopool_async._flock import is_flocked, lock_files
from repopool_async.coordination.base import Grant
from repopool_async.exceptions import PoolNotFoundError, StoreError

SILENCE_SECONDS: Final = 2.0
_ABANDONED_SECONDS: Final = 10.0
_NANOSECONDS: Final = 1_000_000_000
_STAMP: Final = struct.Struct("<q")
_counter: Final = itertools.count()

_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class TicketOffice:
    """The tickets of one pool.

    Args:
        pool_directory: must exist. repo_name: for messages. clock: seconds since boot.
    """

    def __init__(self, pool_directory: str, repo_name: str, clock: Callable[[], float]) -> None:
        self._directory = f"{pool_directory}/tickets"
        self._repo_name = repo_name
        self._clock = clock

    def draw(self) -> tuple[str, int]:
        """Make a ticket and return its name and the descriptor that locks it.

        Raises:
            PoolNotFoundError: the pool's directory does not exist. StoreError: it cannot be written to.
        """
        now = self._now()
        name = f"{now:020d}-{os.getpid()}-{next(_counter):x}{os.urandom(4).hex()}"
        with self._translated():
            # Locked first and named second: a ticket that others see unlocked is dead.
            hidden = f"{self._directory}/.{name}"
            descriptor = self._create(hidden)
            try:
                lock_files.lock(descriptor)  # nobody else knows the name, nor would anybody but look at it
                os.pwrite(descriptor, _STAMP.pack(now), 0)
                Path(hidden).rename(f"{self._directory}/{name}")
            except BaseException:
                lock_files.close(descriptor)
                _remove(hidden)
                raise
        return name, descriptor

    def is_first(self, name: str, descriptor: int) -> bool:
        """Return whether a ticket is the oldest of those whose holders are alive and ask."""
        with self._translated():
            os.pwrite(descriptor, _STAMP.pack(self._now()), 0)
            return not any(self._counts(other) for other in self._names() if other < name)

    def give_up(self, name: str, descriptor: int) -> None:
        """Remove a ticket."""
        with self._translated():
            try:
                _remove(f"{self._directory}/{name}")
            finally:
                lock_files.close(descriptor)

    def has_tickets(self) -> bool:
        """Return whether anybody waits."""
        with self._translated():
            return any(self._counts(name) for name in self._names())

    def _now(self) -> int:
        return int(self._clock() * _NANOSECONDS)

    def _create(self, path: str) -> int:
        try:
            return lock_files.open(path, _CREATE)
        except FileNotFoundError:
            Path(self._directory).mkdir(exist_ok=True)
            return lock_files.open(path, _CREATE)

    def _names(self) -> list[str]:
        try:
            names = os.listdir(self._directory)  # noqa: PTH208 - names are wanted
        except FileNotFoundError:
            return []
        for name in names:
            if name.startswith("."):
                self._clear(name)
        return sorted(name for name in names if not name.startswith("."))

    def _counts(self, name: str) -> bool:
        """Return whether a ticket's holder is alive and has asked lately; remove it where the holder is dead."""
        path = f"{self._directory}/{name}"
        if not is_flocked(path):
            _remove(path)
            return False
        asked = _stamp(path)
        return asked is not None and self._now() - asked < SILENCE_SECONDS * _NANOSECONDS

    def _clear(self, name: str) -> None:
        """Remove a ticket whose drawing was interrupted by the death of its process."""
        number = name[1:].partition("-")[0]
        is_old = not number.isdigit() or abs(self._now() - int(number)) > _ABANDONED_SECONDS * _NANOSECONDS
        path = f"{self._directory}/{name}"
        if is_old and not is_flocked(path):
            _remove(path)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise PoolNotFoundError(
                f"{self._repo_name}: there is no such pool; create_pool makes it", repo_name=self._repo_name
            ) from error
        except OSError as error:
            raise StoreError(
                f"{self._repo_name}: cannot use {self._directory}: {error.strerror}; check permissions and free space",
                repo_name=self._repo_name,
            ) from error


class FileTicket:
    """A place in the queue of processes, from entering the context until leaving it.

    Args:
        claim: leases what the ticket is for, where anything is free.
    """

    def __init__(self, office: TicketOffice, claim: Callable[[], Awaitable[Grant | None]] | None = None) -> None:
        self._office = office
        self._claim = claim
        self._drawn: tuple[str, int] | None = None

    async def __aenter__(self) -> Self:
        """Draw the ticket; cancelled, there is none."""
        self._drawn = await shielded(in_thread(self._office.draw), name="draw-ticket", on_abandoned=self._give_up)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        drawn, self._drawn = self._drawn, None
        if drawn is not None:
            await self._give_up(drawn)

    async def is_first(self) -> bool:
        """Do as `Ticket.is_first`; False outside the context."""
        return self._drawn is not None and await in_thread(self._office.is_first, *self._drawn)

    async def claim(self) -> Grant | None:
        """Do as `Ticket.claim`."""
        if self._claim is None:
            raise ValueError("the ticket was drawn for nothing; say what is wanted when drawing it")
        return await self._claim() if await self.is_first() else None

    async def _give_up(self, drawn: tuple[str, int]) -> None:
        await in_thread(self._office.give_up, *drawn)


def _stamp(path: str) -> int | None:
    try:
        descriptor = os.open(path, _READ)
    except FileNotFoundError:
        return None
    try:
        data = os.read(descriptor, _STAMP.size)
    finally:
        os.close(descriptor)
    return _STAMP.unpack(data)[0] if len(data) == _STAMP.size else None


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        Path(path).unlink()
