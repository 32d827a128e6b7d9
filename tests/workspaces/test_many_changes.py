"""Slots of whose files a lessee has changed so many that they are moved aside, and written anew side by side."""

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from repopool_async import LeasedSlot, PoolConfig, PoolManager
from repopool_async.workspaces.pristine_git import _WRITING
from tests.conftest import MakeCommit

MANY = int(_WRITING["checkout.thresholdForParallelism"])
NAMES = [f"many/{number // 50}/{number}.{'crlf' if number % 3 else 'txt'}" for number in range(MANY + 200)]


@pytest.fixture
async def manager(tmp_path: Path, origin: Path, make_commit: MakeCommit) -> AsyncIterator[PoolManager]:
    files: dict[str, bytes | None] = {name: f"{name}\nas it shall be\n".encode() for name in NAMES}
    make_commit(origin, "main", files | {".gitattributes": b"*.crlf text eol=crlf\n"})
    async with PoolManager(PoolConfig(tmp_path / "pools", janitor_interval=3600)) as manager:
        await manager.create_pool("web", str(origin), num_slots=1, cleanup="inline")
        yield manager


def contents(slot: LeasedSlot) -> dict[str, tuple[bytes, int]]:
    return {name: ((slot.path / name).read_bytes(), (slot.path / name).stat().st_mode) for name in NAMES}


def edit_unseen(path: Path) -> None:
    """Change a file, but not its size or the time of its last change."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"as it shall be", b"as it shan't b"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def test_all_is_as_it_shall_be_again(manager: PoolManager) -> None:
    async with manager.lease("web") as slot:
        fresh, inodes = contents(slot), {(slot.path / name).stat().st_ino for name in NAMES}
        for name in NAMES[200:]:
            edit_unseen(slot.path / name)
        for name in NAMES[:20]:
            (slot.path / name).chmod(0o777)
        shutil.rmtree(slot.path / "many/1")
        (slot.path / "many/2").rename(slot.path / "many/two")
        (slot.path / NAMES[160]).unlink()
        (slot.path / NAMES[160]).symlink_to("/etc/passwd")
        (slot.path / NAMES[161]).unlink()
        (slot.path / NAMES[161]).mkdir()
        os.link(slot.path / NAMES[162], slot.path.parent.parent / "outside")

    assert await manager.check("web") == {}
    async with manager.lease("web") as slot:
        assert contents(slot) == fresh
        assert sorted(path.name for path in (slot.path / "many").iterdir()) == sorted({n.split("/")[1] for n in NAMES})
        again = {(slot.path / name).stat().st_ino for name in (*NAMES[:20], *NAMES[200:])}
        assert not again & inodes
