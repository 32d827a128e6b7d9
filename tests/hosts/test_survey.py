"""A large tree looked at with `find`: the same is found as entry by entry."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from repopool_async.hosts import _survey, _tree
from repopool_async.hosts.base import Known, TreeInspection
from repopool_async.hosts.local import LocalHost

FILES = ["top", "a/one", "a/two", "a/deep/er/three", "b/four", "b/-five", "c d/six\nseven", "e/link"]


@pytest.fixture(autouse=True)
def for_every_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_survey, "MANY_FILES", 0)
    monkeypatch.setattr(_survey, "FEW_DIRECTORIES", 0)
    monkeypatch.setattr(_survey, "FILES_EACH", 1)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    for name in FILES[:-1]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / "e").mkdir()
    (tree / "e/link").symlink_to("nowhere")
    return tree


async def mark_of(tree: Path) -> int:
    """Return a moment after everything that was done so far."""
    host = LocalHost()
    first = await host.file_system_clock_ns(str(tree.parent))
    while (mark := await host.file_system_clock_ns(str(tree.parent))) <= first:
        pass
    return mark


def replace_directory(tree: Path) -> None:
    shutil.rmtree(tree / "b")
    (tree / "b").write_text("no directory any more")


def exchange_directories(tree: Path) -> None:
    (tree / "a").rename(tree / "x")
    (tree / "b").rename(tree / "a")
    (tree / "x").rename(tree / "b")


def replace_by_fifo(tree: Path) -> None:
    (tree / "a/one").unlink()
    os.mkfifo(tree / "a/one")


def replace_by_link(tree: Path) -> None:
    (tree / "b").rename(tree.parent / "b")
    (tree / "b").symlink_to("a")


def nest(tree: Path) -> None:
    (tree / "a/deep/.git").mkdir()
    (tree / "a/deep/node_modules/many").mkdir(parents=True)
    (tree / "a/deep/node_modules/many/file").write_text("")


MESSES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda _tree: None,
    "an edit": lambda tree: (tree / "a/deep/er/three").write_text("x"),
    "an edit at the top": lambda tree: (tree / "top").write_text("x"),
    "an odd name": lambda tree: (tree / "c d/six\nseven").write_text("x"),
    "a new file": lambda tree: (tree / "b/new").write_text("x"),
    "a new directory": lambda tree: (tree / "new/er").mkdir(parents=True),
    "a deleted file": lambda tree: (tree / "a/one").unlink(),
    "a deleted directory": lambda tree: shutil.rmtree(tree / "a/deep"),
    "a deleted directory at the top": lambda tree: shutil.rmtree(tree / "b"),
    "a directory replaced by a file": replace_directory,
    "directories exchanged": exchange_directories,
    "a mode": lambda tree: (tree / "a/deep").chmod(0o777),
    "a locked directory": lambda tree: (tree / "b").chmod(0),
    "a fifo": lambda tree: os.mkfifo(tree / "a/deep/pipe"),
    "a fifo in place of a file": replace_by_fifo,
    "a hard link": lambda tree: os.link(tree / "a/one", tree.parent / "outside"),
    "a link in place of a directory": replace_by_link,
    "what is nested": nest,
}


def as_sets(inspection: TreeInspection) -> dict[str, object]:
    found = attrs.asdict(attrs.evolve(inspection, entries=0))
    return {name: sorted(value) if isinstance(value, tuple) else value for name, value in found.items()}


@pytest.mark.parametrize("mess", MESSES)
async def test_the_same_is_found_as_entry_by_entry(tree: Path, mess: str) -> None:
    known = Known.of(FILES)
    since = await mark_of(tree)
    MESSES[mess](tree)

    surveyed = await _survey.inspect_tree(str(tree), since, None, known)
    inspected = _tree.inspect_tree(str(tree), since, known=known)

    assert surveyed is not None
    # A directory is opened up by whoever looks first.
    assert as_sets(surveyed) | {"unlocked": []} == as_sets(inspected) | {"unlocked": []}


async def test_what_is_there_and_does_not_belong_is_told_of_some_directories(tree: Path) -> None:
    (tree / "a/deep/extra").write_text("")
    (tree / "b/extra").mkdir()
    (tree / "extra").write_text("")

    found = await LocalHost().find_unknown(str(tree), ["", "a/deep", "gone"], Known.of(FILES))

    assert sorted(found) == ["a/deep/extra", "extra"]


async def test_without_find_it_is_looked_at_entry_by_entry(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = await mark_of(tree)
    (tree / "a/one").write_text("x")
    (tmp_path / "find").write_text("#!/bin/sh\necho unknown predicate >&2; exit 1\n")
    (tmp_path / "find").chmod(0o755)

    for path in ("", str(tmp_path)):
        monkeypatch.setenv("PATH", path)
        found = await LocalHost().inspect_tree(str(tree), since_ns=since, known=Known.of(FILES))
        assert found.changed == ("a/one",)
