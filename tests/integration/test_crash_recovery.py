"""A process dies amid its work; another recovers the slot, and nothing that was not pushed is lost."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from repopool_async import PoolManager, SalvageError, SalvageRecord, Slot, SlotState
from repopool_async.salvage import Salvage
from repopool_async.slot_allocator import broken
from tests import _workers
from tests._lessees import lessee, manager_of

WORK = r"""
printf 'committed\000bytes\r\n' > committed; git add committed; git commit -qm one
git checkout -qb side; git commit -q --allow-empty -m two; git checkout -q main
echo stashed > README.md; git stash push -qm 'the stash'
printf 'changed\000\377\r\n' > src/app.py; rm CHANGES.md; mkdir deep; printf 'new\000' > deep/untracked; echo no > x.log
"""

POISON = r"""
git config core.fsmonitor "touch $WITNESS; false"; git config core.hooksPath hooks
git config filter.evil.clean "touch $WITNESS; cat"; git config filter.evil.smudge "touch $WITNESS; cat"
git config filter.evil.process "touch $WITNESS"; echo '* filter=evil' > .gitattributes
mkdir hooks; for hook in post-checkout reference-transaction post-index-change; do
  printf '#!/bin/sh\ntouch %s\n' "$WITNESS" > hooks/$hook; chmod +x hooks/$hook; done
rm -rf .git/refs/tags .git/ORIG_HEAD .git/objects/aa; mkfifo .git/refs/tags .git/ORIG_HEAD .git/objects/aa pipe
echo "$SECRET/.git/objects" >> .git/objects/info/alternates; ln -s "$SECRET/.git/objects/pack" .git/objects/ab
"""


def git(path: Path | str, *args: str) -> bytes:
    return subprocess.run(["git", "-C", str(path), *args], check=True, capture_output=True, timeout=60).stdout


async def make_pool(directory: Path, origin: Path) -> None:
    async with manager_of(str(directory)) as manager:
        await manager.create_pool("web", str(origin))


async def recovered(directory: Path) -> list[SalvageRecord]:
    async with manager_of(str(directory)) as manager:
        await manager.recover()
        status = await manager.get_slot_status("workspace-web-slot1")
        assert status.state is SlotState.AVAILABLE
        assert await manager.check() == {}
        return await manager.list_salvage()


def assert_everything_is_there(directory: Path, record: SalvageRecord) -> None:
    kept = directory / "web/salvage.git"

    def content(commit: str, name: str) -> bytes:
        return git(kept, "cat-file", "blob", f"{commit}:{name}")

    assert content(record.commit, "committed") == b"committed\0bytes\r\n"
    assert content(record.commit, "src/app.py") == b"changed\0\xff\r\n"
    assert content(record.commit, "deep/untracked") == b"new\0"
    assert content(record.stash_commits[0], "README.md") == b"stashed\n"
    assert set(record.branches) == {"main", "side"}
    assert record.stash_messages == ("On main: the stash",)
    listed = git(kept, "ls-tree", "-r", "--name-only", record.commit).split()
    assert b"CHANGES.md" not in listed
    assert b"x.log" not in listed
    git(kept, "fsck", "--full", "--no-dangling")


async def test_a_killed_process_loses_nothing(tmp_path: Path, origin: Path) -> None:
    directory = tmp_path / "pools"
    await make_pool(directory, origin)
    with lessee("work", directory, WORK) as worker:
        slot_id, lease_id, _ = worker.expect("working").split()
        worker.kill()
    (record,) = await recovered(directory)
    assert (record.reason, record.slot_id, record.salvage_id) == ("crashed", slot_id, lease_id)
    assert record.metadata == {"who": "the lessee"}
    assert_everything_is_there(directory, record)


async def test_a_killed_process_that_poisoned_its_git_directory_loses_nothing_either(
    tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, witness, secret = tmp_path / "pools", tmp_path / "executed", tmp_path / "secret"
    secret.mkdir()
    git(secret, "init", "-q", "-b", "main")
    (secret / "key").write_text("hidden")
    git(secret, "add", ".")
    git(secret, "commit", "-qm", "secret")
    git(secret, "gc", "-q")
    await make_pool(directory, origin)
    monkeypatch.setenv("WITNESS", str(witness))
    monkeypatch.setenv("SECRET", str(secret))
    with lessee("work", directory, WORK + POISON) as worker:
        worker.expect("working")
        worker.kill()
    witness.unlink(missing_ok=True)  # the lessee's own git may have run it
    (record,) = await recovered(directory)
    assert not witness.exists()
    assert_everything_is_there(directory, record)
    assert any("pipe" in line for line in record.skipped)
    hidden = git(secret, "rev-parse", "HEAD:key").decode().strip()
    with pytest.raises(subprocess.CalledProcessError):
        git(directory / "web/salvage.git", "cat-file", "-t", hidden)


async def test_what_still_runs_in_a_dead_lease_is_ended_before_its_work_is_saved(tmp_path: Path, origin: Path) -> None:
    directory = tmp_path / "pools"
    await make_pool(directory, origin)
    busy = "(while :; do date +%N > busy; done) > /dev/null 2>&1 & until test -s busy; do :; done; setsid sleep 1000 &"
    with lessee("work", directory, f"{busy} true") as worker:
        path = worker.expect("working").split()[2]
        worker.kill()
    (record,) = await recovered(directory)
    assert record.untracked == 1
    assert not (Path(path) / "busy").exists()


async def test_an_ordinary_return_before_the_death_saves_nothing(tmp_path: Path, origin: Path) -> None:
    directory = tmp_path / "pools"
    await make_pool(directory, origin)
    with lessee("work", directory, WORK) as worker:
        worker.expect("working")
        worker.tell()
        worker.expect("returned")
        worker.kill()
    assert await recovered(directory) == []


async def test_a_recovery_that_dies_in_turn_is_finished_by_the_next(tmp_path: Path, origin: Path) -> None:
    """Cancelled at every point it can be, recovery never loses work nor saves it twice."""
    directory = tmp_path / "pools"
    await make_pool(directory, origin)
    with lessee("work", directory, WORK) as worker:
        worker.expect("working")
        worker.kill()
    for milliseconds in (0, 5, 15, 30, 50, 80, 120, 200):
        manager = manager_of(str(directory))
        await manager.open()
        recovery = asyncio.create_task(_recover(manager))
        await asyncio.sleep(milliseconds / 1000)
        recovery.cancel()
        await asyncio.wait([recovery])
        await manager.close(0)
    (record,) = await recovered(directory)
    assert record.reason == "crashed"
    assert_everything_is_there(directory, record)
    async with manager_of(str(directory)) as manager, manager.lease("web", timeout=30) as slot:
        await manager.restore_salvage(record.salvage_id, slot)
        assert (slot.path / "deep/untracked").read_bytes() == b"new\0"


async def _recover(manager: PoolManager) -> None:
    await manager.recover()


# -- whoever was to save the work dies as well, or fails ----------------------------------------------------------


async def left_work(directory: Path, slots: int = 1) -> list[str]:
    """Have a lessee leave work in every slot and vanish; return the leases' ids."""
    lease_ids = []
    async with manager_of(str(directory)) as manager:
        for _ in range(slots):
            slot = await manager.allocate_slot("web", timeout=30)
            assert slot is not None
            (slot.path / "precious").write_text(slot.lease_id)
            lease_ids.append(slot.lease_id)
        await manager.close(0)
    return lease_ids


async def assert_saved(manager: PoolManager, directory: Path, *lease_ids: str) -> None:
    records = {record.salvage_id: record for record in await manager.list_salvage()}
    assert set(records) >= set(lease_ids)
    for record in records.values():
        content = git(directory / "web/salvage.git", "cat-file", "blob", f"{record.commit}:precious")
        assert content.decode() == record.salvage_id


@pytest.fixture
async def manager(tmp_path: Path, origin: Path) -> AsyncIterator[PoolManager]:
    async with manager_of(str(tmp_path / "pools")) as manager:
        await manager.create_pool("web", str(origin))
        yield manager


async def test_a_surplus_slot_goes_only_once_its_work_is_saved(manager: PoolManager, tmp_path: Path) -> None:
    directory = tmp_path / "pools"
    await manager.add_slot("web")
    await left_work(directory, slots=2)
    coordinator = _workers.make_coordinator(directory)
    hold = await coordinator.recover_orphan("workspace-web-slot2")
    assert hold is not None
    assert hold.slot.lease is not None
    await coordinator.abandon_hold(hold)
    await (await manager.get_pool("web")).keeper.shrink_to(1)
    assert [slot.number for slot in await manager.list_slots("web")] == [1]
    await assert_saved(manager, directory, hold.slot.lease.lease_id)


async def test_opening_with_a_configuration_recovers_the_slots_of_its_pools(tmp_path: Path, origin: Path) -> None:
    directory = tmp_path / "pools"
    await make_pool(directory, origin)
    (lease_id,) = await left_work(directory)
    (tmp_path / "pools.yaml").write_text(
        f"workspaces_dir: {directory}\njanitor_interval: 3600\npools:\n  web: {{repo_url: {origin}}}\n"
    )
    async with PoolManager.from_config_file(tmp_path / "pools.yaml") as manager:
        await manager.wait_ready(60)
        await manager.wait_clean()
        assert await manager.available_count("web") == 1
        await assert_saved(manager, directory, lease_id)


async def test_a_quarantined_slot_keeps_its_work_until_that_is_saved(manager: PoolManager, tmp_path: Path) -> None:
    directory = tmp_path / "pools"
    (lease_id,) = await left_work(directory)
    coordinator = _workers.make_coordinator(directory)
    hold = await coordinator.recover_orphan("workspace-web-slot1")
    assert hold is not None
    await coordinator.finish(hold, broken(hold.slot, "could be neither saved nor moved"))
    keeper = (await manager.get_pool("web")).keeper
    assert await keeper.drop_quarantined_trees() == []
    await manager.repair_slot("workspace-web-slot1")
    await assert_saved(manager, directory, lease_id)


async def test_a_robbed_saver_that_fails_leaves_the_tree_to_the_robber(
    manager: PoolManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "pools"
    (lease_id,) = await left_work(directory)
    save, tries = Salvage.save, []

    async def robbed(salvage: Salvage, slot: Slot, **options: int) -> SalvageRecord | None:
        tries.append(slot.token)
        if len(tries) == 1:
            await _workers.make_coordinator(directory).force_unlock(slot.slot_id)
            raise SalvageError("its git was ended by who took over")
        return await save(salvage, slot, **options)

    monkeypatch.setattr(Salvage, "save", robbed)
    await manager.recover()
    await manager.recover()
    assert len(tries) == 2
    await assert_saved(manager, directory, lease_id)


async def test_locks_that_a_killed_git_left_where_work_is_saved_hinder_nobody(
    manager: PoolManager, tmp_path: Path
) -> None:
    directory = tmp_path / "pools"
    (first,) = await left_work(directory)
    await manager.recover()
    (lease_id,) = await left_work(directory)
    with _workers.worker("hold_lock", directory / "locks", "salvage-web") as holder:
        holder.expect("held")
    (directory / f"web/salvage.git/refs/salvage/{lease_id}.lock").touch()
    (directory / "web/salvage.git/packed-refs.lock").touch()
    await manager.recover()
    await assert_saved(manager, directory, first, lease_id)
    await manager.delete_salvage(first)
    await assert_saved(manager, directory, lease_id)
