"""Lessees as a user of their own: what belongs to whom in a pool, and how a lease's commands run.

Trees and their git directories are the user's; everything else in the pool is root's. A slot's directory is open to a
group that nobody is in and that only this slot's commands are given: so one lease cannot reach another's tree, though
both run as the same user, and whatever a lease leaves running is known by that group, which it cannot shed. Which trees
there are and how they become clean is the workspace strategy's business.
"""

from typing import Final

from repopool_async._aio import in_thread
from repopool_async._git import GitRunner, lessee_environment
from repopool_async._users import group_name_here, private_group
from repopool_async.exceptions import ConfigError
from repopool_async.git_operations import GitOperations
from repopool_async.hosts.as_user import AsUser
from repopool_async.hosts.base import CloseEntries, FileStep, GiveTree, Host, MakeDirectory, SetAccess, WriteFile
from repopool_async.hosts.users import group_name_on
from repopool_async.lessee_user import LesseeUser
from repopool_async.models import Slot

_PASSED_ON: Final = frozenset(
    {
        *("PATH", "LANG", "LANGUAGE", "TERM", "COLORTERM", "TZ"),
        *("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH"),
    }
)
"""What of root's environment a lessee gets: the rest may hold root's secrets."""


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
        self._established: LesseeUser | None = None
        self._unnamed: set[int] = set()

    async def boot_id(self) -> str:
        """Return the host's; see `Host.boot_id`."""
        return await self._host.boot_id()

    async def establish(self) -> None:
        """Find the user on the host, and see that commands can be run as it there; raises as `LesseeUser.established`.

        Where that is refused nothing more is done as the user, where it cannot be found out it stays as it was.
        """
        self._unnamed.clear()
        try:
            self._established = await LesseeUser.established(
                self._name,
                self._host,
                is_here=self._is_here,
                workspaces_dir=self._workspaces_dir,
                refused=self._refusal,
            )
        except ConfigError:
            self._established = None
            raise

    def _refusal(self, text: str) -> ConfigError:
        where = "this machine" if self._is_here else f"host {self._host.id}"
        return ConfigError(f"{self._repo_name}: run_as, on {where}: {text}", key="run_as")

    @property
    def _present(self) -> LesseeUser:
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
