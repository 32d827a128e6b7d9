"""Many that look for processes of this machine at the same time: each gets its own answer, and few passes serve all."""

import asyncio
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from repopool_async._aio import in_turn
from repopool_async._identity import process_start_time
from repopool_async.hosts import _passes
from repopool_async.hosts._bystanders import BystanderSearch
from repopool_async.hosts._marked import MarkSearch
from repopool_async.hosts._passes import Passes
from repopool_async.hosts._search import Search
from repopool_async.hosts.base import Host
from repopool_async.hosts.local import LocalHost
from tests.hosts.daemons import FOREVER, Daemons

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc here")


@pytest.fixture
def host(tmp_path: Path) -> LocalHost:
    return LocalHost(sessions_directory=str(tmp_path / "sessions"))


class Gate:
    """Keeps the first pass from looking, or from ending once it has, and remembers what each pass was for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_look = threading.Event()
        self.may_look.set()
        self.has_looked = asyncio.Event()
        self.may_end = threading.Event()
        self.passes: list[list[Search]] = []
        self._loop = asyncio.get_running_loop()
        self._go_through = _passes._go_through
        monkeypatch.setattr(_passes, "_go_through", self._look)

    def _look(self, searches: Sequence[Search]) -> None:
        self.passes.append(list(searches))
        assert self.may_look.wait(30)
        self._go_through(searches)
        self._loop.call_soon_threadsafe(self.has_looked.set)
        assert self.may_end.wait(30)


@pytest.fixture
async def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def standing_in(tree: Path, *, since: float | None = None) -> BystanderSearch:
    return BystanderSearch(str(tree), (), since)


async def until_waiting(passes: Passes, count: int) -> None:
    while len(passes._waiting) < count:
        await asyncio.sleep(0)


async def answer_together(passes: Passes, *searches: Search) -> list[BaseException | None]:
    """Have searches answered by one pass, and return how that ended for each."""
    with in_turn:  # for which the pass has to wait
        answering = asyncio.gather(*map(passes.answer, searches), return_exceptions=True)
        await until_waiting(passes, len(searches))
    return await answering


async def test_one_pass_answers_all_that_asked_while_another_was_under_way(tmp_path: Path, gate: Gate) -> None:
    passes, first = Passes(), standing_in(tmp_path)
    others: list[Search] = [standing_in(tmp_path), MarkSearch("A=1"), MarkSearch("B=", last=1), standing_in(tmp_path)]
    async with asyncio.TaskGroup() as group:
        group.create_task(passes.answer(first))
        await gate.has_looked.wait()
        for search in others:
            group.create_task(passes.answer(search))
        await until_waiting(passes, 5)
        gate.may_end.set()
    assert gate.passes == [[first], others]
    assert passes._waiting == []


async def test_who_came_by_something_during_a_pass_is_found_for_all_that_ask_meanwhile(
    host: LocalHost, daemons: Daemons, tree: Path, gate: Gate
) -> None:
    passes, first, second = Passes(), standing_in(tree), standing_in(tree)
    async with asyncio.TaskGroup() as group:
        group.create_task(passes.answer(first))
        await gate.has_looked.wait()
        sitter = await daemons.start(f"ready; exec sleep {FOREVER}", value=None, cwd=tree)
        group.create_task(passes.answer(second))
        await until_waiting(passes, 2)
        gate.may_end.set()
    assert first.names == {}
    assert second.names == {sitter: f"{sitter} sleep"}


async def test_each_is_told_of_its_own(host: LocalHost, daemons: Daemons, tmp_path: Path) -> None:
    trees = [tmp_path / name for name in ("tree", "tree1", "tree10", "other")]
    sitters = []
    for tree in trees:
        tree.mkdir()
        sitters.append(await daemons.start(f"ready; exec sleep {FOREVER}", value=None, cwd=tree))
    marks = [f"{daemons.name}={number}" for number in range(4)]
    marked = [await daemons.start(f"ready; exec sleep {FOREVER}", value=str(number)) for number in (0, 1, 2)]
    ended = await asyncio.gather(
        *(host.end_processes(mark=mark, tree=str(tree)) for mark, tree in zip(marks, trees, strict=True))
    )
    assert [one.killed for one in ended] == [*((pid,) for pid in marked), ()]
    assert [one.bystanders for one in ended] == [(f"{pid} sleep",) for pid in sitters]


async def test_only_to_leases_older_than_itself_may_a_process_hide_something(
    daemons: Daemons, tree: Path, tmp_path: Path
) -> None:
    script = (
        "import os, socket, sys, time\n"
        "one, other = socket.socketpair()\n"
        "socket.send_fds(one, [b'x'], [0])\n"
        "open(sys.argv[1], 'w').close()\n"
        f"time.sleep({FOREVER})\n"
    )
    (tmp_path / "script.py").write_text(script)
    os.mkfifo(tmp_path / "gate")
    pid = await daemons.start(f"ready; exec python3 {tmp_path}/script.py {tmp_path}/gate", value=None)
    with (tmp_path / "gate").open("rb") as gate:
        gate.read()
    started = process_start_time(pid)
    assert started is not None
    began = started / os.sysconf("SC_CLK_TCK")
    searches = [standing_in(tree, since=since) for since in (began - 1, began + 1, None)]

    await answer_together(Passes(), *searches)

    assert [pid in search.names for search in searches] == [True, False, False]


async def test_who_leaves_takes_nothing_from_the_others(
    host: LocalHost, daemons: Daemons, tree: Path, gate: Gate
) -> None:
    marked = await daemons.start(f"ready; exec sleep {FOREVER}")
    open_before = os.listdir("/proc/self/fd")
    passes = Passes()

    async def find() -> list[int]:
        with MarkSearch(daemons.mark) as search:
            await passes.answer(search)
            return [target.pid for target in search.targets]

    tasks = [asyncio.create_task(find()) for _ in range(2)]
    await gate.has_looked.wait()
    tasks += [asyncio.create_task(find()) for _ in range(3)]
    await until_waiting(passes, 5)
    for index in (0, 3):  # the one whose pass it is, and one that waits for the next
        tasks[index].cancel()
    gate.may_end.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(outcome).__name__ for outcome in outcomes] == [
        *("CancelledError", "list", "list", "CancelledError", "list")
    ]
    assert [outcomes[index] for index in (1, 2, 4)] == [[marked]] * 3
    assert len(os.listdir("/proc/self/fd")) == len(open_before)
    assert passes._waiting == []


async def test_who_leaves_while_its_own_pass_is_under_way_keeps_hold_of_nobody(
    host: LocalHost, daemons: Daemons, gate: Gate
) -> None:
    await daemons.start(f"ready; exec sleep {FOREVER}")
    open_before = os.listdir("/proc/self/fd")
    passes, leading = Passes(), MarkSearch("NOBODY=bears this")

    async def find() -> None:
        with MarkSearch(daemons.mark) as search:
            await passes.answer(search)

    gate.may_look.clear()
    gate.may_end.set()
    with in_turn:
        tasks = [asyncio.create_task(operation) for operation in (passes.answer(leading), find())]
        await until_waiting(passes, 2)
    while not gate.passes:
        await asyncio.sleep(0)
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    gate.may_look.set()
    await tasks[0]

    assert [len(searches) for searches in gate.passes] == [2]
    assert len(os.listdir("/proc/self/fd")) == len(open_before)


async def test_a_tree_that_cannot_be_looked_up_is_no_matter_to_the_others(daemons: Daemons, tree: Path) -> None:
    good, bad = standing_in(tree), BystanderSearch("/no\0tree", (), None)
    sitter = await daemons.start(f"ready; exec sleep {FOREVER}", value=None, cwd=tree)
    outcomes = await answer_together(Passes(), good, bad)
    assert [type(outcome) for outcome in outcomes] == [type(None), ValueError]
    assert good.names == {sitter: f"{sitter} sleep"}


async def test_a_pass_that_fails_fails_who_began_it_and_the_next_answers_the_rest(
    daemons: Daemons, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sitter = await daemons.start(f"ready; exec sleep {FOREVER}", value=None, cwd=tree)
    passes, searches, go_through = Passes(), [standing_in(tree) for _ in range(3)], _passes._go_through
    is_first = True

    def fail_once(found: Sequence[Search]) -> None:
        nonlocal is_first
        go_through(found)
        if is_first:
            is_first = False
            raise MemoryError

    monkeypatch.setattr(_passes, "_go_through", fail_once)
    outcomes = await asyncio.gather(*map(passes.answer, searches), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [MemoryError, type(None), type(None)]
    assert [search.names for search in searches] == [{}, *({sitter: f"{sitter} sleep"},) * 2]


async def test_a_number_of_a_mark_may_be_of_any_length(daemons: Daemons) -> None:
    """Python refuses to read one of more than a few thousand digits."""
    pids = [
        await daemons.start(f"ready; exec sleep {FOREVER}", value=f"key.{number}")
        for number in ("9" * 5000, "00000000000000000003", "4", "", "x")
    ]
    with MarkSearch(f"{daemons.name}=key.", last=3) as search:
        await Passes().answer(search)
        assert [target.pid for target in search.targets] == [pids[1]]


async def test_both_ways_to_leave_a_slot_go_by_the_same_passes(
    host: LocalHost, daemons: Daemons, tree: Path, gate: Gate
) -> None:
    gate.may_end.set()
    slots: list[Host] = [host] * 8
    async with asyncio.TaskGroup() as group:
        for number, each in enumerate(slots):
            (tree / str(number)).mkdir()
            group.create_task(each.leave(str(tree / str(number)), 1))
            group.create_task(each.end_processes(mark=daemons.mark, tree=str(tree)))
    assert len(gate.passes) < 2 * len(slots)  # instead of three for each
