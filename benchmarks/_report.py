"""What every benchmark prints and writes."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def describe_ms(seconds: Sequence[float]) -> str:
    """Return count, median, 90th and 99th percentile and maximum, in milliseconds."""
    if not seconds:
        return "none"
    figures = (statistics.median(seconds), percentile(seconds, 0.9), percentile(seconds, 0.99), max(seconds))
    shown = " / ".join(f"{figure * 1000:.1f}" for figure in figures)
    return f"{shown} ms (p50 / p90 / p99 / max of {len(seconds)})"


def print_table(title: str, rows: Mapping[str, object]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name in rows)
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")


def write_json(name: str, data: Mapping[str, Any]) -> Path:
    """Write figures with what machine they are from; return the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    machine = {"python": platform.python_version(), "system": platform.platform()}
    path.write_text(json.dumps({"machine": machine, **data}, indent=2, default=str) + "\n")
    return path
