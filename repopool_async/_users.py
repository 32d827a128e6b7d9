"""Users of a machine, and how a command is started as one of them.

The privileges are dropped by a small program between us and the command (`setpriv`, else Python itself): dropping them
in the child of our own process would cost a copy of its page tables each time. Looking things up on this machine is
synchronous, for one thread hop; `hosts.users` does it on others. What users are for is not known here.
"""

import grp
import hashlib
import os
import pwd
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

SYSTEM_PATH: Final = "/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin"
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


@attrs.frozen
class Ground:
    """What running commands as a user stands on, on one machine.

    Attributes:
        own_uid: who we are there. umask: of ours; None where nobody says. user: None where there is none of that name.
        setpriv, python: where these programs are; "" where nowhere. environment: what our own commands start with.
    """

    own_uid: int
    umask: int | None
    user: User | None
    setpriv: str
    python: str
    environment: Mapping[str, str]


def look_here(name: str) -> Ground:
    """Return what there is on this machine for running commands as a user."""
    return Ground(
        own_uid=os.geteuid(),
        umask=_umask(),
        user=_find_user(name),
        setpriv=shutil.which("setpriv", path=SYSTEM_PATH) or "",
        python=sys.executable,
        environment=os.environ,
    )


def _find_user(name: str) -> User | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir, entry.pw_shell)


def _umask() -> int | None:
    """Return this process's umask; reading it any other way would change it for all threads."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            return next((int(line.split()[1], 8) for line in file if line.startswith("Umask:")), None)
    except OSError:
        return None


def group_name_here(number: int) -> str:
    """Return what this machine calls a group; "" where it knows none of that number."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return ""


def private_group(path: str) -> int:
    """Return the number of a group that belongs to a path alone: no user is in it, and it should have no name."""
    return _FIRST_GROUP + int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:4]) % (1 << 28)


def start_as(ground: Ground, groups: Sequence[int], *, with_python: bool = False) -> tuple[str, ...]:
    """Return what to put before a command so that it runs as the user.

    Args:
        groups: further ones. with_python: use Python where `setpriv` did not do.
    """
    user = ground.user
    assert user is not None
    everything = ",".join(str(group) for group in dict.fromkeys([*user.groups, *groups]))
    if with_python:
        return (ground.python, "-I", "-S", "-c", _DROP, str(user.uid), str(user.gid), everything)
    ids = (f"--reuid={user.uid}", f"--regid={user.gid}", f"--groups={everything}")
    return (ground.setpriv, *ids, "--inh-caps=-all", "--")
