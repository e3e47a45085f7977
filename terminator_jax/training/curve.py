"""Draws the course of a run as an SVG: a panel of lines for each metric, side by side."""

import io
import math
import statistics
from collections.abc import Mapping, Sequence

from terminator_jax.training.averages import PREFIX
from terminator_jax.training.history import Line, evaluations

Points = Sequence[tuple[float, float]]

# What a line of an evaluation has besides its metrics.
NO_METRICS = {"kind", "step", "epoch", "count"}

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
    """Returns the text of an SVG of panels, each of one or more lines; "" without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return ""
    figure = Figure(figsize=(3.6 * len(drawn), 2.4), layout="constrained")
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, (title, lines) in zip(axes, drawn.items(), strict=True):
        for name, points in lines.items():
            panel.plot(*zip(*points, strict=True), COLORS[name], marker=".", label=name)
        panel.set(title=title, xlabel="epoch")
        panel.legend()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
