"""Pools that check out some directories only; that a slot is what a fresh clone is, is in `tests/contamination`."""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from repopool_async import ConfigError, PoolConfig, PoolManager, PoolOptions
from tests.conftest import MakeCommit


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        yield manager


async def make_pool(manager: PoolManager, origin: Path, *directories: str, **options: Any) -> None:
    await manager.create_pool("web", str(origin), sparse=directories, **{"cleanup": "inline", **options})


def git(tree: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=tree, check=True, capture_output=True).stdout.decode().strip()


def names(tree: Path) -> list[str]:
    found = (str(path.relative_to(tree)) for path in tree.rglob("*"))
    return sorted(name for name in found if not name.startswith(".git/") and name not in (".git", ".gitignore"))


async def test_what_a_lessee_checks_out_besides_is_gone_for_the_next(manager: PoolManager, origin: Path) -> None:
    await make_pool(manager, origin, "src/data")
    expected = ["CHANGES.md", "README.md", "src", "src/app.py", "src/data", "src/data/table.csv"]
    async with manager.lease("web") as slot:
        assert names(slot.path) == expected
        assert git(slot.path, "sparse-checkout", "list") == "src/data"
        git(slot.path, "sparse-checkout", "disable")
        (slot.path / "docs/empty").mkdir(parents=True)
        (slot.path / "src/other").mkdir()
    async with manager.lease("web") as slot:
        assert names(slot.path) == expected
        assert git(slot.path, "status", "--porcelain", "--ignored") == ""
    assert not await manager.check()


async def test_directories_that_only_files_beside_the_selection_lie_in_are_found(
    manager: PoolManager, origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    make_commit(origin, "main", {"docs/deep/guide.md": b"guide\n", "src/other/x": b"x\n"})
    await make_pool(manager, origin, "src/data")
    async with manager.lease("web") as slot:
        (slot.path / "docs/deep").mkdir(parents=True)
        (slot.path / "src/other").mkdir()
    async with manager.lease("web") as slot:
        assert not (slot.path / "docs").exists()
        assert not (slot.path / "src/other").exists()
    await manager.wait_clean()
    (tmp_path / "pools/web/slots/slot1/tree/docs").mkdir()
    assert "docs" in str(await manager.check())
    async with manager.lease("web", ref="feature/x") as slot:
        assert "src/feature.py" in names(slot.path)
        assert not (slot.path / "docs").exists()


async def test_another_selection_takes_the_place_of_the_first(manager: PoolManager, origin: Path) -> None:
    for directories in (["src/data"], ["nowhere"], []):
        await make_pool(manager, origin, *directories)
        async with manager.lease("web") as slot:
            assert (slot.path / "README.md").exists()
            assert (slot.path / "src").exists() is (directories != ["nowhere"])
            assert git(slot.path, "status", "--porcelain") == ""


async def test_unpushed_work_beside_the_selection_is_saved_and_nothing_else(
    manager: PoolManager, origin: Path, make_commit: MakeCommit
) -> None:
    make_commit(origin, "main", {"docs/guide.md": b"guide\n", "docs/more.md": b"more\n"})
    await make_pool(manager, origin, "src", salvage="always")
    async with manager.lease("web") as slot:
        git(slot.path, "sparse-checkout", "add", "docs")
    assert await manager.list_salvage() == []
    async with manager.lease("web") as slot:
        git(slot.path, "sparse-checkout", "add", "docs")
        (slot.path / "docs/guide.md").write_text("better\n")
        (slot.path / "src/new.py").write_text("new\n")
    (record,) = await manager.list_salvage()
    assert (record.files_changed, record.untracked) == (1, 1)
    tree = git(Path(manager.config.workspaces_dir, "web/salvage.git"), "ls-tree", "-r", "--name-only", record.commit)
    assert "docs/more.md" in tree.splitlines()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sparse": ["src/*"]}, "takes directories, not patterns"),
        ({"sparse": ["src"], "submodules": True}, "cannot be had with submodules"),
        ({"lfs": True, "hosts": ["one"]}, "this machine|does not support"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        PoolOptions(**options)
