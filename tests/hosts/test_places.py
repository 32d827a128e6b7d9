"""Into which directories a path leads."""

import pytest

from repopool_async.hosts._places import Places


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/pools/web/1", ["one"]),
        ("/pools/web/1/a/b", ["one"]),
        ("/pools/web/10/a", ["ten"]),
        ("/pools/web/1 (deleted)", []),
        ("/pools/web/11", []),
        ("/pools/web", []),
        ("/other/web/1", []),
        ("", []),
    ],
)
def test_a_path_leads_into_the_directories_above_it(path: str, expected: list[str]) -> None:
    places = Places([("/pools/web/1", "one"), ("/pools/web/10", "ten"), ("/pools/else/1", "else")])
    assert list(places.of(path)) == expected


def test_directories_may_lie_in_each_other_and_come_more_than_once() -> None:
    places = Places([("/a", 1), ("/a/b/", 2), ("/a", 3)])
    assert sorted(places.of("/a/b/c")) == [1, 2, 3]
    assert sorted(places.of("/a/c")) == [1, 3]


def test_the_root_is_above_everything() -> None:
    assert list(Places([("/", "root")]).of("/a/b")) == ["root"]


def test_it_matters_not_whether_a_newline_is_written_as_the_kernel_lists_it() -> None:
    places = Places([("/a\nb", "broken")])
    assert list(places.of("/a\nb/c")) == list(places.of(r"/a\012b/c")) == ["broken"]


def test_where_there_are_none_nothing_leads_into_them() -> None:
    places: Places[str] = Places([])
    assert list(places.of("/a")) == []
