"""The git verbs act on the directory given, as its user would, and on nothing else."""

import asyncio
import os
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import stamina

from repopool_async._git import GitRunner, base_environment, lessee_environment, split_credentials
from repopool_async.exceptions import (
    ConfigError,
    EmptyRepositoryError,
    GitAccessError,
    GitContentionError,
    GitOperationError,
    GitRefMissingError,
    GitSlotDamagedError,
    PoolManagerError,
    RefError,
    RepositoryUrlError,
)
from repopool_async.git_operations import GitOperations
from repopool_async.hosts.local import LocalHost
from tests.conftest import MakeCommit
from tests.gitserver import serving


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=10, cap=True):
        yield


@pytest.fixture
def git() -> GitOperations:
    return GitOperations()


@pytest.fixture
def clone(tmp_path: Path, origin: Path) -> Path:
    """A plain clone of `origin`, on `main`."""
    path = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(origin), str(path)], check=True)
    return path


def run_git(directory: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(directory), *args], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def names(directory: Path) -> set[str]:
    """What lies in a directory, but for the git directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if ".git" not in path.parts}


# -- clone -------------------------------------------------------------------------------------------------------


async def test_a_clone_is_on_the_remotes_branch(git: GitOperations, origin: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep/down/clone"
    result = await git.clone_repo(str(origin), target)
    assert (result.success, result.attempts) == (True, 1)
    assert await git.get_current_branch(target) == "main"
    assert await git.get_current_commit(target) == run_git(origin, "rev-parse", "main")
    assert run_git(target, "remote", "get-url", "origin") == str(origin)
    assert await git.is_clean_working_tree(target)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("ref", "branch"),
    [("feature/x", "feature/x"), ("v1.0", None), ("refs/heads/feature/x", "feature/x"), ("refs/tags/light", None)],
)
async def test_a_clone_at_a_ref(git: GitOperations, origin: Path, tmp_path: Path, ref: str, branch: str | None) -> None:
    await git.clone_repo(str(origin), tmp_path / "clone", ref=ref)
    assert await git.get_current_branch(tmp_path / "clone") == branch
    assert await git.get_current_commit(tmp_path / "clone") == run_git(origin, "rev-parse", f"{ref}^{{commit}}")
    assert await git.is_clean_working_tree(tmp_path / "clone")


async def test_a_clone_at_a_commit_on_no_branch(
    git: GitOperations, origin: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    first = run_git(origin, "rev-parse", "v1.0^{commit}")
    hidden = make_commit(origin, "gone", {"hidden.txt": b"x\n"})
    run_git(origin, "update-ref", "refs/pull/7/head", hidden)
    run_git(origin, "branch", "-D", "gone")
    for index, (ref, commit) in enumerate([(first, first), ("refs/pull/7/head", hidden), (hidden, hidden)]):
        target = tmp_path / f"clone{index}"
        await git.clone_repo(f"file://{origin}", target, ref=ref)
        assert await git.get_current_commit(target) == commit
        assert await git.get_current_branch(target) is None
        assert await git.is_clean_working_tree(target)


async def test_a_shallow_clone_that_borrows(git: GitOperations, origin: Path, tmp_path: Path) -> None:
    await git.clone_repo(f"file://{origin}", tmp_path / "shallow", depth=1)
    assert run_git(tmp_path / "shallow", "rev-list", "--count", "HEAD") == "1"
    await git.clone_repo(str(origin), tmp_path / "borrower", reference=origin)
    assert str(origin / "objects") in (tmp_path / "borrower/.git/objects/info/alternates").read_text()


async def test_a_failed_clone_leaves_nothing(git: GitOperations, origin: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    for url, ref, kind in [
        (str(tmp_path / "nothing.git"), None, GitAccessError),
        (str(origin), "nothing", GitRefMissingError),
        (str(origin), "refs/heads/nothing", GitRefMissingError),
        (str(origin), "1" * 40, GitRefMissingError),
    ]:
        with pytest.raises(kind):
            await git.clone_repo(url, tmp_path / "clone", ref=ref)
        assert set(tmp_path.iterdir()) == before


async def test_a_clone_never_goes_over_what_is_there(git: GitOperations, origin: Path, tmp_path: Path) -> None:
    target = tmp_path / "clone"
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(GitOperationError, match="is not an empty directory"):
        await git.clone_repo(str(origin), target)
    assert names(target) == {"precious"}
    (target / "precious").unlink()
    await git.clone_repo(str(origin), target)
    assert await git.is_clean_working_tree(target)


async def test_a_place_where_nothing_can_be_made_is_told(git: GitOperations, origin: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GitOperationError, match=r"git clone failed: .*Not a directory"):
        await git.clone_repo(str(origin), tmp_path / "file/deep/clone")
    with pytest.raises(GitOperationError, match=r"exists and is not an empty directory"):
        await git.clone_repo(str(origin), tmp_path / "file")


async def test_a_cancelled_clone_leaves_nothing(git: GitOperations, origin: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.silence.set()
        task = asyncio.get_running_loop().create_task(git.clone_repo(server.url("origin.git"), tmp_path / "clone"))
        await asyncio.to_thread(server.arrived.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert {path.name for path in tmp_path.iterdir()} == {"origin.git"}


async def test_a_clone_keeps_no_password(git: GitOperations, origin: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    with serving(tmp_path, credentials="ada:hunter2") as server:
        url = server.url("origin.git", userinfo="ada:hunter2")
        await git.clone_repo(url, clone)
        assert run_git(clone, "remote", "get-url", "origin") == server.url("origin.git")
        assert subprocess.run(["grep", "-r", "hunter2", str(clone)], check=False).returncode == 1
        with pytest.raises(GitAccessError):
            await git.fetch_all(clone)
        assert (await git.fetch_all(clone, credentials=split_credentials(url)[1])).success
        assert not any(b"hunter2" in line for line in server.command_lines)


async def test_a_clone_is_tried_again(git: GitOperations, origin: Path, tmp_path: Path) -> None:
    with serving(tmp_path, failures=[503, 503]) as server:
        assert (await git.clone_repo(server.url("origin.git"), tmp_path / "clone")).attempts == 3
    assert await git.is_clean_working_tree(tmp_path / "clone")


async def test_an_ssh_connection_that_breaks_is_tried_again(origin: Path, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f'#!/bin/sh\necho x >>{counter}\n[ "$(wc -l <{counter})" -gt 2 ] && exec sh -c "$(eval echo \\${{$#}})"\n'
        "echo 'kex_exchange_identification: Connection closed by remote host' >&2\nexit 255\n"
    )
    ssh.chmod(0o755)
    environment = lessee_environment() | {"GIT_SSH_COMMAND": str(ssh), "GIT_SSH_VARIANT": "ssh"}
    git = GitOperations(runner=GitRunner(LocalHost(), environment=environment))
    assert (await git.clone_repo(f"git@example.org:{origin}", tmp_path / "clone")).attempts == 3
    assert counter.read_text() == "x\n" * 3


async def test_what_cannot_be_cloned_is_refused(git: GitOperations, origin: Path, tmp_path: Path) -> None:
    with pytest.raises(RepositoryUrlError):
        await git.clone_repo("--upload-pack=touch x", tmp_path / "clone")
    with pytest.raises(RepositoryUrlError):
        await git.clone_repo("ext::sh -c id", tmp_path / "clone")
    with pytest.raises(RefError):
        await git.clone_repo(str(origin), tmp_path / "clone", ref="--upload-pack=x")


# -- fetch -------------------------------------------------------------------------------------------------------


async def test_all_remotes_are_fetched_and_pruned(
    git: GitOperations, origin: Path, clone: Path, tmp_path: Path, make_commit: MakeCommit
) -> None:
    for name in ("second", "third"):
        run_git(tmp_path, "clone", "-q", "--bare", str(origin), f"{name}.git")
        run_git(clone, "remote", "add", name, str(tmp_path / f"{name}.git"))
    newest = make_commit(origin, "main", {"new.txt": b"x\n"})
    run_git(origin, "branch", "-D", "feature/x")
    assert (await git.fetch_all(clone)).success
    assert run_git(clone, "rev-parse", "origin/main") == newest
    assert await git.list_remote_branches(clone) == [
        *("origin/main", "second/feature/x", "second/main", "third/feature/x", "third/main"),
    ]
    assert await git.list_remote_branches(clone, "second") == ["second/feature/x", "second/main"]


async def test_stale_branches_stay_where_that_is_wanted(git: GitOperations, origin: Path, clone: Path) -> None:
    run_git(origin, "branch", "-D", "feature/x")
    await git.fetch_all(clone, prune=False)
    assert await git.list_remote_branches(clone) == ["origin/feature/x", "origin/main"]


async def test_many_remotes_side_by_side_do_not_disturb_each_other(
    git: GitOperations, origin: Path, clone: Path, make_commit: MakeCommit
) -> None:
    for index in range(30):
        run_git(origin, "tag", f"t{index}", "main")
    for index in range(6):
        run_git(clone, "remote", "add", f"r{index}", str(origin))
    for index in range(3):
        run_git(origin, "tag", f"round{index}", make_commit(origin, "main", {f"{index}.txt": b"x"}))
        result = await git.fetch_all(clone)
        assert result.attempts == 1
    branches = {run_git(clone, "rev-parse", f"r{index}/main") for index in range(6)}
    assert branches == {run_git(origin, "rev-parse", "main")}


async def test_remotes_that_write_the_same_refs_are_fetched_one_by_one(
    git: GitOperations, origin: Path, clone: Path, tmp_path: Path
) -> None:
    run_git(clone, "remote", "add", "twin", str(origin))
    run_git(clone, "config", "remote.twin.fetch", "+refs/heads/*:refs/remotes/origin/*")
    log, upload_pack = tmp_path / "log", tmp_path / "upload-pack"
    upload_pack.write_text(f'#!/bin/sh\necho begin >>{log}\ngit-upload-pack "$@"\necho end >>{log}\n')
    upload_pack.chmod(0o755)
    for name in ("origin", "twin"):
        run_git(clone, "config", f"remote.{name}.uploadpack", str(upload_pack))
    assert (await git.fetch_all(clone)).success
    assert log.read_text().split() == ["begin", "end"] * 2


async def test_without_remotes_there_is_nothing_to_fetch(git: GitOperations, tmp_path: Path) -> None:
    run_git(tmp_path, "init", "-q", "lonely")
    result = await git.fetch_all(tmp_path / "lonely")
    assert (result.success, result.stdout) == (True, b"")
    assert await git.list_remote_branches(tmp_path / "lonely") == []


async def test_a_remote_that_is_gone_fails_the_fetch(git: GitOperations, clone: Path) -> None:
    run_git(clone, "remote", "add", "gone", "/nowhere/x.git")
    with pytest.raises(GitAccessError, match="does not appear to be a git repository"):
        await git.fetch_all(clone)


# -- clean, reset, checkout --------------------------------------------------------------------------------------


async def test_everything_untracked_goes(git: GitOperations, clone: Path) -> None:
    before = names(clone)
    for name in ("new.txt", "x.log", "build/out/a.o", "a b/c", ".env"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    run_git(clone, "init", "-q", "nested")
    (clone / "nested/file").touch()
    assert not await git.is_clean_working_tree(clone)
    assert (await git.clean(clone)).success
    assert names(clone) == before
    assert await git.is_clean_working_tree(clone, include_ignored=True)


async def test_what_is_kept_stays(git: GitOperations, clone: Path) -> None:
    keep = ["node_modules", "deep/down/cache", "we ird[1]*", "-x", "build", "ü"]
    drop = ["deep/down/other", "weirdx", "sub/node_modules", "x.log"]
    before = names(clone)
    for name in [*keep, *drop]:
        (clone / name).mkdir(parents=True)
        (clone / name / "file").touch()
    await git.clean(clone, keep=[*keep, "absent"])
    kept = {"deep", "deep/down"} | set(keep) | {f"{name}/file" for name in keep}
    assert names(clone) - before == kept


@pytest.mark.parametrize("path", ["/etc", "..", "a/../..", "", ".", "a\nb"])
async def test_nothing_outside_can_be_kept(git: GitOperations, clone: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="cannot be kept"):
        await git.clean(clone, keep=[path])


async def test_tracked_files_are_reset(git: GitOperations, clone: Path) -> None:
    (clone / "README.md").write_text("changed")
    (clone / "src/app.py").unlink()
    run_git(clone, "add", "-A")
    assert (await git.reset_hard(clone)).success
    assert await git.is_clean_working_tree(clone)
    first = run_git(clone, "rev-parse", "v1.0^{commit}")
    await git.reset_hard(clone, "v1.0")
    assert (await git.get_current_commit(clone), await git.get_current_branch(clone)) == (first, "main")
    await git.reset_hard(clone, "origin/main")
    await git.reset_hard(clone, "HEAD~1")
    assert await git.get_current_commit(clone) == first


async def test_checking_out(git: GitOperations, clone: Path) -> None:
    await git.checkout(clone, "feature/x")
    assert await git.get_current_branch(clone) == "feature/x"
    assert run_git(clone, "rev-parse", "--abbrev-ref", "@{upstream}") == "origin/feature/x"
    await git.checkout(clone, "v1.0")
    assert await git.get_current_branch(clone) is None
    await git.checkout(clone, "agent/1", create=True)
    assert await git.get_current_branch(clone) == "agent/1"
    await git.checkout(clone, "agent/2", create=True, start="origin/feature/x")
    assert await git.get_current_commit(clone) == run_git(clone, "rev-parse", "origin/feature/x")
    await git.checkout(clone, run_git(clone, "rev-parse", "main"))
    assert await git.get_current_branch(clone) is None


async def test_a_branch_named_like_a_file_is_the_branch(git: GitOperations, clone: Path) -> None:
    run_git(clone, "branch", "README.md")
    (clone / "README.md").write_text("changed")
    await git.checkout(clone, "README.md", force=True)
    assert await git.get_current_branch(clone) == "README.md"
    run_git(clone, "checkout", "-q", "main")
    (clone / "CHANGES.md").write_text("precious")
    with pytest.raises(GitRefMissingError):
        await git.checkout(clone, "CHANGES.md")
    assert (clone / "CHANGES.md").read_text() == "precious"


async def test_changes_in_the_way_are_kept_unless_forced(git: GitOperations, clone: Path) -> None:
    (clone / "src/data/table.csv").write_text("precious")
    with pytest.raises(GitOperationError, match="commit, stash or discard what is in the way, or use force"):
        await git.checkout(clone, "feature/x")
    assert (clone / "src/data/table.csv").read_text() == "precious"
    await git.checkout(clone, "feature/x", force=True)
    assert await git.is_clean_working_tree(clone)


@pytest.mark.parametrize("ref", ["--orphan=x", "-", "", "a:b", "a b", "@{-1}"])
async def test_arguments_that_are_no_refs_are_refused(git: GitOperations, clone: Path, ref: str) -> None:
    with pytest.raises(RefError):
        await git.checkout(clone, ref)
    with pytest.raises(RefError):
        await git.checkout(clone, ref, create=True)
    with pytest.raises(RefError):
        await git.reset_hard(clone, ref or "-")
    with pytest.raises(RefError):
        await git.list_remote_branches(clone, ref)


async def test_a_ref_that_is_not_there(git: GitOperations, clone: Path) -> None:
    for verb in (git.checkout, git.reset_hard):
        with pytest.raises(GitRefMissingError, match="nothing"):
            await verb(clone, "nothing")


async def test_the_users_own_configuration_and_hooks_are_in_force(
    git: GitOperations, clone: Path, tmp_path: Path
) -> None:
    proof = tmp_path / "proof"
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "post-checkout").write_text(f"#!/bin/sh\npwd >{proof}\n")
    (hooks / "post-checkout").chmod(0o755)
    (tmp_path / "gitconfig").write_text(f"[core]\n\thooksPath = {hooks}\n")
    mine = GitOperations(runner=git.runner.with_environment(GIT_CONFIG_GLOBAL=str(tmp_path / "gitconfig")))
    await mine.checkout(clone, "feature/x")
    assert proof.read_text().strip() == str(clone)


# -- asking ------------------------------------------------------------------------------------------------------


async def test_a_repository_without_commits(git: GitOperations, tmp_path: Path) -> None:
    run_git(tmp_path, "init", "-q", "--initial-branch=trunk", "empty")
    assert await git.get_current_branch(tmp_path / "empty") == "trunk"
    assert await git.is_clean_working_tree(tmp_path / "empty")
    with pytest.raises(EmptyRepositoryError, match="has no commit yet"):
        await git.get_current_commit(tmp_path / "empty")


async def test_what_makes_a_tree_unclean(git: GitOperations, clone: Path) -> None:
    assert await git.is_clean_working_tree(clone)
    (clone / "x.log").touch()
    assert await git.is_clean_working_tree(clone)
    assert not await git.is_clean_working_tree(clone, include_ignored=True)
    (clone / "README.md").write_text("changed")
    assert not await git.is_clean_working_tree(clone)
    run_git(clone, "checkout", "-q", "README.md")
    run_git(clone, "rm", "-q", "--cached", "README.md")
    assert not await git.is_clean_working_tree(clone)


async def test_a_branch_and_a_tag_of_one_name(git: GitOperations, clone: Path) -> None:
    run_git(clone, "tag", "main")
    assert await git.get_current_branch(clone) == "main"


# -- the directory and nothing around it -------------------------------------------------------------------------


async def every_verb(git: GitOperations, directory: Path, kind: type[PoolManagerError]) -> None:
    verbs: list[Callable[[Path], Coroutine[Any, Any, object]]] = [
        *(git.fetch_all, git.clean, git.reset_hard, git.get_current_branch, git.get_current_commit),
        *(git.list_remote_branches, git.is_clean_working_tree, lambda path: git.checkout(path, "main")),
    ]
    for verb in verbs:
        with pytest.raises(kind):
            await verb(directory)


async def test_a_directory_inside_a_repository_is_none(git: GitOperations, clone: Path) -> None:
    inner = clone / "inner"
    inner.mkdir()
    (inner / "precious").touch()
    await every_verb(git, inner, GitSlotDamagedError)
    for broken in ("gitdir: /nowhere", ""):
        (inner / ".git").write_text(broken)
        await every_verb(git, inner, GitSlotDamagedError)
    (inner / ".git").unlink()
    run_git(inner, "init", "-q")
    (inner / ".git/HEAD").unlink()
    await every_verb(git, inner, GitSlotDamagedError)
    assert (inner / "precious").exists()


async def test_a_bare_repository_among_the_files_is_not_used(git: GitOperations, clone: Path, tmp_path: Path) -> None:
    (clone / ".git/HEAD").unlink()
    proof = tmp_path / "proof"
    run_git(clone, "init", "-q", "--bare", str(clone))
    run_git(tmp_path, "config", "--file", str(clone / "config"), "core.fsmonitor", f"touch {proof};")
    await every_verb(git, clone, PoolManagerError)
    assert not proof.exists()


async def test_a_missing_directory_is_told(git: GitOperations, tmp_path: Path) -> None:
    with pytest.raises(GitSlotDamagedError, match=r"/gone is no git checkout .*clone_repo makes one"):
        await git.get_current_commit(tmp_path / "gone")


async def test_variables_of_a_hook_do_not_redirect(clone: Path, origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(origin))
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    assert await GitOperations().is_clean_working_tree(clone)


async def test_a_tree_that_its_configuration_puts_elsewhere_is_not_touched(
    git: GitOperations, clone: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    run_git(clone, "config", "core.worktree", str(elsewhere))
    (clone / "junk").touch()
    await git.clean(clone)
    assert (elsewhere / "precious").exists()
    assert not (clone / "junk").exists()


async def test_linked_work_trees_work(git: GitOperations, clone: Path, tmp_path: Path) -> None:
    run_git(clone, "worktree", "add", "-q", "-b", "linked", str(tmp_path / "linked"))
    (tmp_path / "linked/junk").touch()
    await git.clean(tmp_path / "linked")
    assert await git.get_current_branch(tmp_path / "linked") == "linked"
    assert await git.is_clean_working_tree(tmp_path / "linked")


async def test_a_relative_directory_is_meant_from_here(
    git: GitOperations, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone.parent)
    assert await git.get_current_branch("clone") == "main"


async def test_somebody_elses_repository_is_not_trusted(git: GitOperations, clone: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(clone, 12345, 12345)
    with pytest.raises(GitAccessError, match="belongs to another user"):
        await git.is_clean_working_tree(clone)


async def test_a_lock_that_goes_is_waited_for_and_one_that_stays_is_told(git: GitOperations, clone: Path) -> None:
    lock = clone / ".git/index.lock"
    lock.touch()
    with pytest.raises(GitContentionError, match=r"after 3 attempts: .*index\.lock"):
        await git.reset_hard(clone)
    patient = GitOperations(runner=git.runner.bind(on_retry=lambda _error, _seconds: lock.unlink()))
    assert (await patient.reset_hard(clone)).attempts == 2


async def test_a_runner_of_the_pool_can_be_given(clone: Path) -> None:
    runner = GitRunner(LocalHost(), environment=base_environment())
    git = GitOperations(runner=runner)
    assert git.runner is runner
    assert await git.is_clean_working_tree(clone)
    assert repr(git) == f"<GitOperations on {runner.host.id}>"
