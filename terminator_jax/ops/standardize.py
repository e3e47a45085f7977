"""Standardization without parameters.

BS is over batch and space, IS over space. In G-IBS alternate groups of channels use BS and IS.

Statistics are the biased ones, in float32 or wider, from one pass over the map (the mean and the
mean of squares together). Causal ones are cumulative along a sequence: at each position they are
those of the positions so far.

Statistics are values. `batch_moments` and `group_moments` compute them, `normalize` and
`normalize_groups` take them. A layer can so put running averages in their place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops.dtypes import at_least_float32, floating

EPSILON = 1e-5
AxisName = str | tuple[str, ...] | None


class Moments(NamedTuple):
    """A mean and a variance of one shape, which broadcasts to the map's."""

    mean: jax.Array
    var: jax.Array


def average(x: jax.Array, axes: tuple[int, ...], *, cumulative: int | None = None) -> jax.Array:
    """Averages over `axes` (kept, with length 1), in float32 or wider.

    Along the axis `cumulative`, if there is one, each position gets the mean of those so far.

    Example:
      >>> print(average(jnp.array([[2.0, 4.0, 6.0]]), (), cumulative=1))
      [[2. 3. 4.]]
    """
    x = floating(x)
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
    x = floating(x)
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
    mean, square = floating((mean, square))
    return Moments(mean, square - mean * mean)


def normalize(
    x: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    epsilon: float = EPSILON,
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
    x, mean, variance, gate = floating((x, mean, variance, gate))
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
    return jax.lax.rsqrt(jnp.maximum(floating(x), minimum))


def moments(
    x: jax.Array,
    axes: tuple[int, ...],
    *,
    cumulative: int | None = None,
    axis_name: AxisName = None,
) -> Moments:
    """Computes mean and variance over `axes`, in any layout; see `average`."""
    return mean_and_variance(*across(mean_and_square(x, axes, cumulative=cumulative), axis_name))


def standardize(
    x: jax.Array,
    axes: tuple[int, ...],
    *,
    cumulative: int | None = None,
    epsilon: float = EPSILON,
    axis_name: AxisName = None,
) -> jax.Array:
    """Computes a map with zero mean and unit variance over `axes`, in any layout."""
    return normalize(x, *moments(x, axes, cumulative=cumulative, axis_name=axis_name), epsilon)


def batch_groups(channels: int, groups: int) -> np.ndarray:
    """Returns which channels G-IBS standardizes over the batch, `(channels,)` of bool.

    Example:
      >>> batch_groups(6, 3).tolist()
      [True, True, False, False, True, True]
    """
    return np.arange(channels) // (channels // groups) % 2 == 0


class GroupMoments(NamedTuple):
    """Moments of a map for G-IBS: of each sample, and of the batch."""

    instance: Moments
    batch: Moments


def group_moments(
    x: jax.Array,
    *,
    batch_axis: int = 0,
    channel_axis: int = -1,
    causal: bool = False,
    axis_name: AxisName = None,
) -> GroupMoments:
    """Computes the moments that `normalize_groups` takes.

    Args:
      x: a map in any layout; all other axes are space.
      batch_axis: the axis of the samples.
      channel_axis: the axis of the channels.
      causal: for sequences: the moments of the positions so far.
      axis_name: the mapped axis over which the batch is split, if any.
    """
    space = sorted({*range(x.ndim)} - {batch_axis % x.ndim, channel_axis % x.ndim})
    if causal and len(space) != 1:
        raise ValueError(f"causal needs (batch, length, channels), got shape {x.shape}")
    if causal:
        instance = mean_and_square(x, (), cumulative=space[0])
    else:
        instance = mean_and_square(x, tuple(space))
    batch = across([m.mean(batch_axis, keepdims=True) for m in instance], axis_name)
    return GroupMoments(mean_and_variance(*instance), mean_and_variance(*batch))


def normalize_groups(
    x: jax.Array,
    moments: GroupMoments,
    groups: int,
    epsilon: float = EPSILON,
    *,
    channel_axis: int = -1,
) -> jax.Array:
    """Computes G-IBS with moments that are already known; see `group_standardize`."""
    shape = [1] * x.ndim
    shape[channel_axis] = x.shape[channel_axis]
    by_batch = batch_groups(x.shape[channel_axis], groups).reshape(shape)
    pairs = zip(moments.batch, moments.instance, strict=True)
    return normalize(x, *(jnp.where(by_batch, b, i) for b, i in pairs), epsilon)


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


def batch_moments(x: jax.Array, *, causal: bool = False, axis_name: AxisName = None) -> Moments:
    """Computes the moments of each channel over batch and space.

    Args:
      x: `(batch, *spatial, channels)`.
      causal: for sequences: the moments of the positions so far.
      axis_name: the mapped axis over which the batch is split, if any.

    Returns:
      Mean and variance, `(1, 1 …, channels)`, or `(1, length, channels)` if causal.

    Example:
      >>> mean, var = batch_moments(jnp.array([[[1.0], [3.0]]]))
      >>> mean.item(), var.item()
      (2.0, 1.0)
    """
    cumulative = _check(x, causal)
    axes = (0,) if causal else tuple(range(x.ndim - 1))
    return moments(x, axes, cumulative=cumulative, axis_name=axis_name)


def batch_standardize(
    x: jax.Array,
    *,
    causal: bool = False,
    epsilon: float = EPSILON,
    axis_name: AxisName = None,
) -> jax.Array:
    """Standardizes each channel over batch and space (BS).

    Args:
      x: `(batch, *spatial, channels)`.
      causal: for sequences: by the statistics of the positions so far.
      epsilon: added to the variance.
      axis_name: the mapped axis over which the batch is split, if any.
    """
    return normalize(x, *batch_moments(x, causal=causal, axis_name=axis_name), epsilon)


def group_standardize(
    x: jax.Array,
    *,
    groups: int = 12,
    causal: bool = False,
    epsilon: float = EPSILON,
    axis_name: AxisName = None,
) -> jax.Array:
    """Standardizes even groups of channels over the batch (BS), odd ones per sample (IS): G-IBS.

    Args:
      x: `(batch, *spatial, channels)`; channels are cut into `groups` equal runs, in order.
      causal: for sequences: by the statistics of the positions so far.
      epsilon: added to the variance.
      axis_name: the mapped axis over which the batch is split, if any.

    Raises:
      ValueError: if the channels do not divide into the groups.
    """
    _check(x, causal)
    if x.shape[-1] % groups:
        raise ValueError(
            f"{x.shape[-1]} channels do not divide into {groups} groups: x is {x.shape}"
        )
    found = group_moments(x, causal=causal, axis_name=axis_name)
    return normalize_groups(x, found, groups, epsilon)


def _check(x: jax.Array, causal: bool) -> int | None:
    """Returns the axis along which statistics are cumulative, if any."""
    if x.ndim < 3:
        raise ValueError(f"expected (batch, *spatial, channels), got shape {x.shape}")
    if causal and x.ndim != 3:
        raise ValueError(f"causal needs (batch, length, channels), got shape {x.shape}")
    return 1 if causal else None
