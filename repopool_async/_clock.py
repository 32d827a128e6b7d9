"""Clocks: one for durations that survive a suspended machine, one for people.

Nothing that decides who owns a slot looks at wall-clock time: it jumps. Durations and expiries use the boot-time clock,
which also counts while the machine sleeps and means something only together with the boot id (`_identity`).
"""

import time
from datetime import UTC, datetime
from typing import Final

_BOOT_CLOCK: Final[int] = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boottime() -> float:
    """Return seconds since boot, counting suspended time where the platform can tell."""
    return time.clock_gettime(_BOOT_CLOCK)


def boottime_ns() -> int:
    """Return nanoseconds since boot, counting suspended time where the platform can tell."""
    return time.clock_gettime_ns(_BOOT_CLOCK)


def wall_minus_boot_ns() -> int:
    """Return how far the wall clock is ahead of the boot clock, in nanoseconds.

    The difference moves only when somebody sets the wall clock (slewing moves both clocks alike), so comparing two
    readings tells whether file timestamps taken between them can be trusted.
    """
    return time.time_ns() - boottime_ns()


def now() -> datetime:
    """Return the present wall-clock time in UTC, for people and logs only."""
    return datetime.now(UTC)
