"""A pool inside an asyncio web server: every request gets a clean checkout of its own.

    python examples/web_server.py [URL [PORT]]
    curl http://127.0.0.1:8000/log/main

Without a URL it serves the repository that this file lies in. `GET /log/{ref}` tells the newest commits of a branch,
tag or commit, `GET /` the state of the pool. The pool opens and closes with the server; Ctrl-C gives everything back.
Needs the `web` extra.
"""

import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from repopool_async import NoAvailableSlotError, PoolConfig, PoolManager, TooManyRequestsError, UnknownRefError


async def log(request: Request) -> JSONResponse:
    """Tell the newest commits of a ref, from a slot leased for this request."""
    pool = await request.app.state.manager.get_pool("served")
    async with pool.lease(ref=request.path_params["ref"], metadata={"path": request.url.path}) as slot:
        lines = (await slot.run("git", "log", "-5", "--format=%H%x00%an%x00%s")).text.splitlines()
        commits = [dict(zip(("commit", "author", "subject"), line.split("\0"), strict=True)) for line in lines]
        return JSONResponse({"ref": slot.branch or slot.commit, "slot": slot.slot_id, "commits": commits})


async def state(request: Request) -> JSONResponse:
    """Tell how the pools are."""
    summaries = await request.app.state.manager.get_pool_summary()
    return JSONResponse({name: attrs.asdict(summary) for name, summary in summaries.items()})


async def unknown_ref(_: Request, error: Exception) -> JSONResponse:
    """Answer 404; the message has the nearest names."""
    return JSONResponse({"error": str(error)}, status_code=404)


async def overloaded(_: Request, error: Exception) -> JSONResponse:
    """Answer 503: no slot in time, or too many waiting."""
    return JSONResponse({"error": str(error)}, status_code=503, headers={"Retry-After": "1"})


def create_app(url: str, workspaces_dir: str, *, num_slots: int = 2) -> Starlette:
    """Return the application; its lifespan opens the manager, makes the pool, and closes both."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with PoolManager(PoolConfig(workspaces_dir)) as manager:
            await manager.create_pool("served", url, num_slots=num_slots, max_waiting=100)
            app.state.manager = manager
            yield

    return Starlette(
        routes=[Route("/", state), Route("/log/{ref:path}", log)],
        lifespan=lifespan,
        exception_handlers={
            UnknownRefError: unknown_ref,
            NoAvailableSlotError: overloaded,
            TooManyRequestsError: overloaded,
        },
    )


def main(url: str, port: str = "8000") -> None:
    """Serve until interrupted."""
    import uvicorn  # noqa: PLC0415 - create_app works under any server

    with tempfile.TemporaryDirectory(prefix="repopool-example-") as directory:
        uvicorn.run(create_app(url, directory), host="127.0.0.1", port=int(port))


def this_repository() -> str:
    """Return the top level of the checkout that this file lies in."""
    return next(str(path) for path in Path(__file__).resolve().parents if (path / ".git").exists())


if __name__ == "__main__":
    main(*(sys.argv[1:] or [this_repository()]))
