"""Cancel anywhere, once or twice: looking, saved work, renewal, hosts, the configuration file, the verbs of a slot.

And every public coroutine is cancelled in some test, here or in `test_cancellation`, or is said below why not.
"""

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from repopool_async import (
    HostSpec,
    LeasedSlot,
    LeaseLostError,
    PoolConfig,
    PoolManager,
    RepoPool,
    SalvageRecord,
    SlotState,
)
from tests import _children, test_cancellation
from tests._cancelling import (
    COVERED,
    covers,
    for_each_suspension,
    nothing_left,
    public_coroutines,
    settling,
)

pytestmark = [pytest.mark.timeout(300), pytest.mark.endurance]

SLOT = "workspace-app-slot1"
NOT_CANCELLED_HERE = {
    "PoolManager.__aenter__": "is open",
    "PoolManager.__aexit__": "is close",
    "RepoPool.hosts_changed": "is called by the watch over the hosts, which ends only with the manager: close",
    "RepoPool.salvages": "waits for nothing, or for the slots' records as list_slots does",
}


def test_every_public_coroutine_is_cancelled_somewhere() -> None:
    assert test_cancellation.pytestmark == pytestmark
    public = public_coroutines(PoolManager, RepoPool, LeasedSlot)
    assert public - COVERED - NOT_CANCELLED_HERE.keys() == set()
    assert COVERED | NOT_CANCELLED_HERE.keys() <= public
    assert not COVERED & NOT_CANCELLED_HERE.keys()


@pytest.fixture(autouse=True)
def _begin() -> None:
    _children.begin()


@pytest.fixture
async def manager(tmp_path: Path, origin: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools", janitor_interval=3600)) as manager:
        await manager.create_pool("app", str(origin), num_slots=2, fetch_on_allocate=False)
        await manager.recover()  # after which no sweep holds a lock
        yield manager


def git(path: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(path), *args], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


async def allocated(manager: PoolManager, **options: Any) -> LeasedSlot:
    slot = await manager.allocate_slot("app", timeout=30, **options)
    assert slot is not None
    return slot


# -- looking -----------------------------------------------------------------------------------------------------


async def save_some_work(manager: PoolManager) -> SalvageRecord:
    """Have a lessee commit, stash, change files and add one, and lose its slot."""
    slot = await allocated(manager)
    git(slot.path, "commit", "-q", "--allow-empty", "-m", "committed")
    (slot.path / "README.md").write_text("stashed")
    git(slot.path, "stash", "push", "-q", "-m", "a stash")
    (slot.path / "src/app.py").write_text("changed")
    (slot.path / "untracked").write_text("new")
    await rob(manager, slot)
    (record,) = await manager.list_salvage()
    return record


async def rob(manager: PoolManager, slot: LeasedSlot) -> None:
    """Take a slot away, which saves what is in it, and have its lessee find out."""
    await manager.force_unlock(slot.slot_id)
    with contextlib.suppress(LeaseLostError):
        await manager.release_slot(slot)
    await manager.wait_clean()


LOOKS: dict[str, Callable[[PoolManager, RepoPool, str], Awaitable[object]]] = {
    "PoolManager.available_count": lambda manager, _pool, _id: manager.available_count("app"),
    "PoolManager.describe_salvage": lambda manager, _pool, salvage_id: manager.describe_salvage(salvage_id),
    "PoolManager.get_allocation_history": lambda manager, _pool, _id: manager.get_allocation_history(SLOT),
    "PoolManager.get_cleanup_log": lambda manager, _pool, _id: manager.get_cleanup_log(SLOT),
    "PoolManager.get_pool_summary": lambda manager, _pool, _id: manager.get_pool_summary(),
    "PoolManager.get_slot_status": lambda manager, _pool, _id: manager.get_slot_status(SLOT),
    "PoolManager.list_hosts": lambda manager, _pool, _id: manager.list_hosts(),
    "PoolManager.list_pools": lambda manager, _pool, _id: manager.list_pools(),
    "PoolManager.list_salvage": lambda manager, _pool, _id: manager.list_salvage(),
    "PoolManager.list_slots": lambda manager, _pool, _id: manager.list_slots("app"),
    "RepoPool.list_slots": lambda _manager, pool, _id: pool.list_slots(),
    "RepoPool.summary": lambda _manager, pool, _id: pool.summary(),
}


@covers(*LOOKS)
async def test_looking(manager: PoolManager) -> None:
    pool = await manager.get_pool("app")
    record = await save_some_work(manager)
    slots = await manager.list_slots("app")
    for look in LOOKS.values():

        async def once(look: Callable[[PoolManager, RepoPool, str], Awaitable[object]] = look) -> None:
            assert await look(manager, pool, record.salvage_id)

        await for_each_suspension(once, nothing_left)
    assert await manager.list_slots("app") == slots
    await settling(manager)()


@covers("PoolManager.events")
async def test_listening(manager: PoolManager) -> None:
    async def hear() -> None:
        asyncio.get_running_loop().call_soon(manager._emit, "something", {})
        events = manager.events()
        assert (await anext(events)).kind == "something"
        await events.aclose()  # type: ignore[attr-defined]

    async def settle() -> None:
        assert not manager._shared.bus._queues

    await for_each_suspension(hear, settle)


# -- saved work --------------------------------------------------------------------------------------------------


@covers("PoolManager.restore_salvage")
async def test_restoring_into_a_slot(manager: PoolManager) -> None:
    """Called again after it was cancelled, it brings back what was saved, whatever there is by then."""
    record = await save_some_work(manager)
    async with manager.lease("app", timeout=30) as slot:

        async def restore() -> None:
            await manager.restore_salvage(record.salvage_id, slot, branch="saved")

        async def restore_again() -> None:
            assert _children.left() == set()
            restored = await manager.restore_salvage(record.salvage_id, slot, branch="saved")
            assert git(slot.path, "rev-parse", "saved") == record.head
            if restored.is_checked_out:
                assert git(slot.path, "stash", "list", "--format=%H") == "\n".join(record.stash_commits)
                assert (slot.path / "src/app.py").read_text() == "changed"
                assert (slot.path / "untracked").read_text() == "new"
            else:
                assert git(slot.path, "rev-parse", "saved.files") == record.commit
                assert git(slot.path, "rev-parse", "saved.stash-0") == record.stash_commits[0]
            make_clean(slot.path)
            assert (await manager.list_salvage()) == [record]

        assert await for_each_suspension(restore, restore_again) >= 10
    await settling(manager)()


def make_clean(tree: Path) -> None:
    git(tree, "checkout", "-qf", "main")
    git(tree, "clean", "-qfdx")
    git(tree, "stash", "clear")
    branches = git(tree, "for-each-ref", "--format=%(refname:short)", "refs/heads/saved", "refs/heads/saved.*")
    for branch in branches.splitlines():
        git(tree, "branch", "-qD", branch)


@covers("PoolManager.restore_salvage_into")
async def test_restoring_into_a_clone(manager: PoolManager, origin: Path, tmp_path: Path) -> None:
    record = await save_some_work(manager)
    template, clone = tmp_path / "template", tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(origin), str(template))
    shutil.copytree(template, clone)

    async def restore() -> None:
        await manager.restore_salvage_into(record.salvage_id, clone, branch="saved")

    async def restore_again() -> None:
        await nothing_left()
        await restore()
        assert git(clone, "rev-parse", "saved.files") == record.commit
        shutil.rmtree(clone)
        shutil.copytree(template, clone)

    await for_each_suspension(restore, restore_again)


@covers("PoolManager.delete_salvage")
async def test_forgetting_saved_work(manager: PoolManager) -> None:
    """Cancelled, all of it is there or none, and what else is saved always is."""
    kept = await save_some_work(manager)
    gone: list[str] = []

    async def another() -> None:
        slot = await allocated(manager)
        (slot.path / "untracked").write_text(slot.lease_id)
        await rob(manager, slot)
        gone[:] = [slot.lease_id]

    async def forget() -> None:
        await manager.delete_salvage(gone[0])

    async def settle() -> None:
        await nothing_left()
        left = {record.salvage_id for record in await manager.list_salvage()}
        assert left - {gone[0]} == {kept.salvage_id}
        assert "src/app.py" in (await manager.describe_salvage(kept.salvage_id))[1]
        if gone[0] in left:
            assert "untracked" in (await manager.describe_salvage(gone[0]))[1]
        else:
            await another()

    await another()
    await for_each_suspension(forget, settle)
    await forget()
    assert await manager.list_salvage() == [kept]
    await settling(manager)()


# -- renewal -----------------------------------------------------------------------------------------------------


@covers("PoolManager.renew_slot", "RepoPool.renew", "LeasedSlot.renew")
@pytest.mark.parametrize("how", ["by id", "by the slot"])
async def test_renewing(manager: PoolManager, how: str) -> None:
    """Cancelled, the lease lasts as long as before or as long as was asked, and can be renewed and given back."""
    slot = await allocated(manager, detached=True, ttl=600)
    expiries = []

    async def renew() -> None:
        if how == "by id":
            await manager.renew_slot(slot.slot_id, slot.token, 1200)
        else:
            await slot.renew(1200)

    async def settle() -> None:
        await nothing_left()
        assert not slot.lost.is_set()
        confirmed = await manager.renew_slot(slot.slot_id, slot.token)
        assert confirmed.expires_boottime is not None
        expiries.append(confirmed.expires_boottime - confirmed.acquired_boottime)
        await manager.renew_slot(slot.slot_id, slot.token, 600)

    await for_each_suspension(renew, settle)
    assert all(600 <= seconds < 900 or seconds >= 1200 for seconds in expiries), expiries
    await manager.release_slot(slot.slot_id, token=slot.token)
    await settling(manager)()


# -- hosts and damaged slots -------------------------------------------------------------------------------------


@covers(
    "PoolManager.add_host",
    "PoolManager.drain_host",
    "PoolManager.park_host",
    "PoolManager.resume_host",
    "PoolManager.remove_host",
)
@pytest.mark.parametrize("verb", ["add_host", "drain_host", "park_host", "resume_host", "remove_host"])
async def test_hosts(tmp_path: Path, origin: Path, verb: str) -> None:
    """Cancelled, it has happened or not, and may be called again."""
    hosts = [HostSpec("a", address="local", workspaces_dir=str(tmp_path / "a"))]
    config = PoolConfig(tmp_path / "pools", janitor_interval=3600)
    async with PoolManager(config, hosts=hosts) as manager:
        await manager.create_pool("app", str(origin), num_slots=2, hosts=["local", "a"], fetch_on_allocate=False)

        async def add() -> None:
            await manager.add_host("b", "local", workspaces_dir=str(tmp_path / "b"))

        async def conditions() -> dict[str, str]:
            return {host.host_id: host.condition for host in await manager.list_hosts()}

        async def change() -> None:
            match verb:
                case "add_host":
                    await add()
                case "remove_host":
                    await manager.remove_host("b")
                case _:
                    await getattr(manager, verb)("a")

        async def settle() -> None:
            present = await conditions()
            assert ("b" in present) or verb in ("add_host", "remove_host")
            if verb == "add_host" and "b" in present:
                await manager.remove_host("b")
            elif verb == "remove_host" and "b" not in present:
                await add()
            for host_id in present.keys() - {"local"}:
                if host_id in await conditions():
                    await manager.resume_host(host_id)
            await settling(manager)()
            assert {slot.host_id for slot in await manager.list_slots("app")} == {"local", "a"}
            if verb == "resume_host":
                await manager.park_host("a")

        if verb != "add_host":
            await add()
        if verb == "resume_host":
            await manager.park_host("a")
        await for_each_suspension(change, settle)


@covers("PoolManager.repair_slot")
async def test_repairing_a_slot(manager: PoolManager) -> None:
    async def repair() -> None:
        await manager.repair_slot(SLOT)

    await for_each_suspension(repair, settling(manager))


# -- the configuration file --------------------------------------------------------------------------------------


@covers("PoolManager.reload", "PoolManager.get_pool", "PoolManager.wait_ready")
async def test_following_a_file(tmp_path: Path, origin: Path) -> None:
    """Cancelled, the file is in force as a whole or not at all, and what was begun is finished or begun again."""
    path = tmp_path / "pools.yaml"

    def write(num_slots: int, *, has_other: bool) -> None:
        other = f"  other: {{repo_url: {origin}, num_slots: 1}}\n" if has_other else ""
        path.write_text(
            f"workspaces_dir: {tmp_path}/pools\nwatch: never\njanitor_interval: 3600\npools:\n"
            f"  app: {{repo_url: {origin}, num_slots: {num_slots}, fetch_on_allocate: false}}\n{other}"
        )

    write(2, has_other=False)
    async with PoolManager.from_config_file(path) as manager:
        await manager.wait_ready(60)

        async def follow() -> None:
            write(3, has_other=True)
            await manager.reload()
            await manager.get_pool("other")
            await manager.wait_ready()

        async def settle() -> None:
            in_force = {name: spec.options.num_slots for name, spec in manager.config.pools.items()}
            assert in_force in ({"app": 2}, {"app": 3, "other": 1})
            await manager.reload()
            await manager.wait_ready()
            assert await manager.available_count("app") == 3
            assert await manager.available_count("other") == 1
            write(2, has_other=False)
            await manager.reload()
            await manager.wait_ready()
            await settling(manager)()
            await manager.delete_pool("other")

        await for_each_suspension(follow, settle)


# -- the verbs of a slot -----------------------------------------------------------------------------------------


async def with_a_process(slot: LeasedSlot) -> None:
    async with slot.open_process("sleep", "1000"):
        await asyncio.sleep(0)


IN_A_SLOT: dict[str, Callable[[LeasedSlot], Awaitable[object]]] = {
    "LeasedSlot.checkout": lambda slot: slot.checkout("feature/x"),
    "LeasedSlot.clean": lambda slot: slot.clean(),
    "LeasedSlot.fetch_all": lambda slot: slot.fetch_all(),
    "LeasedSlot.get_current_branch": lambda slot: slot.get_current_branch(),
    "LeasedSlot.get_current_commit": lambda slot: slot.get_current_commit(),
    "LeasedSlot.is_clean_working_tree": lambda slot: slot.is_clean_working_tree(),
    "LeasedSlot.list_remote_branches": lambda slot: slot.list_remote_branches(),
    "LeasedSlot.open_process": with_a_process,
    "LeasedSlot.reset_hard": lambda slot: slot.reset_hard(),
}


@covers(*IN_A_SLOT)
@pytest.mark.parametrize("verb", IN_A_SLOT)
async def test_in_a_slot(manager: PoolManager, verb: str) -> None:
    """Cancelled, no process of it is left, and the slot is still the lessee's and of use."""
    async with manager.lease("app", timeout=30) as slot:

        async def once() -> None:
            await IN_A_SLOT[verb](slot)

        async def settle() -> None:
            assert _children.left() == set()
            # A git that is ended in the very instant in which it makes a lock file does not remove it.
            await slot.run("find", ".git", "-name", "*.lock", "-delete")
            assert (await slot.run("git", "checkout", "-qf", "main")).exit_code == 0
            assert await slot.get_current_branch() == "main"

        await for_each_suspension(once, settle)
        assert (await manager.get_slot_status(slot.slot_id)).state is SlotState.ALLOCATED
    await manager.wait_clean()
    await settling(manager)()
