"""On which host a claim would best find a slot: of those that have the wanted commit, the one that is the least full.

To count what is free at every claim would cost more than the claim. So it is counted now and then, and reckoned on from
there by what this process takes and gives back; what others do meanwhile is seen a moment later. It is a wish only: a
claim takes what it gets, and a host that was thought to be emptier than it is costs evenness and nothing else.
"""

from collections import Counter
from collections.abc import Set as AbstractSet
from typing import Final

import attrs

from repopool_async._clock import boottime
from repopool_async.coordination._pg_link import Link
from repopool_async.models import Slot

FRESH_SECONDS: Final = 0.5
"""How long a count is reckoned on from."""
_ALONE_SECONDS: Final = 30.0
"""How long a pool is taken to be on one host only, so that there is nothing to choose."""

_COUNT: Final = """
    SELECT s.host_id, s.sealed_commit, count(*) AS slots, count(*) FILTER (
        WHERE s.state = 'available' AND s.session_id IS NULL AND s.sealed_commit IS NOT NULL) AS free
    FROM repopool.slot s WHERE s.pool = $1 GROUP BY s.host_id, s.sealed_commit ORDER BY min(s.number)
"""


@attrs.define
class Count:
    """The slots of one pool by host.

    Attributes:
        good_until: on the boot-time clock. slots: how many each host has. free: how many may be leased, by commit.
    """

    good_until: float
    slots: Counter[str] = attrs.field(factory=Counter)
    free: dict[str, Counter[str]] = attrs.field(factory=dict)

    def add(self, host_id: str, commit: str | None, *, slots: int, free: int) -> None:
        """Count slots that stand at one commit."""
        self.slots[host_id] += slots
        self.free.setdefault(host_id, Counter())[commit or ""] += free

    def best(self, commit: str | None, exclude_hosts: AbstractSet[str]) -> str | None:
        """Return the host to be preferred, the first among equals; None where there is nothing to choose."""
        hosts = [host_id for host_id in self.slots if host_id not in exclude_hosts and self._share(host_id) > 0]
        at_commit = [host_id for host_id in hosts if self.free[host_id][commit or ""] > 0]
        return max(at_commit or hosts, key=self._share, default=None) if len(self.slots) > 1 else None

    def _share(self, host_id: str) -> float:
        return self.free[host_id].total() / self.slots[host_id]


class Spread:
    """What was last known of how full the hosts of each pool are."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._counts: dict[str, Count] = {}

    async def host_for(self, repo_name: str, commit: str | None, exclude_hosts: AbstractSet[str]) -> str | None:
        """Return the host to be preferred by a claim; None where there is nothing to choose.

        Raises:
            CoordinatorUnavailableError, StoreError: it could not be counted.
        """
        known = self._counts.get(repo_name)
        if known is None or boottime() >= known.good_until:
            if known is not None:
                known.good_until = boottime() + FRESH_SECONDS  # so that of many claims at once one counts
            known = self._counts[repo_name] = await self._count(repo_name)
        return known.best(commit, exclude_hosts)

    def note_taken(self, slot: Slot) -> None:
        """Reckon with a slot that this process has just leased."""
        self._note(slot, -1)

    def note_free(self, slot: Slot) -> None:
        """Reckon with a slot that this process has just made AVAILABLE."""
        self._note(slot, 1)

    def _note(self, slot: Slot, change: int) -> None:
        known = self._counts.get(slot.repo_name)
        if known is not None and slot.host_id in known.slots and slot.seal is not None:
            known.add(slot.host_id, slot.seal.commit, slots=0, free=change)

    async def _count(self, repo_name: str) -> Count:
        rows = await self._link.database.fetch(f"count the free slots of {repo_name}", _COUNT, repo_name)
        count = Count(boottime() + FRESH_SECONDS)
        for row in rows:
            count.add(row["host_id"], row["sealed_commit"], slots=row["slots"], free=row["free"])
        if len(count.slots) == 1:
            count.good_until = boottime() + _ALONE_SECONDS
        return count
