"""Averages of batch statistics, kept in training and used in evaluation."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Statistics = tuple[jax.Array, ...]


class RunningAverages(nnx.Module):
    """Averages of a layer's batch statistics, kept as `nnx.BatchNorm` keeps its own.

    Args:
      momentum: share of the averages that one batch leaves; 1 for the plain average of all batches.
      use_running_average: whether it begins in evaluation mode; `train()` and `eval()` set it.
      initial: the initial value of each average, by its name.
    """

    def __init__(
        self, *, momentum: float = 0.9, use_running_average: bool = False, **initial: jax.Array
    ):
        self.momentum, self.use_running_average = momentum, use_running_average
        self.names = tuple(initial)
        # Of a floating-point type, so that gradients by a layer's whole state can be taken.
        self.count = nnx.BatchStat(jnp.zeros((), jnp.float32))
        for name, value in initial.items():
            setattr(self, name, nnx.BatchStat(value))

    def track(self, compute: Callable[[], Statistics], shape: tuple[int, ...]) -> Statistics:
        """Returns the batch's statistics and updates the averages; after `eval()` the averages.

        The n-th batch counts `1 / n` at first, so that averages need no bias correction, and
        `1 - momentum` later.

        Args:
          compute: computes the statistics of the batch; not called after `eval()`.
          shape: of each statistic; the averages have the same number of values.

        Example:
          >>> averages = RunningAverages(mean=jnp.zeros(3))
          >>> for value in (1.0, 3.0):
          ...     _ = averages.track(lambda value=value: (jnp.full(3, value),), (3,))
          >>> averages.eval()
          >>> print(*averages.track(lambda: None, (1, 3)))
          [[2. 2. 2.]]
        """
        kept = [getattr(self, name) for name in self.names]
        if self.use_running_average:
            return tuple(average[...].reshape(shape) for average in kept)
        statistics = compute()
        count = self.count[...] + 1
        for average, value in zip(kept, statistics, strict=True):
            old, new = average[...], jax.lax.stop_gradient(value).reshape(average.shape)
            weight = jnp.maximum(1 / count.astype(old.dtype), 1 - self.momentum)
            average.set_value(old + weight * (new.astype(old.dtype) - old))
        self.count.set_value(count)
        return statistics


def moments_of(shape: tuple[int, ...], dtype, **options) -> RunningAverages:
    """Returns running averages of a mean and a variance.

    Example:
      >>> moments_of((3,), jnp.float32).names
      ('mean', 'var')
    """
    return RunningAverages(mean=jnp.zeros(shape, dtype), var=jnp.ones(shape, dtype), **options)


def running_averages(model: nnx.Module) -> list[RunningAverages]:
    """Returns the running averages in a model."""
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, RunningAverages)]


def reset(model: nnx.Module) -> None:
    """Gives a model's running averages, which may be abstract, the values of a new model."""
    for averages in running_averages(model):
        for name in ("count", *averages.names):
            variable = getattr(averages, name)
            value = jnp.full(variable.shape, float(name == "var"), variable.dtype)
            variable.set_value(value)


def is_calibrated(model: nnx.Module) -> bool:
    """Returns whether all running averages in a model have seen a batch."""
    # By NumPy, which also inside of jax.jit reads what is known there.
    return all(np.asarray(a.count.get_value()) > 0 for a in running_averages(model))


def use_batch_statistics(model: nnx.Module) -> None:
    """Makes a model use the statistics of the batch, in evaluation too, as the release does.

    `model.eval()` takes it back.
    """
    for layer in _averaging(model):
        layer.use_running_average = False


def _averaging(model: nnx.Module) -> list[RunningAverages | nnx.BatchNorm]:
    """Returns the modules in a model that keep averages."""
    kinds = RunningAverages | nnx.BatchNorm
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, kinds)]


def calibrate(model: nnx.Module, batches: Iterable[jax.Array]) -> None:
    """Computes a model's running averages anew, in one pass over batches, and calls `eval()`.

    For weights that were trained or imported without them. Nothing is dropped and no other
    variable changes.

    Args:
      model: a model that is called with one array; it is changed.
      batches: what the model is called with, such as `(batch, *size, channels)`. Batches of the
        size that it was trained with serve best.

    Raises:
      ValueError: if there are no batches. The averages are then what they were, as after any error.

    Example:
      >>> from terminator_jax.layers import LocalHyperZZW
      >>> layer = LocalHyperZZW(3, 4, hidden=3, rngs=nnx.Rngs(0))
      >>> calibrate(layer.slow_net, [jnp.ones((2, 4, 4, 4)), 3 * jnp.ones((2, 4, 4, 4))])
      >>> float(layer.slow_net.averages.pooled[0, 0, 0])
      2.0

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    """
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    model.eval()
    use_batch_statistics(model)
    momenta = {layer: layer.momentum for layer in _averaging(model)}
    try:
        reset(model)
        for layer in momenta:
            layer.momentum = 0.0  # keeps the last batch's alone
        nnx.update(model, _mean_statistics(model, batches))
    except BaseException:
        nnx.update(model, before)
        raise
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        model.eval()


def _mean_statistics(model: nnx.Module, batches: Iterable[jax.Array]) -> nnx.State:
    """Returns the means of a model's statistics over batches, without the counts of these."""
    statistics = nnx.All(nnx.BatchStat, nnx.Not(nnx.PathContains("count")))
    apply = nnx.jit(lambda model, x: model(x))
    number, mean = 0, None
    for number, batch in enumerate(batches, start=1):
        apply(model, batch)
        found = nnx.state(model, statistics)
        mean = found if mean is None else mean
        mean = jax.tree.map(lambda m, x, n=number: m + (x - m) / n, mean, found)
    if not number:
        raise ValueError("there are no batches to compute running averages from")
    return mean
