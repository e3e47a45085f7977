"""Metrics of steps, collected on the devices and read together, so that steps need not wait."""

import time
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from terminator_jax.training.metrics import Metrics, Scalars


class _Part(NamedTuple):
    """What one `read` found: the steps of its means and of its seconds, these, and the means."""

    counted: int
    timed: int
    seconds: float
    means: Scalars


class Meter:
    """Averages the metrics of training steps and measures their speed.

    Args:
        batch_size: examples in a step.
        unit: what they are called in the name of the speed.

    Attributes:
        steps: the metrics of each step that the last `read` waited for.

    Example:
        >>> meter = Meter(batch_size=32)
        >>> for loss in (1.0, 3.0):
        ...     meter.add({"loss": jax.numpy.array(loss)})
        >>> meter.read()["loss"], meter.read_epoch()["loss"]
        (2.0, 2.0)
    """

    def __init__(self, batch_size: int, unit: str = "images"):
        self._batch_size, self._speed = batch_size, f"{unit}_per_second"
        self._pending: list[Metrics] = []
        self._epoch: list[_Part] = []
        self.steps: list[Scalars] = []
        self.reset_timer()

    def add(self, metrics: Metrics) -> None:
        """Adds the metrics of a step; does not wait for it."""
        self._pending.append(metrics)

    def reset_timer(self) -> None:
        """Excludes what went before from the speed: compilation, evaluation, saving."""
        self._excluded, self._since = len(self._pending), time.perf_counter()

    def read(self) -> Scalars:
        """Returns the means since the last call and the speed, 0 if no step was timed.

        Waits for the steps, and leaves those that were skipped out of the means.
        """
        self.steps = steps = jax.device_get(self._pending)
        seconds, timed = time.perf_counter() - self._since, len(steps) - self._excluded
        counted = [step for step in steps if not step.get("skipped")]
        means = {
            name: float(np.mean([step[name] for step in counted or steps])) for name in steps[0]
        }
        self._epoch.append(_Part(len(counted), timed, seconds, means))
        self._pending = []
        self.reset_timer()
        return {**means, self._speed: timed * self._batch_size / seconds}

    def read_epoch(self) -> Scalars:
        """Returns the same over all that was read since the last call of this function."""
        every, self._epoch = self._epoch, []
        # Parts in which every step was skipped count where there is nothing else.
        parts = [part for part in every if part.counted] or every
        weights = [max(part.counted, 1) for part in parts]
        average = {
            name: float(np.average([part.means[name] for part in parts], weights=weights))
            for name in parts[0].means
        }
        timed, seconds = sum(part.timed for part in every), sum(part.seconds for part in every)
        return {**average, self._speed: timed * self._batch_size / seconds}


def weighted_means(sums: Iterable[Metrics]) -> Scalars:
    """Returns the means over all examples, from the sums of every evaluation batch.

    Example:
        >>> weighted_means([{"count": 3, "accuracy": 3.0}, {"count": 1, "accuracy": 0.0}])
        {'accuracy': 0.75, 'count': 4.0}
    """
    steps = jax.device_get(list(sums))
    totals = {name: float(sum(step[name] for step in steps)) for name in steps[0]}
    count = totals.pop("count")
    return {**{name: value / count for name, value in totals.items()}, "count": count}
