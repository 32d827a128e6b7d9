"""Lessees as a user of their own: what belongs to whom in a pool, and how a lease's commands run.

Trees and their git directories are the user's; everything else in the pool is root's. A slot's directory is open to a
group that nobody is in and that only this slot's commands are given: so one lease cannot reach another's tree, though
both run as the same user, and whatever a lease leaves running is known by that group, which it cannot shed. Which trees
there are and how they become clean is the workspace strategy's business.
"""

import os
from typing import Final

import attrs

from repopool_async._aio import in_thread
from repopool_async._git import GitRunner, lessee_environment
from repopool_async._users import Ground, User, group_name_here, look_here, private_group, start_as
from repopool_async.exceptions import ConfigError
from repopool_async.git_operations import GitOperations
from repopool_async.hosts.as_user import AsUser
from repopool_async.hosts.base import CloseEntries, FileStep, GiveTree, Host, MakeDirectory, SetAccess, WriteFile
from repopool_async.hosts.users import group_name_on, look_on
from repopool_async.models import Slot

_PASSED_ON: Final = frozenset(
    {
        *("PATH", "LANG", "LANGUAGE", "TERM", "COLORTERM", "TZ"),
        *("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH"),
    }
)
"""What of root's environment a lessee gets: the rest may hold root's secrets."""
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
class _Established:
    """How commands are run as the user."""

    ground: Ground
    user: User
    with_python: bool

    def prefix(self, group: int) -> tuple[str, ...]:
        return start_as(self.ground, [group], with_python=self.with_python)


class RunAs:
    """The user that a pool's lessees run as, on one host; nothing runs, and nothing is given away, until that is known.

    Args:
        name: the user's. host: where commands run, `lessee_host`, and where files are given away.
        is_here: whether that is this machine. is_isolated: whether slots do without the mirror's objects, so that it
            need not be readable.
    """

    def __init__(
        self,
        name: str,
        *,
        repo_name: str,
        host: Host,
        lessee_host: Host,
        is_here: bool,
        workspaces_dir: str,
        is_isolated: bool,
    ) -> None:
        self._name = name
        self._repo_name = repo_name
        self._host = host
        self._lessee_host = lessee_host
        self._is_here = is_here
        self._workspaces_dir = workspaces_dir
        self._is_isolated = is_isolated
        self._established: _Established | None = None
        self._unnamed: set[int] = set()

    async def boot_id(self) -> str:
        """Return the host's; see `Host.boot_id`."""
        return await self._host.boot_id()

    async def establish(self) -> None:
        """Find the user on the host, and see that commands can be run as it there.

        Raises:
            ConfigError: who we are there is not root, there is no such user, or it cannot get at the directory.
            HostUnreachableError: the host does not answer. OSError: it cannot say.
        """
        self._unnamed.clear()
        ground = await (in_thread(look_here, self._name) if self._is_here else look_on(self._host, self._name))
        try:
            self._established = await self._found(ground, self._required(ground))
        except ConfigError:
            self._established = None
            raise

    def _required(self, ground: Ground) -> User:
        """Return the user, where this is one to run lessees as, and we are somebody who can."""
        name, umask, user = self._name, ground.umask, ground.user
        if ground.own_uid != 0:
            who = "this process" if self._is_here else "the SSH login there"
            remedy = "start it as root" if self._is_here else "log in as root there (address: root@…)"
            raise self._refusal(
                f"only root can run lessees as {name!r}, and {who} runs as user {ground.own_uid}; {remedy}, or leave "
                f"run_as out"
            )
        if umask is not None and umask & 0o055:
            raise self._refusal(f"with the umask {umask:03o} {name!r} could not read what git writes; set it to 022")
        if user is None:
            raise self._refusal(f"there is no user {name!r}; make one, or name another")
        if user.uid == 0:
            raise self._refusal("root is no user to run lessees as; name an ordinary one")
        return user

    async def _found(self, ground: Ground, user: User) -> _Established:
        """Return how commands can be run as the user, by having tried it."""
        group = private_group(self._workspaces_dir)
        failures = []
        for with_python in (False, True):
            if not (ground.python if with_python else ground.setpriv):
                failures.append("there is no python3" if with_python else "there is no setpriv")
                continue
            candidate = _Established(ground, user, with_python)
            failure = await self._tried(candidate, group)
            if failure is None:
                return candidate
            failures.append(failure)
        raise self._refusal(
            f"no command can be run as {self._name!r} ({'; '.join(failures)}); install util-linux, which has setpriv"
        )

    async def _tried(self, candidate: _Established, group: int) -> str | None:
        """Run commands as the user; return why none can be run so.

        Raises:
            ConfigError: they can, and the user cannot get at the directory, or could put another in its place.
        """
        place = self._workspaces_dir
        async with self._host.joined() as joined:
            runs = joined(self._failure(candidate, group, "true"))
            enters = joined(self._failure(candidate, group, "test", "-x", place))
            keeps_off = joined(self._failure(candidate, group, "sh", "-c", _CANNOT_REPLACE, "sh", place))
        if runs.result() is not None:
            return runs.result()
        if enters.result() is not None:
            raise self._refusal(
                f"{place} cannot be entered by {self._name!r}: it and every directory above must allow that "
                f"(chmod o+x), or choose another workspaces_dir"
            )
        if keeps_off.result() is not None:
            raise self._refusal(
                f"{place}, or a directory above, can be changed by {self._name!r}, who could put other slots there; "
                f"have it belong to root, and write for nobody else (chmod go-w), or choose another workspaces_dir"
            )
        return None

    async def _failure(self, candidate: _Established, group: int, *argv: str) -> str | None:
        """Run a command as the user, with a group like a slot's; return what went wrong."""
        path = candidate.ground.environment.get("PATH", os.defpath)
        done = await self._host.run([*candidate.prefix(group), *argv], env={"PATH": path})
        said = done.stderr.decode(errors="replace").strip()
        return None if done.exit_code == 0 else said or f"exit status {done.exit_code}"

    def _refusal(self, text: str) -> ConfigError:
        where = "this machine" if self._is_here else f"host {self._host.id}"
        return ConfigError(f"{self._repo_name}: run_as, on {where}: {text}", key="run_as")

    @property
    def _present(self) -> _Established:
        if self._established is None:
            raise self._refusal(f"whether {self._name!r} can run commands is not known yet; try again")
        return self._established

    # -- what a lease runs with ----------------------------------------------------------------------------------

    def group_of(self, slot: Slot) -> int:
        """Return the group that only this slot's commands are in."""
        return private_group(slot.path)

    def host_for(self, slot: Slot) -> Host:
        """Return the host that runs commands as the user, in the slot."""
        host: Host = AsUser(self._lessee_host, self._present.prefix(self.group_of(slot)))
        return host

    def git_for(self, slot: Slot) -> GitOperations:
        """Return the git verbs as the user would run them."""
        return GitOperations(
            runner=GitRunner(self.host_for(slot), environment=lessee_environment(self.environment(slot)))
        )

    def environment(self, slot: Slot) -> dict[str, str]:
        """Return what the user's commands start with: as after a login, with nothing of root's but the ordinary."""
        given, user = self._present.ground.environment, self._present.user
        kept = {name: value for name, value in given.items() if name in _PASSED_ON or name.startswith("LC_")}
        return {
            **kept,
            "HOME": user.home,
            "USER": user.name,
            "LOGNAME": user.name,
            "SHELL": user.shell,
            # git lets nobody fetch from another user's directory unless the machine's configuration says so.
            "GIT_CONFIG_SYSTEM": _gitconfig(slot),
        }

    # -- what belongs to whom ------------------------------------------------------------------------------------

    def give(self, tree: str) -> FileStep:
        """Return the step that gives the user a tree we have just made, where nobody reaches it yet."""
        user = self._present.user
        return GiveTree(tree, user.uid, user.gid)

    async def require_own_group(self, slot: Slot) -> None:
        """See that the group of a slot is nobody's, unless that is known.

        Raises:
            ConfigError: it has a name on the host. HostUnreachableError, OSError: the host cannot be asked.
        """
        group = self.group_of(slot)
        if group in self._unnamed:
            return
        name = await (in_thread(group_name_here, group) if self._is_here else group_name_on(self._host, group))
        if name:
            raise self._refusal(f"{slot.path}: the group number {group} is taken by {name!r}; use another directory")
        self._unnamed.add(group)

    async def secure(self, slot: Slot) -> None:
        """Let the user get at the slot's tree and at nothing else in the pool that it could change or lock.

        A piece that asks the host once.
        """
        slot_directory = slot.path.rpartition("/")[0]
        pool_directory = slot_directory.rpartition("/slots/")[0]
        mirror_mode = 0o700 if self._is_isolated else 0o755
        gitconfig = _gitconfig(slot)
        await self._host.apply(
            [
                *(MakeDirectory(f"{pool_directory}/{name}") for name in ("tickets", "trash")),
                MakeDirectory(slot_directory),
                WriteFile(gitconfig, _git_configuration(slot.repo_url).encode(errors="surrogateescape")),
                SetAccess(f"{self._workspaces_dir}/locks", 0, 0, 0o700, is_optional=True),
                SetAccess(f"{pool_directory}/slots", 0, 0, 0o711),
                SetAccess(f"{pool_directory}/mirror.git", 0, 0, mirror_mode),
                CloseEntries(pool_directory, ("slots", "mirror.git")),
                SetAccess(gitconfig, 0, 0, 0o644),
                CloseEntries(slot_directory, ("tree", gitconfig.rpartition("/")[2])),
                SetAccess(pool_directory, 0, 0, 0o711),
                SetAccess(slot_directory, 0, self.group_of(slot), 0o710),
            ]
        )


def _gitconfig(slot: Slot) -> str:
    return f"{slot.path.rpartition('/')[0]}/gitconfig"


def _git_configuration(url: str) -> str:
    text = "[include]\n\tpath = /etc/gitconfig\n"
    path = url.removeprefix("file://")
    if path.startswith("/"):
        escaped = path.rstrip("/").replace("\\", "\\\\").replace('"', '\\"')
        text += f'[safe]\n\tdirectory = "{escaped}"\n\tdirectory = "{escaped}/.git"\n'
    return text
