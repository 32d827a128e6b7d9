"""The verbs about hosts: what `PoolManager` can do with them, a line of output each."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Final

from repopool_async.cli._common import configuration, on_one_line, only
from repopool_async.cli._signals import Handler, Interruption
from repopool_async.models import HostStatus
from repopool_async.pool_manager import PoolManager


async def hosts(arguments: Namespace, _: Interruption) -> int:
    """Do what the action says."""
    async with PoolManager(only(configuration(arguments), None)) as manager:
        match arguments.action:
            case "add":
                await manager.add_host(
                    arguments.name,
                    arguments.address,
                    workspaces_dir=arguments.directory,
                    labels=arguments.label,
                    capacity=arguments.capacity,
                    mirror_from=arguments.mirror_from,
                )
            case "drain":
                await manager.drain_host(arguments.name, arguments.reason)
            case "park":
                await manager.park_host(arguments.name, arguments.reason)
            case "resume":
                await manager.resume_host(arguments.name)
            case "remove":
                await manager.remove_host(arguments.name, force=arguments.force)
        for status in await manager.list_hosts():
            print(_line(status))
    return 0


def _line(status: HostStatus) -> str:
    limit = "" if status.capacity is None else f" of {status.capacity}"
    parts = [
        f"{status.host_id:<16} {status.condition:<12} {status.address}",
        f"{status.total_slots}{limit} slots, {status.available} available, {status.allocated} allocated",
        *([f"labels {' '.join(status.labels)}"] if status.labels else []),
        *([on_one_line(status.reason)] if status.reason else []),
    ]
    return "; ".join(parts)


HANDLERS: Final[Mapping[str, Handler]] = {"hosts": hosts}
