from repopool_async._newest import Newest


def test_what_was_got_or_set_last_stays() -> None:
    newest: Newest[str, int] = Newest(2)
    newest["a"], newest["b"] = 1, 2
    assert newest["a"] == 1
    newest["c"] = 3
    assert dict(newest) == {"a": 1, "c": 3}


def test_to_look_for_a_key_does_not_keep_it() -> None:
    newest: Newest[str, int] = Newest(2)
    newest["a"], newest["b"] = 1, 2
    assert "a" in newest
    newest["c"] = 3
    assert "a" not in newest
    newest.clear()
    assert not newest
