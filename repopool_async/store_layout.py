"""Where the records of pools and slots lie below the workspaces directory, and what their names are. No I/O."""

import functools
import os
from pathlib import Path

from repopool_async.config_values import validate_repo_name
from repopool_async.exceptions import SlotNotFoundError
from repopool_async.models import LOCAL_HOST, parse_slot_id


class StoreLayout:
    """The paths of all pools in one directory."""

    def __init__(self, workspaces_dir: str | os.PathLike[str]) -> None:
        self._root = str(Path(workspaces_dir).expanduser().absolute())

    @property
    def workspaces_directory(self) -> str:
        """The directory of all pools, absolute."""
        return self._root

    @property
    def locks_directory(self) -> str:
        """Where the lock files of all slots lie."""
        return f"{self._root}/locks"

    def pool_directory(self, repo_name: str) -> str:
        """Return a pool's directory.

        Raises:
            ConfigError: that can be no pool's name.
        """
        return f"{self._root}/{validate_repo_name(repo_name)}"

    def mirror_path(self, repo_name: str) -> str:
        """Return where a pool's mirror lies."""
        return f"{self.pool_directory(repo_name)}/mirror.git"

    def trash_path(self, repo_name: str) -> str:
        """Return the directory into which a pool's files are renamed to be deleted."""
        return f"{self.pool_directory(repo_name)}/trash"

    def slot_directory(self, slot_id: str) -> str:
        """Return the directory of a slot's records and files.

        Raises:
            SlotNotFoundError: that can be no slot's id.
        """
        repo_name, number = parse_id(slot_id)
        return f"{self._root}/{repo_name}/slots/slot{number}"

    def tree_path(self, slot_id: str) -> str:
        """Return a slot's working tree."""
        return f"{self.slot_directory(slot_id)}/tree"

    def pristine_path(self, slot_id: str) -> str:
        """Return where a slot's next trusted git directory lies."""
        return f"{self.slot_directory(slot_id)}/pristine"


def lock_on(host_id: str, name: str) -> str:
    """Return what the lock of a thing on a host is called, where on the manager's own it would have this name."""
    return name if host_id == LOCAL_HOST else f"{name}.{host_id}.git"  # no pool's name ends so


@functools.lru_cache(maxsize=4096)
def parse_id(slot_id: str) -> tuple[str, int]:
    """Return the pool's name and the slot's number.

    Raises:
        SlotNotFoundError: that can be no slot's id.
    """
    try:
        repo_name, number = parse_slot_id(slot_id)
        return validate_repo_name(repo_name), number
    except ValueError as error:
        raise SlotNotFoundError(f"there is no slot {slot_id!r}: {error}", slot_id=slot_id) from error
