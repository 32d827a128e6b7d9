"""Contaminations of the git directory as a whole and of the objects in it."""

import hashlib
import os
import shutil
import zlib
from pathlib import Path

from tests.contamination.kit import Scene, register_each, remove, vector


def _loose(scene: Scene, name: str, data: bytes) -> None:
    path = scene.git_dir / "objects" / name[:2] / name[2:]
    path.parent.mkdir(exist_ok=True)
    remove(path)
    path.write_bytes(data)


def _everything(scene: Scene) -> list[str]:
    return scene.git("rev-list", "--objects", "--no-object-names", "--all").split()


@vector("objects")
def objects_emptied(scene: Scene) -> None:
    for name in _everything(scene):
        _loose(scene, name, b"")


@vector("objects")
def objects_forged(scene: Scene) -> None:
    """Objects of the slot's own, with the names of right ones and other bytes, which git finds before borrowed ones."""
    for name in _everything(scene):
        if scene.git("cat-file", "-t", name) == "blob":
            _loose(scene, name, zlib.compress(b"blob 7\0forged\n"))
    remove(scene.tree / "README.md")


@vector("objects")
def objects_unreadable(scene: Scene) -> None:
    for name in _everything(scene):
        _loose(scene, name, b"")
    for directory in (scene.git_dir / "objects").iterdir():
        directory.chmod(0)
    (scene.git_dir / "objects").chmod(0)


@vector("objects")
def objects_deleted(scene: Scene) -> None:
    remove(scene.git_dir / "objects")


@vector("objects")
def objects_lead_outside(scene: Scene) -> None:
    remove(scene.git_dir / "objects")
    (scene.git_dir / "objects").symlink_to(scene.outside / "repo/.git/objects")


@vector("objects")
def alternates_lead_elsewhere(scene: Scene) -> None:
    (scene.git_dir / "objects/info/alternates").write_text(f"{scene.outside}/repo/.git/objects\n")


@vector("objects")
def alternates_added(scene: Scene) -> None:
    scene.append("objects/info/alternates", f"{scene.outside}/repo/.git/objects\n")
    scene.append("objects/info/http-alternates", "https://example.com/objects\n")


@vector("objects")
def alternates_loop(scene: Scene) -> None:
    (scene.git_dir / "objects/info/alternates").write_text("../../.git/objects\n")


@vector("objects")
def alternates_are_a_fifo(scene: Scene) -> None:
    remove(scene.git_dir / "objects/info/alternates")
    os.mkfifo(scene.git_dir / "objects/info/alternates")


def _own_pack(scene: Scene) -> str:
    """Give the slot a pack of its own with everything, and return its path without the ending."""
    pack = scene.git_dir / "objects/pack/pack"
    name = scene.git("pack-objects", "-q", "--all", str(pack))
    return f"{pack}-{name}"


@vector("objects")
def pack_truncated(scene: Scene) -> None:
    path = _own_pack(scene) + ".pack"
    os.chmod(path, 0o644)
    os.truncate(path, 100)


@vector("objects")
def pack_without_index_and_index_without_pack(scene: Scene) -> None:
    path = _own_pack(scene)
    shutil.copy(path + ".idx", path.replace("pack-", "pack-0") + ".idx")
    os.unlink(path + ".idx")


@vector("objects")
def pack_forged(scene: Scene) -> None:
    """A pack whose index gives a wrong blob the right one's name, checksums and all."""
    right = bytes.fromhex(scene.git("rev-parse", "HEAD:README.md"))
    wrong = scene.git("hash-object", "-w", "--stdin", input=b"forged\n")
    pack = scene.git_dir / "objects/pack/pack"
    path = f"{pack}-{scene.git('pack-objects', '-q', str(pack), input=wrong.encode())}.idx"
    data = bytearray(Path(path).read_bytes())
    fan_out = b"".join((1 if byte >= right[0] else 0).to_bytes(4) for byte in range(256))
    data[8 : 8 + 1024] = fan_out
    data[1032:1052] = right
    os.chmod(path, 0o644)
    with open(path, "wb") as file:
        file.write(data[:-20] + hashlib.sha1(data[:-20]).digest())
    _forget_loose(scene, wrong)
    remove(scene.tree / "README.md")


def _forget_loose(scene: Scene, name: str) -> None:
    remove(scene.git_dir / "objects" / name[:2] / name[2:])


@vector("objects")
def commit_graph_damaged(scene: Scene) -> None:
    scene.git("commit-graph", "write", "--reachable")
    path = scene.git_dir / "objects/info/commit-graph"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = os.urandom(len(data) - len(data) // 2)
    path.write_bytes(data)


@vector("objects")
def multi_pack_index_damaged(scene: Scene) -> None:
    _own_pack(scene)
    scene.git("multi-pack-index", "write")
    path = scene.git_dir / "objects/pack/multi-pack-index"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:200])


@vector("objects")
def repacked_and_pruned(scene: Scene) -> None:
    scene.commit()
    scene.git("repack", "-q", "-a", "-d")
    scene.git("gc", "-q", "--prune=now")


# -- the git directory as a whole --------------------------------------------------------------------------------------


@vector("git directory")
def git_directory_deleted(scene: Scene) -> None:
    remove(scene.git_dir)
    scene.write("README.md", "edited\n")


@vector("git directory")
def git_directory_emptied(scene: Scene) -> None:
    remove(scene.git_dir)
    scene.git_dir.mkdir()


@vector("git directory")
def git_directory_is_a_gitfile(scene: Scene) -> None:
    remove(scene.git_dir)
    scene.git_dir.write_text(f"gitdir: {scene.outside}/repo/.git\n")
    scene.git("config", "core.fsmonitor", scene.payload("fsmonitor"), cwd=scene.outside / "repo")


@vector("git directory")
def git_directory_moved_outside(scene: Scene) -> None:
    target = scene.outside / "dir/moved.git"
    scene.git_dir.rename(target)
    scene.git_dir.write_text(f"gitdir: {target}\n")


@vector("git directory")
def git_directory_is_a_link(scene: Scene) -> None:
    remove(scene.git_dir)
    scene.git_dir.symlink_to(scene.outside / "repo/.git")
    scene.git("config", "core.fsmonitor", scene.payload("fsmonitor"), cwd=scene.outside / "repo")


@vector("git directory")
def git_directory_is_a_link_to_itself(scene: Scene) -> None:
    remove(scene.git_dir)
    scene.git_dir.symlink_to(".git")


@vector("git directory")
def git_directory_is_another_repository(scene: Scene) -> None:
    remove(scene.git_dir)
    shutil.copytree(scene.outside / "repo/.git", scene.git_dir)


@vector("git directory")
def git_directory_is_a_fifo(scene: Scene) -> None:
    remove(scene.git_dir)
    os.mkfifo(scene.git_dir)


def _git_directory_mode(scene: Scene, mode: str) -> None:
    scene.write(".git/secret")
    scene.git_dir.chmod(int(mode, 8))


register_each("git directory", ["0000", "0555"], _git_directory_mode, "git_directory_with_mode_{}")


@vector("git directory")
def git_directory_with_common_directory_elsewhere(scene: Scene) -> None:
    (scene.git_dir / "commondir").write_text(f"{scene.outside}/repo/.git\n")
    (scene.git_dir / "gitdir").write_text(f"{scene.outside}/repo/.git\n")


@vector("git directory")
def git_directory_full_of_things(scene: Scene) -> None:
    for name in ("secret", "hooks/secret", "branches/old", "remotes/evil", "lfs/objects/x", "modules/x/HEAD"):
        scene.write(f".git/{name}")
    os.mkfifo(scene.git_dir / "fifo")
    (scene.git_dir / "link").symlink_to(scene.outside)
    scene.write(".git/locked/secret")
    (scene.git_dir / "locked").chmod(0)


@vector("git directory")
def files_of_the_git_directory_linked_outside(scene: Scene) -> None:
    for name in ("HEAD", "config", "index", "packed-refs"):
        link = scene.outside / f"late/{name}"
        os.link(scene.git_dir / name, link)
        scene.late.append(lambda link=link: link.write_text("written after the return\n"))  # type: ignore[misc]
