"""The fence in the life of a slot: who holds it enters it on its host before anything is done there.

The host is the last word on who may run in a slot, whatever the records say: a token enters once, and what runs under
lower ones is ended. Where the host has seen a higher token than the records have, they have lost their last changes:
the hold is given a token above it, and whatever lies in the tree is taken for the work of a lease that nobody ended.
"""

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import attrs

from repopool_async.coordination.base import Coordinator, Grant, Hold
from repopool_async.disk_full import is_passing
from repopool_async.exceptions import CleanupError, FencedError
from repopool_async.hosts.base import Guard, Host
from repopool_async.hosts.upkeep import upkeep
from repopool_async.models import LeaseEnd, Slot

T = TypeVar("T")

_log: Final = logging.getLogger("repopool")

_INCREDIBLE: Final = 10**16
"""Far below the first token that has no name in a fence, which is 10 to the 17th."""


class UntoldLeaseError(CleanupError):
    """A slot was leased since its record was written: what has lost that says nothing true of its tree."""


@contextmanager
def _full_disk_passed_over() -> Iterator[None]:
    """Go on where the fence could not be entered for want of room: cleaning makes some, and leaving needs none."""
    try:
        yield
    except OSError as error:
        if not is_passing(error):
            raise


def _require_credible(hold: Hold, error: FencedError) -> None:
    """Refuse to go above a token that no leases can have brought about."""
    if error.top >= _INCREDIBLE:
        raise CleanupError(
            f"{hold.slot.slot_id}: a lessee has set its fence on the host to token {error.top}; delete "
            f"{slot_directory(hold.slot)}/fence there, then repair_slot",
            slot_id=hold.slot.slot_id,
            repo_name=hold.slot.repo_name,
        )


async def _go_above(coordinator: Coordinator, hold: Hold, error: FencedError) -> None:
    """Give a hold a token above the host's, and note where there was a lease that the records have lost."""
    _require_credible(hold, error)
    # The token of a slot that was only taken may have entered before; that of a claim is new.
    is_untold = error.top > hold.token or isinstance(hold, Grant)
    await coordinator.raise_token(hold, max(error.top, hold.token))
    if is_untold:
        _log.warning("%s: the records have lost its last lease; what that left is saved", hold.slot.slot_id)
        await coordinator.update(hold, attrs.evolve(hold.slot, unsaved=LeaseEnd.CRASHED))


def slot_directory(slot: Slot) -> str:
    """Return where a slot's fence lies: beside its tree."""
    return slot.path.rpartition("/")[0]


async def enter_sealed(host: Host, coordinator: Coordinator, grant: Grant, session: str | None) -> Slot:
    """Enter a slot that was leased as a clean one; else as `enter`.

    Raises:
        UntoldLeaseError: the host knows a higher token. Whoever that was given has lost the lease, but not the work
        that may lie in the tree: the slot is to be recovered, though nothing runs there any more.
    """
    token = grant.token
    slot = await enter(host, coordinator, grant, session)
    if grant.token != token:
        raise UntoldLeaseError(
            f"{slot.slot_id}: the records have lost its last lease, so it is recovered; nothing needs to be done",
            slot_id=slot.slot_id,
            repo_name=slot.repo_name,
        )
    return slot


def guard_of(slot: Slot) -> Guard:
    """Return under which lease commands of a slot's present one run."""
    return Guard(slot_directory(slot), slot.token)


async def enter(host: Host, coordinator: Coordinator, hold: Hold, session: str | None) -> Slot:
    """Enter a held slot on its host, and return its record with the token that it entered with.

    Whoever cleaned it has left it: nothing runs there, unless the records have lost who does. The host tells where they
    have, by its higher token; but not where tokens that nobody entered with have been given since, so then it kills.

    Args:
        session: in whose name; None for a lease that outlives its process, or whose host ends with it.

    Raises:
        LeaseLostError: the hold was taken away. UnkillableError: something there does not die.
        HostUnreachableError: the host does not answer.
    """
    kills = hold.token != hold.slot.settled_token + 1
    while True:
        try:
            await host.enter(slot_directory(hold.slot), hold.token, session, kills=kills)
        except FencedError as error:
            await _go_above(coordinator, hold, error)
            kills = True
        else:
            hold.entered_token = hold.token
            return attrs.evolve(hold.slot, token=hold.token)


async def leave(host: Host, coordinator: Coordinator, hold: Hold) -> Slot:
    """See that nothing of earlier leases runs in a held slot, nor starts there again; returns its record.

    Raises as `enter`.
    """

    async def plainly(slot: Slot) -> None:
        await host.leave(slot_directory(slot), slot.token)

    return (await _leave(host, coordinator, hold, plainly))[0]


async def leave_and(
    host: Host, coordinator: Coordinator, hold: Hold, then: Callable[[], Coroutine[Any, Any, T]]
) -> tuple[Slot, T]:
    """Do what `leave` does, joined with a piece of upkeep that asks the host once; returns what came of that, too."""

    async def joined_with(slot: Slot) -> T:
        with upkeep(guard_of(slot)):
            async with host.joined() as joined:
                joined(host.leave(slot_directory(slot), slot.token))
                outcome = joined(then())
        return outcome.result()

    return await _leave(host, coordinator, hold, joined_with)


async def _leave(
    host: Host, coordinator: Coordinator, hold: Hold, leaving: Callable[[Slot], Awaitable[T]]
) -> tuple[Slot, T]:
    """Leave until nobody has come with a higher token meanwhile.

    Who has not entered it does so first: one token enters once, but any number could leave under it where the records
    have lost that it was given before.
    """
    while True:
        if hold.entered_token != hold.token:
            with _full_disk_passed_over():
                await enter(host, coordinator, hold, None)
        try:
            slot = attrs.evolve(hold.slot, token=hold.token)
            outcome = await leaving(slot)
        except FencedError as error:
            await _go_above(coordinator, hold, error)
        else:
            return slot, outcome
