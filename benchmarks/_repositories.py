"""Repositories to measure on, made with git itself and kept between runs."""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Iterator
from pathlib import Path

import platformdirs

from repopool_async._process import run_process

WHO = {
    "GIT_AUTHOR_NAME": "bench",
    "GIT_AUTHOR_EMAIL": "bench@localhost",
    "GIT_COMMITTER_NAME": "bench",
    "GIT_COMMITTER_EMAIL": "bench@localhost",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
}
_FORMAT = 2
"""Raised whenever what is generated changes, so that no run measures on what an older one made."""


async def git(directory: str | Path, *args: str, input: bytes | None = None) -> str:
    """Run plain git, without any of the pool's configuration, and return its output."""
    done = await run_process(["git", "-C", str(directory), *args], env={**os.environ, **WHO}, input=input)
    if done.exit_code != 0:
        raise RuntimeError(f"git {args[0]}: {done.stderr.decode(errors='replace')}")
    return done.text.strip()


async def cached_repository(*, files: int, directories: int) -> str:
    """Return the path of a repository as `make_repository` makes it; the first run makes it, later ones find it."""
    cache = platformdirs.user_cache_path("repopool-benchmarks")
    path = cache / f"v{_FORMAT}-{files}-{directories}.git"
    if not path.exists():
        await _made_at(path, make_repository(path.with_suffix(f".{os.getpid()}"), files=files, directories=directories))
    return str(path)


async def cached_heavy_repository(*, megabytes: int) -> str:
    """Return the path of a repository whose history is a pack of so many megabytes that nothing compresses."""
    path = platformdirs.user_cache_path("repopool-benchmarks") / f"v{_FORMAT}-{megabytes}mb.git"
    if not path.exists():
        await _made_at(path, _make_heavy(path.with_suffix(f".{os.getpid()}"), megabytes))
    return str(path)


async def copied(repository: str, target: Path) -> str:
    """Copy a repository, to change it; return the copy's path."""
    await asyncio.to_thread(shutil.copytree, repository, target)
    return str(target)


async def _made_at(path: Path, making: Awaitable[str]) -> None:
    made = Path(await making)
    try:
        made.rename(path)
    except OSError:  # another run was faster
        await asyncio.to_thread(shutil.rmtree, made)


async def make_repository(path: Path, *, files: int, directories: int) -> str:
    """Make a bare repository with two commits that differ in one file of a hundred; return its path.

    `main` is the first, `next` the second; `build/` is ignored.
    """
    await _init(path)
    await git(path, "fast-import", "--quiet", input=b"".join(_stream(file_names(files, directories))))
    return str(path)


def file_names(files: int, directories: int) -> list[str]:
    """Return the names of a generated repository's files, but for `.gitignore`."""
    return [f"d{number % directories % 60}/e{number % directories}/f{number}.txt" for number in range(files)]


async def commit(repository: str, branch: str, files: dict[str, str], *, parent: str) -> str:
    """Add a commit to a bare repository that writes these files on top of a branch; return its id."""
    stream = [_commit(branch, f"refs/heads/{parent}^0"), *(_file(name, content) for name, content in files.items())]
    await git(repository, "fast-import", "--quiet", "--force", input=b"".join(stream))
    return await git(repository, "rev-parse", f"refs/heads/{branch}")


async def _init(path: Path) -> None:
    path.mkdir(parents=True)
    await git(path, "init", "-q", "--bare", "--initial-branch=main")


async def _make_heavy(path: Path, megabytes: int) -> str:
    """Make ten commits, each of which replaces all of the files, so that a check-out is a tenth of the history."""
    await _init(path)
    for number in range(10):
        await git(path, "fast-import", "--quiet", input=b"".join(_heavy_commit(number, megabytes // 10)))
    await git(path, "repack", "-a", "-d", "-q", "--window=0")
    return str(path)


def _heavy_commit(number: int, megabytes: int) -> Iterator[bytes]:
    yield _commit("main", "refs/heads/main^0" if number else None)
    for file in range(megabytes):
        yield b"M 100644 inline f%d\ndata 1000000\n%b\n" % (file, os.urandom(1_000_000))


def _stream(names: list[str]) -> list[bytes]:
    stream = [_commit("main", None), b"M 100644 inline .gitignore\ndata 7\nbuild/\n\n"]
    stream += [_file(name, f"content of {name}\n" * 3) for name in names]
    stream += [_commit("next", "refs/heads/main")]
    stream += [_file(name, f"changed {name}\n" * 3) for name in names[::100]]
    return stream


def _commit(branch: str, start: str | None) -> bytes:
    origin = f"from {start}\n" if start else ""
    return (
        f"commit refs/heads/{branch}\ncommitter bench <bench@localhost> 1700000000 +0000\ndata 1\nx\n{origin}".encode()
    )


def _file(name: str, content: str) -> bytes:
    return f"M 100644 inline {name}\ndata {len(content)}\n{content}\n".encode()
