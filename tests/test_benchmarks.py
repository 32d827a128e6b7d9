"""The measuring programs run, at a size at which their figures mean nothing; and their charts are charts."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks._plots import Plot, draw
from benchmarks.test_allocation_performance import test_smoke as test_allocation_performance
from benchmarks.test_cleanup_performance import test_smoke as test_cleanup_performance
from benchmarks.test_large_pool import test_smoke as test_large_pool

__all__ = ["test_allocation_performance", "test_cleanup_performance", "test_large_pool"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_chart_has_a_line_through_all_its_points_and_names_it() -> None:
    plot = Plot("name", "a < b", "x", "y", {"one": [(1, 10), (10, 100), (100, 1000)], "two": [(1, 5)]})

    root = ET.fromstring(draw(plot))

    lines = [element.get("points", "").split() for element in root.iter("{http://www.w3.org/2000/svg}polyline")]
    texts = "".join(root.itertext())
    assert [len(line) for line in lines] == [3, 1]
    assert "a < b" in texts
    assert "one: 1,000" in texts
