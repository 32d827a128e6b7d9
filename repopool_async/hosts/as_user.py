"""A host whose commands run as another user; its files are reached as before, by whoever we are."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import attrs

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
        return await self._host.run(argv, env=env, cwd=cwd, via=self._prefix, **limits)

    async def batch(
        self, commands: Sequence[Command], *, timeout: float | None = None, stop: bool = True
    ) -> list[CommandResult]:
        """See `Host.batch`."""
        dropped = [attrs.evolve(command, via=self._prefix) for command in commands]
        return await self._host.batch(dropped, timeout=timeout, stop=stop)

    def open_process(
        self, argv: Sequence[str], *, env: Mapping[str, str], cwd: str | None = None, **streams: Any
    ) -> AbstractAsyncContextManager[HostProcess]:
        """See `Host.open_process`."""
        return self._host.open_process(argv, env=env, cwd=cwd, via=self._prefix, **streams)
