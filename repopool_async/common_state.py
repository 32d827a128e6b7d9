"""Where the state of slots is kept: the one place that knows whether files or a database stand behind it.

Made without any I/O, opened and closed with its manager. What is done with it is everybody else's business.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import attrs

from repopool_async.config import PoolConfig
from repopool_async.config_coordination import Coordination
from repopool_async.coordination.base import Coordinator, OnEvent
from repopool_async.coordination.files import FileCoordinator
from repopool_async.host_admission import Admission, DatabaseAdmission, FileAdmission
from repopool_async.host_states import DatabaseHostStates, FileHostStates, HostStates
from repopool_async.lock_manager import LockManager
from repopool_async.models import LOCAL_HOST
from repopool_async.shared_state import Locks, PoolRecords
from repopool_async.slot_store import SlotStore

FILES: Final = Coordination(type="files")


async def _nothing() -> None:
    """There is nothing to open or close."""


@attrs.frozen
class CommonState:
    """What all who share pools have in common.

    Attributes:
        where: it is, for people. directories: of this machine that it needs.
        recorded_on: the host in whose directories of slots their records lie, and go with them; None where they lie
            elsewhere.
        open, close: connect, raising `CoordinatorUnavailableError` or `StoreError`, and leave, in bounded time.
    """

    where: str
    records: PoolRecords
    locks: Locks
    coordinator: Coordinator
    host_states: HostStates
    admission: Admission
    directories: tuple[str, ...] = ()
    recorded_on: str | None = None
    open: Callable[[], Awaitable[object]] = _nothing
    close: Callable[[], Awaitable[object]] = _nothing

    @classmethod
    def of(cls, config: PoolConfig, on_event: OnEvent | None = None) -> "CommonState":
        """Return what a configuration asks for."""
        coordination = config.coordination or FILES
        if coordination.type == "files":
            return _in_files(str(config.workspaces_dir), on_event)
        return _in_database(coordination, on_event)


def _in_files(workspaces_dir: str, on_event: OnEvent | None) -> CommonState:
    store = SlotStore(workspaces_dir, on_event=on_event)
    locks = LockManager(store.locks_directory)
    return CommonState(
        where=store.workspaces_directory,
        records=store,
        locks=locks,
        coordinator=FileCoordinator(store, locks, on_event=on_event),
        host_states=FileHostStates(store.workspaces_directory, locks),
        admission=FileAdmission(store.workspaces_directory),
        directories=(str(store.locks_directory),),
        recorded_on=LOCAL_HOST,
    )


def _in_database(coordination: Coordination, on_event: OnEvent | None) -> CommonState:
    from repopool_async.coordination.postgres import PostgresCoordinator  # noqa: PLC0415 - few want it, and it is large

    assert coordination.dsn is not None
    coordinator = PostgresCoordinator(
        coordination.dsn, listen_dsn=coordination.listen_dsn, ttl=coordination.session_ttl, on_event=on_event
    )
    return CommonState(
        where=coordinator.hosts.where,
        records=coordinator.records,
        locks=coordinator.locks,
        coordinator=coordinator,
        host_states=DatabaseHostStates(coordinator.hosts),
        admission=DatabaseAdmission(coordinator.hosts, coordinator.locks),
        open=coordinator.open,
        close=coordinator.close,
    )
