"""Draws the course of a run as an SVG: a panel of lines for each metric, side by side."""

import math
import statistics
from collections.abc import Mapping, Sequence

from terminator_jax.training.averages import PREFIX
from terminator_jax.training.history import Line, evaluations

Points = Sequence[tuple[float, float]]

# What a line of an evaluation has besides its metrics.
NO_METRICS = {"kind", "step", "epoch", "count"}

WIDTH, HEIGHT = 360, 220  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 30, 40  # margins around its lines
COLORS = {"train": "#888888", "eval": "#1f77b4", "average": "#d95f02"}


def panels(lines: Sequence[Line]) -> dict[str, dict[str, Points]]:
    """Returns what to draw of a log: by the name of a metric and of a line, points (epoch, value).

    The values of training are means over the steps of each epoch.

    Example:
        >>> lines = ((3, 2.0), (4, 1.0))  # a mean of three steps and one of the fourth
        >>> log = [{"kind": "train", "epoch": 1, "step": n, "loss": value} for n, value in lines]
        >>> panels([*log, {"kind": "eval", "step": 4, "epoch": 1, "loss": 0.5, "count": 3}])
        {'loss': {'train': [(1.0, 1.75)], 'eval': [(1, 0.5)]}}
    """
    found, train = evaluations(lines), _epochs(lines)
    names = [name for name in found[-1] if name not in NO_METRICS] if found else []
    result: dict[str, dict[str, Points]] = {}
    for name in names:
        if name.startswith(PREFIX):
            continue
        averaged = PREFIX + name
        drawn = {
            "train": [(line["epoch"], line[name]) for line in train if name in line],
            "eval": [(line["epoch"], line[name]) for line in found if name in line],
            "average": [(line["epoch"], line[averaged]) for line in found if averaged in line],
        }
        finite = {key: [p for p in points if math.isfinite(p[1])] for key, points in drawn.items()}
        result[name] = {key: points for key, points in finite.items() if points}
    return {name: drawn for name, drawn in result.items() if drawn}


def _epochs(lines: Sequence[Line]) -> list[Line]:
    """Returns the means of the lines of training over each epoch, weighted by their steps."""
    epochs: dict[int, list[tuple[int, Line]]] = {}
    before = 0
    for line in lines:
        if line["kind"] == "train":
            steps, before = max(line["step"] - before, 1), line["step"]
            epochs.setdefault(line["epoch"], []).append((steps, line))
    return [_mean(*zip(*part, strict=True)) for part in epochs.values()]


def _mean(weights: Sequence[int], lines: Sequence[Line]) -> Line:
    shared = set.intersection(*map(set, lines)) - {"kind"}
    return {name: statistics.fmean((line[name] for line in lines), weights) for name in shared}


def svg(drawn: Mapping[str, Mapping[str, Points]]) -> str:
    """Returns the text of an SVG of panels, each of one or more lines."""
    width = WIDTH * len(drawn)
    inside = "".join(_panel(n * WIDTH, *item) for n, item in enumerate(drawn.items()))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}"'
        f' viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif" font-size="11" fill="#333333">\n'
        f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>\n{inside}</svg>\n'
    )


def _panel(left: float, title: str, lines: Mapping[str, Points]) -> str:
    """Returns a panel: its frame with the ends of both axes, its lines and their names."""
    (x0, x1), (y0, y1) = (
        (min(values), max(values))
        for values in zip(*(point for points in lines.values() for point in points), strict=True)
    )
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        return left + LEFT + right * inner_width, TOP + (1 - up) * inner_height

    parts = [_text(left + LEFT, 18, title, 'font-weight="bold"')]
    for value in (y0, (y0 + y1) / 2, y1):
        y = place(x0, value)[1]
        end = left + WIDTH - RIGHT
        parts.append(f'<path d="M{left + LEFT} {y:.1f}H{end}" stroke="#dddddd"/>\n')
        parts.append(_text(left + LEFT - 6, y + 4, f"{value:.4g}", 'text-anchor="end"'))
    for value in {x0, x1}:
        x = place(value, y0)[0]
        parts.append(_text(x, HEIGHT - BOTTOM + 16, f"{value:g}", 'text-anchor="middle"'))
    for n, (name, points) in enumerate(lines.items()):
        color = COLORS[name]
        dots = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        ends = f'<circle cx="{dots[-1][0]:.1f}" cy="{dots[-1][1]:.1f}" r="2" fill="{color}"/>\n'
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>\n{ends}')
        at = left + LEFT + 70 * n
        parts.append(_text(at, HEIGHT - 8, name, f'style="fill:{color}"'))
    return "".join(parts) + _text(left + WIDTH - RIGHT, HEIGHT - 8, "epoch", 'text-anchor="end"')


def _text(x: float, y: float, text: str, options: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {options}>{text}</text>\n'
