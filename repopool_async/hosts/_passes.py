"""Going through all processes of this machine, once for all who ask meanwhile.

Every return of a slot asks who still runs or holds something, and what is read for that is the same for all: many slots
that are cleaned at once would otherwise read the whole of /proc for each. What is looked for, and what is done about
those found, is not decided here.
"""

import asyncio
import os
from collections.abc import Sequence
from typing import Final

from repopool_async._aio import in_thread, in_turn
from repopool_async.hosts._bystanders import Bystanders, BystanderSearch
from repopool_async.hosts._marked import Marked, MarkSearch
from repopool_async.hosts._proc import batches_of_pids
from repopool_async.hosts._search import Search

_BATCHES: Final = 3
"""How often those started meanwhile are looked at, too, as bystanders: that takes longer than starting some."""


class Passes:
    """The passes of one event loop, one after the other.

    A pass answers every search that was made before it began. One that had begun before a search was made is of no use
    to it: whoever came by something since may have been looked at already.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._waiting: list[Search] = []

    async def answer(self, search: Search) -> None:
        """Have a search answered. Cancelled, it is not; others that wait for the same pass are not concerned.

        Raises:
            Exception: it could not be answered.
        """
        self._waiting.append(search)
        try:
            async with self._turn:
                if not search.is_over:
                    await self._pass()
        finally:
            self._waiting.remove(search)
        if search.failure is not None:
            raise search.failure

    async def _pass(self) -> None:
        taken: list[Search] = []
        try:
            await in_thread(self._answer_all, taken)
        finally:
            for search in taken:
                if search.is_left or not search.is_over:
                    search.clear()

    def _answer_all(self, taken: list[Search]) -> None:
        with in_turn:  # which may have taken a while: whoever asked in the meantime is in time for this one
            taken += [search for search in tuple(self._waiting) if not search.is_over]
            _go_through(taken)
        for search in taken:
            search.is_over = True


def _go_through(searches: Sequence[Search]) -> None:
    mark_searches = [search for search in searches if isinstance(search, MarkSearch)]
    bystander_searches = [search for search in searches if isinstance(search, BystanderSearch)]
    marked, bystanders, own_pid = Marked(mark_searches), Bystanders(bystander_searches), os.getpid()
    for number, pids in enumerate(batches_of_pids()):
        for pid in pids:
            if mark_searches and pid != own_pid:
                marked.look_at(pid)
            if bystander_searches and number < _BATCHES:
                bystanders.look_at(pid)
