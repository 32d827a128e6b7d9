"""Runs things in forked children, because importing everything anew for each kill would take most of the time."""

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fork(body: Callable[[], object], log: Path) -> int:
    """Run something in a forked child, its output in a log, and return its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        body()
        status = 0
    except BaseException:  # noqa: BLE001 - a forked child must not return
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ask(body: Callable[[], Any], log: Path, *, seconds: float = 300.0) -> Any:
    """Run something in a child and return its result, which JSON can hold; None where it was killed.

    Raises:
        RuntimeError: it failed, or took too long; the message is its log's end.
    """
    reading, writing = os.pipe()

    def answer() -> None:
        os.write(writing, json.dumps(body()).encode())

    pid = fork(answer, log)
    os.close(writing)
    try:
        data = _read_until(reading, time.monotonic() + seconds)
    finally:
        os.close(reading)
    if data is None:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if data is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if data is None or status != 0:
        raise RuntimeError(log.read_text(errors="replace")[-3000:] if data is not None else f"hung: {log}")
    return json.loads(data)


def _read_until(descriptor: int, deadline: float) -> bytes | None:
    chunks: list[bytes] = []
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        chunk = os.read(descriptor, 1 << 20)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
