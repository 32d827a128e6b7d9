"""What every benchmark prints and writes."""

import json
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks._measure import Samples, Tell
from benchmarks._plots import Plot, draw

RESULTS = Path(__file__).parent / "results"
_WIDTH = 140


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


@attrs.frozen
class Row:
    """One figure and what it is to be.

    Attributes:
        unit: `ms`, `times`, or any other word. at_most, at_least: the target; neither where it is only told.
    """

    what: str
    figure: float
    unit: str = "times"
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or self.figure <= self.at_most) and (
            self.at_least is None or self.figure >= self.at_least
        )

    @property
    def target(self) -> str:
        """The target as people write it."""
        if self.at_most is not None:
            return f"≤ {_shown(self.at_most)}"
        return f"≥ {_shown(self.at_least)}" if self.at_least is not None else ""


@attrs.frozen
class Report:
    """What one program measured."""

    name: str
    title: str
    rows: list[Row]
    samples: Samples = attrs.field(factory=Samples)
    plots: list[Plot] = attrs.field(factory=list)


def publish(report: Report, *, prefix: str = "") -> None:
    """Print a report as tables and write it as JSON and its plots as SVG.

    Args:
        prefix: of the files' names.
    """
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(_rows_table(report))
    if report.samples.by_name:
        console.print(_samples_table(report.samples))
    medians = {name: statistics.median(times) for name, times in report.samples.by_name.items()}
    rows = [{**attrs.asdict(row), "is_met": row.is_met} for row in report.rows]
    path = write_json(f"{prefix}{report.name}", {"rows": rows, "medians": medians, "samples": report.samples.by_name})
    console.print(f"written to {path}")
    for plot in report.plots:
        target = RESULTS / f"{prefix}{plot.name}.svg"
        target.write_text(draw(plot))
        console.print(f"drawn in {target}")


def _rows_table(report: Report) -> Table:
    table = Table(title=report.title, title_justify="left")
    for heading in ("what", "measured", "target", "", "note"):
        table.add_column(heading, justify="right" if heading in ("measured", "target") else "left")
    for row in report.rows:
        mark = {None: "", True: "[green]reached[/]", False: "[red]missed[/]"}[row.is_met]
        table.add_row(row.what, f"{_shown(row.figure)} {row.unit}", row.target, mark, row.note)
    return table


def _samples_table(samples: Samples) -> Table:
    table = Table(title="milliseconds", title_justify="left")
    for heading in ("of", "p50", "p90", "max", "samples"):
        table.add_column(heading, justify="left" if heading == "of" else "right")
    for name, times in samples.by_name.items():
        figures = (statistics.median(times), percentile(times, 0.9), max(times))
        table.add_row(name, *(f"{figure * 1000:.1f}" for figure in figures), str(len(times)))
    return table


def _shown(figure: float | None) -> str:
    if figure is None:
        return ""
    return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}" if abs(figure) < 10 else f"{figure:.1f}"


@contextmanager
def progress(title: str, steps: int) -> Iterator[Tell]:
    """Show a bar while the block runs; the function given is told of every step as it begins."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=steps)
        yield lambda step: bar.update(task, advance=1, description=f"{title}: {step}")


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
    machine = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    path.write_text(json.dumps({"machine": machine, **data}, indent=2, default=str) + "\n")
    return path
