"""Leaves the corpus' long runs out, unless they are asked for."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" in config.option.markexpr:
        return
    left_out = [
        item for item in items if Path(__file__).parent in item.path.parents and item.get_closest_marker("soak")
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
