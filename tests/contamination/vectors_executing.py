"""Contaminations that make git run a command: hooks, filters, helpers, drivers, transports. None may ever run."""

from tests.contamination.kit import Scene, register_each, remove, vector

HOOKS = (
    "applypatch-msg", "commit-msg", "fsmonitor-watchman", "post-applypatch", "post-checkout", "post-commit",
    "post-index-change", "post-merge", "post-receive", "post-rewrite", "post-update", "pre-applypatch", "pre-auto-gc",
    "pre-commit", "pre-merge-commit", "pre-push", "pre-rebase", "pre-receive", "prepare-commit-msg", "proc-receive",
    "push-to-checkout", "reference-transaction", "sendemail-validate", "update",
)  # fmt: skip


def _write_hooks(scene: Scene, directory: str) -> None:
    for name in HOOKS:
        scene.write_payload(scene.tree / directory / name)


@vector("executing")
def hooks_of_every_kind(scene: Scene) -> None:
    _write_hooks(scene, ".git/hooks")
    scene.write("README.md", "edited\n")


@vector("executing")
def hooks_path_in_the_tree(scene: Scene) -> None:
    _write_hooks(scene, ".githooks")
    scene.git("config", "core.hooksPath", ".githooks")


@vector("executing")
def hooks_path_outside(scene: Scene) -> None:
    for name in HOOKS:
        scene.payload(name)
    scene.git("config", "core.hooksPath", str(scene.outside / "bin"))


@vector("executing")
def hooks_are_a_link(scene: Scene) -> None:
    for name in HOOKS:
        scene.payload(name)
    (scene.git_dir / "hooks").symlink_to(scene.outside / "bin")


@vector("executing")
def hooks_in_a_nested_repository(scene: Scene) -> None:
    scene.git("init", "-q", "nested")
    _write_hooks(scene, "nested/.git/hooks")
    scene.git("config", "core.fsmonitor", scene.payload("fsmonitor"), cwd=scene.tree / "nested")


@vector("executing")
def fsmonitor(scene: Scene) -> None:
    scene.git("config", "core.fsmonitor", scene.payload("fsmonitor"))
    scene.write("README.md", "edited\n")


def _filter(scene: Scene, key: str) -> None:
    scene.git("config", f"filter.evil.{key}", scene.payload(key))


def _filter_by_info(scene: Scene, key: str) -> None:
    _filter(scene, key)
    scene.append("info/attributes", "* filter=evil\n")
    scene.write("README.md", "edited\n")
    remove(scene.tree / "src/app.py")


def _filter_by_planted_attributes(scene: Scene, key: str) -> None:
    _filter(scene, key)
    for directory in ("", "src/", "docs/"):
        scene.write(f"{directory}.gitattributes", "* filter=evil diff=evil merge=evil\n")
    scene.write("README.md", "edited\n")
    remove(scene.tree / "src/app.py")


for _act, _name in ((_filter_by_info, "filter_{}_by_info"), (_filter_by_planted_attributes, "filter_{}_by_attributes")):
    register_each("executing", ["clean", "smudge", "process"], _act, _name)

COMMANDS = {
    "core.sshCommand": "{}",
    "core.gitProxy": "{}",
    "core.askPass": "{}",
    "core.pager": "{}",
    "core.editor": "{}",
    "core.alternateRefsCommand": "{}",
    "sequence.editor": "{}",
    "pager.status": "{}",
    "credential.helper": "!{}",
    "diff.external": "{}",
    "diff.evil.textconv": "{}",
    "diff.evil.command": "{}",
    "merge.evil.driver": "{}",
    "gpg.program": "{}",
    "gpg.ssh.program": "{}",
    "interactive.diffFilter": "{}",
    "trailer.evil.command": "{}",
    "remote.origin.uploadpack": "{}",
    "remote.origin.receivepack": "{}",
    "uploadpack.packObjectsHook": "{}",
    "gc.recentObjectsHook": "{}",
    "browser.evil.cmd": "{}",
    "url.ext::{} %S.insteadOf": "/",
}


def _command(scene: Scene, key: str) -> None:
    payload = scene.payload("command")
    scene.git("config", key.format(payload), COMMANDS[key].format(payload))
    scene.write(".gitattributes", "* diff=evil merge=evil\n")


register_each("executing", list(COMMANDS), _command, "command_in_{}")


@vector("executing")
def remote_helper(scene: Scene) -> None:
    payload = scene.payload("helper")
    scene.git("config", "remote.origin.url", f"ext::{payload}")
    scene.git("config", "protocol.ext.allow", "always")
    scene.git("config", "remote.origin.vcs", "ext")


@vector("executing")
def fake_promisor_remote(scene: Scene) -> None:
    payload = scene.payload("uploadpack")
    scene.git("config", "core.repositoryFormatVersion", "1")
    scene.git("config", "extensions.partialClone", "evil")
    scene.git("config", "remote.evil.url", scene.origin)
    scene.git("config", "remote.evil.uploadpack", payload)
    scene.git("config", "remote.evil.promisor", "true")
    remove(scene.git_dir / "objects/info/alternates")
    remove(scene.tree / "README.md")


@vector("executing")
def submodule_update_command(scene: Scene) -> None:
    payload = scene.payload("update")
    scene.git("config", "submodule.vendor/lib.url", scene.origin)
    scene.git("config", "submodule.vendor/lib.update", f"!{payload}")
    scene.git("config", "submodule.recurse", "true")
    scene.write(".gitmodules", f'[submodule "vendor/lib"]\n\tpath = vendor/lib\n\turl = .\n\tupdate = !{payload}\n')


@vector("executing")
def maintenance_in_the_background(scene: Scene) -> None:
    scene.git("config", "gc.auto", "1")
    scene.git("config", "maintenance.auto", "true")
    scene.git("config", "maintenance.strategy", "incremental")
    scene.git("config", "gc.autoDetach", "true")
    for number in range(20):
        scene.git("hash-object", "-w", "--stdin", input=f"{number}\n".encode())
    scene.commit()


# -- submodule places ------------------------------------------------------------------------------------------------


@vector("submodules")
def submodule_place_filled(scene: Scene) -> None:
    scene.write("vendor/lib/file")
    scene.write("vendor/lib/deep/file")


@vector("submodules")
def submodule_place_has_a_repository(scene: Scene) -> None:
    place = scene.tree / "vendor/lib"
    scene.git("init", "-q", cwd=place)
    scene.write_payload(place / ".git/hooks/post-checkout")
    scene.git("config", "core.fsmonitor", scene.payload("fsmonitor"), cwd=place)
    scene.write("vendor/lib/file")
    scene.git("add", "-A", cwd=place)


@vector("submodules")
def submodule_place_has_a_gitfile(scene: Scene) -> None:
    scene.write("vendor/lib/.git", f"gitdir: {scene.outside}/repo/.git\n")
    scene.git("config", "core.fsmonitor", scene.payload("fsmonitor"), cwd=scene.outside / "repo")


@vector("submodules")
def submodule_checked_out_dirty_and_poisoned(scene: Scene) -> None:
    scene.git("-c", "protocol.file.allow=always", "submodule", "update", "-q", "--init")
    scene.write("vendor/lib/lib.txt", "edited\n")
    scene.write("vendor/lib/untracked")
    modules = scene.git_dir / "modules/vendor/lib"
    scene.git("config", "core.fsmonitor", scene.payload("fsmonitor"), cwd=modules)
    scene.write_payload(modules / "hooks/post-checkout")


@vector("submodules")
def submodule_place_deleted(scene: Scene) -> None:
    remove(scene.tree / "vendor/lib")


@vector("submodules")
def submodule_place_is_a_link(scene: Scene) -> None:
    scene.replace_by_link("vendor/lib", scene.outside / "repo")


@vector("submodules")
def submodule_place_is_a_file(scene: Scene) -> None:
    remove(scene.tree / "vendor/lib")
    scene.write("vendor/lib", "a file\n")


@vector("submodules")
def submodule_place_locked(scene: Scene) -> None:
    scene.write("vendor/lib/secret")
    (scene.tree / "vendor/lib").chmod(0)


@vector("submodules")
def submodule_added(scene: Scene) -> None:
    url = scene.git("config", "-f", ".gitmodules", "submodule.vendor/lib.url")
    scene.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", url, "vendor/new")


@vector("submodules")
def gitlink_in_place_of_a_directory(scene: Scene) -> None:
    head = scene.git("rev-parse", "HEAD")
    scene.git("rm", "-q", "-r", "--cached", "assets")
    scene.git("update-index", "--add", "--cacheinfo", f"160000,{head},assets")
    scene.git("init", "-q", "assets")
