"""What the tests and the measuring programs write by the way goes with them."""

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import _scratch
from tests._scratch import fast_place, scratch

ROOT = Path(__file__).parents[1]

HOLDER = """
import sys
from tests._scratch import scratch
with scratch() as directory:
    (directory / "shut").mkdir(0o000)
    print(directory, flush=True)
    sys.stdin.read()
"""


def test_is_gone_after_the_block_with_all_that_is_in_it() -> None:
    with scratch("repopool-test-") as directory:
        (directory / "shut").mkdir(0o000)
        assert directory.name.startswith("repopool-test-")
    assert not directory.exists()


async def test_is_gone_after_the_death_of_its_process() -> None:
    argv = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        directory = Path(holder.stdout.readline().strip())
        assert (directory / "shut").is_dir()
        holder.kill()
    async with asyncio.timeout(20):
        while directory.exists():
            await asyncio.sleep(0.01)


def test_tmpdir_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert fast_place() == tmp_path


@pytest.mark.parametrize("place", ["missing", "/proc/1", "/dev/shm"])
def test_without_room_in_memory_the_usual_place_is_used(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    usual = Path(tempfile.gettempdir())
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(_scratch, "MEMORY", Path(place))
    monkeypatch.setattr(_scratch, "ROOM_BYTES", 1 << 60)
    assert fast_place() == usual
