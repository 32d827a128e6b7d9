"""The configuration file followed by a running manager; real git, real files."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from repopool_async import ConfigError, Event, PoolConfig, PoolManager, PoolNotFoundError, SlotState
from repopool_async.config_changes import compare


class File:
    """A `pools.yaml` that tests rewrite as editors do."""

    def __init__(self, directory: Path, origin: Path) -> None:
        self.path = directory / "pools.yaml"
        self._top = f"workspaces_dir: {directory}/pools\nwatch: never\n"
        self._origin = origin

    def write(self, top: str = "", **pools: str) -> None:
        lines = [f"  {name}: {{repo_url: {self._origin}, {options}}}\n" for name, options in pools.items()]
        text = f"{self._top}{top}pools:\n{''.join(lines)}"
        self.replace(text.replace("watch: never\n", "") if "watch:" in top else text)

    def replace(self, text: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)


class Listener:
    """Keeps what a manager tells."""

    def __init__(self, manager: PoolManager) -> None:
        self._events = manager.events()
        self.seen: list[Event] = []

    async def until(self, kind: str) -> Event:
        async with asyncio.timeout(30):
            async for event in self._events:
                self.seen.append(event)
                if event.kind == kind:
                    return event
        raise AssertionError(f"closed before {kind}")


@pytest.fixture
def file(tmp_path: Path, origin: Path) -> File:
    file = File(tmp_path, origin)
    file.write(web="num_slots: 2")
    return file


@pytest.fixture
async def manager(file: File) -> AsyncIterator[PoolManager]:
    async with PoolManager.from_config_file(file.path) as manager:
        await manager.wait_ready(60)
        yield manager


async def slots(manager: PoolManager, name: str = "web") -> list[str]:
    return [slot.slot_id.removeprefix(f"workspace-{name}-") for slot in await manager.list_slots(name)]


async def test_a_pool_that_is_new_in_the_file_comes_up(manager: PoolManager, file: File) -> None:
    file.write(web="num_slots: 2", docs="num_slots: 1")
    change = await manager.reload()
    assert (change.added, change.removed, change.changed) == (("docs",), (), {})
    async with manager.lease("docs", timeout=60) as slot:
        assert slot.branch == "main"


async def test_a_pool_grows(manager: PoolManager, file: File) -> None:
    file.write(web="num_slots: 4")
    change = await manager.reload()
    assert change.changed == {"web": ("num_slots",)}
    await manager.wait_ready(60)
    assert await slots(manager) == ["slot1", "slot2", "slot3", "slot4"]


async def test_a_pool_shrinks(manager: PoolManager, file: File, tmp_path: Path) -> None:
    file.write(web="num_slots: 1")
    await manager.reload()
    await manager.wait_ready(60)
    assert await slots(manager) == ["slot1"]
    assert not (tmp_path / "pools/web/slots/slot2").exists()


async def test_leased_slots_go_when_they_are_returned(manager: PoolManager, file: File) -> None:
    async with manager.lease("web") as first, manager.lease("web") as second:
        surplus = max(first, second, key=lambda slot: slot.slot_id)
        file.write(web="num_slots: 1")
        await manager.reload()
        await manager.wait_ready(60)
        assert await slots(manager) == ["slot1", "slot2"]
        assert (surplus.path / "README.md").exists()
    await manager.wait_clean()
    assert await slots(manager) == ["slot1"]
    async with manager.lease("web"):
        assert await manager.allocate_slot("web") is None


async def test_a_slot_leased_by_another_process_goes_when_it_is_back(manager: PoolManager, file: File) -> None:
    async with PoolManager(manager.config) as other:
        first, second = [await other.allocate_slot("web") for _ in range(2)]
        assert first is not None
        assert second is not None
        file.write(web="num_slots: 1")
        await manager.reload()
        await manager.wait_ready(60)
        assert len(await slots(manager)) == 2
        listener = Listener(manager)
        waiting = asyncio.get_running_loop().create_task(listener.until("slot.removed"))
        await other.release_slot(first)
        await other.release_slot(second)
        await waiting
    assert await slots(manager) == ["slot1"]


async def test_growing_again_before_the_surplus_was_back_keeps_it(manager: PoolManager, file: File) -> None:
    async with manager.lease("web"), manager.lease("web"):
        file.write(web="num_slots: 1")
        await manager.reload()
        await manager.wait_ready(60)
        file.write(web="num_slots: 2")
        await manager.reload()
        await manager.wait_ready(60)
    await manager.wait_clean()
    assert await slots(manager) == ["slot1", "slot2"]


async def test_slots_kept_unclean_until_wanted_go_too(manager: PoolManager, file: File) -> None:
    file.write(web="num_slots: 2, clean_on_release: false")
    await manager.reload()
    await manager.wait_ready(60)
    async with manager.lease("web"), manager.lease("web"):
        file.write(web="num_slots: 1, clean_on_release: false")
        await manager.reload()
        await manager.wait_ready(60)
    await manager.wait_clean()
    assert await slots(manager) == ["slot1"]


async def test_options_count_from_the_next_lease_on(manager: PoolManager, file: File) -> None:
    async with manager.lease("web") as before:
        file.write(web="num_slots: 2, default_ref: feature/x, acquire_timeout: 7")
        change = await manager.reload()
        assert change.changed == {"web": ("default_ref", "acquire_timeout")}
        await manager.wait_ready(60)
        async with manager.lease("web") as after:
            assert (before.branch, after.branch) == ("main", "feature/x")
    assert (await manager.get_pool("web")).options.acquire_timeout == 7


async def test_options_that_components_are_made_with_are_taken_on_too(
    manager: PoolManager, file: File, origin: Path
) -> None:
    async with manager.lease("web"):
        file.write(web=f"num_slots: 2, remotes: {{fork: {origin}}}")
        await manager.reload()
        await manager.wait_ready(60)
        async with manager.lease("web") as slot:
            assert "fork/main" in await slot.list_remote_branches("fork")
    await manager.wait_clean()
    assert await manager.available_count("web") == 2


async def test_a_removed_pool_is_drained_and_never_deleted(manager: PoolManager, file: File, tmp_path: Path) -> None:
    async with manager.lease("web") as held:
        file.write()
        change = await manager.reload()
        assert change.removed == ("web",)
        with pytest.raises(PoolNotFoundError, match="web: was removed from the configuration"):
            async with manager.lease("web"):
                pass
        assert (held.path / "README.md").exists()
        assert not held.lost.is_set()
    await manager.wait_ready(60)
    await manager.wait_clean()
    assert await slots(manager) == ["slot1", "slot2"]
    assert await manager.available_count("web") == 2
    assert (tmp_path / "pools/web/mirror.git").is_dir()


async def test_waiters_of_a_removed_pool_are_told_at_once(manager: PoolManager, file: File) -> None:
    async def wait() -> None:
        async with manager.lease("web", timeout=None):
            pass

    async with manager.lease("web"), manager.lease("web"):
        waiters = [asyncio.get_running_loop().create_task(wait()) for _ in range(2)]
        async with asyncio.timeout(30):
            while manager.get_stats()["web"]["waiting"] < 2:
                await asyncio.sleep(0.001)
        file.write()
        await manager.reload()
        async with asyncio.timeout(30):
            for outcome in await asyncio.gather(*waiters, return_exceptions=True):
                assert isinstance(outcome, PoolNotFoundError)


async def test_a_removed_pool_stays_drained_for_whoever_opens_the_directory_next(
    manager: PoolManager, file: File, origin: Path
) -> None:
    file.write()
    await manager.reload()
    await manager.wait_ready(60)
    async with PoolManager(PoolConfig(manager.config.workspaces_dir)) as other:
        with pytest.raises(PoolNotFoundError, match="removed from the configuration"):
            async with other.lease("web"):
                pass
        await other.create_pool("web", str(origin), num_slots=2)
        async with other.lease("web"):
            pass


async def test_a_removed_pool_is_back_when_the_file_has_it_again(manager: PoolManager, file: File) -> None:
    file.write()
    await manager.reload()
    file.write(web="num_slots: 2")
    change = await manager.reload()
    assert change.added == ("web",)
    await manager.wait_ready(60)
    async with manager.lease("web"):
        pass


async def test_a_pool_removed_while_it_comes_up_leaves_nothing(
    manager: PoolManager, file: File, tmp_path: Path
) -> None:
    file.write(web="num_slots: 2", docs="num_slots: 3")
    await manager.reload()
    file.write(web="num_slots: 2")
    await manager.reload()
    await manager.wait_ready(60)
    assert await manager.list_pools() == ["web"]
    with pytest.raises(PoolNotFoundError):
        await manager.get_pool("docs")


@pytest.mark.parametrize(
    "case",
    [
        ("pools:\n  web:\n    repo_url: /x\n    num_slots: many\n", 4, "num_slots"),
        ("pools: [\n", 2, "not valid YAML"),
        ("\n\nnonsense: 1\n", 3, "unknown key"),
    ],
)
async def test_a_bad_edit_is_refused_with_its_line_and_changes_nothing(
    manager: PoolManager, file: File, case: tuple[str, int, str], caplog: pytest.LogCaptureFixture
) -> None:
    text, line, message = case
    before = manager.config
    listener = Listener(manager)
    waiting = asyncio.get_running_loop().create_task(listener.until("config.refused"))
    await asyncio.sleep(0)
    file.replace(text)
    with caplog.at_level(logging.WARNING, "repopool"), pytest.raises(ConfigError, match=message) as refused:
        await manager.reload()
    assert refused.value.line == line
    assert f"pools.yaml:{line}" in str(refused.value)
    event = await waiting
    assert event.fields["line"] == line
    assert "config.refused" in caplog.text
    assert manager.config is before
    async with manager.lease("web"):
        pass


async def test_another_repository_under_the_same_name_is_refused_with_its_line(
    manager: PoolManager, file: File, tmp_path: Path
) -> None:
    file.replace(
        f"workspaces_dir: {tmp_path}/pools\npools:\n  web:\n    num_slots: 2\n    repo_url: {tmp_path}/other\n"
    )
    with pytest.raises(ConfigError, match="already the pool of") as refused:
        await manager.reload()
    assert refused.value.line == 5


async def test_another_directory_is_refused(manager: PoolManager, file: File, tmp_path: Path) -> None:
    file.replace(f"\nworkspaces_dir: {tmp_path}/elsewhere\n")
    with pytest.raises(ConfigError, match="cannot change while a manager is open") as refused:
        await manager.reload()
    assert refused.value.line == 2


async def test_what_only_a_new_manager_takes_on_is_said(manager: PoolManager, file: File) -> None:
    file.write("close_timeout: 1s\njanitor_interval: 5m\nmax_git_processes: 3\n", web="num_slots: 2")
    change = await manager.reload()
    assert change.needs_restart == ("max_git_processes",)
    assert manager.config.close_timeout == 1


async def test_a_manager_without_a_file_says_so(tmp_path: Path) -> None:
    async with PoolManager(PoolConfig(tmp_path / "pools")) as manager:
        with pytest.raises(ConfigError, match="no configuration file"):
            await manager.reload()


async def test_what_was_changed_while_nobody_ran_is_made_true_at_start(manager: PoolManager, file: File) -> None:
    await manager.close()
    file.write(web="num_slots: 1")
    async with PoolManager.from_config_file(file.path) as second:
        await second.wait_ready(60)
        assert await slots(second) == ["slot1"]


async def test_a_slot_added_by_hand_is_not_taken_for_surplus(manager: PoolManager, file: File) -> None:
    async with manager.lease("web"), manager.lease("web"):
        file.write(web="num_slots: 1")
        await manager.reload()
        await manager.wait_ready(60)
        await manager.add_slot("web")
    await manager.wait_clean()
    assert len(await slots(manager)) == 3


@pytest.mark.parametrize("watch", ["auto", "poll"])
async def test_the_file_is_followed_without_being_asked(tmp_path: Path, file: File, watch: str) -> None:
    top = f"watch: {watch}\n"
    file.write(top, web="num_slots: 1")
    async with PoolManager.from_config_file(file.path) as manager:
        await manager.wait_ready(60)
        listener = Listener(manager)
        told = asyncio.get_running_loop().create_task(listener.until("config.applied"))
        await asyncio.sleep(0)
        file.write(top, web="num_slots: 1", docs="num_slots: 1")
        event = await told
        assert event.fields["added"] == ("docs",)
        refused = asyncio.get_running_loop().create_task(listener.until("config.refused"))
        file.replace("pools: 7\n")
        assert (await refused).fields["line"] == 1
        applied = asyncio.get_running_loop().create_task(listener.until("config.applied"))
        file.write(top, web="num_slots: 1", docs="num_slots: 1")
        assert (await applied).fields["added"] == ()
        async with manager.lease("docs", timeout=60):
            pass


def options(**values: Any) -> PoolConfig:
    return PoolConfig.from_mapping({"workspaces_dir": "/x", "pools": {"a": {"repo_url": "/r", **values}}})


def test_differences_are_named_by_key() -> None:
    change = compare(options(num_slots=1), options(num_slots=2, max_waiting=3))
    assert change.changed == {"a": ("num_slots", "max_waiting")}
    assert not compare(options(), options())
    assert compare(options(), PoolConfig("/x")).removed == ("a",)


def test_credentials_that_changed_are_a_change_and_not_shown() -> None:
    one = PoolConfig.from_mapping({"workspaces_dir": "/x", "pools": {"a": {"repo_url": "https://u:one@host/r"}}})
    two = PoolConfig.from_mapping({"workspaces_dir": "/x", "pools": {"a": {"repo_url": "https://u:two@host/r"}}})
    change = compare(one, two)
    assert change.changed == {"a": ("repo_url",)}
    assert "two" not in repr(change)


async def test_slot_states_after_a_drained_pool_is_recovered(manager: PoolManager, file: File) -> None:
    file.write()
    await manager.reload()
    await manager.wait_ready(60)
    await manager.recover()
    assert {slot.state for slot in await manager.list_slots("web")} == {SlotState.AVAILABLE}
