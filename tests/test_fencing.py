"""How a held slot's fence is entered and left where the records have lost who was there, on a real host."""

import asyncio
import shutil
from pathlib import Path

import pytest

from repopool_async._clock import now
from repopool_async.coordination.base import Grant
from repopool_async.coordination.files import FileCoordinator
from repopool_async.exceptions import CleanupError, FencedError
from repopool_async.fencing import enter, leave, slot_directory
from repopool_async.hosts.base import Guard
from repopool_async.hosts.local import LocalHost
from repopool_async.lock_manager import LockManager
from repopool_async.models import Pool, Seal, Slot, SlotState, make_slot_id
from repopool_async.slot_allocator import available
from repopool_async.slot_store import SlotStore

SLOT_ID = make_slot_id("demo", 1)
SEAL = Seal(
    commit="a" * 40, branch="main", refs_generation="1", boot_id="", mark_ns=1, settled_ns=1, clock_offset_ns=1,
    tree_device=1, tree_inode=1,
)  # fmt: skip


@pytest.fixture
async def coordinator(tmp_path: Path) -> FileCoordinator:
    store = SlotStore(tmp_path)
    await store.save_pool(Pool(repo_name="demo", repo_url="u", num_slots=1, created_at=now()))
    coordinator = FileCoordinator(store, LockManager(store.locks_directory))
    path = str(store.tree_path(SLOT_ID))
    slot = Slot(slot_id=SLOT_ID, repo_name="demo", repo_url="u", path=path, created_at=now())
    await coordinator.finish(await coordinator.create(slot), available(slot, SEAL, now()))
    return coordinator


async def claimed(coordinator: FileCoordinator) -> Grant:
    grant = await coordinator.claim("demo", commit=None, branch=None, lease_id="lease")
    assert grant is not None
    return grant


async def test_tokens_that_nobody_entered_with_do_not_hide_who_is_in_the_slot(coordinator: FileCoordinator) -> None:
    host = LocalHost()
    directory = slot_directory(await coordinator.get_slot(SLOT_ID))
    lost_token = 1  # whose lease the records have lost, so that they give it once more, to somebody who never enters
    await host.enter(directory, lost_token, None)
    argv = ["sh", "-c", "echo ready; exec sleep 600"]
    async with host.open_process(argv, env={"PATH": "/usr/bin:/bin"}, guard=Guard(directory, lost_token)) as process:
        assert await process.read() == b"ready\n"
        given_back = await coordinator.take(SLOT_ID, states={SlotState.AVAILABLE}, raise_token=True)
        assert given_back is not None
        assert given_back.token == lost_token
        await coordinator.abandon_hold(given_back)

        grant = await claimed(coordinator)
        await enter(host, coordinator, grant, None)

        async with asyncio.timeout(30):
            assert await process.wait() == -9
    await coordinator.abandon_hold(grant)


async def test_who_leaves_without_having_entered_gets_a_token_that_nobody_else_has(
    coordinator: FileCoordinator,
) -> None:
    host = LocalHost()
    grant = await claimed(coordinator)
    directory, given_twice = slot_directory(grant.slot), grant.token
    await host.enter(directory, given_twice, None)
    await host.leave(directory, given_twice)

    slot = await leave(host, coordinator, grant)

    assert slot.token == grant.token == given_twice + 1
    with pytest.raises(FencedError):
        await host.leave(directory, given_twice)
    await coordinator.abandon_hold(grant)


async def test_a_fence_that_no_leases_can_have_raised_so_high_is_told_with_the_remedy(
    coordinator: FileCoordinator,
) -> None:
    host = LocalHost()
    grant = await claimed(coordinator)
    directory = slot_directory(grant.slot)
    Path(directory, "fence", f"{10**16:020d}").mkdir(parents=True)

    for attempt in (enter(host, coordinator, grant, None), leave(host, coordinator, grant)):
        with pytest.raises(CleanupError, match=r"delete .*/fence there, then repair_slot"):
            await attempt

    assert grant.token == 1
    shutil.rmtree(f"{directory}/fence")
    assert (await enter(host, coordinator, grant, None)).token == 1
    await coordinator.abandon_hold(grant)


async def test_who_has_entered_leaves_with_the_same_token(coordinator: FileCoordinator) -> None:
    host = LocalHost()
    grant = await claimed(coordinator)
    slot = await enter(host, coordinator, grant, None)

    assert (await leave(host, coordinator, grant)).token == slot.token
    await coordinator.abandon_hold(grant)
