"""A place in the queue of the database: a row that whoever frees a slot looks for.

A slot is handed to the oldest waiter that asks, and the hand-over is a change of the two rows alone; a notification
only says that it is worth looking. So a lost one costs a poll and nothing else.
"""

import uuid
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self

import attrs

from repopool_async._aio import shielded
from repopool_async._identity import this_process
from repopool_async.coordination._pg_link import Link
from repopool_async.coordination._pg_rows import abandoning, want_of
from repopool_async.coordination.base import Grant, Want
from repopool_async.exceptions import CoordinatorUnavailableError, PoolNotFoundError

Granted = Callable[[uuid.UUID, Any], Grant]


class PostgresTicket:
    """See `coordination.base.Ticket` and `Coordinator.ticket`.

    Args:
        granted: makes a grant of a hold's id and the row that it came with.
    """

    def __init__(
        self,
        link: Link,
        repo_name: str,
        want: Want | None,
        on_change: Callable[[], object] | None,
        granted: Granted,
    ) -> None:
        self._link = link
        self._repo_name = repo_name
        self._want = want
        self._on_change = on_change
        self._granted = granted
        self._hold_id: Final = uuid.uuid4()
        self._debt: Final = abandoning(repo_name, self._hold_id)
        self._session_id: uuid.UUID | None = None
        self._is_open = False
        self._known = ExitStack()

    async def __aenter__(self) -> Self:
        """Draw the ticket; cancelled, there is none."""
        self._known.enter_context(self._link.holds.asked_for(self._hold_id))
        if self._on_change is not None:
            self._link.listen_for(self._hold_id, self._on_change)
        try:
            await self._draw()
        except BaseException:
            self._known.close()
            self._link.listen_for(self._hold_id, None)
            raise
        return self

    async def _draw(self) -> None:
        self._session_id = self._link.session.session_id
        row = await self._link.begin(
            f"wait for a slot of {self._repo_name}",
            "SELECT repopool.draw($1, $2, $3, $4::jsonb) AS is_drawn",
            *(self._repo_name, self._session_id, self._hold_id),
            None if self._want is None else self._asked(self._want),
            debt=self._debt,
        )
        if not row["is_drawn"]:
            raise no_pool(self._repo_name)
        self._is_open = True

    @staticmethod
    def _asked(want: Want) -> str:
        # What is waited from here on is added by the database.
        return want_of(attrs.evolve(want, wait_seconds=want.wait_seconds or 0.0), this_process())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._known.close()
        self._link.listen_for(self._hold_id, None)
        if self._is_open:
            self._is_open = False
            await shielded(self._link.give_up(self._debt), name=f"leave-queue-{self._repo_name}")

    async def is_first(self) -> bool:
        """Do as `Ticket.is_first`; False outside the context."""
        if not self._is_open:
            return False
        row = await self._link.ask(
            f"ask whose turn it is for {self._repo_name}",
            "SELECT repopool.ask($1, $2) AS is_first",
            self._repo_name,
            self._hold_id,
        )
        return bool(row["is_first"])

    async def claim(self) -> Grant | None:
        """Do as `Ticket.claim`; None outside the context."""
        if self._want is None:
            raise ValueError("the ticket was drawn for nothing; say what is wanted when drawing it")
        if not self._is_open:
            return None
        if self._session_id != self._link.session.session_id:
            raise CoordinatorUnavailableError(
                f"{self._repo_name}: the database took this process for dead while it waited; draw a new ticket"
            )
        self._link.session.require_trust()
        row = await self._link.ask(
            f"claim a slot of {self._repo_name}",
            "CALL repopool.collect($1, $2, $3, NULL, NULL)",
            *(self._repo_name, self._session_id, self._hold_id),
        )
        if row["p_record"] is None:
            return None
        self._is_open = False  # it is served: the slot is the caller's now
        self._link.listen_for(self._hold_id, None)
        return self._granted(self._hold_id, row)


def no_pool(repo_name: str) -> PoolNotFoundError:
    """Return the error for a pool that does not exist."""
    return PoolNotFoundError(f"{repo_name}: there is no such pool; create_pool makes it", repo_name=repo_name)
