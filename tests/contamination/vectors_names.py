"""Contaminations by names: long, deep, odd, or almost the same as others."""

import os
from pathlib import Path

from tests.contamination.kit import Scene, vector

NAME_LIMIT = 255
PATH_LIMIT = 4096

HARD_NAMES = (
    b"new\nline", b"tab\t", b'quote"', b"back\\slash", b"\xff\xfe latin \xe9", b"-rf", b"--help", b" ", b"*",
    b":(top)x", b"trailing ", b"$(touch x)", b"`x`", b"\x01\x1b[31m", b"~", b"#", b"con", b".git ", b".gitx", b"...",
)  # fmt: skip


@vector("names")
def case_variants(scene: Scene) -> None:
    for name in ("readme.md", "SRC/app.py", "src/APP.PY", ".GITIGNORE", ".GITATTRIBUTES", ".Git/config", "src/.GIT/x"):
        scene.write(name)


@vector("names")
def case_variants_with_ignorecase(scene: Scene) -> None:
    scene.git("config", "core.ignoreCase", "true")
    case_variants(scene)


@vector("names")
def names_that_are_hard_to_say(scene: Scene) -> None:
    tree = os.fsencode(scene.tree)
    for name in HARD_NAMES:
        for directory in (b"", b"src/"):
            with open(tree + b"/" + directory + name, "wb") as file:
                file.write(b"hard\n")
        os.mkdir(tree + b"/" + name + b".directory\n")


@vector("names")
def names_at_the_length_limit(scene: Scene) -> None:
    scene.write("n" * NAME_LIMIT)
    scene.write("src/" + "n" * NAME_LIMIT)
    path = os.path.join(scene.tree, "assets")
    while len(path) + NAME_LIMIT + 2 < PATH_LIMIT:
        path = os.path.join(path, "p" * NAME_LIMIT)
        os.mkdir(path)
    with open(os.path.join(path, "q" * (PATH_LIMIT - len(path) - 2)), "w"):
        pass


def _chain(directory: Path, depth: int, *, mode: int = 0o755) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        for _ in range(depth):
            os.mkdir("d" * 200, dir_fd=descriptor)
            below = os.open("d" * 200, os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        os.close(os.open("secret", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
        os.mkfifo("fifo", dir_fd=descriptor)
        os.mkdir(".git", dir_fd=descriptor)
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


@vector("names")
def directories_deeper_than_paths_can_say(scene: Scene) -> None:
    _chain(scene.tree, 100)
    _chain(scene.tree / "src", 100)


@vector("names")
def deep_directories_that_cannot_be_entered(scene: Scene) -> None:
    _chain(scene.tree / "src", 60, mode=0)
