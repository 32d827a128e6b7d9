"""Shell text for a host: how arguments are quoted, calls framed, file steps compiled, and failures read back.

Whatever comes from above is an argument, quoted by `quote` or, where it may hold any byte, escaped by `escape`; no text
of anybody else's becomes part of a script. A script is sent on standard input, wrapped in braces, so that one that is
cut off on its way does nothing at all. What the functions do is written in `remote/*.sh`. Nothing here opens a
connection.
"""

import errno
import functools
import hashlib
import itertools
import os
import re
import secrets
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from repopool_async.exceptions import FencedError
from repopool_async.hosts.base import (
    CloseEntries,
    Command,
    CopyFile,
    Discard,
    FileStep,
    GiveTree,
    Guard,
    MakeDirectory,
    RemoveFile,
    Rename,
    SetAccess,
    WriteFile,
)

_LIBRARY: Final = Path(__file__).parent / "remote"
_NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    "probe": ("core", "boot"),
    "files": ("core",),
    "reading": ("core", "files"),
    "mounts": ("core",),
    "trees": ("core", "files", "mounts"),
    "inspection": ("core", "mounts", "trees", "flags"),
    "moves": ("core", "files", "mounts", "trees", "flags"),
    "marked": ("core", "processes"),
    "fence": ("core", "boot", "processes", "marked"),
    "watch": ("core", "boot", "processes", "marked", "fence"),
}
"""Sections that a section calls."""

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_READ_ONLY: Final = frozenset({"UID", "EUID", "PPID", "BASHOPTS", "SHELLOPTS", "BASH_VERSINFO"})
_STEP: Final = re.compile(rb"\nrepopool: step ([0-9]+)\n\Z")
_REASONS: Final[Mapping[str, int]] = {
    **{os.strerror(number): number for number in sorted(errno.errorcode, reverse=True)},
    # What shells say in their own words.
    "Directory nonexistent": errno.ENOENT,
    "nonexistent directory": errno.ENOENT,
    "No such file": errno.ENOENT,
    "no such file": errno.ENOENT,
    "are the same file": errno.EINVAL,
    "cannot overwrite directory": errno.EISDIR,
    "cannot overwrite non-directory": errno.ENOTDIR,
    "I/O error": errno.ENOSPC,
}


@functools.cache
def library(*sections: str) -> bytes:
    """Return the functions of sections and of those they call, without comments."""
    wanted = dict.fromkeys(name for section in sections for name in (*_NEEDS.get(section, ()), section))
    return b"".join(_section(name) for name in wanted)


@functools.cache
def _section(name: str) -> bytes:
    lines = (_LIBRARY / f"{name}.sh").read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if line.strip() and not line.lstrip().startswith(b"#"))


def quote(argument: str | bytes) -> bytes:
    """Return an argument as one word of any POSIX shell.

    Raises:
        ValueError: it holds a NUL, which no argument can.
    """
    data = os.fsencode(argument)
    if b"\0" in data:
        raise ValueError("embedded null byte")
    return b"'" + data.replace(b"'", rb"'\''") + b"'"


def escape(data: bytes) -> bytes:
    """Return any bytes as one word that `printf %b` prints as they were."""
    return quote(data.replace(b"\\", rb"\\").replace(b"\0", rb"\0000"))


def command(name: str, *arguments: str | bytes | int) -> bytes:
    """Return a call of a function of the library."""
    return b" ".join((name.encode(), *(quote(str(a) if isinstance(a, int) else a) for a in arguments)))


def variables(env: Mapping[str, str]) -> bytes:
    """Return what makes an environment exactly this one, in a shell that was started with none.

    Names that a shell cannot export, and those it keeps for itself, are left out.
    """
    lines = [b"unset PWD OLDPWD SHLVL PATH LC_ALL"]
    for name, value in env.items():
        if _VARIABLE.fullmatch(name) and name not in _READ_ONLY:
            lines.append(b"export " + name.encode() + b"=" + quote(value))
    return b"\n".join(lines)


@attrs.frozen
class Tools:
    """What a host was found to have, and what it says of itself.

    Attributes:
        umask: of its logins. boot: changes with every boot. flags: names of tools, as `probe` prints them.
        mounts: its mountinfo.
    """

    user: int
    umask: int
    boot: str
    flags: frozenset[str]
    mounts: bytes = b""

    @classmethod
    def parse(cls, text: bytes) -> "Tools":
        """Read what `probe` printed."""
        text, _, mounts = text.partition(b"\0")
        words = [line.decode(errors="replace").split(" ", 1) for line in text.splitlines()]
        values = {pair[0]: pair[1] for pair in words if len(pair) == 2}
        flags = frozenset(pair[0] for pair in words if len(pair) == 1)
        return cls(int(values["user"]), int(values["umask"], 8), values["boot"], flags, mounts)

    def settings(self) -> bytes:
        """Return the assignments that tell the library of them."""
        names = ("GNU_FIND", "GNU_MV", "GNU_DD", "GNU_TAR")
        return b" ".join(name.encode() + (b"=1" if name.lower() in self.flags else b"=") for name in names)


@attrs.frozen
class Answer:
    """What one framed call left."""

    status: int
    stdout: bytes
    stderr: bytes

    def require(self, path: str = "", *, steps: Sequence[FileStep] = ()) -> bytes:
        """Return what it printed.

        Args:
            path: what it was about. steps: the steps it took, of which the failing one says what it was about.

        Raises:
            OSError: it failed.
        """
        if self.status == 0:
            return self.stdout
        failed = _STEP.search(self.stderr)
        text = self.stderr[: failed.start()] if failed else self.stderr
        if failed and int(failed[1]) < len(steps):
            path = _subject(steps[int(failed[1])])
        raise os_error(text, path)


def os_error(text: bytes, path: str) -> OSError:
    """Return the error that the last words of a command in English mean."""
    last = next((line for line in reversed(text.decode(errors="replace").splitlines()) if line.strip()), "")
    # The longest, because one may be part of another.
    known = max((reason for reason in _REASONS if reason in last), key=len, default=None)
    if known is None:
        return OSError(errno.EIO, last.strip() or "The host did not say why", path)
    number = _REASONS[known]
    return OSError(number, os.strerror(number) if last.endswith(known) else last.rpartition(": ")[2], path)


def _subject(step: FileStep) -> str:
    match step:
        case CopyFile() | Rename():
            return step.source
        case _:
            return step.path


def new_word() -> str:
    """Return a word that no output will contain."""
    return f"repopool-{secrets.token_hex(16)}"


BOOTSTRAP: Final = "exec sh"
"""Runs the script on standard input with the login's environment. `exec`, in whatever shell the login has, makes the
process that of the channel, and the leader of its group."""
CLEAN_BOOTSTRAP: Final = "exec env -i sh"
"""The same without any environment."""
JOINED_BOOTSTRAP: Final = 'exec env -i PATH="$PATH" sh'
"""The same with nothing but where the login finds its tools, for scripts that also run commands."""
_LINE_BOOTSTRAP: Final = """exec env -i sh -c 'IFS= read -r s && eval "$(printf %b "$s")"'"""
"""Likewise; the script is the first line of standard input, of which a shell reads nothing more."""


_INLINE_BYTES: Final = 100_000
"""Of a command line; Linux takes 128 KiB as one argument."""
_PLAIN: Final = frozenset(
    b'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-./:=,+;(){}[]<>|&*?$"#@~%^'
)


def inline(script: bytes) -> str | None:
    """Return the command that runs a script which is part of it; None where that would be too long.

    It saves a round trip: a server lets nobody write to a command that it has not said it started. But whoever lists
    processes sees it, so it must hold nothing confidential. Quotes of every shell leave alone what is written here.
    """
    text = "".join(chr(byte) if byte in _PLAIN else f"\\0{byte:03o}" for byte in script)
    command = f"""exec sh -c 'eval "$(printf %b "$1")"' sh '{text}'"""
    return command if len(command) <= _INLINE_BYTES else None


def framed(
    calls: Iterable[bytes],
    word: str,
    *,
    sections: Sequence[str],
    settings: bytes = b"",
    stops: bool = False,
    before: bytes = b"",
    may_end_with: Sequence[Sequence[int]] | None = None,
) -> bytes:
    """Return a script that makes calls one after another, in frames that `answers` reads.

    Args:
        stops: whether the first that fails is the last. before: what comes first.
        may_end_with: of each call, the statuses with which it has not failed; only 0 where missing.
    """
    frames = b""
    for call, statuses in zip(calls, may_end_with or itertools.repeat((0,)), strict=False):
        goes_on = b"|".join(b"%d" % status for status in statuses)
        last = b"case $s in %b) ;; *) exit 0;; esac\n" % goes_on if stops else b""
        frames += b"begin\n(\n" + call + b"\n)\ns=$?\nend $s\n" + last
    head = library("core", *sections) + settings + b"\nN=" + word.encode() + b"\n" + before + b"\nstarted_as\n"
    return b"{\n" + head + frames + b"exit 0\n} </dev/null\n"


def starting(
    one: Command, word: str, *, guard: Guard | None, has_stdin: bool, upkeep: Guard | None = None
) -> tuple[str, bytes]:
    """Return the command that a channel executes, and the script it reads, to become one command.

    Args:
        one: its input is not asked for. guard: of a lessee's command. upkeep: of one of the pool's own.
        has_stdin: whether the command's standard input is what comes after the script; it is empty otherwise.
    """
    lines = [
        library("core", "starting", *(("fence",) if guard or upkeep else ())) + b"N=" + word.encode(),
        _finding(one) + b' || refused "refused $refusal"',
    ]
    if guard is not None:
        lines.append(command("register", guard.slot_directory, padded(guard.token)) + b' || refused "fenced ${top-}"')
    if upkeep is not None:
        lines.append(admitted(upkeep))
    lines += [b"started_as", variables(one.env)]
    if guard is not None:
        lines.append(b"export " + fence_mark(guard).encode())
    lines.append(_becoming(one) + (b"" if has_stdin else b" </dev/null"))
    script = b"\n".join(lines)
    if not has_stdin:
        return CLEAN_BOOTSTRAP, b"{\n" + script + b"\n}\n"
    return _LINE_BOOTSTRAP, script.replace(b"\\", rb"\\").replace(b"\n", rb"\n") + b"\n"


def admitted(upkeep: Guard) -> bytes:
    """Return the line that registers the pool's own work on a slot, of which a script consists, or ends the script."""
    return _register_work(upkeep) + b' || refused "fenced ${top-}"'


def under(upkeep: Guard, call: bytes) -> bytes:
    """Return a call that is registered as the pool's own work on a slot while it is made; refused, it exits with 98."""
    forget = b"rm -f -- " + quote(upkeep.slot_directory) + b"/run/" + padded(upkeep.token).encode() + b".$$"
    return _register_work(upkeep) + b' || { printf %s "$top"; exit 98; }\ntrap ' + quote(forget) + b" EXIT\n" + call


def _register_work(upkeep: Guard) -> bytes:
    return command("register_work", upkeep.slot_directory, padded(upkeep.token))


def batch_call(one: Command, refusal: str) -> bytes:
    """Return a call that runs a command of a batch; one that cannot be started says so on standard error."""
    refuse = b" || { printf '%s %s\\n' " + refusal.encode() + b' "$refusal" >&2; exit 127; }'
    script = b"\n".join([_finding(one) + refuse, variables(one.env), _becoming(one)])
    return script if not one.input else b"printf %b " + escape(one.input) + b" | (\n" + script + b"\n)"


def _finding(one: Command) -> bytes:
    return command("find_command", one.argv[0], one.env.get("PATH", os.defpath), one.cwd or "/")


def _becoming(one: Command) -> bytes:
    return b"exec " + b" ".join(map(quote, (*one.via, *one.argv)))


def padded(token: int) -> str:
    """Return a token as a fence is named: in the order of the numbers."""
    return f"{token:020d}"


def fence_mark(guard: Guard) -> str:
    """Return the `NAME=value` that everything started under a guard inherits."""
    return f"REPOPOOL_FENCE={fence_key(guard.slot_directory)}.{padded(guard.token)}"


def session_name(session: str) -> str:
    """Return a session's id, which is also a directory's name.

    Raises:
        ValueError: it could be mistaken for a path.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", session) is None:
        raise ValueError(f"{session!r} is no id of a session: letters, digits, - and _")
    return session


def fence_key(slot_directory: str) -> str:
    """Return a short name of a slot's directory without separators."""
    return hashlib.sha256(os.fsencode(slot_directory)).hexdigest()[:20]


def answers(word: str, stdout: bytes, stderr: bytes) -> list[Answer]:
    """Read the frames of `framed`; one that is not complete is left out."""
    mark = b"\n" + word.encode()
    outs, errors = stdout.split(mark), stderr.split(mark)
    found = []
    # noise, "\n" + output, " status\n" + noise, "\n" + output ...
    for index in range(1, len(outs) - 1, 2):
        status = outs[index + 1].split(b"\n", 1)[0]
        error = errors[index][1:] if index < len(errors) else b""
        found.append(Answer(int(status), outs[index][1:], error))
    return found


def fenced(slot_directory: str, token: int, top: str, *, host_id: str, is_used: bool = False) -> FencedError:
    """Return the error of a token that a host refused."""
    digits = top.partition("~")[0]
    highest = int(digits) if digits.isdecimal() else 0
    if is_used:
        why = f"token {token} has been used before"
    elif highest > token:
        why = f"token {highest} has entered since"
    elif "~left." in top:
        why = "it has ended, and the slot is being cleaned"
    elif "~" in top:
        why = "its manager gave no sign of life for too long"
    else:
        why = f"token {token} has not entered since the host was started"
    return FencedError(
        f"{slot_directory} on host {host_id}: {why}; the lease is lost, take a new one",
        slot_directory=slot_directory,
        token=token,
        top=highest,
        is_used=is_used,
    )


# -- file steps --------------------------------------------------------------------------------------------------


def compile_steps(steps: Sequence[FileStep], umask: int) -> bytes:
    """Return a call that takes steps in order; the first that fails ends it and is named."""
    lines = []
    for number, step in enumerate(steps):
        lines += [line + b" || at %d" % number for line in _compile(step, umask)]
    return b"\n".join(lines)


def _compile(step: FileStep, umask: int) -> list[bytes]:  # noqa: PLR0911 - one for each kind
    match step:
        case MakeDirectory(path, mode):
            return _make_directory(path, mode, umask)
        case WriteFile(path, data, mode, is_durable):
            return _write(path, data, mode, umask, is_durable=is_durable)
        case CopyFile(source, target, is_optional):
            return [command("copy_file", source, target, temporary(target), *(["optional"] if is_optional else []))]
        case Rename(source, target):
            return [command("rename_to", source, target)]
        case Discard(path, trash):
            return [command("discard", path, trash, uuid.uuid4().hex)]
        case RemoveFile(path):
            return [command("remove_file", path)]
        case SetAccess(path, uid, gid, mode, is_optional):
            return [command("set_access", uid, gid, f"{mode:o}", path, *(["optional"] if is_optional else []))]
        case CloseEntries(path, spared):
            return [command("close_entries", path, *map(glob_literal, spared))]
        case GiveTree(path, uid, gid):
            return [command("give_tree", uid, gid, path)]


def _make_directory(path: str, mode: int, umask: int) -> list[bytes]:
    mask = umask | (~mode & 0o777)
    parents = [] if mask == umask else [command("make_directories", f"{umask:o}", os.path.dirname(path))]  # noqa: PTH120
    return [*parents, command("make_directories", f"{mask:o}", path)]


def _write(path: str, data: bytes, mode: int, umask: int, *, is_durable: bool) -> list[bytes]:
    mask = umask | (~mode & 0o777)
    name = temporary(path)
    line = b" ".join((command("write_file", f"{mask:o}", path, name), escape(data)))
    if mode & 0o111:  # a redirection never makes what can be executed
        line += b" " + quote(f"{mode & ~umask:o}")
    synced = [command("sync_file", path, os.path.dirname(path))] if is_durable else []  # noqa: PTH120
    return [line, *synced]


def temporary(path: str) -> str:
    """Return a new name beside a path, of those that are swept up after a crash."""
    return f"{path.rpartition('/')[0]}/.repopool-{os.getpid()}-0-{secrets.token_hex(8)}.tmp"


def mount_name(path: str) -> bytes:
    """Return a path as /proc/self/mountinfo writes it."""
    return re.sub(rb"[ \t\n\\]", lambda match: b"\\%03o" % match[0][0], os.fsencode(path))


def glob_literal(path: str) -> str:
    """Return the pattern of find that matches a path only."""
    return re.sub(r"[\[\]*?\\]", r"\\\g<0>", path)
