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

_PROMISE: Final = "\tpromisor = true\n\tpartialclonefilter = blob:none\n"
_ZERO: Final = "0"
_ANY_FILE: Final = 0o666
_ANY_DIRECTORY: Final = 0o777
"""What git makes things with; the umask says the rest."""
_IDENTITY: Final = "repopool <repopool@localhost>"


@attrs.frozen
class SubmoduleEntry:
    """An initialised submodule in the configuration of the repository it is part of.

    Attributes:
        name: as `.gitmodules` has it. url: resolved. update: how it is updated, None where nothing is said of it.
    """

    name: str
    url: str
    update: str | None = None


@attrs.frozen
class GitDirectory:
    """What a slot's git directory shows.

    Attributes:
        commit: what HEAD is. branch: the local branch checked out, None for a detached HEAD.
        is_tracking: whether the branch follows `origin/<branch>`.
        default_branch: what `origin/HEAD` points to, None where the remote has no such thing.
        default_commit: the commit of that branch.
        url: of `origin`. remotes: further remotes, name to URL.
        packed_refs: path of the file to copy as `packed-refs`.
        alternates: the object directory to borrow from. own_packs: names of its pack files to copy instead, so that
            nothing is borrowed; None borrows.
        object_format: `sha1` or `sha256`.
        at: the time that reflogs tell.
        submodules: those initialised, in order of their paths; None where submodules are left alone.
        worktree: of a submodule's git directory, the way from there to its files; None for one that lies in its tree.
        is_blobless: whether file contents that are missing are promised by `origin`.
        more_alternates: further object directories to borrow from, where any is.
        sections: further sections of its configuration, as text.
        cloned_commit: of a submodule's git directory, what `default_branch` (or the remote's HEAD) is: it was checked
            out before `commit` was. None for what was cloned at `commit`.
    """

    commit: str
    branch: str | None
    is_tracking: bool
    default_branch: str | None
    default_commit: str | None
    url: str
    remotes: Mapping[str, str]
    packed_refs: str
    alternates: str
    object_format: str
    at: datetime
    own_packs: tuple[str, ...] | None = None
    submodules: tuple[SubmoduleEntry, ...] | None = None
    worktree: str | None = None
    cloned_commit: str | None = None
    sections: str = ""
    is_blobless: bool = False
    more_alternates: tuple[str, ...] = ()

    @property
    def tracking_branch(self) -> str | None:
        """The local branch that follows one of origin's, whether HEAD is on it or was."""
        if self.cloned_commit is not None:
            return self.default_branch
        return self.branch if self.is_tracking else None


def lessee_steps(path: str, shows: GitDirectory, *, index: str) -> list[FileStep]:
    """Return the steps that write a complete git directory for a lessee at `path`, which must not exist.

    Args:
        index: the index to copy, its modification time with it (git's detection of racy files depends on it).
    """
    directories = ["objects/info", "objects/pack", "refs/heads", "refs/tags"]
    files: dict[str, str] = {
        "config": _config(shows),
        "HEAD": f"ref: refs/heads/{shows.branch}\n" if shows.branch else f"{shows.commit}\n",
    }
    if shows.own_packs is None:
        files["objects/info/alternates"] = "".join(f"{one}\n" for one in (shows.alternates, *shows.more_alternates))
    log_line = _log_line(shows, shows.cloned_commit or shows.commit)
    files["logs/HEAD"] = log_line + _checkout_line(shows)
    if shows.cloned_commit and shows.default_branch:
        files[f"refs/heads/{shows.default_branch}"] = f"{shows.cloned_commit}\n"
        files[f"logs/refs/heads/{shows.default_branch}"] = log_line
    elif shows.branch:
        files[f"refs/heads/{shows.branch}"] = f"{shows.commit}\n"
        files[f"logs/refs/heads/{shows.branch}"] = log_line
    if shows.default_branch:
        files["refs/remotes/origin/HEAD"] = f"ref: refs/remotes/origin/{shows.default_branch}\n"
        files["logs/refs/remotes/origin/HEAD"] = _log_line(shows, shows.default_commit or shows.commit)
    directories += sorted({name.rpartition("/")[0] for name in files} - {""})
    return [
        *(MakeDirectory(f"{path}/{name}", _ANY_DIRECTORY) for name in directories),
        *(
            WriteFile(f"{path}/{name}", text.encode(errors="surrogateescape"), _ANY_FILE)
            for name, text in files.items()
        ),
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


def _core_section(object_format: str, worktree: str | None = None, *, is_blobless: bool = False) -> str:
    lines = [
        "[core]",
        f"\trepositoryformatversion = {int(object_format != 'sha1' or is_blobless)}",
        "\tfilemode = true",
        "\tbare = false",
        "\tlogallrefupdates = true",
    ]
    if worktree is not None:
        lines.append(f"\tworktree = {_quoted(worktree)}")
    if object_format != "sha1":
        lines += ["[extensions]", f"\tobjectformat = {object_format}"]
    return "\n".join(lines) + "\n"


def _config(shows: GitDirectory) -> str:
    text = _core_section(shows.object_format, shows.worktree, is_blobless=shows.is_blobless)
    if shows.submodules is not None and shows.worktree is None:
        text += "[submodule]\n\tactive = .\n"
    for name, url in {"origin": shows.url, **shows.remotes}.items():
        text += f'[remote "{name}"]\n\turl = {_quoted(url)}\n\tfetch = +refs/heads/*:refs/remotes/{name}/*\n'
        text += _PROMISE if name == "origin" and shows.is_blobless else ""
    if shows.tracking_branch:
        merge = _quoted(f"refs/heads/{shows.tracking_branch}")
        text += f'[branch "{_escaped(shows.tracking_branch)}"]\n\tremote = origin\n\tmerge = {merge}\n'
    for entry in shows.submodules or ():
        text += _submodule_section(entry, is_nested=shows.worktree is not None)
    text += shows.sections
    for key, value in OWN_CONFIG.items():
        section, _, name = key.partition(".")
        text += f"[{section}]\n\t{name} = {value}\n"
    return text


def _submodule_section(entry: SubmoduleEntry, *, is_nested: bool) -> str:
    """Return what `git submodule init` writes; below the top git marks each as active, at the top all at once."""
    active = "\tactive = true\n" if is_nested else ""
    update = f"\tupdate = {entry.update}\n" if entry.update else ""
    return f'[submodule "{_escaped(entry.name)}"]\n{active}\turl = {_quoted(entry.url)}\n{update}'


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def _quoted(value: str) -> str:
    """Return a configuration value, quoted where git would misread it."""
    plain = not any(character in value for character in '"\\#;') and value == value.strip()
    return value if plain else f'"{_escaped(value)}"'


def _log_line(shows: GitDirectory, commit: str) -> str:
    seconds = int(shows.at.timestamp())
    nothing = _ZERO * len(commit)
    return f"{nothing} {commit} {_IDENTITY} {seconds} +0000\tclone: from {shows.url}\n"


def _checkout_line(shows: GitDirectory) -> str:
    """Return the line by which HEAD left what was cloned, where it did."""
    if shows.cloned_commit is None:
        return ""
    seconds = int(shows.at.timestamp())
    moving = f"checkout: moving from {shows.default_branch or shows.cloned_commit} to {shows.commit}"
    return f"{shows.cloned_commit} {shows.commit} {_IDENTITY} {seconds} +0000\t{moving}\n"
