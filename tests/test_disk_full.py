"""What passes by itself is told apart from what is a slot's fault, however deep it lies."""

import errno

import pytest

from repopool_async import CleanupError, CoordinatorUnavailableError, StoreError
from repopool_async.disk_full import is_passing, passing_told


def wrapped(cause: BaseException) -> CleanupError:
    error = CleanupError("could not be cleaned")
    error.__cause__ = cause
    return error


def test_a_full_disk_and_a_silent_database_pass_and_damage_does_not() -> None:
    assert is_passing(wrapped(OSError(errno.ENOSPC, "full")))
    assert is_passing(wrapped(wrapped(CoordinatorUnavailableError("no answer"))))
    assert not is_passing(wrapped(OSError(errno.EIO, "broken")))
    assert not is_passing(CleanupError("dirty"))


def test_a_full_disk_is_told_with_its_remedy() -> None:
    told = r"web: the pool's file system is full .* free some space"
    with pytest.raises(StoreError, match=told), passing_told("web"):
        raise wrapped(OSError(errno.ENOSPC, "full"))


def test_a_silent_database_is_told_as_what_it_is() -> None:
    with pytest.raises(CoordinatorUnavailableError, match="no answer"), passing_told("web"):
        raise wrapped(CoordinatorUnavailableError("no answer"))


def test_what_does_not_pass_stays_what_it_is() -> None:
    with pytest.raises(CleanupError, match="could not be cleaned"), passing_told("web"):
        raise wrapped(OSError(errno.EIO, "broken"))
