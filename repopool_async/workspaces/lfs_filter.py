"""A program that git runs as the filter `lfs` on the pool's own git directories; nothing of the package is imported.

It goes by a manifest that the pool wrote: which paths of a commit stand for which objects. Content comes out of the
pool's store only as far as it is what its name says, and is compared with nothing else; every other file passes through
as it is. It fetches nothing, stores nothing, and reads no configuration: `python -ISB lfs_filter.py STORE MANIFEST`
speaks git's protocol for long-running filters, with a third argument `check` it prints what of the manifest is damaged.
"""

# ruff: noqa: PTH108, PTH118, PTH123
# pathlib would take longer to import than all the rest of it does.

import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import BinaryIO, Final, NamedTuple

_PIECE: Final = 65516
"""The longest content of one packet of git's."""
_IN_MEMORY: Final = 1 << 24


class Entry(NamedTuple):
    """What a path of the manifest stands for."""

    identity: str
    pointer: bytes


def read_manifest(data: bytes) -> dict[bytes, Entry]:
    """Read what `lfs_pointers.manifest` wrote: path, object, pointer, each ended by a NUL."""
    words = data.split(b"\0")
    entries = zip(words[0::3], words[1::3], words[2::3], strict=False)
    return {path: Entry(identity.decode(), pointer) for path, identity, pointer in entries}


class Store:
    """The pool's objects, by the SHA-256 of their content, laid out as git-lfs does."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def pieces(self, identity: str) -> Iterator[bytes]:
        """Yield an object's content, then raise OSError where it was not what its name says; that one is removed."""
        path = os.path.join(self._directory, "objects", identity[:2], identity[2:4], identity)
        digest = hashlib.sha256()
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(f"{path} is no file")
            while piece := file.read(_PIECE):
                digest.update(piece)
                yield piece
        if digest.hexdigest() != identity:
            with suppress(FileNotFoundError):
                os.unlink(path)  # whoever tries again fetches it anew
            raise OSError(f"{path} was damaged")


class Filter:
    """Answers git's questions on `source`, at `sink`."""

    def __init__(self, store: Store, manifest: dict[bytes, Entry], source: BinaryIO, sink: BinaryIO) -> None:
        self._store = store
        self._manifest = manifest
        self._source = source
        self._sink = sink

    def serve(self) -> None:
        """Answer until git has no more questions."""
        list(self._packets())
        self._write([b"git-filter-server\n", b"version=2\n"])
        list(self._packets())
        self._write([b"capability=clean\n", b"capability=smudge\n"])
        while fields := dict(line.rstrip(b"\n").split(b"=", 1) for line in self._packets()):
            entry = self._manifest.get(fields[b"pathname"])
            with tempfile.SpooledTemporaryFile(_IN_MEMORY) as content:
                digest = self._take(content)
                content.seek(0)
                if fields[b"command"] == b"smudge" and entry is not None and content.read() == entry.pointer:
                    self._answer(self._store.pieces(entry.identity))
                elif fields[b"command"] == b"clean" and entry is not None and digest == entry.identity:
                    self._answer([entry.pointer])
                else:
                    content.seek(0)
                    self._answer(iter(lambda: content.read(_PIECE), b""))

    def _take(self, content: "tempfile.SpooledTemporaryFile[bytes]") -> str:
        digest = hashlib.sha256()
        for piece in self._packets():
            digest.update(piece)
            content.write(piece)
        return digest.hexdigest()

    def _answer(self, pieces: Iterable[bytes]) -> None:
        self._write([b"status=success\n"])
        try:
            for piece in pieces:
                self._packet(piece)
        except OSError as error:
            print(error, file=sys.stderr)  # noqa: T201 - git passes it on
            self._write([])
            self._write([b"status=error\n"])
        else:
            self._write([])
            self._write([])

    def _packets(self) -> Iterator[bytes]:
        """Yield what comes until the next flush, or the end."""
        while length := int(self._source.read(4) or b"0", 16):
            yield self._source.read(length - 4)

    def _packet(self, data: bytes) -> None:
        self._sink.write(b"%04x%s" % (len(data) + 4, data))

    def _write(self, packets: Iterable[bytes]) -> None:
        for packet in packets:
            self._packet(packet)
        self._sink.write(b"0000")
        self._sink.flush()


def damaged(store: Store, manifest: dict[bytes, Entry]) -> Iterator[str]:
    """Read every object of a manifest and yield what is wrong, a line each."""
    for identity in sorted({entry.identity for entry in manifest.values()}):
        try:
            for _ in store.pieces(identity):
                pass
        except OSError as error:
            yield str(error)


def main(store: str, manifest: str, act: str = "") -> None:
    """Do what the arguments say."""
    try:
        with open(manifest, "rb") as file:
            entries = read_manifest(file.read())
    except FileNotFoundError:
        entries = {}
    if act == "check":
        sys.stdout.writelines(f"{line}\n" for line in damaged(Store(store), entries))
    else:
        Filter(Store(store), entries, sys.stdin.buffer, sys.stdout.buffer).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
