"""Pieces of work asked for in one go: the same outcome on every host, and one execution where asking is dear."""

import asyncio
import contextlib
import errno
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from repopool_async.exceptions import FencedError
from repopool_async.hosts._proc import read
from repopool_async.hosts.base import FileKind, Guard, Host, MakeDirectory, RemoveFile, WriteFile
from repopool_async.hosts.ssh import SshHost
from repopool_async.hosts.upkeep import upkeep
from tests.hosts.daemons import ENV, FOREVER, until


async def test_pieces_are_done_in_order(host: Host, tmp_path: Path) -> None:
    path = f"{tmp_path}/file"
    async with host.joined() as joined:
        before = joined(host.stat(path))
        joined(host.apply([]))
        joined(host.apply([WriteFile(path, b"data")]))
        absent = joined(host.read_bytes(f"{tmp_path}/absent", limit=10))
        data = joined(host.read_bytes(path, limit=10))
        done = joined(
            host.run(
                ["sh", "-c", "cat; pwd; echo $WORD >&2"], env={**ENV, "WORD": "x"}, cwd=str(tmp_path), input=b"in\0"
            )
        )
        joined(host.apply([RemoveFile(path)]))
        after = joined(host.stat_many([path, str(tmp_path)]))
    assert (before.result(), absent.result(), data.result()) == (None, None, b"data")
    result = done.result()
    assert (result.exit_code, result.stdout, result.stderr) == (0, b"in\0" + f"{tmp_path}\n".encode(), b"x\n")
    gone, there = after.result()
    assert gone is None
    assert there is not None
    assert there.kind is FileKind.DIRECTORY


async def test_they_are_one_execution(ssh_host: SshHost, tmp_path: Path) -> None:
    await ssh_host.boot_id()  # which connects

    async def inner() -> None:
        async with ssh_host.joined() as joined:
            joined(ssh_host.stat(str(tmp_path)))
            joined(ssh_host.apply([MakeDirectory(f"{tmp_path}/inner")]))

    before = ssh_host.exec_count
    async with ssh_host.joined() as joined:
        joined(inner())
        names = joined(ssh_host.list_directory(str(tmp_path)))
        joined(ssh_host.run(["true"], env=ENV))
    assert ssh_host.exec_count - before == 1
    assert "inner" in names.result()


async def all_of(host: Host, *pieces: Coroutine[Any, Any, object]) -> None:
    async with host.joined() as joined:
        for piece in pieces:
            joined(piece)


def written(host: Host, path: str) -> Coroutine[Any, Any, None]:
    return host.apply([WriteFile(path, b"1")])


async def test_the_first_failure_ends_them(host: Host, tmp_path: Path) -> None:
    paths = (f"{tmp_path}/first", f"{tmp_path}/absent/second", f"{tmp_path}/third")
    with pytest.raises(OSError, match="No such file") as caught:
        await all_of(host, *(written(host, path) for path in paths))
    assert caught.value.errno == errno.ENOENT
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["first"]


async def test_a_command_that_cannot_be_started_is_a_failure(host: Host, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await all_of(host, host.run(["no-such-command"], env=ENV), written(host, f"{tmp_path}/second"))
    assert not (tmp_path / "second").exists()


async def test_a_piece_that_outlives_its_failure_lets_the_others_go_on(host: Host, tmp_path: Path) -> None:
    async def try_twice() -> int:
        with contextlib.suppress(OSError):
            await host.apply([WriteFile(f"{tmp_path}/absent/file", b"")])
        return (await host.run(["sh", "-c", "exit 3"], env=ENV)).exit_code

    async with host.joined() as joined:
        joined(host.apply([WriteFile(f"{tmp_path}/first", b"1")]))
        code = joined(try_twice())
        data = joined(host.read_bytes(f"{tmp_path}/first", limit=9))
    assert (code.result(), data.result()) == (3, b"1")


async def test_what_fails_without_asking_waits_for_its_turn(host: Host, tmp_path: Path) -> None:
    async def refuse() -> None:
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        await all_of(host, written(host, f"{tmp_path}/first"), refuse(), written(host, f"{tmp_path}/third"))
    assert (tmp_path / "first").exists()
    assert not (tmp_path / "third").exists()


async def test_nothing_is_done_where_the_block_fails(host: Host, tmp_path: Path) -> None:
    async def fail() -> None:
        async with host.joined() as joined:
            joined(written(host, f"{tmp_path}/file"))
            raise ValueError("not yet")

    with pytest.raises(ValueError, match="not yet"):
        await fail()
    assert not (tmp_path / "file").exists()


async def test_a_cancelled_block_ends_its_command(host: Host, tmp_path: Path) -> None:
    async def work() -> None:
        sleeping = host.run(["sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep {FOREVER}"], env=ENV)
        await all_of(host, written(host, f"{tmp_path}/begun"), sleeping, written(host, f"{tmp_path}/never"))

    task = asyncio.create_task(work())
    await until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    pid = int((tmp_path / "pid").read_text())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert b"sleep" not in read(f"/proc/{pid}/cmdline")
    assert not (tmp_path / "never").exists()


async def test_a_cancelled_block_ends_whatever_its_pieces_shield(host: Host, tmp_path: Path) -> None:
    await host.boot_id()  # which connects

    async def twice() -> None:
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await host.end_processes(mark="NONE=1", tree=str(tmp_path))

    for turns in (3, 8, 20):
        block = all_of(host, host.stat(str(tmp_path)), host.end_processes(mark="NONE=1", tree=str(tmp_path)), twice())
        task = asyncio.create_task(block)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(30):
            await asyncio.wait([task])


@pytest.mark.parametrize("host", ["asyncssh", "openssh"], indirect=True)
async def test_pieces_are_upkeep_as_calls_are(host: SshHost, tmp_path: Path) -> None:
    slot = f"{tmp_path}/slot"
    await host.enter(slot, 1, None)

    async def work() -> None:
        with upkeep(Guard(slot, 1)):
            async with host.joined() as joined:
                joined(host.leave(slot, 1))
                joined(host.apply([WriteFile(f"{slot}/file", b"")]))
                joined(host.run(["sh", "-c", "ls run >listing"], env=ENV, cwd=slot))

    await work()
    assert (tmp_path / "slot/listing").read_text().startswith("00000000000000000001.")
    assert list((tmp_path / "slot/run").iterdir()) == []
    await host.enter(slot, 2, None)
    (tmp_path / "slot/file").unlink()
    with pytest.raises(FencedError):
        await work()
    with upkeep(Guard(slot, 1)), pytest.raises(FencedError):
        await all_of(host, host.stat(str(tmp_path)), written(host, f"{slot}/file"))
    assert not (tmp_path / "slot/file").exists()
