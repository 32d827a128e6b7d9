"""Lessees as a user of their own: what belongs to whom in a pool, and how a lease's commands run.

Trees and their git directories are the user's; everything else in the pool is root's. A slot's directory is open to a
group that nobody is in and that only this slot's commands are given: so one lease cannot reach another's tree, though
both run as the same user, and whatever a lease leaves running is known by that group, which it cannot shed. Which trees
there are and how they become clean is the workspace strategy's business.
"""

import os
from collections.abc import Mapping
from typing import Final, Self

import attrs

from repopool_async._aio import in_thread
from repopool_async._git import GitRunner, lessee_environment
from repopool_async._users import User, find_user, private_group, start_as
from repopool_async.exceptions import ConfigError
from repopool_async.git_operations import GitOperations
from repopool_async.hosts.as_user import AsUser
from repopool_async.hosts.base import FileKind, FileStep, GiveTree, Host, MakeDirectory, SetAccess, WriteFile
from repopool_async.models import Slot

_PASSED_ON: Final = frozenset(
    {
        *("PATH", "LANG", "LANGUAGE", "TERM", "COLORTERM", "TZ"),
        *("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH"),
    }
)
"""What of root's environment a lessee gets: the rest may hold root's secrets."""


@attrs.frozen
class RunAs:
    """The user that a pool's lessees run as.

    Attributes:
        is_isolated: whether slots do without the mirror's objects, so that it need not be readable.
    """

    user: User
    host: Host
    workspaces_dir: str
    is_isolated: bool
    with_python: bool = False

    @classmethod
    async def establish(cls, name: str, *, host: Host, workspaces_dir: str, is_isolated: bool) -> Self:
        """Find the user and see that commands can be run as it, there.

        Raises:
            ConfigError: this process is not root's, there is no such user, or it cannot get at the directory.
        """
        if os.geteuid() != 0:
            raise ConfigError(
                f"run_as: only root can run lessees as {name!r}, and this process runs as user {os.geteuid()}; start "
                f"it as root, or leave run_as out",
                key="run_as",
            )
        umask = await in_thread(_umask)
        if umask is not None and umask & 0o055:
            raise ConfigError(
                f"run_as: with the umask {umask:03o} {name!r} could not read what git writes; set it to 022",
                key="run_as",
            )
        user = await in_thread(find_user, name)
        candidate = cls(user, host, workspaces_dir, is_isolated)
        failure: str | None = None
        for one in (candidate, attrs.evolve(candidate, with_python=True)):
            failure = await one._failure("true")  # noqa: SLF001 - our own kind
            if failure is None:
                await one._require_reach()  # noqa: SLF001
                return one
        raise ConfigError(f"run_as: no command can be run as {name!r}: {failure}", key="run_as")

    async def _failure(self, *argv: str) -> str | None:
        """Run a command as the user, with a group like a slot's; return what went wrong."""
        prefix = start_as(self.user, [private_group(self.workspaces_dir)], with_python=self.with_python)
        if prefix is None:
            return "setpriv was not found"
        done = await self.host.run([*prefix, *argv], env={"PATH": os.environ.get("PATH", os.defpath)})
        said = done.stderr.decode(errors="replace").strip()
        return None if done.exit_code == 0 else said or f"exit status {done.exit_code}"

    async def _require_reach(self) -> None:
        if await self._failure("test", "-x", self.workspaces_dir) is not None:
            raise ConfigError(
                f"run_as: {self.workspaces_dir} cannot be entered by {self.user.name!r}: it and every directory above "
                f"must allow that (chmod o+x), or choose another workspaces_dir",
                key="run_as",
            )

    # -- what a lease runs with ----------------------------------------------------------------------------------

    def group_of(self, slot: Slot) -> int:
        """Return the group that only this slot's commands are in."""
        return private_group(slot.path)

    def host_for(self, slot: Slot) -> Host:
        """Return the host that runs commands as the user, in the slot."""
        prefix = start_as(self.user, [self.group_of(slot)], with_python=self.with_python)
        assert prefix is not None
        host: Host = AsUser(self.host, prefix)
        return host

    def git_for(self, slot: Slot) -> GitOperations:
        """Return the git verbs as the user would run them."""
        return GitOperations(
            runner=GitRunner(self.host_for(slot), environment=lessee_environment(self.environment(slot)))
        )

    def environment(self, slot: Slot, source: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return what the user's commands start with: as after a login, with nothing of root's but the ordinary."""
        given = os.environ if source is None else source
        kept = {name: value for name, value in given.items() if name in _PASSED_ON or name.startswith("LC_")}
        user = self.user
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
        return GiveTree(tree, self.user.uid, self.user.gid)

    async def secure(self, slot: Slot) -> None:
        """Let the user get at the slot's tree and at nothing else in the pool that it could change or lock."""
        slot_directory = slot.path.rpartition("/")[0]
        pool_directory = slot_directory.rpartition("/slots/")[0]
        mirror_mode = 0o700 if self.is_isolated else 0o755
        await self.host.apply(
            [
                *(MakeDirectory(f"{pool_directory}/{name}") for name in ("tickets", "trash")),
                WriteFile(_gitconfig(slot), _git_configuration(slot.repo_url).encode(errors="surrogateescape")),
                SetAccess(f"{self.workspaces_dir}/locks", 0, 0, 0o700),
            ]
        )
        open_ones = {"slots": SetAccess(f"{pool_directory}/slots", 0, 0, 0o711)}
        open_ones["mirror.git"] = SetAccess(f"{pool_directory}/mirror.git", 0, 0, mirror_mode)
        await self._close(pool_directory, open_ones)
        own = {"tree": None, "gitconfig": SetAccess(_gitconfig(slot), 0, 0, 0o644)}
        await self._close(slot_directory, own)
        await self.host.apply(
            [
                SetAccess(pool_directory, 0, 0, 0o711),
                SetAccess(slot_directory, 0, self.group_of(slot), 0o710),
            ]
        )

    async def _close(self, directory: str, exceptions: Mapping[str, FileStep | None]) -> None:
        """Take everything in a directory from everybody but root, apart from the exceptions."""
        steps: list[FileStep] = [step for step in exceptions.values() if step is not None]
        for name in await self.host.list_directory(directory):
            stat = await self.host.stat(f"{directory}/{name}")
            if stat is None or name in exceptions or stat.kind not in (FileKind.FILE, FileKind.DIRECTORY):
                continue
            mode = 0o700 if stat.kind is FileKind.DIRECTORY else 0o600
            steps.append(SetAccess(f"{directory}/{name}", 0, 0, mode))
        await self.host.apply(steps)


def _gitconfig(slot: Slot) -> str:
    return f"{slot.path.rpartition('/')[0]}/gitconfig"


def _git_configuration(url: str) -> str:
    text = "[include]\n\tpath = /etc/gitconfig\n"
    path = url.removeprefix("file://")
    if path.startswith("/"):
        escaped = path.rstrip("/").replace("\\", "\\\\").replace('"', '\\"')
        text += f'[safe]\n\tdirectory = "{escaped}"\n\tdirectory = "{escaped}/.git"\n'
    return text


def _umask() -> int | None:
    """Return this process's umask; reading it any other way would change it for all threads."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            return next((int(line.split()[1], 8) for line in file if line.startswith("Umask:")), None)
    except OSError:
        return None
