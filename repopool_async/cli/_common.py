"""What several verbs need: the configuration that the arguments mean, and words for a lease's metadata."""

from argparse import Namespace
from collections.abc import Mapping

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


def in_words(metadata: Mapping[str, object]) -> str:
    """Return metadata as `key=value` for people, on one line."""
    return " ".join(f"{on_one_line(key)}={_quoted(value)}" for key, value in metadata.items())


def on_one_line(text: str) -> str:
    """Return text without line breaks and without what could steer a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _quoted(value: object) -> str:
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return repr(" ".join(value))
    return repr(value)
