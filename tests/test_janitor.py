"""What the janitor puts right, on real slots: damage, rubbish, stale records, too much disk, leases that never end."""

import asyncio
import logging
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from repopool_async import (
    CleanupError,
    Event,
    HostSpec,
    LeaseLostError,
    LockManager,
    PoolConfig,
    PoolManager,
    PoolTimeoutError,
    Slot,
    SlotState,
    housekeeping,
)
from repopool_async.housekeeping import left_overs


class Watcher:
    """Collects the events of a manager."""

    def __init__(self, manager: PoolManager) -> None:
        self.events: list[Event] = []
        self._came = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._collect(manager))

    async def _collect(self, manager: PoolManager) -> None:
        async for event in manager.events():
            self.events.append(event)
            self._came.set()

    async def first(self, kind: str) -> Event:
        async with asyncio.timeout(30):
            while True:
                for event in self.events:
                    if event.kind == kind:
                        return event
                self._came.clear()
                await self._came.wait()

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600)) as manager:
        yield manager


@pytest.fixture
async def told(manager: PoolManager) -> AsyncIterator[Watcher]:
    watcher = Watcher(manager)
    await asyncio.sleep(0)
    yield watcher
    await watcher.end()


@pytest.fixture
def _everything_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "TEMPORARY_SECONDS", -1.0)
    monkeypatch.setattr(housekeeping, "CORRUPT_DAYS", -1.0)


# -- left-overs --------------------------------------------------------------------------------------------------


def rubbish(pool: Path) -> list[Path]:
    """Make what killed processes leave, and return it."""
    temporary = ".repopool-1-0-0123456789abcdef.tmp"
    files = [pool / temporary, pool / "mirror.git" / temporary, pool / "slots/slot1" / temporary]
    files += [pool / "pool.json.corrupt-20240101T000000.000000Z"]
    files += [pool / "slots/slot1/slot.json.corrupt-20240101T000000.000000Z"]
    directories = [pool / "mirror.git.tmp-1-abcd", pool / "slots/slot1/tree.new-abcd"]
    for file in files:
        file.write_text("")
    for directory in directories:
        directory.mkdir()
        (directory / "file").write_text("")
    return sorted(files + directories)


@pytest.mark.usefixtures("_everything_is_old")
async def test_what_killed_processes_left_is_deleted(
    manager: PoolManager, told: Watcher, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin))
    left = rubbish(tmp_path / "pools/web")
    report = await manager.recover()
    assert sorted(map(Path, report.removed)) == left
    assert not any(path.exists() for path in left)
    assert (await told.first("janitor.removed")).fields["path"] in report.removed
    assert sorted((await told.first("janitor.swept")).fields["removed"]) == sorted(report.removed)
    assert (await manager.recover()).removed == []
    async with manager.lease("web"):
        pass


async def test_what_is_young_stays(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin))
    left = rubbish(tmp_path / "pools/web")
    assert (await manager.recover()).removed == []
    assert all(path.exists() for path in left)


@pytest.mark.usefixtures("_everything_is_old")
async def test_what_somebody_is_making_stays(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin))
    directory = tmp_path / "pools/web/mirror.git.tmp-1-abcd"
    directory.mkdir()
    async with LockManager(tmp_path / "pools/locks").acquire_slot_lock("mirror-web"):
        assert (await manager.recover()).removed == []
    assert (await manager.recover()).removed == [str(directory)]


@pytest.mark.usefixtures("_everything_is_old")
def test_a_record_set_aside_stays_where_it_is_all_that_tells_of_the_pool(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web/pool.json.corrupt-20240101T000000.000000Z").write_text("")
    assert left_overs(str(tmp_path), "web") == []


# -- stale records -----------------------------------------------------------------------------------------------


async def test_signatures_of_dead_lock_holders_are_erased(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin))
    program = (
        "import os, sys; from repopool_async import LockManager\n"
        "held = LockManager(sys.argv[1]).try_acquire_sync('workspace-web-slot1'); assert held; os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "pools/locks")], check=True, timeout=60)
    report = await manager.recover()
    assert [stale.slot_id for stale in report.stale_locks] == ["workspace-web-slot1"]
    assert (await manager.recover()).stale_locks == []


async def test_only_one_janitor_works_at_a_time(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin))
    async with LockManager(tmp_path / "pools/locks").acquire_slot_lock("janitor"):
        report = await manager._janitor.sweep(is_asked=False)
    assert not report.is_janitor
    assert (await manager.recover()).is_janitor


@pytest.mark.usefixtures("_everything_is_old")
async def test_a_machine_is_swept_though_another_machines_janitor_never_rests(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin))
    left = rubbish(tmp_path / "pools/web")
    async with LockManager(tmp_path / "pools/locks").acquire_slot_lock("janitor"):
        report = await manager._janitor.sweep(is_asked=False)
    assert not report.is_janitor
    assert sorted(map(Path, report.removed)) == left


# -- damaged slots -----------------------------------------------------------------------------------------------


class Rejecting:
    """A `check` callback that rejects slots while it is told to."""

    def __init__(self) -> None:
        self.is_rejecting = True

    def __call__(self, slot: Slot) -> None:
        if self.is_rejecting:
            raise RuntimeError("not this one")


async def quarantined(manager: PoolManager, origin: Path, **options: Any) -> None:
    await manager.create_pool("web", str(origin), **options)
    with pytest.raises((CleanupError, Exception), match="not this one"):
        await manager.allocate_slot("web", timeout=5)
    assert [slot.state for slot in await manager.list_slots("web")] == [SlotState.ERROR]


async def test_a_quarantined_slot_is_repaired(tmp_path: Path, origin: Path) -> None:
    check = Rejecting()
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600), check=check) as manager:
        told = Watcher(manager)
        await quarantined(manager, origin)
        check.is_rejecting = False
        report = await manager.recover()
        assert report == []
        assert report.repairing == ["workspace-web-slot1"]
        event = await told.first("slot.repairing")
        assert "not this one" in event.fields["reason"]
        async with manager.lease("web") as slot:
            assert slot.branch == "main"
    await told.end()


async def test_repairs_are_tried_again_after_a_growing_pause(tmp_path: Path, origin: Path) -> None:
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600), check=Rejecting()) as manager:
        await quarantined(manager, origin)
        janitor = manager._janitor
        assert (await janitor.sweep(is_asked=False)).repairing == ["workspace-web-slot1"]
        await manager.wait_clean()
        with pytest.raises(Exception, match="not this one"):
            await manager.allocate_slot("web", timeout=5)
        assert (await janitor.sweep(is_asked=False)).repairing == []
        (tries, first) = janitor._repairs["workspace-web-slot1"]
        janitor._repairs["workspace-web-slot1"] = (tries, 0.0)
        assert (await janitor.sweep(is_asked=False)).repairing == ["workspace-web-slot1"]
        assert janitor._repairs["workspace-web-slot1"][1] > first + 50
        await manager.wait_clean()


async def test_repairs_can_be_left_to_people(tmp_path: Path, origin: Path) -> None:
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600), check=Rejecting()) as manager:
        await quarantined(manager, origin, auto_repair=False)
        assert (await manager.recover()).repairing == []


# -- disk --------------------------------------------------------------------------------------------------------


async def test_over_its_disk_limit_a_pool_frees_what_may_go_and_never_a_leased_slot(
    tmp_path: Path, origin: Path
) -> None:
    check = Rejecting()
    check.is_rejecting = False
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600), check=check) as manager:
        told = Watcher(manager)
        await manager.create_pool("web", str(origin), num_slots=2, disk_limit="1KiB")
        trash = tmp_path / "pools/web/trash/old"
        async with manager.lease("web") as slot:
            check.is_rejecting = True
            assert await manager.allocate_slot("web") is None
            trash.mkdir(parents=True)
            report = await manager.recover()
            assert report.over_limit == ["web"]
            assert report.repairing == []
            assert not trash.exists()
            (broken,) = [one for one in await manager.list_slots("web") if one.state is SlotState.ERROR]
            assert not Path(broken.path).exists()
            await told.first("slot.quarantined")
            assert (slot.path / "README.md").exists()
        over = [event.fields for event in told.events if event.kind == "pool.over_disk_limit"]  # also while it was made
        assert any(fields["bytes"] > fields["bytes_after"] > fields["limit"] == 1024 for fields in over)
        check.is_rejecting = False
        await manager.create_pool("web", str(origin), num_slots=2, disk_limit="10GiB")
        report = await manager.recover()
        assert (report.over_limit, report.repairing) == ([], [broken.slot_id])
        assert await manager.available_count("web") == 2
    await told.end()


async def test_a_pool_without_a_directory_on_one_of_its_hosts_has_its_disk_limit(tmp_path: Path, origin: Path) -> None:
    hosts = [HostSpec(name, address="local", workspaces_dir=str(tmp_path / name)) for name in ("a", "b")]
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600), hosts=hosts) as manager:
        await manager.create_pool("web", str(origin), num_slots=1, hosts=["a", "b"], disk_limit="1KiB")
        (slot,) = await manager.list_slots("web")
        shutil.rmtree(tmp_path / ("b" if slot.host_id == "a" else "a") / "web")
        assert (await manager.recover()).over_limit == ["web"]


# -- leases that never end ---------------------------------------------------------------------------------------


async def test_a_lease_that_is_too_long_is_taken_away(
    manager: PoolManager, told: Watcher, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin))
    slot = await manager.allocate_slot("web")
    assert slot is not None
    async with slot.open_process("sleep", "600") as process, asyncio.timeout(30):
        await manager.create_pool("web", str(origin), max_lease_seconds=0.001)
        await slot.lost.wait()
        assert await process.wait() != 0
    assert (await told.first("lease.expired")).fields["lease_id"] == slot.lease_id
    with pytest.raises(LeaseLostError):
        await manager.release_slot(slot)
    await manager.wait_clean()
    assert await manager.available_count("web") == 1
    assert [record.event for record in await manager.get_allocation_history(slot.slot_id)][:2] == [
        "allocated",
        "expired",
    ]


async def test_another_processs_lease_that_is_too_long_is_taken_away_by_the_janitor(
    manager: PoolManager, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await manager.create_pool("web", str(origin))
    async with PoolManager(manager.config) as other:
        slot = await other.allocate_slot("web")
        assert slot is not None
        await manager.create_pool("web", str(origin), max_lease_seconds=0.001)
        monkeypatch.setattr("repopool_async.janitor._LEASE_CHECK_SECONDS", 0.0)
        report = await manager.recover()
        assert report.expired == [slot.slot_id]
        async with asyncio.timeout(30):
            await slot.lost.wait()
        with pytest.raises(LeaseLostError):
            await other.release_slot(slot)
        assert await manager.available_count("web") == 1


async def test_a_lease_given_back_in_time_is_left_alone(manager: PoolManager, told: Watcher, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), max_lease_seconds=600)
    async with manager.lease("web") as slot:
        await pool.watch.check_ages()
        assert not slot.lost.is_set()
    await manager.wait_clean()
    assert not [event for event in told.events if event.kind == "lease.expired"]


async def take_for_long(manager: PoolManager) -> Any:
    return await manager.allocate_slot("web")


async def test_a_leak_is_told_once_with_the_stack_that_took_the_lease(
    manager: PoolManager, told: Watcher, origin: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = await manager.create_pool("web", str(origin), leak_warning=0.001)
    with caplog.at_level(logging.WARNING, "repopool"):
        slot = await take_for_long(manager)
        event = await told.first("lease.leak")
        await pool.watch.check_ages()
    assert "take_for_long" in event.fields["stack"]
    assert "await manager.allocate_slot" in event.fields["stack"]
    assert Path(__file__).name in event.fields["where"]
    assert caplog.text.count(f"lease {slot.lease_id} is") == 1
    assert "take_for_long" in caplog.text
    await manager.release_slot(slot)


# -- who waits for whom ------------------------------------------------------------------------------------------


async def test_a_task_that_waits_for_itself_is_told_so(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin), fetch_max_age=3600)
    async with manager.lease("web") as slot:
        with pytest.raises(PoolTimeoutError, match="it waits for itself") as timed_out:
            async with manager.lease("web", timeout=0):
                pass
    error = timed_out.value
    assert error.is_self_wait
    assert f"this task already holds {slot.slot_id} (taken at {__file__}:" in str(error)
    (holder,) = error.holders
    task = asyncio.current_task()
    assert task is not None
    assert f"by task {task.get_name()!r} at {__file__}:" in holder
    assert "leased since" in holder


async def test_another_tasks_lease_is_told_with_its_place_but_is_no_deadlock(
    manager: PoolManager, origin: Path
) -> None:
    await manager.create_pool("web", str(origin), fetch_max_age=3600)
    began, told = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with manager.lease("web"):
            began.set()
            await told.wait()

    holder = asyncio.get_running_loop().create_task(hold(), name="the other one")
    await began.wait()
    with pytest.raises(PoolTimeoutError, match=r"by task 'the other one'.*hold") as timed_out:
        async with manager.lease("web", timeout=0):
            pass
    assert not timed_out.value.is_self_wait
    told.set()
    await holder


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_tasks_that_wait_for_each_other_are_told_even_without_a_time_out(
    manager: PoolManager, told: Watcher, origin: Path
) -> None:
    await manager.create_pool("web", str(origin), num_slots=2, fetch_max_age=3600)
    have_one: list[str] = []

    async def take_two(timeout: float | None) -> None:
        async with manager.lease("web") as first:
            have_one.append(first.slot_id)
            await until(lambda: len(have_one) == 2)
            async with manager.lease("web", timeout=timeout):
                pass

    tasks = [asyncio.get_running_loop().create_task(take_two(timeout)) for timeout in (None, None)]
    event = await told.first("lease.deadlock")
    assert "wait" in event.fields["reason"]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await manager.wait_clean()
    assert await manager.available_count("web") == 2
