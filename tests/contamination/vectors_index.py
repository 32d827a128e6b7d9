"""Contaminations of the lessee's index: flags, forms and damage that hide changes or stop git."""

import hashlib
import os

from tests.contamination.kit import Scene, register_each, remove, vector


@vector("index")
def skip_worktree_hides_an_edit(scene: Scene) -> None:
    scene.git("update-index", "--skip-worktree", "README.md", "src/app.py")
    scene.write("README.md", "hidden\n")
    remove(scene.tree / "src/app.py")


@vector("index")
def assume_unchanged_hides_an_edit(scene: Scene) -> None:
    scene.git("update-index", "--assume-unchanged", "README.md", "src/app.py")
    scene.write("README.md", "hidden\n")
    remove(scene.tree / "src/app.py")


@vector("index")
def intent_to_add(scene: Scene) -> None:
    scene.write("intended")
    scene.git("add", "--intent-to-add", "intended")


@vector("index")
def staged_changes(scene: Scene) -> None:
    scene.write("staged")
    scene.write("src/app.py", "staged edit\n")
    scene.git("add", "-A")
    scene.git("rm", "-q", "docs/guide.md")
    scene.git("mv", "README.md", "READ.ME")


@vector("index")
def tracked_files_forgotten(scene: Scene) -> None:
    scene.git("rm", "-q", "-r", "--cached", "src", "README.md")
    scene.write(".gitignore", "src\n")


@vector("index")
def staged_case_conflict(scene: Scene) -> None:
    blob = scene.git("hash-object", "-w", "--stdin", input=b"case\n")
    scene.git("update-index", "--add", "--cacheinfo", f"100644,{blob},readme.md")


@vector("index")
def unmerged_entries(scene: Scene) -> None:
    blob = scene.git("hash-object", "-w", "--stdin", input=b"stage\n")
    lines = "".join(f"100644 {blob} {stage}\tREADME.md\n" for stage in (1, 2, 3))
    scene.git("update-index", "--index-info", input=f"0 {'0' * 40}\tREADME.md\n{lines}".encode())


@vector("index")
def sparse_checkout(scene: Scene) -> None:
    scene.git("sparse-checkout", "set", "--cone", "src")


@vector("index")
def sparse_checkout_by_patterns(scene: Scene) -> None:
    scene.git("sparse-checkout", "set", "--no-cone", "/docs/", "!/docs/link")
    scene.write("README.md", "written where nothing is\n")


@vector("index")
def sparse_index(scene: Scene) -> None:
    scene.git("sparse-checkout", "set", "--cone", "--sparse-index", "docs")


@vector("index")
def split_index(scene: Scene) -> None:
    scene.git("config", "core.splitIndex", "true")
    scene.git("update-index", "--split-index")
    scene.write("split")
    scene.git("add", "split")


def _index_version(scene: Scene, version: str) -> None:
    scene.git("update-index", "--index-version", version)
    scene.write("README.md", "edited\n")


register_each("index", ["3", "4"], _index_version, "index_version_{}")


@vector("index")
def untracked_cache(scene: Scene) -> None:
    scene.git("update-index", "--force-untracked-cache")
    scene.git("status")
    scene.write("src/after-the-cache")


@vector("index")
def fsmonitor_says_nothing_changed(scene: Scene) -> None:
    payload = scene.payload("fsmonitor")
    scene.git("config", "core.fsmonitor", payload)
    scene.git("update-index", "--fsmonitor")
    scene.git("status")
    scene.write("README.md", "edited\n")
    scene.git("update-index", "--fsmonitor-valid", "README.md")


@vector("index")
def forged_stat_data(scene: Scene) -> None:
    """The index says of an edited file that it is the committed one: its entry has the right id and the edit's stat."""
    right = bytes.fromhex(scene.git("rev-parse", "HEAD:README.md"))
    os.utime(scene.write("README.md", "forged\n"), (1_600_000_000, 1_600_000_000))  # not within the index's second
    scene.git("add", "README.md")
    wrong = bytes.fromhex(scene.git("rev-parse", ":README.md"))
    index = scene.git_dir / "index"
    data = index.read_bytes()[:-20].replace(wrong, right)
    index.write_bytes(data + hashlib.sha1(data).digest())
    assert not scene.git("status", "--porcelain", "README.md")


@vector("index")
def index_corrupt(scene: Scene) -> None:
    (scene.git_dir / "index").write_bytes(b"DIRC" + os.urandom(500))


@vector("index")
def index_truncated(scene: Scene) -> None:
    os.truncate(scene.git_dir / "index", 100)


@vector("index")
def index_deleted(scene: Scene) -> None:
    scene.write("README.md", "edited\n")
    (scene.git_dir / "index").unlink()


@vector("index")
def index_with_unknown_extension(scene: Scene) -> None:
    index = scene.git_dir / "index"
    data = index.read_bytes()[:-20] + b"evil" + (4).to_bytes(4) + b"data"
    index.write_bytes(data + hashlib.sha1(data).digest())


@vector("index")
def index_is_a_directory(scene: Scene) -> None:
    remove(scene.git_dir / "index")
    (scene.git_dir / "index/deep").mkdir(parents=True)


@vector("index")
def index_is_a_fifo(scene: Scene) -> None:
    remove(scene.git_dir / "index")
    os.mkfifo(scene.git_dir / "index")


@vector("index")
def index_is_a_link_outside(scene: Scene) -> None:
    target = scene.outside / "dir/index"
    (scene.git_dir / "index").rename(target)
    (scene.git_dir / "index").symlink_to(target)
