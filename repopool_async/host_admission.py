"""Whether a manager may use a host: git is there, its directory is local to it, and no other manager has it.

Managers on several machines know nothing of each other's files, so with files as the coordinator each host belongs to
one manager's directory. It says so by a note on the host: first it writes its own, then it looks for others', so that
of two that come at once neither overlooks the other.
"""

import functools
import hashlib
import os
import uuid
from pathlib import Path
from typing import Final

import attrs

from repopool_async._aio import in_thread
from repopool_async._git import check_git_version
from repopool_async._identity import host_name
from repopool_async.exceptions import ConfigError, PlatformNotSupportedError
from repopool_async.hosts.base import Host, MakeDirectory, WriteFile

_MACHINE_IDS: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_NOTES: Final = ".managers"
_NOTE_LIMIT: Final = 65536


@attrs.frozen
class Manager:
    """Whose hosts they are.

    Attributes:
        identity: another for every machine and directory. description: for people.
    """

    identity: str
    description: str

    @classmethod
    async def of(cls, workspaces_dir: str) -> "Manager":
        """Return this machine's manager of a directory, whichever process it is in."""
        machine = await in_thread(_machine_id)
        digest = hashlib.sha256(f"{machine}\0{os.path.realpath(workspaces_dir)}".encode(errors="surrogateescape"))  # noqa: ASYNC240
        return cls(digest.hexdigest()[:32], f"{workspaces_dir} on {host_name()}")


async def admit(host: Host, workspaces_dir: str, manager: Manager) -> None:
    """Make a host's directory and note there whose it is.

    Raises:
        ConfigError: another manager has it, or it lies on a network file system.
        PlatformNotSupportedError: git is missing there, or too old. HostUnreachableError: it does not answer.
        OSError: the directory cannot be used.
    """
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
    others = [name for name in await host.list_directory(notes) if len(name) == len(manager.identity)]
    others = [name for name in others if name != manager.identity]
    if others:
        text = await host.read_bytes(f"{notes}/{others[0]}", limit=_NOTE_LIMIT) or b""
        raise ConfigError(
            f"host {host.id}: {workspaces_dir} is another manager's ({text.decode(errors='replace').strip()}); for "
            f"several manager machines set coordination: postgresql://…, or give each its own workspaces_dir on the "
            f"host; what a manager that is no more leaves, {notes}/{others[0]}, may be deleted",
            key="hosts",
        )


@functools.cache
def _machine_id() -> str:
    for path in _MACHINE_IDS:
        try:
            if text := path.read_text(encoding="utf-8", errors="replace").strip():
                return text
        except OSError:
            continue
    return f"{uuid.getnode():x}"
