"""Whether a manager may use a host: git is there, its directory is local to it, and nobody else's.

Managers on several machines know nothing of each other's files, so with files as the coordinator each host belongs to
one manager's directory; those that share a database have their hosts in common. Whose it is says a note on the host:
who comes first writes its own, then looks for others', so that of two that come at once neither overlooks the other.

That a name means one directory for all managers of a database is seen to by an id that the directory bears and the
database knows: two machines' configurations may differ, and the manager's own machine is called `local` on each.
"""

import functools
import hashlib
import os
import uuid
from pathlib import Path
from typing import Final, Protocol

import attrs

from repopool_async._aio import in_thread
from repopool_async._git import check_git_version
from repopool_async._identity import host_name
from repopool_async.exceptions import ConfigError, PlatformNotSupportedError
from repopool_async.hosts.base import Host, MakeDirectory, WriteFile
from repopool_async.models import LOCAL_HOST
from repopool_async.shared_state import Locks, SharedHosts

_MACHINE_IDS: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_NOTES: Final = ".managers"
_NOTE_LIMIT: Final = 65536
_PLACE: Final = "place"
_LOCK_ID: Final = "hosts-admission"


class Admission(Protocol):
    """Decides which hosts a manager may use.

    Attributes:
        is_shared: whether managers on other machines may use them too.
    """

    is_shared: bool

    async def admit(self, name: str, host: Host, workspaces_dir: str) -> None:
        """Make a host's directory and note there whose it is.

        Raises:
            ConfigError: it is somebody else's. PlatformNotSupportedError: it lies on a network file system, or git is
            missing there, or too old. HostUnreachableError: the host does not answer. OSError: the directory cannot be
            used. StoreError: it cannot be asked whose it is.
        """

    async def forget(self, name: str) -> None:
        """Forget what a name means; nothing of any pool is there any more."""


@attrs.frozen
class Manager:
    """Whose hosts they are.

    Attributes:
        identity: another for every one. description: for people.
    """

    identity: str
    description: str

    @classmethod
    async def of(cls, workspaces_dir: str) -> "Manager":
        """Return this machine's manager of a directory, whichever process it is in."""
        machine = await in_thread(_machine_id)
        digest = hashlib.sha256(f"{machine}\0{os.path.realpath(workspaces_dir)}".encode(errors="surrogateescape"))  # noqa: ASYNC240
        return cls(digest.hexdigest()[:32], f"{workspaces_dir} on {host_name()}")


class FileAdmission:
    """Admits hosts to the one manager machine whose files say what happens there.

    Args:
        workspaces_dir: the manager's own.
    """

    is_shared = False

    def __init__(self, workspaces_dir: str) -> None:
        self._workspaces_dir = workspaces_dir

    async def admit(self, name: str, host: Host, workspaces_dir: str) -> None:
        """See `Admission.admit`."""
        manager = await Manager.of(self._workspaces_dir)
        if name != LOCAL_HOST:
            await _make_note(host, workspaces_dir, manager)
        await _refuse_others(name, host, workspaces_dir, manager)

    async def forget(self, name: str) -> None:
        """See `Admission.forget`; the note stays, for other names of the same manager."""


class DatabaseAdmission:
    """Admits hosts to all managers of one database.

    Args:
        hosts, locks: of the database.
    """

    is_shared = True

    def __init__(self, hosts: SharedHosts, locks: Locks) -> None:
        self._hosts = hosts
        self._locks = locks

    async def admit(self, name: str, host: Host, workspaces_dir: str) -> None:
        """See `Admission.admit`."""
        managers = Manager(await self._hosts.identity(), f"the managers of the database {self._hosts.where}")
        await _make_note(host, workspaces_dir, managers)
        await _refuse_others(name, host, workspaces_dir, managers)
        path = f"{workspaces_dir}/{_NOTES}/{_PLACE}"
        place = await _read_place(host, path)
        if place is None:
            async with self._locks.acquire_slot_lock(_LOCK_ID):
                place = await self._make_place(host, path)
        other = await self._hosts.settle(name, place, f"{workspaces_dir}, as {host_name()} knew it")
        if other is None:
            return
        if other.name != name:
            raise ConfigError(
                f"host {name}: its directory {workspaces_dir} is that of host {other.name} for the other managers of "
                f"the database; call it {other.name} here too",
                key="hosts",
            )
        is_own = name == LOCAL_HOST
        remedy = f"write {other.place} into {path}" if is_own else f"use `repopool hosts remove --force {name}`"
        raise ConfigError(
            f"host {name}: for the other managers of the database that is another directory ({other.described}); where "
            f"there are several manager machines, give each machine one name under hosts of all configurations "
            f"(address: local on itself) and have pools choose it. If only the directory was emptied, or the machine "
            f"replaced, {remedy}",
            key="hosts",
        )

    async def forget(self, name: str) -> None:
        """See `Admission.forget`."""
        await self._hosts.forget(name)

    async def _make_place(self, host: Host, path: str) -> uuid.UUID:
        place = await _read_place(host, path)
        if place is not None:
            return place
        await _refuse_used(host, path.removesuffix(f"/{_NOTES}/{_PLACE}"))
        place = uuid.uuid4()
        await host.apply([WriteFile(path, f"{place}\n".encode(), is_durable=True)])
        return place


async def _make_note(host: Host, workspaces_dir: str, manager: Manager) -> None:
    await check_git_version(host)
    notes = f"{workspaces_dir}/{_NOTES}"
    await host.apply(
        [MakeDirectory(notes), WriteFile(f"{notes}/{manager.identity}", f"{manager.description}\n".encode())]
    )
    if await host.is_network_file_system(workspaces_dir):
        raise PlatformNotSupportedError(
            f"{workspaces_dir} of host {host.id} lies on a network file system, where another machine could change it "
            f"unseen; choose a local directory there"
        )


async def _refuse_others(name: str, host: Host, workspaces_dir: str, manager: Manager) -> None:
    notes = f"{workspaces_dir}/{_NOTES}"
    others = [note for note in await host.list_directory(notes) if len(note) == len(manager.identity)]
    others = [note for note in others if note != manager.identity]
    if others:
        text = await host.read_bytes(f"{notes}/{others[0]}", limit=_NOTE_LIMIT) or b""
        raise ConfigError(
            f"host {name}: {workspaces_dir} is another manager's ({text.decode(errors='replace').strip()}); for "
            f"several manager machines set coordination: postgresql://…, the same for all, or give each its own "
            f"workspaces_dir on the host; what a manager that is no more leaves, {notes}/{others[0]}, may be deleted",
            key="hosts",
        )


async def _refuse_used(host: Host, workspaces_dir: str) -> None:
    """Refuse a directory whose slots are recorded in files."""
    names = await host.list_directory(workspaces_dir)
    found = await host.stat_many([f"{workspaces_dir}/{name}/pool.json" for name in names])
    used = [name for name, status in zip(names, found, strict=True) if status is not None]
    if used:
        raise ConfigError(
            f"host {host.id}: {workspaces_dir} holds pools that are recorded in files ({', '.join(used)}), which no "
            f"database knows; choose another workspaces_dir, or delete them first",
            key="workspaces_dir",
        )


async def _read_place(host: Host, path: str) -> uuid.UUID | None:
    text = await host.read_bytes(path, limit=_NOTE_LIMIT)
    try:
        return None if text is None else uuid.UUID(text.decode().strip())
    except ValueError as error:
        raise ConfigError(f"host {host.id}: {path} is no id ({error}); delete it", key="hosts") from None


@functools.cache
def _machine_id() -> str:
    for path in _MACHINE_IDS:
        try:
            if text := path.read_text(encoding="utf-8", errors="replace").strip():
                return text
        except OSError:
            continue
    return f"{uuid.getnode():x}"
