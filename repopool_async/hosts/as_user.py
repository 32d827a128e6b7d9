"""A host whose commands run as another user; its files are reached as before, by whoever we are.

Between us and the user runs a program with all of our rights: what a caller sets for the user's command must not decide
what that program loads, which may be files of the user's own.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import attrs

from repopool_async.hosts.base import Command, Host, HostProcess
from repopool_async.models import CommandResult

_LOADING: Final = ("LD_", "DYLD_", "MALLOC_", "GLIBC_", "BASH_FUNC_")
"""What the names of variables begin with that are read before a program has given up its rights."""
_LOADING_TOO: Final = frozenset(
    {
        *("GCONV_PATH", "GETCONF_DIR", "LOCPATH", "NLSPATH", "TZDIR", "NIS_PATH"),
        *("HOSTALIASES", "LOCALDOMAIN", "RESOLV_HOST_CONF", "RES_OPTIONS"),
        *("ENV", "BASH_ENV", "BASHOPTS", "SHELLOPTS", "PS4"),
    }
)
_ENV: Final = "/usr/bin/env"
_AS_IT_IS: Final = ("/bin/sh", "-c", 'exec "$@"', "sh")


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
        given, via = self._started(argv[0], env)
        return await self._host.run(argv, env=given, cwd=cwd, via=via, **limits)

    async def batch(
        self, commands: Sequence[Command], *, timeout: float | None = None, stop: bool = True
    ) -> list[CommandResult]:
        """See `Host.batch`."""
        dropped = []
        for command in commands:
            given, via = self._started(command.argv[0], command.env)
            dropped.append(attrs.evolve(command, env=given, via=via))
        return await self._host.batch(dropped, timeout=timeout, stop=stop)

    def open_process(
        self, argv: Sequence[str], *, env: Mapping[str, str], cwd: str | None = None, **streams: Any
    ) -> AbstractAsyncContextManager[HostProcess]:
        """See `Host.open_process`."""
        given, via = self._started(argv[0], env)
        return self._host.open_process(argv, env=given, cwd=cwd, via=via, **streams)

    def _started(self, name: str, env: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
        """Return the environment of what is started, and what makes it the command with its own."""
        held_back = [f"{key}={value}" for key, value in env.items() if _is_loading(key)]
        given = {key: value for key, value in env.items() if not _is_loading(key)}
        if not held_back:
            return given, self._prefix
        # A command whose name looks like a variable's setting would be taken for one.
        return given, (*self._prefix, _ENV, *held_back, *(_AS_IT_IS if "=" in name else ()))


def _is_loading(name: str) -> bool:
    return name.startswith(_LOADING) or name in _LOADING_TOO
