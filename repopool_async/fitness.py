"""Whether a host can run a pool's lessees as the user that they are to be: asked when it is first needed, then known.

It is asked again where the host was out of use or started anew meanwhile (it may be another machine by now), and, of a
host that could not, after a minute. What it takes is `run_as`'s business; what becomes of slots on a host that cannot
is that of those who would use them.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from repopool_async._clock import boottime
from repopool_async.exceptions import ConfigError
from repopool_async.run_as import RunAs

_REFUSED_SECONDS: Final = 60.0
"""After which a host that could not is asked again."""


class Fitness:
    """What is known of one pool on one host.

    Args:
        absences: returns how often the host was out of use so far.
        on_refused: is told why the host cannot be used, once in each time.
    """

    def __init__(self, run_as: RunAs, absences: Callable[[], int], on_refused: Callable[[ConfigError], object]) -> None:
        self._run_as = run_as
        self._absences = absences
        self._on_refused = on_refused
        self._seen: tuple[int, str] | None = None
        self._refused: tuple[ConfigError, float] | None = None
        self._turn = asyncio.Lock()

    @property
    def refusal(self) -> ConfigError | None:
        """Why the host is not to be used for the pool; None where it is, or where that is to be asked (again)."""
        if self._refused is None or self._seen is None or self._seen[0] != self._absences():
            return None
        error, at = self._refused
        return error if boottime() < at + _REFUSED_SECONDS else None

    async def require(self, *, is_asked: bool = False) -> None:
        """See that the host can be used, unless that is known.

        Args:
            is_asked: ask it now, if it could not a moment ago.

        Raises:
            ConfigError: it cannot. HostUnreachableError: it does not answer. OSError: it cannot say.
        """
        async with self._turn:
            refusal = self.refusal
            if refusal is not None and not is_asked:
                raise refusal.with_traceback(None)
            present = self._absences(), await self._run_as.boot_id()
            if self._refused is not None or self._seen != present:
                await self._ask(present)

    async def _ask(self, present: tuple[int, str]) -> None:
        try:
            await self._run_as.establish()
        except ConfigError as error:
            is_news = self._refused is None or str(self._refused[0]) != str(error)
            self._refused, self._seen = (error, boottime()), present
            if is_news:
                self._on_refused(error)
            raise
        self._refused, self._seen = None, present
