"""The coordinator on PostgreSQL where something goes wrong: replies, sessions, connections and servers are lost."""

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import attrs
import pytest

from repopool_async import _clock
from repopool_async.coordination import _pg_session, _pg_spread
from repopool_async.coordination._pg_errors import SessionExpiredError, translated
from repopool_async.coordination.base import Grant, Want
from repopool_async.coordination.postgres import PostgresCoordinator
from repopool_async.exceptions import CoordinatorUnavailableError, LeaseLostError, PoolManagerError, StoreError
from repopool_async.models import SlotState
from tests._postgres import Proxy, Server, eventually, pgbouncer
from tests._workers import COMMIT, REPO, settle, worker
from tests.coordination.conftest import DATABASE, Events, PostgresPlace

ALL_STATES = frozenset(SlotState)
ONE, TWO = "workspace-web-slot1", "workspace-web-slot2"


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    async with Proxy(server.port) as made:
        yield made


def through(proxy: Proxy, server: Server) -> str:
    return server.dsn(DATABASE, port=proxy.port)


@pytest.fixture
async def own_place(own_server: Server) -> AsyncIterator[PostgresPlace]:
    async with AsyncExitStack() as stack:
        yield PostgresPlace(own_server, DATABASE, stack)


async def claimed(coordinator: PostgresCoordinator, lease_id: str = "lease", **options: Any) -> Grant:
    grant = await coordinator.claim(REPO, **{"commit": COMMIT, "branch": "main", "lease_id": lease_id, **options})
    assert grant is not None
    return grant


def want(lease_id: str, **options: Any) -> Want:
    return Want(repo_name=REPO, lease_id=lease_id, **options)


async def give_back(coordinator: PostgresCoordinator, grant: Grant) -> None:
    await coordinator.begin_return(grant)
    await settle(coordinator, grant)


async def becomes(place: PostgresPlace, state: str, slot_id: str = ONE) -> None:
    """Wait until the database says so, past every coordinator."""

    async def is_so() -> bool:
        query = "SELECT state || ' ' || (session_id IS NOT NULL) FROM repopool.slot WHERE slot_id = $1"
        return bool(await place.ask(query, slot_id) == state)

    await eventually(is_so)


# Replies


async def far_away(place: PostgresPlace, proxy: Proxy) -> PostgresCoordinator:
    """Return a coordinator behind the proxy that has prepared its statements, after two leases of the only slot."""
    far = await place.coordinator(dsn=through(proxy, place.server), max_connections=1)
    await give_back(far, await claimed(far))
    async with far.ticket(REPO, want("warm")) as ticket:
        grant = await ticket.claim()
    assert grant is not None
    await give_back(far, grant)
    return far


async def test_a_claim_whose_reply_is_lost_is_given_back(postgres: PostgresPlace, proxy: Proxy) -> None:
    await postgres.pool(1)
    far = await far_away(postgres, proxy)
    proxy.swallow_replies()
    claiming = asyncio.create_task(claimed(far))
    await becomes(postgres, "allocated true")
    proxy.swallow_replies(False)
    proxy.cut()
    with pytest.raises(CoordinatorUnavailableError, match="try again"):
        await claiming
    await becomes(postgres, "available false")
    grant = await claimed(far)
    assert (grant.token, grant.slot.allocation_count) == (4, 3), "undone altogether, but for the token"
    events = [record.event for record in await postgres.records.history(ONE)][4:]
    assert events == ["allocated", "released", "allocated"]


async def test_the_end_of_a_lease_whose_reply_is_lost_is_told_again(postgres: PostgresPlace, proxy: Proxy) -> None:
    await postgres.pool(1)
    far = await far_away(postgres, proxy)
    grant = await claimed(far)
    proxy.swallow_replies()
    returning = asyncio.create_task(far.begin_return(grant))
    await becomes(postgres, "cleaning true")
    proxy.swallow_replies(False)
    proxy.cut()
    assert await returning == await far.get_slot(ONE)
    await settle(far, grant)
    assert [record.event for record in await postgres.records.history(ONE)] == ["allocated", "released"] * 3


async def test_a_release_whose_reply_is_lost_is_repeated(postgres: PostgresPlace, proxy: Proxy) -> None:
    await postgres.pool(1)
    far = await far_away(postgres, proxy)
    grant = await claimed(far)
    await far.begin_return(grant)
    proxy.swallow_replies()
    finishing = asyncio.create_task(settle(far, grant))
    await becomes(postgres, "available false")
    proxy.swallow_replies(False)
    proxy.cut()
    assert await finishing == await far.get_slot(ONE)
    with pytest.raises(LeaseLostError):
        await settle(far, grant)


async def test_a_release_whose_reply_is_lost_ends_nobody_elses_lease(postgres: PostgresPlace, proxy: Proxy) -> None:
    near = await postgres.pool(1)
    far = await far_away(postgres, proxy)
    grant = await claimed(far)
    await far.begin_return(grant)
    proxy.swallow_replies()
    finishing = asyncio.create_task(settle(far, grant))
    await becomes(postgres, "available false")
    other = await claimed(near)
    proxy.swallow_replies(False)
    proxy.cut()
    await finishing
    assert await near.is_held(other)


async def test_what_is_handed_over_to_a_waiter_that_leaves_in_the_same_instant_goes_to_the_next(
    postgres: PostgresPlace,
) -> None:
    coordinator, other = await postgres.pool(1), await postgres.coordinator()
    grant = await claimed(coordinator)
    async with AsyncExitStack() as second_stack:
        async with coordinator.ticket(REPO, want("first")) as first:
            assert await first.claim() is None
            second = await second_stack.enter_async_context(other.ticket(REPO, want("second")))
            assert await second.claim() is None
            await give_back(coordinator, grant)
            assert await postgres.ask("SELECT slot_id FROM repopool.waiter ORDER BY ticket LIMIT 1") == ONE
        taken = await second.claim()
        assert taken is not None
        assert taken.lease.lease_id == "second"
        await give_back(other, taken)
    assert await postgres.ask("SELECT count(*) FROM repopool.waiter") == 0
    assert await postgres.ask("SELECT state FROM repopool.slot") == "available"


async def test_a_collected_slot_whose_reply_is_lost_is_collected_again(postgres: PostgresPlace, proxy: Proxy) -> None:
    await postgres.pool(1)
    far = await far_away(postgres, proxy)
    async with far.ticket(REPO, want("mine")) as ticket:
        proxy.swallow_replies()
        claiming = asyncio.create_task(ticket.claim())

        async def is_collected() -> bool:
            return bool(await postgres.ask("SELECT NOT EXISTS (SELECT FROM repopool.waiter)"))

        await becomes(postgres, "allocated true")
        await eventually(is_collected)
        proxy.swallow_replies(False)
        proxy.cut()
        with pytest.raises(CoordinatorUnavailableError):
            await claiming
        grant = await ticket.claim()
        assert grant is not None
        assert (grant.lease.lease_id, grant.token) == ("mine", 3)


# Choosing


async def pool_on_hosts(place: PostgresPlace, hosts: str) -> PostgresCoordinator:
    made = await place.pool(0)
    for host_id in hosts:
        slot = place.slot(await made.next_slot_number(REPO))
        await settle(made, await made.create(attrs.evolve(slot, host_id=host_id)))
    return made


async def test_what_other_managers_took_is_reckoned_with(
    postgres: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pg_spread, "FRESH_SECONDS", 0.0)
    coordinators = [await pool_on_hosts(postgres, "aaabbb"), await postgres.coordinator()]
    hosts = [(await claimed(coordinators[number % 2], f"{number}")).slot.host_id for number in range(6)]
    assert sorted(hosts[:2]) == sorted(hosts[2:4]) == sorted(hosts[4:]) == ["a", "b"]


async def test_counting_is_not_done_at_every_claim(postgres: PostgresPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pg_spread, "FRESH_SECONDS", 3600.0)
    coordinator, other = await pool_on_hosts(postgres, "aaaabbbb"), await postgres.coordinator()
    grant = await claimed(coordinator)
    for number in range(3):  # of which the first does not know
        assert (await claimed(other, f"{number}", exclude_hosts=frozenset("a"))).slot.host_id == "b"
    assert (await claimed(coordinator, "second")).slot.host_id == "b", "what was counted, and reckoned on from there"
    assert (await claimed(coordinator, "third")).slot.host_id == "a"
    assert (await claimed(coordinator, "fourth")).slot.host_id == "a", "b was thought to be as empty, and has nothing"
    await give_back(coordinator, grant)
    assert (await claimed(coordinator, "last")).slot.host_id == "a"


# Waiting


async def test_who_waits_is_told_at_once(postgres: PostgresPlace) -> None:
    coordinator, other = await postgres.pool(1), await postgres.coordinator()
    grant = await claimed(coordinator)
    changed = asyncio.Event()
    async with other.ticket(REPO, want("waiting"), on_change=changed.set) as ticket:
        assert await ticket.claim() is None
        await eventually(lambda: asyncio.sleep(0, other.has_push))
        await give_back(coordinator, grant)
        async with asyncio.timeout(10):
            await changed.wait()
        assert await ticket.claim() is not None


async def test_a_listener_that_is_dead_but_connected_is_noticed_and_nobody_waits_for_ever(
    postgres: PostgresPlace, proxy: Proxy, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pg_session, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(_pg_session, "_PROBE_WAIT_SECONDS", 0.2)
    coordinator = await postgres.pool(1)
    deaf = await postgres.coordinator(listen_dsn=through(proxy, server))
    grant = await claimed(coordinator)
    async with deaf.ticket(REPO, want("waiting"), on_change=lambda: None) as ticket:
        await eventually(lambda: asyncio.sleep(0, deaf.has_push))
        proxy.swallow_replies()
        await eventually(lambda: asyncio.sleep(0, not deaf.has_push))
        await give_back(coordinator, grant)
        assert await ticket.claim() is not None, "asking needs no notification"
        proxy.swallow_replies(False)
        await eventually(lambda: asyncio.sleep(0, deaf.has_push))


# Sessions


async def age_session(place: PostgresPlace, coordinator: PostgresCoordinator) -> None:
    """Make a session look as if nothing had been heard of it for long, and the server as if it had run for longer."""
    session_id = coordinator._link.session.session_id
    await place.ask("SELECT repopool.settled_for()")  # which notes since when the server runs
    await place.ask("UPDATE repopool.incarnation SET noticed_at = noticed_at - interval '1 h'")
    ages = "UPDATE repopool.session SET expires_at = expires_at - interval '1 h' WHERE session_id = $1"
    await place.ask(ages, session_id)


async def test_a_session_that_is_late_but_not_reaped_comes_back_with_its_leases(postgres: PostgresPlace) -> None:
    coordinator = await postgres.pool(2)
    grant = await claimed(coordinator)
    await age_session(postgres, coordinator)
    with pytest.raises(CoordinatorUnavailableError, match="took this process for dead"):
        await claimed(coordinator)

    async def is_back() -> bool:
        return bool(await postgres.ask("SELECT bool_and(expires_at > clock_timestamp()) FROM repopool.session"))

    await eventually(is_back)
    assert await coordinator.is_held(grant)
    await claimed(coordinator)
    await give_back(coordinator, grant)


async def test_what_a_reaped_session_held_is_an_orphan_and_its_process_begins_anew(
    postgres: PostgresPlace, events: Events
) -> None:
    other = await postgres.pool(2)
    coordinator = await postgres.coordinator(on_event=lambda kind, fields: events.append((kind, dict(fields))))
    grant = await claimed(coordinator)
    held = await coordinator.take(TWO if grant.slot.slot_id == ONE else ONE, states={SlotState.AVAILABLE})
    assert held is not None
    await age_session(postgres, coordinator)
    assert await eventually(other.reap) == 1
    assert [slot.slot_id for slot in await other.orphans(REPO)] == [grant.slot.slot_id]
    assert (await claimed(other)).slot.slot_id == held.slot.slot_id, "a slot that was only looked at is free"
    assert await coordinator.lost_among([grant, held]) == [grant, held]
    with pytest.raises(LeaseLostError):
        await coordinator.begin_return(grant)
    hold = await other.recover_orphan(grant.slot.slot_id)
    assert hold is not None
    assert (hold.slot.unsaved, hold.slot.lease) == ("crashed", grant.lease)
    await settle(other, hold)
    with pytest.raises(CoordinatorUnavailableError):
        await claimed(coordinator)
    await eventually(lambda: asyncio.sleep(0, [kind for kind, _ in events] == ["session.lost"]))
    await insist(lambda: claimed(coordinator))


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="no clock here counts while the machine sleeps")
async def test_a_machine_that_slept_leases_nothing_new_before_it_is_known_to_be_alive(
    postgres: PostgresPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _clock._BOOT_CLOCK == time.CLOCK_BOOTTIME, "no other clock went on meanwhile"
    coordinator = await postgres.pool(2)
    grant = await claimed(coordinator)
    monkeypatch.setattr(_pg_session, "boottime", lambda: _clock.boottime() + 3600.0)
    await age_session(postgres, coordinator)
    with pytest.raises(CoordinatorUnavailableError, match="nothing new is leased"):
        await claimed(coordinator)
    coordinator._link.session.check_now()  # the next beat, which would be due in seconds
    await insist(lambda: claimed(coordinator))
    assert await coordinator.is_held(grant), "nobody was awake to take it for dead"


async def test_who_was_cut_off_itself_takes_nobody_for_dead(postgres: PostgresPlace) -> None:
    coordinator, other = await postgres.pool(1), await postgres.coordinator()
    grant = await claimed(coordinator)
    await age_session(postgres, coordinator)
    await age_session(postgres, other)
    assert await other.reap() == 0
    assert await coordinator.is_held(grant)


async def test_reaping_hands_off_what_becomes_free(postgres: PostgresPlace) -> None:
    other = await postgres.pool(1)
    coordinator = await postgres.coordinator()
    held = await coordinator.take(ONE, states={SlotState.AVAILABLE})
    async with other.ticket(REPO, want("waiting")) as ticket:
        assert await ticket.claim() is None
        await age_session(postgres, coordinator)
        await eventually(other.reap)
        assert await postgres.ask("SELECT slot_id FROM repopool.waiter") == ONE
    assert held is not None


async def test_a_detached_lease_outlives_its_session(postgres: PostgresPlace) -> None:
    other = await postgres.pool(1)
    coordinator = await postgres.coordinator()
    grant = await claimed(coordinator, detached_ttl=60)
    await coordinator.close()
    assert await other.orphans(REPO) == []
    assert await other.is_held(grant)
    await settle(other, await other.release_detached(ONE, grant.token))


async def test_a_closed_coordinator_leaves_nothing(postgres: PostgresPlace) -> None:
    other = await postgres.pool(2)
    coordinator = await postgres.coordinator()
    grant = await claimed(coordinator)
    sessions = await postgres.ask("SELECT count(*) FROM repopool.session")
    threads = heartbeats()
    await coordinator.close()
    assert heartbeats() == threads - 1
    assert await postgres.ask("SELECT count(*) FROM repopool.session") == sessions - 1
    assert [slot.slot_id for slot in await other.orphans(REPO)] == [grant.slot.slot_id]
    await coordinator.close()


def heartbeats() -> int:
    return sum(thread.name == "repopool-heartbeat" for thread in threading.enumerate())


async def test_a_blocked_event_loop_costs_no_lease(postgres: PostgresPlace) -> None:
    coordinator = await postgres.pool(1, ttl=1.5)
    grant = await claimed(coordinator)
    session_id = coordinator._link.session.session_id
    query = "SELECT expires_at FROM repopool.session WHERE session_id = $1"
    before = await postgres.ask(query, session_id)

    def watch() -> None:
        async def has_beaten() -> bool:
            now = await postgres.ask(query, session_id)
            return bool((now - before).total_seconds() > 1.5)

        asyncio.run(eventually(has_beaten))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join(30)  # and all that time the event loop stands still
    assert not thread.is_alive()
    assert await coordinator.is_held(grant)
    assert await claimed_or_none(coordinator) is None
    await give_back(coordinator, grant)


async def claimed_or_none(coordinator: PostgresCoordinator) -> Grant | None:
    return await coordinator.claim(REPO, commit=None, branch=None, lease_id="other")


async def test_past_the_trust_window_nothing_is_claimed_and_it_is_told(
    postgres: PostgresPlace, proxy: Proxy, server: Server, events: Events
) -> None:
    await postgres.pool(2)
    far = await postgres.coordinator(
        dsn=through(proxy, server), ttl=0.6, on_event=lambda kind, fields: events.append((kind, dict(fields)))
    )
    grant = await claimed(far)
    proxy.freeze()
    await eventually(lambda: asyncio.sleep(0, "lease.unconfirmed" in [kind for kind, _ in events]))
    with pytest.raises(CoordinatorUnavailableError, match="nothing new is leased"):
        await claimed(far)
    proxy.thaw()
    await eventually(lambda: asyncio.sleep(0, "lease.confirmed" in [kind for kind, _ in events]))
    assert await far.is_held(grant)
    await claimed(far)


# Failover


async def test_a_token_that_was_granted_twice_is_raised_by_the_second_and_lost_by_the_first(
    postgres: PostgresPlace,
) -> None:
    first, second = await postgres.pool(1), await postgres.coordinator()
    lost = await claimed(first)
    # What an asynchronous standby does that had not received the last commits.
    await postgres.ask(
        "UPDATE repopool.slot SET state = 'available', token = 0, session_id = NULL, hold_id = NULL, "
        'record = record || overwritten || \'{"state": "available", "token": 0, "lease": null}\''
    )
    grant = await claimed(second)
    assert grant.token == lost.token == 1
    assert await second.raise_token(grant, 1) == 2
    with pytest.raises(LeaseLostError):
        await first.raise_token(lost, 1)
    with pytest.raises(LeaseLostError):
        await first.begin_return(lost)
    assert await second.is_held(grant)
    await give_back(second, grant)


async def test_nobody_is_reaped_in_the_first_time_after_a_restart(own_place: PostgresPlace) -> None:
    coordinator, other = await own_place.pool(1), await own_place.coordinator()
    grant = await claimed(coordinator)
    await age_session(own_place, coordinator)
    await asyncio.to_thread(own_place.server.stop)
    await asyncio.to_thread(own_place.server.start)
    assert await insist(other.reap) == 0
    assert await insist(lambda: coordinator.is_held(grant))
    await own_place.ask("UPDATE repopool.incarnation SET noticed_at = noticed_at - interval '1 h'")
    assert await eventually(other.reap) == 1


async def insist(call: Any) -> Any:
    """Call until there is an answer: the first calls after a restart find their connections dead."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await call()
            except CoordinatorUnavailableError:
                await asyncio.sleep(0.02)


async def test_leases_survive_a_crash_of_the_server(own_place: PostgresPlace) -> None:
    coordinator = await own_place.pool(2)
    grant, cleaned = await claimed(coordinator), await claimed(coordinator)
    await coordinator.begin_return(cleaned)
    await asyncio.to_thread(own_place.server.stop)
    finishing = asyncio.create_task(settle(coordinator, cleaned))
    with pytest.raises(CoordinatorUnavailableError):
        await coordinator.list_slots(REPO)
    await asyncio.to_thread(own_place.server.start)
    assert (await finishing).state is SlotState.AVAILABLE, "a release is repeated until there is an answer"
    assert await insist(lambda: coordinator.is_held(grant))
    await give_back(coordinator, grant)
    assert await insist(lambda: claimed(coordinator))


async def test_a_standby_is_refused_until_it_is_promoted(cluster: Server) -> None:
    server = cluster.copy()
    try:
        (server.data / "standby.signal").touch()
        await asyncio.to_thread(server.start)
        coordinator = PostgresCoordinator(server.dsn(DATABASE))
        with pytest.raises(StoreError, match=r"standby.*primary"):
            await coordinator.open()
        async with server.admin() as connection:
            assert await connection.fetchval("SELECT pg_promote()")
        async with PostgresCoordinator(server.dsn(DATABASE)) as promoted:
            assert await promoted.reap() == 0
    finally:
        server.remove()


# Connections


async def test_killed_connections_raise_nothing_but_our_errors_and_lose_no_slot(postgres: PostgresPlace) -> None:
    coordinator = await postgres.pool(4)
    failures: list[PoolManagerError] = []
    is_over = asyncio.Event()

    async def work(name: int) -> None:
        count = 0
        while not is_over.is_set():
            count += 1
            try:
                grant = await coordinator.claim(REPO, commit=None, branch=None, lease_id=f"{name}-{count}")
                if grant is not None:
                    await give_back(coordinator, grant)
            except PoolManagerError as error:
                failures.append(error)
                await asyncio.sleep(0.001)

    async def kill() -> None:
        async with postgres.server.admin(DATABASE) as connection:
            for _ in range(25):
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'repopool'"
                )
                await asyncio.sleep(0.02)
        is_over.set()

    async with asyncio.TaskGroup() as group:
        for name in range(8):
            group.create_task(work(name))
        group.create_task(kill())
    assert failures

    async def are_all_free() -> bool:
        return len([slot for slot in await coordinator.list_slots(REPO) if slot.state is SlotState.AVAILABLE]) == 4

    await eventually(are_all_free)
    assert [await claimed(coordinator, f"last-{number}") for number in range(4)]


@pytest.mark.parametrize("is_new", [False, True], ids=["connected", "connecting"])
async def test_whoever_is_cancelled_goes_within_a_second_though_the_server_is_frozen(
    postgres: PostgresPlace, proxy: Proxy, server: Server, is_new: bool
) -> None:
    await postgres.pool(1)
    far = await postgres.coordinator(dsn=through(proxy, server))
    if not is_new:
        await far.list_slots(REPO)
    proxy.freeze()
    claiming = asyncio.create_task(claimed(far))
    await asyncio.sleep(0)
    started = time.monotonic()
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    assert time.monotonic() - started < 1
    proxy.thaw()
    grant = await eventually(lambda: claimed_or_none(far))
    assert grant.lease.lease_id == "other"


async def test_a_call_to_a_frozen_server_ends_in_time_and_so_does_closing(
    postgres: PostgresPlace, proxy: Proxy, server: Server
) -> None:
    await postgres.pool(1)
    far = await postgres.coordinator(dsn=through(proxy, server), call_seconds=2.0)
    proxy.freeze()
    with pytest.raises(CoordinatorUnavailableError, match="no answer in time"):
        await claimed(far)
    started = time.monotonic()
    await far.close()
    assert time.monotonic() - started < 3


async def test_through_a_pooler_everything_works_and_who_waits_polls(postgres: PostgresPlace, server: Server) -> None:
    await postgres.pool(2)
    async with pgbouncer(server.port, DATABASE) as port:
        dsn = server.dsn(DATABASE, port=port)
        pooled = await postgres.coordinator(dsn=dsn)
        direct = await postgres.coordinator(dsn=dsn, listen_dsn=server.dsn(DATABASE))
        for number in range(5):
            grants = await asyncio.gather(*(claimed(each, f"{number}-{each}") for each in (pooled, direct)))
            await asyncio.gather(*(give_back(*pair) for pair in zip((pooled, direct), grants, strict=True)))
        taken = await claimed(pooled), await claimed(pooled)
        changed = asyncio.Event()
        async with direct.ticket(REPO, want("told"), on_change=changed.set) as told:
            await eventually(lambda: asyncio.sleep(0, direct.has_push))
            async with pooled.ticket(REPO, want("polls"), on_change=lambda: None) as polls:
                assert await told.claim() is None
                await give_back(pooled, taken[0])
                async with asyncio.timeout(10):
                    await changed.wait()
                assert await told.claim() is not None
                await give_back(pooled, taken[1])
                assert await polls.claim() is not None
        assert pooled._link.database.is_pooled
        assert not pooled.has_push
        await pooled.close()
        await direct.close()


# Processes


async def test_what_a_killed_process_held_comes_back_within_ttl_and_grace(postgres: PostgresPlace) -> None:
    coordinator = await postgres.pool(1, ttl=1.0)
    with worker("lease_in_database", postgres.dsn, 1.0) as other:
        assert other.expect("leased") == f"{ONE} 1"
        assert await claimed_or_none(coordinator) is None
        assert await coordinator.orphans(REPO) == []
        other.kill()
        (orphan,) = await eventually(lambda: coordinator.orphans(REPO))
        assert orphan.lease is not None
        assert orphan.lease.owner.pid == other.process.pid
        hold = await coordinator.recover_orphan(ONE)
        assert hold is not None
        await settle(coordinator, hold)
    assert (await claimed(coordinator)).token > 2


async def test_two_managers_never_share_a_slot_and_serve_all_who_wait(postgres: PostgresPlace) -> None:
    coordinators = [await postgres.pool(2), await postgres.coordinator()]
    inside: set[str] = set()
    served = dict.fromkeys(range(8), 0)

    async def work(name: int) -> None:
        using = coordinators[name % 2]
        for count in range(4):
            changed = asyncio.Event()
            async with using.ticket(REPO, want(f"{name}-{count}"), on_change=changed.set) as ticket:
                while (grant := await ticket.claim()) is None:
                    changed.clear()
                    try:
                        async with asyncio.timeout(1):
                            await changed.wait()
                    except TimeoutError:
                        pass
            assert grant.slot.slot_id not in inside
            inside.add(grant.slot.slot_id)
            await using.begin_return(grant)
            inside.discard(grant.slot.slot_id)
            await settle(using, grant)
            served[name] += 1

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for name in served:
            group.create_task(work(name))
    assert set(served.values()) == {4}
    assert await postgres.ask("SELECT count(*) FROM repopool.waiter") == 0
    tokens = [slot.token for slot in await coordinators[0].list_slots(REPO)]
    assert sum(tokens) == 32, "one token, one lease"


# Errors


async def test_without_the_driver_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(StoreError, match=r"pip install 'repopool-async\[postgres\]'"):
        await PostgresCoordinator("postgresql://localhost/x").open()


async def test_no_error_tells_a_password(server: Server) -> None:
    for dsn in (
        "postgresql://someone:hunter2@127.0.0.1:1/x",
        f"postgresql://nobody:hunter2@127.0.0.1:{server.port}/{DATABASE}",
        f"postgresql://repopool:hunter2@127.0.0.1:{server.port}/nothing?password=hunter2",
        "postgresql://someone:hunter2@[/x",
        "not a dsn with hunter2",
    ):
        with pytest.raises(StoreError) as caught:
            await PostgresCoordinator(dsn).open()
        assert "hunter2" not in str(caught.value), dsn


def test_what_no_family_of_errors_contains_means_that_the_database_is_down() -> None:
    for error in (
        asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.AdminShutdownError("terminating connection"),
        asyncpg.TooManyConnectionsError("sorry, too many clients already"),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError(),
        EOFError(),
        AttributeError("'NoneType' object has no attribute 'decode'"),
    ):
        with pytest.raises(CoordinatorUnavailableError, match="try again") as caught, translated("here", "do it"):
            raise error
        assert caught.value.__cause__ is error


def test_what_will_not_pass_is_told_with_its_remedy() -> None:
    for error, remedy in (
        (asyncpg.UndefinedTableError("relation does not exist"), "repopool db migrate"),
        (asyncpg.InvalidPasswordError("no"), "password"),
        (asyncpg.InvalidCatalogNameError("no"), "create the database"),
        (asyncpg.InsufficientPrivilegeError("no"), "grant"),
        (asyncpg.UntranslatableCharacterError("no"), "NUL"),
        (asyncpg.DataError("invalid input"), "DSN"),
    ):
        with pytest.raises(StoreError, match=remedy) as caught, translated("here", "do it"):
            raise error
        assert not isinstance(caught.value, CoordinatorUnavailableError)
    expired = asyncpg.PostgresError("expired")
    expired.sqlstate = "RP001"
    with pytest.raises(SessionExpiredError), translated("here", "do it"):
        raise expired


async def test_what_json_or_the_database_cannot_hold_is_refused_and_nothing_is_held(postgres: PostgresPlace) -> None:
    coordinator = await postgres.pool(1)
    for metadata in ({"x": object()}, {"x": "\0"}, {"x": "\ud800"}):
        with pytest.raises(StoreError):
            await claimed(coordinator, metadata=metadata)
    assert (await claimed(coordinator)).token == 1


async def test_a_closed_coordinator_says_so(postgres: PostgresPlace) -> None:
    coordinator = await postgres.pool(1)
    await coordinator.close()
    with pytest.raises(StoreError):
        await coordinator.list_slots(REPO)
    with pytest.raises(StoreError, match="open the coordinator"):
        await PostgresCoordinator(postgres.dsn).list_slots(REPO)


# The schema


async def test_nothing_that_a_claim_or_a_heartbeat_changes_is_indexed(postgres: PostgresPlace) -> None:
    """So that these updates are HOT."""
    coordinator = await postgres.pool(1)
    indexed = await postgres.ask(
        "SELECT array_agg(DISTINCT c.relname || '.' || a.attname) FROM pg_index i "
        "JOIN pg_class c ON c.oid = i.indrelid "
        "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY (i.indkey) "
        "WHERE c.relname IN ('slot', 'session') AND c.relnamespace = 'repopool'::regnamespace"
    )
    assert set(indexed) == {"slot.slot_id", "slot.pool", "session.session_id"}
    assert coordinator is not None


async def test_what_a_failover_made_ours_again_is_given_back_and_what_we_hold_is_not(postgres: PostgresPlace) -> None:
    coordinator = await postgres.pool(3)
    held, passed_on = await claimed(coordinator, "held"), await claimed(coordinator, "passed on")
    finished = await claimed(coordinator, "finished")
    session_id = coordinator._link.session.session_id
    ended = finished.slot.slot_id
    await give_back(coordinator, finished)
    # As a server that has lost the last commit has it.
    await postgres.ask(
        "UPDATE repopool.slot SET state = 'cleaning', session_id = $2, hold_id = $3, "
        """record = record || '{"state": "cleaning"}' WHERE slot_id = $1 RETURNING slot_id""",
        *(ended, session_id, finished.lock.hold_id),
    )
    assert await coordinator.orphans(REPO) == []

    async def found() -> bool:
        return [slot.slot_id for slot in await coordinator.orphans(REPO)] == [ended]

    async with coordinator.ticket(REPO, want("waits")) as ticket:
        assert await ticket.claim() is None
        await give_back(coordinator, passed_on)  # now it is the waiter's, who does not know of it yet

        await coordinator.reap()

        await eventually(found)
        grant = await ticket.claim()
    assert grant is not None
    assert grant.slot.slot_id == passed_on.slot.slot_id
    assert await coordinator.lost_among([held, grant]) == []
