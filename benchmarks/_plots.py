"""Line charts as SVG, with both axes logarithmic: a file that a README can show, without a plotting library.

What is drawn is given as numbers; nothing is measured here.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Final

import attrs

_WIDTH: Final = 760
_HEIGHT: Final = 400
_LEFT: Final = 80
_RIGHT: Final = 230
_TOP: Final = 50
_BOTTOM: Final = 60
_COLORS: Final = ("#0b6e4f", "#c1292e", "#235789", "#f1a208", "#6a4c93", "#8d99ae", "#161925")
_STYLE: Final = (
    "text{font:12px sans-serif;fill:#24292f}.grid{stroke:#d0d7de;stroke-width:1}"
    ".line{fill:none;stroke-width:2}rect{fill:#fff}.title{font-size:15px;font-weight:600}"
)


@attrs.frozen
class Plot:
    """A chart: points by the name of their line, every number above 0."""

    name: str
    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def draw(plot: Plot) -> str:
    """Return the chart as the text of an SVG file."""
    points = [point for line in plot.lines.values() for point in line]
    across = _Axis([x for x, _ in points], _LEFT, _WIDTH - _RIGHT)
    up = _Axis([y for _, y in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"><style>{_STYLE}</style>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="title" x="{_LEFT}" y="28">{escape(plot.title)}</text>',
        *(_text(_label(x), across.at(x), _HEIGHT - _BOTTOM + 18, "middle") for x in across.ticks),
        *_rows(up),
        _text(plot.x, (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 16, "middle"),
        f'<text transform="translate(18 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(plot.y)}</text>',
        *_lines(plot, across, up),
        "</svg>\n",
    ]
    return "\n".join(parts)


class _Axis:
    """Where numbers lie between two coordinates, and which ones are written there."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self._low, self._high = math.log10(min(values)), math.log10(max(values))
        self._start, self._end = start, end
        whole = range(math.floor(self._low), math.ceil(self._high) + 1)
        self.ticks = [10.0**power for power in whole if self._low - 1e-9 <= power <= self._high + 1e-9]
        if len(self.ticks) < 2:
            self.ticks = sorted({min(values), max(values)})

    def at(self, value: float) -> float:
        """Return a number's coordinate."""
        share = (math.log10(value) - self._low) / ((self._high - self._low) or 1.0)
        return self._start + share * (self._end - self._start)


def _rows(up: _Axis) -> Iterator[str]:
    for y in up.ticks:
        at = up.at(y)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield _text(_label(y), _LEFT - 8, at + 4, "end")


def _lines(plot: Plot, across: _Axis, up: _Axis) -> Iterator[str]:
    ends = sorted((up.at(line[-1][1]), name) for name, line in plot.lines.items())
    heights = itertools.accumulate((at for at, _ in ends), lambda above, at: max(above + 16, at))
    labels = dict(zip((name for _, name in ends), heights, strict=True))
    for (name, line), color in zip(plot.lines.items(), itertools.cycle(_COLORS)):
        path = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in line)
        yield f'<polyline class="line" stroke="{color}" points="{path}"/>'
        for x, y in line:
            yield f'<circle fill="{color}" r="3" cx="{across.at(x):.1f}" cy="{up.at(y):.1f}"/>'
        shown = f"{name}: {_label(line[-1][1])}"
        yield f'<text x="{_WIDTH - _RIGHT + 10}" y="{labels[name] + 4:.1f}" style="fill:{color}">{escape(shown)}</text>'


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
