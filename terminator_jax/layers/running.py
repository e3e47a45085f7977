"""Averages of batch statistics, kept in training and used in evaluation."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax.ops.standardize import AxisName, Moments

NO_AVERAGES = (
    "no batch was averaged yet, so there is nothing to evaluate with: train on a batch, or call"
    " terminator_jax.calibrate(model, batches), or"
    " terminator_jax.use_batch_statistics(model) after model.eval()"
)


class RunningMean(nnx.Module):
    """Keeps the average of an array over batches, as `nnx.BatchNorm` keeps its own.

    The n-th batch counts `1 / n` at first, so that the average needs no bias correction, and
    `1 - momentum` later.

    Example:
      >>> average = RunningMean((3,))
      >>> _ = average(jnp.full(3, 1.0)), average(jnp.full(3, 3.0))
      >>> average.eval()
      >>> print(average(jnp.zeros((1, 3))))
      [[2. 2. 2.]]

    Args:
      shape: of the average.
      dtype: of the average.
      momentum: decay of the average; 1 averages all batches equally.
      axis_name: the mapped axis over which the batch is split, if any.
      use_running_average: whether it begins in evaluation mode; `train()` and `eval()` set it.
        `use_batch_statistics` sets None: the batch is used, and nothing updated.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype=jnp.float32,
        *,
        momentum: float = 0.9,
        axis_name: AxisName = None,
        use_running_average: bool | None = False,
    ):
        self.momentum, self.axis_name = momentum, axis_name
        self.use_running_average = use_running_average
        # Of a floating-point type, so that gradients by a layer's whole state can be taken.
        self.count = nnx.BatchStat(jnp.zeros((), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(shape, dtype))

    @property
    def reduced_axis(self) -> AxisName:
        """The mapped axis that statistics are to be reduced over: none in evaluation."""
        return None if self.use_running_average else self.axis_name

    def __call__(self, value: jax.Array) -> jax.Array:
        """Returns `value` and updates the average; in evaluation returns the average.

        Args:
          value: of the batch, with as many values as the average.

        Raises:
          ValueError: for a value of another size; in evaluation, if no batch was averaged. In a
            compiled program the average of no batch is NaN.
        """
        [value] = self._averages([self.mean], [value])
        return value

    def _averages(
        self, averages: Sequence[nnx.BatchStat], values: Sequence[jax.Array]
    ) -> list[jax.Array]:
        pairs = list(zip(averages, values, strict=True))
        for average, value in pairs:
            if average.size != value.size:
                raise ValueError(
                    f"running averages of shape {average.shape} cannot take statistics of shape"
                    f" {value.shape}"
                )
        if self.use_running_average:
            count = self.count.get_value()
            if not isinstance(count, jax.core.Tracer) and not np.all(np.asarray(count) > 0):
                raise ValueError(NO_AVERAGES)
            return [
                jnp.where(count > 0, average[...], jnp.nan).reshape(value.shape)
                for average, value in pairs
            ]
        if self.use_running_average is None:
            return list(values)
        count = self.count[...] + 1
        for average, value in pairs:
            old, new = average[...], jax.lax.stop_gradient(value).reshape(average.shape)
            weight = jnp.maximum(1 / count.astype(old.dtype), 1 - self.momentum)
            average.set_value(old + weight * (new.astype(old.dtype) - old))
        self.count.set_value(count)
        return list(values)


class RunningMoments(RunningMean):
    """Keeps the averages of a mean and a variance."""

    def __init__(self, shape: tuple[int, ...], dtype=jnp.float32, **options):
        super().__init__(shape, dtype, **options)
        self.var = nnx.BatchStat(jnp.ones(shape, dtype))

    def __call__(self, moments: Moments) -> Moments:
        """Returns `moments` and updates the averages; in evaluation returns the averages."""
        return Moments(*self._averages([self.mean, self.var], moments))


def running_averages(model: nnx.Module) -> list[RunningMean]:
    """Returns the running averages in a model."""
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, RunningMean)]


def reset(model: nnx.Module) -> None:
    """Gives a model's running averages, which may be abstract, the values of a new model."""
    for averages in running_averages(model):
        for name, variable in vars(averages).items():
            if isinstance(variable, nnx.BatchStat):
                value = jnp.full(variable.shape, float(name == "var"), variable.dtype)
                variable.set_value(value)


def is_calibrated(model: nnx.Module) -> bool:
    """Returns whether all running averages in a model have seen a batch."""
    # By NumPy, which also inside of jax.jit reads what is known there.
    return all(np.all(np.asarray(a.count.get_value()) > 0) for a in running_averages(model))


def use_batch_statistics(model: nnx.Module) -> None:
    """Makes a model use the statistics of the batch, in evaluation too, as the release does.

    Call it after `model.eval()`, which takes it back. The running averages stay as they are, but
    for those of an `nnx.BatchNorm`, which then updates its own.

    Example:
      >>> from terminator_jax.layers import BatchStandardization
      >>> norm = BatchStandardization(2)
      >>> norm.eval()
      >>> use_batch_statistics(norm)
      >>> print(norm(jnp.array([[[1.0, 5.0], [3.0, 5.0]]])).round(2)[0, :, 0])
      [-1.  1.]
    """
    for layer in _averaging(model):
        layer.use_running_average = None if isinstance(layer, RunningMean) else False


def _averaging(model: nnx.Module) -> list[RunningMean | nnx.BatchNorm]:
    """Returns the modules in a model that keep averages."""
    kinds = RunningMean | nnx.BatchNorm
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
      >>> from terminator_jax.layers import BatchStandardization
      >>> norm = BatchStandardization(4)
      >>> calibrate(norm, [jnp.ones((2, 8, 8, 4)), 3 * jnp.ones((2, 8, 8, 4))])
      >>> print(norm.averages.mean[...])
      [2. 2. 2. 2.]

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    """
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    model.eval()
    momenta = {layer: layer.momentum for layer in _averaging(model)}
    try:
        reset(model)
        for layer in momenta:
            layer.use_running_average, layer.momentum = False, 0.0  # keeps the last batch's alone
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
