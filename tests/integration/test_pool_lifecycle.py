"""A pool from creation to deletion, across managers, with everything that is stored on the way."""

from collections.abc import Callable, Mapping
from pathlib import Path

from repopool_async import PoolConfig, PoolManager, SlotState

MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]


async def test_a_pool_lives_through_three_managers(tmp_path: Path, origin: Path, make_commit: MakeCommit) -> None:
    config = PoolConfig(workspaces_dir=tmp_path / "pools")

    async with PoolManager(config) as first:
        await first.create_pool("app", str(origin), num_slots=2)
        async with first.lease("app", metadata={"run": 1}) as slot:
            used = slot.slot_id
            (slot.path / "README.md").write_text("mine")

    commit = make_commit(origin, "main", {"new.txt": b"new"})
    async with PoolManager(config) as second:
        assert (await second.get_pool_summary())["app"].available == 2
        async with second.lease("app") as slot:
            assert slot.slot_id == used  # the most recently used comes first
            assert (slot.commit, slot.token) == (commit, 2)
            assert (slot.path / "README.md").read_bytes() == b"# A small repository\n"
        await second.add_slot("app")
        await second.wait_clean()
        await second.remove_slot(used)

    async with PoolManager(config) as third:
        summary = (await third.get_pool_summary())["app"]
        assert (summary.total_slots, summary.available) == (2, 2)
        statuses = [await third.get_slot_status(f"workspace-app-slot{number}") for number in (2, 3)]
        assert all(status.state is SlotState.AVAILABLE for status in statuses)
        await third.delete_pool("app")
        assert await third.list_pools() == []
    assert {entry.name for entry in config.workspaces_dir.iterdir()} == {"locks"}


async def test_history_and_clean_up_log_survive(tmp_path: Path, origin: Path) -> None:
    config = PoolConfig(workspaces_dir=tmp_path / "pools")
    slot_id = "workspace-app-slot1"
    async with PoolManager(config) as manager:
        await manager.create_pool("app", str(origin), num_slots=1, cleanup="inline")
        for number in range(3):
            async with manager.lease("app", ref="feature/x", metadata={"number": number}) as slot:
                assert slot.slot_id == slot_id
    async with PoolManager(config) as manager:
        history = await manager.get_allocation_history(slot_id)
        assert [record.metadata.get("number") for record in history if record.event == "allocated"] == [0, 1, 2]
        log = await manager.get_cleanup_log(slot_id)
        assert [entry.operation for entry in log].count("return") == 3
        status = await manager.get_slot_status(slot_id)
        assert status.allocation_count == 3
        assert status.total_allocated_seconds > 0
