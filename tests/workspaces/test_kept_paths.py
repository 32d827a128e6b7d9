"""Kept paths stay between leases, and nothing but what is in them reaches the next lessee."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from repopool_async import LeasedSlot, PoolConfig, PoolManager, RepoPool, SlotState

MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]

SLOT = "workspace-web-slot1"
KEPT = ("node_modules", "web/cache")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do that")


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        yield manager


@pytest.fixture
async def pool(manager: PoolManager, origin: Path) -> RepoPool:
    return await manager.create_pool("web", str(origin), keep=list(KEPT), cleanup="inline")


def git(tree: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=tree, check=True, capture_output=True, text=True).stdout.strip()


def others(slot: LeasedSlot) -> list[str]:
    """Say what there is in a tree besides its commit's files."""
    assert git(slot.path, "diff", "HEAD") == ""
    return git(slot.path, "status", "--porcelain", "--ignored").splitlines()


def fill(slot: LeasedSlot, *names: str) -> None:
    for name in names or KEPT:
        (slot.path / name / "lib").mkdir(parents=True)
        (slot.path / name / "lib/index.js").write_text("cached\n")


def is_filled(slot: LeasedSlot, name: str = "node_modules") -> bool:
    path = slot.path / name / "lib/index.js"
    return path.is_file() and not path.is_symlink() and path.read_text() == "cached\n"


async def last_rung(manager: PoolManager) -> str | None:
    return (await manager.get_cleanup_log(SLOT))[-1].rung


async def test_kept_paths_stay_and_nothing_else_does(pool: RepoPool) -> None:
    async with pool.lease() as slot:
        fill(slot)
        (slot.path / "web/secret").write_text("secret")
        (slot.path / "untracked").write_text("secret")
        (slot.path / "README.md").write_text("changed")
        (slot.path / "build").mkdir()
        (slot.path / "build/node_modules").mkdir()
    async with pool.lease() as slot:
        assert others(slot) == ["?? node_modules/", "?? web/"]
        assert os.listdir(slot.path / "web") == ["cache"]
        assert all(is_filled(slot, name) for name in KEPT)


async def test_a_tree_that_was_only_used_in_kept_paths_counts_as_untouched(
    manager: PoolManager, pool: RepoPool
) -> None:
    async with pool.lease() as slot:
        fill(slot)
    async with pool.lease() as slot:
        inode = (slot.path / "node_modules").stat().st_ino
        (slot.path / "node_modules/lib/index.js").unlink()
        (slot.path / "node_modules/more").write_text("more\n")
    assert (await manager.get_cleanup_log(SLOT))[-1].steps == ("untouched",)
    async with pool.lease() as slot:
        assert os.listdir(slot.path / "node_modules/lib") == []
        assert (slot.path / "node_modules").stat().st_ino == inode
    assert await manager.check("web") == {}


async def test_kept_paths_survive_changes_of_ref(manager: PoolManager, pool: RepoPool) -> None:
    async with pool.lease(ref="main") as slot:
        fill(slot)
    for ref in ("feature/x", "v1.0", "main"):
        async with pool.lease(ref=ref) as slot:
            assert all(is_filled(slot, name) for name in KEPT)
            assert others(slot) == ["?? node_modules/", "?? web/"]
        assert await last_rung(manager) is None
    assert await manager.check("web") == {}


@pytest.mark.parametrize(
    "files",
    [
        {"node_modules/tracked.js": b"tracked\n"},
        {"node_modules": b"a file\n"},
        {"web": b"a file on the way\n", "node_modules/lib/index.js": b"the commit's\n"},
    ],
)
async def test_what_a_commit_has_there_wins_and_the_cache_waits(
    manager: PoolManager, pool: RepoPool, origin: Path, make_commit: MakeCommit, files: dict[str, bytes | None]
) -> None:
    make_commit(origin, "feature/x", files)
    for ref, edits in (("main", False), ("feature/x", True), ("feature/x", False), ("main", False)):
        async with pool.lease(ref=ref) as slot:
            assert git(slot.path, "diff", "HEAD") == ""
            if ref == "feature/x":
                assert not [line for line in others(slot) if "node_modules" in line]
                for name, data in files.items():
                    assert (slot.path / name).read_bytes() == data
            if edits:
                for name in files:
                    (slot.path / name).write_text("edited")
                (slot.path / "README.md").unlink()
            if ref == "main" and not (slot.path / "node_modules").exists():
                fill(slot)
    async with pool.lease(ref="main") as slot:
        assert all(is_filled(slot, name) for name in KEPT)
        assert others(slot) == ["?? node_modules/", "?? web/"]


async def test_tracked_files_never_become_a_cache(pool: RepoPool, origin: Path, make_commit: MakeCommit) -> None:
    make_commit(origin, "feature/x", {"node_modules/tracked.js": b"tracked\n"})
    async with pool.lease(ref="feature/x") as slot:
        (slot.path / "node_modules/more").write_text("more")
    async with pool.lease(ref="main") as slot:
        assert others(slot) == []


async def test_a_directory_on_the_way_that_comes_and_goes(
    manager: PoolManager, pool: RepoPool, origin: Path, make_commit: MakeCommit
) -> None:
    make_commit(origin, "feature/x", {"web/index.html": b"tracked\n"})
    async with pool.lease(ref="feature/x") as slot:
        fill(slot)
    for ref in ("main", "feature/x", "v1.0"):
        async with pool.lease(ref=ref) as slot:
            assert (slot.path / "web/index.html").exists() == (ref == "feature/x")
            assert is_filled(slot, "web/cache")
        assert await last_rung(manager) is None


def by_link(slot: LeasedSlot, outside: Path) -> None:
    (slot.path / "node_modules").symlink_to(outside)


def by_file(slot: LeasedSlot, outside: Path) -> None:
    (slot.path / "node_modules").write_text("no directory")


def by_fifo(slot: LeasedSlot, outside: Path) -> None:
    os.mkfifo(slot.path / "node_modules")


def by_link_on_the_way(slot: LeasedSlot, outside: Path) -> None:
    (slot.path / "web").symlink_to(outside)


def by_attribute(slot: LeasedSlot, outside: Path) -> None:
    (slot.path / "node_modules").mkdir()
    os.setxattr(slot.path / "node_modules", "user.secret", b"secret")


def by_repository_on_the_way(slot: LeasedSlot, outside: Path) -> None:
    (slot.path / "web").mkdir()
    git(slot.path / "web", "init", "-q")


@pytest.mark.parametrize(
    "replace", [by_link, by_file, by_fifo, by_link_on_the_way, by_attribute, by_repository_on_the_way]
)
async def test_what_is_no_ordinary_directory_does_not_stay(
    pool: RepoPool, tmp_path: Path, replace: Callable[[LeasedSlot, Path], None]
) -> None:
    outside = tmp_path / "outside"
    (outside / "cache").mkdir(parents=True)
    (outside / "cache/precious").write_text("must stay")
    async with pool.lease() as slot:
        replace(slot, outside)
    async with pool.lease() as slot:
        assert others(slot) == []
        assert sorted(os.listdir(slot.path)) == [".git", ".gitignore", "CHANGES.md", "README.md", "src"]
    assert (outside / "cache/precious").read_text() == "must stay"


async def test_contents_of_every_kind_stay_without_being_run_or_waited_for(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    canary = tmp_path / "ran"
    async with pool.lease() as slot:
        fill(slot)
        kept = slot.path / "node_modules"
        git(kept, "init", "-q")
        git(kept, "config", "core.fsmonitor", f"touch {canary}; false")
        (kept / ".gitattributes").write_text("* filter=x\n")
        os.mkfifo(kept / ".gitignore")
        (kept / "closed").mkdir()
        (kept / "closed").chmod(0)
        kept.chmod(0)
        (slot.path / "README.md").write_text("changed")
    for ref in ("main", "feature/x"):
        async with pool.lease(ref=ref) as slot:
            kept = slot.path / "node_modules"
            assert is_filled(slot)
            assert kept.stat().st_mode & 0o777 == (slot.path / "src").stat().st_mode & 0o777
            assert git(slot.path, "diff", "HEAD") == ""
        assert await last_rung(manager) is None
    assert not canary.exists()


@pytest.mark.parametrize("is_from_tracked", [True, False])
async def test_a_hard_link_does_not_tie_a_kept_file_to_a_tracked_one(pool: RepoPool, is_from_tracked: bool) -> None:
    async with pool.lease() as slot:
        fill(slot)
    async with pool.lease() as slot:
        kept, tracked = slot.path / "node_modules/lib/index.js", slot.path / "README.md"
        if is_from_tracked:
            os.link(tracked, slot.path / "node_modules/link")
        else:
            kept.write_bytes(tracked.read_bytes())
            os.link(kept, slot.path / "node_modules/link")
    async with pool.lease() as slot:
        if not is_from_tracked:
            (slot.path / "node_modules/link").rename(slot.path / "README.md")
    async with pool.lease() as slot:
        for name in ("node_modules/link", "node_modules/lib/index.js"):
            if (slot.path / name).exists():
                (slot.path / name).write_text("changed in the cache")
        assert (slot.path / "README.md").stat().st_nlink == 1
        assert (slot.path / "README.md").read_text() == "# A small repository\n"
        assert git(slot.path, "diff", "HEAD") == ""


async def test_who_stands_in_a_kept_path_loses_it(manager: PoolManager, pool: RepoPool) -> None:
    async with pool.lease() as slot:
        fill(slot)
        script = "import os; print(flush=True); os.read(0, 1); open('../README.md', 'w').write('late')"
        stranger = subprocess.Popen(
            [sys.executable, "-ISc", script], cwd=slot.path / "node_modules",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
        assert stranger.stdout is not None
        stranger.stdout.readline()
    try:
        assert await last_rung(manager) == "recreate_tree"
        async with pool.lease() as slot:
            stranger.communicate(b"\n")
            assert others(slot) == []
    finally:
        stranger.kill()
        stranger.wait()


@as_root
async def test_what_is_mounted_in_a_kept_path_does_not_stay(manager: PoolManager, pool: RepoPool) -> None:
    async with pool.lease() as slot:
        fill(slot)
        mounted = slot.path / "node_modules/lib"
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mounted], check=False, capture_output=True).returncode:
            pytest.skip("nothing can be mounted here")
    try:
        state = (await manager.get_slot_status(SLOT)).state
        if state is SlotState.AVAILABLE:
            async with pool.lease() as slot:
                assert others(slot) == ["?? web/"]
    finally:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if str(manager.config.workspaces_dir) in line:
                subprocess.run(["umount", "-l", line.split()[1]], check=True)


def slot_directory(manager: PoolManager) -> Path:
    return Path(manager.config.workspaces_dir) / "web/slots/slot1"


async def test_rungs_that_make_the_tree_anew_take_kept_paths_along(manager: PoolManager, pool: RepoPool) -> None:
    async with pool.lease() as slot:
        fill(slot)
        slot.path.chmod(0o700)
    assert await last_rung(manager) == "recreate_tree"
    async with pool.lease() as slot:
        assert all(is_filled(slot, name) for name in KEPT)
        assert others(slot) == ["?? node_modules/", "?? web/"]


async def test_a_repair_drops_kept_paths(manager: PoolManager, pool: RepoPool) -> None:
    async with pool.lease() as slot:
        fill(slot)
    await manager.repair_slot(SLOT)
    async with pool.lease() as slot:
        assert others(slot) == []
    assert not (slot_directory(manager) / "kept/node_modules").exists()


async def test_work_is_saved_without_kept_paths(manager: PoolManager, pool: RepoPool) -> None:
    slot = await manager.allocate_slot("web", timeout=5)
    assert slot is not None
    fill(slot)
    (slot.path / "mine.txt").write_text("mine")
    os.mkfifo(slot.path / "node_modules/.gitignore")
    await manager.force_unlock(slot.slot_id)
    await manager.wait_clean()
    [saved] = await manager.list_salvage("web")
    assert saved.untracked == 1
    async with pool.lease() as slot:
        assert is_filled(slot)
        assert not (slot.path / "mine.txt").exists()


async def test_what_is_not_kept_any_more_goes(tmp_path: Path, origin: Path) -> None:
    for keep, names in ((["node_modules", "target"], []), (["target"], ["target"]), ([], [])):
        async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
            pool = await manager.create_pool("web", str(origin), keep=keep)
            async with pool.lease() as slot:
                assert [name for name in ("node_modules", "target") if (slot.path / name).exists()] == names
                if not names and keep:
                    fill(slot, "node_modules", "target")


async def test_large_kept_trees_are_not_walked(pool: RepoPool, tmp_path: Path) -> None:
    async with pool.lease() as slot:
        fill(slot)
        deep = slot.path / "node_modules/deep"
        deep.mkdir()
    seen = deep.stat().st_atime_ns
    os.utime(deep, ns=(0, 0))  # with relatime, whoever lists it leaves a later time
    for ref in ("main", "feature/x"):
        async with pool.lease(ref=ref) as slot:
            (slot.path / "untracked").write_text("x")
    assert deep.stat().st_atime_ns == 0 != seen
