"""What managers agree on about hosts, in the database: conditions, and which directory a name means."""

import asyncio
import uuid

import pytest

from repopool_async.host_states import DatabaseHostStates, HostCondition, HostState
from tests.coordination.conftest import PostgresPlace


async def states(postgres: PostgresPlace) -> DatabaseHostStates:
    return DatabaseHostStates((await postgres.coordinator()).hosts)


async def test_a_condition_is_the_same_for_everybody(postgres: PostgresPlace) -> None:
    one, two = await states(postgres), await states(postgres)
    assert await two.read() == {}
    drained = HostState(HostCondition.DRAINING, "new disk", spec={"workspaces_dir": "/srv"})
    assert await one.change("box", lambda before: drained if before is None else pytest.fail("there is one"))
    assert await two.read() == {"box": drained}
    assert not await two.change("box", lambda before: before)
    assert await two.change("box", lambda _: None)
    assert await one.read() == {}
    assert not await one.change("box", lambda before: before)


async def test_of_changes_at_once_none_is_lost(postgres: PostgresPlace) -> None:
    both = [await states(postgres), await states(postgres)]

    def longer(before: HostState | None) -> HostState:
        return HostState(HostCondition.DRAINING, f"{before.reason if before else ''}x")

    await asyncio.gather(*[both[number % 2].change("box", longer) for number in range(10)])
    assert (await both[0].read())["box"].reason == "x" * 10


async def test_a_name_means_one_directory_and_a_directory_has_one_name(postgres: PostgresPlace) -> None:
    one, two = (await postgres.coordinator()).hosts, (await postgres.coordinator()).hosts
    assert await one.identity() == await two.identity()
    here, there = uuid.uuid4(), uuid.uuid4()
    assert await one.settle("a", here, "/srv on a") is None
    assert await two.settle("a", here, "/srv on a") is None
    other = await two.settle("a", there, "/srv on b")
    assert other is not None
    assert (other.name, other.place, other.described) == ("a", here, "/srv on a")
    other = await two.settle("b", here, "/srv on a")
    assert other is not None
    assert other.name == "a"
    assert await two.settle("b", there, "/srv on b") is None
    await two.forget("a")
    assert await one.settle("a", uuid.uuid4(), "/srv on a, new") is None
