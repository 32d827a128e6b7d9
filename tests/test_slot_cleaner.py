"""Cleaning and the repair ladder: each rung against damage that needs exactly it; real git, real files."""

import asyncio
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from repopool_async import CleanupError, CleanupResult, GitOperationError, PoolConfig, PoolManager, SlotState

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


# -- the ladder: what is damaged, and the rung that mends it -----------------------------------------------------


def slot_directory(tmp_path: Path) -> Path:
    return tmp_path / "pools/web/slots/slot1"


def mirror_of(tmp_path: Path) -> Path:
    return tmp_path / "pools/web/mirror.git"


def loose_object(repository: Path, name: str) -> Path:
    return repository / "objects" / name[:2] / name[2:]


def repack(repository: Path) -> None:
    """Put everything into one pack, so that clones have one."""
    git(repository, "repack", "-a", "-d", "-q")


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def only_pack(repository: Path) -> Path:
    (pack,) = (repository / "objects/pack").glob("pack-*.pack")
    return pack


async def test_an_ordinary_mess_needs_no_more_than_cleaning(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin))
    await lease_and_return(manager, write="README.md")
    result = await last_cleaning(manager)
    assert (result.success, result.rung, result.restored) == (True, None, 1)


def _garbage_index(git_directory: Path) -> None:
    (git_directory / "index").write_bytes(b"garbage" * 100)


def _truncated_index(git_directory: Path) -> None:
    os.truncate(git_directory / "index", 40)


def _no_head(git_directory: Path) -> None:
    (git_directory / "HEAD").unlink()


def _garbage_config(git_directory: Path) -> None:
    (git_directory / "config").write_text("[core\n garbage")


def _wrong_alternates(git_directory: Path) -> None:
    (git_directory / "objects/info/alternates").write_text("/nowhere/objects\n")


def _no_git_directory(git_directory: Path) -> None:
    shutil.rmtree(git_directory)


def _git_directory_is_a_fifo(git_directory: Path) -> None:
    shutil.rmtree(git_directory)
    os.mkfifo(git_directory)


def _smudge_filter(git_directory: Path) -> None:
    (git_directory / "info").mkdir()
    (git_directory / "info/attributes").write_text("* filter=evil\n")
    with (git_directory / "config").open("a") as file:
        file.write(f'[filter "evil"]\n\tsmudge = touch {git_directory.parents[1]}/canary && cat\n')


GIT_DAMAGE = [
    _garbage_index,
    _truncated_index,
    _no_head,
    _garbage_config,
    _wrong_alternates,
    _no_git_directory,
    _git_directory_is_a_fifo,
    _smudge_filter,
]


@pytest.mark.sampled(one_in=2)
@pytest.mark.parametrize("damage", GIT_DAMAGE)
async def test_a_damaged_git_directory_of_ours_is_rebuilt_on_return(
    manager: PoolManager, origin: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    await manager.create_pool("web", str(origin))
    async with manager.lease("web") as slot:
        (slot.path / "README.md").write_text("changed\n")
        tree = os.stat(slot.path).st_ino
        damage(slot_directory(tmp_path) / "pristine/git")
    await manager.wait_clean()
    result = await last_cleaning(manager)
    assert (result.success, result.rung) == (True, "rebuild_git"), result
    assert os.stat(slot_directory(tmp_path) / "tree").st_ino == tree
    assert not (slot_directory(tmp_path) / "canary").exists()
    await assert_like_a_clone(manager, origin)


@pytest.mark.sampled(one_in=2)
@pytest.mark.parametrize("damage", GIT_DAMAGE)
async def test_a_damaged_git_directory_of_ours_is_rebuilt_before_a_lease(
    manager: PoolManager, origin: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    await manager.create_pool("web", str(origin))
    damage(slot_directory(tmp_path) / "pristine/git")
    await assert_like_a_clone(manager, origin, "feature/x")
    prepared = next(r for r in await manager.get_cleanup_log(SLOT) if r.operation == "prepare")
    assert (prepared.success, prepared.rung) == (True, "rebuild_git"), prepared
    assert not (slot_directory(tmp_path) / "canary").exists()


async def test_a_garbage_index_of_ours_never_reaches_a_lessee_through_renewed_refs(
    manager: PoolManager, origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    await manager.create_pool("web", str(origin))
    make_commit(origin, "other", {"other": b"other\n"})
    _garbage_index(slot_directory(tmp_path) / "pristine/git")
    await assert_like_a_clone(manager, origin)


def _tree_is_a_link(tree: Path) -> None:
    outside = tree.parents[4] / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine\n")
    shutil.rmtree(tree)
    tree.symlink_to(outside)


def _tree_is_a_file(tree: Path) -> None:
    shutil.rmtree(tree)
    tree.write_text("file\n")


def _tree_is_gone(tree: Path) -> None:
    shutil.rmtree(tree)


def _tree_is_another(tree: Path) -> None:
    tree.rename(tree.with_name("elsewhere"))
    shutil.copytree(tree.with_name("elsewhere"), tree)


@pytest.mark.parametrize("damage", [_tree_is_a_link, _tree_is_a_file, _tree_is_gone, _tree_is_another])
@pytest.mark.parametrize("when", ["leased", "idle"])
async def test_a_tree_that_is_not_the_one_we_gave_is_made_anew(
    manager: PoolManager, origin: Path, tmp_path: Path, damage: Callable[[Path], None], when: str
) -> None:
    await manager.create_pool("web", str(origin))
    tree = slot_directory(tmp_path) / "tree"
    if when == "idle":
        damage(tree)
    async with manager.lease("web"):
        if when == "leased":
            damage(tree)
    await manager.wait_clean()
    log = await manager.get_cleanup_log(SLOT)
    assert [entry.rung for entry in log if entry.rung] == ["recreate_tree"], log
    assert (await manager.get_slot_status(SLOT)).state is SlotState.AVAILABLE
    if damage is _tree_is_a_link:
        assert (tmp_path / "outside/file").read_text() == "mine\n"
    await assert_like_a_clone(manager, origin)


async def test_an_entry_that_cannot_be_deleted_costs_the_tree_not_the_slot(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin))
    async with manager.lease("web") as slot:
        (slot.path / "stuck").write_text("stuck\n")
        inode = os.stat(slot.path / "stuck").st_ino
        if subprocess.run(["chattr", "+i", str(slot.path / "stuck")], check=False).returncode != 0:
            pytest.skip("no immutable files here (needs root and chattr)")
    try:
        await manager.wait_clean()
        result = await last_cleaning(manager)
        assert (result.success, result.rung) == (True, "recreate_tree"), result
        await assert_like_a_clone(manager, origin)
    finally:
        for directory, _, names in os.walk(tmp_path / "pools/web"):  # what else is in the trash goes meanwhile
            path = Path(directory, "stuck")
            if "stuck" in names and os.stat(path).st_ino == inode:
                subprocess.run(["chattr", "-i", str(path)], check=True)


# -- the mirror --------------------------------------------------------------------------------------------------


def _truncated_pack(mirror: Path) -> None:
    os.truncate(only_pack(mirror), only_pack(mirror).stat().st_size // 2)


def _flipped_bytes(mirror: Path) -> None:
    pack = only_pack(mirror)
    data = bytearray(pack.read_bytes())
    data[40 : len(data) - 40 : 7] = bytes(byte ^ 0xFF for byte in data[40 : len(data) - 40 : 7])
    overwrite(pack, bytes(data))


def _no_objects(mirror: Path) -> None:
    shutil.rmtree(mirror / "objects")
    (mirror / "objects").mkdir()


@pytest.mark.parametrize("damage", [_truncated_pack, _flipped_bytes, _no_objects])
async def test_a_mirror_whose_objects_are_broken_is_cloned_anew_before_a_lease(
    manager: PoolManager, origin: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    repack(origin)
    await manager.create_pool("web", str(origin), cleanup_options={"fetch_on_allocate": False})
    damage(mirror_of(tmp_path))
    await assert_like_a_clone(manager, origin, "feature/x")
    prepared = next(r for r in await manager.get_cleanup_log(SLOT) if r.operation == "prepare")
    assert (prepared.success, prepared.rung) == (True, "rebuild_mirror"), prepared
    git(mirror_of(tmp_path), "fsck", "--full")
    assert (await manager.get_slot_status(SLOT)).state is SlotState.AVAILABLE


def _emptied_object(mirror: Path) -> None:
    overwrite(loose_object(mirror, git(mirror, "rev-parse", "feature/x^{tree}")), b"")


async def test_an_emptied_object_in_the_mirror_is_noticed_when_it_is_needed(
    manager: PoolManager, origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    make_commit(origin, "feature/x", {"loose": b"not packed yet\n"})
    await manager.create_pool("web", str(origin), cleanup_options={"fetch_on_allocate": False})
    _emptied_object(mirror_of(tmp_path))
    await assert_like_a_clone(manager, origin, "feature/x")
    prepared = next(r for r in await manager.get_cleanup_log(SLOT) if r.operation == "prepare")
    assert (prepared.success, prepared.rung) == (True, "rebuild_mirror"), prepared


def _garbage_packed_refs(mirror: Path) -> None:
    (mirror / "packed-refs").write_text("garbage\nmore garbage\n")


def _garbage_state(mirror: Path) -> None:
    (mirror / "repopool/state.json").write_text("garbage")


def _garbage_snapshot(mirror: Path) -> None:
    (snapshot,) = (mirror / "repopool").glob("refs-*")
    snapshot.write_text("garbage\n")


def _garbage_mirror_config(mirror: Path) -> None:
    (mirror / "config").write_text("[garbage")


def _deleted(mirror: Path) -> None:
    shutil.rmtree(mirror)


MIRROR_DAMAGE = [_garbage_packed_refs, _garbage_state, _garbage_snapshot, _garbage_mirror_config, _deleted]


@pytest.mark.sampled(one_in=2)
@pytest.mark.parametrize(
    ("damage", "fetches"),
    # Without a fetch, a lease at the sealed commit reads no object: what is wrong with them only check() finds.
    [(_truncated_pack, True), *((damage, fetches) for damage in MIRROR_DAMAGE for fetches in (True, False))],
)
async def test_a_damaged_mirror_is_repaired_by_whoever_comes_across_it(
    manager: PoolManager, origin: Path, tmp_path: Path, damage: Callable[[Path], None], fetches: bool
) -> None:
    repack(origin)
    pool = await manager.create_pool("web", str(origin), cleanup_options={"fetch_on_allocate": fetches})
    pool._context.reference.mirror._snapshot = None  # as in another process
    damage(mirror_of(tmp_path))
    if fetches:
        git(origin, "branch", "-f", "main", "feature/x")
    await assert_like_a_clone(manager, origin)
    await lease_and_return(manager, "feature/x", write="README.md")
    assert (await manager.get_slot_status(SLOT)).state is SlotState.AVAILABLE
    await assert_like_a_clone(manager, origin)
    await manager.check()
    assert await manager.check() == {}


async def test_what_can_be_told_from_the_refs_costs_no_new_clone(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    pool = await manager.create_pool("web", str(origin))
    inode = os.stat(mirror_of(tmp_path)).st_ino
    _garbage_state(mirror_of(tmp_path))
    async with PoolManager(manager.config) as other, other.lease("web") as slot:
        assert slot.branch == "main"
    assert os.stat(mirror_of(tmp_path)).st_ino == inode
    assert pool.name == "web"


# -- check -------------------------------------------------------------------------------------------------------


def _forged_object(mirror: Path) -> None:
    blob = git(mirror, "rev-parse", "main:README.md")
    overwrite(loose_object(mirror, blob), zlib.compress(b"blob 7\0forged\n"))


async def test_a_look_at_a_slot_does_not_cost_its_next_cleaning_anything(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin))
    assert await manager.check() == {}
    await lease_and_return(manager)
    assert (await last_cleaning(manager)).steps == ("untouched",)


@pytest.mark.sampled(one_in=2)
@pytest.mark.parametrize("damage", [_truncated_pack, _flipped_bytes, _no_objects, *MIRROR_DAMAGE])
async def test_check_finds_and_repairs_a_damaged_mirror_and_the_slots_on_it(
    manager: PoolManager, origin: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    repack(origin)
    await manager.create_pool("web", str(origin))
    assert await manager.check() == {}
    damage(mirror_of(tmp_path))
    found = await manager.check()
    assert found["web/mirror.git"]
    assert not any("not repaired" in line for line in found["web/mirror.git"])
    assert await manager.check() == {}
    await assert_like_a_clone(manager, origin)


async def test_check_finds_a_loose_object_with_wrong_content_and_whoever_stood_on_it(
    manager: PoolManager, origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    make_commit(origin, "main", {"README.md": b"# Not packed yet\n"})
    await manager.create_pool("web", str(origin), num_slots=2)
    _forged_object(mirror_of(tmp_path))
    async with manager.lease("web") as leased:
        (leased.path / "README.md").unlink()
        git(leased.path, "checkout", "README.md")
        assert (leased.path / "README.md").read_bytes() == b"forged\n"
        found = await manager.check()
        assert set(found) == {"web/mirror.git", "workspace-web-slot2"} or set(found) == {"web/mirror.git", SLOT}
    await manager.wait_clean()
    assert await manager.check() == {}
    async with manager.lease("web") as first, manager.lease("web") as second:
        for slot in (first, second):
            assert (slot.path / "README.md").read_bytes() == b"# Not packed yet\n"


async def test_odd_objects_of_the_projects_own_making_are_no_damage(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    tree = git(origin, "rev-parse", "main^{tree}")
    odd = f"tree {tree}\nauthor Nobody<a@b> 1700000000 +0000\ncommitter Nobody <a@b> 1700000000 +0000\n\nodd\n"
    made = subprocess.run(
        ["git", "-C", str(origin), "hash-object", "-t", "commit", "-w", "--stdin", "--literally"],
        input=odd.encode(),
        check=True,
        capture_output=True,
    )
    git(origin, "update-ref", "refs/heads/odd", made.stdout.decode().strip())
    await manager.create_pool("web", str(origin))
    assert await manager.check() == {}


# -- what stands on a mirror that is replaced --------------------------------------------------------------------


def forget(origin: Path, branch: str) -> None:
    """Delete a branch, and what only it had."""
    git(origin, "update-ref", "-d", f"refs/heads/{branch}")
    git(origin, "gc", "--prune=now", "-q")


async def test_a_lease_keeps_what_only_the_old_mirror_had(
    manager: PoolManager, origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    """A branch is forced upstream while a lease stands on it; then the mirror breaks elsewhere and is cloned anew."""
    gone = make_commit(origin, "topic", {"topic": b"only here\n"})
    repack(origin)
    await manager.create_pool("web", str(origin), num_slots=2)
    async with manager.lease("web", ref="topic") as slot:
        git(slot.path, "commit", "--allow-empty", "-m", "on top")
        forget(origin, "topic")
        _garbage_packed_refs(mirror_of(tmp_path))
        assert (await manager.check())["web/mirror.git"]
        git(slot.path, "fsck", "--full")
        (slot.path / "topic").unlink()
        git(slot.path, "checkout", "topic", "--", "topic")
        assert (slot.path / "topic").read_bytes() == b"only here\n"
    await manager.wait_clean()
    assert git(mirror_of(tmp_path), "cat-file", "-t", gone) == "commit"
    assert await manager.check() == {}


async def test_forged_objects_of_the_old_mirror_are_not_carried_over(
    manager: PoolManager, origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    gone = make_commit(origin, "topic", {"topic": b"only here\n"})
    await manager.create_pool("web", str(origin), num_slots=1)
    mirror = mirror_of(tmp_path)
    async with manager.lease("web", ref="topic"):
        blob = git(mirror, "rev-parse", "topic:topic")
        forget(origin, "topic")
        overwrite(loose_object(mirror, blob), zlib.compress(b"blob 7\0forged\n"))
        assert (await manager.check())["web/mirror.git"]
        with pytest.raises(subprocess.CalledProcessError):
            git(mirror, "cat-file", "-e", gone)
    # The lease's commit is nowhere whole any more: the slot shows what the remote shows by default.
    await manager.wait_clean()
    assert (await manager.get_slot_status(SLOT)).state is SlotState.AVAILABLE
    await assert_like_a_clone(manager, origin)


async def test_two_who_find_the_damage_at_once_clone_once(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    pool = await manager.create_pool("web", str(origin))
    mirror = pool._context.reference.mirror
    before = os.stat(mirror_of(tmp_path)).st_ino
    await asyncio.gather(mirror.rebuild(), mirror.rebuild(), mirror.rebuild())
    assert os.stat(mirror_of(tmp_path)).st_ino != before
    trashed = [entry for entry in (tmp_path / "pools/web/trash").iterdir() if (entry / "packed-refs").exists()]
    assert len(trashed) <= 1


# -- the end of the ladder ---------------------------------------------------------------------------------------


async def test_beyond_repair_is_quarantined_with_the_reason_and_comes_back_by_repair(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin))
    hidden = origin.with_name("hidden.git")
    async with manager.lease("web") as slot:
        (slot.path / "README.md").write_text("changed\n")
        origin.rename(hidden)
        shutil.rmtree(mirror_of(tmp_path))
    await manager.wait_clean()
    status = await manager.get_slot_status(SLOT)
    assert status.state is SlotState.ERROR
    assert status.error is not None
    assert str(origin) in status.error
    with pytest.raises(CleanupError, match="could not be repaired"):
        await manager.repair_slot(SLOT)
    assert (await manager.get_slot_status(SLOT)).state is SlotState.ERROR
    hidden.rename(origin)
    result = await manager.repair_slot(SLOT)
    assert result.operation == "repair"
    await assert_like_a_clone(manager, origin)


async def test_the_command_brings_a_quarantined_slot_back(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin))
    hidden = origin.with_name("hidden.git")
    async with manager.lease("web"):
        origin.rename(hidden)
        shutil.rmtree(mirror_of(tmp_path))
    await manager.wait_clean()
    assert (await manager.get_slot_status(SLOT)).state is SlotState.ERROR
    hidden.rename(origin)
    command = [sys.executable, "-m", "repopool_async.cli", "repair", "--workspaces-dir", str(tmp_path / "pools"), SLOT]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    await assert_like_a_clone(manager, origin)


async def test_a_remote_in_trouble_harms_no_good_slot(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin), num_slots=2)
    hidden = origin.with_name("hidden.git")
    async with manager.lease("web") as slot:
        (slot.path / "README.md").write_text("changed\n")
        origin.rename(hidden)
    await manager.wait_clean()
    with pytest.raises(GitOperationError):
        async with manager.lease("web"):
            pass
    repaired = await manager.repair_slot(SLOT)
    assert repaired.success
    await manager.drain("web")
    _garbage_packed_refs(mirror_of(tmp_path))
    found = await manager.check("web")
    assert "not repaired yet" in found["web/mirror.git"][-1]
    assert await manager.available_count("web") == 2
    hidden.rename(origin)
    assert (await manager.check("web"))["web/mirror.git"]
    assert await manager.check("web") == {}
    await assert_like_a_clone(manager, origin)


async def test_a_tree_that_cannot_be_moved_away_is_quarantined_and_nothing_is_left_beside_it(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin))
    tree = slot_directory(tmp_path) / "tree"
    async with manager.lease("web"):
        if subprocess.run(["chattr", "+i", str(tree)], check=False).returncode != 0:
            pytest.skip("no immutable files here (needs root and chattr)")
    try:
        await manager.wait_clean()
        status = await manager.get_slot_status(SLOT)
        assert status.state is SlotState.ERROR
        assert status.error is not None
        assert "Operation not permitted" in status.error
        assert [path.name for path in slot_directory(tmp_path).glob("tree*")] == ["tree"]
    finally:
        subprocess.run(["chattr", "-i", str(tree)], check=True)
    await manager.repair_slot(SLOT)
    await assert_like_a_clone(manager, origin)
