"""The whole corpus: importing this registers every vector."""

from tests.contamination import (
    vectors_config,
    vectors_executing,
    vectors_files,
    vectors_hidden,
    vectors_index,
    vectors_names,
    vectors_objects,
    vectors_operations,
    vectors_refs,
    vectors_tree,
)
from tests.contamination.kit import VECTORS, Vector

__all__ = ["VECTORS", "Vector", "for_user"]

_MODULES = (
    vectors_files, vectors_names, vectors_index, vectors_operations, vectors_refs, vectors_config, vectors_executing,
    vectors_objects, vectors_tree, vectors_hidden,
)  # fmt: skip


def for_user(*, is_root: bool) -> list[Vector]:
    """Return the vectors that a user can play."""
    return [vector for vector in VECTORS.values() if is_root or not vector.needs_root]
