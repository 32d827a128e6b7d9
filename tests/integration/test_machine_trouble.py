"""The machine boots anew, its clock is set, its disk is full or read-only: nothing is lost, nothing half-made used."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from repopool_async import GitDiskFullError, PoolConfig, PoolManager, SlotState, SlotStore, StoreError
from repopool_async._identity import current_owner
from repopool_async._process import run_process

DAY_NS = 86_400_000_000_000
README = b"# A small repository\n"

# -- another boot ------------------------------------------------------------------------------------------------------

BEFORE = """
import asyncio, os, signal, sys
import repopool_async._identity as identity
identity.boot_id = lambda: "the boot before"
from repopool_async import PoolConfig, PoolManager

async def main():
    async with PoolManager(PoolConfig(workspaces_dir=sys.argv[1])) as manager:
        pool = await manager.create_pool("app", sys.argv[2], num_slots=3, clean_on_release=False)
        leased = [await pool.allocate(ref=ref) for ref in ("main", "feature/x")]
        for slot in leased:
            (slot.path / "README.md").write_bytes(b"not what it was\\n")
        await pool.give_back(leased[1], inline=False)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_after_another_boot_every_slot_is_made_good_before_it_is_handed_out(tmp_path: Path, origin: Path) -> None:
    argv = [sys.executable, "-c", BEFORE, str(tmp_path / "pools"), str(origin)]
    done = await run_process(argv, env=dict(os.environ), timeout=60)
    assert done.exit_code == -9, done.stderr.decode()
    store = SlotStore(tmp_path / "pools")
    slots = await store.list_slots("app")
    assert {slot.state for slot in slots} == {SlotState.ALLOCATED, SlotState.CLEANING, SlotState.AVAILABLE}
    for slot in slots:
        if slot.lease is not None:  # its pid is another process's now, which lives
            owner = attrs.evolve(current_owner(), boot_id="the boot before")
            await store.save_slot(attrs.evolve(slot, lease=attrs.evolve(slot.lease, owner=owner)))
        lose_what_was_not_synced(Path(slot.path))
    async with PoolManager(PoolConfig(workspaces_dir=tmp_path / "pools")) as manager:
        await manager.create_pool("app", str(origin), num_slots=3, clean_on_release=True)
        await lease_all_and_look(manager, 3)
        assert await manager.available_count("app") == 3
        assert await manager.check() == {}


def lose_what_was_not_synced(tree: Path) -> None:
    """Leave a file, the index and HEAD as a loss of power may: the right size and time, and nothing in it."""
    for path in (tree / "README.md", tree / ".git/HEAD", tree.parent / "pristine/git/index"):
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


async def lease_all_and_look(manager: PoolManager, count: int) -> None:
    everybody = asyncio.Barrier(count)

    async def one() -> None:
        async with manager.lease("app", timeout=60) as slot:
            assert (slot.path / "README.md").read_bytes() == README
            assert (await slot.run("git", "status", "--porcelain", "--ignored")).text == ""
            assert (await slot.run("git", "rev-parse", "HEAD")).text.strip() == slot.commit
            await everybody.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
    await manager.wait_clean()


# -- the clock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved_ns", [DAY_NS, -DAY_NS], ids=["back", "forward"])
async def test_an_edit_is_found_though_the_clock_was_set(tmp_path: Path, origin: Path, moved_ns: int) -> None:
    """Where the clock was set back after the seal, the edit bears a change time from before it."""
    config = PoolConfig(workspaces_dir=tmp_path / "pools")
    async with PoolManager(config) as manager:
        await manager.create_pool("app", str(origin), num_slots=1, fetch_on_allocate=False)
        store = SlotStore(tmp_path / "pools")
        (slot,) = await store.list_slots("app")
        assert slot.seal is not None
        seal = attrs.evolve(
            slot.seal,
            mark_ns=slot.seal.mark_ns + moved_ns,
            settled_ns=slot.seal.settled_ns + moved_ns,
            clock_offset_ns=slot.seal.clock_offset_ns + moved_ns,
        )
        await store.save_slot(attrs.evolve(slot, seal=seal))
        async with manager.lease("app") as leased:
            readme = leased.path / "README.md"
            status = readme.stat()
            readme.write_bytes(README.upper())
            os.utime(readme, ns=(status.st_atime_ns, status.st_mtime_ns))
        await manager.wait_clean()
        await lease_all_and_look(manager, 1)


# -- the disk ----------------------------------------------------------------------------------------------------------


@attrs.define
class Disk:
    """A small file system of its own."""

    path: Path

    @property
    def pools(self) -> Path:
        return self.path / "pools"

    def fill(self, *, but: int = 0) -> None:
        """Take all the room there is, but for so many bytes."""
        with (self.path / "ballast").open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue
            file.truncate(max(0, file.tell() - but))

    def free(self) -> None:
        (self.path / "ballast").unlink()

    def remount(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", self.path], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(path)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs to mount a small file system: {done.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "-l", path], check=True)


def config_on(disk: Disk) -> PoolConfig:
    return PoolConfig(workspaces_dir=disk.pools, janitor_interval=0.2)


@contextmanager
def failing_only_for_want_of_room() -> Iterator[None]:
    try:
        yield
    except (StoreError, GitDiskFullError) as error:
        if "space" not in str(error):
            raise


async def all_back(manager: PoolManager, count: int) -> None:
    async with asyncio.timeout(30):
        while await manager.available_count("app") < count:
            await asyncio.sleep(0.05)
    await lease_all_and_look(manager, count)


@pytest.mark.parametrize("room", [0, 40_960, 131_072, 262_144])
async def test_a_pool_is_not_made_on_a_full_disk_and_is_made_once_there_is_room(
    disk: Disk, origin: Path, room: int
) -> None:
    disk.fill(but=room)
    with failing_only_for_want_of_room():
        async with PoolManager(config_on(disk)) as manager:
            await manager.create_pool("app", str(origin), num_slots=2)
    disk.free()
    async with PoolManager(config_on(disk)) as manager:
        await manager.create_pool("app", str(origin), num_slots=2)
        await all_back(manager, 2)


@pytest.mark.parametrize(
    ("room", "ref"),
    [(0, "main"), (0, "feature/x"), (8192, "feature/x"), (16_384, "main"), (32_768, "feature/x"), (65_536, "main")],
)
async def test_a_disk_that_is_full_before_a_lease(disk: Disk, origin: Path, room: int, ref: str) -> None:
    async with PoolManager(config_on(disk)) as manager:
        await manager.create_pool("app", str(origin), num_slots=2)
        disk.fill(but=room)
        with failing_only_for_want_of_room():
            async with manager.lease("app", ref=ref, timeout=60) as slot:
                assert slot.branch == ref
        await manager.wait_clean()
        disk.free()
        await all_back(manager, 2)


@pytest.mark.parametrize("room", [0, 16_384])
async def test_a_lessee_that_fills_the_disk(disk: Disk, origin: Path, room: int) -> None:
    async with PoolManager(config_on(disk)) as manager:
        await manager.create_pool("app", str(origin), num_slots=2)
        with failing_only_for_want_of_room():
            async with manager.lease("app") as slot:
                (slot.path / "README.md").write_bytes(b"changed\n")
                disk.fill(but=room)
        await manager.wait_clean()
        disk.free()
        await all_back(manager, 2)


async def test_a_lessee_that_fills_the_disk_within_its_tree_harms_nobody_else(disk: Disk, origin: Path) -> None:
    async with PoolManager(config_on(disk)) as manager:
        await manager.create_pool("app", str(origin), num_slots=2)
        async with manager.lease("app") as slot:
            (slot.path / "big").mkdir()
            Disk(slot.path / "big").fill()
        await all_back(manager, 2)


FILLS_THE_DISK_AND_DIES = """
import asyncio, os, signal, sys
from repopool_async import PoolConfig, PoolManager

async def main():
    async with PoolManager(PoolConfig(workspaces_dir=sys.argv[1], janitor_interval=3600)) as manager:
        slot = await manager.allocate_slot("app")
        try:
            with open(slot.path / "big", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_a_lessee_that_fills_the_disk_and_dies(disk: Disk, origin: Path) -> None:
    async with PoolManager(config_on(disk)) as manager:
        await manager.create_pool("app", str(origin), num_slots=2, salvage="never")
    argv = [sys.executable, "-c", FILLS_THE_DISK_AND_DIES, str(disk.pools)]
    assert (await run_process(argv, env=dict(os.environ))).exit_code == -signal.SIGKILL
    async with PoolManager(config_on(disk)) as manager:
        await all_back(manager, 2)


async def test_a_lessee_that_fills_the_disk_and_is_thrown_out(disk: Disk, origin: Path) -> None:
    """Whoever takes the slot over needs no room for it: its cleaning is what makes some."""
    async with PoolManager(config_on(disk)) as manager:
        await manager.create_pool("app", str(origin), num_slots=2, salvage="never")
        async with PoolManager(config_on(disk)) as other:
            slot = await other.allocate_slot("app")
            assert slot is not None
            (slot.path / "big").mkdir()
            Disk(slot.path / "big").fill()
            await manager.force_unlock(slot.slot_id)
            await all_back(manager, 2)
            await other.close(0)  # which would wait for what it does not know to be taken away


@pytest.mark.parametrize("room", [0, 16_384, 65_536])
async def test_a_slot_is_added_on_a_full_disk(disk: Disk, origin: Path, room: int) -> None:
    async with PoolManager(config_on(disk)) as manager:
        await manager.create_pool("app", str(origin), num_slots=1)
        disk.fill(but=room)
        with failing_only_for_want_of_room():
            await manager.add_slot("app")
        disk.free()
        await manager.recover()
        await all_back(manager, len(await manager.list_slots("app")))
        await manager.remove_slot((await manager.list_slots("app"))[-1].slot_id)


async def test_a_disk_that_became_read_only(disk: Disk, origin: Path) -> None:
    async with PoolManager(config_on(disk)) as manager:
        await manager.create_pool("app", str(origin), num_slots=2)
    disk.remount("ro")
    try:
        with pytest.raises(StoreError, match=r"[Rr]ead-only"):
            async with PoolManager(config_on(disk)) as manager, manager.lease("app"):
                pass
    finally:
        disk.remount("rw")
    async with PoolManager(config_on(disk)) as manager:
        await all_back(manager, 2)
