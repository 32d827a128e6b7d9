"""The fence of slots on this machine: the same files, and the same rules, as `remote/fence.sh` keeps on others.

A directory may be used locally today and over SSH tomorrow, or both ways at once. Synchronous; for one thread hop each.
What a lease is, and who may have one, is decided elsewhere: here only what the slot's directory says counts. Who bears
a token's mark without being registered is `_local_fence`'s business.
"""
# Paths are text here, as in the protocol.
# ruff: noqa: PTH102, PTH103, PTH106, PTH108, PTH118, PTH123, PTH208

import contextlib
import errno
import os
import re
import shutil
import signal
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import attrs

from repopool_async._aio import Deadline
from repopool_async._files import write_atomic
from repopool_async._identity import boot_id, process_start_time
from repopool_async._process import _Group, start_detached
from repopool_async.exceptions import FencedError
from repopool_async.hosts._scripts import fence_key, fence_mark, fenced, library, padded, quote
from repopool_async.hosts.base import Guard

REFUSED: Final = 99
"""Exit code of a command that was not started."""
WATCH_TICKS: Final = 4
_DYING_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.005
_NAME: Final = re.compile(r"000[0-9]{17}(~.*)?", re.DOTALL)
"""What a token is called, and what is said of it; other names in a fence are a lessee's."""
_REGISTERED: Final = re.compile(r"([0-9]+)\.([0-9]+)")
_SHELLS_OWN: Final = ("PWD", "OLDPWD", "SHLVL")
_SYSTEM_PATH: Final = b"/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin"


def top_of(slot_directory: str) -> str:
    """Return the highest name in a fence, "" for none."""
    return _top(_names(f"{slot_directory}/fence"))


def _top(names: Iterable[str]) -> str:
    return max(filter(_NAME.fullmatch, names), default="")


def enter(host_id: str, slot_directory: str, token: int, session_directory: str | None) -> None:
    """See `Host.enter`; ends nothing. On the way of every lease, so it asks the file system for nothing twice."""
    begin_to_enter(host_id, slot_directory, token)
    finish_entering(host_id, slot_directory, token, session_directory)


def begin_to_enter(host_id: str, slot_directory: str, token: int) -> None:
    """Take the slot for a token, under which nothing can be started yet."""
    _remove_strangers(slot_directory)
    require_highest(host_id, slot_directory, token)
    try:
        _make_entry(f"{slot_directory}/fence/{padded(token)}")
    except FileExistsError:
        raise fenced(slot_directory, token, top_of(slot_directory), host_id=host_id, is_used=True) from None


def finish_entering(host_id: str, slot_directory: str, token: int, session_directory: str | None) -> None:
    """Let commands be started under a token."""
    name = padded(token)
    # Not by renaming: one that reads half of it is refused, and nobody can run yet who knows this token.
    with open(f"{slot_directory}/fence/{name}/boot", "wb") as file:
        file.write(f"{boot_id()}\n".encode())
    names = _names(f"{slot_directory}/fence")
    require_highest(host_id, slot_directory, token, names=names, is_entered=True)
    _remove_lower(slot_directory, token, names)
    if session_directory is not None:
        _join_session(session_directory, slot_directory, name)


def _remove_strangers(slot_directory: str) -> None:
    """Remove what a lessee put in place of our directories, such as a link out of the slot."""
    for path in (f"{slot_directory}/fence", f"{slot_directory}/run"):
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                os.unlink(path)


def _make_entry(path: str) -> None:
    slot_directory = path.rpartition("/fence/")[0]
    try:
        os.mkdir(path)
    except FileNotFoundError:
        os.makedirs(f"{slot_directory}/fence", exist_ok=True)
        os.mkdir(path)
    # By itself: a slot that was left before anybody had entered it has a fence and nothing else.
    with contextlib.suppress(FileExistsError):
        os.mkdir(f"{slot_directory}/run")


def begin_to_leave(host_id: str, slot_directory: str, token: int) -> list[int]:
    """Let nothing more be started under a token, and do as `kill_registered`.

    The name that is made is above the token's own and below the next one's.
    """
    _remove_strangers(slot_directory)
    require_highest(host_id, slot_directory, token)
    # The boot is part of the name: on a full disk, which this lease may have filled, nothing more can be written.
    os.makedirs(f"{slot_directory}/fence/{padded(token)}~left.{boot_id()}", exist_ok=True)
    return kill_registered(slot_directory, token)


def require_highest(
    host_id: str, slot_directory: str, token: int, *, names: Sequence[str] | None = None, is_entered: bool = False
) -> None:
    """Refuse to go on under a token where somebody has come with a higher one."""
    top = top_of(slot_directory) if names is None else _top(names)
    if _number(top) > token or (is_entered and top != padded(token)):
        raise fenced(slot_directory, token, top, host_id=host_id)


def _remove_lower(slot_directory: str, token: int, names: Sequence[str]) -> None:
    """Remove the names below a token, and nothing else: a higher one may have come while we were here."""
    for name in names:
        if _number(name) < token:
            path = f"{slot_directory}/fence/{name}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}/boot")
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _join_session(session_directory: str, slot_directory: str, name: str) -> None:
    os.makedirs(f"{session_directory}/slots", exist_ok=True)
    data = f"{name}\n".encode() + os.fsencode(slot_directory)
    write_atomic(f"{session_directory}/slots/{fence_key(slot_directory)}", data)


def require_upkeep(host_id: str, guard: Guard) -> None:
    """Refuse upkeep of a slot under a token that is not the present one, nor was left, since this boot.

    Raises:
        FencedError: that is so.
    """
    if top_of(guard.slot_directory) == f"{padded(guard.token)}~left.{boot_id()}":
        return
    require_present(host_id, guard)


def kill_registered(slot_directory: str, last: int) -> list[int]:
    """End what is registered in a slot under tokens up to one; return what does not die."""
    _remove_strangers(slot_directory)
    stuck = []
    for registered in _registered(slot_directory, last):
        if registered.is_gone_by_now() or registered.kill():
            registered.forget()
        else:
            stuck.append(registered.pid)
    return stuck


@attrs.frozen
class _Registered:
    """A process group noted in `run/`."""

    path: str
    pid: int
    start_time: str
    boot: str

    def is_gone_by_now(self) -> bool:
        """Return whether the group has certainly ended: another boot, or its number is another's since."""
        now = process_start_time(self.pid)
        return self.boot != boot_id() or (now is not None and str(now) != self.start_time)

    def kill(self) -> bool:
        """Kill the group, whose leader may have ended before the rest; return whether all of it has ended."""
        group = _Group(self.pid)
        deadline = Deadline.after(_DYING_SECONDS)
        while group.signal(signal.SIGKILL) and group.has_live_members():
            if deadline.is_expired:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def forget(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def _registered(slot_directory: str, last: int) -> Iterator[_Registered]:
    for name in _names(f"{slot_directory}/run"):
        match = _REGISTERED.fullmatch(name)
        if match is None or int(match[1]) > last:
            continue
        path = f"{slot_directory}/run/{name}"
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                words = file.read().split()
        except OSError:
            continue
        start_time, boot = words if len(words) == 2 else ("", "")
        # One that has not finished registering has yet to look at the fence.
        if boot or process_start_time(int(match[2])) is None:
            yield _Registered(path, int(match[2]), start_time, boot)


# -- commands under a guard --------------------------------------------------------------------------------------


def guarded(argv: Sequence[str], env: Mapping[str, str], guard: Guard) -> tuple[list[str], Mapping[str, str]]:
    """Return the command and environment that register a process, look at the fence, and become the command."""
    # In a subshell, so that no variable of ours overwrites one of the command's; `$$` is the shell's own there, too.
    # Not by the command's PATH: programs of a lessee's may come first in it, and we may be somebody else.
    lines = [b"(\nPATH=%b\n" % _SYSTEM_PATH + library("fence") + b'register "$1" "$2"\n) || exit %d' % REFUSED]
    lines += [_as_given(name, env) for name in _SHELLS_OWN]
    # The mark comes last: what has not been admitted yet is refused, and must not be killed instead.
    lines += [b"export " + fence_mark(guard).encode(), b'shift 2\nexec "$@"']
    script = os.fsdecode(b"\n".join(lines))
    return ["/bin/sh", "-c", script, "sh", guard.slot_directory, padded(guard.token), *argv], env


def _as_given(name: str, env: Mapping[str, str]) -> bytes:
    """Return what gives a variable that shells set by themselves the value, or none, that the command is to see."""
    return b"export %s=%s" % (name.encode(), quote(env[name])) if name in env else b"unset " + name.encode()


def require_startable(argv: Sequence[str], env: Mapping[str, str], cwd: str | None) -> None:
    """Raise what starting the command itself would: the shell that is started instead exists always."""
    name = argv[0]
    if cwd is not None and not os.path.isdir(cwd):  # noqa: PTH112
        number = errno.ENOTDIR if os.path.lexists(cwd) else errno.ENOENT
        raise OSError(number, os.strerror(number), cwd)
    if "/" not in name:
        found = shutil.which(name, path=env.get("PATH", os.defpath)) is not None
    else:
        found = os.path.exists(os.path.join(cwd or "/", name))  # noqa: PTH110
    if not found:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def refusal(host_id: str, guard: Guard) -> FencedError | None:
    """Return why a command under a guard is not started now; None where it is."""
    top = top_of(guard.slot_directory)
    boot = ""
    with contextlib.suppress(OSError), open(f"{guard.slot_directory}/fence/{top}/boot", encoding="utf-8") as file:
        boot = file.read().strip()
    if top == padded(guard.token) and boot == boot_id():
        return None
    return fenced(guard.slot_directory, guard.token, top, host_id=host_id)


def require_present(host_id: str, guard: Guard) -> None:
    """Raise why a command under a guard is not started now, where it is not."""
    error = refusal(host_id, guard)
    if error is not None:
        raise error


def forget_ended(guard: Guard) -> None:
    """Remove the notes of a token's processes that have ended."""
    for registered in _registered(guard.slot_directory, guard.token):
        if process_start_time(registered.pid) is None or registered.is_gone_by_now():
            registered.forget()


# -- sessions ----------------------------------------------------------------------------------------------------


def beat(session_directory: str, watch_seconds: float) -> None:
    """See `Host.beat`."""
    os.makedirs(f"{session_directory}/slots", exist_ok=True)
    write_atomic(f"{session_directory}/beat", f"{uuid.uuid4().hex}\n".encode())
    if not _is_watched(session_directory):
        script = os.fsdecode(library("watch") + b'trap "" HUP\nwatch "$@"')
        argv = ["/bin/sh", "-c", script, "sh", session_directory, f"{watch_seconds / WATCH_TICKS:g}", str(WATCH_TICKS)]
        pid = start_detached(argv, env={"PATH": os.environ.get("PATH", os.defpath)})
        write_atomic(f"{session_directory}/watch", f"{pid} {process_start_time(pid) or 0}\n".encode())


def _is_watched(session_directory: str) -> bool:
    try:
        with open(f"{session_directory}/watch", encoding="utf-8") as file:
            pid, start_time = file.read().split()
        return str(process_start_time(int(pid))) == start_time
    except (OSError, ValueError):
        return False


def end_session(session_directory: str) -> None:
    """See `Host.end_session`."""
    shutil.rmtree(session_directory, ignore_errors=True)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _number(name: str) -> int:
    digits = name.partition("~")[0]
    return int(digits) if digits.isdecimal() else 0
