"""The records the pool keeps and hands out: immutable, comparable, JSON both ways through `_codec`.

No behaviour beyond what follows from the fields themselves; nothing here does I/O. Durations are in seconds, sizes in
bytes, times for people in UTC; what decides ownership is on the boot-time clock and says so.
"""

import functools
import re
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Self

import attrs

SCHEMA_VERSION: Final = 1
LOCAL_HOST: Final = "local"
"""The host that the manager itself runs on, with the manager's own workspaces directory."""

_SLOT_ID: Final = re.compile(r"workspace-(?P<repo>.+)-slot(?P<number>[1-9][0-9]*)")


class SlotState(StrEnum):
    """Where a slot is in its life."""

    AVAILABLE = "available"
    """Verified clean, sealed, waiting for a lessee."""
    ALLOCATED = "allocated"
    """Leased."""
    CLEANING = "cleaning"
    """Being made, or between a lease and its next seal."""
    ERROR = "error"
    """Quarantined; `Slot.error` says why. Not handed out until repaired."""


@attrs.frozen
class Owner:
    """A process, told apart from every other that ever had its pid (see `_identity`)."""

    host: str
    boot_id: str
    pid: int
    start_time: int


@attrs.frozen
class Lease:
    """The right to use a slot.

    Attributes:
        lease_id: unique for ever.
        token: grows with every lease of the slot, for ever; a smaller one is stale.
        owner: the process that took the lease.
        acquired_at: for people.
        acquired_boottime: seconds on the owner's boot-time clock.
        expires_boottime: when a detached lease ends unless renewed; None for a lease that lives with its process.
        is_detached: whether the lease outlives its process (then it is held by this record, not by a lock).
        ref: what the lessee asked for. commit: what it got. branch: the local branch checked out, None when detached.
        metadata: the lessee's own words.
    """

    lease_id: str
    token: int
    owner: Owner
    acquired_at: datetime
    acquired_boottime: float
    expires_boottime: float | None = None
    is_detached: bool = False
    ref: str | None = None
    commit: str | None = None
    branch: str | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Seal:
    """The record that a slot was verified clean.

    Attributes:
        commit: what HEAD is. branch: the branch checked out, None when detached.
        refs_generation: the mirror's refs that the slot's git directory shows.
        boot_id: of the host, when sealed; after another boot nothing of this is believed.
        mark_ns: the file system's own clock at the seal, in nanoseconds: an inode of the tree whose ctime is not older
            has been touched since.
        settled_ns: the same for the root and for what was checked out after the mark, before a lease.
        clock_offset_ns: wall clock minus boot clock at the seal; if it moved, ctimes prove nothing.
        tree_device, tree_inode: the tree that was sealed.
        mirror_build: the mirror whose objects it was made of; nothing made of a damaged one is believed.
        kept: the paths that were kept between leases then.
    """

    commit: str
    branch: str | None
    refs_generation: str
    boot_id: str
    mark_ns: int
    settled_ns: int
    clock_offset_ns: int
    tree_device: int
    tree_inode: int
    mirror_build: str = ""
    kept: tuple[str, ...] = ()


@attrs.frozen
class Pool:
    """One repository and its slots, as stored in `pool.json`.

    Attributes:
        repo_url: without credentials.
        num_slots: how many slots the pool is meant to have.
        next_slot_number: slot numbers are never used again.
        options: the per-pool options of `pools.yaml` that differ from the defaults.
        is_drained: it was removed from the configuration: nothing of it is leased any more, nothing deleted.
        is_complete: False from before missing slots are made until all are there, and while the pool is deleted;
            where that is nobody's work any more, whoever was at it died.
        extra: keys of a newer version, kept as they are.
    """

    repo_name: str
    repo_url: str
    num_slots: int
    created_at: datetime
    next_slot_number: int = 1
    options: Mapping[str, Any] = attrs.field(factory=dict)
    is_drained: bool = False
    is_complete: bool = True
    schema_version: int = SCHEMA_VERSION
    extra: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Slot:
    """One reusable clone, as stored in `slot.json`.

    Attributes:
        slot_id: `workspace-<repo_name>-slot<number>`.
        path: the tree, on its host; never changes.
        state: see `SlotState`. error: why the slot is in ERROR.
        token: the highest lease token ever given; grows for ever.
        settled_token: the one it had when it was last verified clean; whatever ran there under it or lower ones had
            been ended.
        lease: the present lease while ALLOCATED, the last one while CLEANING, else None.
        seal: present while the tree is verified clean.
        allocation_count, total_allocated_seconds: usage (5.3).
        last_branch: branch of the last lease, for choosing a warm slot.
        unsaved: how the last lease ended (a `LeaseEnd`), until its work was saved or the slot is AVAILABLE; else None.
        host_id: the host whose files these are. labels: what a claim may ask for.
    """

    slot_id: str
    repo_name: str
    repo_url: str
    path: str
    created_at: datetime
    state: SlotState = SlotState.CLEANING
    token: int = 0
    lease: Lease | None = None
    seal: Seal | None = None
    error: str | None = None
    last_used_at: datetime | None = None
    last_branch: str | None = None
    allocation_count: int = 0
    total_allocated_seconds: float = 0.0
    unsaved: str | None = None
    host_id: str = LOCAL_HOST
    labels: tuple[str, ...] = ()
    settled_token: int = 0
    schema_version: int = SCHEMA_VERSION
    extra: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def number(self) -> int:
        """The slot's number within its pool."""
        return parse_slot_id(self.slot_id)[1]

    @functools.cached_property
    def idle_rank(self) -> tuple[float, int]:
        """Smaller for the more recently used, then for the lower number; kept, as a claim asks it of every slot."""
        return -self.last_used_at.timestamp() if self.last_used_at is not None else 0.0, self.number


@attrs.frozen
class SlotStatus:
    """What can be said of a slot at this moment (5.2)."""

    slot_id: str
    repo_name: str
    state: SlotState
    path: str
    is_locked: bool
    commit: str | None
    branch: str | None
    lease: Lease | None
    held_seconds: float | None
    allocation_count: int
    total_allocated_seconds: float
    created_at: datetime
    last_used_at: datetime | None
    error: str | None

    @classmethod
    def of(cls, slot: Slot, *, is_locked: bool, at: float) -> Self:
        """Return what a record says `at` seconds after the machine was booted."""
        lease = slot.lease if slot.state is SlotState.ALLOCATED else None
        return cls(
            slot_id=slot.slot_id,
            repo_name=slot.repo_name,
            state=slot.state,
            path=slot.path,
            is_locked=is_locked,
            commit=lease.commit if lease else slot.seal.commit if slot.seal else None,
            branch=lease.branch if lease else slot.seal.branch if slot.seal else None,
            lease=lease,
            held_seconds=at - lease.acquired_boottime if lease else None,
            allocation_count=slot.allocation_count,
            total_allocated_seconds=slot.total_allocated_seconds,
            created_at=slot.created_at,
            last_used_at=slot.last_used_at,
            error=slot.error,
        )


@attrs.frozen
class AllocationMetrics:
    """How allocating went, since the process started (10.5).

    Attributes:
        requests: leases asked for. allocations: given. timeouts, rejections, failures: not given, and why.
        warm: given without any check-out (the slot was sealed at the commit).
        average_wait_seconds, p50_wait_seconds, p99_wait_seconds, max_wait_seconds: from asking to holding, of the
            leases given.
        average_use_seconds: from holding to giving back.
    """

    requests: int = 0
    allocations: int = 0
    warm: int = 0
    timeouts: int = 0
    rejections: int = 0
    failures: int = 0
    releases: int = 0
    average_wait_seconds: float = 0.0
    p50_wait_seconds: float = 0.0
    p99_wait_seconds: float = 0.0
    max_wait_seconds: float = 0.0
    average_use_seconds: float = 0.0


@attrs.frozen
class PoolSummary:
    """One pool at a glance (5.5).

    Attributes:
        waiting: leases queued in this process.
    """

    repo_name: str
    repo_url: str
    total_slots: int
    available: int
    allocated: int
    cleaning: int
    error: int
    waiting: int
    allocation_count: int
    total_allocated_seconds: float
    metrics: AllocationMetrics


@attrs.frozen
class HostStatus:
    """One host at a glance.

    Attributes:
        address: `local`, or what SSH reaches. capacity: None for no limit.
        condition: `active`, `draining`, `parked` or `unreachable`. reason: for people.
        total_slots, available, allocated: of all pools.
    """

    host_id: str
    address: str
    workspaces_dir: str | None
    labels: tuple[str, ...]
    capacity: int | None
    condition: str
    reason: str
    total_slots: int
    available: int
    allocated: int


@attrs.frozen
class CleanupResult:
    """One line of the clean-up log (3.5).

    Attributes:
        operation: `provision`, `prepare` (before a lease), `return`, `recover`, `repair` or `warmup`.
        commit: what the slot stood on afterwards.
        steps: what was done, in order. removed: how many untracked entries went (a directory counts once).
        restored: how many tracked files were rewritten.
        rung: the highest rung of the repair ladder that was needed, None for an ordinary cleaning.
        error: why it failed; None on success. seal: the new one, on success.
    """

    slot_id: str
    operation: str
    success: bool
    started_at: datetime
    duration_seconds: float
    commit: str | None = None
    steps: tuple[str, ...] = ()
    removed: int = 0
    restored: int = 0
    rung: str | None = None
    error: str | None = None
    seal: Seal | None = None


@attrs.frozen
class AllocationRecord:
    """One line of a slot's allocation history (2.5).

    Attributes:
        event: `allocated`, `released`, `recovered`, `expired` or `forced`.
        held_seconds: on the events that end a lease.
    """

    event: str
    slot_id: str
    lease_id: str
    token: int
    at: datetime
    owner: Owner
    ref: str | None = None
    commit: str | None = None
    branch: str | None = None
    wait_seconds: float | None = None
    held_seconds: float | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class StaleLock:
    """A record that says a slot is held while nothing holds its lock (4.4)."""

    slot_id: str
    path: str
    owner: Owner | None
    age_seconds: float | None


@attrs.frozen
class CommandResult:
    """What a finished command left.

    Attributes:
        exit_code: as the process gave it; a death by signal N is -N.
        stdout, stderr: the last bytes, up to the cap that was asked for.
        is_truncated: whether earlier output was dropped.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    duration_seconds: float
    is_truncated: bool = False

    @property
    def text(self) -> str:
        """Standard output, decoded as UTF-8 with replacement."""
        return self.stdout.decode(errors="replace")


@attrs.frozen
class GitResult:
    """What a git command of ours did.

    Attributes:
        args: without the binary and the configuration that every command gets; free of credentials.
        attempts: how many times it was tried (9.1).
    """

    args: tuple[str, ...]
    exit_code: int
    stdout: bytes
    stderr: str
    duration_seconds: float
    attempts: int = 1

    @property
    def success(self) -> bool:
        """Whether git exited with 0."""
        return self.exit_code == 0

    @property
    def text(self) -> str:
        """Standard output, decoded (undecodable bytes survive as surrogates) and stripped."""
        return self.stdout.decode(errors="surrogateescape").strip()


@attrs.frozen
class ResolvedRef:
    """What a ref meant in the mirror at one moment.

    Attributes:
        asked: the caller's words. commit: the full commit id.
        branch: the branch to check out with tracking, None for a detached HEAD.
    """

    asked: str
    commit: str
    branch: str | None = None


class LeaseEnd(StrEnum):
    """How a lease ended."""

    RETURNED = "returned"
    """Its holder gave it back: the one ordinary end."""
    CRASHED = "crashed"
    """Its holder's process died."""
    EXPIRED = "expired"
    """It was detached and nobody renewed it in time."""
    FORCED = "forced"
    """Somebody took it away."""
    CLOSED = "closed"
    """Its manager was closed while it was open."""


@attrs.frozen
class SalvageRecord:
    """What was saved of a lease's unpushed work.

    Everything saved is reachable from `commit`: its tree is what the working tree held, its first parent what the
    lessee's HEAD was, its further parents the tips of other branches and the stashes.

    Attributes:
        salvage_id: the lease's id. reason: how the lease ended, a `LeaseEnd`. created_at: when it was saved.
        branch: what the lessee had checked out, None when detached. head: the commit HEAD was at.
        ref: what the lessee had asked for. base: the commit its lease began at.
        branches: local branches with commits that were nowhere else, name to commit.
        stash_commits, stash_messages: the stash, newest first.
        files_changed: tracked files that differ from `head`, deleted ones included. untracked: how many other files.
        commits: how many that were nowhere else. stashes: how many.
        skipped: what could not be saved, a line each with the reason.
        size_bytes: roughly, of what was saved.
        metadata: the lessee's own words.
    """

    salvage_id: str
    repo_name: str
    slot_id: str
    lease_id: str
    commit: str
    reason: str
    created_at: datetime
    base: str
    head: str
    branch: str | None = None
    ref: str | None = None
    token: int = 0
    owner: Owner | None = None
    branches: Mapping[str, str] = attrs.field(factory=dict)
    stash_commits: tuple[str, ...] = ()
    stash_messages: tuple[str, ...] = ()
    files_changed: int = 0
    untracked: int = 0
    commits: int = 0
    stashes: int = 0
    skipped: tuple[str, ...] = ()
    size_bytes: int = 0
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    schema_version: int = SCHEMA_VERSION
    extra: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class RestoredSalvage:
    """What bringing saved work back made.

    Attributes:
        branch: at what the lessee's HEAD was. branches: all that were made.
        stashes: how many stash entries were made. is_checked_out: whether the files lie in the working tree again.
    """

    branch: str
    branches: tuple[str, ...]
    stashes: int
    is_checked_out: bool


def make_slot_id(repo_name: str, number: int) -> str:
    """Return the id of a pool's slot, `workspace-{repo}-slot1`."""
    return f"workspace-{repo_name}-slot{number}"


@functools.lru_cache(maxsize=8192)
@functools.lru_cache(maxsize=4096)
def parse_slot_id(slot_id: str) -> tuple[str, int]:
    """Return the pool's name and the slot's number.

    Raises:
        ValueError: the text is no slot id.
    """
    match = _SLOT_ID.fullmatch(slot_id)
    if match is None:
        raise ValueError(f"{slot_id!r} is no slot id; they look like 'workspace-<pool>-slot1'")
    return match["repo"], int(match["number"])
