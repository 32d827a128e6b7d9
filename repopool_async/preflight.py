"""What a machine must offer before a manager is opened or a pool is made.

That is POSIX, a git that is new enough, a usable local directory, and open files for every slot's lock. What a pool may
use of the disk is the janitor's business.
"""

import errno
import os
import resource
from collections.abc import Sequence
from typing import Final

from repopool_async._aio import in_thread
from repopool_async._git import check_git_version
from repopool_async.config import PoolConfig
from repopool_async.exceptions import PlatformNotSupportedError, StoreError
from repopool_async.hosts.base import Host

_FILES_RESERVED: Final = 128
"""Open files of a process beside one lock for every slot."""


async def check_machine(host: Host, config: PoolConfig, directories: Sequence[str]) -> None:
    """Make the directories, raise the limit on open files, and refuse a machine that cannot run a pool.

    Args:
        directories: to be there besides the workspaces directory.

    Raises:
        PlatformNotSupportedError: it cannot, and why. StoreError: the directory cannot be used.
    """
    if os.name != "posix":
        raise PlatformNotSupportedError("repopool needs POSIX (Linux, macOS); this platform is not supported")
    workspaces_dir = str(config.workspaces_dir)
    await check_git_version(host)
    await _make_directories(workspaces_dir, directories)
    if not config.allow_network_filesystem and await host.is_network_file_system(workspaces_dir):
        raise PlatformNotSupportedError(
            f"{workspaces_dir} lies on a network file system, where locks of crashed machines cannot be trusted; "
            f"choose a local directory, or set allow_network_filesystem if only one machine ever uses it; several "
            f"manager machines share a database instead (coordination: postgresql://…), each with local directories"
        )
    _raise_open_file_limit()


def refuse_too_many_slots(repo_name: str, num_slots: int) -> None:
    """Raise `PlatformNotSupportedError` where this process may not hold so many slots' locks at once."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = num_slots + _FILES_RESERVED
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise PlatformNotSupportedError(
            f"{repo_name}: {num_slots} slots need {needed} open files, this process may have {limit}; raise the hard "
            f"limit (ulimit -Hn) or make fewer slots",
            repo_name=repo_name,
        )


async def _make_directories(workspaces_dir: str, directories: Sequence[str]) -> None:
    try:
        await in_thread(_usable_directory, workspaces_dir, directories)
    except OSError as error:
        raise StoreError(
            f"workspaces_dir {workspaces_dir} cannot be used ({error.strerror}); choose a writable directory, for "
            f"example with REPOPOOL_WORKSPACES_DIR"
        ) from error


def _usable_directory(directory: str, others: Sequence[str]) -> None:
    for path in (directory, *others):
        os.makedirs(path, exist_ok=True)  # noqa: PTH103 - plain strings throughout
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(directory).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(code, os.strerror(code), directory)


def _raise_open_file_limit() -> None:
    """Raise the soft limit on open files to the hard one: every leased slot holds a lock's descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
