"""Describes how well a classifier does, from its logits: `python -m terminator_jax.evaluate`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 15
# Larger tables are left to --json.
MOST_ROWS = 20


def describe(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Computes the metrics of a classifier.

    Args:
        logits: `(examples, classes)`.
        labels: `(examples,)`.
        classes: the names of the classes.

    Returns:
        `count`, `accuracy`, `top5_accuracy`, `loss` (the mean negative log-likelihood),
        `calibration_error`, `confusion` (`[label][prediction]`, counts) and `per_class`, a list of
        `name`, `count`, `accuracy` (None for a class without examples).

    Example:
        >>> logits = np.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
        >>> found = describe(logits, np.array([0, 1, 1]), ["cat", "dog"])
        >>> found["confusion"], round(found["accuracy"], 3)
        ([[1, 0], [1, 1]], 0.667)
    """
    logits = logits.astype(np.float64)
    count, number = logits.shape
    log_likelihood = logits - _logsumexp(logits)
    predicted = logits.argmax(-1)
    confusion = np.zeros((number, number), int)
    np.add.at(confusion, (labels, predicted), 1)
    likeliest = (-logits).argsort(-1, kind="stable")[:, :5]  # the first of equal ones, as argmax
    totals, right = confusion.sum(1), confusion.diagonal()
    return {
        "count": count,
        "accuracy": float((predicted == labels).mean()),
        "top5_accuracy": float((likeliest == labels[:, None]).any(-1).mean()),
        "loss": float(-log_likelihood[np.arange(count), labels].mean()),
        "calibration_error": calibration_error(np.exp(log_likelihood), labels),
        "confusion": confusion.tolist(),
        "per_class": [
            {"name": name, "count": int(n), "accuracy": float(hits / n) if n else None}
            for name, n, hits in zip(classes, totals, right, strict=True)
        ],
    }


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Computes the expected calibration error: how far confidence is from accuracy, on average.

    Args:
        probabilities: `(examples, classes)`.
        labels: `(examples,)`.
        bins: equal intervals of the confidence.

    Example:
        >>> round(calibration_error(np.array([[0.8, 0.2], [0.8, 0.2]]), np.array([0, 1])), 3)
        0.3

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.
    """
    confidence = probabilities.max(-1)
    right = probabilities.argmax(-1) == labels
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(places, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def table(found: dict[str, Any]) -> str:
    """Returns the classes and the confusion matrix as text, rows of labels."""
    rows = found["per_class"]
    if len(rows) > MOST_ROWS:
        return f"{len(rows)} classes: --json prints each"
    names = [row["name"] for row in rows]
    wide = max(len("class"), *map(len, names))
    cells = max(5, len(str(max(map(max, found["confusion"])))), *(len(n[:8]) for n in names)) + 1
    lines = [f"{'class':<{wide}}  accuracy  " + "".join(f"{n[:8]:>{cells}}" for n in names)]
    for row, counts in zip(rows, found["confusion"], strict=True):
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
        numbers = "".join(f"{n:>{cells}}" for n in counts)
        lines.append(f"{row['name']:<{wide}}  {accuracy:>8}  {numbers}")
    return "\n".join(lines)


def _logsumexp(logits: np.ndarray) -> np.ndarray:
    largest = logits.max(-1, keepdims=True)
    return largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))
