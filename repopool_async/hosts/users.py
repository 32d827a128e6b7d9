"""Users of another machine: looked up there, by its own databases, in one execution.

What is asked is written in `remote/users.sh`. How a command is started as a user is the business of `_users`.
"""

import os

from repopool_async import _users
from repopool_async._users import Ground, User
from repopool_async.hosts._scripts import library
from repopool_async.hosts.base import Host


async def look_on(host: Host, name: str) -> Ground:
    """Return what there is on a host for running commands as a user.

    Raises:
        HostUnreachableError: it does not answer. OSError: it says nothing that can be understood.
    """
    environment = await host.login_environment()
    system = _users.SYSTEM_PATH
    said = await _ask(host, "look_for_user", name, system)
    try:
        own, umask, setpriv, python, entry, groups, _ = said.split("\0")
        user = _user(name, entry, groups)
        return Ground(int(own), int(umask, 8), user, setpriv, python, environment)
    except ValueError as error:
        raise OSError(f"host {host.id} cannot say whether it has a user {name!r}: {said[-200:]!r}") from error


async def group_name_on(host: Host, number: int) -> str:
    """Return what a host calls a group; "" where it knows none of that number; raises as `look_on`."""
    return (await _ask(host, "look_for_group", str(number))).partition(":")[0].strip()


def _user(name: str, entry: str, groups: str) -> User | None:
    if not entry:
        return None
    found, _, uid, gid, _, home, shell = entry.split(":")
    numbers = tuple(dict.fromkeys([int(gid), *map(int, groups.split())]))
    return User(found or name, int(uid), int(gid), numbers, home, shell or "/bin/sh")


async def _ask(host: Host, function: str, *arguments: str) -> str:
    script = os.fsdecode(library("users")) + f'{function} "$@"\n'
    path = (await host.login_environment()).get("PATH", os.defpath)
    done = await host.run(["sh", "-c", script, "sh", *arguments], env={"PATH": f"{path}:{_users.SYSTEM_PATH}"})
    return os.fsdecode(done.stdout)
