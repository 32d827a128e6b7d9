"""What the store's errors say: what failed, where, and what helps.

When they are raised is decided by the store.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from repopool_async._codec import CodecError
from repopool_async.exceptions import PoolNotFoundError, SlotNotFoundError, StoreError
from repopool_async.store_layout import parse_id

_REMEDIES: Final = {
    errno.EACCES: "give user {user} read and write permission there",
    errno.EPERM: "give user {user} read and write permission there (an immutable file also refuses)",
    errno.EROFS: "mount it read-write, or choose another workspaces_dir",
    errno.ENOSPC: "free some space on that file system",
    errno.EDQUOT: "free some of user {user}'s disk quota",
    errno.ENOTDIR: "something that is no directory is in its way; move it elsewhere",
    errno.EEXIST: "something that is no directory is in its way; move it elsewhere",
    errno.EISDIR: "a directory is in its way; move it elsewhere",
    errno.EBUSY: "unmount what is mounted there",
    errno.EXDEV: "a pool's directory must lie on one file system; unmount what is mounted inside",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit on open files",
    errno.ENAMETOOLONG: "choose a shorter workspaces_dir",
}


def no_slot(slot_id: str) -> SlotNotFoundError:
    """Return the error for a slot that is not there."""
    repo_name, _ = parse_id(slot_id)
    message = f"there is no slot {slot_id}; list_slots({repo_name!r}) tells which there are"
    return SlotNotFoundError(message, repo_name=repo_name, slot_id=slot_id)


def no_pool(repo_name: str, root: str) -> PoolNotFoundError:
    """Return the error for a pool that is not there."""
    message = f"there is no pool {repo_name!r} in {root}; create_pool makes one, list_pools tells which there are"
    return PoolNotFoundError(message, repo_name=repo_name)


@contextmanager
def translated(path: str, verb: str, *, repo_name: str | None = None, slot_id: str | None = None) -> Iterator[None]:
    """Say what failed, where, and what helps."""
    try:
        yield
    except CodecError as error:
        about, repo_name = _about(repo_name, slot_id)
        raise StoreError(f"{about}{path}: {error}", repo_name=repo_name, slot_id=slot_id) from error
    except OSError as error:
        about, repo_name = _about(repo_name, slot_id)
        remedy = _REMEDIES.get(error.errno or 0, "check the disk and its file system")
        remedy = remedy.format(user=os.geteuid())
        where = error.filename if verb == "delete" and isinstance(error.filename, str) else path
        message = f"{about}cannot {verb} {where}: {error.strerror}; {remedy}"
        raise StoreError(message, repo_name=repo_name, slot_id=slot_id) from error


def _about(repo_name: str | None, slot_id: str | None) -> tuple[str, str | None]:
    if slot_id is not None:
        repo_name, _ = parse_id(slot_id)
    return f"{slot_id or repo_name}: " if repo_name else "", repo_name
