"""A host whose network can be cut: a real local host in all else."""

import asyncio
import inspect
from typing import Any

from repopool_async import HostUnreachableError, LocalHost


class SwitchedHost:
    """Does everything as a local host does, until it is cut off.

    Attributes:
        is_up: while False everything fails as on a host whose connection breaks, or hangs where `is_silent`.
    """

    def __init__(self, name: str) -> None:
        self.is_up = True
        self.is_silent = False
        self._host = LocalHost(name)

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._host, name)
        if not inspect.iscoroutinefunction(operation):
            if name == "open_process" and not self.is_up:
                raise self._unreachable()
            return operation

        async def switched(*args: Any, **options: Any) -> Any:
            if not self.is_up:
                if self.is_silent:
                    await asyncio.Event().wait()
                raise self._unreachable()
            return await operation(*args, **options)

        return switched

    def _unreachable(self) -> HostUnreachableError:
        return HostUnreachableError(f"host {self._host.id}: the connection was lost", host_id=self._host.id)
