"""Which files a process shares memory with, as the kernel tells it when asked, and as its list says."""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from repopool_async.hosts import _mappings
from repopool_async.hosts._places import Places

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="there is no /proc here")


@pytest.fixture(params=["asked", "read"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the kernel, and do as on one that does not know the question."""
    if request.param == "read":
        monkeypatch.setattr(_mappings, "_PROCMAP_QUERY", 0)


@contextmanager
def mapped(path: Path, access: int = mmap.ACCESS_WRITE) -> Iterator[None]:
    path.write_bytes(b"x")
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0, access=access)
    with memory:
        yield


def shares_memory_with(own: str, root: str) -> bool:
    places = Places([(root, True)])
    return any(places.of(name) for name in _mappings.files_shared_by(own))


@pytest.mark.parametrize("name", ["file", "with space", "with\nline break", "gone (deleted)", "ü\x01\\012"])
def test_a_file_below_is_told_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    root.mkdir()
    assert not shares_memory_with("/proc/self", str(root))
    with mapped(root / "deep"):
        assert shares_memory_with("/proc/self", str(root))
        assert shares_memory_with(f"/proc/self/task/{threading.get_native_id()}", str(root))
        (root / "deep").unlink()
        assert shares_memory_with("/proc/self", str(root))
    assert not shares_memory_with("/proc/self", str(root))


def test_what_lies_beside_or_is_the_process_own_is_not(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    with (
        mapped(tmp_path / "tree-not"),
        mapped(tmp_path / "tree/copied", mmap.ACCESS_COPY),
        mapped(tmp_path / "tree\n"),
        mmap.mmap(-1, 4096),
    ):
        assert not shares_memory_with("/proc/self", str(tmp_path / "tree"))
        assert shares_memory_with("/proc/self", str(tmp_path))


def test_one_of_many_is_found(tmp_path: Path) -> None:
    for name in ("tree", "other"):
        (tmp_path / name).mkdir()
    with mapped(tmp_path / "other/1"), mapped(tmp_path / "tree/2"), mapped(tmp_path / "other/3"):
        assert shares_memory_with("/proc/self", str(tmp_path / "tree"))


def test_who_is_gone_shares_nothing() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not shares_memory_with(f"/proc/{pid}", "/")
    os.waitpid(pid, 0)
    assert not shares_memory_with(f"/proc/{pid}", "/")


def test_the_kernel_names_what_its_list_has(tmp_path: Path) -> None:
    with mapped(tmp_path / "one"), mapped(tmp_path / "two"):
        lines = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_bytes().splitlines())
        listed = [fields[5] for fields in lines if fields[1][3:4] == b"s" and int(fields[4])]
        descriptor = os.open("/proc/self/maps", os.O_RDONLY)
        try:
            named = list(_mappings._named_by_kernel(descriptor))
        except OSError:
            return  # it does not know the question; the other tests show that the list is read instead
        finally:
            os.close(descriptor)
    assert {os.fsencode(tmp_path / "one"), os.fsencode(tmp_path / "two")} <= set(named)
    assert named == listed
