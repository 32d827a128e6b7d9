"""The repository that is contaminated: small, but with everything that a check-out can get wrong.

Branches `main` and `feature` (which changes attributes, kinds of files and the submodule), the annotated tag `v1` and
the commit it stands on. Built by one fast-import, so it is the same everywhere.
"""

import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

Entries = Mapping[str, tuple[str, bytes]]

_COMMITTER = b"C O Mitter <committer@example.com> 1704067200 +0000"
_FILE, _EXECUTABLE, _LINK = "100644", "100755", "120000"


def _text(name: str) -> bytes:
    return b"".join(f"{name} line {number}\n".encode() for number in range(20))


_FIRST: Entries = {
    ".gitignore": (_FILE, b"*.log\nbuild/\n.env\n"),
    "README.md": (_FILE, _text("README")),
    "src/app.py": (_FILE, _text("app")),
    "src/pkg/__init__.py": (_FILE, b""),
    "src/pkg/core.py": (_FILE, _text("core")),
    "bin/tool.sh": (_EXECUTABLE, b"#!/bin/sh\necho tool\n"),
}
_MAIN: Entries = {
    ".gitattributes": (_FILE, b"*.bin binary\n*.dos text eol=crlf\nident.txt ident\n"),
    "src/app.py": (_FILE, _text("app on main")),
    "src/pkg/deep/er/leaf.txt": (_FILE, _text("leaf")),
    "docs/guide.md": (_FILE, _text("guide")),
    "docs/link": (_LINK, b"../README.md"),
    "docs/name with space.txt": (_FILE, _text("space")),
    "docs/\u00fcnicode.txt": (_FILE, _text("unicode")),
    "data/blob.bin": (_FILE, bytes(range(256)) * 8),
    "data/text.dos": (_FILE, _text("dos")),
    "ident.txt": (_FILE, b"$Id$\n"),
    "assets/only.txt": (_FILE, _text("only")),
}
_FEATURE: Entries = {
    ".gitattributes": (_FILE, b"*.md text eol=crlf\n"),
    "src/app.py": (_EXECUTABLE, _text("app on feature")),
    "docs/link": (_FILE, _text("no link")),
    "extra/new.txt": (_FILE, _text("new")),
    "extra/.gitignore": (_FILE, b"*\n"),
    "README.md/inside": (_FILE, _text("inside")),
}
_GONE_ON_FEATURE = ("assets/only.txt", "vendor/lib", "README.md", "src/pkg/deep/er/leaf.txt")


SUBMODULE = "vendor/lib"
"""Where it lies on `main`."""


class Origin:
    """The repository at `path` (its URL too), and the one its submodule comes from.

    Args:
        with_lfs: whether `main` has a Git LFS file besides.
        has_large_submodule: fill the submodule with all that the repository itself has.
    """

    def __init__(self, directory: Path, *, with_lfs: bool = False, has_large_submodule: bool = False) -> None:
        self.path = directory / "origin.git"
        self.submodule = directory / "lib.git"
        _init(self.submodule)
        library_files = {**_FIRST, **_MAIN} if has_large_submodule else {"lib.txt": (_FILE, _text("lib"))}
        _import(self.submodule, _commit("main", library_files, message="Library"))
        if has_large_submodule:
            for branch in ("feature", "v1"):
                _output(self.submodule, "branch", branch, "main")
        library = _output(self.submodule, "rev-parse", "main").encode()
        _init(self.path)
        gitlink = b"M 160000 %s vendor/lib\n" % library
        modules = f'[submodule "vendor/lib"]\n\tpath = vendor/lib\n\turl = {self.submodule}\n'.encode()
        more = self._large_files() if with_lfs else {}
        main = _commit("main", {**_MAIN, ".gitmodules": (_FILE, modules), **more}, message="Second")
        gone = b"".join(f"D {name}\n".encode() for name in _GONE_ON_FEATURE)
        _import(
            self.path,
            _commit("main", _FIRST, message="First"),
            b"tag v1\nfrom refs/heads/main\ntagger %s\ndata 2\nv1\n" % _COMMITTER,
            main + gitlink,
            b"reset refs/heads/feature\nfrom refs/heads/main\n\n",
            _commit("feature", {}, message="Third") + gone + _changes(_FEATURE),
        )
        self.first = _output(self.path, "rev-parse", "v1^{commit}")
        self.second = _output(self.path, "rev-parse", "main")

    def _large_files(self) -> Entries:
        content = bytes(range(256)) * 40
        name = hashlib.sha256(content).hexdigest()
        stored = self.path / "lfs/objects" / name[:2] / name[2:4] / name
        stored.parent.mkdir(parents=True)
        stored.write_bytes(content)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{name}\nsize {len(content)}\n".encode()
        attributes = _MAIN[".gitattributes"][1] + b"*.large filter=lfs diff=lfs merge=lfs -text\n"
        return {".gitattributes": (_FILE, attributes), "data/film.large": (_FILE, pointer)}

    @property
    def url(self) -> str:
        return str(self.path)


def _init(path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", "--bare", "--template=", "--initial-branch=main", path], check=True)


def _commit(branch: str, entries: Entries, *, message: str) -> bytes:
    head = b"commit refs/heads/%s\ncommitter %s\ndata %d\n%s\n" % (
        branch.encode(), _COMMITTER, len(message), message.encode(),
    )  # fmt: skip
    return head + _changes(entries)


def _changes(entries: Entries) -> bytes:
    return b"".join(
        b"M %s inline %s\ndata %d\n%s\n" % (mode.encode(), name.encode(), len(data), data)
        for name, (mode, data) in entries.items()
    )


def _import(repository: Path, *parts: bytes) -> None:
    command = ["git", "-C", str(repository), "fast-import", "--quiet", "--date-format=raw"]
    subprocess.run(command, input=b"".join(parts), check=True)


def _output(repository: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(repository), *args], check=True, capture_output=True, env=dict(os.environ))
    return done.stdout.decode().strip()
