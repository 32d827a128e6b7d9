"""Where a lease was taken, as callers see their own code."""

import asyncio
import gc
import weakref

from repopool_async import origins


async def test_the_place_is_the_nearest_frame_outside_the_library() -> None:
    origin = origins.here(is_whole=False)
    assert origin.where.startswith(f"{__file__}:")
    assert origin.where.endswith("(test_the_place_is_the_nearest_frame_outside_the_library)")
    assert origin.stack is None
    assert origin.is_of(asyncio.current_task())
    assert not origin.has_ended


async def test_the_stack_ends_with_the_place() -> None:
    origin = origins.here(is_whole=True)
    assert origin.stack is not None
    assert origin.stack[-1].name == "test_the_stack_ends_with_the_place"
    assert "origins.here(is_whole=True)" in origin.formatted_stack().splitlines()[-1]


async def test_a_task_is_not_kept_alive() -> None:
    async def take() -> origins.Origin:
        return origins.here(is_whole=True)

    task = asyncio.get_running_loop().create_task(take(), name="taker")
    origin = await task
    reference = weakref.ref(task)
    del task
    await asyncio.sleep(0)  # the loop holds what woke this task until the next turn
    gc.collect()
    assert reference() is None
    assert origin.has_ended
    assert not origin.is_of(asyncio.current_task())
    assert "by task 'taker' at " in str(origin)
