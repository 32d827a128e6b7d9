"""Under which lease the pool's own work on a slot is done, for hosts that hear of it over a network.

A manager that was paused, or cut off, goes on with a cleaning that another manager has long taken over. So what it
sends to the slot's host while `upkeep` lasts is registered there as a lessee's commands are: it is refused where a
higher token has come, and ended by whoever brings one. On this machine, where nobody takes a slot's kernel lock from a
process that is only paused, but a database's session may expire, it is only refused: what runs is our own thread, or a
git that whoever takes the slot over finds by its mark.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from repopool_async.hosts._scripts import quote
from repopool_async.hosts.base import Guard

_present: Final[ContextVar[Guard | None]] = ContextVar("repopool-upkeep", default=None)


@contextmanager
def upkeep(guard: Guard) -> Iterator[None]:
    """Do what names the slot's directory, in this block and in tasks that it starts, under the guard."""
    token = _present.set(guard)
    try:
        yield
    finally:
        _present.reset(token)


def upkeep_of(texts: Iterable[str | bytes]) -> Guard | None:
    """Return under which guard is done what these words say, quoted or not; None where it is not the slot's."""
    guard = _present.get()
    if guard is None:
        return None
    directory = os.fsencode(guard.slot_directory)
    names = {directory, quote(directory)[1:-1]}
    return guard if any(name in os.fsencode(text) for text in texts for name in names) else None
