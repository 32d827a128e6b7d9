"""Repositories to measure on, made with git itself."""

import os
from pathlib import Path

from repopool_async._process import run_process

WHO = {
    "GIT_AUTHOR_NAME": "bench",
    "GIT_AUTHOR_EMAIL": "bench@localhost",
    "GIT_COMMITTER_NAME": "bench",
    "GIT_COMMITTER_EMAIL": "bench@localhost",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
}


async def git(directory: str | Path, *args: str, input: bytes | None = None) -> str:
    """Run plain git, without any of the pool's configuration, and return its output."""
    done = await run_process(["git", "-C", str(directory), *args], env={**os.environ, **WHO}, input=input)
    if done.exit_code != 0:
        raise RuntimeError(f"git {args[0]}: {done.stderr.decode(errors='replace')}")
    return done.text.strip()


async def make_repository(path: Path, *, files: int, directories: int) -> str:
    """Make a bare repository with two commits that differ in one file of a hundred; return its path.

    `main` is the first, `next` the second; `build/` is ignored.
    """
    path.mkdir(parents=True)
    await git(path, "init", "-q", "--bare", "--initial-branch=main")
    await git(path, "fast-import", "--quiet", input=b"".join(_stream(files, directories)))
    return str(path)


def _stream(files: int, directories: int) -> list[bytes]:
    names = [f"d{number % directories % 60}/e{number % directories}/f{number}.txt" for number in range(files)]
    stream = [_commit("main", None), b"M 100644 inline .gitignore\ndata 7\nbuild/\n\n"]
    stream += [_file(name, f"content of {name}\n" * 3) for name in names]
    stream += [_commit("next", "main")]
    stream += [_file(name, f"changed {name}\n" * 3) for name in names[::100]]
    return stream


def _commit(branch: str, parent: str | None) -> bytes:
    start = f"from refs/heads/{parent}\n" if parent else ""
    return (
        f"commit refs/heads/{branch}\ncommitter bench <bench@localhost> 1700000000 +0000\ndata 1\nx\n{start}".encode()
    )


def _file(name: str, content: str) -> bytes:
    return f"M 100644 inline {name}\ndata {len(content)}\n{content}\n".encode()
