"""Contaminations by operations left half done, and by every kind of lock that a killed git leaves."""

import os

from tests.contamination.kit import Scene, register_each, vector


def _diverge(scene: Scene) -> str:
    """Make a branch `side` that conflicts with the one checked out; return its commit."""
    start = scene.git("rev-parse", "HEAD")
    scene.git("checkout", "-q", "-b", "side")
    side = scene.commit("Side", {"README.md": "side\n"})
    scene.git("checkout", "-q", "-b", "mine", start)
    scene.commit("Mine", {"README.md": "mine\n"})
    return side


@vector("operations")
def merge_with_conflict(scene: Scene) -> None:
    _diverge(scene)
    scene.git("merge", "side", check=False)
    assert (scene.git_dir / "MERGE_HEAD").exists()


@vector("operations")
def merge_resolved_but_not_committed(scene: Scene) -> None:
    _diverge(scene)
    scene.git("merge", "-X", "ours", "--no-commit", "side")
    assert (scene.git_dir / "MERGE_HEAD").exists()


@vector("operations")
def merge_with_autostash(scene: Scene) -> None:
    _diverge(scene)
    scene.write("src/app.py", "stashed by the merge\n")
    scene.git("merge", "--autostash", "--no-commit", "side", check=False)
    assert (scene.git_dir / "MERGE_AUTOSTASH").exists()


@vector("operations")
def squash_merge(scene: Scene) -> None:
    _diverge(scene)
    scene.git("merge", "--squash", "-X", "theirs", "side")


@vector("operations")
def rebase_with_conflict(scene: Scene) -> None:
    _diverge(scene)
    scene.git("rebase", "--merge", "side", check=False)
    assert (scene.git_dir / "rebase-merge").exists()


@vector("operations")
def rebase_by_patches_with_conflict(scene: Scene) -> None:
    _diverge(scene)
    scene.git("rebase", "--apply", "side", check=False)
    assert (scene.git_dir / "rebase-apply").exists()


@vector("operations")
def interactive_rebase_that_executes(scene: Scene) -> None:
    start = scene.git("rev-parse", "HEAD")
    scene.commit()
    scene.git("rebase", "--exec", f"{scene.payload('exec')}; false", start, check=False)
    assert (scene.git_dir / "rebase-merge").exists()


@vector("operations")
def am_with_conflict(scene: Scene) -> None:
    side = _diverge(scene)
    patch = scene.git("format-patch", "-1", "--stdout", side)
    scene.git("am", input=(patch + "\n").encode(), check=False)
    assert (scene.git_dir / "rebase-apply").exists()


@vector("operations")
def cherry_pick_with_conflict(scene: Scene) -> None:
    side = _diverge(scene)
    scene.git("cherry-pick", side, check=False)
    assert (scene.git_dir / "CHERRY_PICK_HEAD").exists()


@vector("operations")
def cherry_pick_of_several_stopped(scene: Scene) -> None:
    _diverge(scene)
    scene.git("checkout", "-q", "side")
    scene.commit("More", {"another": "one\n"})
    scene.git("checkout", "-q", "mine")
    scene.git("cherry-pick", "side~1", "side", check=False)
    assert (scene.git_dir / "sequencer").exists()


@vector("operations")
def revert_with_conflict(scene: Scene) -> None:
    first = scene.commit("One", {"README.md": "one\n"})
    scene.commit("Two", {"README.md": "two\n"})
    scene.git("revert", "--no-edit", first, check=False)
    assert (scene.git_dir / "REVERT_HEAD").exists()


@vector("operations")
def bisect(scene: Scene) -> None:
    scene.commit("One", {"one": "1\n"})
    scene.commit("Two", {"two": "2\n"})
    scene.git("bisect", "start", "HEAD", "HEAD~2")
    assert (scene.git_dir / "BISECT_LOG").exists()


@vector("operations")
def notes_merge(scene: Scene) -> None:
    scene.git("notes", "add", "-m", "mine", "HEAD")
    scene.git("notes", "--ref", "other", "add", "-m", "other", "HEAD")
    scene.git("notes", "merge", "other", check=False)
    assert (scene.git_dir / "NOTES_MERGE_REF").exists()


@vector("operations")
def messages_and_heads_left(scene: Scene) -> None:
    commit = scene.forged_commit()
    for name in ("ORIG_HEAD", "FETCH_HEAD", "AUTO_MERGE", "REBASE_HEAD", "CUSTOM_HEAD"):
        (scene.git_dir / name).write_text(f"{commit}\n")
    for name in ("COMMIT_EDITMSG", "MERGE_MSG", "SQUASH_MSG", "gc.log", "description", "secret"):
        (scene.git_dir / name).write_text("secret\n")


LOCKS = (
    "index.lock", "HEAD.lock", "config.lock", "config.worktree.lock", "packed-refs.lock", "packed-refs.new",
    "shallow.lock", "ORIG_HEAD.lock", "gc.pid", "gc.pid.lock", "refs/heads/main.lock", "refs/remotes/origin/main.lock",
    "refs/tags/v1.lock", "refs/stash.lock", "logs/HEAD.lock", "objects/maintenance.lock",
    "objects/info/alternates.lock", "objects/info/commit-graph.lock", "objects/pack/multi-pack-index.lock",
)  # fmt: skip


def _lock(scene: Scene, name: str) -> None:
    path = scene.git_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    scene.write("README.md", "edited under a lock\n")


register_each("locks", LOCKS, _lock, "lock_{}")


@vector("locks")
def all_locks_read_only(scene: Scene) -> None:
    for name in LOCKS:
        _lock(scene, name)
        (scene.git_dir / name).chmod(0)


@vector("locks")
def locks_that_are_directories_and_fifos(scene: Scene) -> None:
    (scene.git_dir / "index.lock/deep").mkdir(parents=True)
    (scene.git_dir / "HEAD.lock").symlink_to(scene.outside / "file")
    os.mkfifo(scene.git_dir / "config.lock")
