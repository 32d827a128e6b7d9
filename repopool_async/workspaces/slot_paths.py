"""Where the things of a slot that is a clone lie: its tree, what the pool keeps beside it, the trash. Says no more."""

from typing import Final

import attrs

ANY_MODE: Final = 0o777
"""What git makes directories with; the umask says the rest."""
NAMES_LIMIT: Final = 256 * 1024 * 1024
"""How long a list of names that is kept beside a tree may be, in bytes."""


@attrs.frozen
class SlotPaths:
    """Where a slot's things lie.

    Attributes:
        tree: what the lessee gets.
    """

    tree: str

    @property
    def directory(self) -> str:
        """The slot's own; everything but the trash lies in it."""
        return self.tree.rpartition("/")[0]

    @property
    def pristine(self) -> str:
        """What the pool keeps of the tree; no lessee writes there."""
        return f"{self.directory}/pristine"

    @property
    def git(self) -> str:
        """The git directory that the pool's git runs with."""
        return f"{self.pristine}/git"

    @property
    def gitlinks(self) -> str:
        """Names the submodule places of the commit the tree stands on."""
        return f"{self.pristine}/gitlinks"

    @property
    def settled(self) -> str:
        """Names what the pool itself changed after the seal's mark."""
        return f"{self.pristine}/settled"

    @property
    def kept(self) -> str:
        """Holds the kept directories that are not in the tree, under their names there."""
        return f"{self.directory}/kept"

    @property
    def kept_stamp(self) -> str:
        """Says what the kept directories were set up for."""
        return f"{self.directory}/kept.json"

    @property
    def trash(self) -> str:
        """The pool's, on the same file system."""
        pool_directory = self.directory.rpartition("/slots/")[0]
        return f"{pool_directory}/trash"
