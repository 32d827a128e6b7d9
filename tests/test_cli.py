"""The command `repopool` as a shell sees it: real processes, real repositories, exit statuses, streams and signals."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import repopool_async
from repopool_async.cli import ExitStatus
from repopool_async.cli._run import is_url, normalised_url, pool_name
from repopool_async.config_values import validate_repo_name
from repopool_async.models import Slot
from repopool_async.slot_store import SlotStore

PROGRAM = (sys.executable, "-m", "repopool_async.cli")
README = (Path(__file__).parents[1] / "README.md").read_text()
SECONDS = 60
Finished = subprocess.CompletedProcess[str]
MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]


class Shell:
    """Runs `repopool` in a directory of its own, with its own workspaces."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.workspaces = directory / "workspaces"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(Path(repopool_async.__file__).parents[1]),
            "REPOPOOL_WORKSPACES_DIR": str(self.workspaces),
        }
        self.live: list[subprocess.Popen[str]] = []

    def __call__(self, *arguments: str | Path, **more: Any) -> Finished:
        return subprocess.run(
            [*PROGRAM, *map(str, arguments)],
            check=False,
            cwd=self.directory,
            env=self.environment,
            **{"capture_output": True, "text": True, "timeout": SECONDS, "stdin": subprocess.DEVNULL, **more},
        )

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start it with pipes; it is killed at the end of the test if it still runs."""
        process = subprocess.Popen(
            [*PROGRAM, *map(str, arguments)],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.live.append(process)
        return process

    def hold(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a `run` whose command says that it holds a slot, and then waits for a line on its standard input."""
        holder = self.start("run", *arguments, "--", "sh", "-c", "echo holding; read answer; echo $answer")
        assert read_line(holder) == "holding"
        return holder

    def status(self, *arguments: str) -> Any:
        done = self("status", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def slots(self) -> list[dict[str, Any]]:
        return [slot for pool in self.status()["pools"] for slot in pool["slots"]]

    def records(self) -> list[Slot]:
        """Return what is recorded of every slot, without another process."""
        store = SlotStore(self.workspaces)
        return [slot for name in store.list_pools_sync() for slot in store.list_slots_sync(name)]

    def states(self) -> list[str]:
        return [str(slot.state) for slot in self.records()]

    def close(self) -> None:
        for process in self.live:
            process.kill()
            process.__exit__(None, None, None)  # not `communicate`: what a failed test left running holds the pipes


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def is_running(pid: str) -> bool:
    """Whether a process is more than a zombie that its new parent has yet to reap."""
    try:
        stat = Path("/proc", pid, "stat").read_bytes()
    except FileNotFoundError:
        return False
    return stat[stat.rindex(b")") + 2 :][:1] not in (b"Z", b"X")


@pytest.fixture
def repopool(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.close()


# run: the command --------------------------------------------------------------------------------------------------


def test_run_gives_the_command_a_checkout_and_nothing_but_its_own_output(repopool: Shell, origin: Path) -> None:
    done = repopool("run", origin, "--", "git", "log", "-1", "--format=%s %D")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Change CHANGES.md HEAD -> main, tag: light, origin/main, origin/HEAD\n"
    assert repopool.states() == ["available"]


def test_what_one_command_leaves_the_next_does_not_see(repopool: Shell, origin: Path) -> None:
    mess = (
        "echo x > untracked; echo y > a.log; echo z >> README.md; git config user.name Eve; git tag mine; git stash -u"
    )
    assert repopool("run", origin, "--", "sh", "-c", mess).returncode == 0

    look = "git status --short --ignored; git stash list; git tag; git config --local user.name"
    done = repopool("run", origin, "--", "sh", "-c", look)

    assert done.stdout.split() == ["light", "v1.0"]


def test_the_second_run_uses_the_pool_of_the_first(repopool: Shell, origin: Path) -> None:
    first = repopool("run", origin, "--", "pwd")
    second = repopool("run", f"{origin}/", "--", "pwd")

    assert first.stdout == second.stdout
    assert len(repopool.records()) == 1


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["./README.md"], ExitStatus.NOT_EXECUTABLE),
    ],
)
def test_the_exit_status_is_the_commands_as_a_shell_would_say_it(
    repopool: Shell, origin: Path, command: list[str], status: int
) -> None:
    done = repopool("run", origin, "--", *command)

    assert done.returncode == status
    assert repopool.states() == ["available"]


def test_a_command_that_does_not_exist_is_told_in_one_line(repopool: Shell, origin: Path) -> None:
    done = repopool("run", origin, "--", "no-such-command")

    assert done.returncode == ExitStatus.NOT_FOUND
    assert repopool.states() == ["available"]
    assert done.stderr == "repopool: no-such-command: command not found\n"


def test_everything_after_the_first_dashes_is_the_commands(repopool: Shell, origin: Path) -> None:
    done = repopool("run", origin, "--", "printf", "%s\\n", "--ref", "--", "-v", "")

    assert done.stdout.splitlines() == ["--ref", "--", "-v", ""]


def test_streams_pass_both_ways_while_the_command_runs(repopool: Shell, origin: Path) -> None:
    holder = repopool.start("run", origin, "--", "sh", "-c", "echo ready; read word; echo got $word; echo oops >&2")

    assert read_line(holder) == "ready"
    assert holder.poll() is None
    stdout, stderr = holder.communicate("hello\n", timeout=SECONDS)

    assert (stdout, stderr, holder.returncode) == ("got hello\n", "oops\n", 0)


def test_what_the_command_leaves_running_is_ended_with_the_lease(repopool: Shell, origin: Path) -> None:
    done = repopool("run", origin, "--", "sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!")

    assert done.returncode == 0
    assert not is_running(done.stdout.strip())


# run: which slot ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "head"), [("feature/x", "feature/x"), ("v1.0", "HEAD"), ("refs/heads/main", "main"), ("light", "HEAD")]
)
def test_ref_chooses_what_is_checked_out(repopool: Shell, origin: Path, ref: str, head: str) -> None:
    done = repopool("run", origin, "--ref", ref, "--", "git", "rev-parse", "--abbrev-ref", "HEAD")

    assert (done.stdout.strip(), done.stderr) == (head, "")


def test_new_branch_is_made_at_the_ref(repopool: Shell, origin: Path) -> None:
    done = repopool("run", origin, "--ref", "v1.0", "--new-branch", "agent/7", "--", "git", "log", "-1", "--format=%D")

    assert done.stdout.strip() == "HEAD -> agent/7, tag: v1.0"


def test_an_unknown_ref_is_one_line_without_a_traceback(repopool: Shell, origin: Path) -> None:
    done = repopool("run", origin, "--ref", "feature/y", "--", "true")

    assert done.returncode == ExitStatus.FAILURE
    assert re.fullmatch(r"repopool: .*feature/y.*feature/x.*\n", done.stderr)
    assert "Traceback" in repopool("run", origin, "--ref", "feature/y", "-vv", "--", "true").stderr


def test_a_run_begins_with_a_fetch_unless_told_not_to(repopool: Shell, origin: Path, make_commit: MakeCommit) -> None:
    old = repopool("run", origin, "--", "git", "rev-parse", "HEAD").stdout.strip()
    new = make_commit(origin, "main", {"news.txt": b"new\n"})

    assert repopool("run", origin, "--no-fetch", "--", "git", "rev-parse", "HEAD").stdout.strip() == old
    assert repopool("run", origin, "--", "git", "rev-parse", "HEAD").stdout.strip() == new


def test_no_slot_in_time_is_a_status_of_its_own_and_names_the_holder(repopool: Shell, origin: Path) -> None:
    holder = repopool.hold(origin)

    done = repopool("run", origin, "--timeout", "0", "--", "true")

    assert done.returncode == ExitStatus.TRY_LATER
    assert f"pid {holder.pid}" in done.stderr
    holder.communicate("done\n", timeout=SECONDS)
    assert repopool("run", origin, "--timeout", "0", "--", "true").returncode == 0


def test_slots_makes_room_for_more_than_one(repopool: Shell, origin: Path) -> None:
    holder = repopool.hold(origin, "--slots", "2")

    done = repopool("run", origin, "--timeout", "0", "--", "true")
    assert done.returncode == 0, done.stderr
    assert repopool("run", origin, "--slots", "3", "--", "true").returncode == 0

    holder.communicate("done\n", timeout=SECONDS)
    assert repopool.states() == ["available"] * 3


def test_a_pools_name_wins_over_a_directory_of_that_name(repopool: Shell, origin: Path) -> None:
    config = repopool.directory / "pools.yaml"
    config.write_text(f"workspaces_dir: workspaces\npools:\n  both: {{repo_url: {origin}, num_slots: 2}}\n")
    (repopool.directory / "both").mkdir()

    assert repopool("run", "both", "--", "true").returncode == ExitStatus.FAILURE  # an empty directory, no repository
    assert repopool("run", "both", "--config", config, "--", "true").returncode == 0
    assert repopool("run", "both", "--", "true").returncode == 0  # the pool is in the directory from now on
    assert repopool.states() == ["available", "available"]


def test_of_a_configuration_only_the_pool_that_is_run_is_made(repopool: Shell, origin: Path) -> None:
    config = repopool.directory / "pools.yaml"
    config.write_text(f"pools:\n  one: {{repo_url: {origin}}}\n  two: {{repo_url: /no/such/repository}}\n")

    done = repopool("run", "one", "--config", config, "--workspaces-dir", repopool.workspaces, "--", "true")

    assert (done.returncode, done.stderr) == (0, "")
    assert [pool["repo_name"] for pool in repopool.status()["pools"]] == ["one"]


def test_a_name_that_is_no_pool_is_told_with_those_that_are(repopool: Shell, origin: Path) -> None:
    repopool("run", origin, "--", "true")

    done = repopool("run", "unknown", "--", "true")

    assert done.returncode == ExitStatus.FAILURE
    assert "unknown" in done.stderr
    assert pool_name(str(origin)) in done.stderr


def test_verbose_tells_on_standard_error_only(repopool: Shell, origin: Path) -> None:
    done = repopool("run", origin, "-v", "--", "echo", "output")

    assert done.stdout == "output\n"
    assert "leased workspace-" in done.stderr


# run: signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_command_and_gives_the_slot_back_clean(
    repopool: Shell, origin: Path, number: signal.Signals
) -> None:
    holder = repopool.start("run", origin, "--", "sh", "-c", "touch left-behind; echo $$; exec sleep 600")
    pid = read_line(holder)

    holder.send_signal(number)
    _, stderr = holder.communicate(timeout=SECONDS)

    assert (holder.returncode, stderr) == (128 + number, "")
    assert not is_running(pid)
    assert repopool.states() == ["available"]


def test_the_command_may_answer_the_first_signal_itself(repopool: Shell, origin: Path) -> None:
    answer = "trap 'echo tidied up; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    holder = repopool.start("run", origin, "--", "sh", "-c", answer)
    assert read_line(holder) == "ready"

    holder.terminate()
    stdout, _ = holder.communicate(timeout=SECONDS)

    assert (stdout, holder.returncode) == ("tidied up\n", 143)


def test_a_second_signal_does_not_wait_for_a_command_that_ignores_the_first(repopool: Shell, origin: Path) -> None:
    deaf = "trap 'echo heard' TERM; trap '' INT; echo $$; while :; do sleep 0.05; done"
    holder = repopool.start("run", origin, "--", "sh", "-c", deaf)
    pid = read_line(holder)

    holder.send_signal(signal.SIGTERM)
    assert read_line(holder) == "heard"
    holder.send_signal(signal.SIGTERM)
    holder.communicate(timeout=SECONDS)

    assert holder.returncode == 143
    assert not is_running(pid)
    assert repopool.states() == ["available"]


def test_a_signal_ends_the_wait_for_a_slot(repopool: Shell, origin: Path) -> None:
    holder = repopool.hold(origin)
    waiter = repopool.start("run", origin, "--timeout", "none", "-v", "--", "true")
    assert waiter.stderr is not None
    assert "waiting for a slot" in waiter.stderr.readline()

    waiter.terminate()
    waiter.communicate(timeout=SECONDS)
    stdout, _ = holder.communicate("unharmed\n", timeout=SECONDS)

    assert (waiter.returncode, stdout, holder.returncode) == (143, "unharmed\n", 0)
    assert repopool.states() == ["available"]


# status ------------------------------------------------------------------------------------------------------------


def test_status_as_json_has_pools_slots_holders_and_counters(repopool: Shell, origin: Path) -> None:
    repopool("run", origin, "--slots", "2", "--ref", "v1.0", "--", "true")
    holder = repopool.hold(origin, "--ref", "feature/x")

    status = repopool.status()

    (pool,) = status["pools"]
    documented = README.partition("`status --json` prints")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", documented))
    assert named == {*status, *pool, *pool["slots"][0], *next(s["lease"] for s in pool["slots"] if s["lease"])}
    assert (status["version"], status["workspaces_dir"]) == (1, str(repopool.workspaces))
    assert (pool["repo_name"], pool["repo_url"]) == (pool_name(str(origin)), str(origin))
    assert [pool[key] for key in ("total_slots", "available", "allocated", "cleaning", "error")] == [2, 1, 1, 0, 0]
    assert pool["allocation_count"] == 2
    (leased,) = (slot for slot in pool["slots"] if slot["state"] == "allocated")
    assert (leased["branch"], leased["is_locked"], leased["is_orphaned"]) == ("feature/x", True, False)
    assert leased["lease"]["pid"] == holder.pid
    assert leased["lease"]["metadata"]["command"][0] == "sh"
    (free,) = (slot for slot in pool["slots"] if slot["state"] == "available")
    assert (free["lease"], free["is_locked"]) == (None, False)
    assert Path(free["path"], "README.md").is_file()

    holder.communicate("done\n", timeout=SECONDS)
    assert repopool.states() == ["available", "available"]


def test_status_as_text_is_aligned_and_names_the_holder(repopool: Shell, origin: Path) -> None:
    holder = repopool.hold(origin)

    done = repopool("status", pool_name(str(origin)))

    title, headings, row = done.stdout.splitlines()
    assert title.endswith(f"{origin}  (1 allocated)")
    assert row.index("allocated") == headings.index("STATE")
    assert f"pid {holder.pid} on " in row[headings.index("HOLDER") :]


def test_status_on_a_terminal_is_a_table(repopool: Shell, origin: Path) -> None:
    pytest.importorskip("rich")
    repopool("run", origin, "--", "true")
    ours, theirs = pty.openpty()
    try:
        done = repopool("status", capture_output=False, stdout=theirs, stderr=subprocess.PIPE)
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)

    assert done.returncode == 0, done.stderr
    assert "HOLDER" in shown
    assert "available" in shown


def test_status_changes_nothing_of_what_a_dead_process_left_and_recover_mends_it(repopool: Shell, origin: Path) -> None:
    holder = repopool.hold(origin)
    holder.kill()
    holder.communicate()

    (slot,) = repopool.slots()
    assert (slot["state"], slot["is_orphaned"], slot["lease"]["pid"]) == ("allocated", True, holder.pid)
    assert repopool.slots() == [slot]
    assert "owner died" in repopool("status").stdout

    done = repopool("recover")
    assert done.stdout == f"recovered {slot['slot_id']}\n"
    assert repopool.states() == ["available"]
    assert repopool("recover").stdout == "nothing to recover\n"


def test_status_of_nothing_makes_nothing(repopool: Shell) -> None:
    assert repopool.status()["pools"] == []
    assert repopool("status").stdout == f"no pools in {repopool.workspaces}\n"
    assert repopool("status", "unknown").returncode == ExitStatus.FAILURE
    assert not repopool.workspaces.exists()


def test_output_that_nobody_reads_is_no_error_worth_a_traceback(repopool: Shell, origin: Path) -> None:
    repopool("run", origin, "--", "true")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = repopool("status", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)

    assert (done.returncode, done.stderr) == (ExitStatus.BROKEN_PIPE, "")


# The other verbs ---------------------------------------------------------------------------------------------------


def test_slots_come_and_go(repopool: Shell, origin: Path) -> None:
    repopool("run", origin, "--", "true")
    name = pool_name(str(origin))

    added = repopool("add", name)
    assert added.stdout == f"workspace-{name}-slot2\n"
    assert repopool.states() == ["available", "available"]

    assert repopool("remove", f"workspace-{name}-slot1").returncode == 0
    assert [slot.slot_id for slot in repopool.records()] == [f"workspace-{name}-slot2"]
    assert repopool("run", origin, "--", "true").returncode == 0


def test_a_slot_that_is_damaged_is_repaired(repopool: Shell, origin: Path) -> None:
    repopool("run", origin, "--", "true")
    (slot,) = repopool.records()
    Path(slot.path, ".git", "HEAD").write_text("garbage")

    done = repopool("repair", slot.slot_id)

    assert (done.returncode, done.stderr) == (0, "")
    assert repopool("run", origin, "--", "git", "status", "--short").stdout == ""


def test_log_tells_leases_and_clean_ups_in_order(repopool: Shell, origin: Path) -> None:
    repopool("run", origin, "--ref", "feature/x", "--", "touch", "new-file")
    (slot,) = repopool.records()

    lines = repopool("log", slot.slot_id).stdout.splitlines()

    words = [line.split()[2] for line in lines]
    assert [word for word in words if word in ("provision", "allocated", "released", "return")] == [
        "provision",
        "allocated",
        "released",
        "return",
    ]
    assert "removed 1" in lines[-1]
    assert repopool("log", "--limit", "1", slot.slot_id).stdout.splitlines() == lines[-1:]


def test_nothing_that_is_leased_is_removed_or_deleted(repopool: Shell, origin: Path) -> None:
    holder = repopool.hold(origin)
    (slot,) = repopool.records()

    for refused in (repopool("remove", slot.slot_id), repopool("delete", pool_name(str(origin)))):
        assert refused.returncode == ExitStatus.FAILURE
        assert f"pid {holder.pid}" in refused.stderr

    stdout, _ = holder.communicate("unharmed\n", timeout=SECONDS)
    assert (stdout, holder.returncode) == ("unharmed\n", 0)
    assert repopool("delete", pool_name(str(origin))).returncode == 0
    assert SlotStore(repopool.workspaces).list_pools_sync() == []


def test_delete_by_force_ends_the_command_of_the_lease(repopool: Shell, origin: Path) -> None:
    holder = repopool.hold(origin)

    done = repopool("delete", "--force", pool_name(str(origin)))
    assert done.returncode == 0, done.stderr
    _, stderr = holder.communicate(timeout=SECONDS)

    assert holder.returncode == ExitStatus.FAILURE
    assert "taken away" in stderr
    assert SlotStore(repopool.workspaces).list_pools_sync() == []


@pytest.mark.parametrize(
    "arguments", [["add", "unknown"], ["delete", "unknown"], ["repair", "workspace-x-slot1"], ["log", "nonsense"]]
)
def test_what_does_not_exist_is_told_in_one_line(repopool: Shell, arguments: list[str]) -> None:
    done = repopool(*arguments)

    assert done.returncode == ExitStatus.FAILURE
    assert re.fullmatch(r"repopool: there is no .*\n", done.stderr)


# Arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "x"],
        ["run", "x", "--"],
        ["run", "x", "--timeout", "soon", "--", "true"],
        ["run", "x", "--slots", "0", "--", "true"],
        ["status", "--", "true"],
    ],
)
def test_arguments_that_make_no_sense_have_a_status_of_their_own(repopool: Shell, arguments: list[str]) -> None:
    done = repopool(*arguments)

    assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
    assert "repopool" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_configuration_is_told_with_its_line(repopool: Shell) -> None:
    config = repopool.directory / "pools.yaml"
    config.write_text("defaults:\n  num_slot: 3\n")

    done = repopool("status", "--config", config)

    assert done.returncode == ExitStatus.CONFIG
    assert done.stderr.startswith(f"repopool: {config}:2: ")
    assert "num_slots" in done.stderr


def test_help_imports_nothing_slow(repopool: Shell) -> None:
    code = "import sys; from repopool_async.cli import main; main(['run', '--help']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=repopool.environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )

    slow = {"asyncio", "anyio", "attrs", "cattrs", "filelock", "rich", "yaml", "repopool_async.pool_manager"}
    assert "exit statuses of `run`" in done.stdout
    assert not slow & set(done.stdout.split())


# Names of pools ----------------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=100))
def test_every_url_has_a_name_that_a_pool_may_bear(url: str) -> None:
    validate_repo_name(pool_name(url))
    assert pool_name(url) == pool_name(url)


@pytest.mark.parametrize(
    ("url", "readable"),
    [
        ("https://github.com/django/django.git", "django"),
        ("https://token@example.com/org/node.js", "node.js"),
        ("git@example.com:org/tool.git", "tool"),
        ("host:tool", "tool"),
        ("/srv/repositories/app.git", "app"),
        ("file:///", "repository"),
    ],
)
def test_a_pools_name_begins_with_the_last_part_of_the_path(url: str, readable: str) -> None:
    assert re.fullmatch(rf"{re.escape(readable)}-[0-9a-f]{{8}}", pool_name(url))


def test_credentials_and_trailing_slashes_do_not_make_another_pool() -> None:
    urls = ("https://example.com/x", "https://example.com/x/", "https://me:secret@example.com/x")
    assert len({pool_name(normalised_url(url)) for url in urls}) == 1
    assert pool_name("https://example.com/x") != pool_name("https://example.org/x")


@pytest.mark.parametrize("target", ["https://example.com/x", "git@example.com:x", "./x", "../x", ".", "/srv/x"])
def test_urls_are_told_from_names(target: str) -> None:
    assert is_url(target)
    assert not is_url("a-name")
