"""What can be seen of a clone, of a directory and of a pool, as plain text to compare: nothing is left out on purpose.

A clone's evidence holds every inode of its tree (kind, mode, owner, links, attributes, bytes) and everything that its
git says. Looking runs git in the clone as its next holder would, so what was planted there may run: that is a leak too.
"""

import array
import fcntl
import hashlib
import os
import re
import stat
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

Evidence = dict[str, str]

DOCUMENTED_KEYS = ("gc.auto=", "maintenance.auto=")
"""The configuration by which a slot may differ from a fresh clone."""

_ONLY_OBJECTS = ("-c", "core.commitGraph=false", "-c", "core.multiPackIndex=false")
"""Checking the objects, git would start two more for each place where some are, for files that show anyway."""

_HUGE_BYTES = 1 << 24
_FS_IOC_GETFLAGS = 0x80086601
_INODE_FLAGS = 0x6203_80FF
"""Those an owner or root sets; the rest say how the file system stores things."""

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def clone_evidence(clone: Path, environment: Mapping[str, str], submodules: Sequence[str] = ()) -> Evidence:
    """Return everything that can be seen of a clone, and of the submodules that it has."""
    found = {f"tree {name}": text for name, text in _walk(clone, _describe, skip={".git"})}
    found |= {f"git {name}": text for name, text in _git_entries(clone / ".git")}
    if (clone / ".git").is_dir() and not (clone / ".git").is_symlink():
        found |= {f"logs {name}": text for name, text in _logs(clone / ".git/logs")}
        found |= {f"says {name}": text for name, text in _git_says(clone, environment)}
        for path in submodules:
            git_dir = clone / ".git/modules" / path
            found |= {f"logs {path} {name}": text for name, text in _logs(git_dir / "logs")}
            said = _git_says(clone / path, environment, git_dir)
            found |= {f"says {path} {name}": text for name, text in said}
    return found


def directory_evidence(directory: Path, *, skip: Collection[str] = ()) -> Evidence:
    """Return everything of a directory that a change of it would show in, times of change included."""
    return dict(_walk(directory, _describe_with_times, skip=skip))


def pool_evidence(pool: Path) -> Evidence:
    """Return what of a pool no lease may change: its record, and its mirror but for what slots stand on."""
    record = pool / "pool.json"  # which is elsewhere where the slots are on a host
    found = {"pool.json": record.read_text()} if record.exists() else {}
    for name, text in _walk(pool / "mirror.git", _describe):
        if not name.startswith("refs/repopool/keep") and name not in ("refs/repopool", "."):
            found[f"mirror {name}"] = text
    return found


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return what differs, a line each."""
    lines = []
    for name in sorted({*expected, *found}):
        wanted, got = expected.get(name), found.get(name)
        if wanted is None:
            lines.append(f"{name!r} is there: {got!r}")
        elif got is None:
            lines.append(f"{name!r} is missing")
        elif wanted != got and not (wanted.endswith("changed=any") and wanted[:-3] == got[: len(wanted) - 3]):
            lines.append(f"{name!r} is {got!r}, not {wanted!r}")
    return lines


# -- inodes --------------------------------------------------------------------------------------------------------


def _walk(root: Path, describe: Callable[[bytes], str], *, skip: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Go through a directory, its root included, without following anything."""
    yield ".", describe(os.fsencode(root))
    pending = [b""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(os.path.join(os.fsencode(root), prefix)) as entries:
                names = [(prefix + entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError as error:
            yield os.fsdecode(prefix), f"unreadable: {error.strerror}"
            continue
        for name, is_directory in names:
            if os.fsdecode(name) in skip:
                continue
            yield os.fsdecode(name), describe(os.path.join(os.fsencode(root), name))
            if is_directory:
                pending.append(name + b"/")


def _describe(path: bytes) -> str:
    try:
        status = os.lstat(path)
        return " ".join(_particulars(path, status))
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _describe_with_times(path: bytes) -> str:
    status = os.lstat(path)
    # A link to the same file that goes away in the slot is a change of the inode, but none of the file.
    changed = "any" if status.st_nlink > 1 and stat.S_ISREG(status.st_mode) else status.st_ctime_ns
    text = re.sub(r" links=\d+", "", _describe(path))
    return f"{text} size={status.st_size} modified={status.st_mtime_ns} changed={changed}"


def _particulars(path: bytes, status: os.stat_result) -> Iterator[str]:
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    yield f"{kind} {stat.S_IMODE(status.st_mode):o} {status.st_uid}:{status.st_gid}"
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        yield f"{name}={os.getxattr(path, name, follow_symlinks=False)!r}"
    if kind == "link":
        yield f"-> {os.fsdecode(os.readlink(path))!r}"
    elif kind == "file":
        yield f"links={status.st_nlink} {_digest(path)}"
    if kind in ("file", "directory"):
        yield f"flags={_inode_flags(path):x}"


def _digest(path: bytes) -> str:
    try:
        with open(path, "rb") as file:
            is_huge = os.fstat(file.fileno()).st_size > _HUGE_BYTES
            return "huge" if is_huge else hashlib.file_digest(file, "sha1").hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _inode_flags(path: bytes) -> int:
    flags = array.array("l", [0])
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return 0
    try:
        with suppress(OSError):
            fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags, True)
    finally:
        os.close(descriptor)
    return flags[0] & _INODE_FLAGS


# -- git -----------------------------------------------------------------------------------------------------------


def _git_entries(git_dir: Path) -> Iterator[tuple[str, str]]:
    """Say what is in a git directory: names, kinds and modes of everything, and the bytes of what is small text."""
    for name, text in _walk(git_dir, _describe):
        inside = re.sub(r"^modules/.*?/objects", "objects", name)
        is_object = inside.startswith("objects/") and inside not in ("objects/info", "objects/pack")
        if name == "lfs" or name.startswith("lfs/"):
            is_object = True  # of Git LFS, which are borrowed too
        if is_object and inside != "objects/info/alternates":
            yield name, "an object"
        elif name in ("HEAD", "shallow", "commondir") or name.startswith("refs/"):
            yield name, text
        else:
            yield name, re.sub(r" links=\d+ \S+", "", text)


def with_borrowed_objects(reference: Evidence) -> Evidence:
    """Return a fresh clone's evidence as it is when the clone has no objects of its own and borrows them."""
    kept = {name: text for name, text in reference.items() if text != "an object"}
    stores = [name for name in reference if re.search(r"^git (modules/.*/)?objects/info$", name)]
    return kept | {f"{store}/alternates": reference["git config"] for store in stores}


def _logs(directory: Path) -> Iterator[tuple[str, str]]:
    """Say which reflogs there are, from where they lead to where and why; who and when are whoever cloned."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            lines = path.read_text().splitlines()
            yield (
                str(path.relative_to(directory)),
                "\n".join(f"{line[:81]} {line.partition(chr(9))[2]}" for line in lines),
            )


def _git_says(clone: Path, environment: Mapping[str, str], git_dir: Path | None = None) -> Iterator[tuple[str, str]]:
    git_dir = git_dir or clone / ".git"

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=clone, env={**environment, "GIT_OPTIONAL_LOCKS": "0"}, stdin=subprocess.DEVNULL,
            capture_output=True, check=False, timeout=20,
        )  # fmt: skip
        text = done.stdout.decode(errors="surrogateescape")
        return (
            text if done.returncode == 0 else f"{text}\nexit {done.returncode}: {done.stderr.decode(errors='replace')}"
        )

    configuration = git("config", "--local", "--list").splitlines()
    # git-lfs writes its keys in no particular order.
    own = sorted(line for line in configuration if line.startswith("filter.lfs."))
    others = [line for line in configuration if not line.startswith((*DOCUMENTED_KEYS, "filter.lfs."))]
    yield "config", "\n".join([*others, *own])
    yield "refs", git("for-each-ref", "--format=%(refname) %(objectname) %(symref) %(upstream)")
    index = git("ls-files", "--stage", "-v", "--debug")
    yield "index", re.sub(r"^  (ctime|mtime|dev|uid|size):.*?(?=flags|$)", "", index, flags=re.MULTILINE)
    yield "index extensions", _index_extensions(git_dir / "index")
    yield "status", git("status", "--porcelain=v2", "--branch", "--ignored", "--untracked-files=all")
    yield "fsck", git(*_ONLY_OBJECTS, "fsck", "--no-dangling", "--no-progress")
    packed = (git_dir / "packed-refs").read_bytes()
    yield "packed-refs", "\n".join(str(line) for line in packed.splitlines() if not line.startswith(b"#"))


def _index_extensions(path: Path) -> str:
    """Say which version an index has and which extensions that change what git does (the cached trees do not)."""
    data = path.read_bytes()
    version = int.from_bytes(data[4:8])
    names = [name for name in (b"link", b"UNTR", b"FSMN", b"sdir", b"REUC") if name in data]
    return f"version {version} {names}"
