"""The fence of slots on this machine: what `_fence` does with files, and in between what is to be ended is ended.

What is registered under a token is found in the slot's directory, what left its group by the mark that it inherited.
"""

from collections.abc import Sequence
from typing import Final

from repopool_async._aio import Deadline, in_thread, shielded
from repopool_async.exceptions import UnkillableError
from repopool_async.hosts import _fence, _marked
from repopool_async.hosts._marked import MarkSearch
from repopool_async.hosts._passes import Passes
from repopool_async.hosts._scripts import fence_key

_DYING_SECONDS: Final = 10.0
_ROUNDS: Final = 50


async def enter(
    passes: Passes, host_id: str, slot_directory: str, token: int, session_directory: str | None, *, kills: bool
) -> None:
    """See `Host.enter`."""
    if not kills:
        await in_thread(_fence.enter, host_id, slot_directory, token, session_directory)
        return

    async def enter_and_kill() -> None:
        await in_thread(_fence.begin_to_enter, host_id, slot_directory, token)
        stuck = await in_thread(_fence.kill_registered, slot_directory, token - 1)
        await _kill_strays(passes, host_id, slot_directory, token - 1, stuck)
        await in_thread(_fence.finish_entering, host_id, slot_directory, token, session_directory)

    await shielded(enter_and_kill(), name="enter")


async def leave(passes: Passes, host_id: str, slot_directory: str, token: int) -> None:
    """See `Host.leave`."""

    async def leave_and_kill() -> None:
        stuck = await in_thread(_fence.begin_to_leave, host_id, slot_directory, token)
        await _kill_strays(passes, host_id, slot_directory, token, stuck)
        # Who was overtaken meanwhile must not take the slot for its own.
        await in_thread(_fence.require_highest, host_id, slot_directory, token)

    await shielded(leave_and_kill(), name="leave")


async def kill_until(passes: Passes, host_id: str, slot_directory: str, last: int) -> None:
    """End what is registered in a slot under tokens up to one, and what bears their mark.

    Raises:
        UnkillableError: something does not die.
    """

    async def kill() -> None:
        stuck = await in_thread(_fence.kill_registered, slot_directory, last)
        await _kill_strays(passes, host_id, slot_directory, last, stuck)

    await shielded(kill(), name="kill")


async def _kill_strays(passes: Passes, host_id: str, slot_directory: str, last: int, stuck: Sequence[int]) -> None:
    """Kill those that left their group.

    Args:
        stuck: what else does not die.
    """
    stuck = [*stuck, *await _end_strays(passes, fence_key(slot_directory), last)]
    if stuck:
        pids = " ".join(map(str, stuck))
        raise UnkillableError(
            f"{slot_directory} on host {host_id}: processes do not die: {pids}; look at them there, then repair_slot"
        )


async def _end_strays(passes: Passes, key: str, last: int) -> list[int]:
    for _ in range(_ROUNDS):
        with MarkSearch(f"REPOPOOL_FENCE={key}.", last=last) as search:
            await passes.answer(search)
            if not search.targets:
                break
            rest = await in_thread(_marked.kill, search.targets, Deadline.after(_DYING_SECONDS))
            if rest:
                return [target.pid for target in rest]
    return []
