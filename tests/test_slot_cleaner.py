"""Cleaning and the repair ladder: each rung against damage that needs exactly it; real git, real files."""

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from repopool_async import CleanupResult, PoolConfig, PoolManager, SlotState

MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]

SLOT = "workspace-web-slot1"


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        yield manager


def git(path: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(path), *args], check=True, capture_output=True, text=True).stdout.strip()


async def last_cleaning(manager: PoolManager) -> CleanupResult:
    return (await manager.get_cleanup_log(SLOT))[-1]


async def lease_and_return(manager: PoolManager, ref: str = "main", write: str | None = None) -> None:
    async with manager.lease("web", ref=ref) as slot:
        if write is not None:
            (slot.path / write).write_text("changed\n")
    await manager.wait_clean()


async def assert_like_a_clone(manager: PoolManager, origin: Path, ref: str = "main") -> None:
    async with manager.lease("web", ref=ref) as slot:
        assert git(slot.path, "status", "--porcelain", "--ignored") == ""
        assert git(slot.path, "rev-parse", "HEAD") == git(origin, "rev-parse", ref)
        assert git(slot.path, "fsck", "--full") == ""
        for name in git(origin, "ls-tree", "-r", "--name-only", ref).splitlines():
            blob = subprocess.run(["git", "-C", str(origin), "show", f"{ref}:{name}"], check=True, capture_output=True)
            assert (slot.path / name).read_bytes() == blob.stdout, name
    await manager.wait_clean()


# -- rebuild_always ----------------------------------------------------------------------------------------------


async def test_rebuild_always_gives_every_lease_new_inodes_and_says_so(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin), rebuild_always=True)
    for _ in range(2):
        async with manager.lease("web") as slot:
            status = os.stat(slot.path)
            held = os.open(slot.path / "README.md", os.O_RDWR)
            inode = os.fstat(held).st_ino
        await manager.wait_clean()
        try:
            assert (await last_cleaning(manager)).steps == ("tree made anew",)
            async with manager.lease("web") as slot:
                assert os.stat(slot.path).st_ino != status.st_ino
                assert os.stat(slot.path / "README.md").st_ino != inode
                os.write(held, b"late")
                assert (slot.path / "README.md").read_bytes() == b"# A small repository\n"
        finally:
            os.close(held)
        await manager.wait_clean()


async def test_rebuild_always_can_be_turned_on_later(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin))
    await lease_and_return(manager)
    assert (await last_cleaning(manager)).steps == ("untouched",)
    await manager.create_pool("web", str(origin), rebuild_always=True)
    await lease_and_return(manager)
    assert (await last_cleaning(manager)).steps == ("tree made anew",)
    assert (await manager.get_slot_status(SLOT)).state is SlotState.AVAILABLE
