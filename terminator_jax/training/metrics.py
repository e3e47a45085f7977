"""Numbers of steps, gathered on the devices and read together, so that steps need not wait."""

import time
from collections.abc import Iterable

import jax
import numpy as np

Scalars = dict[str, float]


class Meter:
    """Means of what training steps give, and how fast they go.

    Args:
        batch_size: pictures, or other examples, in a step.
        noun: what they are called in the names of their speed.

    Example:
        >>> meter = Meter(batch_size=32)
        >>> for loss in (1.0, 3.0):
        ...     meter.add({"loss": jax.numpy.array(loss)})
        >>> meter.read()["loss"], meter.read_epoch()["loss"]
        (2.0, 2.0)
    """

    def __init__(self, batch_size: int, noun: str = "images"):
        self._batch_size, self._speed = batch_size, f"{noun}_per_second"
        self._waiting: list[dict[str, jax.Array]] = []
        self._epoch: list[tuple[int, int, float, Scalars]] = []
        self.restart()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Keeps what a step gave; does not wait for it."""
        self._waiting.append(metrics)

    def restart(self) -> None:
        """Leaves out of the speed all that went before: compilation, evaluation, saving."""
        self._untimed, self._since = len(self._waiting), time.perf_counter()

    def read(self) -> Scalars:
        """Means since the last call and `images_per_second` or the like, 0 if no step was timed.

        Waits for the steps.
        """
        steps = jax.device_get(self._waiting)
        seconds, timed = time.perf_counter() - self._since, len(steps) - self._untimed
        means = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
        self._epoch.append((len(steps), timed, seconds, means))
        self._waiting = []
        self.restart()
        return {**means, self._speed: timed * self._batch_size / seconds}

    def read_epoch(self) -> Scalars:
        """The same over all that was read since the last call of this function."""
        counts, timed, seconds, means = zip(*self._epoch, strict=True)
        self._epoch = []
        average = {
            name: float(np.average([part[name] for part in means], weights=counts))
            for name in means[0]
        }
        return {**average, self._speed: sum(timed) * self._batch_size / sum(seconds)}


def totals(sums: Iterable[dict[str, jax.Array]]) -> Scalars:
    """Means over all pictures, from the sums of every evaluation batch.

    Example:
        >>> totals([{"count": 3, "accuracy": 3.0}, {"count": 1, "accuracy": 0.0}])
        {'accuracy': 0.75, 'count': 4.0}
    """
    steps = jax.device_get(list(sums))
    added = {name: float(sum(step[name] for step in steps)) for name in steps[0]}
    count = added.pop("count")
    return {**{name: value / count for name, value in added.items()}, "count": count}
