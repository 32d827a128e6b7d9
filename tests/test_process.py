import asyncio
import contextlib
import os
import random
import select
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest
from blockbuster import blockbuster_ctx

from repopool_async._identity import process_start_time
from repopool_async._process import RunningProcess, open_process, run_process
from repopool_async.exceptions import CommandTimeoutError

FOREVER = "1000"


class Marked:
    """An environment by which everything started with it is found again."""

    def __init__(self) -> None:
        self.mark = f"REPOPOOL_TEST={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        self.env = {"PATH": os.environ["PATH"], name: value}

    def alive(self) -> list[int]:
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        return [pid for pid in pids if self._bears(pid) and process_start_time(pid) is not None]

    def _bears(self, pid: int) -> bool:
        try:
            return self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False


def _kill(pid: int) -> None:
    descriptor = os.pidfd_open(pid)
    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    select.select([descriptor], [], [], 10)
    os.close(descriptor)


def _zombies() -> list[str]:
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            stat = (path / "stat").read_text() if path.name.isdecimal() else ""
            state, parent = stat[stat.rfind(")") + 2 :].split()[:2] if stat else ("", "")
            if state == "Z" and int(parent) == os.getpid():
                found.append(path.name)
    return found


def _descriptors() -> dict[str, str]:
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[path.name] = str(path.readlink())
    return found


@pytest.fixture
def marked() -> Iterator[Marked]:
    """Nothing that a test has started may outlive it, even as a zombie or an open descriptor."""
    marked = Marked()
    yield marked
    survivors = marked.alive()
    for pid in survivors:
        _kill(pid)
    assert survivors == []
    assert _zombies() == []


@pytest.fixture(autouse=True)
async def no_leaked_descriptors() -> AsyncIterator[None]:
    before = _descriptors()
    yield
    await asyncio.sleep(0)
    leaked = {number: target for number, target in _descriptors().items() if number not in before}
    assert leaked == {}


class Output:
    """Collects output, and tells when a text has come."""

    def __init__(self) -> None:
        self.text = b""
        self._changed = asyncio.Event()

    def __call__(self, stream: str, data: bytes) -> None:
        self.text += data
        self._changed.set()

    async def wait_for(self, text: bytes) -> None:
        while text not in self.text:
            self._changed.clear()
            await self._changed.wait()


class TestResults:
    async def test_output_and_exit_code(self, marked: Marked) -> None:
        result = await run_process(["sh", "-c", "echo out; echo err >&2; exit 3"], env=marked.env)
        assert (result.stdout, result.stderr, result.exit_code) == (b"out\n", b"err\n", 3)
        assert not result.is_truncated
        assert 0 < result.duration_seconds < 30

    async def test_death_by_signal(self, marked: Marked) -> None:
        result = await run_process(["sh", "-c", "kill -9 $$"], env=marked.env)
        assert result.exit_code == -9

    async def test_environment_is_complete_and_directory_the_root(self, marked: Marked) -> None:
        result = await run_process(["env"], env={"PATH": os.environ["PATH"], "ONLY": "this"})
        assert sorted(result.stdout.split(b"\n")) == [b"", b"ONLY=this", f"PATH={os.environ['PATH']}".encode()]
        assert (await run_process(["pwd"], env=marked.env)).stdout == b"/\n"

    async def test_directory(self, marked: Marked, tmp_path: Path) -> None:
        result = await run_process(["pwd"], env=marked.env, cwd=str(tmp_path))
        assert result.text.strip() == str(tmp_path)

    async def test_arguments_of_any_bytes(self, marked: Marked) -> None:
        argument = os.fsdecode(b"a b'\xff\n")
        assert (await run_process(["printf", "%s", argument], env=marked.env)).stdout == b"a b'\xff\n"

    async def test_input(self, marked: Marked) -> None:
        assert (await run_process(["cat"], env=marked.env)).stdout == b""
        assert (await run_process(["cat"], env=marked.env, input=b"")).stdout == b""
        data = os.urandom(3_000_000)
        assert (await run_process(["cat"], env=marked.env, input=data)).stdout == data
        assert (await run_process(["cat", "/dev/stdin"], env=marked.env, input=b"named")).stdout == b"named"

    async def test_input_that_is_not_read(self, marked: Marked) -> None:
        result = await run_process(["true"], env=marked.env, input=b"x" * 1_000_000)
        assert result.exit_code == 0

    async def test_is_a_session_of_its_own(self, marked: Marked) -> None:
        code = "import os; print(os.getpid() == os.getsid(0) == os.getpgrp())"
        assert (await run_process([sys.executable, "-c", code], env=marked.env)).stdout == b"True\n"

    async def test_missing_command_is_named(self, marked: Marked) -> None:
        with pytest.raises(FileNotFoundError, match="no-such-command"):
            await run_process(["no-such-command"], env=marked.env)

    async def test_missing_directory_is_named(self, marked: Marked, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            await run_process(["true"], env=marked.env, cwd=str(tmp_path / "nowhere"), input=b"x")

    async def test_what_may_not_be_executed_is_named(self, marked: Marked, tmp_path: Path) -> None:
        (tmp_path / "plain").write_text("text")
        with pytest.raises(PermissionError, match="plain"):
            await run_process([str(tmp_path / "plain")], env=marked.env)

    async def test_does_not_block_the_loop(self, marked: Marked) -> None:
        with blockbuster_ctx("repopool_async"):
            result = await run_process(["sh", "-c", f"cat; sleep {FOREVER} >/dev/null &"], env=marked.env, input=b"x")
        assert result.stdout == b"x"


class TestOutput:
    async def test_floods_on_both_streams_are_capped_to_the_last_bytes(self, marked: Marked) -> None:
        script = "head -c 200000000 /dev/zero & head -c 200000000 /dev/zero >&2; wait; printf out; printf err >&2"
        result = await run_process(["sh", "-c", script], env=marked.env, stdout_limit=5, stderr_limit=100_000)
        assert result.stdout == b"\0\0out"
        assert result.stderr == b"\0" * 99_997 + b"err"
        assert result.is_truncated

    async def test_limit_is_not_passed_by_exactly_as_much(self, marked: Marked) -> None:
        result = await run_process(["printf", "12345"], env=marked.env, stdout_limit=5, stderr_limit=0)
        assert result.stdout == b"12345"
        assert not result.is_truncated
        result = await run_process(["printf", "12345"], env=marked.env, stdout_limit=0)
        assert result.stdout == b""
        assert result.is_truncated

    async def test_chunks_are_told_as_they_come(self, marked: Marked, tmp_path: Path) -> None:
        told: list[tuple[str, bytes]] = []
        os.mkfifo(tmp_path / "gate")

        def on_output(stream: str, data: bytes) -> None:
            told.append((stream, data))
            if data == b"first":
                # Opening blocks until the other side is there, which it is as soon as it has written.
                os.close(os.open(tmp_path / "gate", os.O_WRONLY))

        script = "printf first; read line < gate; printf second >&2"
        await run_process(["sh", "-c", script], env=marked.env, cwd=str(tmp_path), on_output=on_output)
        assert told == [("stdout", b"first"), ("stderr", b"second")]

    async def test_what_the_callback_raises_ends_the_command(self, marked: Marked) -> None:
        def on_output(stream: str, data: bytes) -> None:
            raise ValueError(data.decode())

        with pytest.raises(ValueError, match="hello"):
            await run_process(["sh", "-c", f"printf hello; sleep {FOREVER}"], env=marked.env, on_output=on_output)


class TestTimeLimits:
    async def test_total(self, marked: Marked) -> None:
        script = f"echo last words >&2; sleep {FOREVER}"
        with pytest.raises(CommandTimeoutError, match=r"ran longer than 0\.2 s") as raised:
            await run_process(["sh", "-c", script], env=marked.env, timeout=0.2, idle_timeout=60)
        assert raised.value.argv == ("sh", "-c", script)
        assert raised.value.timeout_seconds == 0.2
        assert not raised.value.is_idle
        assert raised.value.stderr == b"last words\n"
        assert isinstance(raised.value, TimeoutError)

    async def test_total_holds_also_for_the_talkative(self, marked: Marked) -> None:
        with pytest.raises(CommandTimeoutError, match="ran longer"):
            await run_process(["yes"], env=marked.env, timeout=0.2, idle_timeout=0.1, stdout_limit=10)

    async def test_silence(self, marked: Marked) -> None:
        with pytest.raises(CommandTimeoutError, match=r"printed nothing for 0\.2 s") as raised:
            await run_process(["sleep", FOREVER], env=marked.env, timeout=60, idle_timeout=0.2)
        assert raised.value.is_idle
        assert raised.value.timeout_seconds == 0.2

    async def test_output_on_either_stream_ends_silence(self, marked: Marked) -> None:
        script = "for i in 1 2 3 4; do sleep 0.4; echo $i; sleep 0.4; echo $i >&2; done"
        result = await run_process(["sh", "-c", script], env=marked.env, idle_timeout=3.0)
        assert result.stdout == b"1\n2\n3\n4\n"

    async def test_words_said_on_the_way_out_are_kept(self, marked: Marked) -> None:
        script = f"trap 'echo bye >&2; exit 1' TERM; sleep {FOREVER} & wait"
        with pytest.raises(CommandTimeoutError) as raised:
            await run_process(["sh", "-c", script], env=marked.env, timeout=0.3)
        assert raised.value.stderr == b"bye\n"

    async def test_long_commands_are_shortened_in_the_message(self, marked: Marked) -> None:
        with pytest.raises(CommandTimeoutError) as raised:
            await run_process(["sleep", FOREVER, *["0"] * 1000], env=marked.env, timeout=0)
        assert len(str(raised.value)) < 200
        assert len(raised.value.argv) == 1002


class TestProcessGroups:
    async def test_grandchild_that_holds_the_output_is_ended(self, marked: Marked) -> None:
        result = await run_process(["sh", "-c", f"sleep {FOREVER} & echo hi"], env=marked.env)
        assert result.stdout == b"hi\n"
        assert marked.alive() == []

    async def test_grandchild_that_holds_nothing_is_ended(self, marked: Marked) -> None:
        script = f"sleep {FOREVER} >/dev/null 2>&1 & echo hi"
        result = await run_process(["sh", "-c", script], env=marked.env)
        assert result.stdout == b"hi\n"
        assert marked.alive() == []

    async def test_output_of_a_grandchild_that_soon_ends_is_kept(self, marked: Marked) -> None:
        result = await run_process(["sh", "-c", "(sleep 0.05; echo late) & echo hi"], env=marked.env)
        assert result.stdout == b"hi\nlate\n"

    async def test_those_that_ignore_term_are_killed(self, marked: Marked) -> None:
        script = f"trap '' TERM; (sleep {FOREVER}; sleep {FOREVER}) & sleep {FOREVER}; sleep {FOREVER}"
        with pytest.raises(CommandTimeoutError):
            await run_process(["sh", "-c", script], env=marked.env, timeout=0.2, grace_seconds=0.2)
        assert marked.alive() == []

    async def test_grandchild_that_ignores_term_is_killed_after_its_parent_has_gone(self, marked: Marked) -> None:
        script = f"(trap '' TERM; sleep {FOREVER}; sleep {FOREVER}) & sleep 0.05"
        result = await run_process(["sh", "-c", script], env=marked.env, grace_seconds=0.2)
        assert result.exit_code == 0
        assert marked.alive() == []

    async def test_stopped_ones_are_ended_by_term(self, marked: Marked) -> None:
        script = "trap 'exit 5' TERM; kill -STOP $$; sleep 0.01"
        with pytest.raises(CommandTimeoutError):  # and not once a grace is over that the test has not
            await run_process(["sh", "-c", script], env=marked.env, timeout=0.2, grace_seconds=3600)

    async def test_daemon_of_another_session_is_not_waited_for(self, marked: Marked) -> None:
        result = await run_process(["sh", "-c", f"setsid sleep {FOREVER} & echo hi; sleep 0.1"], env=marked.env)
        assert result.stdout == b"hi\n"
        (daemon,) = marked.alive()
        _kill(daemon)

    async def test_nobody_in_the_group_means_no_delay(self, marked: Marked) -> None:
        async def timed() -> float:
            return (await run_process(["true"], env=marked.env)).duration_seconds

        assert min([await timed() for _ in range(10)]) < 0.1


STUBBORN = f"trap '' TERM; (sleep {FOREVER}; sleep {FOREVER}) & echo ready; sleep {FOREVER}; sleep {FOREVER}"
POLITE = f"sleep {FOREVER} & echo ready; sleep {FOREVER}; sleep {FOREVER}"


class TestCancellation:
    @pytest.mark.parametrize("cancels", [1, 2, 3])
    @pytest.mark.parametrize("script", [POLITE, STUBBORN])
    async def test_while_it_runs(self, marked: Marked, script: str, cancels: int) -> None:
        output = Output()
        task = asyncio.create_task(
            run_process(["sh", "-c", script], env=marked.env, on_output=output, grace_seconds=0.2)
        )
        await output.wait_for(b"ready")
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert marked.alive() == []

    @pytest.mark.parametrize("turns", range(12))
    @pytest.mark.parametrize("cancels", [1, 2])
    async def test_while_it_starts(self, marked: Marked, turns: int, cancels: int) -> None:
        task = asyncio.create_task(run_process(["sleep", FOREVER], env=marked.env, input=b"x" * 100))
        for _ in range(turns):
            await asyncio.sleep(0)
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert marked.alive() == []

    async def test_at_random_moments(self, marked: Marked) -> None:
        script = f"echo a; sleep {FOREVER} & echo b; sleep 0.002; setsid true; sleep {FOREVER}"
        chance = random.Random(1)

        async def cancelled_run() -> None:
            task = asyncio.create_task(run_process(["sh", "-c", script], env=marked.env))
            for _ in range(chance.randint(1, 2)):
                await asyncio.sleep(chance.random() * 0.012)
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        for _ in range(15):
            await asyncio.gather(*(cancelled_run() for _ in range(4)))
        assert marked.alive() == []

    async def test_through_an_anyio_scope(self, marked: Marked) -> None:
        output = Output()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def end() -> None:
                    await output.wait_for(b"ready")
                    scope.cancel()

                group.start_soon(end)
                await run_process(["sh", "-c", STUBBORN], env=marked.env, on_output=output, grace_seconds=0.1)
        assert scope.cancelled_caught
        assert marked.alive() == []

    async def test_through_a_timeout(self, marked: Marked) -> None:
        async def work() -> None:
            async with asyncio.timeout(0.1):
                await run_process(["sleep", FOREVER], env=marked.env)

        with pytest.raises(TimeoutError) as raised:
            await work()
        assert not isinstance(raised.value, CommandTimeoutError)
        assert marked.alive() == []

    async def test_of_a_clone_over_a_stuck_transport(self, marked: Marked, tmp_path: Path) -> None:
        (tmp_path / "transport").write_text(f"#!/bin/sh\necho ready >&2\nsleep {FOREVER} &\nsleep {FOREVER}\n")
        (tmp_path / "transport").chmod(0o755)
        env = {**marked.env, "GIT_SSH": str(tmp_path / "transport"), "GIT_SSH_VARIANT": "simple", "HOME": str(tmp_path)}
        output = Output()
        argv = ["git", "clone", "-q", "ssh://host/repository", str(tmp_path / "clone")]
        task = asyncio.create_task(run_process(argv, env=env, on_output=output))
        await output.wait_for(b"ready")
        assert (tmp_path / "clone").exists()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert marked.alive() == []
        assert not (tmp_path / "clone").exists()

    def test_by_the_end_of_the_loop(self, marked: Marked) -> None:
        async def main() -> None:
            output = Output()
            coroutine = run_process(["sh", "-c", STUBBORN], env=marked.env, on_output=output, grace_seconds=0.1)
            background.add(asyncio.create_task(coroutine))
            await output.wait_for(b"ready")

        background: set[asyncio.Task[object]] = set()
        asyncio.run(main())
        assert marked.alive() == []


class TestOpenProcess:
    async def test_streams(self, marked: Marked) -> None:
        script = "read line; echo got $line; echo err >&2; cat"
        async with open_process(["sh", "-c", script], env=marked.env, stdin=True) as process:
            assert process.exit_code is None
            assert process.pid > 0
            await process.write(b"hello\n")
            assert await process.read() == b"got hello\n"
            assert await process.read_stderr() == b"err\n"
            await process.write(b"rest")
            await process.close_stdin()
            await process.close_stdin()
            assert await process.read() == b"rest"
            assert await process.read() == b""
            assert await process.read_stderr() == b""
            assert await process.wait() == 0
            assert process.exit_code == 0

    async def test_standard_input_is_empty_unless_asked_for(self, marked: Marked) -> None:
        async with open_process(["cat"], env=marked.env) as process:
            assert await process.read() == b""
            with pytest.raises(BrokenPipeError):
                await process.write(b"x")
            await process.close_stdin()

    async def test_large_amounts_flow_without_piling_up(self, marked: Marked) -> None:
        chunk, count = b"x" * 65536, 200

        async def feed(process: RunningProcess) -> None:
            for _ in range(count):
                await process.write(chunk)
            await process.close_stdin()

        async with open_process(["cat"], env=marked.env, stdin=True) as process:
            feeding = asyncio.create_task(feed(process))
            await asyncio.sleep(0.05)
            assert not feeding.done()
            received = 0
            while data := await process.read():
                received += len(data)
            await feeding
        assert received == len(chunk) * count

    async def test_a_cancelled_read_loses_nothing(self, marked: Marked) -> None:
        async with open_process(["cat"], env=marked.env, stdin=True) as process:
            reading = asyncio.create_task(process.read())
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await process.write(b"hello")
            assert await process.read(2) == b"he"
            assert await process.read() == b"llo"

    async def test_writing_to_one_that_has_gone_fails(self, marked: Marked) -> None:
        async with open_process(["true"], env=marked.env, stdin=True) as process:
            await process.wait()
            with pytest.raises(BrokenPipeError):  # noqa: PT012 - the first may still fall into the buffer
                while True:
                    await process.write(b"x" * 100_000)

    async def test_wait_does_not_wait_for_the_output_to_end(self, marked: Marked) -> None:
        async with open_process(["sh", "-c", f"sleep {FOREVER} & exit 4"], env=marked.env) as process:
            assert await process.wait() == 4
            assert await process.wait() == 4

    async def test_signal_reaches_the_whole_group(self, marked: Marked) -> None:
        async with open_process(["sh", "-c", f"sleep {FOREVER} & echo ready; wait"], env=marked.env) as process:
            assert await process.read() == b"ready\n"
            process.signal(signal.SIGTERM)
            assert await process.wait() == -signal.SIGTERM
            assert await process.read() == b""
            process.signal(signal.SIGTERM)

    async def test_leaving_ends_the_group(self, marked: Marked) -> None:
        async with open_process(["sh", "-c", POLITE], env=marked.env) as process:
            assert await process.read() == b"ready\n"
            assert len(marked.alive()) >= 2
        assert marked.alive() == []
        assert process.exit_code == -signal.SIGTERM

    async def test_leaving_by_an_error_ends_the_group(self, marked: Marked) -> None:
        async def work() -> None:
            async with open_process(["sh", "-c", STUBBORN], env=marked.env, grace_seconds=0.1) as process:
                assert await process.read() == b"ready\n"
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await work()
        assert marked.alive() == []

    @pytest.mark.parametrize("cancels", [1, 2])
    async def test_cancelling_ends_the_group(self, marked: Marked, cancels: int) -> None:
        is_ready = asyncio.Event()

        async def work() -> None:
            async with open_process(["sh", "-c", STUBBORN], env=marked.env, stdin=True, grace_seconds=0.1) as process:
                await process.read()
                is_ready.set()
                await process.wait()

        task = asyncio.create_task(work())
        await is_ready.wait()
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert marked.alive() == []

    async def test_leaving_with_unwritten_input_for_one_that_does_not_read(self, marked: Marked) -> None:
        async with open_process(["sleep", FOREVER], env=marked.env, stdin=True) as process:
            writing = asyncio.create_task(process.write(b"x" * 5_000_000))
            await asyncio.sleep(0.01)
            assert not writing.done()
        with pytest.raises(BrokenPipeError):
            await writing

    async def test_inherited_streams(self, marked: Marked, capfd: pytest.CaptureFixture[str]) -> None:
        async with open_process(["sh", "-c", "echo out; echo err >&2"], env=marked.env, inherit=True) as process:
            assert await process.wait() == 0
            assert await process.read() == b""
            assert await process.read_stderr() == b""
        assert capfd.readouterr() == ("out\n", "err\n")

    async def test_missing_command_is_named(self, marked: Marked) -> None:
        with pytest.raises(FileNotFoundError, match="no-such-command"):
            async with open_process(["no-such-command"], env=marked.env):
                pytest.fail("not reached")
