"""Directories opened one after the other inside a tree, however they lie to each other."""

import os
import shutil
from pathlib import Path

import pytest

from repopool_async.hosts._descent import Descent


def inode(descent: Descent, directory: str) -> int | None:
    descriptor = descent.to(directory)
    return None if descriptor is None else os.fstat(descriptor).st_ino


def test_each_is_the_one_that_is_named(tmp_path: Path) -> None:
    deep = "/".join(["d"] * 100)
    names = ["", "a", "a/b/c", "a/b", "a/x", deep, f"{deep}/d", deep[:-2], "a/b/c", ""]
    for name in (*names, f"{deep}/d"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    before = os.listdir("/proc/self/fd")

    with Descent(str(tmp_path)) as descent:
        found = [inode(descent, name) for name in names]
        open_ = len(os.listdir("/proc/self/fd"))
        descent.to(deep)
        assert len(os.listdir("/proc/self/fd")) - open_ < 50

    assert found == [(tmp_path / name).stat().st_ino for name in names]
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_what_is_no_directory_inside_is_not_opened_nor_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "root/a/b").mkdir(parents=True)
    (tmp_path / "outside/b").mkdir(parents=True)
    (tmp_path / "root/link").symlink_to("../outside")
    (tmp_path / "root/file").touch()
    with Descent(str(tmp_path / "root")) as descent:
        for name in ("link", "link/b", "file", "file/b", "gone", "a/gone", "..", "a/..", "a//b", "/", "a/./b"):
            assert inode(descent, name) is None, name
            assert inode(descent, "a/b") == (tmp_path / "root/a/b").stat().st_ino


def test_another_file_system_is_not_entered_by_any_way(tmp_path: Path) -> None:
    if os.stat("/proc").st_dev == os.stat("/").st_dev:
        pytest.skip("there is no /proc here")
    with Descent("/") as descent:
        assert [inode(descent, name) for name in ("proc", "proc/self", "proc")] == [None] * 3
        assert inode(descent, "") == os.stat("/").st_ino


def test_what_is_replaced_once_it_was_left_is_looked_at_anew(tmp_path: Path) -> None:
    (tmp_path / "root/a/b").mkdir(parents=True)
    (tmp_path / "outside/b").mkdir(parents=True)
    with Descent(str(tmp_path / "root")) as descent:
        assert inode(descent, "a/b") is not None
        assert inode(descent, "") is not None
        shutil.rmtree(tmp_path / "root/a")
        (tmp_path / "root/a").symlink_to("../outside")
        assert inode(descent, "a/b") is None
