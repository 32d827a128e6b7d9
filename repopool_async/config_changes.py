"""What differs between two configurations, and what of that a running manager can take on.

Pure comparison: reading and watching the file is `config`'s and `config_watcher`'s business, acting on the difference
the manager's.
"""

from collections.abc import Mapping
from typing import Final

import attrs

from repopool_async.config import PoolConfig, PoolOptions, PoolSpec

READ_AT_USE: Final = frozenset(
    {
        "num_slots",
        "hosts",
        "default_ref",
        "fetch_on_allocate",
        "clean_on_release",
        "lock_timeout",
        "cleanup_timeout",
        "stale_lock_hours",
        "max_waiting",
        "acquire_timeout",
        "max_lease_seconds",
        "fetch_max_age",
        "disk_limit",
        "cleanup",
        "leak_warning",
        "auto_repair",
    }
)
"""Per-pool options that are looked up whenever they matter; any other needs the pool's components made anew."""

_APPLIED_AT_TOP: Final = frozenset({"hosts", "defaults", "pools", "source", "close_timeout", "janitor_interval"})


@attrs.frozen
class ConfigChange:
    """What became of a changed configuration.

    Attributes:
        added, removed: names of pools. changed: the keys that differ, by pool; of `repo_url` only credentials can.
        needs_restart: top-level keys whose change takes effect when a manager is opened the next time.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    needs_restart: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.needs_restart)


def compare(old: PoolConfig, new: PoolConfig) -> ConfigChange:
    """Return what is different in a new configuration."""
    both = sorted(old.pools.keys() & new.pools.keys())
    changed = {name: _changed_keys(old.pools[name], new.pools[name]) for name in both}
    top = [field.name for field in attrs.fields(PoolConfig) if field.name not in _APPLIED_AT_TOP]
    return ConfigChange(
        added=tuple(sorted(new.pools.keys() - old.pools.keys())),
        removed=tuple(sorted(old.pools.keys() - new.pools.keys())),
        changed={name: keys for name, keys in changed.items() if keys},
        needs_restart=tuple(name for name in top if getattr(old, name) != getattr(new, name)),
    )


def changed_options(old: PoolOptions, new: PoolOptions) -> tuple[str, ...]:
    """Return the names of the options that differ."""
    names = [field.name for field in attrs.fields(PoolOptions)]
    return tuple(name for name in names if getattr(old, name) != getattr(new, name))


def _changed_keys(old: PoolSpec, new: PoolSpec) -> tuple[str, ...]:
    url = ("repo_url",) if old.repo_url != new.repo_url else ()
    return url + changed_options(old.options, new.options)
