"""The metrics of a classifier, against scikit-learn's."""

import numpy as np
from sklearn import metrics

from terminator_jax.training import report


def case(classes=7, count=200):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes - 1, count)  # the last class has no example
    logits = rng.normal(size=(count, classes)).astype(np.float32) + 2 * np.eye(classes)[labels]
    return logits, labels, [f"class {n}" for n in range(classes)]


def test_they_are_those_of_scikit_learn():
    logits, labels, names = case()
    found = report.describe(logits, labels, names)
    predicted, every = logits.argmax(-1), np.arange(len(names))
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found["accuracy"] == metrics.accuracy_score(labels, predicted)
    assert found["confusion"] == metrics.confusion_matrix(labels, predicted, labels=every).tolist()
    top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=every)
    assert found["top5_accuracy"] == top5
    assert abs(found["loss"] - metrics.log_loss(labels, chances, labels=every)) < 1e-6
    recalls = metrics.recall_score(labels, predicted, average=None, labels=every[:-1])
    assert np.allclose([row["accuracy"] for row in found["per_class"][:-1]], recalls)
    assert found["per_class"][-1] == {"name": "class 6", "count": 0, "accuracy": None}


def test_calibration():
    """Right as often as it says, and always sure but right half of the time."""
    chances = np.tile([0.7, 0.3], (100, 1))
    assert report.calibration_error(chances, np.repeat([0, 1], [70, 30])) < 1e-9
    sure = np.tile([1.0, 0.0], (100, 1))
    assert abs(report.calibration_error(sure, np.repeat([0, 1], [50, 50])) - 0.5) < 1e-9


def test_equal_logits_are_in_the_order_of_the_classes():
    """So that a constant model is right as often as it says one class, and five."""
    found = report.describe(np.zeros((10, 10)), np.arange(10), [str(n) for n in range(10)])
    assert (found["accuracy"], found["top5_accuracy"]) == (0.1, 0.5)


def test_table():
    logits, labels, names = case()
    found = report.describe(logits, labels, names)
    first, *rows = report.table(found).splitlines()
    assert first.split()[:2] == ["class", "accuracy"]
    assert [row[:7] for row in rows] == names
    assert [int(n) for n in rows[2].split()[3:]] == found["confusion"][2]
    assert rows[-1].split()[2] == "-"
    many = [str(n) for n in range(30)]
    found = report.describe(np.eye(30), np.arange(30), many)
    assert report.table(found) == "30 classes: --json prints each"
