"""What a process does that `benchmarks.chaos` kills at every step of it, and what another does that has to be there."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks import _chaos_worker as worker
from benchmarks._chaos_work import end_work, make_work
from repopool_async import LeasedSlot, PoolManager

Act = Callable[[PoolManager, Path, str], Coroutine[Any, Any, None]]
"""Does something with a manager, below a directory, with the pools of a URL."""


@attrs.frozen
class Operation:
    """Something that is begun again and again, and killed at another step each time.

    Attributes:
        after_death_in: the pool in whose slots a lessee has died before, with work; nobody else is there then, and what
            a manager does when it opens is part of the operation.
        pools: those that must be well again afterwards.
        is_from_file: whether the manager follows the configuration file.
        is_detached: whether a lease may outlive the process, which somebody must then take away.
    """

    act: Act
    after_death_in: str | None = None
    pools: tuple[str, ...] = (worker.POOL,)
    is_from_file: bool = False
    is_detached: bool = False

    @property
    def bears_company(self) -> bool:
        """Whether a process that puts things right may run meanwhile, and will."""
        return self.after_death_in is None and not self.is_detached


async def die_with_work(manager: PoolManager, root: Path, operation: Operation, *, leases: int) -> None:
    """Take leases, make work in them, and die."""
    for _ in range(leases):
        await make_work(root, await _allocated(manager, str(operation.after_death_in)), commits=True)
    os.kill(os.getpid(), signal.SIGKILL)


async def _create(manager: PoolManager, _root: Path, url: str) -> None:
    await manager.create_pool(worker.OTHER, url, num_slots=1)


async def _lease_and_return(manager: PoolManager, root: Path, _url: str) -> None:
    await _work(manager, root, worker.POOL)


async def _return_and_save(manager: PoolManager, root: Path, _url: str) -> None:
    await _work(manager, root, worker.FILED)


async def _work(manager: PoolManager, root: Path, name: str) -> None:
    async with manager.lease(name, ref="feature", timeout=60) as slot:
        await make_work(root, slot, commits=True)
        end_work(root, slot)
    await manager.wait_clean()


async def _allocated(manager: PoolManager, name: str, **options: Any) -> LeasedSlot:
    slot = await manager.allocate_slot(name, timeout=60, **options)
    assert slot is not None
    return slot


async def _recover(manager: PoolManager, _root: Path, _url: str) -> None:
    await manager.recover()


async def _force(manager: PoolManager, root: Path, _url: str) -> None:
    slot = await _allocated(manager, worker.POOL)
    await make_work(root, slot, commits=True)
    await manager.force_unlock(slot.slot_id)
    await manager.wait_clean()


async def _expire(manager: PoolManager, root: Path, _url: str) -> None:
    slot = await _allocated(manager, worker.POOL, detached=True, ttl=60)
    await make_work(root, slot, commits=True)
    await manager.renew_slot(slot.slot_id, slot.token, 1e-6)
    await manager.recover()


async def _close(manager: PoolManager, root: Path, _url: str) -> None:
    await make_work(root, await _allocated(manager, worker.POOL), commits=True)
    await manager.close(0)


async def _add(manager: PoolManager, _root: Path, _url: str) -> None:
    await manager.add_slot(worker.POOL)


async def _remove(manager: PoolManager, _root: Path, _url: str) -> None:
    await manager.remove_slot((await manager.list_slots(worker.POOL))[-1].slot_id)


async def _delete(manager: PoolManager, _root: Path, _url: str) -> None:
    await manager.delete_pool(worker.OTHER)


async def _reload(manager: PoolManager, root: Path, url: str) -> None:
    for num_slots in (1, 3):
        worker.write_config(root, url, num_slots, lock_timeout=30 + num_slots)
        await manager.reload()
        await manager.wait_ready(60)
        await manager.recover()


OPERATIONS: Final = {
    "create": Operation(_create, pools=(worker.POOL, worker.OTHER)),
    "lease and return": Operation(_lease_and_return),
    "return and save": Operation(_return_and_save, pools=(worker.FILED,)),
    "recover": Operation(_recover, after_death_in=worker.POOL),
    "force": Operation(_force),
    "expire": Operation(_expire, is_detached=True),
    "close": Operation(_close),
    "add": Operation(_add),
    "remove": Operation(_remove),
    "reload": Operation(_reload, after_death_in=worker.FILED, pools=(worker.FILED,), is_from_file=True),
    "delete": Operation(_delete, pools=(worker.POOL, worker.OTHER)),
}


async def all_back(manager: PoolManager, name: str, *, slots: int) -> list[str]:
    """Return what is missing of a pool that should have so many slots, once there was time to put it right."""
    lost = await worker.all_available(manager, name, 60.0, slots=slots)
    count = len(await manager.list_slots(name))
    return lost if count >= slots else [*lost, f"{name} has {count} slots of {slots}"]


async def until_cancelled(manager: PoolManager) -> None:
    """Let a manager put things right for ever."""
    async with manager:
        await asyncio.Event().wait()
