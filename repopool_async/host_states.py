"""What is known of hosts beside the configuration: who may be used, and who was added while managers run.

One small file beside the pools, so that every process of a workspaces directory sees the same, which is read again when
it changed; or a table of the database that managers share. What follows from a host's condition is `host_registry`'s
business.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Protocol

import attrs

from repopool_async import _files
from repopool_async._aio import in_thread
from repopool_async._clock import now
from repopool_async._codec import CodecError, dumps, loads
from repopool_async.exceptions import StoreError
from repopool_async.lock_manager import LockManager
from repopool_async.shared_state import SharedHosts

_LOCK_ID: Final = "hosts"
_LIMIT: Final = 16 * 1024 * 1024


class HostCondition(StrEnum):
    """Whether a host is used."""

    ACTIVE = "active"
    DRAINING = "draining"
    """Leases under way go on, no new ones are given there and no slots made."""
    PARKED = "parked"
    """Taken out of use by hand: its leases have ended as lost. It stays so until it is resumed."""
    UNREACHABLE = "unreachable"
    """It did not answer; otherwise as PARKED, but it is asked again and comes back by itself."""

    REFUSED = "refused"
    """This manager must not use it, for the reason that is given; no other manager is concerned."""

    @property
    def is_out(self) -> bool:
        """Whether nothing is done on the host."""
        return self in (HostCondition.PARKED, HostCondition.UNREACHABLE, HostCondition.REFUSED)


@attrs.frozen
class HostState:
    """What is known of one host.

    Attributes:
        reason: for people. since: when the condition began.
        spec: what it is, where that is not said by the configuration, as `HostSpec.changed` returns it.
    """

    condition: HostCondition = HostCondition.ACTIVE
    reason: str = ""
    since: datetime = attrs.field(factory=now)
    spec: Mapping[str, Any] | None = None


@attrs.frozen
class _Stored:
    hosts: dict[str, HostState] = attrs.field(factory=dict)


Decide = Callable[[HostState | None], HostState | None]


class HostStates(Protocol):
    """The states of all hosts, as everybody has them who works on the same pools."""

    async def read(self) -> Mapping[str, HostState]:
        """Return the states by host; a host that is not among them is ACTIVE.

        Raises:
            StoreError: they cannot be read.
        """

    async def change(self, host_id: str, change: Decide) -> bool:
        """Replace a host's state; None stands for one that nothing is known of. Returns whether it is another now.

        Raises:
            StoreError: they cannot be read or written.
        """


class FileHostStates:
    """The states of the hosts of one workspaces directory.

    Args:
        locks: of the same directory.
    """

    def __init__(self, workspaces_dir: str, locks: LockManager) -> None:
        self._path = f"{workspaces_dir}/.hosts.json"  # a dot-name is no pool's
        self._locks = locks
        self._stamp: tuple[int, int, int] | None = None
        self._known: dict[str, HostState] = {}

    async def read(self) -> Mapping[str, HostState]:
        """See `HostStates.read`."""
        return await in_thread(self._read_if_changed)

    async def change(self, host_id: str, change: Decide) -> bool:
        """See `HostStates.change`."""
        return await in_thread(self._change, host_id, change)

    def _read_if_changed(self) -> Mapping[str, HostState]:
        stamp = self._present_stamp()
        if stamp is None or stamp != self._stamp:
            self._known = self._read()
            self._stamp = stamp
        return self._known

    def _change(self, host_id: str, change: Decide) -> bool:
        with self._locks.record_lock_sync(_LOCK_ID):
            states = self._read()
            before = states.get(host_id)
            after = change(before)
            if after == before:
                return False
            states.pop(host_id, None)
            states |= {} if after is None else {host_id: after}
            self._write(states)
        return True

    def _present_stamp(self) -> tuple[int, int, int] | None:
        with suppress(OSError):
            status = os.stat(self._path)  # noqa: PTH116 - each second
            return status.st_mtime_ns, status.st_ino, status.st_size
        return None

    def _read(self) -> dict[str, HostState]:
        try:
            data = _files.read_regular(self._path, _LIMIT)
            return {} if data is None else loads(_Stored, data).hosts
        except (OSError, CodecError) as error:
            raise StoreError(f"{self._path} cannot be read ({error}); delete it, and all hosts are active") from error

    def _write(self, states: Mapping[str, HostState]) -> None:
        try:
            _files.write_atomic(self._path, dumps(_Stored(dict(states))), durable=True)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written ({error.strerror})") from error


class DatabaseHostStates:
    """The states of the hosts of one database."""

    def __init__(self, hosts: SharedHosts) -> None:
        self._hosts = hosts

    async def read(self) -> Mapping[str, HostState]:
        """See `HostStates.read`."""
        return {name: _decoded(name, text) for name, text in (await self._hosts.records()).items()}

    async def change(self, host_id: str, change: Decide) -> bool:
        """See `HostStates.change`."""

        def decide(text: str | None) -> str | None:
            before = None if text is None else _decoded(host_id, text)
            after = change(before)
            return text if after == before else None if after is None else dumps(after).decode()

        return await self._hosts.change(host_id, decide)


def _decoded(name: str, text: str) -> HostState:
    try:
        return loads(HostState, text.encode())
    except CodecError as error:
        raise StoreError(
            f"what the database says of host {name} is damaged ({error}); set its record in repopool.host to null"
        ) from error
