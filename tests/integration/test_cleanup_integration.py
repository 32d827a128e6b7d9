"""At the start of every lease a slot equals a fresh clone (`git clone --template=`), but for our documented keys."""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from repopool_async import LeasedSlot, PoolConfig, PoolManager
from repopool_async.git_directory import OWN_CONFIG


def git(path: Path, *args: str, check: bool = True) -> str:
    return subprocess.run(["git", "-C", str(path), *args], check=check, capture_output=True, text=True).stdout.strip()


def describe(tree: Path) -> dict[str, object]:
    """Return everything by which two clones could differ, but for times and where objects lie."""
    inside = [path for path in (tree / ".git").rglob("*") if not path.is_dir()]
    config = sorted(git(tree, "config", "--local", "-l").splitlines())
    own = {f"{key}={value}" for key, value in OWN_CONFIG.items()}
    return {
        "files": {
            str(path.relative_to(tree)): (path.lstat().st_mode, path.read_bytes())
            for path in tree.rglob("*")
            if path.is_file() and ".git" not in path.relative_to(tree).parts
        },
        "status": git(tree, "status", "--porcelain=v2", "--branch", "--ignored"),
        "head": (tree / ".git/HEAD").read_text(),
        "refs": git(tree, "for-each-ref", "--format=%(objectname) %(symref) %(upstream) %(refname)"),
        "config": [line for line in config if line not in own],
        "reflog": git(tree, "reflog", "show", "--format=%H %gs", "HEAD"),
        "stash": git(tree, "stash", "list"),
        "index": git(tree, "ls-files", "-v", "-s"),
        "git directory": sorted(
            str(path.relative_to(tree / ".git"))
            for path in inside
            if not str(path.relative_to(tree / ".git")).startswith("objects/")
        ),
        "fsck": git(tree, "fsck", "--no-dangling", check=False),
    }


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        yield manager


async def make_a_mess(slot: LeasedSlot) -> None:
    await slot.run(
        "sh", "-c",
        "git config user.name x && git config user.email x@x && echo 1 >> README.md && git stash -q;"
        "git tag mess; git checkout -q -b mess; echo 2 > new; git add -A; git commit -qm mess;"
        "git branch -D main; git config core.hooksPath /tmp; mkdir -p .git/hooks; echo > .git/hooks/post-checkout;"
        "echo '*' > .git/info/exclude; mkdir -p build/deep nested && git init -q nested; rm -rf src; ln -s /etc src;"
        "git update-ref refs/remotes/origin/main HEAD; echo x > .git/index.lock; chmod 0555 build",
    )  # fmt: skip


@pytest.mark.parametrize("ref", ["main", "feature/x", "v1.0", "light"])
async def test_a_lease_equals_a_fresh_clone_before_and_after_a_mess(
    manager: PoolManager, origin: Path, tmp_path: Path, ref: str
) -> None:
    fresh = tmp_path / "fresh"
    git(tmp_path, "clone", "-q", "--template=", "--branch", ref, str(origin), str(fresh))
    expected = describe(fresh)
    pool = await manager.create_pool("app", str(origin))
    for _ in range(2):
        async with pool.lease(ref=ref) as slot:
            assert describe(slot.path) == expected
            await make_a_mess(slot)


async def test_the_default_lease_equals_a_plain_clone(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    git(tmp_path, "clone", "-q", "--template=", str(origin), str(fresh))
    pool = await manager.create_pool("app", str(origin))
    async with pool.lease() as slot:
        assert describe(slot.path) == describe(fresh)
        await make_a_mess(slot)
    async with pool.lease(ref="feature/x") as slot:
        await make_a_mess(slot)
    async with pool.lease() as slot:
        assert describe(slot.path) == describe(fresh)


async def test_an_untouched_slot_costs_no_git_when_it_comes_back(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("app", str(origin), cleanup="inline")
    async with pool.lease() as slot:
        _ = (slot.path / "README.md").read_bytes()
    log = await manager.get_cleanup_log(slot.slot_id)
    assert log[-1].steps == ("untouched",)
    async with pool.lease(ref="feature/x"):
        pass
    log = await manager.get_cleanup_log(slot.slot_id)
    assert [entry.steps for entry in log[-2:]] == [("checked out",), ("untouched",)]


async def test_what_a_lessee_writes_into_the_pools_own_index_is_believed_of_no_later_one(
    manager: PoolManager, origin: Path
) -> None:
    """That index says what belongs in the trees of all slots at a commit; it is first read after this lease."""
    await manager.create_pool("app", str(origin), num_slots=1, fetch_on_allocate=False)
    planted = f"100644,{git(origin, 'rev-parse', 'main:README.md')},planted/file"
    async with manager.lease("app") as slot:
        pristine = str(slot.path.parent / "pristine/git")
        await slot.run("git", "--git-dir", pristine, "update-index", "--add", "--cacheinfo", planted)
    await manager.wait_clean()
    async with manager.lease("app") as slot:
        (slot.path / "planted").mkdir()
    await manager.wait_clean()
    async with manager.lease("app") as slot:
        assert not (slot.path / "planted").exists()
