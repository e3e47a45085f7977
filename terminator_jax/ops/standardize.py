"""Standardization without parameters.

BS over batch and space, IS over space, G-IBS each for every other group of channels.

Statistics are the biased ones, in float32 or wider, from one pass over the map (the mean and the
mean of squares together). Causal ones are cumulative along a sequence: at each position they are
those of the positions so far. They are the batch's own, unless `track` gives others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops.dtypes import at_least_float32

EPSILON = 1e-5
AxisName = str | tuple[str, ...] | None
# Mean and variance.
Moments = tuple[jax.Array, jax.Array]
# Chooses the moments to normalize by, from a function that computes those of the batch and from
# their shape: in training those, which it adds to running averages; in evaluation the averages.
Track = Callable[[Callable[[], Moments], tuple[int, ...]], Moments]


def average(x: jax.Array, axes: tuple[int, ...], *, cumulative: int | None = None) -> jax.Array:
    """Averages over `axes` (kept, with length 1), in float32 or wider.

    Along the axis `cumulative`, if there is one, each position gets the mean of those so far.

    Example:
      >>> print(average(jnp.array([[2.0, 4.0, 6.0]]), (), cumulative=1))
      [[2. 3. 4.]]
    """
    wide = at_least_float32(x.dtype)
    mean = jnp.mean(x, axes, dtype=wide, keepdims=True)
    if cumulative is None:
        return mean
    count = jnp.arange(1, x.shape[cumulative] + 1, dtype=wide)
    shape = [1] * x.ndim
    shape[cumulative] = -1
    return jnp.cumsum(mean, axis=cumulative) / count.reshape(shape)


def mean_and_square(
    x: jax.Array, axes: tuple[int, ...], *, cumulative: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes the mean and the mean of squares, each as `average` does."""
    x = x.astype(at_least_float32(x.dtype))
    return average(x, axes, cumulative=cumulative), average(x * x, axes, cumulative=cumulative)


def across(statistics, axis_name: AxisName):
    """Averages statistics over the devices of a `pmap` or `shard_map` axis, if one is named."""
    return statistics if axis_name is None else jax.lax.pmean(statistics, axis_name)


def mean_and_variance(mean: jax.Array, square: jax.Array) -> Moments:
    """Computes mean and variance from mean and mean square.

    Example:
      >>> print(*mean_and_variance(jnp.array(2.0), jnp.array(5.0)))
      2.0 1.0
    """
    return mean, square - mean * mean


def normalize(
    x: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    epsilon: float,
    *,
    gate: jax.Array | None = None,
) -> jax.Array:
    """Computes `(x - mean) / sqrt(variance + ε)`, in the dtype of `x`.

    Args:
      x: the map.
      mean: its mean, of a shape that broadcasts to that of `x`.
      variance: its variance, in the shape of `mean`.
      epsilon: ε.
      gate: in the shape of `mean`; the result is then that of `gate · x`.
    """
    if gate is None:
        scale = rsqrt_clamped(variance + epsilon, epsilon)
    else:
        scale = gate * rsqrt_clamped(gate * gate * variance + epsilon, epsilon)
    return (x.astype(scale.dtype) * scale - mean * scale).astype(x.dtype)


def rsqrt_clamped(x: jax.Array, minimum: float) -> jax.Array:
    """Computes `1 / sqrt(max(x, minimum))`; the derivative below the minimum is 0.

    Example:
      >>> print(rsqrt_clamped(jnp.array([4.0, -1.0]), 0.25))
      [0.5 2. ]
    """
    return jax.lax.rsqrt(jnp.maximum(x, minimum))


def standardize(
    x: jax.Array,
    axes: tuple[int, ...],
    *,
    cumulative: int | None = None,
    epsilon: float = EPSILON,
    axis_name: AxisName = None,
    track: Track | None = None,
) -> jax.Array:
    """Computes a map with zero mean and unit variance over `axes`, in any layout."""

    def of_batch() -> Moments:
        return mean_and_variance(
            *across(mean_and_square(x, axes, cumulative=cumulative), axis_name)
        )

    shape = tuple(1 if axis in axes else n for axis, n in enumerate(x.shape))
    return normalize(x, *(track(of_batch, shape) if track else of_batch()), epsilon)


def batch_groups(channels: int, groups: int) -> np.ndarray:
    """Returns which channels G-IBS standardizes over the batch, `(channels,)` of bool.

    Example:
      >>> batch_groups(6, 3).tolist()
      [True, True, False, False, True, True]
    """
    return np.arange(channels) // (channels // groups) % 2 == 0


def standardize_groups(
    x: jax.Array,
    groups: int,
    *,
    batch_axis: int,
    channel_axis: int,
    cumulative: int | None = None,
    epsilon: float = EPSILON,
    axis_name: AxisName = None,
    track: Track | None = None,
) -> jax.Array:
    """Computes G-IBS in any layout; the other axes are space. See `group_standardize`."""
    channels = x.shape[channel_axis]
    if channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups: x is {x.shape}")
    batch_axis, channel_axis = batch_axis % x.ndim, channel_axis % x.ndim
    space = {*range(x.ndim)} - {batch_axis, channel_axis, cumulative}
    instance = mean_and_square(x, tuple(space), cumulative=cumulative)

    def of_batch() -> Moments:
        return mean_and_variance(
            *across([m.mean(batch_axis, keepdims=True) for m in instance], axis_name)
        )

    shape = tuple(n if axis in (channel_axis, cumulative) else 1 for axis, n in enumerate(x.shape))
    batch = track(of_batch, shape) if track else of_batch()
    by_batch = batch_groups(channels, groups)
    by_batch = by_batch.reshape([-1 if axis == channel_axis else 1 for axis in range(x.ndim)])
    chosen = [
        jnp.where(by_batch, b, i) for b, i in zip(batch, mean_and_variance(*instance), strict=True)
    ]
    return normalize(x, *chosen, epsilon)


def instance_standardize(
    x: jax.Array, *, causal: bool = False, epsilon: float = EPSILON
) -> jax.Array:
    """Standardizes each sample and channel over space (IS).

    Args:
      x: `(batch, *spatial, channels)`.
      causal: for sequences: by the statistics of the positions so far.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)) * 5 + 1
      >>> y = instance_standardize(x)
      >>> bool(jnp.allclose(y.mean((1, 2)), 0, atol=1e-5))
      True
    """
    cumulative = _check(x, causal)
    axes = () if causal else tuple(range(1, x.ndim - 1))
    return standardize(x, axes, cumulative=cumulative, epsilon=epsilon)


def batch_standardize(
    x: jax.Array,
    *,
    causal: bool = False,
    epsilon: float = EPSILON,
    axis_name: AxisName = None,
    track: Track | None = None,
) -> jax.Array:
    """Standardizes each channel over batch and space (BS).

    Args:
      x: `(batch, *spatial, channels)`.
      causal: for sequences: by the statistics of the positions so far.
      axis_name: the mapped axis over which the batch is split, if any.
      track: gives the moments to use, such as `RunningAverages.track`; by default the batch's own.
    """
    cumulative = _check(x, causal)
    axes = (0,) if causal else tuple(range(x.ndim - 1))
    return standardize(
        x, axes, cumulative=cumulative, epsilon=epsilon, axis_name=axis_name, track=track
    )


def group_standardize(
    x: jax.Array,
    *,
    groups: int = 12,
    causal: bool = False,
    epsilon: float = EPSILON,
    axis_name: AxisName = None,
    track: Track | None = None,
) -> jax.Array:
    """Standardizes even groups of channels over the batch (BS), odd ones per sample (IS): G-IBS.

    Args:
      x: `(batch, *spatial, channels)`; channels are cut into `groups` equal runs, in order.
      causal: for sequences: by the statistics of the positions so far.
      axis_name: the mapped axis over which the batch is split, if any.
      track: gives the moments of the batch to use, see `batch_standardize`.

    Raises:
      ValueError: if the channels do not divide into the groups.
    """
    cumulative = _check(x, causal)
    return standardize_groups(
        x, groups, batch_axis=0, channel_axis=-1, cumulative=cumulative, epsilon=epsilon,
        axis_name=axis_name, track=track,
    )  # fmt: skip


def _check(x: jax.Array, causal: bool) -> int | None:
    """Returns the axis along which statistics are cumulative, if any."""
    if x.ndim < 3:
        raise ValueError(f"expected (batch, *spatial, channels), got shape {x.shape}")
    if causal and x.ndim != 3:
        raise ValueError(f"causal needs (batch, length, channels), got shape {x.shape}")
    return 1 if causal else None
