"""A whole life of a clone and of its mirror on every kind of host: the strategy knows nothing of where it works."""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import attrs
import pytest

from repopool_async import LockManager, Slot
from repopool_async._clock import now
from repopool_async._git import GitRunner, base_environment
from repopool_async.hosts.base import Host
from repopool_async.mirror import Mirror
from repopool_async.workspaces.base import Checkout, Rung
from repopool_async.workspaces.clone import CloneWorkspace

MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]


def git(path: Path, *args: str) -> str:
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # looking must not change anything
    done = subprocess.run(["git", "-C", str(path), *args], check=True, capture_output=True, text=True, env=env)
    return done.stdout.strip()


def shown(tree: Path) -> dict[str, tuple[int, bytes]]:
    """Return what a tree holds outside its git directory: modes and contents by name."""
    found = {}
    for directory, names, files in os.walk(tree):
        if ".git" in names:
            names.remove(".git")
        for name in [*names, *files]:
            path = Path(directory, name)
            mode = path.lstat().st_mode
            data = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            found[str(path.relative_to(tree))] = (mode, data)
    return found


@attrs.frozen
class Pool:
    mirror: Mirror
    workspace: CloneWorkspace
    slot: Slot


@pytest.fixture
async def pool(host: Host, tmp_path: Path, origin: Path) -> AsyncIterator[Pool]:
    root = tmp_path / "pools/web"
    runner = GitRunner(host, environment=base_environment())
    mirror = Mirror(
        str(root / "mirror.git"),
        str(origin),
        host=host,
        git=runner,
        locks=LockManager(tmp_path / "locks"),
        repo_name="web",
    )
    await mirror.ensure()
    slot = Slot("workspace-web-slot1", "web", str(origin), str(root / "slots/slot1/tree"), created_at=now())
    Path(slot.path).parent.mkdir(parents=True)
    yield Pool(mirror, CloneWorkspace(host=host, git=runner, mirror=mirror), slot)
    await mirror.aclose()


async def checkout(pool: Pool, ref: str) -> Checkout:
    resolved = await pool.mirror.resolve(ref)
    return Checkout(resolved.commit, resolved.branch)


def contaminate(tree: Path, outside: Path) -> None:
    (tree / "README.md").write_text("changed")
    os.utime(tree / "README.md", (1, 1))
    (tree / "src/app.py").chmod(0o755)
    shutil.rmtree(tree / "src/data", ignore_errors=True)
    (tree / "src/data").symlink_to(outside)
    (tree / "build").mkdir()
    (tree / "build/ignored.log").write_text("x")
    (tree / os.fsdecode(b"new\n\xff")).write_text("x")
    (tree / "nested/.git/hooks").mkdir(parents=True)
    os.mkfifo(tree / "fifo")
    (tree / ".git/hooks").mkdir(exist_ok=True)
    for hook in ("post-checkout", "post-index-change"):
        (tree / f".git/hooks/{hook}").write_text(f"#!/bin/sh\ntouch {outside}/executed\n")
        (tree / f".git/hooks/{hook}").chmod(0o755)
    with (tree / ".git/config").open("a") as config:
        config.write(f"[core]\n\tfsmonitor = touch {outside}/executed\n")


@pytest.mark.parametrize("host", ["local", "asyncssh"], indirect=True)
async def test_a_tree_is_made_used_and_cleaned(
    pool: Pool, tmp_path: Path, origin: Path, make_commit: MakeCommit
) -> None:
    workspace, tree = pool.workspace, Path(pool.slot.path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()

    async def sealed(slot: Slot, wanted: Checkout) -> Slot:
        return attrs.evolve(slot, seal=await workspace.seal(slot, wanted))

    def same_as_a_clone(ref: str) -> None:
        clone = tmp_path / "reference"
        shutil.rmtree(clone, ignore_errors=True)
        subprocess.run(["git", "clone", "-q", "--template=", "-b", ref, str(origin), str(clone)], check=True)
        assert shown(tree) == shown(clone)
        assert git(tree, "status", "--porcelain", "--ignored") == ""
        assert git(tree, "rev-parse", "HEAD") == git(clone, "rev-parse", "HEAD")
        git(tree, "fsck", "--strict")

    main = await checkout(pool, "main")
    await workspace.provision(pool.slot, main)
    slot = await sealed(pool.slot, main)
    same_as_a_clone("main")
    made = tree.stat().st_ctime_ns
    assert await workspace.verify(slot) == []
    assert tree.stat().st_ctime_ns == made  # looking changes nothing, or the next cleaning would look at all of it
    assert (await workspace.prepare(slot, main)).warm

    contaminate(tree, outside)
    work = await workspace.restore(slot, main, rung=Rung.CLEAN)
    assert work.removed >= 4
    assert work.restored >= 2
    slot = await sealed(slot, main)
    same_as_a_clone("main")
    assert await workspace.verify(slot) == []
    assert [path.name for path in outside.iterdir()] == ["kept"]

    slot = await sealed(slot, main)
    assert (await workspace.restore(slot, main, rung=Rung.CLEAN)).warm  # nothing touched, nothing done
    slot = await sealed(slot, main)

    make_commit(origin, "feature/x", {"src/new.py": b"N = 1\n"})
    await pool.mirror.fetch()
    feature = await checkout(pool, "feature/x")
    await workspace.prepare(slot, feature)
    slot = attrs.evolve(slot, seal=await workspace.seal(slot, feature, keeps_mark=True))
    same_as_a_clone("feature/x")
    assert await workspace.verify(slot) == []

    contaminate(tree, outside)
    await workspace.restore(slot, main, rung=Rung.RECREATE_TREE)
    slot = await sealed(slot, main)
    same_as_a_clone("main")
    (tree / "README.md").write_text("changed behind the seal")
    assert await workspace.verify(slot) != []
    await workspace.free_space(slot)
    await workspace.discard(slot)
    assert list((tmp_path / "pools/web/trash").iterdir()) == []
    assert [path.name for path in outside.iterdir()] == ["kept"]
