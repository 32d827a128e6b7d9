"""Which host a claim is sent to, by what was counted."""

import pytest

from repopool_async.coordination._pg_spread import Count

COMMIT, OTHER = "a" * 40, "b" * 40


def counted(**hosts: tuple[int, dict[str, int]]) -> Count:
    """Return a count: by host how many slots it has, and how many of them are free, by commit."""
    count = Count(good_until=0.0)
    for host_id, (slots, free) in hosts.items():
        count.add(host_id, None, slots=slots, free=0)
        for commit, number in free.items():
            count.add(host_id, commit, slots=0, free=number)
    return count


@pytest.mark.parametrize(
    ("count", "best"),
    [
        (counted(), None),
        (counted(a=(3, {COMMIT: 3})), None),
        (counted(a=(4, {COMMIT: 1}), b=(2, {COMMIT: 1})), "b"),
        (counted(a=(2, {COMMIT: 1}), b=(2, {COMMIT: 1})), "a"),
        (counted(a=(9, {COMMIT: 1}), b=(2, {OTHER: 2})), "a"),
        (counted(a=(3, {OTHER: 1}), b=(3, {OTHER: 2})), "b"),
        (counted(a=(3, {COMMIT: 1, OTHER: 2}), b=(3, {COMMIT: 2})), "a"),
        (counted(a=(3, {}), b=(3, {})), None),
    ],
    ids=["nothing", "one host", "part", "equal", "commit first", "no commit", "all that is free counts", "full"],
)
def test_the_emptiest_of_those_with_the_commit(count: Count, best: str | None) -> None:
    assert count.best(COMMIT, frozenset()) == best


def test_an_excluded_host_is_not_chosen_and_no_commit_means_any() -> None:
    count = counted(a=(2, {COMMIT: 2}), b=(2, {OTHER: 1}), c=(2, {COMMIT: 1}))
    assert count.best(COMMIT, frozenset("a")) == "c"
    assert count.best(None, frozenset("a")) == "b"
    assert count.best(COMMIT, frozenset("abc")) is None
