"""What contamination vectors are made of: the register, and the scene that each of them is given.

A vector is a function that does one thing to a leased slot, as any process of the lessee could. It knows nothing of
pools: the same vectors are played against other recipes for comparison. What became of the slot is judged elsewhere.
"""

import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import attrs

LIMIT_SECONDS = 10.0
"""How long anything that a vector waits for may take."""

_POLL_SECONDS = 0.002
_LIFE_SECONDS = 60
"""What a vector leaves running ends itself after this, should nobody else do so."""


class NotPossibleError(Exception):
    """This machine, file system or user cannot play a vector."""


NOT_POSSIBLE = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOTTY, errno.ENOSYS})


@attrs.frozen
class Vector:
    """One contamination.

    Attributes:
        group: what it attacks. act: does it. before: makes things outside the slot, older than the slot's seal.
        needs_root: whether an ordinary user cannot do it.
        quarantine: why the slot may be isolated instead of cleaned; "" where it may not.
        leaves_trash: whether what was thrown away may be impossible to delete while the contamination lasts.
    """

    name: str
    group: str
    act: Callable[["Scene"], None]
    before: Callable[["Scene"], None] | None = None
    needs_root: bool = False
    quarantine: str = ""
    leaves_trash: bool = False

    def play(self, scene: "Scene") -> None:
        """Do it.

        Raises:
            NotPossibleError: it cannot be done here.
        """
        try:
            self.act(scene)
        except OSError as error:
            if error.errno in NOT_POSSIBLE:
                raise NotPossibleError(f"{self.name}: {error}") from error
            raise


VECTORS: dict[str, Vector] = {}


def vector(
    group: str,
    *,
    before: Callable[["Scene"], None] | None = None,
    needs_root: bool = False,
    quarantine: str = "",
    leaves_trash: bool = False,
) -> Callable[[Callable[["Scene"], None]], Callable[["Scene"], None]]:
    """Register the decorated function as a vector under its own name."""

    def register(act: Callable[["Scene"], None]) -> Callable[["Scene"], None]:
        name = act.__name__
        assert name not in VECTORS, name
        VECTORS[name] = Vector(name, group, act, before, needs_root, quarantine, leaves_trash)
        return act

    return register


def register_each(group: str, kinds: Sequence[str], act: Callable[["Scene", str], None], name: str) -> None:
    """Register one vector per kind; `name` has a place for it."""
    for kind in kinds:
        own = name.format("".join(letter if letter.isalnum() else "_" for letter in kind))
        assert own not in VECTORS, own
        VECTORS[own] = Vector(own, group, lambda scene, kind=kind: act(scene, kind))  # type: ignore[misc]


@attrs.frozen
class Left:
    """A process that a vector left, with all its threads.

    Attributes:
        source: the script that it runs.
        handle: by which it is known, and not who has its number once it is gone.
    """

    source: Path
    handle: int

    def tell(self) -> None:
        """Let it go on, and wait until it has done its deed, where it is still alive."""
        self.source.with_suffix(".told").touch()
        done = self.source.with_suffix(".done")
        self._signal(signal.SIGCONT)
        wait_for(lambda: done.exists() or self._has_ended(), lambda: f"{self.source.name} hangs")

    def end(self) -> None:
        """Kill it where it still runs; it is not known afterwards."""
        self._signal(signal.SIGKILL)
        os.close(self.handle)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, number)

    def _has_ended(self) -> bool:
        return bool(select.select([self.handle], [], [], 0)[0])


@attrs.define
class Scene:
    """Where a vector acts.

    Attributes:
        tree: the leased tree. outside: a directory beside the pool that nothing of the slot may change; it holds
            `file`, `dir/`, and the repository `repo/`.
        origin: the URL of the slot's repository.
        environment: what the lessee's own commands run with.
        run: runs a command in the slot, bearing the lease's mark, and waits for its end.
        late: done after the slot was returned and leased again.
        hidden_objects: ids of objects that the next lessee must not be able to read.
        left: what vectors left running.
    """

    tree: Path
    outside: Path
    origin: str
    environment: dict[str, str]
    run: Callable[..., None]
    late: list[Callable[[], None]] = attrs.field(factory=list)
    undo: list[Callable[[], None]] = attrs.field(factory=list)
    hidden_objects: list[str] = attrs.field(factory=list)
    left: list["Left"] = attrs.field(factory=list)

    @property
    def git_dir(self) -> Path:
        return self.tree / ".git"

    @property
    def canary(self) -> Path:
        """Where planted commands leave a mark."""
        return self.outside / "canary"

    @property
    def control(self) -> Path:
        """Where what was left running says and hears what to do."""
        return self.outside / "control"

    # -- doing things --------------------------------------------------------------------------------------------

    def git(self, *args: str, check: bool = True, input: bytes | None = None, cwd: Path | None = None) -> str:
        """Run git as the lessee."""
        done = subprocess.run(
            ["git", *args],
            cwd=cwd or self.tree,
            env=self.environment,
            input=input if input is not None else b"",
            capture_output=True,
            check=False,
            timeout=LIMIT_SECONDS,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"git {args}: {done.returncode}: {done.stderr.decode(errors='replace')}")
        return done.stdout.decode(errors="surrogateescape").strip()

    def write(self, name: str, data: str | bytes = "contaminated\n", *, mode: int | None = None) -> Path:
        """Write a file of the tree, making its directories."""
        path = self.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        if mode is not None:
            path.chmod(mode)
        return path

    def append(self, name: str, text: str) -> None:
        """Add to a file of the git directory, made where it is missing."""
        path = self.git_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)

    def commit(self, message: str = "Contaminate", files: Mapping[str, str] | None = None) -> str:
        """Commit files to whatever is checked out and return the id."""
        for name, text in (files or {"contaminated": "committed\n"}).items():
            self.write(name, text)
        self.git("add", "-A", "--", ".")
        self.git("commit", "-qm", message)
        return self.git("rev-parse", "HEAD")

    def forged_commit(self, text: str = "forged\n") -> str:
        """Make a commit that no branch has, and return its id."""
        blob = self.git("hash-object", "-w", "--stdin", input=text.encode())
        tree = self.git("mktree", input=f"100644 blob {blob}\tforged\n".encode())
        return self.git("commit-tree", "-m", "Forged", tree)

    def payload(self, name: str) -> str:
        """Return the path of a command that leaves a mark in the canary directory and copies its input."""
        path = self.outside / "bin" / name
        path.parent.mkdir(exist_ok=True)
        self.write_payload(path)
        return str(path)

    def write_payload(self, path: Path) -> None:
        """Write such a command; the mark bears the file's name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n: > '{self.canary}/{path.name}'\nexec cat\n")
        path.chmod(0o755)

    def edit_keeping_times(self, name: str) -> None:
        """Change a byte of a file in place, then put its times back."""
        path = self.tree / name
        status = path.stat()
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        with path.open("r+b") as file:
            file.write(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def replace_by_link(self, name: str, target: str | os.PathLike[str]) -> None:
        """Put a link in the place of whatever is there."""
        remove(self.tree / name)
        (self.tree / name).symlink_to(target)

    # -- leaving processes ---------------------------------------------------------------------------------------

    def leave(
        self, script: str, *, is_scrubbed: bool = False, cwd: Path | None = None, wrapper: Sequence[str] = ()
    ) -> None:
        """Start a Python script in the slot that outlives the command that started it, and wait until it is ready.

        Args:
            script: may call `ready()` when it is set up, `told()` to wait until the slot has been leased again, and
                `done()`.
            is_scrubbed: whether it does not bear the lease's mark. wrapper: a command that starts it.
        """
        name = f"process{len(list(self.control.iterdir()))}"
        source = self.control / f"{name}.py"
        source.write_text(_PREAMBLE.format(base=str(self.control / name), life=_LIFE_SECONDS) + script)
        scrub = ["env", "-i", f"PATH={os.environ['PATH']}"] if is_scrubbed else []
        ready = source.with_suffix(".ready")
        arguments = ["sh", "-c", _START, "sh", str(cwd or self.tree), *scrub, *wrapper, python(), "-ISB", str(source)]
        self.run(*arguments, env={"BASE": str(source.with_suffix(""))})
        assert ready.exists(), f"{name} did not start: {source.with_suffix('.err').read_text()}"
        left = Left(source, os.pidfd_open(int(ready.read_text())))
        self.left.append(left)
        self.late.append(left.tell)

    def end(self) -> None:
        """End what vectors left running, and undo what would be in the way of deleting things."""
        for left in self.left:
            left.end()
        for undo in reversed(self.undo):
            undo()


_START = f"""
cd "$1" && shift
setsid -f "$@" </dev/null >/dev/null 2>"$BASE.err"
turns=0
until [ -e "$BASE.ready" ] || [ $turns = {int(LIMIT_SECONDS / 0.01)} ]; do sleep 0.01; turns=$((turns + 1)); done
"""
"""Nothing of the pipes of the command that starts it is kept open; that one ends once it has left its process group."""

_PREAMBLE = """
import mmap, os, signal, socket, sys, time
BASE = {base!r}
signal.alarm({life})
def ready():
    with open(BASE + '.tmp', 'w') as file:
        file.write(str(os.getpid()))
    os.rename(BASE + '.tmp', BASE + '.ready')
def told():
    while not os.path.exists(BASE + '.told'):
        time.sleep(0.002)
def done():
    open(BASE + '.done', 'w').close()
"""


def python() -> str:
    """Return an interpreter that the present user may run; the one that runs us may be another's."""
    for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        if os.access(os.path.realpath(path), os.X_OK):
            return path
    raise NotPossibleError("there is no Python that this user may run")


def can_run(*argv: str) -> bool:
    """Return whether a command succeeds here."""
    return subprocess.run(argv, check=False, capture_output=True).returncode == 0


def wait_for(condition: Callable[[], object], message: Callable[[], str]) -> None:
    """Wait until a condition holds."""
    limit = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < limit, message()
        time.sleep(_POLL_SECONDS)


def remove(path: Path) -> None:
    """Delete whatever is at a path."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
