"""Slot locks and record locks: exclusion between tasks, threads and real processes, and what is left when they die."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from repopool_async._flock import is_flocked, lock_files
from repopool_async._identity import current_owner
from repopool_async.exceptions import LockTimeoutError, StoreError
from repopool_async.lock_manager import LockManager
from tests._workers import worker

SLOT = "workspace-web-slot1"


@pytest.fixture
def locks_dir(tmp_path: Path) -> Path:
    return tmp_path / "locks"


@pytest.fixture
def locks(locks_dir: Path) -> LockManager:
    return LockManager(locks_dir)


# Exclusion


async def test_a_lock_excludes_whoever_else_tries(locks: LockManager, locks_dir: Path) -> None:
    async with locks.acquire_slot_lock(SLOT) as held:
        assert held.slot_id == SLOT
        assert held.is_held
        assert held.is_current()
        assert await locks.try_acquire(SLOT) is None
        assert await LockManager(locks_dir).try_acquire(SLOT) is None
    assert repr(held) == f"<HeldLock {SLOT} [released]>"
    again = await LockManager(locks_dir).try_acquire(SLOT)
    assert again is not None
    await again.release()


async def test_locks_of_different_slots_do_not_meet(locks: LockManager) -> None:
    async with locks.acquire_slot_lock(SLOT), locks.acquire_slot_lock("workspace-web-slot2", timeout=0):
        assert await locks.is_locked("workspace-web-slot2")


async def test_lock_is_released_when_the_block_raises(locks: LockManager) -> None:
    with pytest.raises(RuntimeError, match="body"):
        async with locks.acquire_slot_lock(SLOT):
            raise RuntimeError("body")
    assert not await locks.is_locked(SLOT)


async def test_a_second_release_does_nothing(locks: LockManager) -> None:
    first = await locks.try_acquire(SLOT)
    assert first is not None
    await first.release()
    second = await locks.try_acquire(SLOT)
    assert second is not None
    await first.release()
    first.release_sync()
    assert await locks.is_locked(SLOT)
    assert second.is_current()
    await second.release()


async def test_a_lock_that_nobody_has_any_more_is_free(locks: LockManager) -> None:
    held = locks.try_acquire_sync(SLOT)
    assert held is not None
    del held
    assert not locks.is_locked_sync(SLOT)
    assert await locks.detect_stale_locks() == []


async def test_releases_at_the_same_moment_release_once(locks: LockManager) -> None:
    for _ in range(50):
        held = await locks.try_acquire(SLOT)
        assert held is not None
        await asyncio.gather(*(held.release() for _ in range(8)))
        assert not await locks.is_locked(SLOT)


async def test_a_lock_may_be_released_from_another_thread(locks: LockManager) -> None:
    held = locks.try_acquire_sync(SLOT)
    assert held is not None
    await asyncio.to_thread(held.release_sync)
    assert not await locks.is_locked(SLOT)


async def test_threads_exclude_each_other(locks_dir: Path) -> None:
    inside: list[int] = []
    most: list[int] = []
    given: list[int] = []

    def contend(number: int) -> None:
        manager = LockManager(locks_dir)
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            held = manager.try_acquire_sync(SLOT)
            if held is not None:
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)
                given.append(number)
                held.release_sync()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(contend, range(4)))
    assert max(most) == 1
    assert len(given) > 20


async def test_lock_files_are_never_unlinked(locks: LockManager, locks_dir: Path) -> None:
    async with locks.acquire_slot_lock(SLOT):
        inode = (locks_dir / f"{SLOT}.lock").stat().st_ino
    assert (locks_dir / f"{SLOT}.lock").stat().st_ino == inode
    assert locks.known_ids_sync() == [SLOT]


async def test_another_process_excludes_until_it_lets_go(locks: LockManager, locks_dir: Path) -> None:
    with worker("hold_lock", locks_dir, SLOT) as other:
        other.expect("held")
        assert await locks.is_locked(SLOT)
        assert await locks.try_acquire(SLOT) is None
        other.tell()
        other.expect("released")
        async with locks.acquire_slot_lock(SLOT, timeout=0):
            pass


async def test_the_lock_of_a_killed_process_is_free(locks: LockManager, locks_dir: Path) -> None:
    with worker("hold_lock", locks_dir, SLOT) as other:
        other.expect("held")
        other.kill()
        async with locks.acquire_slot_lock(SLOT, timeout=0) as held:
            assert held.is_current()


# Waiting


@pytest.mark.parametrize("timeout", [0, 0.05])
async def test_waiting_ends_with_the_timeout_and_names_the_holder(locks: LockManager, timeout: float) -> None:
    async with locks.acquire_slot_lock(SLOT):
        with pytest.raises(LockTimeoutError, match=rf"{SLOT}.*process {os.getpid()} on") as caught:
            async with locks.acquire_slot_lock(SLOT, timeout=timeout):
                pass
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.slot_id == SLOT


async def test_waiting_for_another_process_ends_with_the_timeout(locks: LockManager, locks_dir: Path) -> None:
    with worker("hold_lock", locks_dir, SLOT) as other:
        other.expect("held")
        for timeout in (0, 0.02):
            with pytest.raises(LockTimeoutError, match=str(other.process.pid)):
                async with locks.acquire_slot_lock(SLOT, timeout=timeout):
                    pass


async def test_a_waiter_gets_the_lock_that_another_process_releases(locks: LockManager, locks_dir: Path) -> None:
    with worker("hold_lock", locks_dir, SLOT) as other:
        other.expect("held")

        async def wait() -> bool:
            async with locks.acquire_slot_lock(SLOT, timeout=None) as held:
                return held.is_current()

        waiter = asyncio.create_task(wait())
        await asyncio.sleep(0)
        other.tell()
        assert await waiter


async def test_waiters_of_one_process_are_served_in_order_and_at_once(locks_dir: Path) -> None:
    locks = LockManager(locks_dir, poll=(60.0, 60.0))  # who polled would come too late
    served: list[int] = []

    async def wait(number: int) -> None:
        async with locks.acquire_slot_lock(SLOT):
            served.append(number)

    async with asyncio.timeout(10):
        async with locks.acquire_slot_lock(SLOT):
            waiters = [asyncio.create_task(wait(number)) for number in range(10)]
            await asyncio.sleep(0)
        await asyncio.gather(*waiters)
    assert served == list(range(10))


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancelled_waiter_holds_nothing_and_stops_nobody(locks: LockManager, times: int) -> None:
    async def wait() -> None:
        async with locks.acquire_slot_lock(SLOT):
            pass

    async with locks.acquire_slot_lock(SLOT):
        waiters = [asyncio.create_task(wait()) for _ in range(3)]
        await asyncio.sleep(0)
        for _ in range(times):
            waiters[0].cancel()
            waiters[1].cancel()
            await asyncio.sleep(0)
    done = await asyncio.gather(*waiters, return_exceptions=True)
    assert [isinstance(outcome, asyncio.CancelledError) for outcome in done] == [True, True, False]
    assert not await locks.is_locked(SLOT)


@pytest.mark.parametrize("turns", range(12))
async def test_cancelled_at_any_moment_an_attempt_leaves_no_lock(locks: LockManager, turns: int) -> None:
    for _ in range(10):
        attempt = asyncio.create_task(locks.try_acquire(SLOT))
        for _ in range(turns):
            await asyncio.sleep(0)
        attempt.cancel()
        try:
            held = await attempt
        except asyncio.CancelledError:
            assert not await locks.is_locked(SLOT)
        else:
            assert held is not None
            await held.release()


async def test_a_manager_serves_one_event_loop_after_the_other(locks: LockManager) -> None:
    async def contend() -> None:
        async def hold() -> None:
            async with locks.acquire_slot_lock(SLOT, timeout=10):
                await asyncio.sleep(0)

        await asyncio.gather(*(hold() for _ in range(5)))

    for _ in range(3):
        await asyncio.to_thread(asyncio.run, contend())


# Asking


async def test_state_of_a_lock_can_be_asked(locks: LockManager) -> None:
    assert not await locks.is_locked(SLOT)
    async with locks.acquire_slot_lock(SLOT):
        assert await locks.is_locked(SLOT)
        assert locks.holder_sync(SLOT) == current_owner()
    assert not await locks.is_locked(SLOT)
    assert locks.holder_sync(SLOT) is None


async def test_asking_disturbs_nobody(locks: LockManager) -> None:
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            locks.is_locked_sync(SLOT)

    with ThreadPoolExecutor(2) as pool:
        askers = [pool.submit(ask) for _ in range(2)]
        try:
            for _ in range(300):
                held = locks.try_acquire_sync(SLOT)
                assert held is not None
                held.release_sync()
        finally:
            is_over.set()
        for asker in askers:
            asker.result()


# Taking away


async def test_a_free_lock_cannot_be_forced(locks: LockManager) -> None:
    assert not await locks.force_unlock(SLOT)
    async with locks.acquire_slot_lock(SLOT):
        pass
    assert not await locks.force_unlock(SLOT)


async def test_after_forcing_the_old_holder_is_not_current_and_the_lock_is_free(
    locks: LockManager, locks_dir: Path
) -> None:
    with worker("hold_lock", locks_dir, SLOT) as other:
        other.expect("held")
        assert await locks.force_unlock(SLOT)
        async with locks.acquire_slot_lock(SLOT, timeout=0) as held:
            other.tell()
            other.expect("released")  # what it releases is not ours
            assert held.is_current()
            assert await locks.is_locked(SLOT)


async def test_the_robbed_holder_can_tell(locks: LockManager) -> None:
    held = await locks.try_acquire(SLOT)
    assert held is not None
    assert await locks.force_unlock(SLOT)
    assert held.is_held
    assert not held.is_current()
    await held.release()


async def test_a_waiter_survives_that_the_file_is_replaced(locks: LockManager, locks_dir: Path) -> None:
    held = await LockManager(locks_dir).try_acquire(SLOT)

    async def wait() -> bool:
        async with locks.acquire_slot_lock(SLOT, timeout=None) as mine:
            return mine.is_current()

    waiter = asyncio.create_task(wait())
    await asyncio.sleep(0.005)
    assert await locks.force_unlock(SLOT)
    assert await waiter
    assert held is not None
    await held.release()


async def test_a_lock_can_be_seized(locks: LockManager) -> None:
    robbed = await locks.try_acquire(SLOT)
    assert robbed is not None
    with locks.record_lock_sync(SLOT):
        seized = locks.seize_sync(SLOT)
    assert seized.is_current()
    assert not robbed.is_current()
    await robbed.release()
    assert await locks.try_acquire(SLOT) is None
    await seized.release()
    assert not await locks.is_locked(SLOT)


async def test_a_lock_file_that_somebody_removed_excludes_again(locks: LockManager, locks_dir: Path) -> None:
    held = await locks.try_acquire(SLOT)
    assert held is not None
    (locks_dir / f"{SLOT}.lock").unlink()
    assert not held.is_current()
    again = await locks.try_acquire(SLOT)
    assert again is not None
    assert again.is_current()
    await held.release()
    assert again.is_current()
    await again.release()


# What the dead leave


async def test_a_dead_holders_signature_is_stale_until_cleaned_up(locks: LockManager, locks_dir: Path) -> None:
    with worker("hold_lock", locks_dir, SLOT) as other:
        other.expect("held")
        assert await locks.detect_stale_locks() == []
        other.kill()
        found = await locks.detect_stale_locks()
        assert [stale.slot_id for stale in found] == [SLOT]
        assert found[0].owner is not None
        assert found[0].owner.pid == other.process.pid
        assert found[0].path == str(locks_dir / f"{SLOT}.lock")
    assert [stale.slot_id for stale in await locks.cleanup_stale_locks()] == [SLOT]
    assert await locks.detect_stale_locks() == []
    assert not await locks.is_locked(SLOT)


async def test_a_released_lock_is_not_stale(locks: LockManager) -> None:
    async with locks.acquire_slot_lock(SLOT):
        assert await locks.detect_stale_locks() == []
    assert await locks.detect_stale_locks() == []


async def test_only_old_stale_locks_where_an_age_is_given(locks: LockManager, locks_dir: Path) -> None:
    with worker("hold_lock", locks_dir, SLOT) as other:
        other.expect("held")
        other.kill()
    assert await locks.detect_stale_locks(older_than_hours=1) == []
    assert await locks.cleanup_stale_locks(older_than_hours=1) == []
    two_hours_ago = time.time() - 7200
    os.utime(locks_dir / f"{SLOT}.lock", (two_hours_ago, two_hours_ago))
    (stale,) = await locks.detect_stale_locks(older_than_hours=1)
    assert stale.age_seconds == pytest.approx(7200, abs=60)
    assert len(await locks.cleanup_stale_locks(older_than_hours=1)) == 1


async def test_an_unreadable_signature_is_stale_and_nobodys(locks: LockManager, locks_dir: Path) -> None:
    locks_dir.mkdir()
    (locks_dir / f"{SLOT}.lock").write_bytes(b"\xff{ not json")
    (stale,) = await locks.detect_stale_locks()
    assert stale.owner is None
    async with locks.acquire_slot_lock(SLOT):
        assert locks.holder_sync(SLOT) == current_owner()
    assert await locks.detect_stale_locks() == []


async def test_cleaning_up_removes_what_interrupted_forcing_left(locks: LockManager, locks_dir: Path) -> None:
    locks_dir.mkdir()
    old, new = locks_dir / f".{SLOT}.1-1.fresh", locks_dir / f".{SLOT}.1-2.fresh"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    assert await locks.cleanup_stale_locks() == []
    assert not old.exists()
    assert new.exists()


async def test_there_is_nothing_stale_where_nothing_was_locked(locks: LockManager) -> None:
    assert await locks.detect_stale_locks() == []
    assert await locks.cleanup_stale_locks() == []
    assert locks.known_ids_sync() == []


# Forking


async def test_a_forked_child_neither_keeps_nor_unlocks_the_parents_lock(locks: LockManager, locks_dir: Path) -> None:
    with worker("fork_with_lock", locks_dir, SLOT) as parent:
        said = sorted(parent.process.stdout.readline().split() for _ in range(3))  # type: ignore[union-attr]
        (_, child, is_held_by_child) = said[0]
        try:
            assert said[1:] == [["dropped"], ["parent", "True", "True"]]
            assert is_held_by_child == "False"
            assert await locks.is_locked(SLOT), "the child's release must not unlock the parent's"
            parent.kill()
            assert Path(f"/proc/{child}").exists()
            async with locks.acquire_slot_lock(SLOT, timeout=0):
                pass
        finally:
            os.kill(int(child), signal.SIGKILL)


async def test_a_child_forked_amid_a_change_keeps_no_record_lock(locks: LockManager, locks_dir: Path) -> None:
    with worker("fork_with_record_lock", locks_dir, SLOT) as parent:
        child = int(parent.expect("child"))
        try:
            parent.kill()  # in the middle of it

            def change() -> bool:
                with locks.record_lock_sync(SLOT):
                    return True

            assert await asyncio.to_thread(change)
        finally:
            os.kill(child, signal.SIGKILL)


async def test_a_parent_that_forked_amid_a_change_finishes_it(locks: LockManager, locks_dir: Path) -> None:
    with worker("fork_with_record_lock", locks_dir, SLOT) as parent:
        child = int(parent.expect("child"))
        try:
            parent.tell()
            parent.expect("left")
            with locks.record_lock_sync(SLOT):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


async def test_a_copy_of_its_open_file_keeps_no_record_lock(locks: LockManager) -> None:
    before = set(lock_files._open)
    with locks.record_lock_sync(SLOT):
        (descriptor,) = lock_files._open - before
        copy = os.dup(descriptor)  # as a process has that was being started in this instant
    try:
        assert not is_flocked(os.readlink(f"/proc/self/fd/{copy}"))
    finally:
        os.close(copy)


# Record locks


async def test_changes_under_the_record_lock_are_not_lost(locks_dir: Path, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count() -> None:
        manager = LockManager(locks_dir)
        for _ in range(50):
            with manager.record_lock_sync(SLOT):
                counter.write_text(str(int(counter.read_text()) + 1))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(count) for _ in range(4)]:
            done.result()
    assert counter.read_text() == "200"


async def test_record_and_slot_lock_do_not_meet(locks: LockManager) -> None:
    async with locks.acquire_slot_lock(SLOT):
        with locks.record_lock_sync(SLOT):
            assert await locks.is_locked(SLOT)
    with locks.record_lock_sync(SLOT):
        assert not locks.is_locked_sync(SLOT)


async def test_record_lock_is_free_after_an_error(locks: LockManager) -> None:
    for _ in range(3):
        with pytest.raises(RuntimeError), locks.record_lock_sync(SLOT):
            raise RuntimeError


async def test_a_stuck_change_is_reported_not_waited_for_for_ever(locks: LockManager) -> None:
    with (
        locks.record_lock_sync(SLOT),
        pytest.raises(LockTimeoutError, match=rf"{SLOT}: its record was locked for 0.01 s"),
        locks.record_lock_sync(SLOT, patience=0.01),
    ):
        pass


# Refusals


@pytest.mark.parametrize("name", ["", "../etc/passwd", "a/b", ".hidden", "a\0b", "x.record", "x" * 300, "web\n"])
async def test_what_can_be_no_file_name_is_refused(locks: LockManager, name: str) -> None:
    with pytest.raises(ValueError, match="lock's name"):
        await locks.is_locked(name)
    with pytest.raises(ValueError, match="lock's name"):
        async with locks.acquire_slot_lock(name):
            pass


async def test_a_directory_that_cannot_be_made_is_told_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    locks = LockManager(tmp_path / "file" / "locks")
    for attempt in (locks.try_acquire(SLOT), locks.is_locked(SLOT), locks.detect_stale_locks()):
        with pytest.raises(StoreError, match=r"lock file .*/file/locks.*write"):
            await attempt
    with pytest.raises(StoreError), locks.record_lock_sync(SLOT):
        pass


async def test_a_link_in_place_of_a_lock_file_is_not_followed(
    locks: LockManager, locks_dir: Path, tmp_path: Path
) -> None:
    locks_dir.mkdir()
    (tmp_path / "precious").write_text("untouched")
    (locks_dir / f"{SLOT}.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(StoreError):
        await locks.try_acquire(SLOT)
    assert (tmp_path / "precious").read_text() == "untouched"


async def test_no_descriptor_is_left_open(locks: LockManager) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async with locks.acquire_slot_lock(SLOT):
        await locks.try_acquire(SLOT)
    before = count()
    for _ in range(20):
        async with locks.acquire_slot_lock(SLOT):
            await locks.try_acquire(SLOT)
            await locks.is_locked(SLOT)
            await locks.detect_stale_locks()
            with contextlib.suppress(LockTimeoutError):
                async with locks.acquire_slot_lock(SLOT, timeout=0):
                    pass
        with locks.record_lock_sync(SLOT):
            pass
    assert count() <= before
