"""What the log of a run says about its course: its evaluations, the best one, no more progress."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from terminator_jax.training.averages import PREFIX
from terminator_jax.training.metrics import Scalars

# Metrics of which the smallest is the best; of others it is the largest.
LOWER_IS_BETTER = {"loss"}

Line = dict[str, Any]


def read(workdir: Path, step: int) -> list[Line]:
    """Reads the lines of `log.jsonl` up to a step; of a line that was cut off, none."""
    path = workdir / "log.jsonl"
    if not path.exists():
        return []
    lines = map(_parsed, path.read_text().splitlines())
    return [line for line in lines if line and line["step"] <= step]


def _parsed(line: str) -> Line | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def evaluations(lines: Sequence[Line]) -> list[Line]:
    """Returns the lines of evaluations."""
    return [line for line in lines if line["kind"] == "eval"]


def quality(metric: str, scores: Scalars) -> float:
    """Returns what is the larger, the better.

    Example:
        >>> quality("ema_loss", {"ema_loss": 0.5, "accuracy": 0.9})
        -0.5
    """
    value = scores[metric]
    return -value if metric.removeprefix(PREFIX) in LOWER_IS_BETTER else value


def best(lines: Sequence[Line], metric: str) -> Line | None:
    """Returns the best evaluation, the last of equals; None before any."""
    found = evaluations(lines)
    return max(reversed(found), key=lambda line: quality(metric, line), default=None)


def without_improvement(lines: Sequence[Line], metric: str) -> int:
    """Counts the evaluations since the first of the best ones.

    Example:
        >>> scores = (0.5, 0.7, 0.6, 0.7)
        >>> lines = [{"kind": "eval", "accuracy": score} for score in scores]
        >>> without_improvement(lines, "accuracy")
        2
    """
    values = [quality(metric, line) for line in evaluations(lines)]
    return len(values) - 1 - values.index(max(values)) if values else 0


def is_stale(lines: Sequence[Line], metric: str, patience: int) -> bool:
    """Returns whether `patience` evaluations brought no improvement; never for a patience of 0."""
    return patience > 0 and without_improvement(lines, metric) >= patience
