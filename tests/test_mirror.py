"""One repository, one fetch for everyone: built once, shared by who asks in time, followed for who asks later."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from repopool_async import GitOperationError, LocalHost, LockManager
from repopool_async._git import GitRunner, base_environment
from repopool_async.mirror import Mirror

MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]


def git(path: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(path), *args], check=True, capture_output=True, text=True).stdout.strip()


def make_mirror(
    tmp_path: Path, url: Path, *, trace: Path | None = None, remotes: Mapping[str, str] | None = None
) -> Mirror:
    host = LocalHost()
    environment = base_environment(extra={"GIT_TRACE": str(trace)} if trace else None)
    return Mirror(
        str(tmp_path / "pool/mirror.git"),
        str(url),
        host=host,
        git=GitRunner(host, environment=environment),
        locks=LockManager(tmp_path / "locks"),
        repo_name="pool",
        remotes=remotes,
    )


@pytest.fixture
async def mirror(tmp_path: Path, origin: Path) -> AsyncIterator[Mirror]:
    mirror = make_mirror(tmp_path, origin)
    await mirror.ensure()
    yield mirror
    await mirror.aclose()


def packs_sent(trace: Path) -> int:
    """Count the processes that packed objects for a fetch."""
    return sum("run_command: " in line and "pack-objects" in line for line in trace.read_text().splitlines())


async def test_a_hundred_requests_at_once_cause_one_fetch(
    tmp_path: Path, origin: Path, make_commit: MakeCommit
) -> None:
    trace = tmp_path / "trace"
    mirror = make_mirror(tmp_path, origin, trace=trace)
    await mirror.ensure()
    commit = make_commit(origin, "main", {"new": b"1"})
    trace.write_text("")
    async with asyncio.TaskGroup() as group:
        for _ in range(100):
            group.create_task(mirror.fetch())
    assert mirror.fetch_count == 1
    assert packs_sent(trace) == 1
    assert (await mirror.resolve("main")).commit == commit


@pytest.mark.parametrize(
    "change",
    [
        ("update-ref", "refs/heads/new", "main"),
        ("update-ref", "-d", "refs/heads/feature/x"),
        ("tag", "another", "main"),
        ("tag", "-f", "-a", "-m", "again", "v1.0", "main"),
        ("symbolic-ref", "HEAD", "refs/heads/feature/x"),
    ],
)
async def test_whatever_the_remote_changes_is_fetched_and_nothing_is_where_it_changed_nothing(
    tmp_path: Path, origin: Path, change: tuple[str, ...]
) -> None:
    trace = tmp_path / "trace"
    mirror = make_mirror(tmp_path, origin, trace=trace)
    await mirror.ensure()
    await mirror.fetch()
    trace.write_text("")

    await mirror.fetch()
    unchanged = trace.read_text()
    git(origin, *change)
    await mirror.fetch()
    snapshot = await mirror.snapshot()

    assert "built-in: git ls-remote" in unchanged
    assert "built-in: git fetch" not in unchanged
    assert "built-in: git fetch" in trace.read_text()
    assert snapshot.branches.keys() == set(git(origin, "branch", "--format=%(refname:short)").split())
    assert snapshot.tags == {name: git(origin, "rev-parse", f"{name}^{{}}") for name in git(origin, "tag").split()}
    assert snapshot.default_branch == git(origin, "symbolic-ref", "--short", "HEAD")
    await mirror.aclose()


async def test_another_remotes_new_branch_is_fetched_too(tmp_path: Path, origin: Path, make_commit: MakeCommit) -> None:
    fork = tmp_path / "fork"
    git(tmp_path, "clone", "-q", "--bare", str(origin), str(fork))
    mirror = make_mirror(tmp_path, origin, remotes={"fork": str(fork)})
    await mirror.ensure()
    await mirror.fetch()
    commit = git(fork, "rev-parse", "main")

    git(fork, "update-ref", "refs/heads/theirs", commit)
    await mirror.fetch()

    assert git(Path(mirror.path), "rev-parse", "refs/remotes/fork/theirs") == commit
    await mirror.aclose()


async def test_who_asks_after_the_spawn_joins_the_next_fetch(
    mirror: Mirror, origin: Path, make_commit: MakeCommit
) -> None:
    first = asyncio.create_task(mirror.fetch())
    while mirror.fetch_count == 0:
        await asyncio.sleep(0)
    commit = make_commit(origin, "main", {"late": b"1"})  # pushed after the first git was spawned
    await asyncio.gather(*[mirror.fetch() for _ in range(10)])
    await first
    assert mirror.fetch_count == 2
    assert (await mirror.resolve("main")).commit == commit


async def test_another_managers_fetch_serves_us_if_it_began_after_we_asked(
    mirror: Mirror, tmp_path: Path, origin: Path
) -> None:
    other = make_mirror(tmp_path, origin)
    await other.ensure()
    await asyncio.gather(mirror.fetch(), other.fetch())
    assert mirror.fetch_count + other.fetch_count == 1
    await other.aclose()


async def test_one_waiters_cancellation_does_not_end_it_for_the_rest(mirror: Mirror) -> None:
    tasks = [asyncio.create_task(mirror.fetch()) for _ in range(3)]
    while mirror.fetch_count == 0:
        await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[1].cancel()
    await asyncio.wait(tasks)
    assert tasks[0].cancelled()
    assert tasks[2].result() is None
    assert mirror.fetch_count == 1


async def test_a_failure_reaches_every_waiter_and_the_next_fetch_works(
    mirror: Mirror, origin: Path, tmp_path: Path
) -> None:
    origin.rename(tmp_path / "away")
    results = await asyncio.gather(*[mirror.fetch() for _ in range(5)], return_exceptions=True)
    assert all(isinstance(result, GitOperationError) for result in results)
    (tmp_path / "away").rename(origin)
    await mirror.fetch()


async def test_an_age_lets_it_serve_from_what_it_has(mirror: Mirror) -> None:
    assert await mirror.refresh(max_age=0)
    assert not await mirror.refresh(max_age=60)
    assert mirror.fetch_count == 1


async def test_refs_that_the_remote_deletes_go_and_ours_stay(
    mirror: Mirror, origin: Path, make_commit: MakeCommit
) -> None:
    feature = git(origin, "rev-parse", "feature/x")
    await mirror.keep("workspace-pool-slot1", feature)
    git(origin, "update-ref", "-d", "refs/heads/feature/x")
    make_commit(origin, "feature/x/deeper", {"d": b"1"})
    await mirror.fetch()
    names = git(Path(mirror.path), "for-each-ref", "--format=%(refname)").splitlines()
    assert "refs/heads/feature/x" not in names
    assert "refs/heads/feature/x/deeper" in names
    assert "refs/repopool/keep/workspace-pool-slot1" in names
    await mirror.maintain()
    assert (await mirror.resolve(feature)).commit == feature
    await mirror.unkeep("workspace-pool-slot1")


async def test_it_is_built_once_by_many_and_nothing_half_made_is_left(tmp_path: Path, origin: Path) -> None:
    mirrors = [make_mirror(tmp_path, origin) for _ in range(5)]
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/mirror.git.tmp-1-dead").mkdir()  # what a killed builder left
    await asyncio.gather(*[mirror.ensure() for mirror in mirrors])
    assert {path.name for path in (tmp_path / "pool").iterdir()} == {"mirror.git"}
    await mirrors[0].check()


async def test_a_snapshot_is_reused_until_a_fetch_changes_something(
    mirror: Mirror, origin: Path, make_commit: MakeCommit
) -> None:
    before = await mirror.snapshot()
    assert await mirror.snapshot() is before
    await mirror.fetch()
    assert (await mirror.snapshot()).generation == before.generation
    make_commit(origin, "main", {"x": b"1"})
    await mirror.fetch()
    assert (await mirror.snapshot()).generation != before.generation


async def test_nested_tags_and_tags_of_blobs(mirror: Mirror, origin: Path) -> None:
    git(origin, "tag", "-a", "-m", "n", "nested", "v1.0")
    git(origin, "tag", "blob", "main:README.md")
    await mirror.fetch()
    assert (await mirror.resolve("nested")).commit == git(origin, "rev-parse", "v1.0^{commit}")
    with pytest.raises(LookupError, match="names no commit"):
        await mirror.resolve("blob")


async def test_a_rebuilt_mirror_serves_the_same_commits(mirror: Mirror, origin: Path) -> None:
    await mirror.rebuild()
    assert (await mirror.resolve("main")).commit == git(origin, "rev-parse", "main")
    await mirror.check()
