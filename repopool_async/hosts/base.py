"""The host protocol: where commands run and files live, whether this machine or one over SSH.

Everything above this floor reaches a slot's contents only through it: argument lists, never a shell string; paths are
absolute, POSIX, on the host, and carry undecodable bytes as surrogates (`os.fsdecode`). A sequence of file steps is one
thread hop here and one round trip on a remote host. The host knows nothing of leases, mirrors or git.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from typing import Final, Protocol, Self

import attrs

from repopool_async.hosts.joined import Joined
from repopool_async.models import CommandResult

DEFAULT_STDOUT_LIMIT: Final = 256 * 1024 * 1024
"""Bytes of standard output kept of a command whose output is parsed."""
DEFAULT_STDERR_LIMIT: Final = 64 * 1024

OutputCallback = Callable[[str, bytes], None]
"""Called with `stdout` or `stderr` and a chunk, on the event loop, as output arrives."""


class FileKind(StrEnum):
    """What an inode is."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    SPECIAL = "special"
    """A fifo, socket or device."""


@attrs.frozen
class FileStat:
    """What `lstat` says of a path."""

    kind: FileKind
    mode: int
    size: int
    device: int
    inode: int
    links: int
    mtime_ns: int
    ctime_ns: int


@attrs.frozen
class Inode:
    """One inode among all of a machine's; where a host does not tell devices apart, `device` is 0."""

    device: int
    inode: int


@attrs.frozen
class MakeDirectory:
    """Make a directory and its missing parents; one that exists stays as it is."""

    path: str
    mode: int = 0o755


@attrs.frozen
class WriteFile:
    """Write a file under a temporary name beside it, then rename it into place; parents must exist.

    Attributes:
        is_durable: whether file and directory are synced to disk.
    """

    path: str
    data: bytes
    mode: int = 0o644
    is_durable: bool = False


@attrs.frozen
class CopyFile:
    """Copy a regular file's bytes, mode and modification time under a temporary name, then rename it into place.

    The time is kept to the nanosecond. A missing source is passed over where `is_optional`.
    """

    source: str
    target: str
    is_optional: bool = False


@attrs.frozen
class Rename:
    """Rename within one file system, replacing a file or an empty directory; the source must exist."""

    source: str
    target: str


@attrs.frozen
class Discard:
    """Rename whatever is at `path`, of whatever kind and mode, into the directory `trash` under a new unique name.

    What is absent is passed over. The trash is on the same file system and is emptied by `remove_tree`.
    """

    path: str
    trash: str


@attrs.frozen
class RemoveFile:
    """Unlink a file or link; what is absent is passed over."""

    path: str


@attrs.frozen
class SetAccess:
    """Set owner, group and permissions of a file or directory; a link is refused. Only root may give things away.

    A missing one is passed over where `is_optional`.
    """

    path: str
    uid: int
    gid: int
    mode: int
    is_optional: bool = False


@attrs.frozen
class CloseEntries:
    """Take the files and directories in a directory, not what is in those, from everybody but root.

    Attributes:
        spared: names of those that stay as they are.
    """

    path: str
    spared: tuple[str, ...] = ()


@attrs.frozen
class GiveTree:
    """Give a directory and everything in it to a user, links themselves and not what they lead to.

    Nobody else may be changing it meanwhile.
    """

    path: str
    uid: int
    gid: int


FileStep = MakeDirectory | WriteFile | CopyFile | Rename | Discard | RemoveFile | SetAccess | CloseEntries | GiveTree


@attrs.frozen
class Command:
    """One command of a batch.

    Attributes:
        env: the complete environment. input: given on standard input, which is otherwise empty.
        via: as of `Host.run`.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str | None = None
    input: bytes | None = None
    via: tuple[str, ...] = ()


@attrs.frozen
class Settled:
    """Entries of a tree that we ourselves changed later than the rest.

    Attributes:
        since_ns: they count as changed only where their ctime is not older than this. names: which; relative.
    """

    since_ns: int
    names: frozenset[str]


@attrs.frozen
class Known:
    """What belongs in a tree, by name: nothing else does.

    Attributes:
        files: by directory (`""`: the root); links count as files. directories: likewise.
    """

    files: Mapping[str, frozenset[str]]
    directories: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Return it for a tree of these files and the directories they lie in."""
        files: dict[str, set[str]] = {"": set()}
        directories: dict[str, set[str]] = {"": set()}
        for name in names:
            parent, _, last = name.rpartition("/")
            files.setdefault(parent, set()).add(last)
        for name in list(files):
            below = name
            while below:
                parent, _, last = below.rpartition("/")
                files.setdefault(parent, set())
                directories.setdefault(parent, set()).add(last)
                below = parent
        return cls(
            {name: frozenset(inside) for name, inside in files.items()},
            {name: frozenset(directories.get(name, ())) for name in files},
        )

    @property
    def file_count(self) -> int:
        """How many files there are in all."""
        return sum(len(names) for names in self.files.values())

    def has_directory(self, name: str) -> bool:
        """Return whether a directory belongs there."""
        return name in self.files

    def has_file(self, name: str) -> bool:
        """Return whether a file or link belongs there."""
        directory, _, last = name.rpartition("/")
        return last in self.files.get(directory, ())


@attrs.frozen
class TreeInspection:
    """What one pass over a tree found; names are relative to its root, `/` between parts.

    Attributes:
        entries: how many inodes were seen.
        changed: files, links and specials whose ctime is not older than asked.
        changed_directories: directories likewise (an entry came, went or was renamed in them, or their mode changed).
        special: fifos, sockets and devices.
        repositories: entries named `.git` below the root, never descended into.
        multiply_linked: regular files with more than one link.
        unlocked: directories whose mode kept their owner out; they have been given `u+rwx`.
        mounts: what something is mounted on, never descended into.
        irregular: changed directories, and the root as `.`, that are not as a new directory beside it would be: mode,
            owner, extended attributes, access lists, flags.
        unknown: what does not belong there, whenever it came; directories among it are not descended into, and what is
            in them is reported nowhere else, but for mounts.
        is_complete: whether all files that belong there are there.
    """

    entries: int
    changed: tuple[str, ...] = ()
    changed_directories: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()
    multiply_linked: tuple[str, ...] = ()
    unlocked: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    irregular: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    is_complete: bool = True


@attrs.frozen
class EndedProcesses:
    """What ending a lease's processes did.

    Attributes:
        killed: pids ended because they bore the lease's mark.
        bystanders: `pid name` of processes that are not the lease's but stand in the tree, or hold files of it open or
            mapped.
        survivors: pids of the lease's own that could not be ended.
    """

    killed: tuple[int, ...] = ()
    bystanders: tuple[str, ...] = ()
    survivors: tuple[int, ...] = ()


@attrs.frozen
class Wanted:
    """Files worth taking out of a directory that somebody else filled.

    Attributes:
        pattern: a regular expression that a file's name, relative to that directory, must match as a whole.
        limit_bytes: the largest that is taken.
        is_read: whether the contents are returned instead of copied.
        named_by: the hash that deflated contents must have, whose hexadecimal digits the last two parts of the name
            are; whatever differs is not taken. Empty for no such check.
    """

    pattern: str
    limit_bytes: int
    is_read: bool = False
    named_by: str = ""


@attrs.frozen
class Collected:
    """What was taken.

    Attributes:
        names: of the files copied. contents: of those read, by name.
        skipped: what matched and was not taken, a line each, name and reason.
    """

    names: tuple[str, ...]
    contents: Mapping[str, bytes]
    skipped: tuple[str, ...]


@attrs.frozen
class Guard:
    """Under which lease a command runs: its host refuses to start it under any but the slot's present token.

    Attributes:
        slot_directory: where `fence/` and `run/` lie, beside the tree.
    """

    slot_directory: str
    token: int


@attrs.frozen
class ClockOffset:
    """How far a host's wall clock is ahead of its boot clock; it moves only when somebody sets the wall clock.

    Attributes:
        precision_ns: two answers that differ by less say nothing.
    """

    wall_minus_boot_ns: int
    precision_ns: int


@attrs.frozen
class Moment:
    """When something was, on the boot-time clock of the machine on which it was noted.

    Attributes:
        boot_id: of the boot that is counted from. seconds: since then.
    """

    boot_id: str
    seconds: float


class HostProcess(Protocol):
    """A running command with streams."""

    @property
    def pid(self) -> int:
        """The process id, which is also its process group's."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs; a death by signal N is -N."""

    async def read(self, size: int = 65536) -> bytes:
        """Return the next bytes of standard output, `b""` at its end."""

    async def read_stderr(self, size: int = 65536) -> bytes:
        """Return the next bytes of standard error, `b""` at its end (always `b""` where merged or inherited)."""

    async def write(self, data: bytes) -> None:
        """Write to standard input and wait until the buffer has room."""

    async def close_stdin(self) -> None:
        """Close standard input; a second call does nothing."""

    def signal(self, number: int) -> None:
        """Send a signal to the whole process group, where it still runs."""

    async def wait(self) -> int:
        """Return the exit code once the process has ended."""


class Host(Protocol):
    """Where commands run and files live.

    Commands run in their own session. However a call ends (return, error, cancellation once or twice) their whole
    process group is gone afterwards: TERM, a grace period, KILL, reaped. File operations raise `OSError` as the
    platform names it; they are short and finish even when the caller is cancelled.
    """

    @property
    def id(self) -> str:
        """The host's name in records."""

    @property
    def can_tell_unknown(self) -> bool:
        """Whether it can be told what belongs in a tree, to say what does not."""

    async def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None = None,
        input: bytes | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        stdout_limit: int = DEFAULT_STDOUT_LIMIT,
        stderr_limit: int = DEFAULT_STDERR_LIMIT,
        on_output: OutputCallback | None = None,
        guard: Guard | None = None,
        via: Sequence[str] = (),
    ) -> CommandResult:
        """Run one command to its end.

        Args:
            argv: the command; no shell is involved.
            env: the complete environment.
            cwd: the directory, `/` when missing.
            input: given on standard input, which is otherwise empty.
            timeout: seconds in all. idle_timeout: seconds without any output.
            stdout_limit: bytes kept; the last ones, earlier ones are dropped. stderr_limit: likewise.
            on_output: is called with every chunk as it comes.
            guard: the lease it belongs to.
            via: what is to start the command, which is found first as if there were no such thing.

        Raises:
            CommandTimeoutError: a limit was passed; the process group is gone.
            FencedError: the guard's token is not the slot's present one; nothing has run.
            HostUnreachableError: the host does not answer, or the connection was lost meanwhile.
            OSError: the command or directory does not exist or may not be used.
        """

    async def batch(
        self, commands: Sequence[Command], *, timeout: float | None = None, stop: bool = True
    ) -> list[CommandResult]:
        """Run commands one after another, in one round trip.

        Args:
            timeout: seconds for all of them. stop: whether the first failure (exit code not 0) ends the batch.

        Returns:
            The results of those that ran.
        """

    def joined(self) -> Joined:
        """Return a block whose pieces of work are done in order at its end, in one round trip where possible."""

    def open_process(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None = None,
        stdin: bool = False,
        inherit: bool = False,
        guard: Guard | None = None,
        via: Sequence[str] = (),
    ) -> AbstractAsyncContextManager[HostProcess]:
        """Run a command while the block runs; leaving the block ends what is left of its process group.

        Args:
            stdin: whether `write` will be used; otherwise standard input is empty.
            inherit: connect standard input, output and error to this process's own instead of to pipes.
            guard: the lease it belongs to. via: as of `run`, whose errors are raised.
        """

    async def apply(self, steps: Sequence[FileStep]) -> None:
        """Do file steps in order, in one thread hop or round trip; the first failure ends them.

        Raises:
            OSError: a step failed; those before it stay done.
        """

    async def read_bytes(self, path: str, *, limit: int) -> bytes | None:
        """Return a regular file's contents, None where there is no such file; a link is not followed.

        Raises:
            OSError: it is no regular file, is larger than `limit` bytes (EFBIG), or cannot be read.
        """

    async def stat(self, path: str) -> FileStat | None:
        """Return what is at `path`, itself and not what it links to; None where there is nothing."""

    async def stat_many(self, paths: Sequence[str]) -> list[FileStat | None]:
        """Return what `stat` would of each path, in one thread hop or round trip."""

    async def list_directory(self, path: str) -> list[str]:
        """Return the names in a directory, sorted; an absent directory has none."""

    async def remove_tree(self, path: str, *, is_urgent: bool = True) -> None:
        """Delete whatever is at `path`: links not followed, modes that forbid it changed, other mounts not entered.

        What is absent is no error. Interrupted, it has deleted a part.

        Args:
            is_urgent: otherwise everything else may go first, where the host can do so.

        Raises:
            OSError: something could not be deleted (EBUSY where something is mounted).
        """

    async def inspect_tree(
        self,
        root: str,
        *,
        since_ns: int | None,
        settled: Settled | None = None,
        passed_over: Collection[str] = (),
        known: Known | None = None,
        beside: str | None = None,
        only: Inode | None = None,
    ) -> TreeInspection:
        """Look at every inode of a tree once and make its directories accessible to their owner.

        Nothing is followed, opened for reading or executed.

        Args:
            since_ns: report what has a ctime not older than this as changed; None reports everything.
            settled: entries with a later time of their own.
            passed_over: names of directories that are not entered and never count as changed; `irregular` and `mounts`
                are reported of them too, whenever they came to be so. What has such a name and is no directory is
                treated as any other.
            known: what belongs there; everything where missing. Not together with `passed_over`.
            beside: what the new directory is made next to that `irregular` compares with; the root where missing. Who
                looks at a part of a tree names the tree, so that nothing is made inside it.
            only: what the root has to be; nothing is done in another.

        Raises:
            NotADirectoryError: the root is no directory, or a link. OSError: ESTALE: it is not the one it has to be.
        """

    async def find_unknown(self, root: str, directories: Collection[str], known: Known) -> list[str]:
        """Return what lies in some of a tree's directories (`""`: the root itself) and does not belong there."""

    async def remove_entries(self, root: str, names: Sequence[str], *, trash: str) -> int:
        """Remove entries of a tree by name: files and links unlinked, directories renamed into `trash`.

        A name whose parents are no longer real directories inside the tree is passed over, so that nothing outside is
        touched whatever the tree contains.

        Returns:
            How many there were.
        """

    async def move_directories(self, source: str, target: str, names: Sequence[str]) -> tuple[str, ...]:
        """Move directories, by name, from one directory to the same places in another on the same file system.

        Only what is an ordinary directory moves, with all that is in it: no link, not reached through one, owner,
        attributes and flags as a new directory beside `source` would have them, nothing mounted on it or inside; its
        mode becomes a new one's. Missing directories are made on the way in `target`, and `target` itself. Whatever is
        not so, is absent, or whose place is taken is passed over.

        Returns:
            Which were moved.
        """

    async def file_system_clock_ns(self, directory: str, *, moves_on: bool = False) -> int:
        """Return the present time of the file system's own clock in nanoseconds: the ctime a change would get now.

        Args:
            moves_on: wait, for some milliseconds, until it is no longer the time that the last change may have got.
        """

    async def end_processes(
        self,
        *,
        mark: str,
        tree: str | None,
        grace_seconds: float = 2.0,
        since: Moment | None = None,
        group: int | None = None,
    ) -> EndedProcesses:
        """End every process whose environment contains `mark`, and look for others that stand in `tree`.

        Args:
            mark: a whole `NAME=value`. grace_seconds: between TERM and KILL.
            tree: None asks for nobody else, and costs half as much.
            since: a process of our own user that began later and lets nobody see what it holds counts as a bystander
                too. A moment of neither the host's present boot nor this machine's says nothing.
            group: whatever is in this group is ended too.
        """

    async def boot_id(self) -> str:
        """Return an id that changes at every boot; cheap, it is asked once per connection."""

    async def clock_offset(self) -> ClockOffset:
        """Return how the host's clocks stand to each other."""

    async def login_environment(self) -> Mapping[str, str]:
        """Return the variables that whoever runs commands there is given; cheap after the first time."""

    async def is_network_file_system(self, path: str) -> bool:
        """Return whether `path` lies on a network file system; False where the platform cannot say."""

    async def collect_files(
        self,
        root: str,
        inside: str,
        target: str,
        wanted: Sequence[Wanted],
        *,
        enter: str,
        limit_bytes: int,
        limit_files: int,
    ) -> Collected:
        """Copy regular files of a directory somewhere below `root` to `target`, under the same relative names.

        No link is followed, at whatever step, nothing special is opened, no other file system is entered.

        Args:
            inside: the directory, relative to `root`; what is no directory holds nothing.
            target: a directory of ours; none of the files may be there.
            enter: a regular expression that the relative name of a directory below must match to be entered.
            limit_bytes, limit_files: of all together.

        Raises:
            OSError: the target cannot be written.
        """

    async def measure_entries(self, root: str, names: Sequence[str]) -> list[int | None]:
        """Return the sizes of entries of a tree, and make regular files readable to their owner.

        None stands for what is neither a regular file nor a link, or has parents that are no real directories.
        """

    # The fence: the host is the last word on who may run in a slot, see `remote/fence.sh` for what lies on disk.

    async def enter(self, slot_directory: str, token: int, session: str | None, *, kills: bool = True) -> None:
        """Make a token the slot's present one, and end what runs there under lower ones.

        Args:
            slot_directory: is made where it is missing.
            kills: whether to look for what runs there. Who entered last, and has let nothing run since, need not.
            token: enters once, whatever becomes of the call.
            session: who enters; the host's watchdog ends what runs in its slots when it gives no sign of life. None
                for nobody whom the watchdog shall know.

        Raises:
            FencedError: there is a higher token, or this one has entered before; nothing of the slot may be touched.
            UnkillableError: something does not die; the token has entered all the same, so that nothing else starts.
        """

    async def leave(self, slot_directory: str, token: int) -> None:
        """Let nothing start in a slot under a token any more, nor under lower ones, and end what runs there.

        Only a higher token can enter afterwards; it may be called again.

        Raises:
            FencedError: there is a higher token; nothing of the slot may be touched.
            UnkillableError: something does not die.
        """

    async def kill(self, slot_directory: str, below: int) -> None:
        """End what runs in a slot under tokens below one, and forget it; who may run there does not change.

        Raises:
            UnkillableError: something does not die.
        """

    async def beat(self, session: str) -> None:
        """Give a sign of life, and see that a watchdog runs which does without its sender.

        When none comes for as long as the host was told, it ends what runs in the slots that the session has entered
        and lets nothing new start there. A session that beats again after that has to enter with new tokens.
        """

    async def end_session(self, session: str) -> None:
        """Forget a session: its watchdog ends, what runs in its slots goes on."""
