"""Which files of a commit are Git LFS pointers, by the commit's own attributes, and what they stand for.

Everything here is data of a commit, read with a git directory of ours; no file of a tree is looked at, and nothing is
fetched: that is the business of `lfs`.
"""

import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from repopool_async._git import GitRunner
from repopool_async.hosts.base import Host, RemoveFile

_POINTER: Final = re.compile(
    rb"version https://(?:git-lfs|hawser)\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize [0-9]{1,18}\n?"
)
_POINTER_LIMIT: Final = 1024
"""Bytes; what is longer is no pointer, for git-lfs neither."""
_FILES: Final = (b"100644", b"100755")


@attrs.frozen
class Pointer:
    """A file of a commit that stands for an object.

    Attributes:
        path: in the tree, as bytes. blob: of git. text: what the blob holds. identity: SHA-256 of what it stands for.
    """

    path: bytes
    blob: str
    text: bytes
    identity: str


def manifest(pointers: Iterable[Pointer]) -> bytes:
    """Return what `lfs_filter` reads."""
    return b"".join(b"%s\0%s\0%s\0" % (one.path, one.identity.encode(), one.text) for one in pointers)


async def read_pointers(git: GitRunner, host: Host, git_dir: str, commit: str) -> tuple[Pointer, ...]:
    """Return a commit's pointers.

    Args:
        git_dir: a bare git directory of ours in which the commit's objects can be read.
    """
    listing = await git.run("ls-tree", "-r", "-z", "--full-tree", commit, git_dir=git_dir)
    blobs = _blobs(listing.stdout)
    attributes = [blob for path, blob in blobs.items() if path.rpartition(b"/")[2] == b".gitattributes"]
    if not any(b"lfs" in text for text in (await _contents(git, git_dir, attributes)).values()):
        return ()
    marked = await _marked(git, host, git_dir, commit, list(blobs))
    small = await _small(git, git_dir, [blobs[path] for path in marked])
    texts = await _contents(git, git_dir, small)
    pointers = ((path, blobs[path], _POINTER.fullmatch(texts.get(blobs[path], b""))) for path in marked)
    return tuple(Pointer(path, blob, match[0], match[1].decode()) for path, blob, match in pointers if match)


def _blobs(listing: bytes) -> dict[bytes, str]:
    entries = (entry.partition(b"\t") for entry in listing.split(b"\0") if entry.startswith(_FILES))
    return {path: described.split(b" ")[2].decode() for described, _, path in entries}


async def _marked(git: GitRunner, host: Host, git_dir: str, commit: str, paths: Sequence[bytes]) -> list[bytes]:
    """Return the paths whose attributes, as the commit itself has them, say `filter=lfs`."""
    index = f"{git_dir}/index-{secrets.token_hex(4)}"
    env = {"GIT_INDEX_FILE": index}
    try:
        await git.run("read-tree", commit, git_dir=git_dir, env=env)
        asked = b"".join(path + b"\0" for path in paths)
        found = await git.run(
            "check-attr", "--cached", "-z", "--stdin", "filter", git_dir=git_dir, env=env, input=asked
        )
    finally:
        await host.apply([RemoveFile(index), RemoveFile(f"{index}.lock")])
    words = found.stdout.split(b"\0")
    return [path for path, value in zip(words[0::3], words[2::3], strict=False) if value == b"lfs"]


async def _small(git: GitRunner, git_dir: str, blobs: Iterable[str]) -> list[str]:
    """Return the blobs that are short enough for a pointer."""
    asked = "".join(f"{blob}\n" for blob in dict.fromkeys(blobs)).encode()
    told = await git.run("cat-file", "--batch-check=%(objectname) %(objectsize)", git_dir=git_dir, input=asked)
    sizes = (line.split(" ") for line in told.text.splitlines())
    return [blob for blob, size in sizes if size.isdecimal() and int(size) <= _POINTER_LIMIT]


async def _contents(git: GitRunner, git_dir: str, blobs: Iterable[str]) -> dict[str, bytes]:
    asked = "".join(f"{blob}\n" for blob in dict.fromkeys(blobs)).encode()
    if not asked:
        return {}
    data = (await git.run("cat-file", "--batch", git_dir=git_dir, input=asked)).stdout
    contents: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        end = data.index(b"\n", at)
        blob, *rest = data[at:end].decode().split(" ")
        size = int(rest[1]) if len(rest) > 1 else -1  # "missing" otherwise
        contents[blob] = data[end + 1 : end + 1 + max(size, 0)]
        at = end + 1 + (size + 1 if size >= 0 else 0)
    return contents
