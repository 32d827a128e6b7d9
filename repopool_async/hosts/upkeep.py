"""Under which lease the pool's own work on a slot is done, for hosts that hear of it over a network.

A manager that was paused, or cut off, goes on with a cleaning that another manager has long taken over. So what it
sends to the slot's host while `upkeep` lasts is registered there as a lessee's commands are: it is refused where a
higher token has come, and ended by whoever brings one. A host that is this machine ignores it: there the slot's lock is
the kernel's, and nobody takes it from a process that is only paused.
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
