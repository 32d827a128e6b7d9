"""Contaminations of the tree by ordinary means: files, directories and links that come, go and change."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

from tests.contamination.kit import Scene, register_each, remove, vector

# -- what git does not track ---------------------------------------------------------------------------------------


@vector("files")
def untracked_file(scene: Scene) -> None:
    scene.write("untracked.txt")


@vector("files")
def untracked_files_in_tracked_directories(scene: Scene) -> None:
    for directory in ("src", "src/pkg/deep", "docs", "assets"):
        scene.write(f"{directory}/untracked.txt")


@vector("files")
def untracked_directories(scene: Scene) -> None:
    for number in range(200):
        scene.write(f"node_modules/package{number % 20}/file{number}.js")


@vector("files")
def ignored_files(scene: Scene) -> None:
    for name in (".env", "debug.log", "src/debug.log", "build/out/artifact", "src/build/artifact"):
        scene.write(name, "SECRET=1\n")


@vector("files")
def planted_gitignore_hides_everything(scene: Scene) -> None:
    scene.write("hidden/.gitignore", "*\n")
    scene.write("hidden/secret")
    scene.write("src/.gitignore", "*\n")
    scene.write("src/secret")


@vector("files")
def tracked_gitignore_edited(scene: Scene) -> None:
    scene.write(".gitignore", "*\n")
    scene.write("secret")


@vector("files")
def empty_directories(scene: Scene) -> None:
    for name in ("empty", "src/empty", "src/pkg/deep/empty/chain/of/them", "build"):
        (scene.tree / name).mkdir(parents=True)


@vector("files")
def sparse_file_of_a_terabyte(scene: Scene) -> None:
    with scene.write("huge").open("r+b") as file:
        file.truncate(1 << 40)


# -- repositories --------------------------------------------------------------------------------------------------


def _repository(scene: Scene, name: str) -> Path:
    path = scene.tree / name
    path.mkdir(parents=True, exist_ok=True)
    scene.git("init", "-q", cwd=path)
    (path / "nested.txt").write_text("nested\n")
    scene.git("add", "nested.txt", cwd=path)
    scene.git("commit", "-qm", "Nested", cwd=path)
    return path


@vector("repositories")
def nested_repository(scene: Scene) -> None:
    _repository(scene, "nested")
    _repository(scene, "deep/in/untracked")


@vector("repositories")
def nested_repository_in_tracked_directory(scene: Scene) -> None:
    _repository(scene, "src/pkg")


@vector("repositories")
def nested_repository_hides_edits(scene: Scene) -> None:
    scene.write("src/app.py", "edited\n")
    scene.git("init", "-q", cwd=scene.tree / "src")
    scene.write("src/untracked")


@vector("repositories")
def nested_repository_in_a_nested_one(scene: Scene) -> None:
    _repository(scene, "docs/outer")
    _repository(scene, "docs/outer/inner")


@vector("repositories")
def nested_bare_repository(scene: Scene) -> None:
    scene.git("init", "-q", "--bare", "bare.git")
    scene.git("init", "-q", "--bare", "src/bare")


@vector("repositories")
def gitfile_in_tracked_directory(scene: Scene) -> None:
    scene.write("src/.git", f"gitdir: {scene.outside}/repo/.git\n")
    scene.write("src/untracked")


@vector("repositories")
def link_called_git_in_tracked_directory(scene: Scene) -> None:
    (scene.tree / "src/.git").symlink_to(scene.outside / "repo/.git")
    scene.write("src/untracked")


@vector("repositories")
def empty_git_directories_below_the_root(scene: Scene) -> None:
    for name in ("src/.git", "src/pkg/.git", "new/.git"):
        (scene.tree / name).mkdir(parents=True)


@vector("repositories")
def linked_worktree_in_the_tree(scene: Scene) -> None:
    scene.git("worktree", "add", "-q", "-b", "linked", "src/linked")


@vector("repositories")
def linked_worktree_outside(scene: Scene) -> None:
    scene.git("worktree", "add", "-q", "--detach", str(scene.outside / "linked"))


# -- modes -----------------------------------------------------------------------------------------------------------


def _untracked_directory_with_mode(scene: Scene, mode: str) -> None:
    for directory in ("locked", "src/locked"):
        scene.write(f"{directory}/inner/secret")
        for name in (f"{directory}/inner", directory):
            (scene.tree / name).chmod(int(mode, 8))


register_each("modes", ["0000", "0111", "0555"], _untracked_directory_with_mode, "untracked_directory_with_mode_{}")


def _tracked_directory_with_mode(scene: Scene, mode: str) -> None:
    for name in ("src/pkg", "src", "docs"):
        (scene.tree / name).chmod(int(mode, 8))


register_each(
    "modes", ["0000", "0555", "0700", "0777", "1755", "2755"], _tracked_directory_with_mode,
    "tracked_directory_with_mode_{}",
)  # fmt: skip


def _root_with_mode(scene: Scene, mode: str) -> None:
    scene.write("untracked")
    scene.tree.chmod(int(mode, 8))


register_each("modes", ["0000", "0555", "0777", "2755"], _root_with_mode, "root_with_mode_{}")


@vector("modes")
def everything_made_read_only(scene: Scene) -> None:
    scene.write("src/app.py", "edited\n")
    scene.write("locked/untracked")
    for directory, _, names in os.walk(scene.tree, topdown=False):
        for name in names:
            if not (Path(directory) / name).is_symlink():
                (Path(directory) / name).chmod(0o444)
        Path(directory).chmod(0o555)


@vector("modes")
def executable_bits_changed(scene: Scene) -> None:
    (scene.tree / "README.md").chmod(0o755)
    (scene.tree / "bin/tool.sh").chmod(0o644)


@vector("modes")
def executable_bits_ignored_by_configuration(scene: Scene) -> None:
    scene.git("config", "core.fileMode", "false")
    (scene.tree / "README.md").chmod(0o755)


def _file_mode(scene: Scene, mode: str) -> None:
    (scene.tree / "README.md").chmod(int(mode, 8))
    (scene.tree / "src/app.py").chmod(int(mode, 8))


register_each("modes", ["0000", "0600", "0666", "1644", "2755", "4755"], _file_mode, "tracked_file_with_mode_{}")

# -- edits that do not show ------------------------------------------------------------------------------------------


@vector("edits")
def tracked_files_edited(scene: Scene) -> None:
    scene.write("README.md", "edited\n")
    scene.write("data/blob.bin", b"\0")
    scene.write("src/pkg/__init__.py", "no longer empty\n")


@vector("edits")
def same_size_same_time_edit_in_place(scene: Scene) -> None:
    for name in ("README.md", "src/app.py", "data/text.dos", "docs/guide.md"):
        scene.edit_keeping_times(name)


@vector("edits")
def same_size_same_time_edit_hidden_by_configuration(scene: Scene) -> None:
    scene.git("config", "core.trustctime", "false")
    scene.git("config", "core.checkStat", "minimal")
    scene.edit_keeping_times("README.md")


@vector("edits")
def same_size_same_time_replacement(scene: Scene) -> None:
    path = scene.tree / "README.md"
    copy = scene.tree / "copy"
    shutil.copy2(path, copy)
    scene.edit_keeping_times("copy")
    copy.rename(path)


@vector("edits")
def edited_in_the_future_and_the_past(scene: Scene) -> None:
    for name, seconds in (("README.md", 1 << 33), ("src/app.py", 0), ("docs/guide.md", 1_000_000_000)):
        scene.write(name, "edited\n")
        os.utime(scene.tree / name, (seconds, seconds))


def _older_twins(scene: Scene) -> None:
    twins = scene.outside / "twins"
    subprocess.run(["git", "clone", "-q", scene.origin, twins], check=True, env=scene.environment)
    for name in ("src/app.py", "src/pkg/deep/er/leaf.txt", "README.md"):
        path = twins / name
        path.write_bytes(b"X" + path.read_bytes()[1:])


@vector("edits", before=_older_twins)
def directories_older_than_the_seal_moved_in(scene: Scene) -> None:
    for name in ("src", "docs"):
        remove(scene.tree / name)
        (scene.outside / "twins" / name).rename(scene.tree / name)


@vector("edits", before=_older_twins)
def deep_directory_older_than_the_seal_moved_in(scene: Scene) -> None:
    remove(scene.tree / "src/pkg/deep")
    (scene.outside / "twins/src/pkg/deep").rename(scene.tree / "src/pkg/deep")


@vector("edits", before=_older_twins)
def file_older_than_the_seal_moved_in(scene: Scene) -> None:
    (scene.outside / "twins/README.md").rename(scene.tree / "README.md")


# -- links -----------------------------------------------------------------------------------------------------------


@vector("links")
def link_in_place_of_tracked_directory(scene: Scene) -> None:
    copy = scene.outside / "dir/src"
    shutil.copytree(scene.tree / "src", copy)
    scene.replace_by_link("src", copy)


@vector("links")
def link_in_place_of_nested_directory(scene: Scene) -> None:
    copy = scene.outside / "dir/deep"
    shutil.copytree(scene.tree / "src/pkg/deep", copy)
    (copy / "er/untracked").write_text("must stay\n")
    scene.replace_by_link("src/pkg/deep", copy)


@vector("links")
def link_in_place_of_directory_with_only_a_submodule(scene: Scene) -> None:
    (scene.outside / "dir/lib").mkdir()
    (scene.outside / "dir/lib/precious").write_text("must stay\n")
    scene.replace_by_link("vendor", scene.outside / "dir")


@vector("links")
def link_in_place_of_tracked_file(scene: Scene) -> None:
    scene.replace_by_link("README.md", scene.outside / "file")
    scene.replace_by_link("docs/guide.md", "../src/app.py")


@vector("links")
def tracked_link_points_elsewhere(scene: Scene) -> None:
    scene.replace_by_link("docs/link", scene.outside / "file")


@vector("links")
def file_in_place_of_tracked_link(scene: Scene) -> None:
    remove(scene.tree / "docs/link")
    scene.write("docs/link", "../README.md")


@vector("links")
def links_out_of_the_tree(scene: Scene) -> None:
    for name, target in (("root", "/"), ("up", ".."), ("out", str(scene.outside)), ("dangling", "/nowhere")):
        (scene.tree / name).symlink_to(target)
        (scene.tree / "src" / name).symlink_to(target)


@vector("links")
def link_loops(scene: Scene) -> None:
    (scene.tree / "loop").symlink_to("loop")
    scene.replace_by_link("src/pkg", "../docs")
    scene.replace_by_link("docs", "src")


def _link_in_place_of_what_git_reads(scene: Scene, name: str) -> None:
    os.mkfifo(scene.outside / "fifo")
    scene.replace_by_link(name, scene.outside / "fifo")


register_each(
    "links", [".gitignore", ".gitattributes", ".gitmodules"], _link_in_place_of_what_git_reads, "link_to_fifo_as{}"
)


# -- special files ---------------------------------------------------------------------------------------------------


@vector("special files")
def fifos(scene: Scene) -> None:
    for name in ("fifo", "src/fifo", "docs/pipe"):
        os.mkfifo(scene.tree / name)


@vector("special files")
def sockets(scene: Scene) -> None:
    for directory in ("", "src"):
        # The path of a socket is short; only the directory's own is not.
        os.symlink(scene.tree / directory, short := f"/tmp/repopool-{os.getpid()}")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"{short}/socket")
        os.unlink(short)


def _fifo_as(scene: Scene, name: str) -> None:
    remove(scene.tree / name)
    (scene.tree / name).parent.mkdir(exist_ok=True)
    os.mkfifo(scene.tree / name)


PLACES_OF_FIFOS = (
    ".gitignore", ".gitattributes", ".gitmodules", "src/.gitignore", "src/.gitattributes", "README.md", "src",
    "src/.git", "vendor/lib", "vendor/lib/.git", "new/.git", "new/.gitattributes",
)  # fmt: skip
register_each("special files", PLACES_OF_FIFOS, _fifo_as, "fifo_as_{}")


@vector("special files", needs_root=True)
def devices(scene: Scene) -> None:
    os.mknod(scene.tree / "zero", 0o666 | 0o020000, os.makedev(1, 5))
    remove(scene.tree / "src/app.py")
    os.mknod(scene.tree / "src/app.py", 0o666 | 0o020000, os.makedev(1, 5))


# -- hard links ------------------------------------------------------------------------------------------------------


@vector("hard links")
def hard_link_kept_outside_and_written_later(scene: Scene) -> None:
    for number, name in enumerate(("README.md", "src/pkg/core.py")):
        link = scene.outside / f"late/{number}"
        os.link(scene.tree / name, link)
        scene.late.append(lambda link=link: link.write_text("written after the return\n"))  # type: ignore[misc]


@vector("hard links")
def hard_link_from_outside_in_place_of_tracked_file(scene: Scene) -> None:
    remove(scene.tree / "README.md")
    os.link(scene.outside / "file", scene.tree / "README.md")
    os.link(scene.outside / "file", scene.tree / "untracked")
    os.link(scene.outside / "file", scene.tree / "docs/untracked")


@vector("hard links")
def hard_links_within_the_tree(scene: Scene) -> None:
    os.link(scene.tree / "README.md", scene.tree / "untracked")
    remove(scene.tree / "src/app.py")
    os.link(scene.tree / "src/pkg/core.py", scene.tree / "src/app.py")


@vector("hard links")
def hard_link_made_and_removed_again(scene: Scene) -> None:
    os.link(scene.tree / "README.md", scene.tree / "untracked")
    (scene.tree / "untracked").write_text("through the link\n")
    (scene.tree / "untracked").unlink()


# -- what is missing or of another kind --------------------------------------------------------------------------------


@vector("kinds")
def tracked_files_deleted(scene: Scene) -> None:
    for name in ("README.md", "src/pkg/core.py", "docs/link", ".gitignore"):
        remove(scene.tree / name)


@vector("kinds")
def tracked_directories_deleted(scene: Scene) -> None:
    for name in ("src", "assets", "vendor"):
        remove(scene.tree / name)


@vector("kinds")
def everything_but_git_deleted(scene: Scene) -> None:
    for path in scene.tree.iterdir():
        if path.name != ".git":
            remove(path)


@vector("kinds")
def directory_in_place_of_tracked_file(scene: Scene) -> None:
    remove(scene.tree / "README.md")
    scene.write("README.md/inside/deep")
    remove(scene.tree / "src/app.py")
    (scene.tree / "src/app.py").mkdir()


@vector("kinds")
def file_in_place_of_tracked_directory(scene: Scene) -> None:
    remove(scene.tree / "src")
    scene.write("src")


@vector("kinds")
def directories_swapped(scene: Scene) -> None:
    (scene.tree / "src").rename(scene.tree / "swap")
    (scene.tree / "docs").rename(scene.tree / "src")
    (scene.tree / "swap").rename(scene.tree / "docs")


@vector("kinds")
def tracked_files_swapped(scene: Scene) -> None:
    (scene.tree / "src/app.py").rename(scene.tree / "swap")
    (scene.tree / "src/pkg/core.py").rename(scene.tree / "src/app.py")
    (scene.tree / "swap").rename(scene.tree / "src/pkg/core.py")


# -- what a check-out believes -----------------------------------------------------------------------------------------


@vector("edits")
def planted_attributes_change_line_ends(scene: Scene) -> None:
    for directory in ("", "src/", "docs/"):
        scene.write(f"{directory}.gitattributes", "* text eol=crlf ident working-tree-encoding=UTF-16\n")
    for name in ("README.md", "src/app.py", "docs/guide.md"):
        remove(scene.tree / name)


@vector("edits")
def attributes_edited_and_line_ends_converted(scene: Scene) -> None:
    scene.write(".gitattributes", "* text eol=crlf\n")
    scene.git("config", "core.autocrlf", "true")
    remove(scene.tree / ".git/index")
    scene.git("reset", "--hard", "-q", check=False)
    scene.git("add", "--renormalize", ".", check=False)
