"""The examples, run as a user would: as programs, without arguments and with a URL; the web application in here too."""

import asyncio
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

import repopool_async
from repopool_async import PoolConfig, PoolManager

EXAMPLES = Path(__file__).parents[1] / "examples"
MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]


def environment(directory: Path) -> dict[str, str]:
    (directory / "tmp").mkdir(exist_ok=True)
    return {
        **os.environ,
        "PYTHONPATH": str(Path(repopool_async.__file__).parents[1]),
        "TMPDIR": str(directory / "tmp"),
        "PYTHONUNBUFFERED": "1",
    }


def run(program: Path, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, program, *arguments],
        check=False,
        cwd=directory,
        env=environment(directory),
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of this project's examples with a commit of its own."""
    top = tmp_path / "checkout"
    shutil.copytree(EXAMPLES, top / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "The examples"]):
        subprocess.run(["git", *command], cwd=top, check=True)
    return top


def run_without_arguments(name: str, checkout: Path, tmp_path: Path) -> str:
    """Have an example use the repository that it lies in, which shows nothing of it afterwards; return its output."""
    done = run(checkout / "examples" / name, directory=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not subprocess.run(["git", "status", "--short"], cwd=checkout, check=True, capture_output=True).stdout
    return done.stdout


@pytest.mark.parametrize("name", ["basic_pool_usage.py", "fleet.py"])
def test_without_arguments_an_example_uses_the_repository_it_lies_in(name: str, checkout: Path, tmp_path: Path) -> None:
    assert run_without_arguments(name, checkout, tmp_path)


def test_basic_pool_usage_with_a_url_shows_that_nothing_leaks(origin: Path, tmp_path: Path) -> None:
    done = run(EXAMPLES / "basic_pool_usage.py", f"file://{origin}", directory=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert "newest commit: Change CHANGES.md" in done.stdout
    assert "origin/feature/x, origin/main" in done.stdout
    assert "stash: empty, configured name: none" in done.stdout
    assert "clean working tree: True" in done.stdout
    assert "after 2 leases: 2/2 available" in done.stdout


def test_concurrent_allocation_ends_with_a_table_of_its_processes(checkout: Path, tmp_path: Path) -> None:
    said = run_without_arguments("concurrent_allocation.py", checkout, tmp_path)

    assert len(re.findall(r"^ +\d+ +5 +\d", said, re.MULTILINE)) == 4
    assert said.endswith("no slot was given twice; 2 of 2 are available\n")


def test_custom_cleanup_quarantines_what_its_callback_rejects(checkout: Path, tmp_path: Path) -> None:
    said = run_without_arguments("custom_cleanup.py", checkout, tmp_path)

    states = re.findall(r"is in state (\w+)", said)
    assert states == ["error", "available"]
    assert "FAILED: " in said


# The web server ----------------------------------------------------------------------------------------------------


def load_web_server() -> Any:
    pytest.importorskip("starlette")
    specification = importlib.util.spec_from_file_location("example_web_server", EXAMPLES / "web_server.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


async def test_twenty_requests_at_once_share_two_slots_and_give_them_back(origin: Path, tmp_path: Path) -> None:
    workspaces = tmp_path / "workspaces"
    app = load_web_server().create_app(str(origin), str(workspaces), num_slots=2)
    refs = ["main", "feature/x", "v1.0", "light"] * 5
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        answers = await asyncio.gather(*[client.get(f"/log/{ref}", timeout=60) for ref in refs])
        state = (await client.get("/")).json()["served"]

    assert [answer.status_code for answer in answers] == [200] * 20
    assert {answer.json()["slot"] for answer in answers} == {"workspace-served-slot1", "workspace-served-slot2"}
    newest = {ref: answer.json()["commits"][0]["subject"] for ref, answer in zip(refs, answers, strict=True)}
    assert newest["main"] == newest["light"] == "Change CHANGES.md"
    assert newest["feature/x"].startswith("Change src/feature.py")
    assert newest["v1.0"].startswith("Change .gitignore")
    assert (state["total_slots"], state["error"], state["allocation_count"]) == (2, 0, 20)
    async with PoolManager(PoolConfig(workspaces)) as manager:
        assert await manager.available_count("served") == 2


async def test_a_request_for_an_unknown_ref_is_told_so_and_holds_no_slot(
    origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    app = load_web_server().create_app(str(origin), str(tmp_path / "workspaces"), num_slots=1)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        missing = await client.get("/log/later")
        commit = make_commit(origin, "later", {"later.txt": b"now\n"})
        found = await client.get("/log/later", timeout=60)

    assert (missing.status_code, found.status_code) == (404, 200)
    assert "later" in missing.json()["error"]
    assert found.json()["commits"][0]["commit"] == commit


def test_the_web_server_serves_until_it_is_interrupted(checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    server = subprocess.Popen(
        [sys.executable, checkout / "examples" / "web_server.py", str(checkout), "0"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        address = next(match[1] for line in server.stderr if (match := re.search(r"running on (http://\S+)", line)))
        answer = httpx.get(f"{address}/log/main", timeout=60)
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
    finally:
        server.kill()
        server.communicate()

    assert answer.json()["commits"][0]["subject"] == "The examples"
    assert server.returncode == 0
    assert list((tmp_path / "tmp").iterdir()) == []
