"""Entries of which there are many are moved out of a tree instead of being unlinked one by one."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from repopool_async import _files
from repopool_async.hosts import _entries
from repopool_async.hosts._entries import remove_entries


@pytest.fixture(autouse=True)
def _many_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_entries, "MANY", 2)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "pool/tree"
    (tree / "sub/dir/inner").mkdir(parents=True)
    for name in ("keep", "sub/file", "sub/other"):
        (tree / name).write_text(name)
    (tree / "link").symlink_to("keep")
    (tree / "dirlink").symlink_to("sub")
    os.mkfifo(tree / "sub/fifo")
    return tree


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_all_of_them_are_in_one_place_in_the_trash(tree: Path, tmp_path: Path) -> None:
    names = ["sub/dir", "sub/file", "link", "dirlink", "sub/fifo", "absent", "absent/deeper", "sub/dir/inner", "", ".."]
    assert remove_entries(str(tree), names, str(tmp_path / "pool/trash")) == 5
    assert names_in(tree) == ["keep", "sub"]
    assert names_in(tree / "sub") == ["other"]
    assert names_in(tmp_path / "pool") == ["trash", "tree"]
    (entry,) = (tmp_path / "pool/trash").iterdir()
    assert len(names_in(entry)) == 5


def test_nothing_outside_is_touched(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").touch()
    (tree / "out").symlink_to(tmp_path / "outside")
    names = ["out/file", "dirlink/file", "../../outside/file", f"{tmp_path}/outside/file", "keep/beneath"]
    assert remove_entries(str(tree), names, str(tmp_path / "pool/trash")) == 0
    assert names_in(tmp_path / "outside") == ["file"]
    assert names_in(tree / "sub") == ["dir", "fifo", "file", "other"]


def test_nothing_lies_in_the_trash_before_all_of_it_does(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the trash may be deleted at any moment; what a killed process left beside it is swept up."""
    seen: list[list[str]] = []
    original = _entries._remove_entry

    def remove(parent: int, name: str, dispose: object) -> bool:
        seen.append([name for name in names_in(tmp_path / "pool") if name != "tree"])
        return original(parent, name, dispose)  # type: ignore[arg-type]

    monkeypatch.setattr(_entries, "_remove_entry", remove)
    assert remove_entries(str(tree), ["sub/file", "sub/other"], str(tmp_path / "pool/trash")) == 2
    assert [[_files.is_temporary_name(name) for name in names] for names in seen] == [[True]] * 2


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system."""
    for place in ("/tmp", "/var/tmp", "/dev/shm", "/run"):
        if os.path.isdir(place) and os.access(place, os.W_OK) and os.stat(place).st_dev != tmp_path.stat().st_dev:
            with tempfile.TemporaryDirectory(dir=place) as directory:
                yield Path(directory)
            return
    pytest.skip("there is no other file system here")


def test_what_cannot_be_moved_is_unlinked(tree: Path, elsewhere: Path) -> None:
    assert remove_entries(str(tree), ["sub/file", "link"], str(elsewhere / "trash")) == 2
    assert names_in(tree) == ["dirlink", "keep", "sub"]
    (entry,) = (elsewhere / "trash").iterdir()
    assert names_in(entry) == []
