"""Slots that share nothing (`isolation: full`): what a lessee writes reaches no other slot, and a tree stands alone."""

import os
import shutil
import subprocess
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from repopool_async import ConfigError, PoolConfig, PoolManager, SlotState

MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]

SLOT = "workspace-web-slot1"


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        yield manager


def git(path: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(path), *args], check=True, capture_output=True, text=True).stdout.strip()


def packs(tree: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (tree / ".git/objects/pack").glob("*.pack")}


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


async def rungs(manager: PoolManager, slot_id: str = SLOT) -> list[str]:
    return [entry.rung for entry in await manager.get_cleanup_log(slot_id) if entry.rung]


async def test_a_tree_works_where_nothing_but_the_slot_is_to_be_seen(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin), isolation="full")
    async with manager.lease("web") as slot:
        assert not (slot.path / ".git/objects/info/alternates").exists()
        moved = tmp_path / "container"
        shutil.copytree(slot.path, moved, symlinks=True)
        mirror = tmp_path / "pools/web/mirror.git"
        mirror.rename(tmp_path / "hidden")
        store = tmp_path / "pools/web/slots/slot1/store.git"
        store.rename(tmp_path / "hidden-store")
        try:
            for tree in (moved, slot.path):
                assert git(tree, "fsck", "--full") == ""
                git(tree, "checkout", "-q", "feature/x")
                git(tree, "log", "--all", "-p")
                git(tree, "commit", "-q", "--allow-empty", "-m", "more")
        finally:
            (tmp_path / "hidden").rename(mirror)
            (tmp_path / "hidden-store").rename(store)


async def test_no_file_of_a_slot_is_a_link_to_anything_else(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin), isolation="full", num_slots=2)
    for path in (tmp_path / "pools/web").rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert path.stat().st_nlink == 1, path


async def test_what_a_lessee_does_to_its_objects_stays_with_it(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin), isolation="full", num_slots=2)
    async with manager.lease("web") as slot:
        for pack in (slot.path / ".git/objects/pack").iterdir():
            overwrite(pack, b"garbage")
        blob = git(origin, "rev-parse", "feature/x:src/feature.py")
        loose = slot.path / ".git/objects" / blob[:2] / blob[2:]
        loose.parent.mkdir(exist_ok=True)
        loose.write_bytes(zlib.compress(b"blob 7\0forged\n"))
        (slot.path / "secret").write_bytes(b"secret")
        leaked = git(slot.path, "hash-object", "-w", "secret")
    await manager.wait_clean()
    assert await manager.check() == {}
    async with manager.lease("web", ref="feature/x") as first, manager.lease("web", ref="feature/x") as second:
        for slot in (first, second):
            assert git(slot.path, "fsck", "--full") == ""
            assert git(slot.path, "status", "--porcelain", "--ignored") == ""
            assert (slot.path / "src/feature.py").read_bytes() == b"X = 1\n"
            with pytest.raises(subprocess.CalledProcessError):
                git(slot.path, "cat-file", "-e", leaked)
    assert git(tmp_path / "pools/web/mirror.git", "fsck", "--full") == ""


async def test_after_a_fetch_only_what_is_new_is_added(
    manager: PoolManager, origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    await manager.create_pool("web", str(origin), isolation="full")
    store = tmp_path / "pools/web/slots/slot1/store.git"
    before = {path.name: path.stat().st_ino for path in (store / "objects/pack").iterdir()}
    in_tree = packs(tmp_path / "pools/web/slots/slot1/tree")
    new = make_commit(origin, "main", {"new": b"new\n"})
    async with manager.lease("web") as slot:
        assert git(slot.path, "rev-parse", "HEAD") == new
        after = {path.name: path.stat().st_ino for path in (store / "objects/pack").iterdir()}
        assert before.items() < after.items()
        assert len(packs(store.parent / "tree")) == len(in_tree) + 1
        assert in_tree.items() < packs(slot.path).items()  # the sealed copies stay, they are not copied again
        objects = git(slot.path, "count-objects", "-v")
        assert "count: 0" in objects
        assert git(slot.path, "fsck", "--full") == ""
    await manager.wait_clean()
    assert await rungs(manager) == []


async def test_a_forced_branch_and_a_bare_commit_are_brought_in(
    manager: PoolManager, origin: Path, make_commit: MakeCommit
) -> None:
    await manager.create_pool("web", str(origin), isolation="full")
    forced = git(origin, "rev-parse", "feature/x")
    git(origin, "branch", "-f", "feature/x", "main")
    hidden = make_commit(origin, "hidden", {"hidden": b"1\n"})
    git(origin, "update-ref", "refs/pull/7/head", hidden)
    git(origin, "update-ref", "-d", "refs/heads/hidden")
    for ref, commit in [
        (forced, forced),
        ("refs/pull/7/head", hidden),
        ("feature/x", git(origin, "rev-parse", "main")),
    ]:
        async with manager.lease("web", ref=ref) as slot:
            assert git(slot.path, "rev-parse", "HEAD") == commit
            assert git(slot.path, "fsck", "--full", "--no-dangling") == ""
        await manager.wait_clean()
    assert await rungs(manager) == []


async def test_a_slots_own_objects_are_taken_from_the_mirror_again_when_they_break(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin), isolation="full")
    mirror = os.stat(tmp_path / "pools/web/mirror.git").st_ino
    for pack in (tmp_path / "pools/web/slots/slot1/store.git/objects/pack").glob("*.pack"):
        os.truncate(pack, pack.stat().st_size // 2)
    async with manager.lease("web", ref="feature/x") as slot:
        assert (slot.path / "src/feature.py").read_bytes() == b"X = 1\n"
        assert git(slot.path, "fsck", "--full") == ""
    await manager.wait_clean()
    assert await rungs(manager) == ["reclone"]
    assert os.stat(tmp_path / "pools/web/mirror.git").st_ino == mirror


async def test_check_finds_broken_objects_of_a_slot(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin), isolation="full", num_slots=2)
    for pack in (tmp_path / "pools/web/slots/slot2/store.git/objects/pack").glob("*.pack"):
        data = bytearray(pack.read_bytes())
        data[40:60] = bytes(20)
        overwrite(pack, bytes(data))
    found = await manager.check()
    assert set(found) == {"workspace-web-slot2"}
    assert await manager.check() == {}


async def test_slots_leave_a_mirror_that_was_damaged_behind(
    manager: PoolManager, origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    make_commit(origin, "main", {"README.md": b"# As loose as it comes\n"})
    await manager.create_pool("web", str(origin), isolation="full")
    mirror = tmp_path / "pools/web/mirror.git"
    blob = git(mirror, "rev-parse", "main:README.md")
    overwrite(mirror / "objects" / blob[:2] / blob[2:], zlib.compress(b"blob 7\0forged\n"))
    found = await manager.check()
    assert set(found) == {"web/mirror.git", SLOT}
    assert await manager.check() == {}
    async with manager.lease("web") as slot:
        assert (slot.path / "README.md").read_bytes() == b"# As loose as it comes\n"


async def test_many_fetches_do_not_leave_many_packs(
    manager: PoolManager, origin: Path, tmp_path: Path, make_commit: MakeCommit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repopool_async.workspaces.own_objects._MANY_PACKS", 3)
    await manager.create_pool("web", str(origin), isolation="full")
    for number in range(6):
        make_commit(origin, "main", {"new": b"%d\n" % number})
        async with manager.lease("web") as slot:
            (slot.path / "dirt").write_text("")
        await manager.wait_clean()
    assert len(packs(tmp_path / "pools/web/slots/slot1/tree")) <= 4
    async with manager.lease("web") as slot:
        assert git(slot.path, "fsck", "--full") == ""
    assert (await manager.get_slot_status(SLOT)).state is not SlotState.ERROR


async def test_the_kind_of_isolation_is_for_ever(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin), isolation="full")
    with pytest.raises(ConfigError, match="isolation is full and stays so"):
        await manager.create_pool("web", str(origin))
    pool = await manager.create_pool("web", str(origin), isolation="full", num_slots=2)
    assert (await pool.summary()).total_slots == 2
