"""Records come back as they were stored; a damaged one costs a cleaning, never the pool, a token or a neighbour."""

import asyncio
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repopool_async._clock import boottime
from repopool_async._codec import dumps
from repopool_async.exceptions import ConfigError, PoolManagerError, PoolNotFoundError, SlotNotFoundError, StoreError
from repopool_async.models import (
    AllocationRecord,
    CleanupResult,
    Lease,
    Owner,
    Pool,
    Slot,
    SlotState,
    make_slot_id,
)
from repopool_async.record_files import RECORD_LIMIT_BYTES
from repopool_async.slot_store import LOG_ROTATE_BYTES, SlotStore
from tests import _forks

PATIENTLY: Final = settings(deadline=None)
NOON: Final = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
URL: Final = "https://example.org/web.git"
OWNER: Final = Owner(host="ci-7", boot_id="5f0c", pid=4711, start_time=987654)
ONE: Final = make_slot_id("web", 1)
COMMIT: Final = "c" * 40


class Events(list[tuple[str, Mapping[str, object]]]):
    def __call__(self, kind: str, fields: Mapping[str, object]) -> None:
        self.append((kind, fields))


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def store(tmp_path: Path, events: Events) -> SlotStore:
    return SlotStore(tmp_path / "pools", on_event=events)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> SlotStore:
    """A store with one slot, for examples that overwrite its record."""
    store = SlotStore(tmp_path_factory.mktemp("pools"))
    store.save_slot_sync(make_slot(store))
    return store


def make_pool(name: str = "web", **changes: Any) -> Pool:
    return attrs.evolve(Pool(repo_name=name, repo_url=URL, num_slots=2, created_at=NOON), **changes)


def make_slot(store: SlotStore, number: int = 1, name: str = "web", **changes: Any) -> Slot:
    slot_id = make_slot_id(name, number)
    slot = Slot(slot_id=slot_id, repo_name=name, repo_url=URL, path=store.tree_path(slot_id), created_at=NOON)
    return attrs.evolve(slot, **changes)


def make_record(event: str = "allocated", token: int = 1, slot_id: str = ONE, **changes: Any) -> AllocationRecord:
    record = AllocationRecord(
        event=event, slot_id=slot_id, lease_id=f"lease-{token}", token=token, at=NOON, owner=OWNER, branch="main"
    )
    return attrs.evolve(record, **changes)


def make_result(removed: int = 0, slot_id: str = ONE) -> CleanupResult:
    return CleanupResult(slot_id, "return", True, NOON, 0.25, steps=("reset",), removed=removed)


def record_path(store: SlotStore, slot_id: str = ONE) -> Path:
    return Path(store.slot_directory(slot_id), "slot.json")


def pool_path(store: SlotStore, name: str = "web") -> Path:
    return Path(store.pool_directory(name), "pool.json")


def set_aside(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.corrupt-*"))


def names(directory: str | Path) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


def as_ordinary_user(act: Callable[[Path], object]) -> None:
    """Run `act` with a directory of its own in a forked child that is not root; fail where it raises."""
    directory = Path(tempfile.mkdtemp(prefix="repopool-test-"))
    if os.geteuid() == 0:
        os.chown(directory, _forks.NOBODY, _forks.NOBODY)
    try:
        _forks.as_ordinary_user(lambda: act(directory))
    finally:
        subprocess.run(["chmod", "-R", "u+rwx", str(directory)], check=True, capture_output=True)
        shutil.rmtree(directory)


class TestLayout:
    def test_is_the_documented_one(self) -> None:
        store = SlotStore("/srv/pools")
        assert store.workspaces_directory == "/srv/pools"
        assert store.locks_directory == "/srv/pools/locks"
        assert store.pool_directory("web") == "/srv/pools/web"
        assert store.mirror_path("web") == "/srv/pools/web/mirror.git"
        assert store.trash_path("web") == "/srv/pools/web/trash"
        assert store.slot_directory("workspace-web-slot12") == "/srv/pools/web/slots/slot12"
        assert store.tree_path("workspace-web-slot12") == "/srv/pools/web/slots/slot12/tree"
        assert store.pristine_path("workspace-web-slot12") == "/srv/pools/web/slots/slot12/pristine"

    def test_a_relative_directory_and_a_home_are_made_absolute(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert SlotStore("pools").workspaces_directory == str(tmp_path / "pools")
        assert SlotStore("~/pools").workspaces_directory == str(tmp_path / "home" / "pools")

    def test_construction_touches_nothing(self, tmp_path: Path) -> None:
        SlotStore(tmp_path / "pools")
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        "name",
        ["", ".", "..", "../etc", "a/b", "/etc", ".web", "-web", "web.git", "web.lock", "locks", "caf\xe9", "a" * 101],
    )
    async def test_a_name_that_could_lead_astray_is_no_pool(self, store: SlotStore, name: str) -> None:
        with pytest.raises(ConfigError):
            store.pool_directory(name)
        with pytest.raises(ConfigError):
            await store.load_pool(name)
        with pytest.raises(ConfigError):
            await store.delete_pool(name)
        with pytest.raises(ConfigError):
            await store.save_pool(make_pool(name))

    @pytest.mark.parametrize(
        "slot_id",
        ["", "web", "workspace-web-slot0", "workspace-../../etc-slot1", "workspace-a/b-slot1", "workspace-.-slot1"],
    )
    async def test_an_id_that_could_lead_astray_is_no_slot(self, store: SlotStore, slot_id: str) -> None:
        for act in (store.load_slot, store.delete_slot, store.history, store.cleanup_log):
            with pytest.raises(SlotNotFoundError):
                await act(slot_id)
        with pytest.raises(SlotNotFoundError):
            store.tree_path(slot_id)
        with pytest.raises(SlotNotFoundError):
            await store.save_slot(attrs.evolve(make_slot(store), slot_id=slot_id))

    async def test_files_lie_beside_the_tree(self, store: SlotStore) -> None:
        await store.save_pool(make_pool())
        await store.save_slot(make_slot(store))
        await store.append_history(make_record())
        await store.append_cleanup(make_result())
        assert names(store.pool_directory("web")) == ["pool.json", "slots"]
        assert names(store.slot_directory(ONE)) == ["cleanup.jsonl", "history.jsonl", "slot.json"]

    async def test_a_directory_whose_name_is_no_text_works(self, tmp_path: Path) -> None:
        store = SlotStore(tmp_path / os.fsdecode(b"caf\xe9"))
        await store.save_pool(make_pool())
        await store.save_slot(make_slot(store))
        assert await store.list_slots("web") == [make_slot(store)]
        await store.delete_slot(ONE)


class TestPools:
    async def test_come_back_as_they_were_saved(self, store: SlotStore) -> None:
        pool = make_pool(options={"keep": ["node_modules"]}, next_slot_number=3, extra={"newer": True})
        await store.save_pool(pool)
        assert await store.load_pool("web") == pool

    async def test_the_last_one_saved_counts(self, store: SlotStore) -> None:
        await store.save_pool(make_pool())
        await store.save_pool(make_pool(num_slots=7))
        assert (await store.load_pool("web")).num_slots == 7
        assert names(store.pool_directory("web")) == ["pool.json"]

    async def test_another_process_reads_them(self, store: SlotStore) -> None:
        await store.save_pool(make_pool())
        assert await SlotStore(store.workspaces_directory).load_pool("web") == make_pool()

    async def test_an_unknown_one_is_not_found(self, store: SlotStore) -> None:
        with pytest.raises(PoolNotFoundError, match="'web'") as caught:
            await store.load_pool("web")
        assert caught.value.repo_name == "web"
        with pytest.raises(PoolNotFoundError):
            await store.delete_pool("web")

    async def test_are_listed_by_name(self, store: SlotStore) -> None:
        assert await store.list_pools() == []
        for name in ("web", "api", "Zeta"):
            await store.save_pool(make_pool(name))
        assert await store.list_pools() == ["Zeta", "api", "web"]

    async def test_nothing_else_is_listed(self, store: SlotStore, tmp_path: Path) -> None:
        await store.save_pool(make_pool())
        root = tmp_path / "pools"
        for name in ("locks", ".trash", ".hidden", "empty", "half.git"):
            (root / name).mkdir()
        for name in ("locks", ".trash", "half.git"):
            (root / name / "pool.json").write_bytes(dumps(make_pool()))
        (root / "file").touch()
        (root / "empty" / "slots").mkdir()
        assert await store.list_pools() == ["web"]
        with pytest.raises(PoolNotFoundError):
            await store.load_pool("empty")
        with pytest.raises(PoolNotFoundError):
            await store.load_pool("file")

    async def test_deleting_one_leaves_nothing_of_it_and_everything_else(self, store: SlotStore) -> None:
        for name in ("web", "api"):
            await store.save_pool(make_pool(name))
            await store.save_slot(make_slot(store, 1, name))
        await store.delete_pool("web")
        assert names(store.workspaces_directory) == ["api"]
        assert await store.list_pools() == ["api"]
        assert await store.list_slots("web") == []

    async def test_deleting_one_that_was_never_finished_works(self, store: SlotStore) -> None:
        Path(store.mirror_path("web")).mkdir(parents=True)
        await store.delete_pool("web")
        assert names(store.workspaces_directory) == []

    async def test_what_a_killed_deletion_left_goes_with_the_next(self, store: SlotStore, tmp_path: Path) -> None:
        await store.save_pool(make_pool())
        (tmp_path / "pools" / ".trash" / "old" / "below").mkdir(parents=True)
        await store.delete_pool("web")
        assert names(tmp_path / "pools") == []

    async def test_one_that_is_linked_to_another_disk_is_deleted_there(self, store: SlotStore, tmp_path: Path) -> None:
        (tmp_path / "disk" / "web").mkdir(parents=True)
        (tmp_path / "pools").mkdir()
        (tmp_path / "pools" / "web").symlink_to(tmp_path / "disk" / "web")
        await store.save_pool(make_pool())
        await store.save_slot(make_slot(store))
        assert await store.list_pools() == ["web"]
        await store.delete_pool("web")
        assert names(tmp_path / "disk") == []
        assert names(tmp_path / "pools") == []

    async def test_a_link_to_something_else_is_deleted_and_what_it_leads_to_is_not(
        self, store: SlotStore, tmp_path: Path
    ) -> None:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "file").write_bytes(b"mine")
        (tmp_path / "pools").mkdir()
        (tmp_path / "pools" / "web").symlink_to(tmp_path / "home")
        await store.delete_pool("web")
        assert names(tmp_path / "pools") == []
        assert names(tmp_path / "home") == ["file"]


class TestSlots:
    async def test_come_back_as_they_were_saved(self, store: SlotStore) -> None:
        lease = Lease("lease-3", 3, OWNER, NOON, 12.5, ref="main", metadata={"job": 7})
        slot = make_slot(store, state=SlotState.ALLOCATED, token=3, lease=lease, allocation_count=3, extra={"newer": 1})
        await store.save_slot(slot)
        assert await store.load_slot(ONE) == slot

    async def test_an_unknown_one_is_not_found(self, store: SlotStore) -> None:
        for act in (store.load_slot, store.delete_slot, store.history, store.cleanup_log):
            with pytest.raises(SlotNotFoundError, match=ONE) as caught:
                await act(ONE)
            assert (caught.value.repo_name, caught.value.slot_id) == ("web", ONE)

    async def test_are_listed_by_number(self, store: SlotStore) -> None:
        assert await store.list_slots("web") == []
        for number in (10, 2, 1, 33):
            await store.save_slot(make_slot(store, number))
        assert [slot.number for slot in await store.list_slots("web")] == [1, 2, 10, 33]

    async def test_a_hundred_are_listed(self, store: SlotStore) -> None:
        slots = [make_slot(store, number) for number in range(1, 101)]
        for slot in slots:
            store.save_slot_sync(slot)
        assert await store.list_slots("web") == slots

    async def test_nothing_else_is_listed(self, store: SlotStore) -> None:
        await store.save_slot(make_slot(store))
        slots = Path(store.slot_directory(ONE)).parent
        for name in ("slot0", "slot01", "slotx", "old-slot2", "slot3.bak", "slot"):
            (slots / name).mkdir()
            (slots / name / "slot.json").touch()
        (slots / "slot4").touch()
        (slots / "slot5").symlink_to("slot1")
        assert await store.list_slots("web") == [make_slot(store)]

    async def test_a_record_is_rewritten_only_where_its_slot_is(self, store: SlotStore) -> None:
        await store.save_slot(make_slot(store))
        store.write_slot_sync(make_slot(store, token=2))
        assert store.read_slot_sync(ONE).token == 2
        await store.delete_slot(ONE)
        with pytest.raises(SlotNotFoundError):
            store.write_slot_sync(make_slot(store, token=3))
        with pytest.raises(SlotNotFoundError):
            await store.append_history(make_record())
        assert not Path(store.slot_directory(ONE)).exists()

    async def test_metadata_that_json_cannot_hold_is_refused_and_the_record_stays(self, store: SlotStore) -> None:
        slot = make_slot(store)
        await store.save_slot(slot)
        lease = Lease("lease-1", 1, OWNER, NOON, 12.5, metadata={"x": object()})
        with pytest.raises(StoreError, match=ONE):
            await store.save_slot(attrs.evolve(slot, lease=lease))
        assert await store.load_slot(ONE) == slot

    async def test_a_record_too_large_to_be_read_again_is_refused(self, store: SlotStore) -> None:
        lease = Lease("lease-1", 1, OWNER, NOON, 12.5, metadata={"x": "y" * RECORD_LIMIT_BYTES})
        with pytest.raises(StoreError, match="metadata"):
            await store.save_slot(make_slot(store, lease=lease))

    async def test_readers_never_see_half_a_record(self, store: SlotStore, events: Events) -> None:
        slots = [make_slot(store, token=n, error="x" * (n * 400)) for n in range(20)]
        await store.save_slot(slots[0])
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                for slot in slots:
                    store.write_slot_sync(slot)

        with ThreadPoolExecutor(2) as threads:
            writers = [threads.submit(write) for _ in range(2)]
            try:
                for _ in range(500):
                    slot = store.read_slot_sync(ONE)
                    assert slot == slots[slot.token]
            finally:
                stop.set()
            for writer in writers:
                writer.result()
        assert events == []
        assert names(store.slot_directory(ONE)) == ["slot.json"]

    async def test_the_record_is_json_for_anybody(self, store: SlotStore) -> None:
        await store.save_slot(make_slot(store, token=3))
        store.write_slot_sync(make_slot(store, token=4))
        raw = json.loads(record_path(store).read_text())
        assert (raw["slot_id"], raw["state"], raw["token"], raw["schema_version"]) == (ONE, "cleaning", 4, 1)

    async def test_a_record_without_a_checksum_is_taken_as_it_is(self, store: SlotStore, events: Events) -> None:
        await store.save_slot(make_slot(store))
        record_path(store).write_text(json.dumps(json.loads(dumps(make_slot(store, token=8))), indent=2))
        assert await store.load_slot(ONE) == make_slot(store, token=8)
        assert events == []

    @pytest.mark.parametrize("sizes", [(10, 20), (10, 9000), (9000, 10), (9000, 9000)])
    async def test_records_of_any_size_follow_each_other(self, store: SlotStore, sizes: tuple[int, int]) -> None:
        for size in sizes:
            slot = make_slot(store, error="x" * size)
            await store.save_slot(slot)
            assert await store.load_slot(ONE) == slot
        assert names(store.slot_directory(ONE)) == ["slot.json"]

    async def test_a_record_that_is_being_written_is_waited_for(self, store: SlotStore, events: Events) -> None:
        await store.save_slot(make_slot(store, token=3, error="old"))
        old = record_path(store).read_bytes()
        store.write_slot_sync(make_slot(store, token=4, error="new"))
        new = record_path(store).read_bytes()
        with record_path(store).open("rb+") as file, ThreadPoolExecutor(1) as threads:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.pwrite(file.fileno(), old[:300], 0)
            reading = threads.submit(store.read_slot_sync, ONE)
            assert not reading.done()
            os.pwrite(file.fileno(), new, 0)
            fcntl.flock(file, fcntl.LOCK_UN)
            assert reading.result().token == 4
        assert events == []

    async def test_verbs_do_not_block_the_event_loop(self, store: SlotStore) -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            counter = group.create_task(count())
            for number in range(1, 6):
                await store.save_slot(make_slot(store, number))
            await store.list_slots("web")
            counter.cancel()
        assert turns > 6


class TestDeletingSlots:
    async def test_leaves_nothing_of_it_and_everything_else(self, store: SlotStore) -> None:
        for number in (1, 2):
            await store.save_slot(make_slot(store, number))
            await store.append_history(make_record(slot_id=make_slot_id("web", number)))
        tree = Path(store.tree_path(ONE))
        (tree / ".git" / "objects").mkdir(parents=True)
        (tree / "file").write_bytes(b"work")
        await store.delete_slot(ONE)
        assert names(tree.parent.parent) == ["slot2"]
        assert names(store.trash_path("web")) == []
        assert [slot.number for slot in await store.list_slots("web")] == [2]
        with pytest.raises(SlotNotFoundError):
            await store.delete_slot(ONE)

    async def test_whatever_a_lessee_put_there_goes_and_nothing_outside_does(
        self, store: SlotStore, tmp_path: Path
    ) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "file").write_bytes(b"mine")
        await store.save_slot(make_slot(store))
        tree = Path(store.tree_path(ONE))
        (tree / "a" / "b").mkdir(parents=True)
        (tree / "link").symlink_to(outside)
        os.link(outside / "file", tree / "hard")
        os.mkfifo(tree / "fifo")
        (tree / os.fsdecode(b"caf\xe9\n")).touch(mode=0)
        for path in (tree / "a" / "b", tree / "a", tree, tree.parent):
            path.chmod(0)
        await store.delete_slot(ONE)
        assert names(Path(store.pool_directory("web"), "slots")) == []
        assert names(store.trash_path("web")) == []
        assert (outside / "file").read_bytes() == b"mine"

    def test_an_ordinary_user_deletes_directories_that_forbid_everything(self) -> None:
        def act(directory: Path) -> None:
            store = SlotStore(directory)
            store.save_slot_sync(make_slot(store))
            tree = Path(store.tree_path(ONE))
            (tree / "a" / "b").mkdir(parents=True)
            (tree / "a" / "b" / "file").touch(mode=0)
            for path, mode in ((tree / "a" / "b", 0o555), (tree / "a", 0), (tree, 0o500), (tree.parent, 0)):
                path.chmod(mode)
            store.delete_slot_sync(ONE)
            assert names(directory / "web" / "slots") == []
            assert names(store.trash_path("web")) == []

        as_ordinary_user(act)

    def test_an_ordinary_user_is_told_what_is_in_the_way(self) -> None:
        def act(directory: Path) -> None:
            store = SlotStore(directory)
            store.save_slot_sync(make_slot(store))
            (directory / "web" / "slots").chmod(0o555)
            with pytest.raises(StoreError, match=r"slots/slot1.*Permission denied; give user") as caught:
                store.delete_slot_sync(ONE)
            assert caught.value.slot_id == ONE
            assert store.read_slot_sync(ONE) == make_slot(store)

        as_ordinary_user(act)

    async def test_of_two_who_delete_one_succeeds(self, store: SlotStore) -> None:
        for _ in range(10):
            await store.save_slot(make_slot(store))
            Path(store.tree_path(ONE), "a").mkdir(parents=True)
            results = await asyncio.gather(*(store.delete_slot(ONE) for _ in range(3)), return_exceptions=True)
            assert sorted(map(type, results), key=str) == sorted([type(None), *[SlotNotFoundError] * 2], key=str)

    async def test_listing_meanwhile_never_fails(self, store: SlotStore, events: Events) -> None:
        stop = threading.Event()

        def churn() -> None:
            while not stop.is_set():
                store.save_slot_sync(make_slot(store))
                store.delete_slot_sync(ONE)

        with ThreadPoolExecutor(1) as threads:
            churning = threads.submit(churn)
            try:
                for _ in range(300):
                    assert store.list_slots_sync("web") in ([], [make_slot(store)])
            finally:
                stop.set()
            churning.result()
        assert events == []


class TestLogs:
    async def test_come_back_oldest_first(self, store: SlotStore) -> None:
        await store.save_slot(make_slot(store))
        records = [make_record(token=token) for token in range(1, 6)]
        results = [make_result(removed) for removed in range(5)]
        for record, result in zip(records, results, strict=True):
            await store.append_history(record)
            await store.append_cleanup(result)
        assert await store.history(ONE) == records
        assert await store.cleanup_log(ONE) == results

    @pytest.mark.parametrize("limit", [0, 1, 3, 5, 99])
    async def test_a_limit_keeps_the_newest(self, store: SlotStore, limit: int) -> None:
        await store.save_slot(make_slot(store))
        records = [make_record(token=token) for token in range(1, 6)]
        for record in records:
            await store.append_history(record)
        assert await store.history(ONE, limit=limit) == records[max(0, 5 - limit) :]

    async def test_are_empty_where_nothing_happened(self, store: SlotStore) -> None:
        await store.save_slot(make_slot(store))
        assert await store.history(ONE) == []
        assert await store.cleanup_log(ONE, limit=3) == []

    async def test_keep_a_megabyte_at_least_and_two_at_most(self, store: SlotStore) -> None:
        await store.save_slot(make_slot(store))
        for token in range(1, 41):
            store.append_history_sync(make_record(token=token, metadata={"x": "y" * 100_000}))
        kept = await store.history(ONE)
        assert [record.token for record in kept] == list(range(kept[0].token, 41))
        assert sum(len(dumps(record)) for record in kept) + 110_000 >= LOG_ROTATE_BYTES
        assert [record.token for record in await store.history(ONE, limit=12)] == list(range(29, 41))
        sizes = {path.name: path.stat().st_size for path in Path(store.slot_directory(ONE)).iterdir()}
        assert sizes.keys() == {"slot.json", "history.jsonl", "history.jsonl.1"}
        assert max(sizes.values()) <= LOG_ROTATE_BYTES

    async def test_a_torn_or_foreign_line_costs_no_other(self, store: SlotStore) -> None:
        await store.save_slot(make_slot(store))
        await store.append_history(make_record(token=1))
        path = Path(store.slot_directory(ONE), "history.jsonl")
        with path.open("ab") as log:
            log.write(b"\0\0\0\n[]\n\xff\xfe\n" + dumps(make_record(token=2))[:40])
        await store.append_history(make_record(token=3))
        assert [record.token for record in await store.history(ONE)] == [1, 3]

    @pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
    async def test_something_else_in_place_of_a_log_is_set_aside(
        self, store: SlotStore, events: Events, kind: str
    ) -> None:
        await store.save_slot(make_slot(store))
        path = Path(store.slot_directory(ONE), "cleanup.jsonl")
        if kind == "directory":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to(record_path(store))
        assert await store.cleanup_log(ONE) == []
        await store.append_cleanup(make_result())
        assert await store.cleanup_log(ONE) == [make_result()]
        assert len(set_aside(path)) == 1
        assert await store.load_slot(ONE) == make_slot(store)
        assert [kind for kind, _ in events] == ["store.corrupt"]

    def test_several_processes_lose_no_line(self, store: SlotStore) -> None:
        store.save_slot_sync(make_slot(store))
        code = (
            "import attrs, sys\n"
            "from datetime import UTC, datetime\n"
            "from repopool_async.models import CleanupResult\n"
            "from repopool_async.slot_store import SlotStore\n"
            "store = SlotStore(sys.argv[1])\n"
            "for n in range(100):\n"
            "    result = CleanupResult('workspace-web-slot1', sys.argv[2], True, datetime.now(UTC), 0.5, removed=n)\n"
            "    store.append_cleanup_sync(result)\n"
        )
        commands = [[sys.executable, "-c", code, store.workspaces_directory, str(n)] for n in range(3)]
        writers = [subprocess.Popen(command) for command in commands]
        assert [writer.wait() for writer in writers] == [0, 0, 0]
        log = asyncio.run(store.cleanup_log(ONE))
        for number in range(3):
            assert [line.removed for line in log if line.operation == str(number)] == list(range(100))


def assert_rebuilt(store: SlotStore, slot: Slot, *, above: int = 0) -> None:
    assert (slot.slot_id, slot.repo_name, slot.path) == (ONE, "web", store.tree_path(ONE))
    assert slot.state is SlotState.CLEANING
    assert slot.seal is None
    assert slot.token > above
    assert json.loads(record_path(store).read_bytes())["token"] == slot.token


class TestCorruptSlotRecords:
    async def test_are_set_aside_reported_and_rebuilt(self, store: SlotStore, events: Events) -> None:
        await store.save_pool(make_pool())
        await store.save_slot(make_slot(store, state=SlotState.AVAILABLE, token=41))
        record_path(store).write_bytes(b"garbage")
        slot = await store.load_slot(ONE)
        assert_rebuilt(store, slot, above=41)
        assert slot.repo_url == URL
        (aside,) = set_aside(record_path(store))
        assert aside.read_bytes() == b"garbage"
        ((kind, fields),) = events
        assert kind == "store.corrupt"
        assert fields["path"] == str(record_path(store))
        assert fields["set_aside"] == str(aside)
        assert (fields["repo_name"], fields["slot_id"], fields["token"]) == ("web", ONE, slot.token)
        assert "no valid Slot" in str(fields["reason"])
        assert await store.load_slot(ONE) == slot
        assert len(events) == 1

    async def test_the_time_in_the_name_is_utc(self, store: SlotStore) -> None:
        await store.save_slot(make_slot(store))
        record_path(store).write_bytes(b"")
        before = datetime.now(UTC)
        await store.load_slot(ONE)
        (aside,) = set_aside(record_path(store))
        at = datetime.strptime(aside.name, "slot.json.corrupt-%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC)
        assert before <= at <= datetime.now(UTC)

    def test_a_record_cut_off_anywhere_is_rebuilt_with_a_greater_token(self, store: SlotStore, events: Events) -> None:
        lease = Lease("lease-7", 2_000_000_007, OWNER, NOON, 12.5, metadata={"x": "\u00e9"})
        slot = make_slot(store, state=SlotState.ALLOCATED, token=2_000_000_007, lease=lease)
        store.save_slot_sync(slot)
        data = record_path(store).read_bytes().rstrip()
        after_the_token = data.index(b"2000000007") + 11
        for length in range(len(data)):
            record_path(store).write_bytes(data[:length])
            assert_rebuilt(store, store.read_slot_sync(ONE), above=2_000_000_007 if length >= after_the_token else 1)
        assert len(events) == len(data)
        record_path(store).write_bytes(data)
        assert store.read_slot_sync(ONE) == slot

    @PATIENTLY
    @given(data=st.binary(max_size=200))
    def test_random_garbage_is_rebuilt(self, shared_store: SlotStore, data: bytes) -> None:
        record_path(shared_store).write_bytes(data)
        assert_rebuilt(shared_store, shared_store.read_slot_sync(ONE))
        *_, newest = set_aside(record_path(shared_store))
        assert newest.read_bytes() == data
        newest.unlink()

    @PATIENTLY
    @given(place=st.integers(0, 10_000), damage=st.binary(min_size=1, max_size=8))
    def test_a_damaged_record_is_read_or_rebuilt_and_stays_so(
        self, shared_store: SlotStore, place: int, damage: bytes
    ) -> None:
        data = dumps(make_slot(shared_store, token=5))
        place %= len(data)
        record_path(shared_store).write_bytes(data[:place] + damage + data[place + len(damage) :])
        slot = shared_store.read_slot_sync(ONE)
        assert slot.slot_id == ONE
        assert shared_store.list_slots_sync("web") == [slot]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\0" * 700,
            b"null\n",
            b"[]\n",
            b"{}\n",
            b'{"slot_id": 7}',
            b"[" * 100_000,
            b"\xff" * 100,
        ],
        ids=["empty", "NULs", "null", "list", "nothing", "wrong types", "deep", "no text"],
    )
    async def test_whatever_is_in_the_file(self, store: SlotStore, content: bytes) -> None:
        await store.save_slot(make_slot(store))
        record_path(store).write_bytes(content)
        assert_rebuilt(store, (await store.list_slots("web"))[0])

    async def test_the_record_of_another_slot(self, store: SlotStore, events: Events) -> None:
        for number in (1, 2):
            await store.save_slot(make_slot(store, number, token=number))
        shutil.copy(record_path(store, make_slot_id("web", 2)), record_path(store))
        first, second = await store.list_slots("web")
        assert_rebuilt(store, first)
        assert second == make_slot(store, 2, token=2)
        assert "workspace-web-slot2" in str(events[0][1]["reason"])

    @pytest.mark.parametrize("kind", ["directory", "full directory", "fifo", "link", "dangling", "huge", "device"])
    async def test_whatever_is_in_place_of_the_file(self, store: SlotStore, kind: str) -> None:
        await store.save_slot(make_slot(store))
        path = record_path(store)
        path.unlink()
        if kind == "directory":
            path.mkdir(mode=0o555)
        elif kind == "full directory":
            (path / "a" / "b").mkdir(parents=True)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            (path.parent / "other").write_bytes(dumps(make_slot(store, token=10**12)))
            path.symlink_to("other")
        elif kind == "dangling":
            path.symlink_to("absent")
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            with path.open("wb") as file:
                file.truncate(1 << 40)
        assert_rebuilt(store, await store.load_slot(ONE))
        (aside,) = set_aside(path)
        assert os.path.lexists(aside)
        assert not path.is_symlink()
        assert path.is_file()

    def test_a_file_that_an_ordinary_user_may_not_read(self) -> None:
        def act(directory: Path) -> None:
            store = SlotStore(directory)
            store.save_slot_sync(make_slot(store, token=7))
            record_path(store).chmod(0)
            assert_rebuilt(store, store.list_slots_sync("web")[0], above=7)
            (aside,) = set_aside(record_path(store))
            assert stat.S_IMODE(aside.stat().st_mode) == 0

        as_ordinary_user(act)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")
    def test_another_users_file_is_not_touched(self, tmp_path: Path) -> None:
        theirs = SlotStore(tempfile.mkdtemp(prefix="repopool-test-"))
        try:
            theirs.save_slot_sync(make_slot(theirs, token=7))
            record_path(theirs).chmod(0o600)
            for path in [Path(theirs.workspaces_directory), *Path(theirs.workspaces_directory).rglob("*")]:
                if path.is_dir():
                    path.chmod(0o777)

            def act(_: Path) -> None:
                with pytest.raises(StoreError, match="give user 65534 read and write permission"):
                    SlotStore(theirs.workspaces_directory).read_slot_sync(ONE)

            as_ordinary_user(act)
            assert theirs.read_slot_sync(ONE).token == 7
        finally:
            shutil.rmtree(theirs.workspaces_directory)

    def test_a_directory_that_a_lessee_shut_is_opened_up(self) -> None:
        def act(directory: Path) -> None:
            store = SlotStore(directory)
            slot = make_slot(store, token=7)
            store.save_slot_sync(slot)
            acts: list[Callable[[], object]] = [
                lambda: store.read_slot_sync(ONE),
                lambda: store.write_slot_sync(slot),
                lambda: store.save_slot_sync(slot),
                lambda: store.append_history_sync(make_record(token=7)),
                lambda: asyncio.run(store.history(ONE)),
            ]
            for verb in acts:
                Path(store.slot_directory(ONE)).chmod(0)
                verb()
            assert store.list_slots_sync("web") == [slot]

        as_ordinary_user(act)

    async def test_what_history_knows_is_rebuilt(self, store: SlotStore) -> None:
        await store.save_pool(make_pool())
        await store.save_slot(make_slot(store, token=3))
        hour = timedelta(hours=1)
        for record in (
            make_record("allocated", 1, at=NOON, branch="main"),
            make_record("released", 1, at=NOON + hour, held_seconds=3600.0),
            make_record(
                "allocated", 3, at=NOON + 2 * hour, branch="topic", ref="topic", commit="c" * 40, metadata={"job": 7}
            ),
        ):
            await store.append_history(record)
        record_path(store).unlink()
        slot = await store.load_slot(ONE)
        assert_rebuilt(store, slot, above=3)
        assert (slot.allocation_count, slot.total_allocated_seconds) == (2, 3600.0)
        assert (slot.created_at, slot.last_used_at, slot.last_branch) == (NOON, NOON + 2 * hour, "topic")
        assert slot.lease is not None  # what was held is still to be salvaged, under its own name
        assert (slot.lease.lease_id, slot.lease.token, slot.lease.owner) == ("lease-3", 3, OWNER)
        assert (slot.lease.ref, slot.lease.commit, slot.lease.branch) == ("topic", COMMIT, "topic")
        assert slot.lease.metadata == {"job": 7}
        assert 0 <= slot.lease.acquired_boottime <= boottime()

    async def test_a_lease_that_ended_is_not_brought_back(self, store: SlotStore) -> None:
        await store.save_slot(make_slot(store))
        await store.append_history(make_record("allocated", 1))
        await store.append_history(make_record("released", 1, held_seconds=5.0))
        record_path(store).write_bytes(b"")
        assert (await store.load_slot(ONE)).lease is None

    @pytest.mark.parametrize("source", ["history", "rotated history", "fence", "run", "text"])
    async def test_the_token_is_greater_than_any_that_is_known(self, store: SlotStore, source: str) -> None:
        known = int(time.time()) + 10**9
        await store.save_slot(make_slot(store))
        directory = Path(store.slot_directory(ONE))
        record_path(store).write_bytes(b"")
        if source == "history":
            await store.append_history(make_record(token=known))
        elif source == "rotated history":
            (directory / "history.jsonl.1").write_bytes(dumps(make_record(token=known)))
        elif source == "fence":
            (directory / "fence" / f"{known:020}").mkdir(parents=True)
            (directory / "fence" / "9").mkdir()
        elif source == "run":
            (directory / "run" / f"{known}.4711").mkdir(parents=True)
        else:
            record_path(store).write_bytes(b'{"state":"available","token":%d,"tot' % known)
        assert (await store.load_slot(ONE)).token > known

    async def test_without_anything_known_the_token_is_ahead_of_any_count(self, store: SlotStore) -> None:
        await store.save_slot(make_slot(store, token=123_456))
        record_path(store).write_bytes(b"")
        assert (await store.load_slot(ONE)).token >= int(time.time()) - 1

    async def test_a_token_no_database_could_hold_is_not_believed(self, store: SlotStore) -> None:
        await store.save_slot(make_slot(store))
        directory = Path(store.slot_directory(ONE))
        (directory / "fence" / ("9" * 200)).mkdir(parents=True)
        record_path(store).write_bytes(b'{"token":' + b"9" * 5000)
        assert (await store.load_slot(ONE)).token < 2**63

    async def test_other_slots_are_untouched(self, store: SlotStore) -> None:
        slots = [make_slot(store, number, state=SlotState.AVAILABLE, token=number) for number in (1, 2, 3)]
        for slot in slots:
            await store.save_slot(slot)
        record_path(store, slots[1].slot_id).write_bytes(b"\0")
        found = await store.list_slots("web")
        assert [found[0], found[2]] == [slots[0], slots[2]]
        assert found[1].state is SlotState.CLEANING

    def test_many_who_meet_one_rebuild_it_once(self, store: SlotStore, events: Events) -> None:
        for _ in range(20):
            events.clear()
            store.save_slot_sync(make_slot(store))
            record_path(store).write_bytes(b"garbage")
            barrier = threading.Barrier(6)

            def read(barrier: threading.Barrier) -> Slot:
                barrier.wait()
                return store.read_slot_sync(ONE)

            with ThreadPoolExecutor(6) as threads:
                found = list(threads.map(read, [barrier] * 6))
            assert found == [found[0]] * 6
            assert len(events) == 1


class TestHalfDeletedSlots:
    @pytest.mark.parametrize("rest", ["tree", "pristine", "fence", "slot.json.corrupt-20260101T000000.000000Z"])
    async def test_a_directory_without_a_record_is_rebuilt(self, store: SlotStore, rest: str) -> None:
        Path(store.slot_directory(ONE), rest).mkdir(parents=True)
        (slot,) = await store.list_slots("web")
        assert_rebuilt(store, slot)
        assert await store.load_slot(ONE) == slot

    @pytest.mark.parametrize("rest", [[], [".repopool-1-2-0123456789abcdef.tmp"]])
    async def test_an_empty_directory_is_no_slot(self, store: SlotStore, events: Events, rest: list[str]) -> None:
        directory = Path(store.slot_directory(ONE))
        directory.mkdir(parents=True)
        for name in rest:
            (directory / name).touch()
        assert await store.list_slots("web") == []
        with pytest.raises(SlotNotFoundError):
            await store.load_slot(ONE)
        assert events == []
        await store.save_slot(make_slot(store))
        assert await store.list_slots("web") == [make_slot(store)]

    async def test_it_can_be_deleted(self, store: SlotStore) -> None:
        Path(store.slot_directory(ONE)).mkdir(parents=True)
        await store.delete_slot(ONE)
        assert names(Path(store.pool_directory("web"), "slots")) == []


def write_mirror(store: SlotStore, config: str, name: str = "web") -> None:
    Path(store.mirror_path(name)).mkdir(parents=True, exist_ok=True)
    Path(store.mirror_path(name), "config").write_text(config)


class TestCorruptPoolRecords:
    CONFIG: Final = f'[core]\n\tbare = true\n[remote "origin"]\n\turl = {URL}\n\tfetch = +refs/heads/*:refs/heads/*\n'

    async def test_are_rebuilt_from_the_mirror_and_the_slots(self, store: SlotStore, events: Events) -> None:
        await store.save_pool(make_pool(options={"keep": ["x"]}))
        write_mirror(store, self.CONFIG)
        for number in (2, 5):
            await store.save_slot(make_slot(store, number, created_at=NOON + timedelta(days=number)))
        pool_path(store).write_bytes(b"garbage")
        pool = await store.load_pool("web")
        assert pool == make_pool(num_slots=2, next_slot_number=6, created_at=NOON + timedelta(days=2))
        (aside,) = set_aside(pool_path(store))
        ((kind, fields),) = events
        assert kind == "store.corrupt"
        assert (fields["path"], fields["set_aside"]) == (str(pool_path(store)), str(aside))
        assert (fields["repo_name"], fields["lost"]) == ("web", "options")
        assert await store.load_pool("web") == pool
        assert await store.list_pools() == ["web"]
        assert len(events) == 1

    @pytest.mark.parametrize("content", [b"", b"\0" * 99, b"[]", b"{}", dumps(make_pool("api"))])
    async def test_whatever_is_in_the_file(self, store: SlotStore, content: bytes) -> None:
        await store.save_pool(make_pool())
        write_mirror(store, self.CONFIG)
        pool_path(store).write_bytes(content)
        assert await store.list_pools() == ["web"]
        assert (await store.load_pool("web")).repo_url == URL

    async def test_a_directory_in_place_of_the_file(self, store: SlotStore) -> None:
        write_mirror(store, self.CONFIG)
        pool_path(store).mkdir()
        assert (await store.load_pool("web")).repo_url == URL

    async def test_a_rebuilding_that_was_interrupted_is_finished(self, store: SlotStore) -> None:
        await store.save_pool(make_pool())
        write_mirror(store, self.CONFIG)
        pool_path(store).rename(f"{pool_path(store)}.corrupt-20260101T000000.000000Z")
        assert await store.list_pools() == ["web"]
        assert (await store.load_pool("web")).repo_url == URL

    async def test_without_a_mirror_a_slot_tells_the_url(self, store: SlotStore) -> None:
        await store.save_pool(make_pool())
        await store.save_slot(make_slot(store))
        pool_path(store).write_bytes(b"")
        assert (await store.load_pool("web")).repo_url == URL

    async def test_without_mirror_and_slots_the_pool_is_gone_and_the_name_is_free(
        self, store: SlotStore, events: Events
    ) -> None:
        await store.save_pool(make_pool())
        pool_path(store).write_bytes(b"garbage")
        with pytest.raises(PoolNotFoundError):
            await store.load_pool("web")
        assert "everything" in str(events[0][1]["lost"])
        assert await store.list_pools() == []
        with pytest.raises(PoolNotFoundError):
            await store.load_pool("web")
        assert len(events) == 1
        await store.save_pool(make_pool())
        assert await store.load_pool("web") == make_pool()

    async def test_a_mirror_alone_makes_no_pool(self, store: SlotStore) -> None:
        write_mirror(store, self.CONFIG)
        with pytest.raises(PoolNotFoundError):
            await store.load_pool("web")
        assert await store.list_pools() == []

    async def test_slot_numbers_that_were_ever_used_are_not_used_again(self, store: SlotStore) -> None:
        await store.save_pool(make_pool())
        write_mirror(store, self.CONFIG)
        await store.save_slot(make_slot(store, 2))
        locks = Path(store.locks_directory)
        locks.mkdir()
        for name in (
            "workspace-web-slot7.lock",
            "workspace-web-slot7.record.lock",
            "workspace-web2-slot99.lock",
            "other",
        ):
            (locks / name).touch()
        pool_path(store).write_bytes(b"")
        assert (await store.load_pool("web")).next_slot_number == 8
        pool_path(store).write_bytes(b'{"next_slot_number":31,"num')
        assert (await store.load_pool("web")).next_slot_number == 31

    async def test_credentials_in_the_mirror_do_not_come_along(self, store: SlotStore) -> None:
        write_mirror(store, '[remote "origin"]\n\turl = https://me:secret@example.org/web.git\n')
        pool_path(store).touch()
        assert (await store.load_pool("web")).repo_url == URL


class TestTroubleWithTheDisk:
    async def test_a_file_in_place_of_a_directory_is_named_with_the_remedy(
        self, store: SlotStore, tmp_path: Path
    ) -> None:
        (tmp_path / "pools").touch()
        with pytest.raises(StoreError, match=r"web: cannot write .*/pools/web/pool.json: .*in its way") as caught:
            await store.save_pool(make_pool())
        assert caught.value.repo_name == "web"
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(StoreError, match="workspace-web-slot1: cannot write"):
            await store.save_slot(make_slot(store))
        with pytest.raises(PoolNotFoundError):
            await store.load_pool("web")
        assert await store.list_pools() == []

    async def test_a_directory_in_place_of_a_record_is_named_with_the_remedy(self, store: SlotStore) -> None:
        record_path(store).mkdir(parents=True)
        with pytest.raises(StoreError, match=r"slot.json: Is a directory; .*move it"):
            await store.save_slot(make_slot(store))

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
    async def test_a_place_where_even_root_cannot_write_is_named(self) -> None:
        store = SlotStore("/proc/self/pools")
        with pytest.raises(StoreError, match="/proc/self/pools"):
            await store.save_pool(make_pool())
        assert await store.list_pools() == []

    @pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="only root can mount")
    def test_a_full_or_read_only_disk_is_named_with_the_remedy(self, tmp_path: Path) -> None:
        code = (
            "import attrs, subprocess, sys\n"
            "from contextlib import suppress\n"
            "from datetime import UTC, datetime\n"
            "from repopool_async.exceptions import StoreError\n"
            "from repopool_async.models import Pool, Slot\n"
            "from repopool_async.slot_store import SlotStore\n"
            "def mount(*argv):\n"
            "    if subprocess.run(['mount', *argv, sys.argv[1]], capture_output=True).returncode: sys.exit(77)\n"
            "mount('-t', 'tmpfs', '-o', 'size=64k', 'none')\n"
            "store = SlotStore(sys.argv[1])\n"
            "pool = Pool('web', 'url', 2, datetime.now(UTC))\n"
            "store.save_pool_sync(pool)\n"
            "def refused(options, words):\n"
            "    try:\n"
            "        store.save_pool_sync(Pool('web', 'url', 2, datetime.now(UTC), options=options))\n"
            "    except StoreError as error:\n"
            "        assert words in str(error), error\n"
            "    else:\n"
            "        sys.exit('it was accepted')\n"
            "refused({'x': 'y' * 200_000}, 'free some space')\n"
            "slot = Slot('workspace-web-slot1', 'web', 'url', '/tree', datetime.now(UTC))\n"
            "store.save_slot_sync(slot)\n"
            "with suppress(OSError), open(sys.argv[1] + '/filler', 'wb', buffering=0) as filler:\n"
            "    while True: filler.write(bytes(4096))\n"
            "store.write_slot_sync(attrs.evolve(slot, token=5))  # a full disk keeps no lease from ending\n"
            "assert store.read_slot_sync(slot.slot_id).token == 5\n"
            "mount('-o', 'remount,ro')\n"
            "refused({}, 'mount it read-write')\n"
            "assert store.load_pool_sync('web') == pool\n"
            "import os; assert sorted(os.listdir(sys.argv[1] + '/web')) == ['pool.json', 'slots']\n"
        )
        try:
            done = subprocess.run(
                ["unshare", "-m", sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False
            )
        except FileNotFoundError:
            pytest.skip("no unshare command here")
        if done.returncode == 77 or b"unshare" in done.stderr:
            pytest.skip("mounting is not permitted here")
        assert done.returncode == 0, done.stderr

    def test_an_ordinary_user_is_told_of_a_read_only_directory(self) -> None:
        def act(directory: Path) -> None:
            store = SlotStore(directory)
            store.save_pool_sync(make_pool())
            store.save_slot_sync(make_slot(store))
            (directory / "web").chmod(0o555)
            with pytest.raises(StoreError, match=r"Permission denied; give user") as caught:
                store.save_pool_sync(make_pool(num_slots=3))
            assert str(pool_path(store)) in str(caught.value)
            assert store.load_pool_sync("web") == make_pool()
            with pytest.raises(StoreError):
                store.delete_slot_sync(ONE)  # the trash cannot be made
            directory.chmod(0)
            with pytest.raises(StoreError, match="cannot read"):
                store.list_pools_sync()
            with pytest.raises(StoreError):
                store.list_slots_sync("web")

        as_ordinary_user(act)

    async def test_every_error_is_ours(self, store: SlotStore, tmp_path: Path) -> None:
        (tmp_path / "pools").touch()
        for act in (
            lambda: store.save_pool(make_pool()),
            lambda: store.load_pool("web"),
            lambda: store.delete_pool("web"),
            lambda: store.save_slot(make_slot(store)),
            lambda: store.load_slot(ONE),
            lambda: store.delete_slot(ONE),
            lambda: store.append_history(make_record()),
            lambda: store.history(ONE),
            lambda: store.append_cleanup(make_result()),
            lambda: store.cleanup_log(ONE),
        ):
            with pytest.raises(PoolManagerError):
                await act()


class TestKilledProcesses:
    @pytest.mark.parametrize("size", [10, 100_000])
    def test_a_process_killed_while_writing_costs_no_record(self, store: SlotStore, events: Events, size: int) -> None:
        store.save_slot_sync(make_slot(store))
        code = (
            "import attrs, os, sys\n"
            "from repopool_async.slot_store import SlotStore\n"
            "store = SlotStore(sys.argv[1])\n"
            "slot = store.read_slot_sync('workspace-web-slot1')\n"
            "while True:\n"
            "    slot = attrs.evolve(slot, token=slot.token + 1, error='x' * int(sys.argv[2]))\n"
            "    store.write_slot_sync(slot)\n"
            "    os.write(1, b'.')\n"
        )
        for pause in range(8):
            command = [sys.executable, "-c", code, store.workspaces_directory, str(size)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
                assert writer.stdout is not None
                for _ in range(pause + 1):
                    os.read(writer.stdout.fileno(), 1)
                writer.kill()
            slot = store.read_slot_sync(ONE)
            assert slot.token > pause
            assert slot.error == "x" * size
        assert events == []

    async def test_a_process_killed_while_deleting_leaves_no_slot_behind(self, store: SlotStore) -> None:
        code = (
            "import os, sys\n"
            "from repopool_async import _removal\n"
            "from repopool_async.slot_store import SlotStore\n"
            "_removal.remove_tree = lambda path: os._exit(9)\n"
            "SlotStore(sys.argv[1]).delete_slot_sync('workspace-web-slot1')\n"
        )
        await store.save_slot(make_slot(store))
        done = subprocess.run([sys.executable, "-c", code, store.workspaces_directory], check=False)
        assert done.returncode == 9
        assert await store.list_slots("web") == []
        assert not Path(store.slot_directory(ONE)).exists()
        assert len(names(store.trash_path("web"))) == 1
