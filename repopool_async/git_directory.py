"""Trusted git directories, written file by file: what a fresh clone's `.git` holds, made without running git.

A lessee's git directory is never cleaned, it is thrown away and replaced by one of these (measured: with every
hardening flag on, git still ran commands that a lessee had planted in a git directory it could write). This module only
says which files make one; the host writes them, and the workspace strategy decides when.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Final

import attrs

from repopool_async.hosts.base import CopyFile, FileStep, MakeDirectory, WriteFile

OWN_CONFIG: Final[Mapping[str, str]] = {"gc.auto": "0", "maintenance.auto": "false"}
"""The keys by which a slot's configuration differs from a fresh clone's: a lessee's git must not start a detached
garbage collection that outlives the lease."""

_ZERO: Final = "0"
_IDENTITY: Final = "repopool <repopool@localhost>"


@attrs.frozen
class GitDirectory:
    """What a slot's git directory shows.

    Attributes:
        commit: what HEAD is. branch: the local branch checked out, None for a detached HEAD.
        is_tracking: whether the branch follows `origin/<branch>`.
        default_branch: what `origin/HEAD` points to, None where the remote has no such thing.
        url: of `origin`. remotes: further remotes, name to URL.
        packed_refs: path of the file to copy as `packed-refs`.
        alternates: the object directory to borrow from. own_packs: names of its pack files to copy instead, so that
            nothing is borrowed; None borrows.
        object_format: `sha1` or `sha256`.
        at: the time that reflogs tell.
    """

    commit: str
    branch: str | None
    is_tracking: bool
    default_branch: str | None
    url: str
    remotes: Mapping[str, str]
    packed_refs: str
    alternates: str
    object_format: str
    at: datetime
    own_packs: tuple[str, ...] | None = None


def lessee_steps(path: str, shows: GitDirectory, *, index: str) -> list[FileStep]:
    """Return the steps that write a complete git directory for a lessee at `path`, which must not exist.

    Args:
        index: the index to copy, its modification time with it (git's detection of racy files depends on it).
    """
    steps = [MakeDirectory(f"{path}/{name}") for name in ("objects/info", "objects/pack", "refs/heads", "refs/tags")]
    files: dict[str, str] = {
        "config": _config(shows),
        "HEAD": f"ref: refs/heads/{shows.branch}\n" if shows.branch else f"{shows.commit}\n",
    }
    if shows.own_packs is None:
        files["objects/info/alternates"] = f"{shows.alternates}\n"
    log_line = _log_line(shows)
    files["logs/HEAD"] = log_line
    if shows.branch:
        files[f"refs/heads/{shows.branch}"] = f"{shows.commit}\n"
        files[f"logs/refs/heads/{shows.branch}"] = log_line
    if shows.default_branch:
        files["refs/remotes/origin/HEAD"] = f"ref: refs/remotes/origin/{shows.default_branch}\n"
        files["logs/refs/remotes/origin/HEAD"] = log_line
    parents = {name.rpartition("/")[0] for name in files} - {""}
    return [
        *steps,
        *(MakeDirectory(f"{path}/{parent}") for parent in sorted(parents)),
        *(WriteFile(f"{path}/{name}", text.encode(errors="surrogateescape")) for name, text in files.items()),
        CopyFile(shows.packed_refs, f"{path}/packed-refs"),
        CopyFile(index, f"{path}/index"),
        *own_pack_steps(path, shows),
        # Where the mirror's history is cut off, the lessee's git must know.
        CopyFile(f"{shows.alternates.rpartition('/')[0]}/shallow", f"{path}/shallow", is_optional=True),
    ]


def own_pack_steps(path: str, shows: GitDirectory) -> list[FileStep]:
    """Return the steps that copy packs into the git directory at `path`; an index last, for git looks for those."""
    names = sorted(shows.own_packs or (), key=lambda name: name.endswith(".idx"))
    return [CopyFile(f"{shows.alternates}/pack/{name}", f"{path}/objects/pack/{name}") for name in names]


def pristine_steps(path: str, *, alternates: str, object_format: str) -> list[FileStep]:
    """Return the steps that write the pool's own git directory of a slot: no refs, no remotes, no hooks.

    It lies outside the tree and is what the pool's git commands run with; its index is kept between leases.
    """
    return [
        *(MakeDirectory(f"{path}/{name}") for name in ("objects/info", "objects/pack", "refs/heads")),
        WriteFile(f"{path}/config", _core_section(object_format).encode()),
        WriteFile(f"{path}/HEAD", b"ref: refs/heads/none\n"),
        WriteFile(f"{path}/objects/info/alternates", f"{alternates}\n".encode(errors="surrogateescape")),
    ]


def _core_section(object_format: str) -> str:
    lines = [
        "[core]",
        f"\trepositoryformatversion = {0 if object_format == 'sha1' else 1}",
        "\tfilemode = true",
        "\tbare = false",
        "\tlogallrefupdates = true",
    ]
    if object_format != "sha1":
        lines += ["[extensions]", f"\tobjectformat = {object_format}"]
    return "\n".join(lines) + "\n"


def _config(shows: GitDirectory) -> str:
    text = _core_section(shows.object_format)
    for name, url in {"origin": shows.url, **shows.remotes}.items():
        text += f'[remote "{name}"]\n\turl = {_quoted(url)}\n\tfetch = +refs/heads/*:refs/remotes/{name}/*\n'
    if shows.branch and shows.is_tracking:
        merge = _quoted(f"refs/heads/{shows.branch}")
        text += f'[branch "{_escaped(shows.branch)}"]\n\tremote = origin\n\tmerge = {merge}\n'
    for key, value in OWN_CONFIG.items():
        section, _, name = key.partition(".")
        text += f"[{section}]\n\t{name} = {value}\n"
    return text


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def _quoted(value: str) -> str:
    """Return a configuration value, quoted where git would misread it."""
    plain = not any(character in value for character in '"\\#;') and value == value.strip()
    return value if plain else f'"{_escaped(value)}"'


def _log_line(shows: GitDirectory) -> str:
    seconds = int(shows.at.timestamp())
    nothing = _ZERO * len(shows.commit)
    return f"{nothing} {shows.commit} {_IDENTITY} {seconds} +0000\tclone: from {shows.url}\n"
