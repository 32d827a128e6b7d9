"""Tells apart what is no slot's fault and will pass: the disk is full or read-only, the database does not answer.

Nobody is quarantined or repaired for it. Freeing space is the janitor's and the user's business.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from repopool_async.exceptions import CleanupError, CoordinatorUnavailableError, GitDiskFullError, StoreError

_PASSING: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def is_passing(error: BaseException) -> bool:
    """Return whether something failed that is no slot's fault and will pass."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GitDiskFullError | CoordinatorUnavailableError):
            return True
        if isinstance(cause, OSError) and cause.errno in _PASSING:
            return True
        cause = cause.__cause__
    return False


@contextmanager
def passing_told(repo_name: str) -> Iterator[None]:
    """Turn what will pass, where it is not told as such already, into a `StoreError` that names the remedy.

    That the database does not answer is told by its own `CoordinatorUnavailableError`.
    """
    try:
        yield
    except (CleanupError, OSError) as error:
        if not is_passing(error):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, CoordinatorUnavailableError):
            cause = cause.__cause__
        if isinstance(cause, CoordinatorUnavailableError):
            raise CoordinatorUnavailableError(str(cause)) from error
        remedy = "mount it read-write" if getattr(cause, "errno", 0) == errno.EROFS else "free some space there"
        raise StoreError(
            f"{repo_name}: the pool's file system is full or read-only ({cause}); {remedy}, then try again: slots that "
            f"could not be finished are recovered by themselves",
            repo_name=repo_name,
        ) from error
