"""What several verbs need: the configuration that the arguments mean, and a manager over it."""

from argparse import Namespace

import attrs

from repopool_async.config import PoolConfig


def configuration(arguments: Namespace) -> PoolConfig:
    """Return what `--config` and `--workspaces-dir` say; the latter wins over the file.

    Raises:
        ConfigError: the file is refused.
    """
    if arguments.config is None:
        return PoolConfig(arguments.workspaces_dir)
    config = PoolConfig.from_file(arguments.config)
    if arguments.workspaces_dir is None:
        return config
    return attrs.evolve(config, workspaces_dir=arguments.workspaces_dir)


def only(config: PoolConfig, repo_name: str | None) -> PoolConfig:
    """Return the configuration with at most one of its pools, so that a one-shot process makes no others."""
    pools = {name: spec for name, spec in config.pools.items() if name == repo_name}
    return attrs.evolve(config, pools=pools)
