"""JSON is compact, sorted and strict; what a newer version wrote is kept, what is malformed is one kind of error."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from types import MappingProxyType
from typing import Any, Final

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repopool_async._codec import CodecError, add_checksum, dumps, loads, remove_checksum
from repopool_async.models import AllocationRecord, CleanupResult, Lease, Owner, Pool, Seal, Slot, SlotState

PATIENTLY: Final = settings(deadline=None)
NOON: Final = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
OWNER: Final = Owner(host="ci-7", boot_id="5f0c", pid=4711, start_time=987654)
SLOT: Final = Slot(
    slot_id="workspace-web-slot1",
    repo_name="web",
    repo_url="https://example.org/web.git",
    path="/srv/pool/web/slots/slot1/tree",
    created_at=NOON,
    state=SlotState.ALLOCATED,
    token=3,
    lease=Lease(lease_id="lease-1", token=3, owner=OWNER, acquired_at=NOON, acquired_boottime=12.5),
    seal=Seal(
        commit="a" * 40,
        branch="main",
        refs_generation="g1",
        boot_id="5f0c",
        mark_ns=17,
        settled_ns=17,
        clock_offset_ns=18,
        tree_device=19,
        tree_inode=20,
    ),
)
POOL: Final = Pool(repo_name="web", repo_url="https://example.org/web.git", num_slots=2, created_at=NOON)


def as_json(record: object) -> dict[str, Any]:
    raw = json.loads(dumps(record))
    assert isinstance(raw, dict)
    return raw


def with_changes(record: object, **changes: Any) -> bytes:
    return json.dumps({**as_json(record), **changes}).encode()


def without(record: object, key: str) -> bytes:
    return json.dumps({name: value for name, value in as_json(record).items() if name != key}).encode()


class TestWriting:
    def test_a_record_is_one_compact_line_of_ascii_with_sorted_keys(self) -> None:
        data = dumps(attrs.evolve(SLOT, error="caf\xe9\n\u2028"))
        assert data.endswith(b"}\n")
        assert data.count(b"\n") == 1
        assert data.isascii()
        assert b": " not in data
        assert b", " not in data
        assert list(json.loads(data)) == sorted(json.loads(data))

    def test_enums_are_written_by_value_and_times_in_utc(self) -> None:
        elsewhere = NOON.astimezone(timezone(timedelta(hours=9)))
        raw = as_json(attrs.evolve(SLOT, created_at=elsewhere))
        assert raw["state"] == "allocated"
        assert raw["created_at"] == "2026-01-02T12:00:00+00:00"

    def test_a_time_without_a_zone_is_refused(self) -> None:
        with pytest.raises(CodecError, match="time zone"):
            dumps(attrs.evolve(SLOT, created_at=datetime(2026, 1, 2)))  # noqa: DTZ001 - the point

    @pytest.mark.parametrize(
        "metadata",
        [{"x": object()}, {"x": b"bytes"}, {"x": {1, 2}}, {"x": float("nan")}, {"x": float("inf")}, {1: 2, "x": 3}],
        ids=["object", "bytes", "set", "not a number", "infinite", "mixed keys"],
    )
    def test_what_json_cannot_hold_is_refused(self, metadata: dict[Any, Any]) -> None:
        with pytest.raises(CodecError, match="Pool cannot be written as JSON"):
            dumps(attrs.evolve(POOL, options=metadata))

    def test_a_mapping_that_contains_itself_is_refused(self) -> None:
        endless: dict[str, Any] = {}
        endless["again"] = endless
        with pytest.raises(CodecError):
            dumps(attrs.evolve(POOL, options=endless))

    def test_a_mapping_nested_too_deep_is_refused(self) -> None:
        deep: dict[str, Any] = {}
        for _ in range(100_000):
            deep = {"x": deep}
        try:
            with pytest.raises(CodecError):
                dumps(attrs.evolve(POOL, options=deep))
        finally:
            while deep:  # freeing it at once would recurse as deep
                deep = deep.pop("x")

    def test_read_only_mappings_are_written(self) -> None:
        assert as_json(attrs.evolve(POOL, options=MappingProxyType({"x": 1})))["options"] == {"x": 1}


class TestReading:
    def test_missing_keys_take_their_defaults(self) -> None:
        data = json.dumps(
            {key: as_json(SLOT)[key] for key in ("slot_id", "repo_name", "repo_url", "path", "created_at")}
        )
        slot = loads(Slot, data.encode())
        assert slot == Slot("workspace-web-slot1", "web", SLOT.repo_url, SLOT.path, NOON)

    @pytest.mark.parametrize("key", ["slot_id", "repo_name", "repo_url", "path", "created_at"])
    def test_required_keys_must_be_there(self, key: str) -> None:
        with pytest.raises(CodecError, match=f"no valid Slot: .*{key}"):
            loads(Slot, without(SLOT, key))

    @pytest.mark.parametrize(
        "changes",
        [
            {"slot_id": 1},
            {"path": None},
            {"path": ["/p"]},
            {"token": "3"},
            {"token": 3.0},
            {"token": True},
            {"token": None},
            {"state": "asleep"},
            {"state": None},
            {"state": ["allocated"]},
            {"created_at": "yesterday"},
            {"created_at": 1767355200},
            {"created_at": "2026-01-02T12:00:00"},
            {"created_at": "0001-01-01T00:00:00+14:00"},
            {"total_allocated_seconds": "1.5"},
            {"total_allocated_seconds": False},
            {"total_allocated_seconds": None},
            {"last_branch": 7},
            {"lease": []},
            {"lease": "lease-1"},
            {"lease": {"lease_id": "lease-1"}},
            {"seal": {"commit": "a"}},
            {"seal": 0},
            {"schema_version": "1"},
        ],
        ids=repr,
    )
    def test_a_value_of_another_type_is_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(CodecError, match="no valid Slot"):
            loads(Slot, with_changes(SLOT, **changes))

    @pytest.mark.parametrize("steps", ["abc", [1], [["a"]], {"a": 1}, None])
    def test_a_list_of_strings_holds_strings(self, steps: Any) -> None:
        result = CleanupResult("workspace-web-slot1", "return", True, NOON, 0.5)
        with pytest.raises(CodecError):
            loads(CleanupResult, with_changes(result, steps=steps))

    @pytest.mark.parametrize("options", [[], "x", None, [["a", 1]]])
    def test_a_mapping_is_a_mapping(self, options: Any) -> None:
        with pytest.raises(CodecError):
            loads(Pool, with_changes(POOL, options=options))

    def test_whole_numbers_are_welcome_as_durations(self) -> None:
        slot = loads(Slot, with_changes(SLOT, total_allocated_seconds=3))
        assert slot.total_allocated_seconds == 3.0
        assert type(slot.total_allocated_seconds) is float

    def test_times_of_any_zone_become_utc(self) -> None:
        slot = loads(Slot, with_changes(SLOT, created_at="2026-01-02T21:00:00+09:00"))
        assert slot.created_at == NOON
        assert slot.created_at.tzinfo is UTC
        assert loads(Slot, with_changes(SLOT, created_at="2026-01-02T12:00:00Z")).created_at == NOON

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
    @pytest.mark.parametrize("place", ["total_allocated_seconds", "options"])
    def test_numbers_are_finite_wherever_they_stand(self, number: str, place: str) -> None:
        kind, record = (Slot, SLOT) if place == "total_allocated_seconds" else (Pool, POOL)
        data = with_changes(record, **{place: "HERE" if kind is Slot else {"x": "HERE"}})
        with pytest.raises(CodecError):
            loads(kind, data.replace(b'"HERE"', number.encode()))

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\n",
            b"\0" * 500,
            b"null",
            b"true",
            b"17",
            b'"text"',
            b"[]",
            b"[[]]",
            b"{}",
            b"{" * 100_000,
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"9" * 100_000,
            b"\xff\xfe\x00",
            "{}".encode("utf-16"),
            b"\xef\xbb\xbf{}",
            dumps(SLOT) + dumps(SLOT),
            dumps(SLOT).replace(b"}", b",}"),
        ],
        ids=lambda data: repr(data[:12]),
    )
    def test_what_is_no_record_is_refused(self, data: bytes) -> None:
        with pytest.raises(CodecError):
            loads(Slot, data)

    def test_a_record_cut_off_anywhere_is_refused(self) -> None:
        data = dumps(SLOT)
        for length in range(len(data) - 1):
            with pytest.raises(CodecError):
                loads(Slot, data[:length])
        assert loads(Slot, data[:-1]) == SLOT

    @PATIENTLY
    @given(st.binary(max_size=300))
    def test_garbage_is_refused_and_nothing_else_happens(self, data: bytes) -> None:
        with pytest.raises(CodecError):
            loads(Slot, data)

    @PATIENTLY
    @given(st.integers(0, len(dumps(SLOT)) - 1), st.binary(min_size=1, max_size=4))
    def test_a_damaged_record_is_read_or_refused(self, place: int, damage: bytes) -> None:
        data = dumps(SLOT)
        try:
            slot = loads(Slot, data[:place] + damage + data[place + len(damage) :])
        except CodecError:
            return
        assert isinstance(slot, Slot)
        assert loads(Slot, dumps(slot)) == slot


class TestChecksums:
    def test_a_line_with_one_is_json_of_the_size_asked_for(self) -> None:
        data = add_checksum(dumps(SLOT), 4096)
        assert len(data) == 4096
        assert data.endswith(b" \n")
        raw = json.loads(data)
        assert len(raw.pop("checksum")) == 8
        assert raw == as_json(SLOT)

    def test_a_longer_line_keeps_its_length(self) -> None:
        data = add_checksum(dumps(SLOT), 10)
        assert data.endswith(b'"}\n')
        assert loads(Slot, remove_checksum(data)) == SLOT

    @given(st.text(), st.integers(0, 3000))
    @PATIENTLY
    def test_it_comes_off_again(self, text: str, size: int) -> None:
        line = dumps(attrs.evolve(SLOT, error=text))
        assert remove_checksum(add_checksum(line, size)) == line.rstrip()

    def test_a_record_without_one_is_taken_as_it_is(self) -> None:
        for data in (dumps(SLOT), b"", b"{}", b"garbage", b'{"checksum":"00000000"}'):
            assert remove_checksum(data) == data

    @PATIENTLY
    @given(st.integers(1, len(dumps(SLOT)) - 2), st.binary(min_size=1, max_size=30))
    def test_any_damage_before_it_is_noticed(self, place: int, damage: bytes) -> None:
        data = add_checksum(dumps(SLOT), 2048)
        end = place + len(damage)
        if end >= len(dumps(SLOT)) - 2 or data[place:end] == damage:
            return
        with pytest.raises(CodecError, match="checksum"):
            remove_checksum(data[:place] + damage + data[end:])

    def test_old_bytes_beside_new_ones_are_noticed_wherever_they_meet(self) -> None:
        old = add_checksum(dumps(attrs.evolve(SLOT, token=3, error="x" * 50)), 4096)
        new = add_checksum(dumps(attrs.evolve(SLOT, token=4, state=SlotState.CLEANING)), 4096)
        for place in range(4097):
            for mixed in (old[:place] + new[place:], new[:place] + old[place:]):
                if mixed not in (old, new):
                    with pytest.raises(CodecError):
                        loads(Slot, remove_checksum(mixed))


class TestVersions:
    def test_unknown_keys_are_kept_and_written_back(self) -> None:
        data = with_changes(SLOT, colour="green", extra={"a": 1}, plans=[{"b": None}])
        slot = loads(Slot, data)
        assert slot.extra == {"colour": "green", "extra": {"a": 1}, "plans": [{"b": None}]}
        assert attrs.evolve(slot, extra={}) == SLOT
        assert json.loads(dumps(slot)) == json.loads(data)

    def test_they_survive_a_change_of_what_is_known(self) -> None:
        pool = loads(Pool, with_changes(POOL, colour="green"))
        assert as_json(attrs.evolve(pool, num_slots=9)) == {**as_json(POOL), "num_slots": 9, "colour": "green"}

    def test_they_never_hide_what_is_known(self) -> None:
        assert as_json(attrs.evolve(SLOT, extra={"state": "available"}))["state"] == "allocated"

    def test_a_newer_version_is_read_as_far_as_it_is_known(self) -> None:
        slot = loads(Slot, with_changes(SLOT, schema_version=99, novelty={"x": 1}))
        assert slot.schema_version == 99
        assert slot.token == SLOT.token
        assert as_json(slot)["schema_version"] == 99

    def test_unknown_keys_elsewhere_are_passed_over(self) -> None:
        record = AllocationRecord("allocated", "workspace-web-slot1", "lease-1", 3, NOON, OWNER)
        assert loads(AllocationRecord, with_changes(record, colour="green")) == record
        lease = {**as_json(SLOT)["lease"], "colour": "green"}
        assert loads(Slot, with_changes(SLOT, lease=lease)) == SLOT


class TestLaziness:
    def test_importing_the_codec_does_not_import_cattrs(self) -> None:
        code = "import sys, repopool_async._codec; sys.exit('cattrs' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_many_threads_may_come_first(self) -> None:
        code = (
            "import threading\n"
            "from datetime import UTC, datetime\n"
            "from repopool_async._codec import dumps, loads\n"
            "from repopool_async.models import Pool\n"
            "pool = Pool('web', 'url', 2, datetime.now(UTC), extra={'x': 1})\n"
            "barrier, good = threading.Barrier(8), []\n"
            "def come():\n"
            "    barrier.wait()\n"
            "    good.append(loads(Pool, dumps(pool)) == pool)\n"
            "threads = [threading.Thread(target=come) for _ in range(8)]\n"
            "[thread.start() for thread in threads]\n"
            "[thread.join() for thread in threads]\n"
            "assert good == [True] * 8, good\n"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
