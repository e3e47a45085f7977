"""Reads `log.jsonl`: evaluations, the best one, early stopping."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from terminator_jax.training.averages import PREFIX
from terminator_jax.training.metrics import LOWER_IS_BETTER, Scalars

Line = dict[str, Any]


def read(workdir: Path, step: int) -> list[Line]:
    """Reads the lines of `log.jsonl` up to a step; of a line that is damaged, none."""
    try:
        text = (workdir / "log.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = map(_parsed, text.splitlines())
    return [line for line in lines if line and line["step"] <= step]


def _parsed(text: str) -> Line | None:
    """Returns a line of the log, with NaN for what was not finite; None for anything else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    values = {name: math.nan if value is None else value for name, value in line.items()}
    kind, numbers = values.pop("kind", None), all(type(x) in (int, float) for x in values.values())
    whole = all(type(values.get(name)) is int for name in ("step", "epoch"))
    return {"kind": kind, **values} if isinstance(kind, str) and numbers and whole else None


def evaluations(lines: Sequence[Line]) -> list[Line]:
    """Returns the lines of evaluations."""
    return [line for line in lines if line["kind"] == "eval"]


def quality(metric: str, scores: Scalars) -> float:
    """Returns what is the larger, the better.

    Example:
        >>> quality("ema_loss", {"ema_loss": 0.5, "accuracy": 0.9})
        -0.5
    """
    value = scores.get(metric, math.nan)
    if math.isnan(value):
        return -math.inf
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
