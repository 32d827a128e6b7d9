"""The user that lessees run as, on one host: looked up there, and tried, before anything is done as it.

What is found is whether commands can be run as that user, and by what; what belongs to it in a pool is the business of
`run_as`, when to ask that of `fitness`.
"""

import os
from collections.abc import Callable
from typing import Final, Self

import attrs

from repopool_async._aio import in_thread
from repopool_async._users import Ground, User, look_here, private_group, start_as
from repopool_async.exceptions import ConfigError
from repopool_async.hosts.base import Host
from repopool_async.hosts.users import look_on

_IS_THE_USER: Final = '[ "$(id -u) $(id -ru)" = "$1 $1" ]'
_CANNOT_REPLACE: Final = """
here=$1
while ! [ -w "$here" ] || { [ "$here" != "$1" ] && [ -k "$here" ]; }; do
    [ "$here" != / ] || exit 0
    here=${here%/*}
    here=${here:-/}
done
exit 1
"""
"""Succeeds where whoever runs it can write neither to a directory nor to one above, unless that is sticky like /tmp."""


@attrs.frozen
class LesseeUser:
    """The user, and how commands are run as it; made by `established` only.

    Attributes:
        with_python: whether Python drops the privileges, because `setpriv` could not.
    """

    user: User
    ground: Ground
    with_python: bool

    @classmethod
    async def established(
        cls, name: str, host: Host, *, is_here: bool, workspaces_dir: str, refused: Callable[[str], ConfigError]
    ) -> Self:
        """Find a user on a host, and see that commands can be run as it there.

        Args:
            is_here: whether that is this machine. workspaces_dir: where all slots are to lie.
            refused: returns the error that says where what was refused.

        Raises:
            ConfigError: who we are there is not root, there is no such user, it cannot get at the directory, or could
            replace it.
            HostUnreachableError: the host does not answer. OSError: it cannot say.
        """
        ground = await (in_thread(look_here, name) if is_here else look_on(host, name))
        if ground.own_uid != 0:
            who = "this process" if is_here else "the SSH login there"
            remedy = "start it as root" if is_here else "log in as root there (address: root@…)"
            raise refused(
                f"only root can run lessees as {name!r}, and {who} runs as user {ground.own_uid}; {remedy}, or leave "
                f"run_as out"
            )
        user = _suitable(name, ground, refused)
        failures = []
        for with_python, program, path in ((False, "setpriv", ground.setpriv), (True, "python3", ground.python)):
            candidate = cls(user, ground, with_python)
            failure = await candidate._tried(host, workspaces_dir, refused) if path else f"there is no {program}"
            if failure is None:
                return candidate
            failures.append(failure)
        raise refused(
            f"no command can be run as {name!r} ({'; '.join(failures)}); install util-linux, which has setpriv"
        )

    def prefix(self, group: int) -> tuple[str, ...]:
        """Return what is put before a command so that it runs as the user, with a further group."""
        return start_as(self.ground, [group], with_python=self.with_python)

    async def _tried(self, host: Host, place: str, refused: Callable[[str], ConfigError]) -> str | None:
        """Run commands as the user; return why none can be run so."""
        name = self.user.name
        async with host.joined() as joined:
            runs = joined(self._failure(host, place, "sh", "-c", _IS_THE_USER, "sh", str(self.user.uid)))
            enters = joined(self._failure(host, place, "test", "-x", place))
            keeps_off = joined(self._failure(host, place, "sh", "-c", _CANNOT_REPLACE, "sh", place))
        if runs.result() is None and enters.result() is not None:
            raise refused(
                f"{place} cannot be entered by {name!r}: it and every directory above must allow that (chmod o+x), or "
                f"choose another workspaces_dir"
            )
        if runs.result() is None and keeps_off.result() is not None:
            raise refused(
                f"{place}, or a directory above, can be changed by {name!r}, who could put other slots there; have it "
                f"belong to root, and write for nobody else (chmod go-w), or choose another workspaces_dir"
            )
        return runs.result()

    async def _failure(self, host: Host, place: str, *argv: str) -> str | None:
        """Run a command as the user, with a group like a slot's; return what went wrong."""
        path = self.ground.environment.get("PATH", os.defpath)
        done = await host.run([*self.prefix(private_group(place)), *argv], env={"PATH": path})
        said = done.stderr.decode(errors="replace").strip()
        return None if done.exit_code == 0 else said or f"exit status {done.exit_code}"


def _suitable(name: str, ground: Ground, refused: Callable[[str], ConfigError]) -> User:
    """Return the user, where this is one to run lessees as, who can read what we write."""
    umask, user = ground.umask, ground.user
    if umask is not None and umask & 0o055:
        raise refused(f"with the umask {umask:03o} {name!r} could not read what git writes; set it to 022")
    if user is None:
        raise refused(f"there is no user {name!r}; make one, or name another")
    if user.uid == 0:
        raise refused("root is no user to run lessees as; name an ordinary one")
    return user
