"""What can go wrong between here and a host: links that freeze and break, servers without room, unknown keys.

What every host does is in `test_contract`.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncssh
import pytest

from repopool_async._clock import boottime
from repopool_async._identity import boot_id, process_start_time
from repopool_async.exceptions import CommandTimeoutError, ConfigError, HostKeyError, HostUnreachableError
from repopool_async.hosts._ssh_connection import Breaker, SshOptions, Target
from repopool_async.hosts.base import Command, CopyFile, MakeDirectory, Moment, Wanted, WriteFile
from repopool_async.hosts.ssh import SshHost
from tests.hosts import sshd
from tests.hosts.conftest import reach
from tests.hosts.daemons import ENV, FOREVER
from tests.hosts.proxy import Proxy, proxy
from tests.hosts.sshd import Server, write_config


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(20):
        while any(process_start_time(pid) is not None for pid in pids):
            await asyncio.sleep(0.005)


async def reachable(host: SshHost) -> None:
    """Wait until the breaker lets a call through, and it succeeds."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(HostUnreachableError):
                await host.stat("/")
                return
            await asyncio.sleep(0.01)


class Started:
    """Tells when a command has printed its process id, and which."""

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self.text = b""

    def __call__(self, _: str, data: bytes) -> None:
        self.text += data
        if b"\n" in self.text:
            self.told.set()

    async def pid(self) -> int:
        async with asyncio.timeout(20):
            await self.told.wait()
        return int(self.text.split()[0])


@pytest.fixture
async def link(asyncssh_server: Server) -> AsyncIterator[Proxy]:
    async with proxy(asyncssh_server.port) as one:
        yield one


@pytest.fixture(params=["asyncssh", "openssh"])
async def remote(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SshHost]:
    async with reach(request.getfixturevalue(f"{request.param}_server"), tmp_path) as host:
        yield host


class TestTargets:
    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ("box", Target("box")),
            ("me@box", Target("box", "me")),
            ("me@box.example.com:2222", Target("box.example.com", "me", 2222)),
            ("ssh://me@box:22", Target("box", "me", 22)),
            ("[fe80::1%eth0]:2222", Target("fe80::1%eth0", None, 2222)),
            ("192.0.2.1:2222", Target("192.0.2.1", None, 2222)),
        ],
    )
    def test_specifications(self, spec: str, expected: Target) -> None:
        assert Target.parse(spec) == expected

    @pytest.mark.parametrize(
        "spec", ["", "box:", "box:0", "box:65536", "-oProxyCommand=x", "a b", "me@", "a/b", "a@b@c"]
    )
    def test_what_is_none_is_refused(self, spec: str) -> None:
        with pytest.raises(ConfigError, match="no SSH host"):
            SshHost(spec)

    async def test_a_host_is_made_without_connecting(self) -> None:
        host = SshHost("box", host_id="builder-1")
        assert (host.id, repr(host)) == ("builder-1", "SshHost('box', host_id='builder-1')")
        await host.close()


class TestEnding:
    async def test_ten_cancelled_runs_leave_the_connection_usable(self, remote: SshHost) -> None:
        pids = []
        for _ in range(10):
            started = Started()
            run = asyncio.create_task(
                remote.run(["sh", "-c", f"echo $$; sleep {FOREVER} & exec sleep {FOREVER}"], env=ENV, on_output=started)
            )
            pids.append(await started.pid())
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            assert process_start_time(pids[-1]) is None
        assert (await remote.run(["true"], env=ENV)).exit_code == 0

    async def test_cancelled_while_it_starts(self, remote: SshHost, tmp_path: Path) -> None:
        await remote.run(["true"], env=ENV)
        script = f"echo $$ > {tmp_path}/$$; exec sleep {FOREVER}"
        for turns in range(0, 40, 4):
            run = asyncio.create_task(remote.run(["sh", "-c", script], env=ENV))
            for _ in range(turns):
                await asyncio.sleep(0)
            run.cancel()
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
        assert (await remote.run(["true"], env=ENV)).exit_code == 0
        await until_gone(*(int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()))

    async def test_a_server_that_ignores_signals_is_no_way_out(self, remote: SshHost) -> None:
        # Both servers do: asyncssh's in these tests, and OpenSSH for root.
        started = Started()
        with pytest.raises(CommandTimeoutError):
            await remote.run(["sh", "-c", f"echo $$; exec sleep {FOREVER}"], env=ENV, timeout=2.0, on_output=started)
        assert process_start_time(await started.pid()) is None

    async def test_a_scrubbed_child_in_the_group_goes_too(self, remote: SshHost) -> None:
        started = Started()
        script = f"env -i sleep {FOREVER} & echo $!; exec sleep {FOREVER}"
        with pytest.raises(CommandTimeoutError):
            await remote.run(["sh", "-c", script], env=ENV, timeout=2.0, on_output=started)
        assert process_start_time(await started.pid()) is None

    async def test_what_holds_the_output_open_is_ended(self, remote: SshHost) -> None:
        result = await remote.run(["sh", "-c", f"sleep {FOREVER} & echo $!"], env=ENV)
        assert process_start_time(int(result.stdout)) is None

    async def test_leaving_the_block_ends_all_of_the_group(self, remote: SshHost) -> None:
        script = f"sleep {FOREVER} >/dev/null 2>&1 & echo $!; exec sleep {FOREVER}"
        async with remote.open_process(["sh", "-c", script], env=ENV) as process:
            child = int(await process.read())
            process.signal(signal.SIGINT)
            assert await process.wait() == -signal.SIGINT
        assert process_start_time(child) is None


class TestStreams:
    async def test_binary_both_ways(self, remote: SshHost) -> None:
        data = bytes(range(256)) * 4096
        async with remote.open_process(["sh", "-c", "cat; echo done >&2"], env=ENV, stdin=True) as process:

            async def write() -> None:
                await process.write(data)
                await process.close_stdin()
                await process.close_stdin()

            writing = asyncio.create_task(write())
            received = b""
            while chunk := await process.read():
                received += chunk
            await writing
            assert received == data
            assert await process.read_stderr() == b"done\n"
            assert await process.wait() == 0
            with pytest.raises(BrokenPipeError):
                await process.write(b"x")

    async def test_output_that_nobody_reads_holds_the_command_up(self, remote: SshHost) -> None:
        # Two buffers of the channel's window at most; the rest waits on the host.
        async with remote.open_process(["sh", "-c", "head -c 20000000 /dev/zero; echo end"], env=ENV) as process:
            await process.read(1)
            await asyncio.sleep(0.2)
            assert process.exit_code is None
            size = 1
            while chunk := await process.read():
                size += len(chunk)
            assert size == 20000004

    async def test_a_big_output_and_a_noisy_login(self, keys: sshd.Keys, tmp_path: Path) -> None:
        noisy = ("sh", "-c", 'echo Welcome; echo careful >&2; sh -c "$1"', "sh")
        with sshd.asyncssh_server(keys, shell=noisy) as server:
            async with reach(server, tmp_path) as host:
                result = await host.run(["sh", "-c", "head -c 3000000 /dev/zero; echo no >&2"], env=ENV)
                assert (len(result.stdout), result.stderr) == (3000000, b"no\n")
                assert await host.list_directory(str(tmp_path)) == []

    @pytest.mark.parametrize("shell", ["fish", "csh", "busybox"])
    async def test_whatever_shell_the_login_has(self, keys: sshd.Keys, tmp_path: Path, shell: str) -> None:
        arguments = ("busybox", "sh", "-c") if shell == "busybox" else (shell, "-c")
        if not any(os.access(f"{directory}/{shell}", os.X_OK) for directory in os.environ["PATH"].split(":")):
            assert "REPOPOOL_CI" not in os.environ, "the checks install it"
            pytest.skip(f"there is no {shell} on this machine")
        value = "a'b\\c!d$e\"f\ng\x01\udcff"
        with sshd.asyncssh_server(keys, shell=arguments) as server:
            async with reach(server, tmp_path) as host:
                script = 'printf %s "$V"; cat'
                done = await host.run(["sh", "-c", script], env={**ENV, "V": value}, input=b"\0in")
                assert done.stdout == os.fsencode(value) + b"\0in"
                await host.apply([WriteFile(f"{tmp_path}/{value}", b"x")])
                assert await host.read_bytes(f"{tmp_path}/{value}", limit=1) == b"x"


class TestLink:
    async def test_only_so_many_channels_at_once(self, remote: SshHost, tmp_path: Path) -> None:
        (tmp_path / "running").mkdir()
        script = (
            f"mkdir {tmp_path}/running/$$ && ls {tmp_path}/running | wc -l && sleep 0.03 && rmdir {tmp_path}/running/$$"
        )
        results = await asyncio.gather(*(remote.run(["sh", "-c", script], env=ENV) for _ in range(40)))
        counts = [int(result.text) for result in results]
        assert 1 < max(counts) <= 4

    async def test_lessees_commands_do_not_hold_up_the_pools(self, remote: SshHost) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(14):
                await stack.enter_async_context(remote.open_process(["sleep", FOREVER], env=ENV))
            assert (await remote.run(["true"], env=ENV)).exit_code == 0

    async def test_a_time_limit_holds_on_a_frozen_link(
        self, asyncssh_server: Server, link: Proxy, tmp_path: Path
    ) -> None:
        async with reach(asyncssh_server, tmp_path, port=link.port) as host:
            await host.run(["true"], env=ENV)
            link.freeze()
            began = time.monotonic()
            with pytest.raises(CommandTimeoutError):
                await host.run(["true"], env=ENV, timeout=0.2)
            assert time.monotonic() - began < 5
            link.thaw()
            assert (await host.run(["true"], env=ENV)).exit_code == 0

    async def test_a_frozen_link_is_noticed(self, asyncssh_server: Server, link: Proxy, tmp_path: Path) -> None:
        async with reach(
            asyncssh_server,
            tmp_path,
            port=link.port,
            keepalive_seconds=0.1,
            keepalive_count=3,
            connect_seconds=0.5,
            first_pause_seconds=0.05,
        ) as host:
            started = Started()
            run = asyncio.create_task(
                host.run(["sh", "-c", f"echo $$; exec sleep {FOREVER}"], env=ENV, on_output=started)
            )
            pid = await started.pid()
            link.freeze()
            with pytest.raises(HostUnreachableError) as raised:
                await run
            assert not raised.value.has_not_started
            os.killpg(pid, signal.SIGKILL)  # behind a dead link only the host itself could have
            link.cut()
            link.thaw()
            await reachable(host)

    async def test_a_broken_link_is_made_again(self, asyncssh_server: Server, link: Proxy, tmp_path: Path) -> None:
        async with reach(asyncssh_server, tmp_path, port=link.port) as host:
            await host.stat("/")
            link.cut()
            results = await asyncio.gather(*(host.stat("/") for _ in range(5)))
            assert None not in results
            assert link.connections == 2

    async def test_cut_off_in_the_middle_of_output(self, asyncssh_server: Server, link: Proxy, tmp_path: Path) -> None:
        async with reach(asyncssh_server, tmp_path, port=link.port) as host:
            started = Started()
            script = "echo $$; while :; do echo output; sleep 0.01; done"
            run = asyncio.create_task(host.run(["sh", "-c", script], env=ENV, on_output=started))
            pid = await started.pid()
            link.cut()
            with pytest.raises(HostUnreachableError) as raised:
                await run
            assert (raised.value.has_not_started, raised.value.host_id) == (False, "box")
            await until_gone(pid)
            async with host.open_process(["cat"], env=ENV, stdin=True) as process:
                link.cut()
                with pytest.raises(ConnectionResetError):
                    await process.read()
                with pytest.raises(HostUnreachableError):
                    await process.wait()

    async def test_what_may_have_happened_is_not_done_twice(
        self, asyncssh_server: Server, link: Proxy, tmp_path: Path
    ) -> None:
        async with reach(asyncssh_server, tmp_path, port=link.port) as host:
            script = f"echo $$ >> {tmp_path}/done; exec sleep {FOREVER}".encode()
            work = asyncio.create_task(host._shell.call(lambda _: script))
            async with asyncio.timeout(20):
                while not (tmp_path / "done").exists() or not (tmp_path / "done").read_text():
                    await asyncio.sleep(0.005)
            link.cut()
            with pytest.raises(HostUnreachableError) as raised:
                await work
            assert not raised.value.has_not_started
            assert await host.list_directory(str(tmp_path)) == ["done"]
            (pid,) = (tmp_path / "done").read_text().split()
            os.killpg(int(pid), signal.SIGKILL)

    async def test_a_host_that_cannot_be_reached_fails_fast(
        self, asyncssh_server: Server, link: Proxy, tmp_path: Path
    ) -> None:
        link.refuse()
        async with reach(asyncssh_server, tmp_path, port=link.port, first_pause_seconds=0.01) as host:
            outcomes = await asyncio.gather(*(host.stat("/") for _ in range(10)), return_exceptions=True)
            assert all(isinstance(outcome, HostUnreachableError) and outcome.has_not_started for outcome in outcomes)
            assert link.connections == 3
            with pytest.raises(HostUnreachableError, match=r"box.*cannot be reached.*ssh box"):
                await host.run(["true"], env=ENV)
            assert link.connections <= 4
            link.refuse(False)
            await reachable(host)

    def test_a_breaker_waits_longer_each_time_and_closes_at_once(self) -> None:
        breaker = Breaker(limit=3, first_pause=1.0)
        error = HostUnreachableError("x")
        pauses = []
        for _ in range(8):
            breaker.failed(error, is_lasting=False)
            pauses.append(breaker.pause())
        assert all(0.4 * 2**n <= pause <= 2**n for n, pause in zip(range(1, 6), pauses, strict=False))
        assert max(pauses) <= 60
        states = [breaker.is_open]
        breaker.succeeded()
        states.append(breaker.is_open)
        breaker.failed(error, is_lasting=True)
        assert [*states, breaker.is_open] == [True, False, True]

    async def test_requests_without_room_are_repeated(self, asyncssh_server: Server, tmp_path: Path) -> None:
        async with reach(asyncssh_server, tmp_path) as host:
            await host.stat("/")
            connection = await host._shell._primary.connected()
            create = connection.create_session
            refusals = [2]

            async def crowded(*arguments: object, **options: object) -> object:
                if refusals[0]:
                    refusals[0] -= 1
                    raise asyncssh.ChannelOpenError(asyncssh.OPEN_RESOURCE_SHORTAGE, "open failed")
                return await create(*arguments, **options)  # type: ignore[arg-type]

            connection.create_session = crowded  # type: ignore[method-assign, assignment]
            assert await host.stat("/") is not None
            assert refusals == [0]


class TestTrust:
    async def test_an_unknown_key_is_refused_and_the_remedy_named(
        self, asyncssh_server: Server, keys: sshd.Keys, tmp_path: Path
    ) -> None:
        config = write_config(keys, asyncssh_server.port, name="config-unknown", known_hosts="")
        async with SshHost("box", options=SshOptions(config=(str(config),))) as host:
            with pytest.raises(HostKeyError, match=r"box.*not trusted.*ssh-keyscan.*host_key=") as raised:
                await host.run(["true"], env=ENV)
            assert raised.value.has_not_started
            with pytest.raises(HostKeyError):
                await host.stat("/")

    async def test_a_pinned_key_is_the_only_one(self, asyncssh_server: Server, keys: sshd.Keys, tmp_path: Path) -> None:
        config = write_config(keys, asyncssh_server.port, name="config-pinned", known_hosts="")
        options = SshOptions(config=(str(config),))
        async with SshHost("box", options=options, host_key=keys.host_line) as host:
            assert await host.stat("/") is not None
        other = keys.client.export_public_key().decode()
        async with SshHost("box", options=SshOptions(config=(str(asyncssh_server.config),)), host_key=other) as host:
            with pytest.raises(HostKeyError):
                await host.stat("/")

    async def test_checking_cannot_be_switched_off(self, asyncssh_server: Server, tmp_path: Path) -> None:
        config = tmp_path / "config"
        config.write_text(asyncssh_server.config.read_text() + " UserKnownHostsFile none\n")
        text = "\n".join(line for line in config.read_text().splitlines() if "known_hosts" not in line)
        config.write_text(text)
        async with SshHost("box", options=SshOptions(config=(str(config),))) as host:
            with pytest.raises(HostUnreachableError, match="checking of host keys off"):
                await host.stat("/")

    async def test_a_login_that_is_not_allowed_is_not_tried_again(
        self, asyncssh_server: Server, link: Proxy, keys: sshd.Keys, tmp_path: Path
    ) -> None:
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(tmp_path / "stranger")
        (tmp_path / "stranger").chmod(0o600)
        config = asyncssh_server.config_for(link.port)
        options = SshOptions(config=(str(config),), identities=(str(tmp_path / "stranger"),))
        async with SshHost("box", options=options) as host:
            for _ in range(3):
                with pytest.raises(HostUnreachableError, match="Permission denied") as raised:
                    await host.stat("/")
                assert not raised.value.is_passing
            assert link.connections == 1


HOLDER = """
import os, socket, sys
one, other = socket.socketpair()
descriptor = os.open(sys.argv[1], os.O_WRONLY)
socket.send_fds(one, [b"x"], [descriptor])
os.close(descriptor)
print("ready", flush=True)
sys.stdin.read()
"""
"""Holds a file by a descriptor that is on its way through a socket, where nobody sees what it leads to."""


class TestOtherMachine:
    """The host counts the seconds since another boot than this machine."""

    @pytest.mark.parametrize(("lease_began", "is_found"), [(-60, True), (600, False)])
    async def test_who_began_since_the_lease_is_found_by_its_age(
        self, ssh_host: SshHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lease_began: float, is_found: bool
    ) -> None:
        (tree := tmp_path / "tree").mkdir()
        (tree / "file").touch()
        began = Moment(boot_id(), boottime() + lease_began)
        argv = (sys.executable, "-c", HOLDER, str(tree / "file"))
        holder = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=ENV, cwd="/"
        )
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert await holder.stdout.readline() == b"ready\n"

        async def another(_: SshHost) -> str:
            return "of-another-machine"

        monkeypatch.setattr(SshHost, "boot_id", another)
        try:
            ended = await ssh_host.end_processes(mark="REPOPOOL_TEST=none", tree=str(tree), since=began)
        finally:
            holder.stdin.close()
            await holder.wait()
        assert any(line.startswith(f"{holder.pid} ") for line in ended.bystanders) is is_found


class TestExecutions:
    async def test_each_order_is_one(self, ssh_host: SshHost, tmp_path: Path) -> None:
        root = str(tmp_path)
        await ssh_host.stat(root)
        before = ssh_host.exec_count
        await ssh_host.apply(
            [MakeDirectory(f"{root}/a"), WriteFile(f"{root}/a/f", b"x"), CopyFile(f"{root}/a/f", f"{root}/g")]
        )
        await ssh_host.batch([Command(("true",), ENV)] * 5)
        await ssh_host.inspect_tree(root, since_ns=None)
        await ssh_host.remove_entries(root, ["a", "g"], trash=f"{root}/trash")
        await ssh_host.end_processes(mark="REPOPOOL_TEST=none", tree=root)
        await ssh_host.enter(f"{root}/slot", 1, "session")
        assert ssh_host.exec_count - before == 6

    async def test_nothing_of_the_environment_shows_to_others(self, ssh_host: SshHost, tmp_path: Path) -> None:
        env = {**ENV, "SECRET": "a-very-secret-word"}
        script = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
        listed = await ssh_host.run(["sh", "-c", script], env=env, input=b"x")
        assert b"a-very-secret-word" not in listed.stdout


async def test_busyboxs_tools_find_whoever_bears_a_mark(keys: sshd.Keys, tmp_path: Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        assert not os.environ.get("REPOPOOL_CI")
        pytest.skip("there is no busybox")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split():
        (tools / name).symlink_to(busybox)
    mark, longer = {"REPOPOOL_LEASE": "1"}, {"REPOPOOL_LEASE": "12"}
    envs: list[dict[str, str]] = [mark, {"A": "1", **mark, "B": "2"}, longer, {"A": "REPOPOOL_LEASE=1"}]
    with sshd.asyncssh_server(keys, env={"PATH": str(tools), "HOME": str(tmp_path)}) as server:
        async with reach(server, tmp_path) as host, contextlib.AsyncExitStack() as stack:
            pids = []
            for env in envs:
                process = subprocess.Popen(["/bin/sleep", "1000"], env=env)
                stack.callback(process.wait)
                stack.callback(process.kill)
                pids.append(process.pid)
            ended = await host.end_processes(mark="REPOPOOL_LEASE=1", tree=None)
            assert set(ended.killed) == set(pids[:2])


class TestCaution:
    """A host without the GNU tools: answers are less exact and never wrong."""

    @pytest.fixture
    async def plain(self, keys: sshd.Keys, tmp_path: Path) -> AsyncIterator[SshHost]:
        tools = tmp_path / "tools"
        tools.mkdir()
        for name, option in {
            "find": "-printf|-newerct|-lname",
            "dd": "iflag",
            "tar": "--help",
            "mv": "-T|--help",
        }.items():
            tool = tools / name
            cases = "|".join(f"*{part}*" for part in option.split("|"))
            real = next(f"{d}/{name}" for d in ("/usr/bin", "/bin") if os.path.exists(f"{d}/{name}"))
            tool.write_text(f'#!/bin/sh\ncase "$*" in {cases}) echo unknown >&2; exit 1;; esac\nexec {real} "$@"\n')
            tool.chmod(0o755)
        env = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        with sshd.asyncssh_server(keys, env=env) as server:
            async with reach(server, tmp_path) as host:
                assert not {"gnu_find", "gnu_dd", "gnu_tar", "gnu_mv"} & (await host._shell.tools()).flags
                yield host

    async def test_everything_counts_as_changed(self, plain: SshHost, tmp_path: Path) -> None:
        tree = tmp_path / "tree"
        for name in ("a b/.git/x", "a b/new\nline", "file"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).touch()
        (tree / "link").symlink_to("/etc")
        os.mkfifo(tree / "fifo")
        (tree / "hard").hardlink_to(tree / "file")
        found = await plain.inspect_tree(str(tree), since_ns=await plain.file_system_clock_ns(str(tmp_path)))
        assert sorted(found.changed) == ["a b/new\nline", "fifo", "file", "hard", "link"]
        assert (found.changed_directories, found.repositories) == (("a b",), ("a b/.git",))
        assert (found.special, sorted(found.multiply_linked)) == (("fifo",), ["file", "hard"])
        assert (sorted(found.irregular), found.entries) == ([".", "a b"], 7)
        assert await plain.remove_entries(str(tree), ["a b", "fifo", "hard", "none"], trash=f"{tmp_path}/trash") == 3
        assert await plain.measure_entries(str(tree), ["file", "link"]) == [0, 0]

    async def test_files(self, plain: SshHost, tmp_path: Path) -> None:
        root = str(tmp_path)
        first = await plain.file_system_clock_ns(root)
        await plain.apply(
            [WriteFile(f"{root}/f", b"1\0"), CopyFile(f"{root}/f", f"{root}/g"), MakeDirectory(f"{root}/d")]
        )
        found = await plain.stat(f"{root}/g")
        assert found is not None
        assert (found.size, found.inode, found.mode) == (2, os.lstat(f"{root}/g").st_ino, 0o644)
        assert found.ctime_ns > first
        assert await plain.read_bytes(f"{root}/g", limit=2) == b"1\0"
        assert await plain.file_system_clock_ns(root) > first


class TestCollecting:
    async def test_only_what_is_wanted_and_sound(self, ssh_host: SshHost, tmp_path: Path) -> None:
        source = tmp_path / "tree/.git/objects"
        (source / "aa").mkdir(parents=True)
        (source / "aa/bad").write_bytes(b"not an object")
        (source / "pack").mkdir()
        (source / "pack/a.pack").write_bytes(b"P" * 100)
        (source / "pack/big.pack").write_bytes(b"P" * 1000)
        (source / "pack/link.pack").symlink_to("/etc/passwd")
        (source / "note").write_bytes(b"text\n")
        (tmp_path / "target").mkdir()
        collected = await ssh_host.collect_files(
            str(tmp_path / "tree"),
            ".git/objects",
            str(tmp_path / "target"),
            [
                Wanted(r"aa/bad", 1000, named_by="sha1"),
                Wanted(r"pack/.*\.pack", 500),
                Wanted(r"note", 100, is_read=True),
            ],
            enter=r"aa|pack",
            limit_bytes=10_000,
            limit_files=10,
        )
        assert collected.names == ("pack/a.pack",)
        assert collected.contents == {"note": b"text\n"}
        assert sorted(line.split(":")[0] for line in collected.skipped) == ["aa/bad", "pack/big.pack", "pack/link.pack"]
        copied = sorted(
            str(p.relative_to(tmp_path / "target")) for p in (tmp_path / "target").rglob("*") if p.is_file()
        )
        assert copied == ["pack/a.pack"]
