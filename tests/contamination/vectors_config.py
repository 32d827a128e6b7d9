"""Contaminations of the configuration that lead git elsewhere or make it blind; what executes is in another file."""

import os

from tests.contamination.kit import Scene, register_each, remove, vector

VALUES = {
    "user.name": "Somebody Else",
    "commit.gpgSign": "true",
    "remote.origin.url": "/nowhere",
    "remote.origin.pushurl": "https://example.com/elsewhere.git",
    "remote.origin.fetch": "+refs/heads/*:refs/heads/*",
    "remote.evil.url": "/nowhere",
    "branch.main.remote": "evil",
    "url./nowhere.insteadOf": "/",
    "url./nowhere.pushInsteadOf": "/",
    "core.bare": "true",
    "core.ignoreCase": "true",
    "core.symlinks": "false",
    "core.autocrlf": "true",
    "core.eol": "crlf",
    "core.excludesFile": "/dev/null",
    "core.quotePath": "false",
    "core.sparseCheckout": "true",
    "core.logAllRefUpdates": "false",
    "core.sharedRepository": "0666",
    "core.useReplaceRefs": "true",
    "core.repositoryFormatVersion": "99",
    "extensions.unknown": "true",
    "extensions.objectFormat": "sha256",
    "extensions.worktreeConfig": "true",
    "submodule.recurse": "true",
    "submodule.active": ".",
    "transfer.hideRefs": "refs",
    "log.showSignature": "true",
    "color.ui": "always",
    "safe.directory": "*",
}


def _set(scene: Scene, key: str) -> None:
    # Written as text: git itself would refuse to read some of these before it writes.
    section, name = key.rsplit(".", 1)
    head, _, subsection = section.partition(".")
    title = f'[{head} "{subsection}"]' if subsection else f"[{head}]"
    scene.append("config", f"{title}\n\t{name} = {VALUES[key]}\n")


register_each("configuration", list(VALUES), _set, "config_{}")


@vector("configuration")
def worktree_leads_outside(scene: Scene) -> None:
    scene.git("config", "core.worktree", str(scene.outside / "dir"))
    scene.write("untracked")


@vector("configuration")
def worktree_leads_to_the_parent(scene: Scene) -> None:
    scene.git("config", "core.worktree", "../..")


@vector("configuration")
def included_file(scene: Scene) -> None:
    (scene.outside / "dir/included").write_text(f"[core]\n\thooksPath = {scene.outside}/bin\n\tbare = true\n")
    scene.payload("post-checkout")
    scene.git("config", "include.path", str(scene.outside / "dir/included"))


@vector("configuration")
def conditionally_included_file(scene: Scene) -> None:
    included = scene.write("included", f"[core]\n\tfsmonitor = {scene.payload('fsmonitor')}\n")
    scene.git("config", f"includeIf.gitdir:{scene.git_dir}.path", str(included))


@vector("configuration")
def configuration_of_the_worktree(scene: Scene) -> None:
    scene.git("config", "extensions.worktreeConfig", "true")
    scene.git("config", "--worktree", "core.fsmonitor", scene.payload("fsmonitor"))
    scene.git("config", "--worktree", "user.name", "Somebody Else")


@vector("configuration")
def aliases(scene: Scene) -> None:
    for name in ("status", "checkout", "st", "co"):
        scene.git("config", f"alias.{name}", f"!{scene.payload('alias')}")


@vector("configuration")
def excludes_of_the_user_kind(scene: Scene) -> None:
    patterns = scene.write(".git/patterns", "*\n")
    scene.git("config", "core.excludesFile", str(patterns))
    scene.write("hidden")


@vector("configuration")
def attributes_of_the_user_kind(scene: Scene) -> None:
    attributes = scene.write(".git/attributes", "* text eol=crlf\n")
    scene.git("config", "core.attributesFile", str(attributes))
    remove(scene.tree / "README.md")


@vector("configuration")
def config_corrupt(scene: Scene) -> None:
    (scene.git_dir / "config").write_bytes(b"[core\n\0" + os.urandom(100))


@vector("configuration")
def config_deleted(scene: Scene) -> None:
    remove(scene.git_dir / "config")


@vector("configuration")
def config_is_a_directory(scene: Scene) -> None:
    remove(scene.git_dir / "config")
    (scene.git_dir / "config/deep").mkdir(parents=True)


@vector("configuration")
def config_is_a_fifo(scene: Scene) -> None:
    remove(scene.git_dir / "config")
    os.mkfifo(scene.git_dir / "config")


@vector("configuration")
def config_is_a_link_outside(scene: Scene) -> None:
    target = scene.outside / "dir/config"
    (scene.git_dir / "config").rename(target)
    (scene.git_dir / "config").symlink_to(target)


# -- info files ----------------------------------------------------------------------------------------------------


@vector("info")
def info_exclude(scene: Scene) -> None:
    scene.append("info/exclude", "*\n!README.md\n")
    scene.write("hidden")
    scene.write("src/hidden")


@vector("info")
def info_attributes(scene: Scene) -> None:
    scene.append("info/attributes", "* text eol=crlf\n*.bin -binary ident\n")
    for name in ("README.md", "data/blob.bin"):
        remove(scene.tree / name)


@vector("info")
def info_sparse_checkout(scene: Scene) -> None:
    scene.git("config", "core.sparseCheckout", "true")
    scene.append("info/sparse-checkout", "/src/\n")
    scene.git("read-tree", "-m", "-u", "HEAD")


@vector("info")
def info_refs_and_packs(scene: Scene) -> None:
    scene.git("update-server-info")


@vector("info")
def info_is_a_fifo(scene: Scene) -> None:
    (scene.git_dir / "info").mkdir(exist_ok=True)
    for name in ("exclude", "attributes", "grafts", "sparse-checkout"):
        (scene.git_dir / "info" / name).unlink(missing_ok=True)
        os.mkfifo(scene.git_dir / "info" / name)
