"""The package as a whole: what it exports, what importing it costs, and which floor may import which."""

import os
import sys
from pathlib import Path

import pytest

import repopool_async
from repopool_async._process import run_process

ROOT = Path(__file__).parent.parent


async def _python(code: str) -> str:
    done = await run_process([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.exit_code == 0, done.stderr.decode()
    return done.text.strip()


@pytest.mark.parametrize("name", repopool_async.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(repopool_async, name).__name__ == name
    assert name in dir(repopool_async)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = repopool_async.nothing_like_this


async def test_importing_the_manager_imports_nothing_that_is_needed_later_only() -> None:
    loaded = await _python("import sys; from repopool_async import PoolManager; print(*sys.modules)")
    later = {"yaml", "cattrs", "filelock", "stamina", "watchfiles", "platformdirs", "aiofiles", "rich", "asyncssh"}
    assert later.isdisjoint(loaded.split())


async def test_arrows_point_downwards_only() -> None:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = await run_process(
        [sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=str(ROOT), timeout=110
    )
    assert done.exit_code == 0, done.stdout.decode()
