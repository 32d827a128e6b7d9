"""Changes of a file are noticed however they are made; real files and the real kernel, or polling."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from repopool_async.config_watcher import ConfigWatcher, _places


class Seen:
    """What the watcher told, as the contents at that moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told: asyncio.Queue[str | None] = asyncio.Queue()

    async def note(self) -> None:
        self._told.put_nowait(self._path.read_text() if self._path.exists() else None)

    async def next(self) -> str | None:
        async with asyncio.timeout(20):
            return await self._told.get()

    @property
    def is_silent(self) -> bool:
        return self._told.empty()


@asynccontextmanager
async def watching(path: Path, *, is_polled: bool) -> AsyncIterator[Seen]:
    seen = Seen(path)
    watcher = ConfigWatcher(path, seen.note, is_polled=is_polled, poll_seconds=0.05)
    task = asyncio.get_running_loop().create_task(watcher.run())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), task.exception()


@pytest.fixture(params=[False, True], ids=["kernel", "polled"])
def is_polled(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "pools.yaml"
    path.parent.mkdir()
    path.write_text("1")
    return path


async def test_the_contents_at_the_start_are_told_once(path: Path, is_polled: bool) -> None:
    async with watching(path, is_polled=is_polled) as seen:
        assert await seen.next() == "1"


async def test_writing_in_place_is_noticed(path: Path, is_polled: bool) -> None:
    async with watching(path, is_polled=is_polled) as seen:
        await seen.next()
        path.write_text("2")
        assert await seen.next() == "2"


async def test_a_file_renamed_into_place_is_noticed_again_and_again(path: Path, is_polled: bool) -> None:
    async with watching(path, is_polled=is_polled) as seen:
        await seen.next()
        for text in ("2", "3", "4"):
            new = path.with_suffix(".new")
            new.write_text(text)
            new.replace(path)
            assert await seen.next() == text


async def test_a_file_that_vanishes_for_a_moment_is_not_told_as_missing(path: Path, is_polled: bool) -> None:
    async with watching(path, is_polled=is_polled) as seen:
        await seen.next()
        path.rename(path.with_suffix(".bak"))
        path.write_text("2")
        assert await seen.next() == "2"


async def test_a_file_that_stays_away_is_told_and_so_is_its_return(path: Path, is_polled: bool) -> None:
    async with watching(path, is_polled=is_polled) as seen:
        await seen.next()
        path.unlink()
        assert await seen.next() is None
        path.write_text("2")
        assert await seen.next() == "2"


async def test_a_link_swapped_anywhere_on_the_way_is_noticed(tmp_path: Path, is_polled: bool) -> None:
    for version in ("v1", "v2"):
        (tmp_path / "store" / version).mkdir(parents=True)
        (tmp_path / "store" / version / "pools.yaml").write_text(version)
    (tmp_path / "store" / "current").symlink_to("v1")
    path = tmp_path / "pools.yaml"
    path.symlink_to("store/current/pools.yaml")
    async with watching(path, is_polled=is_polled) as seen:
        assert await seen.next() == "v1"
        os.symlink("v2", tmp_path / "store" / "next")
        os.replace(tmp_path / "store" / "next", tmp_path / "store" / "current")
        assert await seen.next() == "v2"


async def test_a_directory_that_does_not_exist_yet_is_waited_for(tmp_path: Path, is_polled: bool) -> None:
    path = tmp_path / "later" / "pools.yaml"
    async with watching(path, is_polled=is_polled) as seen:
        assert await seen.next() is None
        path.parent.mkdir()
        path.write_text("1")
        assert await seen.next() == "1"


async def test_the_same_contents_written_again_are_not_told(path: Path, is_polled: bool) -> None:
    async with watching(path, is_polled=is_polled) as seen:
        await seen.next()
        path.write_text("1")
        path.with_name("neighbour").write_text("")
        path.write_text("2")
        assert await seen.next() == "2"
        assert seen.is_silent


def test_links_are_followed_to_every_directory_that_matters(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pools.yaml").write_text("")
    (tmp_path / "a" / "pools.yaml").symlink_to(tmp_path / "b" / "pools.yaml")

    assert [Path(place[0]) for place in _places(str(tmp_path / "a" / "pools.yaml"))] == [tmp_path / "a", tmp_path / "b"]
    assert _places(str(tmp_path / "nowhere" / "pools.yaml")) == ()
