"""What tests of every floor share: git that depends on nobody's configuration, and repositories to clone from."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import _sampling, _scratch
from tests._forks import NOBODY

GIT_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "A U Thor",
    "GIT_AUTHOR_EMAIL": "author@example.com",
    "GIT_AUTHOR_DATE": "2024-01-01T00:00:00+0000",
    "GIT_COMMITTER_NAME": "C O Mitter",
    "GIT_COMMITTER_EMAIL": "committer@example.com",
    "GIT_COMMITTER_DATE": "2024-01-01T00:00:00+0000",
    "GIT_TERMINAL_PROMPT": "0",
}

MAIN_FILES: Mapping[str, bytes | None] = {
    ".gitignore": b"*.log\nbuild/\n.env\n",
    "README.md": b"# A small repository\n",
    "src/app.py": b'print("hello")\n',
    "src/data/table.csv": b"a,b\n1,2\n",
}

MakeCommit = Callable[[Path, str, Mapping[str, bytes | None]], str]


def pytest_configure(config: pytest.Config) -> None:
    """Put temporary files where they are fast, and where nothing stays of them."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        place = _scratch.fast_place()
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(place))  # what a failed test wrote is kept for a look
        stack = ExitStack()
        config.add_cleanup(stack.close)
        _scratch.use(stack.enter_context(_scratch.scratch(place=place)))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers end with the run, not only their files
    else:
        own = Path(tempfile.gettempdir(), worker)
        own.mkdir()
        _scratch.use(own)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what is allowed more time than the rest: whichever came last would keep one process busy alone."""
    _sampling.leave_out(config, items)
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


def pytest_collection_finish() -> None:
    """Spare later looks for garbage what is there by now and stays: each took longer than most tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Fail where a test left temporary files outside of pytest's."""
    yield
    assert os.listdir(tempfile.gettempdir()) == []


@pytest.fixture(scope="session", autouse=True)
def _git_environment() -> Iterator[None]:
    """Make every git of this process and its children behave the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            patch.delenv(name)
        for name, value in GIT_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def _signals() -> Iterator[None]:
    """Begin as after a login: what runs in the background or under `nohup` ignores signals, and so would children."""
    ignored = [
        number
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
        if signal.getsignal(number) is signal.SIG_IGN
    ]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let children find this run's compiled code where none may lie beside the sources: a fifth of a `repopool run`."""
    if not sys.dont_write_bytecode or sys.pycache_prefix:
        yield
        return
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str((shared or tmp_path_factory.getbasetemp()) / "compiled"))
        yield


def _git(repository: Path, *arguments: str, input: bytes | None = None) -> str:
    done = subprocess.run(
        ["git", "-C", str(repository), *arguments], input=input, check=True, capture_output=True, timeout=60
    )
    return done.stdout.decode().strip()


def _commit(repository: Path, branch: str, files: Mapping[str, bytes | None]) -> str:
    """Commit to a branch without a working tree; fast-import is one process however many files there are."""
    parent = _git(repository, "for-each-ref", "--format=%(objectname)", f"refs/heads/{branch}")
    message = f"Change {', '.join(files)}".encode()
    stream = [f"commit refs/heads/{branch}\ncommitter C O Mitter <committer@example.com> 1704067200 +0000\n".encode()]
    stream.append(b"data %d\n%s\n" % (len(message), message))
    if parent:
        stream.append(f"from {parent}\n".encode())
    for path, content in files.items():
        if content is None:
            stream.append(f"D {path}\n".encode())
        else:
            stream.append(b"M 100644 inline %s\ndata %d\n%s\n" % (path.encode(), len(content), content))
    _git(repository, "fast-import", "--quiet", "--date-format=raw", input=b"".join(stream))
    return _git(repository, "rev-parse", f"refs/heads/{branch}")


@pytest.fixture
def make_commit() -> MakeCommit:
    """A function that commits files (None deletes one) to a branch of a bare repository and returns the commit's id."""
    return _commit


@pytest.fixture(scope="session")
def origin_template(tmp_path_factory: pytest.TempPathFactory, _git_environment: None) -> Path:
    """What `origin` is a copy of: making it takes a dozen processes, copying it none."""
    repository = tmp_path_factory.mktemp("template") / "origin.git"
    repository.mkdir()
    _git(repository, "init", "--quiet", "--bare", "--template=", "--initial-branch=main")
    first = _commit(repository, "main", MAIN_FILES)
    _git(repository, "tag", "-a", "-m", "First release", "v1.0", first)
    second = _commit(repository, "main", {"CHANGES.md": b"Nothing yet.\n"})
    _git(repository, "tag", "light", second)
    _git(repository, "branch", "feature/x", second)
    _commit(repository, "feature/x", {"src/feature.py": b"X = 1\n", "src/data/table.csv": None})
    _git(repository, "repack", "-a", "-d", "-q")  # every directory is made, and deleted, with every copy
    return repository


@pytest.fixture
def origin(tmp_path: Path, origin_template: Path) -> Path:
    """A small bare repository: branches `main` and `feature/x`, annotated tag `v1.0`, lightweight tag `light`."""
    return shutil.copytree(origin_template, tmp_path / "origin.git")


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A directory that an ordinary user owns and can reach, unlike `tmp_path` of a test run by root."""
    directory = Path(tempfile.mkdtemp(prefix="repopool-test-"))
    if os.geteuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
    yield directory
    subprocess.run(["chmod", "-R", "u+rwx", str(directory)], check=True, capture_output=True)
    shutil.rmtree(directory)
