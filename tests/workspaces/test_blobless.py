"""Pools whose mirror leaves file contents at the remote.

That a slot is what `git clone --filter=blob:none` makes is in `tests/contamination`.
"""

import logging
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from repopool_async import ConfigError, GitOperationError, PoolConfig, PoolManager, PoolOptions
from tests.conftest import MakeCommit
from tests.workspaces.test_submodules import GITLINK, World, module


def git(tree: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=tree, check=True, capture_output=True).stdout.decode().strip()


@pytest.fixture
def remote(origin: Path, make_commit: MakeCommit) -> Path:
    git(origin, "config", "uploadpack.allowFilter", "true")
    make_commit(origin, "main", {f"many/{number}": b"%d\n" % number for number in range(50)})
    make_commit(origin, "main", {"README.md": b"# Changed\n", "many/0": b"other\n"})
    return origin


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        yield manager


async def make_pool(manager: PoolManager, remote: Path, **options: Any) -> Path:
    """Make a pool and return its mirror."""
    wanted = {"history": "blobless", "cleanup": "inline", **options}
    await manager.create_pool("web", str(remote), **wanted)
    return Path(manager.config.workspaces_dir, "web/mirror.git")


def contents(mirror: Path) -> set[str]:
    """Return the ids of the file contents that a mirror has."""
    listing = git(mirror, "cat-file", "--batch-all-objects", "--batch-check")
    return {line.split()[0] for line in listing.splitlines() if line.split()[1] == "blob"}


def packs(mirror: Path) -> int:
    return len(list(mirror.glob("objects/pack/*.pack")))


async def test_what_a_check_out_needs_is_fetched_at_once_and_nothing_else(manager: PoolManager, remote: Path) -> None:
    mirror = await make_pool(manager, remote)
    old = git(remote, "rev-parse", "main~1:README.md")
    assert len(contents(mirror)) == 55
    assert old not in contents(mirror)
    assert packs(mirror) == 2
    async with manager.lease("web", ref="v1.0") as slot:
        assert (slot.path / "README.md").read_text() == "# A small repository\n"
    assert old in contents(mirror)
    assert packs(mirror) == 3
    assert not await manager.check()


async def test_a_lessee_has_the_history_and_fetches_old_contents_as_it_needs_them(
    manager: PoolManager, remote: Path
) -> None:
    mirror = await make_pool(manager, remote)
    async with manager.lease("web") as slot:
        assert len(git(slot.path, "log", "--format=%h", "--", "README.md").split()) == 2
        assert git(slot.path, "show", "HEAD~1:README.md") == "# A small repository"
        assert git(slot.path, "fsck", "--no-dangling") == ""
        assert git(slot.path, "status", "--porcelain") == ""
    assert len(contents(mirror)) == 55


async def test_without_the_remote_what_was_fetched_still_works_and_the_rest_says_so(
    manager: PoolManager, remote: Path, tmp_path: Path
) -> None:
    await make_pool(manager, remote, fetch_on_allocate=False, fetch_attempts=1)
    remote.rename(tmp_path / "away")
    async with manager.lease("web") as slot:
        (slot.path / "README.md").unlink()
    async with manager.lease("web") as slot:
        assert (slot.path / "README.md").read_text() == "# Changed\n"
    with pytest.raises(GitOperationError, match="web"):
        async with manager.lease("web", ref="v1.0"):
            pass
    async with manager.lease("web") as slot:
        assert (slot.path / "README.md").read_text() == "# Changed\n"


async def test_a_remote_that_serves_no_partial_clones_gives_everything(
    manager: PoolManager, remote: Path, caplog: pytest.LogCaptureFixture
) -> None:
    git(remote, "config", "uploadpack.allowFilter", "false")
    with caplog.at_level(logging.WARNING, "repopool"):
        mirror = await make_pool(manager, remote)
    assert "does not serve partial clones; everything was fetched" in caplog.text
    assert git(remote, "rev-parse", "v1.0:README.md") in contents(mirror)
    async with manager.lease("web", ref="v1.0") as slot:
        assert (slot.path / "README.md").read_text() == "# A small repository\n"


async def test_with_a_selection_only_its_contents_are_fetched(manager: PoolManager, remote: Path) -> None:
    mirror = await make_pool(manager, remote, sparse=["src"], salvage="always")
    assert len(contents(mirror)) == 5
    async with manager.lease("web") as slot:
        assert not (slot.path / "many").exists()
        (slot.path / "src/app.py").write_text("changed\n")
    (record,) = await manager.list_salvage()
    assert record.files_changed == 1
    assert len(contents(mirror)) == 5


async def test_only_what_was_not_pushed_is_saved(manager: PoolManager, remote: Path, tmp_path: Path) -> None:
    await make_pool(manager, remote, salvage="always")
    async with manager.lease("web"):
        pass
    assert await manager.list_salvage() == []
    async with manager.lease("web") as slot:
        git(slot.path, "revert", "--no-edit", "HEAD")  # brings back contents that the mirror does not have
        (slot.path / "new").write_text("new\n")
    (record,) = await manager.list_salvage()
    assert (record.commits, record.untracked, record.files_changed) == (1, 1, 0)
    assert record.skipped == ()
    async with manager.lease("web") as slot:
        await manager.restore_salvage(record.salvage_id, slot)
        assert (slot.path / "README.md").read_text() == "# A small repository\n"
        assert (slot.path / "new").read_text() == "new\n"
    await manager.delete_salvage(record.salvage_id)
    assert record.salvage_id not in [one.salvage_id for one in await manager.list_salvage()]
    listing = git(tmp_path / "pools/web/salvage.git", "count-objects", "-v").splitlines()
    packed = int(next(line for line in listing if line.startswith("in-pack: ")).split()[1])
    assert packed < 20, "the mirror's objects are borrowed, not copied"


async def test_damaged_contents_are_found_and_fetched_again(manager: PoolManager, remote: Path) -> None:
    mirror = await make_pool(manager, remote)
    newest = max(mirror.glob("objects/pack/*.pack"), key=lambda path: path.stat().st_mtime_ns)
    newest.chmod(0o644)
    with newest.open("r+b") as file:
        file.seek(20)
        file.write(b"damage")
    assert await manager.check()
    assert not await manager.check()
    async with manager.lease("web") as slot:
        assert (slot.path / "README.md").read_text() == "# Changed\n"


async def test_submodules_have_mirrors_with_everything(manager: PoolManager, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.make("lib", {"lib.txt": "lib\n"})
    world.make(
        "top",
        {".gitmodules": module("lib", path="lib", url="../lib.git"), "lib": (GITLINK, world.head("lib"))},
    )
    git(world.path("top"), "config", "uploadpack.allowFilter", "true")
    await make_pool(manager, world.path("top"), submodules=True)
    async with manager.lease("web") as slot:
        assert (slot.path / "lib/lib.txt").read_text() == "lib\n"
        assert git(slot.path, "status", "--porcelain") == ""


async def test_a_pool_keeps_its_kind_of_history(manager: PoolManager, remote: Path) -> None:
    await make_pool(manager, remote)
    with pytest.raises(ConfigError, match="history is blobless and stays so"):
        await make_pool(manager, remote, history="full")


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"isolation": "full"}, "each slot would fetch the rest"), ({"remotes": {"a": "/b"}}, "only origin promises")],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        PoolOptions(history="blobless", **options)
