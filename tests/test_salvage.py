"""What a lessee left unpushed is saved whatever it is, executes nothing, and comes back byte for byte."""

import asyncio
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from repopool_async import (
    CommandFailedError,
    LeasedSlot,
    PoolConfig,
    PoolManager,
    RepoPool,
    SalvageError,
    SalvageNotFoundError,
    SalvageRecord,
    SlotState,
)
from repopool_async._clock import now
from repopool_async.salvage_reader import parse_refs
from repopool_async.slot_cleaner import SlotCleaner

MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]
RAW = bytes(range(256)) * 3
SLOT = "workspace-web-slot1"


def git(path: Path, *args: str, check: bool = True, input: bytes | None = None) -> str:
    done = subprocess.run(["git", "-C", str(path), *args], check=check, capture_output=True, input=input, timeout=60)
    return done.stdout.decode(errors="surrogateescape").strip()


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        yield manager


@pytest.fixture
async def pool(manager: PoolManager, origin: Path) -> RepoPool:
    return await manager.create_pool("web", str(origin))


async def lease(manager: PoolManager, **options: Any) -> LeasedSlot:
    slot = await manager.allocate_slot("web", timeout=30, **options)
    assert slot is not None
    return slot


async def end_badly(manager: PoolManager) -> SalvageRecord | None:
    """Take the slot away, wait until it was recovered, and return what was saved."""
    known = {record.salvage_id for record in await manager.list_salvage()}
    await manager.force_unlock(SLOT)
    await manager.wait_clean()
    assert (await manager.get_slot_status(SLOT)).state is SlotState.AVAILABLE
    return next((one for one in await manager.list_salvage() if one.salvage_id not in known), None)


async def saved(manager: PoolManager) -> SalvageRecord:
    record = await end_badly(manager)
    assert record is not None
    return record


def salvage_git(tmp_path: Path) -> Path:
    return tmp_path / "pools/web/salvage.git"


def contents(repository: Path, commit: str, name: str) -> bytes:
    return subprocess.run(
        ["git", "-C", str(repository), "cat-file", "blob", f"{commit}:{name}"], check=True, capture_output=True
    ).stdout


def names(repository: Path, commit: str) -> set[str]:
    return set(git(repository, "ls-tree", "-r", "--name-only", commit).splitlines())


# -- what is saved -----------------------------------------------------------------------------------------------


async def test_commits_stash_changes_and_untracked_files_are_saved(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    slot = await lease(manager, metadata={"agent": "seven"})
    tree = slot.path
    (tree / "committed").write_bytes(RAW)
    git(tree, "add", "committed")
    git(tree, "commit", "-qm", "one")
    git(tree, "checkout", "-qb", "side")
    git(tree, "commit", "-q", "--allow-empty", "-m", "two")
    side = git(tree, "rev-parse", "side")
    git(tree, "checkout", "-q", "main")
    for text in ("older", "newer"):
        (tree / "README.md").write_text(text)
        git(tree, "stash", "push", "-qm", f"stash {text}")
    (tree / "src/app.py").write_bytes(RAW + b"changed")
    (tree / "CHANGES.md").unlink()
    (tree / "new dir").mkdir()
    (tree / "new dir/ü\n").write_bytes(RAW)
    (tree / "link").symlink_to("/etc/passwd")
    (tree / "tool").write_text("#!/bin/sh\n")
    (tree / "tool").chmod(0o755)
    (tree / "noise.log").write_text("ignored")
    head = git(tree, "rev-parse", "HEAD")

    record = await saved(manager)

    assert (record.reason, record.branch, record.head, record.base) == ("forced", "main", head, slot.commit)
    assert (record.commits, record.stashes, record.files_changed, record.untracked) == (2, 2, 2, 3)
    assert record.branches == {"main": head, "side": side}
    assert record.stash_messages == ("On main: stash newer", "On main: stash older")
    assert (record.salvage_id, record.slot_id, record.metadata) == (slot.lease_id, SLOT, {"agent": "seven"})
    assert record.skipped == ()
    kept = salvage_git(tmp_path)
    assert contents(kept, record.commit, "src/app.py") == RAW + b"changed"
    assert contents(kept, record.commit, "new dir/ü\n") == RAW
    assert contents(kept, record.commit, "committed") == RAW
    assert contents(kept, record.commit, "link") == b"/etc/passwd"
    assert contents(kept, record.stash_commits[0], "README.md") == b"newer"
    assert contents(kept, record.stash_commits[1], "README.md") == b"older"
    assert git(kept, "ls-tree", record.commit, "tool").startswith("100755")
    assert not {"CHANGES.md", "noise.log"} & names(kept, record.commit)
    parents = git(kept, "log", "-1", "--format=%P", record.commit).split()
    assert parents == [head, side, *record.stash_commits]
    git(kept, "fsck", "--connectivity-only", "--no-dangling")
    assert not list((tmp_path / "pools/web/salvage-work").iterdir())


async def test_nothing_left_makes_nothing(manager: PoolManager, pool: RepoPool, tmp_path: Path) -> None:
    slot = await lease(manager)
    git(slot.path, "checkout", "-q", "-b", "empty", "origin/feature/x")
    (slot.path / "a.log").write_text("ignored")
    assert await end_badly(manager) is None
    await lease(manager)
    assert await end_badly(manager) is None
    assert not salvage_git(tmp_path).exists()


async def test_an_ordinary_return_saves_only_where_asked(manager: PoolManager, origin: Path) -> None:
    for option, expected in (("abnormal", 0), ("never", 0), ("always", 1)):
        pool = await manager.create_pool("web", str(origin), salvage=option)
        async with pool.lease() as slot:
            (slot.path / "note").write_text("x")
        await manager.wait_clean()
        assert len(await manager.list_salvage()) == expected
    assert (await manager.list_salvage())[0].reason == "returned"
    await manager.create_pool("web", str(origin), salvage="never")
    slot = await lease(manager)
    (slot.path / "note").write_text("x")
    await end_badly(manager)
    assert len(await manager.list_salvage()) == 1


async def test_an_edit_that_keeps_size_and_times_is_saved(manager: PoolManager, pool: RepoPool, tmp_path: Path) -> None:
    slot = await lease(manager)
    file = slot.path / "src/app.py"
    before = file.stat()
    data = file.read_bytes().replace(b"hello", b"hullo")
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    record = await saved(manager)
    assert contents(salvage_git(tmp_path), record.commit, "src/app.py") == data


async def test_line_endings_and_filters_do_not_touch_the_bytes(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    slot = await lease(manager)
    (slot.path / ".gitattributes").write_text("* text=auto eol=lf ident filter=evil working-tree-encoding=UTF-16\n")
    (slot.path / "crlf").write_bytes(b"a\r\nb\n$Id: x$\r\n")
    (slot.path / "README.md").write_bytes(b"# A\r\n$Id: 1$\r\n")
    record = await saved(manager)
    kept = salvage_git(tmp_path)
    assert contents(kept, record.commit, "crlf") == b"a\r\nb\n$Id: x$\r\n"
    assert contents(kept, record.commit, "README.md") == b"# A\r\n$Id: 1$\r\n"


async def test_packed_work_and_an_ignored_but_tracked_file_are_saved(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    slot = await lease(manager, ref="v1.0")
    (slot.path / "forced.log").write_text("tracked all the same")
    git(slot.path, "add", "-f", "forced.log")
    git(slot.path, "commit", "-qm", "forced")
    for number in range(20):
        (slot.path / f"f{number}").write_text(str(number))
        git(slot.path, "add", ".")
        git(slot.path, "commit", "-qm", f"number {number}")
    git(slot.path, "gc", "-q")
    git(slot.path, "branch", "packed")
    git(slot.path, "pack-refs", "--all")
    assert not list((slot.path / ".git/objects").glob("??"))
    (slot.path / "forced.log").write_text("and changed")
    record = await saved(manager)
    assert (record.branch, record.commits, record.files_changed) == (None, 21, 1)
    assert record.branches == {"packed": record.head}
    assert contents(salvage_git(tmp_path), record.commit, "forced.log") == b"and changed"
    assert contents(salvage_git(tmp_path), record.commit, "f19") == b"19"


async def test_repositories_inside_the_tree_are_saved_as_files(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    slot = await lease(manager)
    inner = slot.path / "vendor/inner"
    inner.mkdir(parents=True)
    git(inner, "init", "-q")
    (inner / "file").write_text("inside")
    git(inner, "add", ".")
    git(inner, "commit", "-qm", "inner")
    record = await saved(manager)
    assert contents(salvage_git(tmp_path), record.commit, "vendor/inner/file") == b"inside"
    assert any("vendor/inner/.git" in line for line in record.skipped)


async def test_files_directories_and_links_that_changed_places_are_saved(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    slot = await lease(manager)
    (slot.path / "README.md").unlink()
    (slot.path / "README.md").mkdir()
    (slot.path / "README.md/inside").write_text("1")
    git(slot.path, "rm", "-rq", "src")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "app.py").write_text("secret")
    (slot.path / "src").symlink_to(outside)
    (slot.path / "CHANGES.md").unlink()
    (slot.path / "CHANGES.md").symlink_to(outside / "app.py")
    record = await saved(manager)
    kept = salvage_git(tmp_path)
    assert contents(kept, record.commit, "README.md/inside") == b"1"
    assert contents(kept, record.commit, "src") == str(outside).encode()
    assert contents(kept, record.commit, "CHANGES.md") == str(outside / "app.py").encode()
    assert (outside / "app.py").read_text() == "secret"


async def test_beyond_the_limit_commits_come_first_and_the_record_names_the_rest(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin), salvage_limit=10_000)
    slot = await lease(manager)
    (slot.path / "small").write_text("s")
    git(slot.path, "add", "small")
    git(slot.path, "commit", "-qm", "small")
    git(slot.path, "checkout", "-qb", "big")
    (slot.path / "huge").write_bytes(os.urandom(50_000))
    git(slot.path, "add", "huge")
    git(slot.path, "commit", "-qm", "big")
    git(slot.path, "checkout", "-q", "main")
    (slot.path / "README.md").write_bytes(b"r" * 6000)
    (slot.path / "fits").write_bytes(b"f" * 1000)
    (slot.path / "too much").write_bytes(b"x" * 5000)
    record = await saved(manager)
    assert list(record.branches) == ["main"]
    assert (record.files_changed, record.untracked) == (1, 1)
    assert {"fits", "README.md", "small"} <= names(salvage_git(tmp_path), record.commit)
    assert any("branch big" in line for line in record.skipped)
    assert any(line.startswith("too much: 5000 bytes") for line in record.skipped)
    assert record.size_bytes <= 10_000


# -- poison ------------------------------------------------------------------------------------------------------


def script(tmp_path: Path) -> tuple[Path, Path]:
    witness, path = tmp_path / "executed", tmp_path / "evil.sh"
    path.write_text(f"#!/bin/sh\ntouch {witness}\ncat\n")
    path.chmod(0o755)
    return path, witness


async def test_a_poisoned_git_directory_executes_nothing(manager: PoolManager, pool: RepoPool, tmp_path: Path) -> None:
    evil, witness = script(tmp_path)
    slot = await lease(manager)
    tree = slot.path
    (tree / "work").write_text("mine")
    git(tree, "add", "work")
    git(tree, "commit", "-qm", "work")
    (tree / ".gitattributes").write_text("* filter=evil diff=evil merge=evil\n")
    (tree / "dirty").write_text("d")
    with (tree / ".git/config").open("a") as config:
        config.write(
            f"[core]\n\tfsmonitor = {evil}\n\thooksPath = {tmp_path}\n\tsshCommand = {evil}\n\tpager = {evil}\n"
            f'[filter "evil"]\n\tclean = {evil}\n\tsmudge = {evil}\n\tprocess = {evil}\n\trequired = true\n'
            f'[diff "evil"]\n\ttextconv = {evil}\n\tcommand = {evil}\n[uploadpack]\n\tpackObjectsHook = {evil}\n'
            f'[alias]\n\tindex-pack = !{evil}\n[extensions]\n\tpartialClone = evil\n[remote "evil"]\n'
            f"\tpromisor = true\n\turl = ext::{evil}\n[include]\n\tpath = {evil}\n"
        )
    for hook in ("post-index-change", "reference-transaction", "pre-commit", "post-checkout"):
        (tree / ".git/hooks").mkdir(exist_ok=True)
        (tree / ".git/hooks" / hook).symlink_to(evil)
    inner = tree / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    with (inner / ".git/config").open("a") as config:
        config.write(f"[core]\n\tfsmonitor = {evil}\n")
    record = await saved(manager)
    assert not witness.exists()
    assert contents(salvage_git(tmp_path), record.commit, "work") == b"mine"
    assert contents(salvage_git(tmp_path), record.commit, "dirty") == b"d"


@pytest.mark.sampled(one_in=4)
@pytest.mark.parametrize(
    "place", ["HEAD", "packed-refs", "refs", "refs/heads", "refs/heads/main", "refs/stash", "logs", "logs/refs/stash",
              "objects", "objects/pack", "objects/aa", "index", "config", "."],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fifo", "link", "directory", "garbage"])
async def test_whatever_stands_in_a_place_of_the_git_directory_hangs_nothing_and_files_are_saved(
    manager: PoolManager, pool: RepoPool, tmp_path: Path, place: str, kind: str
) -> None:
    slot = await lease(manager)
    (slot.path / "dirty").write_text("d")
    victim = slot.path / ".git" / place
    if victim.exists():
        victim.rename(tmp_path / "was")
    victim.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(victim)
    elif kind == "link":
        victim.symlink_to(tmp_path / "was")
    elif kind == "directory":
        victim.mkdir()
        (victim / "x").write_bytes(b"\0")
    else:
        victim.write_bytes(b"\xff\0" * 100)
    started = time.monotonic()
    record = await saved(manager)
    assert time.monotonic() - started < 30
    assert contents(salvage_git(tmp_path), record.commit, "dirty") == b"d"


async def test_specials_in_the_tree_hang_nothing_and_are_named(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    slot = await lease(manager)
    for name in ("pipe", "src/.gitignore", ".gitattributes", "src/.gitattributes", ".gitmodules"):
        os.mkfifo(slot.path / name)
    (slot.path / "README.md").unlink()
    os.mkfifo(slot.path / "README.md")
    (slot.path / "dirty").write_text("d")
    record = await saved(manager)
    assert contents(salvage_git(tmp_path), record.commit, "dirty") == b"d"
    assert sum("fifo" in line for line in record.skipped) == 6


async def test_another_repositorys_objects_are_not_exposed(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    git(secret, "init", "-q", "-b", "main")
    (secret / "key").write_text("hidden")
    git(secret, "add", ".")
    git(secret, "commit", "-qm", "secret")
    commit, blob = git(secret, "rev-parse", "HEAD"), git(secret, "rev-parse", "HEAD:key")
    slot = await lease(manager)
    tree = slot.path
    (tree / "work").write_text("mine")
    git(tree, "add", "work")
    git(tree, "commit", "-qm", "work")
    with (tree / ".git/objects/info/alternates").open("a") as alternates:
        alternates.write(f"{secret}/.git/objects\n")
    (tree / ".git/objects/ab").symlink_to(secret / ".git/objects")
    git(tree, "branch", "stolen", commit)
    record = await saved(manager)
    assert list(record.branches) == ["main"]
    assert any("branch stolen" in line and "missing" in line for line in record.skipped)
    for name in (commit, blob):
        assert git(salvage_git(tmp_path), "cat-file", "-t", name, check=False) == ""


async def test_forged_objects_are_not_believed(manager: PoolManager, pool: RepoPool, tmp_path: Path) -> None:
    slot = await lease(manager)
    tree = slot.path
    git(tree, "branch", "good")
    (tree / "work").write_text("mine")
    git(tree, "add", "work")
    git(tree, "commit", "-qm", "work")
    blob = git(tree, "rev-parse", "HEAD:work")
    loose = tree / ".git/objects" / blob[:2] / blob[2:]
    loose.chmod(0o644)
    loose.write_bytes(zlib.compress(b"blob 6\0forged"))
    git(tree, "checkout", "-q", "good")
    (tree / "other").write_text("whole")
    git(tree, "add", "other")
    git(tree, "commit", "-qm", "other")
    readme = git(tree, "rev-parse", "HEAD:README.md")
    planted = tree / ".git/objects" / readme[:2] / readme[2:]
    planted.parent.mkdir(exist_ok=True)
    planted.write_bytes(zlib.compress(b"blob 6\0forged"))
    bomb = tree / ".git/objects/00" / ("0" * 38)
    bomb.parent.mkdir(exist_ok=True)
    bomb.write_bytes(zlib.compress(b"blob 999999999999\0" + b"\0" * 50_000_000))
    pack = tree / ".git/objects/pack/pack-forged.pack"
    pack.write_bytes(b"PACK\0\0\0\2\0\0\0\1" + b"\xff" * 100)
    record = await saved(manager)
    kept = salvage_git(tmp_path)
    assert list(record.branches) == ["good"]
    assert contents(kept, record.commit, "other") == b"whole"
    assert contents(kept, record.commit, "README.md") == b"# A small repository\n"
    assert any("branch main" in line for line in record.skipped)
    assert any("is not what its name says" in line for line in record.skipped)
    assert any("pack-forged" in line for line in record.skipped)


async def test_a_forged_index_of_a_pack_is_made_anew(manager: PoolManager, pool: RepoPool, tmp_path: Path) -> None:
    slot = await lease(manager)
    (slot.path / "work").write_text("mine")
    git(slot.path, "add", "work")
    git(slot.path, "commit", "-qm", "work")
    git(slot.path, "gc", "-q")
    index = next((slot.path / ".git/objects/pack").glob("*.idx"))
    data = bytearray(index.read_bytes())
    data[1032 + 5] ^= 0xFF  # the first object gets another name
    index.chmod(0o644)
    index.write_bytes(bytes(data))
    record = await saved(manager)
    assert contents(salvage_git(tmp_path), record.commit, "work") == b"mine"


async def test_replace_refs_grafts_and_environment_change_nothing(
    manager: PoolManager, pool: RepoPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = await lease(manager)
    tree = slot.path
    (tree / "work").write_text("mine")
    git(tree, "add", "work")
    git(tree, "commit", "-qm", "work")
    evil = git(tree, "hash-object", "-w", "--stdin", input=b"forged")
    git(tree, "update-ref", f"refs/replace/{git(tree, 'rev-parse', 'HEAD:work')}", evil)
    (tree / ".git/info").mkdir(exist_ok=True)
    (tree / ".git/info/grafts").write_text(f"{git(tree, 'rev-parse', 'HEAD')}\n")
    monkeypatch.setenv("GIT_DIR", str(tree / ".git"))
    monkeypatch.setenv("GIT_OBJECT_DIRECTORY", str(tree / ".git/objects"))
    record = await saved(manager)
    monkeypatch.undo()
    assert contents(salvage_git(tmp_path), record.commit, "work") == b"mine"
    assert record.commits == 1


async def test_an_unreadable_file_and_a_closed_directory_are_saved(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    slot = await lease(manager)
    (slot.path / "closed").mkdir()
    (slot.path / "closed/file").write_text("c")
    (slot.path / "closed/file").chmod(0)
    (slot.path / "closed").chmod(0)
    record = await saved(manager)
    assert contents(salvage_git(tmp_path), record.commit, "closed/file") == b"c"


async def test_names_that_git_refuses_are_passed_over_and_named(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    slot = await lease(manager)
    (slot.path / "git~1").mkdir()
    (slot.path / "git~1/config").write_text("x")
    (slot.path / os.fsdecode(b"\xff\xfe")).write_text("bytes")
    record = await saved(manager)
    assert record.untracked == 1
    assert any("git~1/config" in line for line in record.skipped)
    assert git(salvage_git(tmp_path), "ls-tree", "-rz", "--name-only", record.commit).split("\0").count("\udcff\udcfe")


async def test_a_tree_that_was_deleted_or_replaced_costs_no_slot(manager: PoolManager, pool: RepoPool) -> None:
    slot = await lease(manager)
    slot.path.rename(slot.path.parent / "elsewhere")
    assert await end_badly(manager) is None
    slot = await lease(manager)
    slot.path.rename(slot.path.parent / "elsewhere2")
    (slot.path.parent / "tree").symlink_to("/etc")
    assert await end_badly(manager) is None
    assert Path("/etc/passwd").exists()


async def test_work_that_cannot_be_saved_is_moved_aside_and_the_slot_goes_on(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    events = []

    async def listen() -> None:
        async for event in manager.events():
            events.append(event)

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0)
    slot = await lease(manager)
    (slot.path / "precious").write_text("p")
    inner = slot.path / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (tmp_path / "pools/web/salvage.git").write_text("in the way")
    await manager.force_unlock(SLOT)
    await manager.wait_clean()
    status = await manager.get_slot_status(SLOT)
    assert status.state is SlotState.AVAILABLE
    aside = tmp_path / "pools/web/salvage-failed" / slot.lease_id
    assert [path.read_text() for path in aside.glob("trees/*/precious")] == ["p"]
    assert list(aside.glob("trees/*/.git/HEAD"))
    assert list(aside.glob("nested/*/*/HEAD"))
    assert "why: " in (aside / "about.txt").read_text()
    await manager.close()
    await listener
    failed = [event for event in events if event.kind == "slot.salvage_failed"]
    assert [event.fields["path"] for event in failed] == [str(aside)]


async def test_a_lease_that_was_never_handed_out_leaves_nothing(
    manager: PoolManager, pool: RepoPool, tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*_: object) -> None:
        (tmp_path / "pools/web/slots/slot1/tree/half").write_text("half checked out")
        await asyncio.sleep(3600)

    monkeypatch.setattr(SlotCleaner, "cleanup_before_allocation", die)
    waiting = asyncio.create_task(lease(manager, ref="feature/x"))
    while not (tmp_path / "pools/web/slots/slot1/tree/half").exists():
        await asyncio.sleep(0)
    monkeypatch.undo()
    assert await end_badly(manager) is None
    waiting.cancel()
    await asyncio.wait([waiting])


# -- listing, restoring, forgetting ------------------------------------------------------------------------------


async def left_work(manager: PoolManager) -> SalvageRecord:
    slot = await lease(manager)
    tree = slot.path
    (tree / "committed").write_bytes(RAW)
    git(tree, "add", "committed")
    git(tree, "commit", "-qm", "one")
    git(tree, "branch", "side/way", git(tree, "commit-tree", "-m", "s", "-p", "HEAD", "HEAD^{tree}"))
    (tree / "README.md").write_text("stashed")
    git(tree, "stash", "push", "-qm", "the stash")
    (tree / "src/app.py").write_bytes(RAW)
    (tree / "CHANGES.md").unlink()
    (tree / "untracked").write_bytes(RAW)
    return await saved(manager)


async def test_restoring_into_a_clean_slot_brings_everything_back(manager: PoolManager, pool: RepoPool) -> None:
    record = await left_work(manager)
    async with manager.lease("web", timeout=30) as slot:
        restored = await manager.restore_salvage(record.salvage_id[:6], slot)
        tree, short = slot.path, record.salvage_id[:8]
        assert restored.branch == f"salvage/{short}"
        assert restored.branches == (f"salvage/{short}", f"salvage/{short}.side/way")
        assert restored.is_checked_out
        assert git(tree, "branch", "--show-current") == restored.branch
        assert git(tree, "rev-parse", "HEAD") == record.head
        status = git(tree, "status", "--porcelain")
        assert sorted(line.strip() for line in status.splitlines()) == ["?? untracked", "D CHANGES.md", "M src/app.py"]
        assert (tree / "src/app.py").read_bytes() == RAW
        assert (tree / "untracked").read_bytes() == RAW
        assert git(tree, "stash", "list", "--format=%gd %gs") == "stash@{0} On main: the stash"
        git(tree, "checkout", "-q", ".")
        git(tree, "stash", "pop", "-q")
        assert (tree / "README.md").read_text() == "stashed"


async def test_restoring_into_a_slot_with_changes_makes_branches_only(manager: PoolManager, pool: RepoPool) -> None:
    record = await left_work(manager)
    async with manager.lease("web", timeout=30) as slot:
        (slot.path / "README.md").write_text("own work")
        restored = await manager.restore_salvage(record.salvage_id, slot, branch="rescued")
        assert not restored.is_checked_out
        assert set(restored.branches) == {"rescued", "rescued.side/way", "rescued.files", "rescued.stash-0"}
        assert (slot.path / "README.md").read_text() == "own work"
        assert contents(slot.path, "rescued.files", "untracked") == RAW
        assert await manager.restore_salvage(record.salvage_id, slot, branch="rescued") == restored


async def test_a_branch_with_other_work_is_never_moved_and_none_is_made_beside_it(
    manager: PoolManager, pool: RepoPool
) -> None:
    record = await left_work(manager)
    async with manager.lease("web", timeout=30) as slot:
        git(slot.path, "branch", "rescued.side/way", slot.commit)
        with pytest.raises(CommandFailedError, match="already exists"):
            await manager.restore_salvage(record.salvage_id, slot, branch="rescued")
        listing = git(slot.path, "for-each-ref", "--format=%(refname:short) %(objectname)", "refs/heads/")
        assert listing.splitlines() == [f"main {slot.commit}", f"rescued.side/way {slot.commit}"]


async def test_restoring_into_any_clone_makes_branches(
    manager: PoolManager, pool: RepoPool, tmp_path: Path, origin: Path
) -> None:
    record = await left_work(manager)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(origin), str(clone))
    restored = await manager.restore_salvage_into(record.salvage_id, clone)
    assert contents(clone, f"{restored.branch}.files", "src/app.py") == RAW
    assert git(clone, "status", "--porcelain") == ""
    git(clone, "fsck", "--connectivity-only", "--no-dangling")
    assert await manager.restore_salvage_into(record.salvage_id, clone) == restored
    with pytest.raises(SalvageError, match="already exists"):
        await manager.restore_salvage_into(record.salvage_id, clone, branch="main")


async def test_what_was_restored_and_lost_again_is_saved_again(manager: PoolManager, pool: RepoPool) -> None:
    first = await left_work(manager)
    slot = await lease(manager)
    await manager.restore_salvage(first.salvage_id, slot)
    second = await saved(manager)
    assert (second.commits, second.stashes, second.untracked, second.files_changed) == (2, 1, 1, 2)
    assert second.head == first.head


async def test_saved_work_survives_its_slot_the_manager_and_a_deleted_branch(
    manager: PoolManager, origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=2)
    slot = await lease(manager, ref="feature/x")
    (slot.path / "note").write_text("n")
    record = await saved_of(manager, slot.slot_id)
    git(origin, "update-ref", "-d", "refs/heads/feature/x")
    await manager.remove_slot(slot.slot_id)
    async with pool.lease(timeout=30):
        pass
    git(tmp_path / "pools/web/mirror.git", "gc", "-q", "--prune=now")
    async with PoolManager(manager.config) as second, second.lease("web", timeout=30) as other:
        assert [one.salvage_id for one in await second.list_salvage("web")] == [record.salvage_id]
        await second.restore_salvage(record.salvage_id, other)
        assert (other.path / "src/feature.py").exists()
        assert (other.path / "note").read_text() == "n"


async def saved_of(manager: PoolManager, slot_id: str) -> SalvageRecord:
    await manager.force_unlock(slot_id)
    await manager.wait_clean()
    return (await manager.list_salvage())[-1]


async def test_removing_a_slot_saves_what_was_left_there(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin), num_slots=2)
    slot = await lease(manager)
    (slot.path / "note").write_text("n")
    await manager._shared.coordinator.force_unlock(slot.slot_id)  # and nobody has recovered it yet
    await (await manager.get_pool("web")).watch.notice_lost()
    await manager.remove_slot(slot.slot_id)
    records = await manager.list_salvage()
    assert [(record.slot_id, record.reason) for record in records] == [(slot.slot_id, "forced")]


async def test_closing_with_an_open_lease_saves_its_work_at_the_next_opening(
    manager: PoolManager, pool: RepoPool
) -> None:
    slot = await lease(manager)
    (slot.path / "note").write_text("n")
    await manager.close(0)
    async with PoolManager(manager.config) as second:
        await second.recover()
        records = await second.list_salvage()
        assert [(record.lease_id, record.reason) for record in records] == [(slot.lease_id, "closed")]
        assert await second.available_count("web") == 1


async def test_deleting_forgets_the_objects_too(manager: PoolManager, pool: RepoPool, tmp_path: Path) -> None:
    first = await left_work(manager)
    second = await left_work(manager)
    await manager.delete_salvage(first.salvage_id)
    assert [record.salvage_id for record in await manager.list_salvage()] == [second.salvage_id]
    kept = salvage_git(tmp_path)
    assert git(kept, "cat-file", "-t", first.commit, check=False) == ""
    assert contents(kept, second.commit, "untracked") == RAW
    keeps = git(tmp_path / "pools/web/mirror.git", "for-each-ref", "refs/repopool/keep")
    assert first.salvage_id not in keeps
    assert second.salvage_id in keeps
    for wrong in (first.salvage_id, "abcdef", ""):
        with pytest.raises(SalvageNotFoundError):
            await manager.delete_salvage(wrong)


async def test_old_work_expires(manager: PoolManager, pool: RepoPool, tmp_path: Path) -> None:
    record = await left_work(manager)
    failed = tmp_path / "pools/web/salvage-failed/old"
    failed.mkdir(parents=True)
    (failed / "about.txt").write_text("")
    os.utime(failed / "about.txt", (0, 0))
    assert await pool._context.reference.salvage.expire(now() - timedelta(days=1)) == ["old"]
    assert not failed.exists()
    assert await pool._context.reference.salvage.expire(now() + timedelta(days=1)) == [record.salvage_id]
    assert await manager.list_salvage() == []


async def test_the_sweep_removes_what_killed_processes_left_half_read(
    manager: PoolManager, pool: RepoPool, tmp_path: Path
) -> None:
    work = tmp_path / "pools/web/salvage-work"
    for name in ("dead", "alive"):
        (work / name).mkdir(parents=True)

    async def in_use() -> set[str]:
        return {"alive"}

    await pool._context.reference.salvage.sweep(in_use)
    assert os.listdir(work) == ["alive"]


async def test_a_description_shows_what_changed(manager: PoolManager, pool: RepoPool) -> None:
    record = await left_work(manager)
    found, text = await manager.describe_salvage(record.salvage_id)
    assert found == record
    for name in ("src/app.py", "untracked", "CHANGES.md"):
        assert name in text


# -- refs as text ------------------------------------------------------------------------------------------------


def test_refs_are_read_as_git_reads_them() -> None:
    a, b, c = "a" * 40, "b" * 40, "c" * 40
    refs = parse_refs(
        {
            "HEAD": b"ref: refs/heads/main\n",
            "packed-refs": f"# pack-refs with: peeled\n{a} refs/heads/main\n{b} refs/heads/old\n^{c}\n{c} refs/tags/t\n"
            f"{c} refs/remotes/origin/x\n".encode(),
            "refs/heads/main": f"{c}\n".encode(),
            "refs/heads/bad": b"garbage",
            "refs/stash": f"{b}\n".encode(),
            "logs/refs/stash": f"{'0' * 40} {a} me <m> 1 +0000\tfirst\n{a} {b} me <m> 2 +0000\tsecond\n".encode(),
        }
    )
    assert (refs.head, refs.branch) == (c, "main")
    assert refs.branches == {"main": c, "old": b}
    assert list(refs.stashes) == [(b, "second"), (a, "first")]


@pytest.mark.parametrize("head", [b"", b"ref: refs/heads/none\n", b"ref: ../../x", b"\xff\xfe", b"0" * 41])
def test_a_head_that_makes_no_sense_is_none(head: bytes) -> None:
    assert parse_refs({"HEAD": head}).head is None


# -- the command -------------------------------------------------------------------------------------------------


async def repopool(*words: str) -> str:
    argv = [sys.executable, "-m", "repopool_async.cli", *words]
    return (await asyncio.to_thread(subprocess.run, argv, check=True, capture_output=True, timeout=60)).stdout.decode()


async def test_the_command_lists_shows_and_restores(
    manager: PoolManager, pool: RepoPool, tmp_path: Path, origin: Path
) -> None:
    record = await left_work(manager)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(origin), str(clone))
    where = ("--workspaces-dir", str(tmp_path / "pools"))
    listed = await repopool("salvage", "list", *where)
    assert record.salvage_id[:8] in listed
    assert "2 commits, 1 stashes, 2 changed, 1 untracked" in listed
    assert json.loads(await repopool("salvage", "list", "web", "--json", *where))["salvage_id"] == record.salvage_id
    shown = await repopool("salvage", "show", record.salvage_id[:8], *where)
    assert "src/app.py" in shown
    assert "On main: the stash" in shown
    made = await repopool("salvage", "restore", record.salvage_id[:8], str(clone), "--branch", "back", *where)
    assert set(made.split()) == {"back", "back.side/way", "back.files", "back.stash-0"}
    assert contents(clone, "back.files", "untracked") == RAW
