"""What a damaged record must have said, from whatever else is on disk.

A guess errs on the safe side: numbers and tokens are higher than any that were given, a slot is to be cleaned. That a
record is damaged, and what becomes of it, is decided elsewhere.
"""

import re
import time
from collections.abc import Sequence
from typing import Final

from repopool_async._clock import boottime, now
from repopool_async.config_values import without_credentials
from repopool_async.models import AllocationRecord, Lease, LeaseEnd, Pool, Slot, make_slot_id
from repopool_async.record_files import bytes_of, numbers_named, slot_numbers, try_read
from repopool_async.store_layout import StoreLayout, parse_id

# Only what could be a token or a slot number: garbage must not drive them out of every integer type.
_TOKEN_NAME: Final = re.compile(r"0*([0-9]{1,15})(?:\.[0-9]+)?")


def guess_pool(layout: StoreLayout, repo_name: str, text: bytes) -> Pool | None:
    """Return the record of a pool as far as it can be told; None where nothing tells the repository's URL.

    Args:
        text: what can be read of the damaged record.
    """
    directory = layout.pool_directory(repo_name)
    numbers = sorted(slot_numbers(f"{directory}/slots"))
    ids = [make_slot_id(repo_name, number) for number in numbers]
    read = [try_read(Slot, f"{layout.slot_directory(slot_id)}/slot.json", slot_id=slot_id)[0] for slot_id in ids]
    slots = [slot for slot in read if slot is not None]
    url = origin_url(f"{directory}/mirror.git/config") or next((slot.repo_url for slot in slots), "")
    if not url:
        return None
    # Lock files are never unlinked, so they tell of slots that are gone, whose numbers are not used again either.
    lock = re.compile(re.escape(f"workspace-{repo_name}-slot") + r"([1-9][0-9]{0,14})\.lock")
    used = [*numbers, *numbers_named(layout.locks_directory, lock)]
    return Pool(
        repo_name=repo_name,
        repo_url=without_credentials(url),
        num_slots=len(numbers),
        created_at=min((slot.created_at for slot in slots), default=now()),
        next_slot_number=max([1, *(number + 1 for number in used), *_numbers_in(text, b"next_slot_number")]),
    )


def guess_slot(layout: StoreLayout, slot_id: str, text: bytes, records: Sequence[AllocationRecord]) -> Slot:
    """Return a slot to be cleaned, with a token higher than any that was ever given.

    Args:
        text: what can be read of the damaged record. records: its history, oldest first.
    """
    repo_name, _ = parse_id(slot_id)
    directory = layout.slot_directory(slot_id)
    given = [record for record in records if record.event == "allocated"]
    tokens = [record.token for record in records] + _numbers_in(text, b"token")
    tokens += numbers_named(f"{directory}/fence", _TOKEN_NAME) + numbers_named(f"{directory}/run", _TOKEN_NAME)
    pool, _ = try_read(Pool, f"{layout.pool_directory(repo_name)}/pool.json", repo_name=repo_name)
    url = pool.repo_url if pool else origin_url(f"{layout.mirror_path(repo_name)}/config")
    return Slot(
        slot_id=slot_id,
        repo_name=repo_name,
        repo_url=without_credentials(url),
        path=layout.tree_path(slot_id),
        created_at=min((record.at for record in records), default=now()),
        # History is written after the record, so it may lack the last tokens. No slot is leased once a second on
        # average, so the seconds since 1970 are ahead of any count of leases.
        token=max([int(time.time()), *(token + 1 for token in tokens)]),
        lease=_lease_of(given[-1]) if given and given[-1] is records[-1] else None,
        unsaved=LeaseEnd.CRASHED if given and given[-1] is records[-1] else None,
        last_used_at=records[-1].at if records else None,
        last_branch=given[-1].branch if given else None,
        allocation_count=len(given),
        total_allocated_seconds=sum(record.held_seconds or 0.0 for record in records),
    )


def _lease_of(record: AllocationRecord) -> Lease:
    age = (now() - record.at).total_seconds()
    return Lease(
        lease_id=record.lease_id,
        token=record.token,
        owner=record.owner,
        acquired_at=record.at,
        acquired_boottime=max(0.0, boottime() - age),
        ref=record.ref,
        commit=record.commit,
        branch=record.branch,
        metadata=record.metadata,
    )


def _numbers_in(text: bytes, key: bytes) -> list[int]:
    """Return the numbers that a key had in JSON which can no longer be parsed."""
    return [int(number) for number in re.findall(rb'"%b":([0-9]{1,15})(?![0-9])' % key, text)]


def origin_url(path: str) -> str:
    """Return the URL of `origin` in a git configuration file, read as text; empty where there is none."""
    is_origin = False
    for line in bytes_of(path).decode(errors="surrogateescape").splitlines():
        text = line.strip()
        if text.startswith("["):
            header, _, text = text[1:].partition("]")
            kind, _, name = header.strip().partition(" ")
            is_origin = kind.lower() == "remote" and name.strip() == '"origin"'
        key, equals, value = text.partition("=")
        if is_origin and equals and key.strip().lower() == "url":
            return _config_value(value)
    return ""


def _config_value(text: str) -> str:
    value, is_quoted = "", False
    for escaped, mark, plain in re.findall(r'\\(.)|(["#;])|([^\\"#;]+)', text.strip()):
        if mark == '"':
            is_quoted = not is_quoted
        elif mark and not is_quoted:
            break
        else:
            value += {"n": "\n", "t": "\t", "b": "\b"}.get(escaped, escaped) or mark or plain
    return value.strip()
