"""What is mounted where: whether a path lies on a network file system, and which mounts lie below it.

Where the kernel has no table of mounts to read, nothing is known. Synchronous, meant to run in a thread.
"""
# Paths are text here: descriptors and directory descriptors are what this module is about, and pathlib has neither.
# ruff: noqa: PTH118, PTH119, PTH120

import os
import re
from typing import Final

_CHUNK_BYTES: Final = 1024 * 1024
_NETWORK_TYPE: Final = r"""
    9p | acfs | afp | afs | beegfs | ceph | cifs | coda | davfs2? | exafs | gfs2? | glusterfs | gpfs | hdfs | lustre |
    ncpfs | nfs[34]? | ocfs2 | orangefs | pvfs2 | smb[23]? | smbfs | vboxsf | virtiofs | webdav |
    fuse\.( afp | afs | beegfs | blobfuse2? | ceph(-fuse)? | cifs | curlftpfs | davfs2? | gcsfuse | glusterfs | goofys |
    hdfs | juicefs | lizardfs | mfs | moosefs | mount-s3 | nfs | rclone | s3fs | seaweedfs | smbnetfs | sshfs )
"""


def is_network_file_system(path: str) -> bool:
    """Return whether `path`, or where it would be, lies on a network file system; False where nobody can say."""
    return is_network_type(file_system_type(path))


def is_network_type(kind: str | None) -> bool:
    """Return whether a type of file system, as the mount table names it, is one that lies on another machine."""
    return kind is not None and re.fullmatch(_NETWORK_TYPE, kind, re.VERBOSE) is not None


def file_system_type(path: str) -> str | None:
    """Return the name of the file system that `path` lies on, or would; None where nobody can say."""
    return type_among(os.path.realpath(path), mount_table())


def type_among(path: str, mounts: list[tuple[str, str]]) -> str | None:
    """Return the type of the mount that `path` lies on: the longest mount point, of several there the last."""
    found, length = None, 0
    for point, kind in mounts:
        if len(point) >= length and _is_within(path, point):
            found, length = kind, len(point)
    return found


def _is_within(path: str, point: str) -> bool:
    return path == point or path.startswith(point if point.endswith("/") else point + "/")


def mounts_below(path: str) -> frozenset[str]:
    """Return the mount points at or below `path`, as this path spells them."""
    points = [point for point, _ in mount_table()]
    parent = os.path.dirname(path)
    real = os.path.join(os.path.realpath(parent or "."), os.path.basename(path))
    return frozenset(path + point[len(real) :] for point in points if _is_within(point, real))


def mount_table() -> list[tuple[str, str]]:
    """Return mount points and file system types, in the order they were mounted; empty where there is no /proc."""
    try:
        descriptor = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        chunks = iter(lambda: os.read(descriptor, _CHUNK_BYTES), b"")
        return parse_mounts(b"".join(chunks))
    finally:
        os.close(descriptor)


def parse_mounts(text: bytes) -> list[tuple[str, str]]:
    """Return what the text of `mountinfo` tells, as `mount_table` does."""
    mounts = []
    for line in text.splitlines():
        # id parent device root POINT options [optional fields] - TYPE source options
        front, _, back = line.partition(b" - ")
        fields = front.split(b" ")
        if len(fields) > 4 and back:
            mounts.append((os.fsdecode(_unescape(fields[4])), os.fsdecode(back.split(b" ")[0])))
    return mounts


def _unescape(field: bytes) -> bytes:
    # The kernel writes space, tab, newline and backslash as three octal digits.
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field) if b"\\" in field else field
