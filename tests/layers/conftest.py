"""Real pictures for the tests that train a small network of layers."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest


class Digits(NamedTuple):
    """The handwritten digits of scikit-learn, `(n, 8, 8, 1)` in 0..1; every fifth is a test."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def batches(self, steps: int, size: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(0)
        for _ in range(steps):
            chosen = rng.choice(len(self.labels), size, replace=False)
            yield self.images[chosen], self.labels[chosen]

    def check(self, losses, logits) -> None:
        """Asserts that a network has learnt: by the losses of its steps, and on the tests."""
        first, last = np.mean(losses[:5]), np.mean(losses[-5:])
        assert last < 0.4 * first, (first, last)
        assert np.mean(np.argmax(logits, -1) == self.test_labels) > 0.8


@pytest.fixture(scope="session")
def digits() -> Digits:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images[..., None] / 16).astype(np.float32)
    test = np.arange(len(images)) % 5 == 0
    return Digits(images[~test], data.target[~test], images[test], data.target[test])
