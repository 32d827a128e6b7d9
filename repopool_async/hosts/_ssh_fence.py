"""The fence of slots on a host reached over SSH; what lies on disk, and why it holds, is told in `remote/fence.sh`."""

from typing import Final

from repopool_async.exceptions import UnkillableError
from repopool_async.hosts._scripts import Answer, command, fence_key, fenced, new_word, padded, session_name
from repopool_async.hosts._ssh_shell import Shell

WATCH_TICKS: Final = 4
UNKILLABLE: Final = 96
USED: Final = 97
FENCED: Final = 99


class RemoteFence:
    """The part of a host that decides who may run in a slot."""

    _id: str
    _watch_seconds: float
    _sessions_directory: str

    @property
    def _shell(self) -> Shell:
        raise NotImplementedError

    async def enter(self, slot_directory: str, token: int, session: str | None, *, kills: bool = True) -> None:
        """See `Host.enter`."""
        call = command(
            "enter",
            slot_directory,
            padded(token),
            padded(token - 1),
            fence_key(slot_directory),
            "" if session is None else self._session_directory(session),
            "1" if kills else "",
        )
        answer = await self._shell.call(lambda _: call, "fence")
        if answer.status in (USED, FENCED):
            top = answer.stdout.decode(errors="replace")
            raise fenced(slot_directory, token, top, host_id=self._id, is_used=answer.status == USED)
        self._require(answer, slot_directory)

    async def leave(self, slot_directory: str, token: int) -> None:
        """See `Host.leave`."""
        call = command("leave", slot_directory, padded(token), fence_key(slot_directory))
        answer = await self._shell.call(lambda _: call, "fence", is_repeatable=True)
        if answer.status == FENCED:
            raise fenced(slot_directory, token, answer.stdout.decode(errors="replace"), host_id=self._id)
        self._require(answer, slot_directory)

    async def kill(self, slot_directory: str, below: int) -> None:
        """See `Host.kill`."""
        call = command("kill_until", slot_directory, padded(below - 1), fence_key(slot_directory))
        self._require(await self._shell.call(lambda _: call, "fence", is_repeatable=True), slot_directory)

    async def beat(self, session: str) -> None:
        """See `Host.beat`."""
        directory = self._session_directory(session)
        call = command("beat", directory, new_word(), f"{self._watch_seconds / WATCH_TICKS:g}", WATCH_TICKS)
        (await self._shell.call(lambda _: call, "watch", is_repeatable=True)).require(directory)

    async def end_session(self, session: str) -> None:
        """See `Host.end_session`."""
        directory = self._session_directory(session)
        call = command("rm", "-rf", directory)
        (await self._shell.call(lambda _: call, is_repeatable=True)).require(directory)

    def _session_directory(self, session: str) -> str:
        return f"{self._sessions_directory}/{session_name(session)}"

    def _require(self, answer: Answer, slot_directory: str) -> None:
        if answer.status == UNKILLABLE:
            raise UnkillableError(
                f"{slot_directory} on host {self._id}: {answer.stderr.decode(errors='replace').strip()}; look at them "
                "on the host, then repair_slot"
            )
        answer.require(slot_directory)
