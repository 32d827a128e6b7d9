"""Follows the configuration file while a manager is open: reads it again, refuses it or takes it on as a whole.

Noticing that it has other contents is `config_watcher`'s business, comparing `config_changes`', and what becomes of the
pools `configured_pools`'.
"""

import asyncio
from pathlib import Path

import attrs

from repopool_async._aio import TaskSet, in_thread
from repopool_async._git_arguments import split_credentials, validate_url
from repopool_async.assembly import Shared
from repopool_async.config import PoolConfig, refusal_in
from repopool_async.config_changes import ConfigChange, compare
from repopool_async.config_watcher import ConfigWatcher
from repopool_async.configured_pools import ConfiguredPools
from repopool_async.exceptions import ConfigError, PoolManagerError, RepositoryUrlError
from repopool_async.janitor import Janitor
from repopool_async.pool_registry import PoolRegistry


class ConfigReload:
    """Keeps a manager as its configuration file says."""

    def __init__(self, shared: Shared, registry: PoolRegistry, configured: ConfiguredPools, janitor: Janitor) -> None:
        self._source: Path | None = None
        self._shared = shared
        self._registry = registry
        self._configured = configured
        self._janitor = janitor
        self._turn = asyncio.Lock()
        self._is_refused = False
        self._is_following = False
        self._tasks = TaskSet("config-reload", on_error=lambda _name, _error: None)

    def follow(self, source: Path) -> None:
        """Say where the configuration in force was read from."""
        self._source = source
        self._configured.is_exact = True

    def start(self) -> None:
        """Begin to watch the file, where there is one and the configuration does not forbid it."""
        if self._source is not None and self._shared.config.watch != "never":
            self._is_following = True
            watcher = ConfigWatcher(self._source, self._file_changed, is_polled=self._shared.config.watch == "poll")
            self._tasks.spawn(watcher.run(), name="watch-config")

    def refuse(self) -> None:
        """Take no notice of the file any more."""
        self._is_following = False

    async def stop(self) -> None:
        """Interrupt what is under way."""
        await self._tasks.cancel()

    async def reload(self) -> ConfigChange:
        """Read the file again and take on what is different; see `PoolManager.reload`."""
        source = self._source
        if source is None:
            raise ConfigError("this manager has no configuration file; from_config_file makes one that has")
        async with self._turn:
            try:
                config = await in_thread(PoolConfig.from_file, source)
                await self._refuse_other_identity(config, source)
            except ConfigError as error:
                self._is_refused = True
                fields = {"source": str(source), "line": error.line, "error": str(error)}
                self._shared.bus.emit("config.refused", fields)
                raise
            self._is_refused = False
            change = self._take_on(config)
        fields = {"source": str(source), **attrs.asdict(change)}
        self._shared.bus.emit("config.applied", fields)
        return change

    async def _file_changed(self) -> None:
        """Reload, unless the file says what is in force already; refusals have been told as events."""
        if self._source is None or not self._is_following:
            return
        try:
            if not self._is_refused and await in_thread(PoolConfig.from_file, self._source) == self._shared.config:
                return
        except ConfigError:
            pass  # reload refuses it, and says so
        try:
            await self.reload()
        except ConfigError:
            return
        except (PoolManagerError, OSError) as error:
            fields = {"source": str(self._source), "line": None, "error": str(error)}
            self._shared.bus.emit("config.refused", fields)

    async def _refuse_other_identity(self, config: PoolConfig, source: Path) -> None:
        """Refuse what no running manager can take on: another directory, or another repository under a pool's name."""
        present = self._shared.config.workspaces_dir
        if config.workspaces_dir != present:
            text = f"cannot change while a manager is open (it is {present}); restart"
            raise await in_thread(refusal_in, source, ("workspaces_dir",), text)
        for name, spec in config.pools.items():
            stored = await self._registry.stored(name)
            try:
                url, _ = split_credentials(validate_url(spec.repo_url, config.allow_protocols))
            except RepositoryUrlError as error:
                raise await in_thread(refusal_in, source, ("pools", name, "repo_url"), str(error)) from None
            if stored is not None and stored.repo_url != url:
                text = f"{name} is already the pool of {stored.repo_url}; choose another name, or delete_pool first"
                raise await in_thread(refusal_in, source, ("pools", name, "repo_url"), text)

    def _take_on(self, config: PoolConfig) -> ConfigChange:
        """Begin to make a configuration true. No suspension: it is in force as a whole or not at all."""
        change = compare(self._shared.config, config)
        self._shared.config = config
        self._shared.hosts.declare(config.hosts)
        self._janitor.interval_seconds = config.janitor_interval
        for name in change.removed:
            self._configured.remove(name)
        for name in change.added:
            self._configured.add(name)
        for name in change.changed:
            self._configured.change(name)
        return change
