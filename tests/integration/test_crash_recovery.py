"""A process dies amid its work; another recovers the slot, and nothing that was not pushed is lost."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from repopool_async import PoolManager, SalvageRecord, SlotState
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
