"""The facade as a user meets it: pools, leases, slots, errors; real git throughout."""

import asyncio
import os
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from repopool_async import (
    ConfigError,
    EmptyRepositoryError,
    GitAccessError,
    GitOperationError,
    LeaseLostError,
    LeaseReleasedError,
    ManagerClosedError,
    PoolConfig,
    PoolExistsError,
    PoolInUseError,
    PoolManager,
    PoolManagerError,
    PoolNotFoundError,
    PoolTimeoutError,
    RefError,
    RepositoryUrlError,
    SlotAllocationError,
    SlotInUseError,
    SlotNotFoundError,
    SlotState,
    StoreError,
    TooManyRequestsError,
    UnknownRefError,
    pool_registry,
)
from repopool_async._identity import process_start_time

MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        yield manager


def git(path: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(path), *args], check=True, capture_output=True, text=True).stdout.strip()


# -- pools -------------------------------------------------------------------------------------------------------


async def test_creating_a_pool_makes_every_slot_a_clone(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), num_slots=3)
    summary = await pool.summary()
    assert (summary.total_slots, summary.available) == (3, 3)
    for number in (1, 2, 3):
        status = await manager.get_slot_status(f"workspace-web-slot{number}")
        assert status.state is SlotState.AVAILABLE
        assert git(Path(status.path), "rev-parse", "HEAD") == git(origin, "rev-parse", "main")
    assert await manager.list_pools() == ["web"]
    assert await manager.available_count("web") == 3


async def test_creating_the_same_pool_again_opens_it_and_adds_what_is_missing(
    manager: PoolManager, origin: Path
) -> None:
    await manager.create_pool("web", str(origin), num_slots=1)
    pool = await manager.create_pool("web", str(origin), num_slots=2)
    assert (await pool.summary()).total_slots == 2


async def test_a_name_is_one_repository_for_ever(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin))
    other = tmp_path / "other.git"
    shutil.copytree(origin, other)
    with pytest.raises(PoolExistsError, match=r"web.*already the pool of"):
        await manager.create_pool("web", str(other))


async def test_another_manager_finds_the_pool_on_disk(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin), num_slots=2, fetch_max_age=60)
    async with PoolManager(manager.config) as second:
        assert await second.list_pools() == ["web"]
        pool = await second.get_pool("web")
        assert pool.options.fetch_max_age == 60
        async with second.lease("web") as slot:
            assert (slot.path / "README.md").exists()


async def test_a_pool_made_by_another_process_after_opening_is_found(manager: PoolManager, origin: Path) -> None:
    async with PoolManager(manager.config) as second:
        await second.create_pool("late", str(origin))
        async with manager.lease("late") as slot:
            assert slot.branch == "main"


async def test_pools_of_the_configuration_file_come_up_at_start(tmp_path: Path, origin: Path) -> None:
    file = tmp_path / "pools.yaml"
    file.write_text(f"workspaces_dir: {tmp_path}/pools\npools:\n  web:\n    repo_url: {origin}\n    num_slots: 2\n")
    async with PoolManager.from_config_file(file) as manager:
        async with manager.lease("web", timeout=60) as slot:
            assert slot.branch == "main"
        await manager.wait_ready(60)
        assert (await manager.get_pool_summary())["web"].total_slots == 2


async def test_a_configured_pool_that_cannot_come_up_says_why_and_leaves_the_others_alone(
    tmp_path: Path, origin: Path
) -> None:
    file = tmp_path / "pools.yaml"
    file.write_text(
        f"workspaces_dir: {tmp_path}/pools\npools:\n"
        f"  good: {{repo_url: {origin}}}\n  bad: {{repo_url: {tmp_path}/nowhere}}\n"
    )
    async with PoolManager.from_config_file(file) as manager:
        async with manager.lease("good"):
            pass
        with pytest.raises(GitOperationError, match="bad"):
            async with manager.lease("bad"):
                pass
        with pytest.raises(GitOperationError):
            await manager.wait_ready(60)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("ext::sh -c id", RepositoryUrlError),
        ("-oProxyCommand=id", RepositoryUrlError),
        ("", RepositoryUrlError),
        ("gopher://host/x", RepositoryUrlError),
        ("/nowhere/at/all", GitAccessError),
    ],
)
async def test_a_wrong_url_is_refused_and_leaves_nothing(
    manager: PoolManager, tmp_path: Path, url: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await manager.create_pool("web", url)
    assert await manager.list_pools() == []
    assert not (tmp_path / "pools" / "web").exists()


async def test_an_empty_repository_is_refused_with_the_remedy(manager: PoolManager, tmp_path: Path) -> None:
    empty = tmp_path / "empty.git"
    git(tmp_path, "init", "-q", "--bare", str(empty))
    with pytest.raises(EmptyRepositoryError, match="no commits; push one"):
        await manager.create_pool("web", str(empty))
    assert await manager.list_pools() == []


@pytest.mark.parametrize("name", ["locks", "../up", "a/b", "", ".hidden", "x.git", "-x"])
async def test_pool_names_that_could_harm_are_refused(manager: PoolManager, origin: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        await manager.create_pool(name, str(origin))


async def test_an_unknown_option_is_refused_with_a_suggestion(manager: PoolManager, origin: Path) -> None:
    with pytest.raises(ConfigError, match="fetch_max_age"):
        await manager.create_pool("web", str(origin), fetch_max_agee=3)


async def test_deleting_a_pool_removes_its_directory(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin), num_slots=2)
    await manager.delete_pool("web")
    assert not (tmp_path / "pools" / "web").exists()
    with pytest.raises(PoolNotFoundError):
        await manager.get_pool("web")
    pool = await manager.create_pool("web", str(origin))
    assert (await pool.summary()).available == 1


@pytest.fixture
def _looks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_registry, "_LOOK_SECONDS", 0.0)


@pytest.mark.usefixtures("_looks_always")
async def test_a_pool_that_another_process_deleted_is_gone(
    manager: PoolManager, origin: Path, make_commit: MakeCommit, tmp_path: Path
) -> None:
    async with PoolManager(manager.config) as other:
        await manager.create_pool("web", str(origin))
        held = await other.allocate_slot("web")
        assert held is not None
        await manager.delete_pool("web", force=True)
        assert await other.list_pools() == []
        assert held.lost.is_set()
        assert await other.get_pool_summary() == {}
        with pytest.raises(PoolNotFoundError, match="there is no pool 'web'"):
            await other.allocate_slot("web")
        assert not (tmp_path / "pools" / "web").exists()

        await manager.create_pool("web", str(origin))
        await other.allocate_slot("web")
        await manager.delete_pool("web", force=True)
        another = shutil.copytree(origin, tmp_path / "another.git")
        commit = make_commit(another, "main", {"another": b"repository"})
        await manager.create_pool("web", str(another))
        async with other.lease("web") as slot:
            assert slot.commit == commit


async def test_a_pool_that_is_being_made_is_not_taken_for_a_deleted_one(manager: PoolManager, origin: Path) -> None:
    listed: list[list[str]] = []

    async def look() -> None:
        while not making.done():
            listed.append(await manager.list_pools())

    making = asyncio.create_task(manager.create_pool("web", str(origin)))
    await look()
    assert listed[0] == []
    assert (await (await making).summary()).available == 1
    assert await manager.list_pools() == ["web"]


async def test_a_pool_in_use_is_deleted_only_by_force(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    await manager.create_pool("web", str(origin))
    slot = await manager.allocate_slot("web")
    assert slot is not None
    with pytest.raises(PoolInUseError, match="slot1"):
        await manager.delete_pool("web")
    await manager.delete_pool("web", force=True)
    assert slot.lost.is_set()
    assert not (tmp_path / "pools" / "web").exists()


async def test_a_read_only_directory_is_refused_with_the_remedy(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")  # a file in the way stops root as well, which modes do not
    with pytest.raises(StoreError, match="REPOPOOL_WORKSPACES_DIR"):
        await PoolManager(PoolConfig(workspaces_dir=blocked / "pools")).open()


@pytest.mark.skipif(os.geteuid() == 0, reason="modes do not stop root")
async def test_a_directory_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(StoreError):
            await PoolManager(PoolConfig(workspaces_dir=tmp_path)).open()
    finally:
        tmp_path.chmod(stat.S_IRWXU)


async def test_a_manager_that_is_not_open_says_so(tmp_path: Path) -> None:
    manager = PoolManager(PoolConfig(workspaces_dir=tmp_path))
    assert manager.closed
    with pytest.raises(ManagerClosedError):
        await manager.list_pools()
    await manager.close()
    with pytest.raises(ManagerClosedError):
        await manager.open()


# -- refs --------------------------------------------------------------------------------------------------------


async def test_refs_mean_what_they_say(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin))
    main, feature, tag = (git(origin, "rev-parse", name) for name in ("main", "feature/x", "v1.0^{commit}"))
    expected: list[tuple[str | None, str, str | None]] = [
        (None, main, "main"),
        ("feature/x", feature, "feature/x"),
        ("refs/heads/feature/x", feature, "feature/x"),
        ("v1.0", tag, None),
        ("refs/tags/light", git(origin, "rev-parse", "light"), None),
        (tag, tag, None),
        (feature[:9], feature, None),
    ]
    for ref, commit, branch in expected:
        async with pool.lease(ref=ref) as slot:
            assert (slot.commit, slot.branch) == (commit, branch)
            assert await slot.get_current_commit() == commit
            assert await slot.get_current_branch() == branch
            assert await slot.is_clean_working_tree()


async def test_a_ref_outside_branches_and_tags_is_fetched_on_demand(
    manager: PoolManager, origin: Path, make_commit: MakeCommit
) -> None:
    pool = await manager.create_pool("web", str(origin))
    commit = make_commit(origin, "proposal", {"p": b"1"})
    git(origin, "update-ref", "refs/pull/7/head", commit)
    git(origin, "update-ref", "-d", "refs/heads/proposal")
    async with pool.lease(ref="refs/pull/7/head") as slot:
        assert (slot.commit, slot.branch) == (commit, None)
    hidden = make_commit(origin, "proposal2", {"q": b"1"})
    git(origin, "update-ref", "refs/pull/8/head", hidden)
    git(origin, "update-ref", "-d", "refs/heads/proposal2")
    async with pool.lease(ref=hidden) as slot:
        assert slot.commit == hidden


async def test_an_unknown_ref_fails_at_once_with_the_nearest_names(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin))
    with pytest.raises(UnknownRefError, match="feature/x") as caught:
        async with pool.lease(ref="feature/y"):
            pass
    assert caught.value.nearest == ("feature/x",)
    with pytest.raises(UnknownRefError):
        async with pool.lease(ref="0" * 40):
            pass
    assert await manager.available_count("web") == 1


@pytest.mark.parametrize("ref", ["--upload-pack=id", "-x", "a..b", "a b", "x@{1}", "a:b", "", "x\n"])
async def test_a_ref_that_could_be_an_option_or_an_expression_is_refused(
    manager: PoolManager, origin: Path, ref: str
) -> None:
    pool = await manager.create_pool("web", str(origin))
    with pytest.raises(RefError):
        async with pool.lease(ref=ref):
            pass


async def test_a_lease_sees_what_was_pushed_before_it(
    manager: PoolManager, origin: Path, make_commit: MakeCommit
) -> None:
    pool = await manager.create_pool("web", str(origin))
    for number in range(3):
        commit = make_commit(origin, "main", {"n": str(number).encode()})
        async with pool.lease(ref="main") as slot:
            assert slot.commit == commit
            assert (slot.path / "n").read_text() == str(number)
            assert git(slot.path, "rev-parse", "origin/main") == commit


async def test_a_branch_deleted_and_another_made_in_its_way_are_followed(
    manager: PoolManager, origin: Path, make_commit: MakeCommit
) -> None:
    pool = await manager.create_pool("web", str(origin))
    git(origin, "update-ref", "-d", "refs/heads/feature/x")
    commit = make_commit(origin, "feature", {"f": b"1"})
    async with pool.lease(ref="feature") as slot:
        assert slot.commit == commit
    with pytest.raises(UnknownRefError):
        async with pool.lease(ref="feature/x"):
            pass


async def test_the_default_branch_is_followed_when_it_changes(
    manager: PoolManager, origin: Path, make_commit: MakeCommit
) -> None:
    pool = await manager.create_pool("web", str(origin))
    trunk = make_commit(origin, "trunk", {"t": b"1"})
    git(origin, "symbolic-ref", "HEAD", "refs/heads/trunk")
    git(origin, "update-ref", "-d", "refs/heads/main")
    async with pool.lease() as slot:
        assert (slot.commit, slot.branch) == (trunk, "trunk")
        assert git(slot.path, "symbolic-ref", "refs/remotes/origin/HEAD") == "refs/remotes/origin/trunk"


async def test_a_new_branch_is_made_at_the_commit_and_gone_with_the_lease(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin))
    async with pool.lease(ref="v1.0", new_branch="agent/x") as slot:
        assert slot.branch == "agent/x"
        assert git(slot.path, "rev-parse", "--abbrev-ref", "HEAD") == "agent/x"
        assert git(slot.path, "rev-parse", "HEAD") == git(origin, "rev-parse", "v1.0^{commit}")
    async with pool.lease() as slot:
        assert git(slot.path, "branch", "--format=%(refname:short)") == "main"
    with pytest.raises(RefError):
        async with pool.lease(new_branch="-d"):
            pass


async def test_further_remotes_are_fetched_under_their_own_names(
    manager: PoolManager, origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    upstream = tmp_path / "upstream.git"
    shutil.copytree(origin, upstream)
    pool = await manager.create_pool("web", str(origin), remotes={"upstream": str(upstream)})
    commit = make_commit(upstream, "main", {"u": b"1"})
    async with pool.lease() as slot:
        assert git(slot.path, "rev-parse", "upstream/main") == commit
        assert git(slot.path, "remote").split() == ["origin", "upstream"]
        assert slot.commit == git(origin, "rev-parse", "main")


async def test_a_remote_that_vanished_is_a_clear_error_and_costs_no_slot(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    pool = await manager.create_pool("web", str(origin))
    origin.rename(tmp_path / "moved")
    with pytest.raises(GitOperationError, match="web"):
        async with pool.lease():
            pass
    assert await manager.available_count("web") == 1
    offline = await manager.create_pool("web", str(origin), fetch_on_allocate=False)
    async with offline.lease() as slot:
        assert slot.branch == "main"


# -- leases ------------------------------------------------------------------------------------------------------


async def test_commands_keep_the_callers_git_configuration_but_not_its_repository(
    manager: PoolManager, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = {"GIT_DIR": "/nowhere", "GIT_WORK_TREE": "/nowhere", "GIT_QUARANTINE_PATH": "/nowhere"}
    asked = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "Agent"}
    for name, value in (hook | asked).items():
        monkeypatch.setenv(name, value)
    await manager.create_pool("web", str(origin), num_slots=1)
    async with manager.lease("web") as slot:
        await slot.run("git", "update-ref", "refs/heads/mine", "HEAD")
        assert (await slot.run("git", "config", "user.name")).stdout == b"Agent\n"


async def test_a_lease_runs_commands_and_dies_with_the_block(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin))
    async with pool.lease(metadata={"agent": 7}) as slot:
        done = await slot.run("git", "log", "-1", "--format=%H")
        assert done.text.strip() == slot.commit
        assert (await slot.run("sh", "-c", "exit 3", check=False)).exit_code == 3
        assert (await slot.run("cat", input=b"in")).stdout == b"in"
        assert Path(os.fspath(slot)) == slot.path
        status = await manager.get_slot_status(slot.slot_id)
        assert (status.state, status.is_locked) == (SlotState.ALLOCATED, True)
        assert status.lease is not None
        assert status.lease.metadata == {"agent": 7}
    with pytest.raises(LeaseReleasedError):
        _ = slot.path
    with pytest.raises(LeaseReleasedError):
        await slot.run("true")
    assert slot.is_released
    assert "released" in repr(slot)


async def test_what_a_lease_left_running_ends_with_it(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    pool = await manager.create_pool("web", str(origin))
    pid_file = tmp_path / "pid"
    async with pool.lease() as slot:
        await slot.run("mkfifo", str(tmp_path / "started"))
        await slot.run(
            "sh", "-c",
            f"setsid sh -c 'echo $$ > {pid_file}; echo > {tmp_path}/started; exec sleep 600' > /dev/null 2>&1 & "
            f"read line < {tmp_path}/started",
        )  # fmt: skip
        pid = int(pid_file.read_text())
        assert process_start_time(pid) is not None
    await manager.wait_clean()
    assert process_start_time(pid) is None  # gone, or a zombie that nobody reaps


async def test_a_slot_is_clean_for_the_next_lease(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), cleanup="inline")
    async with pool.lease() as slot:
        (slot.path / "README.md").write_text("changed")
        (slot.path / "new.log").write_text("ignored")
        await slot.run("sh", "-c", "git add . && git stash && git tag mine && git checkout -q -b other")
    assert await manager.available_count("web") == 1
    async with pool.lease() as slot:
        assert git(slot.path, "status", "--porcelain", "--ignored") == ""
        assert git(slot.path, "stash", "list") == ""
        assert git(slot.path, "tag").split() == ["light", "v1.0"]
        assert git(slot.path, "branch", "--format=%(refname:short)") == "main"
    log = await manager.get_cleanup_log(slot.slot_id)
    assert [entry.operation for entry in log][:2] == ["provision", "return"]
    assert all(entry.success for entry in log)


async def test_an_error_in_the_body_gives_the_slot_back_and_comes_through(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin))
    with pytest.raises(ZeroDivisionError):
        async with pool.lease():
            _ = 1 / 0
    await manager.wait_clean()
    assert await manager.available_count("web") == 1


async def test_waiters_are_served_in_order(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), fetch_on_allocate=False)
    order: list[int] = []

    async def one(number: int) -> None:
        async with pool.lease(timeout=60):
            order.append(number)

    async with pool.lease():
        tasks = []
        for number in range(6):
            tasks.append(asyncio.create_task(one(number)))
            while pool.stats()["waiting"] <= number:
                await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert order == list(range(6))


async def test_the_time_out_says_who_holds_what(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), fetch_on_allocate=False)
    async with pool.lease(metadata={"job": "nightly"}):
        with pytest.raises(PoolTimeoutError, match="nightly") as caught:
            async with pool.lease(timeout=1):
                pass
        assert caught.value.phase == "queue"
        assert caught.value.timeout_seconds == 1
        with pytest.raises(PoolTimeoutError):
            async with pool.lease(timeout=0):
                pass
    assert manager.get_allocation_metrics("web").timeouts == 2


async def test_the_queue_is_bounded(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), max_waiting=1, fetch_on_allocate=False)

    async def wait() -> None:
        async with pool.lease(timeout=60):
            pass

    async with pool.lease():
        waiter = asyncio.create_task(wait())
        while pool.stats()["waiting"] == 0:
            await asyncio.sleep(0)
        with pytest.raises(TooManyRequestsError, match="max_waiting: 1"):
            async with pool.lease():
                pass
    await waiter


async def test_no_waiting_at_all_is_possible(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), max_waiting=0, num_slots=2)
    async with pool.lease(), pool.lease():
        with pytest.raises(TooManyRequestsError):
            async with pool.lease():
                pass


async def test_the_raw_pair(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin))
    slot = await manager.allocate_slot("web", {"who": "me"})
    assert slot is not None
    assert await manager.allocate_slot("web") is None
    await manager.release_slot(slot)
    assert await manager.available_count("web") == 1
    await manager.release_slot(slot)
    again = await manager.allocate_slot("web", ref="feature/x")
    assert again is not None
    assert again.token == slot.token + 1
    with pytest.raises(LeaseLostError):
        await manager.release_slot(again.slot_id, token=slot.token)
    await manager.release_slot(again.slot_id, token=again.token)
    history = await manager.get_allocation_history(again.slot_id)
    assert [record.event for record in history] == ["allocated", "released"] * 2
    assert history[0].metadata == {"who": "me"}


async def test_a_slot_that_is_being_cleaned_is_waited_for_by_allocate(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin))
    for _ in range(5):
        async with pool.lease() as slot:
            (slot.path / "dirt").write_text("")
        allocated = await manager.allocate_slot("web")
        assert allocated is not None
        await manager.release_slot(allocated)


async def test_another_managers_lease_cannot_be_released_here(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin))
    slot = await manager.allocate_slot("web")
    assert slot is not None
    async with PoolManager(manager.config) as second:
        assert await second.allocate_slot("web") is None
        with pytest.raises(SlotInUseError, match="pid"):
            await second.release_slot(slot.slot_id)
    await manager.release_slot(slot)


# -- slots -------------------------------------------------------------------------------------------------------


async def test_slots_are_added_and_removed_on_a_live_pool(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    pool = await manager.create_pool("web", str(origin))
    added = await manager.add_slot("web")
    assert added.slot_id == "workspace-web-slot2"
    async with pool.lease() as slot:
        with pytest.raises(SlotInUseError, match="leased"):
            await manager.remove_slot(slot.slot_id)
    await manager.remove_slot(added.slot_id)
    assert not (tmp_path / "pools/web/slots/slot2").exists()
    with pytest.raises(SlotNotFoundError):
        await manager.get_slot_status(added.slot_id)
    assert (await manager.add_slot("web")).slot_id == "workspace-web-slot3"
    await manager.resize("web", 4)
    assert (await pool.summary()).available == 4
    await manager.resize("web", 1)
    assert (await pool.summary()).total_slots == 1
    with pytest.raises(SlotNotFoundError):
        await manager.remove_slot("nonsense")


async def test_a_tree_deleted_by_hand_is_made_anew(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), fetch_on_allocate=False)
    status = await manager.get_slot_status("workspace-web-slot1")
    shutil.rmtree(status.path)
    async with pool.lease() as slot:
        assert (slot.path / "README.md").exists()
    await manager.wait_clean()
    shutil.rmtree(Path(status.path).parent / "pristine")
    async with pool.lease(ref="feature/x") as slot:
        assert (slot.path / "src/feature.py").exists()


@pytest.mark.parametrize("victim", ["slots/slot1", "slots/slot1/slot.json", "slots/slot1/tree/.git", "mirror.git"])
async def test_what_is_deleted_by_hand_heals_or_says_what_to_do(
    manager: PoolManager, origin: Path, tmp_path: Path, victim: str
) -> None:
    await manager.create_pool("web", str(origin), num_slots=2)
    target = tmp_path / "pools/web" / victim
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    async with PoolManager(manager.config) as second, second.lease("web", timeout=30, ref="feature/x") as slot:
        assert git(slot.path, "rev-parse", "HEAD") == git(origin, "rev-parse", "feature/x")


async def test_a_corrupt_record_is_set_aside_and_the_slot_comes_back(
    manager: PoolManager, origin: Path, tmp_path: Path
) -> None:
    await manager.create_pool("web", str(origin))
    directory = tmp_path / "pools/web/slots/slot1"
    (directory / "slot.json").write_bytes(b'{"slot_id": "workspace-w')
    async with PoolManager(manager.config) as second:
        async with second.lease("web", timeout=30) as slot:
            assert slot.branch == "main"
        await second.recover()
        assert await second.available_count("web") == 1
    assert [name for name in os.listdir(directory) if ".corrupt-" in name]


async def test_a_callback_that_rejects_quarantines_and_repair_brings_back(tmp_path: Path, origin: Path) -> None:
    rejects = True

    def check(slot: Any) -> None:
        if rejects:
            raise RuntimeError("does not smell right")

    config = PoolConfig(workspaces_dir=tmp_path / "pools")
    async with PoolManager(config, check=check) as manager:
        pool = await manager.create_pool("web", str(origin))
        with pytest.raises(SlotAllocationError, match="does not smell right"):
            async with pool.lease(timeout=30):
                pass
        status = await manager.get_slot_status("workspace-web-slot1")
        assert status.state is SlotState.ERROR
        rejects = False
        await manager.repair_slot("workspace-web-slot1")
        async with pool.lease() as slot:
            assert slot.branch == "main"


async def test_callbacks_plug_in_around_cleaning(tmp_path: Path, origin: Path) -> None:
    seen: list[str] = []

    async def configure(slot: Any) -> None:
        seen.append("configure")

    def reset(slot: Any) -> None:
        seen.append("reset")
        Path(slot.path, "marker").write_text("from reset")

    config = PoolConfig(workspaces_dir=tmp_path / "pools")
    async with PoolManager(config, configure=configure, reset=reset) as manager:
        pool = await manager.create_pool("web", str(origin), cleanup="inline")
        for _ in range(2):
            async with pool.lease():
                pass
        async with pool.lease() as slot:
            assert (slot.path / "marker").read_text() == "from reset"
    assert seen == ["configure", "reset", "reset", "reset"]


async def test_check_finds_and_mends_what_was_changed_behind_the_pools_back(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin), num_slots=2)
    status = await manager.get_slot_status("workspace-web-slot2")
    Path(status.path, "README.md").write_text("tampered")
    found = await manager.check()
    assert list(found) == ["workspace-web-slot2"]
    assert await manager.check() == {}
    assert await manager.available_count("web") == 2
    await manager.drain("web")
    assert await manager.available_count("web") == 2


# -- closing -----------------------------------------------------------------------------------------------------


async def test_closing_fails_waiters_at_once_and_waits_for_holders(tmp_path: Path, origin: Path) -> None:
    manager = PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools"))
    await manager.open()
    pool = await manager.create_pool("web", str(origin), fetch_on_allocate=False)
    inside, leave = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with pool.lease() as slot:
            inside.set()
            await leave.wait()
            await slot.run("true")

    async def wait() -> None:
        async with pool.lease(timeout=60):
            pass

    holder = asyncio.create_task(hold())
    await inside.wait()
    waiter = asyncio.create_task(wait())
    while pool.stats()["waiting"] == 0:
        await asyncio.sleep(0)
    closing = asyncio.create_task(manager.close(30))
    with pytest.raises(ManagerClosedError):
        await waiter
    assert not closing.done()
    leave.set()
    await holder
    await closing
    assert manager.closed
    await manager.close()
    async with PoolManager(manager.config) as second:
        assert (await second.get_pool_summary())["web"].available == 1


async def test_what_is_not_given_back_in_time_is_recovered_by_the_next(tmp_path: Path, origin: Path) -> None:
    manager = PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools"))
    await manager.open()
    await manager.create_pool("web", str(origin))
    slot = await manager.allocate_slot("web")
    assert slot is not None
    (slot.path / "dirt").write_text("")
    await manager.close(0)
    assert slot.lost.is_set()
    async with PoolManager(manager.config) as second, second.lease("web", timeout=30) as again:
        assert not (again.path / "dirt").exists()
        assert again.token > slot.token


async def test_events_tell_what_happens(manager: PoolManager, origin: Path) -> None:
    kinds: list[str] = []

    async def listen() -> None:
        async for event in manager.events():
            kinds.append(event.kind)

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0)
    await manager.create_pool("web", str(origin))
    async with manager.lease("web"):
        pass
    await manager.wait_clean()
    await manager.close()
    await listener
    for kind in ("pool.ready", "slot.added", "slot.allocated", "slot.released", "slot.available"):
        assert kind in kinds


async def test_every_error_names_the_pool_or_slot_and_hides_credentials(manager: PoolManager) -> None:
    with pytest.raises(PoolManagerError) as caught:
        await manager.create_pool("web", "https://user:s3cret@127.0.0.1:1/repo.git", fetch_attempts=1)
    assert "s3cret" not in str(caught.value)
    assert "web" in str(caught.value)


async def test_cleaning_can_be_left_until_a_slot_is_wanted(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), clean_on_release=False)
    async with pool.lease() as slot:
        (slot.path / "dirt").write_text("")
        dirt = slot.path / "dirt"
    assert dirt.exists()
    assert (await manager.get_slot_status(slot.slot_id)).state is SlotState.CLEANING
    async with pool.lease(timeout=0) as slot:
        assert not dirt.exists()
    await manager.close()
    async with PoolManager(manager.config) as second, second.lease("web", timeout=30) as slot:
        assert slot.branch == "main"


async def test_slots_are_listed_by_number(manager: PoolManager, origin: Path) -> None:
    await manager.create_pool("web", str(origin), num_slots=3)
    assert [slot.number for slot in await manager.list_slots("web")] == [1, 2, 3]


async def test_trash_is_emptied_without_being_asked(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    pool = await manager.create_pool("web", str(origin), cleanup="inline")
    for _ in range(3):
        async with pool.lease() as slot:
            (slot.path / "dirt").mkdir()
    await manager.close()
    assert os.listdir(tmp_path / "pools/web/trash") == []


async def test_a_lease_held_for_very_long_is_told_once(manager: PoolManager, origin: Path) -> None:
    pool = await manager.create_pool("web", str(origin), stale_lock_hours=0.000001)
    told: list[str] = []

    async def listen() -> None:
        async for event in manager.events():
            told.append(event.kind)

    listener = asyncio.create_task(listen())
    async with pool.lease():
        await asyncio.sleep(0.02)
        await manager.recover()
        await manager.recover()
    await manager.close()
    await listener
    assert told.count("lease.long") == 1
