"""The pool's `setup` command: when it is due in a slot, and running it there as a lessee's command is run.

What it makes stays where paths are kept; a file beside the tree remembers what it was run for. Cleaning up after it,
and what becomes of a slot in which it fails, is the cleaner's business.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from repopool_async._aio import shielded
from repopool_async._git import LOCATION_VARIABLES, WORK_MARK, GitRunner
from repopool_async._newest import Newest
from repopool_async.exceptions import CommandTimeoutError, SetupError
from repopool_async.hosts.base import Host, WriteFile
from repopool_async.mirror import Mirror
from repopool_async.models import CommandResult, Slot
from repopool_async.workspaces.kept_paths import KeptPaths
from repopool_async.workspaces.slot_paths import SlotPaths

_OUTPUT_LIMIT: Final = 256 * 1024
_SHOWN_CHARACTERS: Final = 2000
_STAMP_LIMIT: Final = 1024 * 1024
_COMMITS_REMEMBERED: Final = 256


class SlotSetup:
    """The setup of a pool's slots.

    Args:
        host: where lessees' commands run. git, mirror: tell what commits have in the key files.
        kept: where what it makes stays. command: as an argument list. key_files: whose change makes it due again.
        timeout: seconds that one run may take. is_ahead: whether it is run before anybody waits for it.
    """

    def __init__(
        self,
        *,
        host: Host,
        git: GitRunner,
        mirror: Mirror,
        kept: KeptPaths,
        command: Sequence[str],
        key_files: Sequence[str],
        timeout: float,
        is_ahead: bool,
    ) -> None:
        self.is_ahead: Final = is_ahead
        self._host = host
        self._git = git
        self._mirror = mirror
        self._kept = kept
        self._command = tuple(command)
        self._key_files = tuple(name.rstrip("/") for name in key_files)
        self._timeout = timeout
        self._keys: Newest[str, str] = Newest(_COMMITS_REMEMBERED)

    async def is_due(self, slot: Slot, commit: str, *, is_wanted: bool) -> bool:
        """Return whether what lies in a slot that shows a commit was not set up for it.

        Args:
            is_wanted: whether somebody waits; otherwise what failed is not tried again.
        """
        stamp = await self._stamp(slot)
        if stamp.get("key") != await self._key(commit):
            return True
        if stamp.get("failed"):
            return is_wanted
        made = [name for name in await self._kept.of_commit(commit) if name in stamp.get("made", ())]
        return bool(made) and not all(await self._host.stat_many([f"{slot.path}/{name}" for name in made]))

    async def run(self, slot: Slot, commit: str, *, mark: str) -> None:
        """Throw away what is kept, and run the command in a clean tree; clean it afterwards, however this ends.

        Args:
            mark: the name of the variable that commands of a lease bear.

        Raises:
            SetupError: it failed, took too long or left something running; the message ends with what it said last.

        Whatever it left running has been ended then, also when cancelled.
        """
        await self._kept.take_out(slot, commit)
        await self._kept.drop(slot)
        marks = {mark: f"setup-{slot.slot_id}-{secrets.token_hex(8)}", WORK_MARK: slot.path}
        try:
            await self._run(slot, {**marks, "REPOPOOL_SLOT_ID": slot.slot_id})
        finally:
            ending = self._host.end_processes(mark=f"{mark}={marks[mark]}", tree=slot.path)
            ended = await shielded(ending, name=f"end-setup-{slot.slot_id}")
        if ended.bystanders:
            raise self._failure(slot, f"left processes that cannot be told from others: {ended.bystanders}", None)

    async def note(self, slot: Slot, commit: str, *, failed: bool) -> None:
        """Remember what a slot was set up for, or that this failed, once it is clean again."""
        names = await self._kept.of_commit(commit)
        made = [name for name in names if await self._host.stat(f"{slot.path}/{name}") is not None]
        stamp = {"key": await self._key(commit), "failed": failed, "made": made}
        await self._host.apply([WriteFile(SlotPaths(slot.path).kept_stamp, json.dumps(stamp).encode())])

    async def _run(self, slot: Slot, marks: Mapping[str, str]) -> None:
        login = await self._host.login_environment()
        inherited = {name: value for name, value in login.items() if name not in LOCATION_VARIABLES}
        try:
            done = await self._host.run(
                self._command,
                env={**inherited, **marks, "PWD": slot.path},
                cwd=slot.path,
                timeout=self._timeout,
                stdout_limit=_OUTPUT_LIMIT,
                stderr_limit=_OUTPUT_LIMIT,
            )
        except CommandTimeoutError as error:
            raise self._failure(slot, f"was not finished within {self._timeout:g} s (setup_timeout)", None) from error
        except OSError as error:
            raise self._failure(slot, f"cannot be started ({error.strerror})", None) from error
        if done.exit_code != 0:
            raise self._failure(slot, f"exited with {done.exit_code}", done)

    def _failure(self, slot: Slot, what: str, done: CommandResult | None) -> SetupError:
        output = b"" if done is None else done.stdout + done.stderr
        said = output.decode(errors="replace").strip()[-_SHOWN_CHARACTERS:]
        return SetupError(
            f"{slot.slot_id}: the pool's setup, {self._command[0]}, {what}; mend it or the option `setup`, then lease "
            f"again" + (f":\n{said}" if said else ""),
            argv=self._command,
            exit_code=done.exit_code if done else 0,
            stdout=done.stdout if done else b"",
            stderr=done.stderr if done else b"",
            slot_id=slot.slot_id,
            repo_name=slot.repo_name,
        )

    async def _stamp(self, slot: Slot) -> dict[str, Any]:
        data = await self._host.read_bytes(SlotPaths(slot.path).kept_stamp, limit=_STAMP_LIMIT)
        try:
            stamp = json.loads(data or b"{}")
        except ValueError:
            return {}
        return stamp if isinstance(stamp, dict) else {}

    async def _key(self, commit: str) -> str:
        """Return what tells commits apart that need another setup."""
        if commit not in self._keys:
            self._keys[commit] = await self._ask(commit)
        return self._keys[commit]

    async def _ask(self, commit: str) -> str:
        digest = hashlib.sha256(repr((self._command, self._kept.names)).encode(errors="surrogateescape"))
        if self._key_files:
            listing = await self._git.run(
                *("ls-tree", "-z", commit, "--", *sorted(self._key_files)),
                git_dir=self._mirror.path,
                env={"GIT_LITERAL_PATHSPECS": "1"},
            )
            digest.update(listing.stdout)
        return digest.hexdigest()
