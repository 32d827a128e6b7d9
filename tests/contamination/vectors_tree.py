"""Contaminations of the tree as a whole, of what inodes carry besides bytes, by mounts, and by processes."""

import array
import fcntl
import os
import shutil
import stat
import subprocess
from pathlib import Path

from tests.contamination.kit import Scene, can_run, python, register_each, remove, vector

# -- the tree itself -----------------------------------------------------------------------------------------------


@vector("tree")
def tree_deleted(scene: Scene) -> None:
    remove(scene.tree)


@vector("tree")
def tree_moved_away(scene: Scene) -> None:
    scene.tree.rename(scene.outside / "dir/tree")


@vector("tree")
def tree_replaced_by_an_empty_directory(scene: Scene) -> None:
    remove(scene.tree)
    scene.tree.mkdir()


@vector("tree")
def tree_replaced_by_its_copy(scene: Scene) -> None:
    copy = scene.outside / "dir/copy"
    shutil.copytree(scene.tree, copy, symlinks=True)
    (copy / "README.md").write_text("edited in the copy\n")
    remove(scene.tree)
    copy.rename(scene.tree)


@vector("tree")
def tree_replaced_by_another_clone(scene: Scene) -> None:
    remove(scene.tree)
    subprocess.run(["git", "clone", "-q", "-b", "feature", scene.origin, scene.tree], check=True, env=scene.environment)


@vector("tree")
def tree_replaced_by_a_link(scene: Scene) -> None:
    scene.tree.rename(scene.outside / "dir/tree")
    scene.tree.symlink_to(scene.outside / "dir/tree")


@vector("tree")
def tree_replaced_by_a_link_to_a_repository(scene: Scene) -> None:
    remove(scene.tree)
    scene.tree.symlink_to(scene.outside / "repo")


def _tree_is(scene: Scene, kind: str) -> None:
    remove(scene.tree)
    if kind == "fifo":
        os.mkfifo(scene.tree)
    else:
        scene.tree.write_text("a file\n")


register_each("tree", ["file", "fifo"], _tree_is, "tree_is_a_{}")


@vector("tree")
def tree_moved_away_and_back(scene: Scene) -> None:
    away = scene.outside / "dir/away"
    scene.tree.rename(away)
    (away / "README.md").write_text("edited away\n")
    away.rename(scene.tree)


# -- attributes ------------------------------------------------------------------------------------------------------


PLACES = ("README.md", "src/pkg", ".", "src/app.py")


def _extended_attribute(scene: Scene, place: str) -> None:
    os.setxattr(scene.tree / place, "user.secret", b"contaminated")


register_each("attributes", PLACES, _extended_attribute, "extended_attribute_on_{}")

_ACL = bytes.fromhex("02000000 01000700ffffffff 02000700e8030000 04000500ffffffff 10000700ffffffff 20000500ffffffff")
"""user::rwx user:1000:rwx group::r-x mask::rwx other::r-x, as the kernel stores it."""


def _access_list(scene: Scene, place: str) -> None:
    os.setxattr(scene.tree / place, "system.posix_acl_access", _ACL)


register_each("attributes", PLACES[:3], _access_list, "access_list_on_{}")


def _default_access_list(scene: Scene, place: str) -> None:
    os.setxattr(scene.tree / place, "system.posix_acl_default", _ACL)
    scene.write(f"{place}/untracked/file")
    remove(scene.tree / "src/app.py")
    remove(scene.tree / "src/pkg/core.py")


register_each("attributes", ["src", "src/pkg", "."], _default_access_list, "default_access_list_on_{}")

_NO_DUMP, _NO_ACCESS_TIME, _IMMUTABLE, _APPEND = 0x40, 0x80, 0x10, 0x20


def _set_flags(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        value = array.array("l", [0])
        fcntl.ioctl(descriptor, 0x80086601, value, True)
        value[0] = (value[0] & ~(_NO_DUMP | _NO_ACCESS_TIME | _IMMUTABLE | _APPEND)) | flags
        fcntl.ioctl(descriptor, 0x40086602, value)
    finally:
        os.close(descriptor)


def _clear_flags(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        value = array.array("l", [0])
        fcntl.ioctl(descriptor, 0x80086601, value, True)
        if value[0] & (_IMMUTABLE | _APPEND):
            value[0] &= ~(_IMMUTABLE | _APPEND)
            fcntl.ioctl(descriptor, 0x40086602, value)
    finally:
        os.close(descriptor)


def _inode_flags(scene: Scene, place: str) -> None:
    _set_flags(scene.tree / place, _NO_DUMP | _NO_ACCESS_TIME)


register_each("attributes", PLACES[:3], _inode_flags, "inode_flags_on_{}")


def _unchangeable(scene: Scene, place: Path, flags: int) -> None:
    """Set flags that stop even root, until the trial is over."""
    _set_flags(place, flags)

    def undo() -> None:
        for directory, _, names in os.walk(scene.outside.parent):
            for path in (Path(directory), *(Path(directory) / name for name in names)):
                if stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFDIR, stat.S_IFREG):
                    _clear_flags(path)

    scene.undo.append(undo)


@vector("attributes", needs_root=True, leaves_trash=True)
def immutable_file(scene: Scene) -> None:
    scene.write("README.md", "edited\n")
    _unchangeable(scene, scene.tree / "README.md", _IMMUTABLE)


@vector("attributes", needs_root=True, leaves_trash=True)
def append_only_untracked_file(scene: Scene) -> None:
    _unchangeable(scene, scene.write("src/untracked"), _APPEND)


@vector("attributes", needs_root=True, leaves_trash=True)
def immutable_directory(scene: Scene) -> None:
    scene.write("src/untracked")
    _unchangeable(scene, scene.tree / "src", _IMMUTABLE)


@vector("attributes", needs_root=True, leaves_trash=True, quarantine="such a directory cannot be renamed by anybody")
def immutable_root(scene: Scene) -> None:
    scene.write("untracked")
    _unchangeable(scene, scene.tree, _IMMUTABLE)


@vector("attributes", needs_root=True)
def given_to_another_user(scene: Scene) -> None:
    for name in ("README.md", "src", "src/pkg/core.py", "."):
        os.chown(scene.tree / name, 12345, 12345)
    os.chown(scene.write("untracked/file"), 12345, 12345)


@vector("attributes", needs_root=True)
def directory_given_to_another_user(scene: Scene) -> None:
    os.chown(scene.tree / "src/pkg", 12345, -1)


@vector("attributes", needs_root=True)
def file_capability(scene: Scene) -> None:
    capability = bytes.fromhex("0100000202200000000000000000000000000000")
    os.setxattr(scene.tree / "bin/tool.sh", "security.capability", capability)


# -- mounts ----------------------------------------------------------------------------------------------------------


def _mount(scene: Scene, target: Path, *arguments: str) -> None:
    if subprocess.run(["mount", *arguments, target], check=False, capture_output=True).returncode != 0:
        return  # not even root may, in this container

    def undo() -> None:
        # Where it is by now, only the kernel knows.
        text = Path("/proc/self/mountinfo").read_text()
        points = [
            line.split()[4] for line in text.splitlines() if line.split()[4].startswith(str(scene.outside.parent))
        ]
        for point in reversed(points):
            subprocess.run(["umount", "-l", point.encode().decode("unicode_escape")], check=True)

    scene.undo.append(undo)


@vector("mounts", needs_root=True, leaves_trash=True)
def mounted_on_an_untracked_directory(scene: Scene) -> None:
    (scene.tree / "mounted").mkdir()
    _mount(scene, scene.tree / "mounted", "--bind", str(scene.outside / "dir"))


@vector("mounts", needs_root=True, leaves_trash=True)
def mounted_on_a_tracked_directory(scene: Scene) -> None:
    _mount(scene, scene.tree / "src", "--bind", str(scene.outside / "dir"))


@vector("mounts", needs_root=True, leaves_trash=True)
def mounted_on_a_tracked_file(scene: Scene) -> None:
    _mount(scene, scene.tree / "README.md", "--bind", str(scene.outside / "file"))


@vector("mounts", needs_root=True, leaves_trash=True)
def another_file_system_in_the_tree(scene: Scene) -> None:
    _mount(scene, scene.tree / "src/pkg", "-t", "tmpfs", "tmpfs")
    scene.write("src/pkg/core.py", "in the other file system\n")


@vector("mounts", needs_root=True, leaves_trash=True)
def mounted_on_the_git_directory(scene: Scene) -> None:
    _mount(scene, scene.git_dir, "--bind", str(scene.outside / "repo/.git"))


@vector("mounts", needs_root=True, leaves_trash=True, quarantine="nobody can rename what is mounted on")
def mounted_on_the_tree(scene: Scene) -> None:
    _mount(scene, scene.tree, "--bind", str(scene.outside / "repo"))


# -- processes -------------------------------------------------------------------------------------------------------


_WRITES_FOR_EVER = """
ready()
count = 0
while True:
    count += 1
    for name in ('late.txt', 'src/late.txt', 'README.md'):
        try:
            with open(name, 'w') as file:
                file.write(f'late {count}')
        except OSError:
            pass
    if os.path.exists(BASE + '.told'):
        done()
        break
    time.sleep(0.001)
"""


@vector("processes")
def process_left_writing(scene: Scene) -> None:
    scene.leave(_WRITES_FOR_EVER)


@vector("processes")
def unmarked_process_left_writing(scene: Scene) -> None:
    scene.leave(_WRITES_FOR_EVER, is_scrubbed=True)


@vector("processes")
def process_left_that_ignores_signals(scene: Scene) -> None:
    ignore = "".join(f"signal.signal(signal.{name}, signal.SIG_IGN)\n" for name in ("SIGTERM", "SIGINT", "SIGHUP"))
    scene.leave(ignore + _WRITES_FOR_EVER)


@vector("processes")
def process_left_stopped(scene: Scene) -> None:
    scene.leave("ready()\nos.kill(os.getpid(), signal.SIGSTOP)\n" + _WRITES_FOR_EVER)


@vector("processes")
def process_left_in_the_tree(scene: Scene) -> None:
    scene.leave("os.chdir('src/pkg')\nready()\ntold()\nopen('late.txt', 'w').write('late')\ndone()\n", is_scrubbed=True)


_WRITES_LATER = "ready()\ntold()\nos.write(descriptor, b'late')\nos.fsync(descriptor)\ndone()\n"


@vector("processes")
def open_file_written_later(scene: Scene) -> None:
    open_it = f"descriptor = os.open({str(scene.tree / 'README.md')!r}, os.O_WRONLY)\n"
    scene.leave(open_it + _WRITES_LATER, is_scrubbed=True, cwd=Path("/"))


@vector("processes")
def open_directory_written_into_later(scene: Scene) -> None:
    script = f"""
descriptor = os.open({str(scene.tree / "src")!r}, os.O_PATH | os.O_DIRECTORY)
ready()
told()
os.close(os.open('late.txt', os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
done()
"""
    scene.leave(script, is_scrubbed=True, cwd=Path("/"))


@vector("processes")
def mapped_file_written_later(scene: Scene) -> None:
    script = f"""
descriptor = os.open({str(scene.tree / "README.md")!r}, os.O_RDWR)
memory = mmap.mmap(descriptor, 0)
os.closerange(descriptor, 100)  # the map's own copy of the descriptor too
ready()
told()
memory[:4] = b'late'
memory.flush()
done()
"""
    scene.leave(script, is_scrubbed=True, cwd=Path("/"))


def _contained(scene: Scene, *namespaces: str) -> None:
    """Leave a process that sees the tree only as something mounted elsewhere, as a container's do."""
    mount = f"mount --bind '{scene.tree}' /mnt && exec \"$@\""
    scene.leave(
        "ready()\ntold()\nopen('/mnt/late.txt', 'w').write('late')\ndone()\n",
        is_scrubbed=True,
        cwd=Path("/"),
        wrapper=("unshare", *namespaces, "sh", "-c", mount, "sh"),
    )


@vector("processes", needs_root=True)
def container_with_the_tree_mounted(scene: Scene) -> None:
    if can_run("unshare", "--mount", "mount", "--bind", "/", "/mnt"):
        _contained(scene, "--mount")


@vector("processes")
def rootless_container_with_the_tree_mounted(scene: Scene) -> None:
    if can_run("unshare", "--user", "--map-root-user", "--mount", "mount", "--bind", "/tmp", "/mnt"):
        _contained(scene, "--user", "--map-root-user", "--mount")


@vector("processes")
def file_of_the_git_directory_written_later(scene: Scene) -> None:
    open_it = f"descriptor = os.open({str(scene.git_dir / 'config')!r}, os.O_WRONLY | os.O_APPEND)\n"
    scene.leave(open_it + _WRITES_LATER, is_scrubbed=True, cwd=Path("/"))


@vector("processes")
def secretive_process_written_later(scene: Scene) -> None:
    """A process that has made itself undumpable shows an ordinary user neither files nor environment."""
    script = f"""
import ctypes
descriptor = os.open({str(scene.tree / "README.md")!r}, os.O_WRONLY)
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
"""
    scene.leave(script + _WRITES_LATER, is_scrubbed=True, cwd=Path("/"))


@vector("processes")
def marked_secretive_process(scene: Scene) -> None:
    scene.leave("import ctypes\nctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\n" + _WRITES_FOR_EVER)


@vector("processes")
def process_that_is_born_again(scene: Scene) -> None:
    script = """
def again(*_):
    if os.fork() == 0:
        os.setsid()
        return
    os._exit(0)
signal.signal(signal.SIGTERM, again)
"""
    scene.leave(script + _WRITES_FOR_EVER)


@vector("processes")
def file_lease_held(scene: Scene) -> None:
    """Whoever opens a file with a lease waits for its holder, up to 45 seconds."""
    script = f"""
import fcntl
descriptor = os.open({str(scene.tree / "README.md")!r}, os.O_RDWR)
signal.signal(signal.SIGIO, signal.SIG_IGN)
fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
fcntl.flock(descriptor, fcntl.LOCK_EX)
"""
    scene.leave(script + _WRITES_LATER, is_scrubbed=True, cwd=Path("/"))


@vector("processes")
def background_job_of_a_shell(scene: Scene) -> None:
    job = "for n in $(seq 500); do echo late > late.txt; sleep 0.01; done 2>/dev/null >/dev/null"
    scene.run("sh", "-c", f"({job}) & exec {python()} -c 0")
