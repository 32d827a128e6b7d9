"""A host whose commands run as another user; its files are reached as before, by whoever we are."""

import errno
import os
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import attrs

from repopool_async._aio import in_thread
from repopool_async.hosts.base import Command, Host, HostProcess
from repopool_async.models import CommandResult


class AsUser:
    """`Host` around another one.

    Args:
        prefix: what is put before every command, see `_users.start_as`.
    """

    def __init__(self, host: Host, prefix: Sequence[str]) -> None:
        self._host = host
        self._prefix = tuple(prefix)

    def __repr__(self) -> str:
        return f"AsUser({self._host!r})"

    def __getattr__(self, name: str) -> Any:
        """Give everything that concerns files and the process table on to the host itself."""
        return getattr(self._host, name)

    async def run(
        self, argv: Sequence[str], *, env: Mapping[str, str], cwd: str | None = None, **limits: Any
    ) -> CommandResult:
        """See `Host.run`."""
        await in_thread(_require_command, argv[0], env.get("PATH"), cwd)
        return await self._host.run([*self._prefix, *argv], env=env, cwd=cwd, **limits)

    async def batch(
        self, commands: Sequence[Command], *, timeout: float | None = None, stop: bool = True
    ) -> list[CommandResult]:
        """See `Host.batch`."""
        dropped = [attrs.evolve(command, argv=(*self._prefix, *command.argv)) for command in commands]
        return await self._host.batch(dropped, timeout=timeout, stop=stop)

    def open_process(
        self, argv: Sequence[str], *, env: Mapping[str, str], cwd: str | None = None, **streams: Any
    ) -> AbstractAsyncContextManager[HostProcess]:
        """See `Host.open_process`."""
        return self._opened(argv, env=env, cwd=cwd, **streams)

    @asynccontextmanager
    async def _opened(
        self, argv: Sequence[str], *, env: Mapping[str, str], cwd: str | None, **streams: Any
    ) -> AsyncIterator[HostProcess]:
        await in_thread(_require_command, argv[0], env.get("PATH"), cwd)
        async with self._host.open_process([*self._prefix, *argv], env=env, cwd=cwd, **streams) as process:
            yield process


def _require_command(name: str, path: str | None, cwd: str | None) -> None:
    """Raise what starting the command itself would: the program that is started instead exists always."""
    found = os.path.exists(os.path.join(cwd or "/", name)) if "/" in name else shutil.which(name, path=path)  # noqa: PTH110, PTH118
    if not found:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
