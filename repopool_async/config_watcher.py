"""Notices that a configuration file has other contents than before, in whichever way they came there.

Editors rename a new file into place, deployments swap a link to its directory, some write in place, and in between the
file may be gone or half written: so whole directories are watched, and contents count only once they stand still. Where
the kernel tells nothing (network file systems, no watches left) the file is read at intervals. What the contents mean
is not known here.
"""

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Final

from repopool_async import _mounts
from repopool_async._aio import Deadline, in_thread

_log: Final = logging.getLogger("repopool")

POLL_SECONDS: Final = 1.0
_CHECK_MS: Final = 5000
"""How often contents are read though the kernel has told nothing: its queue may overflow, directories may be moved."""
_STEP_MS: Final = 50
_DEBOUNCE_MS: Final = 400
_SETTLE_SECONDS: Final = 0.15
_MISSING_SECONDS: Final = 1.0
"""How long a file may be gone without that being worth a word."""
_READ_LIMIT_BYTES: Final = 16 * 1024 * 1024

_Places = tuple[tuple[str, int, int], ...]


class ConfigWatcher:
    """Watches one file.

    Args:
        path: of the file, which need not exist.
        on_change: awaited after the contents have changed (and once at the start), one call at a time; must not raise.
        is_polled: read at intervals instead of asking the kernel. poll_seconds: how often.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        on_change: Callable[[], Awaitable[None]],
        *,
        is_polled: bool = False,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._path = str(Path(path).absolute())
        self._on_change = on_change
        self._is_polled = is_polled
        self._poll_seconds = poll_seconds

    async def run(self) -> None:
        """Watch until cancelled."""
        seen: bytes | None = b"nothing yet"
        async with aclosing(self._occasions()) as occasions:
            async for _ in occasions:
                digest = await self._settled(seen)
                if digest != seen:
                    seen = digest
                    await self._on_change()

    async def _settled(self, seen: bytes | None) -> bytes | None:
        """Return a digest of the contents once they stand still; None where the file stays away."""
        missing = Deadline.after(_MISSING_SECONDS)
        before = await in_thread(_digest, self._path)
        while before != seen:
            await asyncio.sleep(_SETTLE_SECONDS)
            after = await in_thread(_digest, self._path)
            if after == before and (after is not None or missing.is_expired):
                break
            before = after
        return before

    async def _occasions(self) -> AsyncGenerator[None, None]:
        """Yield whenever it is worth a look."""
        yield
        is_told = False
        while True:
            places = () if self._is_polled else await in_thread(_watchable, self._path)
            if places:
                try:
                    async with aclosing(self._kernel_says(places)) as changes:
                        async for _ in changes:
                            yield
                except (OSError, RuntimeError) as error:  # watchfiles' own error is a RuntimeError
                    if not is_told:
                        _log.warning("%s cannot be watched (%s); it is read at intervals", self._path, error)
                    is_told = True
            await asyncio.sleep(self._poll_seconds)
            yield

    async def _kernel_says(self, places: _Places) -> AsyncGenerator[None, None]:
        """Yield on changes in the directories, and every few seconds, for as long as they are the right ones."""
        import watchfiles  # noqa: PLC0415 - most managers watch nothing

        changes = watchfiles.awatch(
            *(path for path, _, _ in places),
            watch_filter=None,
            recursive=False,
            step=_STEP_MS,
            debounce=_DEBOUNCE_MS,
            rust_timeout=_CHECK_MS,
            yield_on_timeout=True,
        )
        async with aclosing(changes):
            yield  # what changed before the watch began
            async for _ in changes:
                yield
                if await in_thread(_places, self._path) != places:
                    return


def _digest(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a link is followed on purpose
            return hashlib.blake2b(file.read(_READ_LIMIT_BYTES)).digest()
    except OSError:
        return None


def _places(path: str) -> _Places:
    """Return the directories in which the file, or a link on the way to it, may be replaced; none where one is gone."""
    directories = {str(Path(path).parent)}
    for _ in range(40):  # as many links as the kernel follows
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))  # noqa: PTH115, PTH118, PTH120
        except OSError:
            break
        directories.add(os.path.dirname(path))  # noqa: PTH120
    directories.add(os.path.dirname(os.path.realpath(path)))  # noqa: PTH120
    try:
        statuses = {directory: os.stat(directory) for directory in sorted(directories)}  # noqa: PTH116
    except OSError:
        return ()
    return tuple((directory, status.st_dev, status.st_ino) for directory, status in statuses.items())


def _watchable(path: str) -> _Places:
    """Return the directories to watch; none where others can change the file without this machine's kernel knowing."""
    places = _places(path)
    return () if any(_mounts.is_network_file_system(directory) for directory, _, _ in places) else places
