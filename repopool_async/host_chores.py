"""What a pool has to do on each of its hosts besides slots: mirrors, saved work, rubbish, and how much disk it uses.

A host that does not answer is passed over, and suspect from then on. When each chore is due is the janitor's business,
what it takes on one host that of `mirror` and `salvage`.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Final

from repopool_async._aio import together
from repopool_async._clock import boottime, now
from repopool_async.components import HostParts, PoolContext
from repopool_async.disk_full import passing_told
from repopool_async.exceptions import HostUnreachableError, PoolManagerError
from repopool_async.hosts.base import Discard
from repopool_async.models import LOCAL_HOST

_TIDYING_SECONDS: Final = 600.0
_DISK_TIMEOUT_SECONDS: Final = 600.0


class HostChores:
    """The chores of one pool."""

    def __init__(self, context: PoolContext) -> None:
        self._pool = context
        self._last_tidying = float("-inf")

    async def host_ids(self) -> list[str]:
        """Return the hosts that have something of the pool: those it chooses and those where slots are."""
        chosen = [host_id for host_id in self._pool.parts.hosts.choose() if self._pool.refusal(host_id) is None]
        if len(self._pool.hosts.specs) == 1:
            return chosen
        slots = await self._pool.parts.coordinator.list_slots(self._pool.name)
        return list(dict.fromkeys([*chosen, *(slot.host_id for slot in slots)]))

    async def _reached(self) -> AsyncIterator[HostParts]:
        for host_id in await self.host_ids():
            if not self._pool.hosts.is_out(host_id):
                yield self._pool.parts.hosts.on(host_id)

    async def _on_each(self, chore: Callable[[HostParts], Awaitable[object]]) -> None:
        """Do something on each host in turn, but for those that do not answer."""
        async for parts in self._reached():
            with suppress(HostUnreachableError):
                async with self._pool.hosts.expected_to_answer(parts.host_id):
                    await chore(parts)

    # -- mirrors -------------------------------------------------------------------------------------------------

    async def make_mirrors(self, host_ids: Iterable[str] | None = None) -> None:
        """Clone the repository on those of the pool's hosts that can be used, unless that has been done.

        Raises:
            HostUnreachableError: none of them answers. ConfigError: one of them is somebody else's, or none of those
            that answer can run the pool's lessees. Otherwise as `Mirror.ensure`.
        """
        wanted = self._pool.parts.hosts.choose() if host_ids is None else list(host_ids)
        await self._pool.hosts.require_admitted(wanted)
        usable = await self._pool.fit_among(wanted, is_asked=True)
        with passing_told(self._pool.name):
            await together(*[partial(self._make_mirror, host_id) for host_id in usable])
        _ = self._pool.reference  # raises where nobody is left

    async def _make_mirror(self, host_id: str) -> None:
        with suppress(HostUnreachableError):
            async with self._pool.hosts.expected_to_answer(host_id):
                await self._pool.hosts.admit(host_id)
                await self._pool.parts.hosts.on(host_id).mirror.ensure()

    async def check_mirrors(self) -> dict[str, list[str]]:
        """Look at every object of the mirrors, repair what is damaged, and return what was wrong, by mirror."""
        found: dict[str, list[str]] = {}

        async def check(parts: HostParts) -> None:
            problems = await parts.mirror.check()
            if problems:
                found[self._name_of_mirror(parts)] = await self._repair_mirror(parts, problems)

        await self._on_each(check)
        return found

    def _name_of_mirror(self, parts: HostParts) -> str:
        name = f"{self._pool.name}/mirror.git"
        return name if parts.host_id == LOCAL_HOST else f"{parts.host_id}:{name}"

    async def _repair_mirror(self, parts: HostParts, problems: list[str]) -> list[str]:
        about = {"repo_name": self._pool.name, "host_id": parts.host_id}
        self._pool.parts.emit("mirror.damaged", {**about, "problems": problems})
        try:
            await parts.mirror.repair()
        except (PoolManagerError, OSError) as error:
            return [*problems, f"not repaired yet: {error}"]
        self._pool.parts.emit("mirror.repaired", about)
        return problems

    # -- saved work ----------------------------------------------------------------------------------------------

    async def tidy_salvage(self) -> None:
        """Delete saved work that is older than `salvage_days`, and what killed processes left half saved."""
        if boottime() - self._last_tidying < _TIDYING_SECONDS:
            return
        self._last_tidying = boottime()
        await self._on_each(self._tidy_salvage_on)

    async def _tidy_salvage_on(self, parts: HostParts) -> None:
        expired = await parts.salvage.expire(now() - timedelta(days=self._pool.options.salvage_days))
        if expired:
            self._pool.parts.emit("salvage.expired", {"repo_name": self._pool.name, "salvage_ids": expired})
        await parts.salvage.sweep(self._unsaved_leases)

    async def _unsaved_leases(self) -> set[str]:
        slots = await self._pool.parts.coordinator.list_slots(self._pool.name)
        return {slot.lease.lease_id for slot in slots if slot.lease is not None}

    # -- rubbish and disk ----------------------------------------------------------------------------------------

    async def empty_trash(self) -> list[str]:
        """Delete what cleanings moved aside; return why something could not be, a line each."""
        failures: list[str] = []

        async def empty(parts: HostParts) -> None:
            trash = parts.layout.trash_path(self._pool.name)
            for name in await parts.host.list_directory(trash):
                try:
                    await parts.host.remove_tree(f"{trash}/{name}", is_urgent=False)
                except OSError as error:
                    failures.append(f"{parts.host_id}: cannot delete {trash}/{name}: {error}")

        await self._on_each(empty)
        return failures

    async def discard_strays(self) -> list[str]:
        """Move aside slots' directories of which no record tells, and return their paths.

        They are what was left when a host did not answer while a slot was removed. A slot's record is there before its
        directory is, and numbers are not used again.
        """
        removed: list[str] = []

        async def discard(parts: HostParts) -> None:
            if parts.host_id == self._pool.parts.recorded_on:
                return  # there the records lie in these directories themselves
            slots = f"{parts.layout.pool_directory(self._pool.name)}/slots"
            names = await parts.host.list_directory(slots)  # before the records: what comes later is no stray
            known = await self._pool.parts.coordinator.list_slots(self._pool.name)
            kept = {f"slot{slot.number}" for slot in known if slot.host_id == parts.host_id}
            strays = [f"{slots}/{name}" for name in names if name.startswith("slot") and name not in kept]
            await parts.host.apply([Discard(path, parts.layout.trash_path(self._pool.name)) for path in strays])
            removed.extend(strays)

        await self._on_each(discard)
        return removed

    async def disk_usage(self) -> int:
        """Return the bytes of disk that the pool's directories use, by `du`, which sees what users see."""
        used = 0

        async def measure(parts: HostParts) -> None:
            nonlocal used
            directory = parts.layout.pool_directory(self._pool.name)
            argv = ["du", "-skx", "--", directory]
            environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
            result = await parts.host.run(argv, env=environment, timeout=_DISK_TIMEOUT_SECONDS)
            words = result.text.split()
            if not words or not words[0].isdigit():  # what vanishes while it walks makes it fail, and is no failure
                if await parts.host.stat(directory) is None:
                    return  # nothing of the pool has come to this host
                raise OSError(f"du says nothing about {directory}: {result.stderr.decode(errors='replace')[:200]}")
            used += int(words[0]) * 1024

        await self._on_each(measure)
        return used

    async def erase(self) -> None:
        """Delete the pool's directories but the one with its records in it; nothing there is used any more."""

        async def erase(parts: HostParts) -> None:
            if parts.host_id != self._pool.parts.recorded_on:
                await parts.host.remove_tree(parts.layout.pool_directory(self._pool.name))

        await self._on_each(erase)
