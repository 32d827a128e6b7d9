"""What a pool works with: the parts it is made of, and what is in force for it.

Records only. Making the parts is `assembly`'s business.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from repopool_async.config import PoolOptions
from repopool_async.coordination.base import Coordinator
from repopool_async.git_operations import GitOperations
from repopool_async.hosts.base import Host
from repopool_async.mirror import Mirror
from repopool_async.models import Pool
from repopool_async.run_as import RunAs
from repopool_async.salvage import Salvage
from repopool_async.slot_allocator import SlotAllocator
from repopool_async.slot_cleaner import SlotCleaner
from repopool_async.slot_store import SlotStore


@attrs.frozen
class Components:
    """What a pool works with; made by the manager, shared where it can be.

    Attributes:
        lessee_host: where lessees' commands run; they must not use up what bounds the pool's own git.
        lessee_git: the git verbs as a lessee would run them. emit: tells an event, a kind and fields.
        cleaning: bounds how many slots are cleaned or made at once.
        run_as: the user that lessees run as, where it is another.
        salvage: the pool's saved work.
    """

    host: Host
    store: SlotStore
    coordinator: Coordinator
    allocator: SlotAllocator
    mirror: Mirror
    cleaner: SlotCleaner
    lessee_host: Host
    lessee_git: GitOperations
    emit: Callable[[str, Mapping[str, Any]], None]
    cleaning: asyncio.Semaphore
    salvage: Salvage
    run_as: RunAs | None = None


@attrs.define(eq=False)
class PoolContext:
    """What is in force for one pool; all who work for the pool look it up here whenever it matters.

    Attributes:
        record, options, parts: replaced while the pool is open; leases and cleanings go on with the new ones.
        changed: set whenever a slot may have become free, or waiting may have become pointless.
    """

    record: Pool
    options: PoolOptions
    parts: Components
    changed: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.record.repo_name
