"""On which hosts new slots are made: the rule, and what it implies."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repopool_async import SlotAllocationError
from repopool_async.placement import spread


def test_equal_hosts_get_slots_in_turn() -> None:
    assert spread(5, ["a", "b"], capacities={"a": None, "b": None}, present={}) == ["a", "b", "a", "b", "a"]


def test_slots_are_spread_in_proportion_to_capacity() -> None:
    made = spread(12, ["a", "b"], capacities={"a": 30, "b": 10}, present={})
    assert Counter(made) == {"a": 9, "b": 3}


def test_what_is_there_already_counts() -> None:
    assert spread(3, ["a", "b"], capacities={"a": None, "b": None}, present={"a": 2, "b": 0}) == ["b", "b", "a"]


def test_no_host_gets_more_than_it_can_hold_of_all_pools_together() -> None:
    capacities = {"a": 2, "b": None}
    assert spread(3, ["a", "b"], capacities=capacities, present={}, in_use={"a": 2}) == ["b", "b", "b"]
    with pytest.raises(SlotAllocationError, match="have room for 2"):
        spread(3, ["a"], capacities=capacities, present={})


def test_without_a_host_that_is_up_there_is_no_room() -> None:
    with pytest.raises(SlotAllocationError, match="none"):
        spread(1, [], capacities={}, present={})


@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(1, 50), min_size=1), st.integers(0, 40), st.integers(0, 40)
)
def test_a_pool_grown_in_two_steps_lies_as_if_it_had_been_made_at_once(
    capacities: dict[str, int], first: int, second: int
) -> None:
    roomy = {name: capacity * 100 for name, capacity in capacities.items()}
    hosts = list(capacities)
    before = spread(first, hosts, capacities=roomy, present={})
    after = spread(second, hosts, capacities=roomy, present=Counter(before))
    assert before + after == spread(first + second, hosts, capacities=roomy, present={})
