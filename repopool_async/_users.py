"""Users of this machine, and how a command is started as one of them.

The privileges are dropped by a small program between us and the command (`setpriv`, else Python itself): dropping them
in the child of our own process would cost a copy of its page tables each time. Synchronous look-ups, for one thread
hop. What users are for is not known here.
"""

import grp
import hashlib
import os
import pwd
import shutil
import sys
from collections.abc import Sequence
from typing import Final

import attrs

from repopool_async.exceptions import ConfigError

_SYSTEM_PATH: Final = "/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin"
_FIRST_GROUP: Final = 0x7000_0000
"""Above what distributions, containers and user namespaces give out, below where identifiers turn negative."""
_DROP: Final = """
import os, sys, warnings  # all of it now: the user may be unable to read our Python
uid, gid, groups = (part.split(",") for part in sys.argv[1:4])
os.setgroups([int(group) for group in groups])
os.setresgid(*3 * [int(gid[0])])
os.setresuid(*3 * [int(uid[0])])
try:
    os.execvp(sys.argv[4], sys.argv[4:])
except OSError as error:
    print(f"{sys.argv[4]}: {error.strerror}", file=sys.stderr)
    sys.exit(127 if isinstance(error, FileNotFoundError) else 126)
"""


@attrs.frozen
class User:
    """A user as the password database has it; `groups` are all of its groups, its own among them."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    shell: str


def find_user(name: str) -> User:
    """Look a user up.

    Raises:
        ConfigError: there is none, or it is root.
    """
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(f"run_as: there is no user {name!r} on this machine", key="run_as") from None
    if entry.pw_uid == 0:
        raise ConfigError("run_as: root is no user to run lessees as; name an ordinary one", key="run_as")
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir, entry.pw_shell)


def private_group(path: str) -> int:
    """Return the number of a group that belongs to a path alone: no user is in it, and it has no name.

    Raises:
        ConfigError: a group of this machine has that very number.
    """
    number = _FIRST_GROUP + int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:4]) % (1 << 28)
    try:
        name = grp.getgrgid(number).gr_name
    except KeyError:
        return number
    raise ConfigError(f"{path}: the group number {number} is taken by {name!r}; use another directory", key="run_as")


def start_as(user: User, groups: Sequence[int], *, with_python: bool = False) -> tuple[str, ...] | None:
    """Return what to put before a command so that it runs as a user; None where this machine has nothing for that.

    Args:
        groups: further ones. with_python: use Python where `setpriv` did not do.
    """
    everything = ",".join(str(group) for group in dict.fromkeys([*user.groups, *groups]))
    if with_python:
        return (sys.executable, "-I", "-S", "-c", _DROP, str(user.uid), str(user.gid), everything)
    setpriv = shutil.which("setpriv", path=_SYSTEM_PATH)
    if setpriv is None:
        return None
    ids = (f"--reuid={user.uid}", f"--regid={user.gid}", f"--groups={everything}")
    return (setpriv, *ids, "--inh-caps=-all", "--")
