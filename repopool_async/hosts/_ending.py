"""Ending what a lease left running on this machine, and telling who else holds something of its tree."""

from typing import Final

import anyio

from repopool_async._aio import Deadline, in_thread
from repopool_async.hosts import _marked
from repopool_async.hosts._bystanders import BystanderSearch
from repopool_async.hosts._marked import MarkSearch
from repopool_async.hosts._passes import Passes
from repopool_async.hosts.base import EndedProcesses

_KILL_SECONDS: Final = 3.0
"""How long, beyond the grace period, the killed may take to die and to stop breeding."""
_POLL_SECONDS: Final = 0.005


async def end_processes(
    passes: Passes,
    mark: str,
    *,
    tree: str | None,
    grace_seconds: float,
    since: float | None,
    group: int | None,
) -> EndedProcesses:
    """See `Host.end_processes`; takes at most the grace period and three seconds, besides looking.

    A marked process that cannot be ended (another user's, stuck in the kernel) is named among the bystanders.

    Args:
        since: in seconds since boot.
    """
    killed, survivors = await _end_marked(passes, mark, group, grace_seconds)
    bystanders: tuple[str, ...] = ()
    if tree is not None:
        # Only now: until the last of them had ended, they could hand on what they held.
        with BystanderSearch(tree, survivors, since) as search:
            await passes.answer(search)
            bystanders = tuple(search.names[pid] for pid in sorted(search.names))
    return EndedProcesses(killed=tuple(sorted(killed)), bystanders=bystanders, survivors=tuple(sorted(survivors)))


async def _end_marked(passes: Passes, mark: str, group: int | None, grace_seconds: float) -> tuple[set[int], list[int]]:
    """End what bears the mark, and what that starts meanwhile, until there is none; return the dead and the rest."""
    grace, limit = Deadline.after(grace_seconds), Deadline.after(grace_seconds + _KILL_SECONDS)
    killed: set[int] = set()
    while True:
        with MarkSearch(mark, group=group) as search:
            await passes.answer(search)
            if not search.targets:
                return killed, []
            rest = await in_thread(_marked.end, search.targets, grace, limit)
            killed.update(target.pid for target in search.targets if target not in rest)
            if limit.is_expired:
                return killed, [target.pid for target in rest]
            if len(rest) == len(search.targets):
                # Nothing more can be done to these; newcomers must not be looked for without a pause.
                await anyio.sleep(_POLL_SECONDS)
