"""Names mean what git would say they mean, and the snapshot's text is a `packed-refs` that git reads."""

from repopool_async.refs import RefsSnapshot, look_up, packed_refs, parse_packed_refs

A, B, C = "a" * 40, "b" * 40, "c" * 40

LISTING = f"""\
{A}   refs/heads/main
{B}   refs/heads/feature/x
{C} commit {A} refs/tags/v1
{B}   refs/tags/light
{B}   refs/remotes/upstream/main
{A}   refs/repopool/remote-head
{A}   refs/heads/HEAD
"""


def _snapshot() -> RefsSnapshot:
    branches, tags = parse_packed_refs(packed_refs(LISTING)[0])
    return RefsSnapshot("g", "/packed", branches, tags, "main", A, "sha1")


def test_branches_become_remote_tracking_refs_sorted_as_git_wants_them() -> None:
    text, refs = packed_refs(LISTING)
    names = [line.split(" ")[1] for line in text.splitlines() if line[0] not in "#^"]
    assert names == sorted(names)
    assert names == [
        "refs/remotes/origin/feature/x",
        "refs/remotes/origin/main",
        "refs/remotes/upstream/main",
        "refs/tags/light",
        "refs/tags/v1",
    ]
    assert f"^{A}\n" in text
    assert refs["refs/repopool/remote-head"] == A


def test_a_branch_called_head_is_not_shown_as_the_default_branch() -> None:
    assert "refs/remotes/origin/HEAD" not in packed_refs(LISTING)[0]


def test_tags_are_peeled() -> None:
    assert _snapshot().tags == {"v1": A, "light": B}


def test_a_branch_wins_over_a_tag_of_the_same_name() -> None:
    branches, tags = parse_packed_refs(packed_refs(f"{A}   refs/heads/same\n{B}   refs/tags/same\n")[0])
    snapshot = RefsSnapshot("g", "/p", branches, tags, None, None, "sha1")
    found = look_up("same", snapshot)
    assert found is not None
    assert (found.commit, found.branch) == (A, "same")
    tag = look_up("refs/tags/same", snapshot)
    assert tag is not None
    assert (tag.commit, tag.branch) == (B, None)


def test_forty_hexadecimal_digits_are_a_commit_even_where_a_branch_has_that_name() -> None:
    branches, tags = parse_packed_refs(packed_refs(f"{A}   refs/heads/{B}\n")[0])
    assert look_up(B, RefsSnapshot("g", "/p", branches, tags, None, None, "sha1")) is None


def test_unknown_names_are_not_found() -> None:
    assert look_up("nope", _snapshot()) is None
    assert look_up("refs/heads/v1", _snapshot()) is None
    assert look_up("refs/tags/main", _snapshot()) is None
