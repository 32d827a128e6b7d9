"""Pools with Git LFS: what a fresh clone with git-lfs shows, and nothing of the repository's own say in it.

Real git, real git-lfs, a real server. The reference is a fresh clone with the filter configured, and
`git lfs install --local`.
"""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest

from repopool_async import LfsError, PoolConfig, PoolManager, SlotState
from tests.conftest import MakeCommit
from tests.lfsserver import LfsServer, serving_lfs
from tests.workspaces.test_submodules import GITLINK, World, differences, git, module, seen

needs_lfs = pytest.mark.skipif(
    shutil.which("git-lfs") is None and not os.environ.get("REPOPOOL_CI"), reason="there is no git-lfs here"
)
pytestmark = needs_lfs

MARKED = b"*.bin filter=lfs diff=lfs merge=lfs -text\n"
ONE, TWO, THREE = b"one\n" * 1000, b"two" * 70_000, b"three\r\n"
TREE = "workspace-web-slot1"

Files = Mapping[str, bytes | None]


@pytest.fixture
def server(tmp_path: Path, origin: Path) -> Iterator[LfsServer]:
    with serving_lfs(tmp_path) as server:
        yield server


@pytest.fixture
def url(server: LfsServer, origin: Path, make_commit: MakeCommit) -> str:
    """A repository with LFS files on `main`, others on `other`, and none on `v1.0`."""
    files: Files = {".gitattributes": MARKED, "a.bin": server.pointer(ONE), "d/b.bin": server.pointer(TWO)}
    make_commit(origin, "main", {**files, "no-pointer.bin": b"raw\n", "d/not-marked": server.pointer(THREE)})
    git(origin, "branch", "other", "main")
    make_commit(origin, "other", {"a.bin": server.pointer(THREE), "d/b.bin": None, "d/c.bin": server.pointer(TWO)})
    return server.url("origin.git")


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        yield manager


async def make_pool(manager: PoolManager, url: str, **options: object) -> None:
    await manager.create_pool("web", url, **{"lfs": True, "cleanup": "inline", **options})  # type: ignore[arg-type]


def fresh(url: str, directory: Path, branch: str = "main") -> dict[str, str]:
    """Return what a fresh clone with git-lfs shows, but for its own copies of objects."""
    clone = directory / f"fresh-{branch.replace('/', '-')}"
    shutil.rmtree(clone, ignore_errors=True)
    filters = ("-c", "filter.lfs.process=git-lfs filter-process", "-c", "filter.lfs.required=true")
    git(directory, *filters, "clone", "-q", "--template=", "-b", branch, url, str(clone))
    git(clone, "lfs", "install", "--local")
    return shown(clone)


def shown(tree: Path) -> dict[str, str]:
    """Return everything of a clone but LFS objects; git-lfs writes its configuration in no particular order."""
    found = {name: text for name, text in seen(tree).items() if not name.startswith(".git/lfs")}
    found[".git/config"] = "\n".join(sorted(found[".git/config"].splitlines()))
    return found


async def test_a_slot_is_what_a_fresh_clone_with_git_lfs_is(
    manager: PoolManager, url: str, tmp_path: Path, server: LfsServer
) -> None:
    await make_pool(manager, url)
    async with manager.lease("web") as slot:
        assert (slot.path / "a.bin").read_bytes() == ONE
        assert (slot.path / "d/not-marked").read_bytes().startswith(b"version")
        # The reference calls the raw file modified, which git-lfs would convert; a slot leaves well alone.
        assert git(slot.path, "status", "--porcelain") in ("", " M no-pointer.bin")
        assert len(server.downloads) == 2
        expected, found = fresh(url, tmp_path), shown(slot.path)
        assert [line for line in differences(expected, found) if not line.startswith(". status")] == []


async def test_it_still_is_after_it_was_used_and_at_another_ref(
    manager: PoolManager, url: str, tmp_path: Path, origin: Path, make_commit: MakeCommit
) -> None:
    make_commit(origin, "main", {"no-pointer.bin": None})
    make_commit(origin, "other", {"no-pointer.bin": None})
    await make_pool(manager, url)
    for branch in ("main", "other", "feature/x"):
        async with manager.lease("web", ref=branch) as slot:
            assert differences(fresh(url, tmp_path, branch), shown(slot.path)) == []
            (slot.path / "a.bin").write_bytes(b"edited")
            (slot.path / "d").mkdir(exist_ok=True)
            (slot.path / "d/more.bin").write_bytes(ONE)
            git(slot.path, "config", "filter.lfs.smudge", f"touch {tmp_path}/ran; cat")
            git(slot.path, "config", "filter.lfs.process", f"touch {tmp_path}/ran")
            (slot.path / ".lfsconfig").write_text("[lfs]\n\turl = http://127.0.0.1:1/nowhere\n")
        assert not await manager.check()
    assert not (tmp_path / "ran").exists()


async def test_a_lessee_commits_and_pushes_lfs_files_as_from_any_clone(
    manager: PoolManager, url: str, server: LfsServer, origin: Path
) -> None:
    git(origin, "config", "http.receivepack", "true")
    await make_pool(manager, url)
    async with manager.lease("web") as slot:
        (slot.path / "new.bin").write_bytes(b"made by a lessee")
        git(slot.path, "add", "new.bin")
        git(slot.path, "commit", "-q", "-m", "New")
        git(slot.path, "push", "-q", "origin", "HEAD:refs/heads/pushed")
    assert b"made by a lessee" in server.contents.values()
    async with manager.lease("web", ref="pushed") as slot:
        assert (slot.path / "new.bin").read_bytes() == b"made by a lessee"


async def test_a_lessees_git_lfs_finds_the_pools_objects(manager: PoolManager, url: str, server: LfsServer) -> None:
    await make_pool(manager, url)
    async with manager.lease("web") as slot:
        server.contents.clear()
        (slot.path / "a.bin").unlink()
        git(slot.path, "checkout", "a.bin")
        assert (slot.path / "a.bin").read_bytes() == ONE


LFSCONFIG = """[lfs]
	url = http://127.0.0.1:1/nowhere
	fetchexclude = *
	standalonetransferagent = x
[lfs "customtransfer.x"]
	path = touch
	args = {canary}
[lfs "extension.x"]
	clean = touch {canary}
	smudge = touch {canary}
	priority = 0
"""


async def test_the_repositorys_own_configuration_is_not_believed(
    manager: PoolManager, url: str, tmp_path: Path, make_commit: MakeCommit
) -> None:
    canary = tmp_path / "ran"
    make_commit(tmp_path / "origin.git", "main", {".lfsconfig": LFSCONFIG.format(canary=canary).encode()})
    await make_pool(manager, url)
    async with manager.lease("web") as slot:
        assert (slot.path / "a.bin").read_bytes() == ONE
    assert not canary.exists()


async def test_the_operators_configuration_is(url: str, tmp_path: Path, origin: Path, server: LfsServer) -> None:
    elsewhere = {"lfs.url": server.url("elsewhere.git/info/lfs")}
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools"), git_config=elsewhere) as manager:
        await make_pool(manager, str(origin))
        async with manager.lease("web") as slot:
            assert (slot.path / "a.bin").read_bytes() == ONE


async def test_what_the_server_lacks_fails_the_lease_and_nothing_else(
    manager: PoolManager, url: str, origin: Path, make_commit: MakeCommit, server: LfsServer
) -> None:
    await make_pool(manager, url)
    gone = server.pointer(b"never uploaded")
    server.contents.popitem()
    make_commit(origin, "broken", {".gitattributes": MARKED, "gone.bin": gone, "a.bin": server.pointer(ONE)})
    with pytest.raises(LfsError, match=r"web: the LFS files of .* cannot be had .*push them there"):
        async with manager.lease("web", ref="broken"):
            pass
    await manager.wait_clean()
    assert (await manager.get_slot_status(TREE)).state is SlotState.AVAILABLE
    async with manager.lease("web") as slot:
        assert (slot.path / "a.bin").read_bytes() == ONE
    assert len(server.downloads) == 2


async def test_a_damaged_object_is_found_and_fetched_again(
    manager: PoolManager, url: str, tmp_path: Path, server: LfsServer
) -> None:
    await make_pool(manager, url)
    (stored,) = [path for path in (tmp_path / "pools/web/mirror-lfs.git/lfs/objects").rglob("*") if _is(path, ONE)]
    stored.chmod(0o644)
    stored.write_bytes(ONE.replace(b"one", b"eno"))
    async with manager.lease("web") as slot:  # nothing is read, so nothing is wrong
        assert (slot.path / "a.bin").read_bytes() == ONE
        (slot.path / "a.bin").write_bytes(b"")
    async with manager.lease("web") as slot:
        assert (slot.path / "a.bin").read_bytes() == ONE
    assert _is(stored, ONE)
    stored.chmod(0o644)
    stored.write_bytes(b"")
    assert "was damaged" in str(await manager.check())
    assert not await manager.check()
    assert _is(stored, ONE)


def _is(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


async def test_an_option_that_is_switched_rewrites_the_files(manager: PoolManager, url: str) -> None:
    for is_wanted in (False, True, False):
        await make_pool(manager, url, lfs=is_wanted)
        async with manager.lease("web") as slot:
            assert ((slot.path / "a.bin").read_bytes() == ONE) is is_wanted
            assert (slot.path / ".git/hooks/pre-push").exists() is is_wanted


async def test_a_mirror_made_anew_keeps_the_objects(
    manager: PoolManager, url: str, tmp_path: Path, server: LfsServer
) -> None:
    await make_pool(manager, url)
    shutil.rmtree(tmp_path / "pools/web/mirror.git/objects/pack")
    assert await manager.check()
    async with manager.lease("web") as slot:
        assert (slot.path / "a.bin").read_bytes() == ONE
    assert len(server.downloads) == 2


async def test_unpushed_lfs_files_are_saved_as_they_are(
    manager: PoolManager, url: str, origin: Path, make_commit: MakeCommit
) -> None:
    make_commit(origin, "main", {"no-pointer.bin": None})  # git-lfs may call it modified, as in any clone
    await make_pool(manager, url, salvage="always")
    async with manager.lease("web"):
        pass
    assert await manager.list_salvage() == []
    async with manager.lease("web") as slot:
        (slot.path / "a.bin").write_bytes(b"\0unsaved")
    (record,) = await manager.list_salvage()
    assert (record.files_changed, record.untracked) == (1, 0)
    async with manager.lease("web") as slot:
        await manager.restore_salvage(record.salvage_id, slot)
        assert (slot.path / "a.bin").read_bytes() == b"\0unsaved"


@pytest.mark.parametrize("isolation", ["shared", "full"])
async def test_submodules_have_lfs_files_too(
    manager: PoolManager, tmp_path: Path, server: LfsServer, isolation: str
) -> None:
    world = World(tmp_path)
    world.make("lib", {".gitattributes": MARKED.decode(), "x.bin": server.pointer(ONE).decode()})
    declared = module("lib", path="lib", url="../lib.git")
    world.make("top", {".gitmodules": declared, "lib": (GITLINK, world.head("lib")), "README": "top\n"})
    await make_pool(manager, server.url("top.git"), submodules=True, isolation=isolation)
    for _ in range(2):
        async with manager.lease("web") as slot:
            assert (slot.path / "lib/x.bin").read_bytes() == ONE
            assert git(slot.path, "status", "--porcelain") == ""
            assert git(slot.path / "lib", "status", "--porcelain") == ""
            assert (slot.path / ".git/modules/lib/hooks/pre-push").exists()
            (slot.path / "lib/x.bin").write_bytes(b"")
    assert not await manager.check()


async def test_credentials_reach_the_server_and_nothing_else(
    manager: PoolManager, url: str, server: LfsServer, tmp_path: Path
) -> None:
    server.credentials = "bot:s3cret-token"
    await make_pool(manager, url.replace("//", "//bot:s3cret-token@"))
    async with manager.lease("web") as slot:
        assert (slot.path / "a.bin").read_bytes() == ONE
    assert not any(b"s3cret" in line for line in server.command_lines)
    found = subprocess.run(["grep", "-r", "s3cret", tmp_path / "pools"], capture_output=True, check=False)
    assert found.stdout == b""


async def test_without_git_lfs_the_remedy_is_named(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "bin"
    own.mkdir()
    for name in ("git", "sh"):
        (own / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(own))
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        with pytest.raises(LfsError, match=r"web: lfs needs git-lfs on .*apt-get install git-lfs"):
            await make_pool(manager, str(origin))
