from hypothesis import given
from hypothesis import strategies as st

from repopool_async.workspaces.nul_lists import split_names
from repopool_async.workspaces.settled import _complete

NAMES = st.sets(st.lists(st.sampled_from("abc"), min_size=1, max_size=5).map("/".join))


@given(NAMES)
def test_the_directories_of_every_name_are_noted_with_it(names: set[str]) -> None:
    parts = [name.split("/") for name in names]
    expected = {"/".join(each[:length]) for each in parts for length in range(1, len(each) + 1)}

    assert split_names(_complete(names)) == sorted(expected)
    assert names == expected
