"""The pool's git runs in an environment of its own, shows no secret, and fails as what it is."""

import asyncio
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import stamina

from repopool_async._git import (
    BASE_CONFIG,
    MINIMUM_GIT,
    Credentials,
    GitRunner,
    base_environment,
    check_git_version,
    lessee_environment,
    split_credentials,
    with_config,
    with_credentials,
)
from repopool_async._git import _pause as pause
from repopool_async.exceptions import (
    ConfigError,
    GitAccessError,
    GitContentionError,
    GitMirrorDamagedError,
    GitOperationError,
    GitRefMissingError,
    GitSlotDamagedError,
    GitTimeoutError,
    GitTransientError,
    PlatformNotSupportedError,
    RepositoryUrlError,
)
from repopool_async.hosts.local import LocalHost
from tests.gitserver import GitServer, serving

SECRET = "s3cr3t'$HOME\"\\%`x"
QUOTED = "s3cr3t'$HOME%22%5C%25%60x"


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=10, cap=True):
        yield


@pytest.fixture
def server(tmp_path: Path, origin: Path) -> Iterator[GitServer]:
    """Serves the repository `origin.git`."""
    with serving(tmp_path) as running:
        yield running


@pytest.fixture
def private_server(tmp_path: Path, origin: Path) -> Iterator[GitServer]:
    """Serves it to one user only."""
    with serving(tmp_path, credentials=f"ada:{SECRET}") as running:
        yield running


@pytest.fixture
def runner() -> GitRunner:
    return GitRunner(LocalHost(), environment=base_environment())


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """An empty bare repository to fetch into."""
    path = tmp_path / "mirror.git"
    subprocess.run(["git", "init", "-q", "--bare", str(path)], check=True)
    return path


async def fetch(
    runner: GitRunner, mirror: Path, url: str, *refspecs: str, retry: bool = True, timeout: float | None = None
) -> int:
    """Fetch heads into a mirror; return how many attempts it took."""
    args = ["fetch", "--progress", "--end-of-options", url, *(refspecs or ["+refs/heads/*:refs/heads/*"])]
    result = await runner.run(*args, git_dir=str(mirror), retry=retry, timeout=timeout)
    return result.attempts


# -- environment -------------------------------------------------------------------------------------------------


def test_the_pools_environment_takes_nothing_of_git_from_outside() -> None:
    source = {
        "PATH": "/opt/bin",
        "HOME": "/home/ada",
        "SSH_AUTH_SOCK": "/run/agent",
        "https_proxy": "http://proxy:3128",
        "SSL_CERT_FILE": "/etc/ca.pem",
        "GIT_SSL_CAINFO": "/etc/git-ca.pem",
        "GIT_DIR": "/elsewhere/.git",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.hooksPath",
        "GIT_CONFIG_VALUE_0": "/evil",
        "GIT_SSH_COMMAND": "evil",
        "GIT_EXTERNAL_DIFF": "evil",
        "LANG": "de_DE.UTF-8",
    }
    environment = base_environment(source, home="/private", allow_protocols=["https", "ssh"])
    assert environment["PATH"] == "/opt/bin"
    assert environment["HOME"] == "/private"
    assert environment["SSH_AUTH_SOCK"] == "/run/agent"
    assert environment["https_proxy"] == "http://proxy:3128"
    assert environment["SSL_CERT_FILE"] == "/etc/ca.pem"
    assert environment["GIT_SSL_CAINFO"] == "/etc/git-ca.pem"
    assert environment["GIT_ALLOW_PROTOCOL"] == "https:ssh"
    assert environment["LC_ALL"] == "C"
    assert "BatchMode=yes" in environment["GIT_SSH_COMMAND"]
    assert not {"GIT_DIR", "GIT_EXTERNAL_DIFF", "LANG"} & set(environment)
    assert "/evil" not in environment.values()


def test_an_environment_without_a_path_gets_the_usual_one() -> None:
    assert base_environment({})["PATH"] == "/usr/local/bin:/usr/bin:/bin"


async def test_git_sees_the_base_configuration_and_no_file(runner: GitRunner, tmp_path: Path) -> None:
    (tmp_path / ".gitconfig").write_text("[user]\n\tname = Somebody\n")
    runner = runner.bind(environment=base_environment(home=str(tmp_path)))
    listed = (await runner.run("config", "--list", "--show-origin", "-z")).text
    entries = listed.rstrip("\0").split("\0")
    assert set(entries[0::2]) == {"command line:"}
    seen = dict(entry.split("\n", 1) for entry in entries[1::2])
    assert seen == {key.lower(): value for key, value in BASE_CONFIG.items()}


async def test_the_operators_configuration_wins_over_the_base(
    runner: GitRunner, server: GitServer, mirror: Path
) -> None:
    rewritten = {f"url.{server.url('')}.insteadOf": ["https://forge.example/", "https://mirror.example/"]}
    runner = runner.bind(environment=base_environment(git_config=rewritten))
    assert await fetch(runner, mirror, "https://mirror.example/origin.git") == 1
    assert await fetch(runner, mirror, "https://forge.example/origin.git") == 1


async def test_hooks_and_monitors_of_a_repository_do_not_run(runner: GitRunner, origin: Path, tmp_path: Path) -> None:
    clone, proof = tmp_path / "clone", tmp_path / "proof"
    subprocess.run(["git", "clone", "-q", str(origin), str(clone)], check=True)
    hook = clone / ".git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {proof}\n")
    hook.chmod(0o755)
    subprocess.run(["git", "-C", str(clone), "config", "core.fsmonitor", f"touch {proof};"], check=True)
    for args in (("checkout", "--detach", "HEAD", "--"), ("status",)):
        await runner.run(*args, git_dir=f"{clone}/.git", work_tree=str(clone), cwd=str(clone))
    assert not proof.exists()


def test_a_lessees_environment_is_the_users_own_without_prompts() -> None:
    source = {
        "HOME": "/home/ada",
        "GIT_DIR": "/elsewhere/.git",
        "GIT_INDEX_FILE": "/elsewhere/index",
        "GIT_CONFIG_PARAMETERS": "'core.editor'='evil'",
        "GIT_CONFIG_COUNT": "0",
        "GIT_SSH_COMMAND": "ssh -i key",
        "GIT_ASKPASS": "/ci/token",
        "SSH_ASKPASS": "/usr/bin/dialog",
        "LC_ALL": "de_DE.UTF-8",
    }
    environment = lessee_environment(source)
    assert not {"GIT_DIR", "GIT_INDEX_FILE", "GIT_CONFIG_PARAMETERS", "SSH_ASKPASS", "LC_ALL"} & set(environment)
    kept = {name: source[name] for name in ("HOME", "GIT_CONFIG_COUNT", "GIT_SSH_COMMAND", "GIT_ASKPASS")}
    assert kept.items() <= environment.items()
    assert environment["LC_CTYPE"] == "de_DE.UTF-8"
    assert environment["LC_MESSAGES"] == "C"
    assert environment["GIT_TERMINAL_PROMPT"] == "0"


@pytest.mark.parametrize("key", ["", "nosection", "a\nb.c", "core.", ".name", "http.bad\0.proxy", "core.white space"])
def test_what_is_no_configuration_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"no git configuration"):
        base_environment(git_config={key: "x"})


async def test_configuration_is_added_after_what_is_there(runner: GitRunner) -> None:
    environment = with_config({**runner.environment, "GIT_CONFIG_COUNT": ""}, {"repo.a": "1", "repo.b.c": ["2", "3"]})
    listed = await runner.bind(environment=environment).run("config", "--get-regexp", "^repo", config={"repo.z": "4"})
    assert listed.text.splitlines() == ["repo.a 1", "repo.b.c 2", "repo.b.c 3", "repo.z 4"]


# -- credentials -------------------------------------------------------------------------------------------------


async def test_a_secret_reaches_the_server_and_nothing_else(
    private_server: GitServer, mirror: Path, origin: Path, tmp_path: Path
) -> None:
    url, credentials = split_credentials(private_server.url("origin.git", userinfo=f"ada:{QUOTED}"))
    assert url == private_server.url("origin.git")
    trace = tmp_path / "trace"
    environment = base_environment(credentials=credentials, extra={"GIT_TRACE": str(trace)})
    runner = GitRunner(LocalHost(), environment=environment)
    assert await fetch(runner, mirror, url) == 1
    assert (mirror / "packed-refs").exists() or any((mirror / "refs/heads").iterdir())
    assert any(authorization for _, authorization in private_server.requests)
    assert any(b"git-remote-http" in line for line in private_server.command_lines)
    assert not any(b"s3cr3t" in line for line in private_server.command_lines)
    assert "REPOPOOL_GIT_PASSWORD" in trace.read_text()  # the helper's command line, which names but does not tell
    holding = subprocess.run(["grep", "-rl", "s3cr3t", str(tmp_path)], capture_output=True, text=True, check=False)
    assert holding.stdout == ""
    assert "s3cr3t" not in f"{credentials!r} {runner!r}"


async def test_a_wrong_password_is_told_at_once_and_without_it(private_server: GitServer, mirror: Path) -> None:
    credentials = Credentials(private_server.url("").rstrip("/"), "ada", "wrong-password")
    runner = GitRunner(LocalHost(), environment=base_environment(credentials=credentials))
    with pytest.raises(
        GitAccessError, match=r"git fetch failed: .*Authentication failed.*check the credentials"
    ) as caught:
        await fetch(runner, mirror, private_server.url("origin.git"))
    assert caught.value.attempts == 1
    assert "wrong-password" not in f"{caught.value} {caught.value.__dict__} {pickle.loads(pickle.dumps(caught.value))}"


async def test_no_credentials_where_some_are_wanted_ends_without_a_prompt(
    private_server: GitServer, mirror: Path, runner: GitRunner
) -> None:
    with pytest.raises(GitAccessError):
        await fetch(runner, mirror, private_server.url("origin.git"))


async def test_a_secret_is_not_offered_to_another_server(
    private_server: GitServer, mirror: Path, tmp_path: Path
) -> None:
    credentials = Credentials(private_server.url("").rstrip("/"), "ada", SECRET)
    runner = GitRunner(LocalHost(), environment=base_environment(credentials=credentials))
    with serving(tmp_path, credentials="eve:x") as other:
        with pytest.raises(GitAccessError):
            await fetch(runner, mirror, other.url("origin.git"))
        told = {authorization for _, authorization in other.requests}
    assert told <= {None, "Basic Og=="}  # nothing, and an empty name and password


async def test_each_server_gets_its_own_credentials(private_server: GitServer, mirror: Path, tmp_path: Path) -> None:
    with serving(tmp_path, credentials="eve:other") as other:
        known = [
            Credentials(private_server.url("").rstrip("/"), "ada", SECRET),
            Credentials(other.url("").rstrip("/"), "eve", "other"),
        ]
        at_once = base_environment(credentials=known)
        in_turn = with_credentials(base_environment(credentials=known[0]), known[1])
        for environment in (at_once, in_turn):
            runner = GitRunner(LocalHost(), environment=environment)
            assert await fetch(runner, mirror, private_server.url("origin.git")) == 1
            assert await fetch(runner, mirror, other.url("origin.git")) == 1


async def test_a_url_with_a_password_beats_helpers_and_a_bare_user_name_asks_them(
    private_server: GitServer, mirror: Path
) -> None:
    scope = private_server.url("").rstrip("/")
    wrong = {"credential.helper": "!f() { test $1 = get && echo username=eve && echo password=wrong; }; f"}
    wins = base_environment(credentials=Credentials(scope, "ada", SECRET), git_config=wrong)
    assert await fetch(GitRunner(LocalHost(), environment=wins), mirror, private_server.url("origin.git")) == 1
    private_server.credentials = "ada:plain"
    knows = {"credential.helper": "!f() { test $1 = get && echo password=plain; }; f"}
    asks = base_environment(credentials=Credentials(scope, "ada", ""), git_config=knows)
    assert await fetch(GitRunner(LocalHost(), environment=asks), mirror, private_server.url("origin.git")) == 1


async def test_a_token_may_stand_as_the_user_name(tmp_path: Path, origin: Path, mirror: Path) -> None:
    with serving(tmp_path, credentials="ghp_token:") as forge:
        url, credentials = split_credentials(forge.url("origin.git", userinfo="ghp_token"))
        environment = with_credentials(base_environment(), credentials)
        assert await fetch(GitRunner(LocalHost(), environment=environment), mirror, url) == 1


@pytest.mark.parametrize("url", ["https://ada:pw@127.0.0.1/x.git", "https://token@127.0.0.1/x.git"])
async def test_an_argument_with_credentials_is_never_run(runner: GitRunner, url: str) -> None:
    with pytest.raises(RepositoryUrlError, match=r"https://\*\*\*@127.0.0.1/x.git: credentials must not be among"):
        await runner.run("ls-remote", url)


# -- what goes wrong ---------------------------------------------------------------------------------------------


async def test_a_failing_server_is_asked_again(runner: GitRunner, server: GitServer, mirror: Path) -> None:
    told: list[tuple[int, float]] = []
    runner = runner.bind(on_retry=lambda error, seconds: told.append((error.attempts, seconds)))
    server.failures = [503, 429]
    assert await fetch(runner, mirror, server.url("origin.git")) == 3
    assert [attempts for attempts, _ in told] == [1, 2]


async def test_a_server_that_keeps_failing_is_given_up(runner: GitRunner, server: GitServer, mirror: Path) -> None:
    server.failures = [502] * 9
    with pytest.raises(
        GitTransientError, match=r"^web: git fetch failed after 3 attempts: .*502.*; .*try again later"
    ) as caught:
        await runner.run("fetch", server.url("origin.git"), git_dir=str(mirror), retry=True, repo_name="web")
    assert (caught.value.attempts, caught.value.repo_name, caught.value.operation) == (3, "web", "fetch")
    assert len(server.requests) == 3


async def test_without_retry_one_failure_is_enough(runner: GitRunner, server: GitServer, mirror: Path) -> None:
    server.failures = [503]
    with pytest.raises(GitTransientError) as caught:
        await fetch(runner, mirror, server.url("origin.git"), retry=False)
    assert caught.value.attempts == 1


async def test_retries_obey_staminas_own_switch(runner: GitRunner, server: GitServer, mirror: Path) -> None:
    server.failures = [503]
    stamina.set_active(False)
    try:
        with pytest.raises(GitTransientError):
            await fetch(runner, mirror, server.url("origin.git"))
    finally:
        stamina.set_active(True)


@pytest.mark.parametrize(
    ("url", "kind", "attempts"),
    [
        ("http://127.0.0.1:1/x.git", GitTransientError, 2),
        ("ssh://127.0.0.1:1/x.git", GitTransientError, 2),
        ("http://nowhere.invalid/x.git", GitTransientError, 2),
        ("nowhere.invalid:x.git", GitTransientError, 2),
        ("/nowhere/x.git", GitAccessError, 1),
        ("file:///nowhere/x.git", GitAccessError, 1),
        ("ext::sh -c true", GitOperationError, 1),
    ],
)
async def test_unreachable_remotes(
    runner: GitRunner, mirror: Path, url: str, kind: type[GitOperationError], attempts: int
) -> None:
    with pytest.raises(GitOperationError) as caught:
        await fetch(runner.bind(attempts=2), mirror, url)
    assert type(caught.value) is kind
    assert caught.value.attempts == attempts


async def test_a_repository_that_the_server_does_not_have(runner: GitRunner, server: GitServer, mirror: Path) -> None:
    with pytest.raises(GitAccessError, match=r"not found.*check the URL"):
        await fetch(runner, mirror, server.url("nothing.git"))


async def test_a_ref_or_commit_that_the_server_does_not_have(
    runner: GitRunner, server: GitServer, mirror: Path
) -> None:
    for wanted in ("refs/heads/nothing", "1" * 40):
        with pytest.raises(GitRefMissingError) as caught:
            await fetch(runner, mirror, server.url("origin.git"), f"{wanted}:refs/x")
        assert caught.value.attempts == 1


async def test_a_directory_that_is_somebody_elses(runner: GitRunner, origin: Path, mirror: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(origin, 12345, 12345)
    with pytest.raises(GitAccessError, match="belongs to another user"):
        await fetch(runner, mirror, str(origin))


async def test_a_lock_is_waited_for(runner: GitRunner, origin: Path) -> None:
    lock = origin / "packed-refs.lock"
    lock.touch()
    runner = runner.bind(on_retry=lambda _error, _seconds: lock.unlink())
    result = await runner.run(
        "pack-refs", "--all", git_dir=str(origin), retry=True, config={"core.packedRefsTimeout": "1"}
    )
    assert result.attempts == 2


async def test_a_lock_that_stays_is_contention(runner: GitRunner, origin: Path) -> None:
    (origin / "config.lock").touch()
    with pytest.raises(GitContentionError, match="another git process") as caught:
        await runner.run("config", "a.b", "c", git_dir=str(origin), retry=True)
    assert caught.value.attempts == 3


async def test_a_broken_object_is_the_mirrors_damage(runner: GitRunner, origin: Path) -> None:
    commit = (await runner.run("rev-parse", "main", git_dir=str(origin))).text
    await runner.run("unpack-objects", "-q", git_dir=str(origin), input=b"", check=False)
    broken = origin / "objects" / commit[:2] / commit[2:]
    broken.parent.mkdir(exist_ok=True)
    for pack in (origin / "objects/pack").glob("pack-*"):
        pack.unlink()
    broken.unlink(missing_ok=True)
    broken.write_bytes(b"")
    with pytest.raises(GitMirrorDamagedError, match="missing or corrupt"):
        await runner.run("log", "main", "--", git_dir=str(origin))


async def test_a_git_directory_without_head_is_damage_even_inside_another_repository(
    runner: GitRunner, tmp_path: Path
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path / "outer")], check=True)
    inner = tmp_path / "outer/inner"
    subprocess.run(["git", "init", "-q", str(inner)], check=True)
    (inner / ".git/HEAD").unlink()
    for git_dir in (f"{inner}/.git", None):
        with pytest.raises(GitSlotDamagedError, match="not a git repository"):
            await runner.run("status", git_dir=git_dir, cwd=str(inner))


async def test_a_link_does_not_lead_to_a_repository_around_its_target(runner: GitRunner, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path / "outer")], check=True)
    (tmp_path / "outer/inner").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "outer/inner")
    with pytest.raises(GitSlotDamagedError):
        await runner.run("status", cwd=str(tmp_path / "link"))


async def test_a_broken_index_is_the_slots_damage(runner: GitRunner, origin: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(origin), str(clone)], check=True)
    (clone / ".git/index").write_bytes(b"DIRC nonsense that is long enough to be read as a header")
    with pytest.raises(GitSlotDamagedError, match="git directory is unusable"):
        await runner.run("status", git_dir=f"{clone}/.git", work_tree=str(clone))


async def test_a_full_disk_is_told_as_such(runner: GitRunner, tmp_path: Path) -> None:
    fake = tmp_path / "git"
    fake.write_text(
        "#!/bin/sh\necho 'error: file write error: No space left on device\nfatal: early EOF' >&2\nexit 128\n"
    )
    fake.chmod(0o755)
    with pytest.raises(GitOperationError, match="free some disk space") as caught:
        await runner.bind(binary=str(fake)).run("fetch", retry=True, slot_id="workspace-web-slot1")
    assert type(caught.value).__name__ == "GitDiskFullError"
    assert str(caught.value).startswith("workspace-web-slot1: ")
    assert caught.value.attempts == 1


async def test_exit_codes_that_are_answers(runner: GitRunner, origin: Path) -> None:
    args = ("config", "--get", "no.such")
    assert (await runner.run(*args, git_dir=str(origin), ok_codes=(0, 1))).exit_code == 1
    unchecked = await runner.run("rev-parse", "--verify", "nothing", git_dir=str(origin), check=False, retry=True)
    assert (unchecked.exit_code, unchecked.success) == (128, False)
    assert "Needed a single revision" in unchecked.stderr
    with pytest.raises(GitOperationError, match="git config failed: exit status 1"):
        await runner.run(*args, git_dir=str(origin))


async def test_more_output_than_the_cap_is_an_error(runner: GitRunner, origin: Path) -> None:
    assert len((await runner.run("for-each-ref", git_dir=str(origin))).stdout) > 100
    with pytest.raises(GitOperationError, match="printed more than 100 bytes"):
        await runner.run("for-each-ref", git_dir=str(origin), stdout_limit=100)


async def test_much_progress_is_no_error_and_not_kept(runner: GitRunner, tmp_path: Path) -> None:
    fake = tmp_path / "git"
    fake.write_text(
        "#!/bin/sh\ni=0\nwhile [ $i -lt 4000 ]; do printf 'Receiving objects: 10%% (1/10)\\r' >&2; i=$((i+1)); done\n"
        "printf 'Receiving objects: 100%% (10/10), done.\\nFrom x\\n' >&2\n"
    )
    fake.chmod(0o755)
    assert (await runner.bind(binary=str(fake)).run("fetch")).stderr == "From x"


async def test_input_is_given(runner: GitRunner, origin: Path) -> None:
    result = await runner.run("cat-file", "--batch-check=%(objecttype)", git_dir=str(origin), input=b"main\nnothing\n")
    assert result.text == "commit\nnothing missing"


async def test_output_is_told_as_it_comes(runner: GitRunner, server: GitServer, mirror: Path) -> None:
    told: list[str] = []
    url = server.url("origin.git")
    await runner.run("fetch", "--progress", url, git_dir=str(mirror), on_output=lambda stream, _: told.append(stream))
    assert "stderr" in told


# -- time limits and cancelling ----------------------------------------------------------------------------------


async def test_silence_is_transient(runner: GitRunner, server: GitServer, mirror: Path) -> None:
    server.silence.set()
    with pytest.raises(GitTransientError, match=r"after 2 attempts: no output for 1 s") as caught:
        await fetch(runner.bind(attempts=2, idle_timeout=1.0), mirror, server.url("origin.git"))
    assert len(server.requests) == 2
    assert caught.value.__notes__ == ["no output for 1 s; git and its helpers have been ended"]


async def test_silence_of_a_local_command_is_no_matter(runner: GitRunner, tmp_path: Path) -> None:
    fake = tmp_path / "git"
    fake.write_text("#!/bin/sh\nexec sleep 0.3\n")
    fake.chmod(0o755)
    await runner.bind(binary=str(fake), idle_timeout=0.1).run("reset", "--hard")


async def test_taking_too_long_in_all_is_not_tried_again(runner: GitRunner, server: GitServer, mirror: Path) -> None:
    server.silence.set()
    with pytest.raises(GitTimeoutError, match=r"longer than 1 s") as caught:
        await fetch(runner, mirror, server.url("origin.git"), timeout=1.0)
    assert isinstance(caught.value, TimeoutError)
    assert len(server.requests) == 1


@pytest.mark.parametrize("library", ["asyncio", "anyio"])
async def test_cancelling_ends_git_and_is_not_answered_by_another_try(
    runner: GitRunner, server: GitServer, mirror: Path, library: str
) -> None:
    server.silence.set()
    mark = f"--upload-pack=mark-{mirror.parent.name}"

    async def running() -> None:
        await runner.run("fetch", mark, server.url("origin.git"), git_dir=str(mirror), retry=True)

    async def arrival() -> None:
        await anyio.to_thread.run_sync(server.arrived.wait, abandon_on_cancel=True)

    if library == "anyio":
        async with anyio.create_task_group() as group:
            group.start_soon(running)
            await arrival()
            group.cancel_scope.cancel()
    else:
        task = asyncio.get_running_loop().create_task(running())
        await arrival()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(server.requests) == 1
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(mark.encode() in line for line in lines)


async def test_cancelling_during_the_pause_ends_it(runner: GitRunner, server: GitServer, mirror: Path) -> None:
    server.failures = [503] * 9
    with anyio.CancelScope() as scope:
        await fetch(runner.bind(on_retry=lambda _error, _seconds: scope.cancel()), mirror, server.url("origin.git"))
    assert scope.cancelled_caught
    assert len(server.requests) == 1


def test_pauses_double_are_jittered_and_bounded() -> None:
    def pauses(kind: type[GitOperationError], stderr: str, attempts: int) -> list[float]:
        error = kind("", exit_code=128, stderr=stderr, attempts=attempts)
        return [seconds for _ in range(200) if (seconds := pause(error)) is not None]

    first, third = (pauses(GitTransientError, "Connection reset by peer", attempts) for attempts in (1, 3))
    assert 0.2 <= min(first) < 0.4
    assert 0.8 < max(first) <= 1.0
    assert 0.8 <= min(third) < max(third) <= 4.0
    assert max(pauses(GitTransientError, "early EOF", 20)) == 30.0
    assert max(pauses(GitContentionError, "Unable to create 'x.lock': File exists", 1)) <= 0.2
    assert pauses(GitAccessError, "Authentication failed", 1) == []
    assert pause(ValueError()) is None


async def test_what_a_killed_try_left_is_removed_before_the_next(
    runner: GitRunner, server: GitServer, tmp_path: Path
) -> None:
    target = tmp_path / "clone"
    server.failures = [503]

    def leave_something(_error: GitOperationError, _seconds: float) -> None:
        target.mkdir()
        (target / "half").touch()

    result = await runner.bind(on_retry=leave_something).run(
        "clone", server.url("origin.git"), str(target), retry=True, remove_before_retry=str(target)
    )
    assert result.attempts == 2
    assert not (target / "half").exists()


# -- which git ---------------------------------------------------------------------------------------------------


async def test_the_version_is_told() -> None:
    assert await check_git_version(LocalHost()) >= MINIMUM_GIT


@pytest.mark.parametrize(
    ("says", "message"),
    [("git version 2.38.4", r"git 2.38.4 on .* is too old: install git 2.39 or newer"), ("hello", "does not tell")],
)
async def test_an_old_or_strange_git_is_refused(tmp_path: Path, says: str, message: str) -> None:
    fake = tmp_path / "git"
    fake.write_text(f"#!/bin/sh\necho '{says}'\n")
    fake.chmod(0o755)
    with pytest.raises(PlatformNotSupportedError, match=message):
        await check_git_version(LocalHost(), binary=str(fake))


async def test_a_version_with_a_suffix_is_understood(tmp_path: Path) -> None:
    fake = tmp_path / "git"
    fake.write_text("#!/bin/sh\necho 'git version 2.50.1 (Apple Git-155)'\n")
    fake.chmod(0o755)
    assert await check_git_version(LocalHost(), binary=str(fake)) == (2, 50, 1)


async def test_a_machine_without_git_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(PlatformNotSupportedError, match="git was not found; install git"):
        await check_git_version(LocalHost(), environment={"PATH": str(tmp_path)})


async def test_a_missing_directory_is_named(runner: GitRunner, tmp_path: Path) -> None:
    with pytest.raises(GitOperationError, match=r"cannot start git: No such file or directory: .*/gone"):
        await runner.run("status", cwd=str(tmp_path / "gone"))


async def test_runners_are_derived_without_changing_the_first(runner: GitRunner) -> None:
    derived = runner.with_environment(EXTRA="1").bind(attempts=7)
    assert (derived.environment["EXTRA"], derived.attempts) == ("1", 7)
    assert ("EXTRA" in runner.environment, runner.attempts) == (False, 3)
    assert shutil.which("git") is not None
