"""`repopool db`, as a shell sees it."""

import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import repopool_async
from repopool_async.cli import ExitStatus
from repopool_async.coordination._pg_migrations import migrations
from tests._postgres import Server


@pytest.fixture
async def dsn(server: Server) -> AsyncIterator[str]:
    """The DSN of an empty database of our role."""
    name = f"empty_{uuid.uuid4().hex[:8]}"
    async with server.admin() as connection:
        await connection.execute(f"CREATE DATABASE {name} OWNER repopool")
    yield server.dsn(name)
    async with server.admin() as connection:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def repopool(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "repopool_async.cli", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(repopool_async.__file__).parents[1]), **environment},
    )


def test_a_schema_is_looked_at_made_and_found_current(dsn: str) -> None:
    before = repopool("db", "status", "--dsn", dsn)
    assert (before.returncode, "run `repopool db migrate`" in before.stdout) == (1, True)
    made = repopool("db", "migrate", REPOPOOL_DSN=dsn)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("".join(f"applied {step.name}\n" for step in migrations()))
    again = repopool("db", "migrate", REPOPOOL_DSN=dsn)
    assert (again.returncode, "applied" in again.stdout) == (0, False)
    assert repopool("db", "status", REPOPOOL_DSN=dsn).returncode == 0


def test_without_a_database_it_is_asked_which(tmp_path: Path) -> None:
    done = repopool("db", "status", "--workspaces-dir", str(tmp_path))
    assert done.returncode == ExitStatus.CONFIG
    assert "--dsn" in done.stderr


def test_a_database_that_does_not_answer_is_told_in_one_line_without_secrets() -> None:
    done = repopool("db", "migrate", "--dsn", "postgresql://me:hunter2@127.0.0.1:1/x")
    assert done.returncode == ExitStatus.TRY_LATER
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr
