"""The connection pool for git checkouts: lease a clean, isolated, up-to-date clone in milliseconds.

Everything public is importable from here. The modules lie on floors (see the import contract in `pyproject.toml`):
`pool_manager` is the facade, `repo_pool` one repository's life, `hosts` where commands run.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repopool_async.config import PoolConfig as PoolConfig
    from repopool_async.config import PoolOptions as PoolOptions
    from repopool_async.config_coordination import Coordination as Coordination
    from repopool_async.config_hosts import HostSpec as HostSpec
    from repopool_async.events import Event as Event
    from repopool_async.exceptions import CleanupError as CleanupError
    from repopool_async.exceptions import CommandFailedError as CommandFailedError
    from repopool_async.exceptions import CommandTimeoutError as CommandTimeoutError
    from repopool_async.exceptions import ConfigError as ConfigError
    from repopool_async.exceptions import CoordinatorUnavailableError as CoordinatorUnavailableError
    from repopool_async.exceptions import EmptyRepositoryError as EmptyRepositoryError
    from repopool_async.exceptions import FencedError as FencedError
    from repopool_async.exceptions import GitAccessError as GitAccessError
    from repopool_async.exceptions import GitContentionError as GitContentionError
    from repopool_async.exceptions import GitDiskFullError as GitDiskFullError
    from repopool_async.exceptions import GitMirrorDamagedError as GitMirrorDamagedError
    from repopool_async.exceptions import GitOperationError as GitOperationError
    from repopool_async.exceptions import GitRefMissingError as GitRefMissingError
    from repopool_async.exceptions import GitSlotDamagedError as GitSlotDamagedError
    from repopool_async.exceptions import GitTimeoutError as GitTimeoutError
    from repopool_async.exceptions import GitTransientError as GitTransientError
    from repopool_async.exceptions import HostKeyError as HostKeyError
    from repopool_async.exceptions import HostNotFoundError as HostNotFoundError
    from repopool_async.exceptions import HostUnreachableError as HostUnreachableError
    from repopool_async.exceptions import LeaseLostError as LeaseLostError
    from repopool_async.exceptions import LeaseReleasedError as LeaseReleasedError
    from repopool_async.exceptions import LfsError as LfsError
    from repopool_async.exceptions import LockTimeoutError as LockTimeoutError
    from repopool_async.exceptions import ManagerClosedError as ManagerClosedError
    from repopool_async.exceptions import NoAvailableSlotError as NoAvailableSlotError
    from repopool_async.exceptions import PlatformNotSupportedError as PlatformNotSupportedError
    from repopool_async.exceptions import PoolExistsError as PoolExistsError
    from repopool_async.exceptions import PoolInUseError as PoolInUseError
    from repopool_async.exceptions import PoolManagerError as PoolManagerError
    from repopool_async.exceptions import PoolNotFoundError as PoolNotFoundError
    from repopool_async.exceptions import PoolTimeoutError as PoolTimeoutError
    from repopool_async.exceptions import RefError as RefError
    from repopool_async.exceptions import RepositoryUrlError as RepositoryUrlError
    from repopool_async.exceptions import SalvageError as SalvageError
    from repopool_async.exceptions import SalvageNotFoundError as SalvageNotFoundError
    from repopool_async.exceptions import SetupError as SetupError
    from repopool_async.exceptions import SlotAllocationError as SlotAllocationError
    from repopool_async.exceptions import SlotElsewhereError as SlotElsewhereError
    from repopool_async.exceptions import SlotInUseError as SlotInUseError
    from repopool_async.exceptions import SlotNotFoundError as SlotNotFoundError
    from repopool_async.exceptions import StoreError as StoreError
    from repopool_async.exceptions import SubmoduleError as SubmoduleError
    from repopool_async.exceptions import TooManyRequestsError as TooManyRequestsError
    from repopool_async.exceptions import UnkillableError as UnkillableError
    from repopool_async.exceptions import UnknownRefError as UnknownRefError
    from repopool_async.git_operations import GitOperations as GitOperations
    from repopool_async.hosts.base import Guard as Guard
    from repopool_async.hosts.local import LocalHost as LocalHost
    from repopool_async.hosts.ssh import SshHost as SshHost
    from repopool_async.lease import LeasedSlot as LeasedSlot
    from repopool_async.lock_manager import LockManager as LockManager
    from repopool_async.models import AllocationMetrics as AllocationMetrics
    from repopool_async.models import AllocationRecord as AllocationRecord
    from repopool_async.models import CleanupResult as CleanupResult
    from repopool_async.models import CommandResult as CommandResult
    from repopool_async.models import GitResult as GitResult
    from repopool_async.models import Lease as Lease
    from repopool_async.models import LeaseEnd as LeaseEnd
    from repopool_async.models import Owner as Owner
    from repopool_async.models import Pool as Pool
    from repopool_async.models import PoolSummary as PoolSummary
    from repopool_async.models import RestoredSalvage as RestoredSalvage
    from repopool_async.models import SalvageRecord as SalvageRecord
    from repopool_async.models import Seal as Seal
    from repopool_async.models import Slot as Slot
    from repopool_async.models import SlotState as SlotState
    from repopool_async.models import SlotStatus as SlotStatus
    from repopool_async.models import StaleLock as StaleLock
    from repopool_async.pool_manager import PoolManager as PoolManager
    from repopool_async.repo_pool import RepoPool as RepoPool
    from repopool_async.slot_allocator import SlotAllocator as SlotAllocator
    from repopool_async.slot_cleaner import SlotCleaner as SlotCleaner
    from repopool_async.slot_store import SlotStore as SlotStore

_HOMES = {
    "AllocationMetrics": "repopool_async.models",
    "AllocationRecord": "repopool_async.models",
    "CleanupError": "repopool_async.exceptions",
    "CleanupResult": "repopool_async.models",
    "CommandFailedError": "repopool_async.exceptions",
    "CommandResult": "repopool_async.models",
    "CommandTimeoutError": "repopool_async.exceptions",
    "ConfigError": "repopool_async.exceptions",
    "Coordination": "repopool_async.config_coordination",
    "CoordinatorUnavailableError": "repopool_async.exceptions",
    "EmptyRepositoryError": "repopool_async.exceptions",
    "Event": "repopool_async.events",
    "FencedError": "repopool_async.exceptions",
    "GitAccessError": "repopool_async.exceptions",
    "GitContentionError": "repopool_async.exceptions",
    "GitDiskFullError": "repopool_async.exceptions",
    "GitMirrorDamagedError": "repopool_async.exceptions",
    "GitOperationError": "repopool_async.exceptions",
    "GitOperations": "repopool_async.git_operations",
    "GitRefMissingError": "repopool_async.exceptions",
    "GitResult": "repopool_async.models",
    "GitSlotDamagedError": "repopool_async.exceptions",
    "GitTimeoutError": "repopool_async.exceptions",
    "GitTransientError": "repopool_async.exceptions",
    "Guard": "repopool_async.hosts.base",
    "HostKeyError": "repopool_async.exceptions",
    "HostNotFoundError": "repopool_async.exceptions",
    "HostSpec": "repopool_async.config_hosts",
    "HostUnreachableError": "repopool_async.exceptions",
    "Lease": "repopool_async.models",
    "LeaseEnd": "repopool_async.models",
    "LeaseLostError": "repopool_async.exceptions",
    "LeaseReleasedError": "repopool_async.exceptions",
    "LeasedSlot": "repopool_async.lease",
    "LocalHost": "repopool_async.hosts.local",
    "LockManager": "repopool_async.lock_manager",
    "LfsError": "repopool_async.exceptions",
    "LockTimeoutError": "repopool_async.exceptions",
    "ManagerClosedError": "repopool_async.exceptions",
    "NoAvailableSlotError": "repopool_async.exceptions",
    "Owner": "repopool_async.models",
    "PlatformNotSupportedError": "repopool_async.exceptions",
    "Pool": "repopool_async.models",
    "PoolConfig": "repopool_async.config",
    "PoolExistsError": "repopool_async.exceptions",
    "PoolInUseError": "repopool_async.exceptions",
    "PoolManager": "repopool_async.pool_manager",
    "PoolManagerError": "repopool_async.exceptions",
    "PoolNotFoundError": "repopool_async.exceptions",
    "PoolOptions": "repopool_async.config",
    "PoolSummary": "repopool_async.models",
    "PoolTimeoutError": "repopool_async.exceptions",
    "RefError": "repopool_async.exceptions",
    "RepoPool": "repopool_async.repo_pool",
    "RepositoryUrlError": "repopool_async.exceptions",
    "RestoredSalvage": "repopool_async.models",
    "SalvageError": "repopool_async.exceptions",
    "SalvageNotFoundError": "repopool_async.exceptions",
    "SalvageRecord": "repopool_async.models",
    "Seal": "repopool_async.models",
    "Slot": "repopool_async.models",
    "SlotAllocationError": "repopool_async.exceptions",
    "SlotAllocator": "repopool_async.slot_allocator",
    "SlotCleaner": "repopool_async.slot_cleaner",
    "SlotElsewhereError": "repopool_async.exceptions",
    "SlotInUseError": "repopool_async.exceptions",
    "SlotNotFoundError": "repopool_async.exceptions",
    "SlotState": "repopool_async.models",
    "SlotStatus": "repopool_async.models",
    "SlotStore": "repopool_async.slot_store",
    "SshHost": "repopool_async.hosts.ssh",
    "StaleLock": "repopool_async.models",
    "StoreError": "repopool_async.exceptions",
    "SetupError": "repopool_async.exceptions",
    "SubmoduleError": "repopool_async.exceptions",
    "TooManyRequestsError": "repopool_async.exceptions",
    "UnkillableError": "repopool_async.exceptions",
    "UnknownRefError": "repopool_async.exceptions",
}

__all__ = [
    "AllocationMetrics",
    "AllocationRecord",
    "CleanupError",
    "CleanupResult",
    "CommandFailedError",
    "CommandResult",
    "CommandTimeoutError",
    "ConfigError",
    "Coordination",
    "CoordinatorUnavailableError",
    "EmptyRepositoryError",
    "Event",
    "FencedError",
    "GitAccessError",
    "GitContentionError",
    "GitDiskFullError",
    "GitMirrorDamagedError",
    "GitOperationError",
    "GitOperations",
    "GitRefMissingError",
    "GitResult",
    "GitSlotDamagedError",
    "GitTimeoutError",
    "GitTransientError",
    "Guard",
    "HostKeyError",
    "HostNotFoundError",
    "HostSpec",
    "HostUnreachableError",
    "Lease",
    "LeaseEnd",
    "LeaseLostError",
    "LeaseReleasedError",
    "LeasedSlot",
    "LfsError",
    "LocalHost",
    "LockManager",
    "LockTimeoutError",
    "ManagerClosedError",
    "NoAvailableSlotError",
    "Owner",
    "PlatformNotSupportedError",
    "Pool",
    "PoolConfig",
    "PoolExistsError",
    "PoolInUseError",
    "PoolManager",
    "PoolManagerError",
    "PoolNotFoundError",
    "PoolOptions",
    "PoolSummary",
    "PoolTimeoutError",
    "RefError",
    "RepoPool",
    "RepositoryUrlError",
    "RestoredSalvage",
    "SalvageError",
    "SalvageNotFoundError",
    "SalvageRecord",
    "Seal",
    "SetupError",
    "Slot",
    "SlotAllocationError",
    "SlotAllocator",
    "SlotCleaner",
    "SlotElsewhereError",
    "SlotInUseError",
    "SlotNotFoundError",
    "SlotState",
    "SlotStatus",
    "SlotStore",
    "SshHost",
    "StaleLock",
    "StoreError",
    "SubmoduleError",
    "TooManyRequestsError",
    "UnkillableError",
    "UnknownRefError",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import repopool_async` alone costs almost nothing."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
