"""Standardization by the batch's own statistics: no affine, no running averages.

BS over batch and space, IS over space, G-IBS each for every other group of channels.

Statistics are the biased ones, in float32 or wider, from one pass over the map (the mean and the
mean of squares together).
"""

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-5
AxisName = str | tuple[str, ...] | None


def moments(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean and mean of squares over `axes` (kept, with length 1), in float32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.mean(x, axes, keepdims=True), jnp.mean(x * x, axes, keepdims=True)


def across(statistics, axis_name: AxisName):
    """Averages statistics over the devices of a `pmap` or `shard_map` axis, if one is named."""
    return statistics if axis_name is None else jax.lax.pmean(statistics, axis_name)


def normalize(
    x: jax.Array, mean: jax.Array, square: jax.Array, epsilon: float, gate: jax.Array | None = None
) -> jax.Array:
    """`(x - mean) / sqrt(variance + ε)`, returned in the dtype of `x`.

    With a `gate` of the statistics' shape, the same of `gate · x`.
    """
    variance = jnp.maximum(square - mean * mean, 0)
    if gate is None:
        scale = jax.lax.rsqrt(variance + epsilon)
    else:
        scale = gate * jax.lax.rsqrt(gate * gate * variance + epsilon)
    return (x * scale - mean * scale).astype(x.dtype)


def standardize(
    x: jax.Array, axes: tuple[int, ...], *, epsilon: float = EPSILON, axis_name: AxisName = None
) -> jax.Array:
    """Zero mean and unit variance over `axes`, whatever the layout; `axis_name` as below."""
    return normalize(x, *across(moments(x, axes), axis_name), epsilon)


def standardize_groups(
    x: jax.Array,
    groups: int,
    *,
    batch_axis: int,
    channel_axis: int,
    epsilon: float = EPSILON,
    axis_name: AxisName = None,
) -> jax.Array:
    """G-IBS, whatever the layout; the other axes are space. See `group_standardize`."""
    channels = x.shape[channel_axis]
    if channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups: x is {x.shape}")
    axes = range(x.ndim)
    instance = moments(x, tuple({*axes} - {axes[batch_axis], axes[channel_axis]}))
    batch = across([m.mean(batch_axis, keepdims=True) for m in instance], axis_name)
    shape = [1] * x.ndim
    shape[channel_axis] = channels
    use_batch = (np.arange(channels) // (channels // groups) % 2 == 0).reshape(shape)
    chosen = [jnp.where(use_batch, b, i) for b, i in zip(batch, instance, strict=True)]
    return normalize(x, *chosen, epsilon)


def instance_standardize(x: jax.Array, *, epsilon: float = EPSILON) -> jax.Array:
    """IS: zero mean and unit variance over space, per sample and channel.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)) * 5 + 1
      >>> y = instance_standardize(x)
      >>> bool(jnp.allclose(y.mean((1, 2)), 0, atol=1e-5))
      True
    """
    _check(x)
    return standardize(x, tuple(range(1, x.ndim - 1)), epsilon=epsilon)


def batch_standardize(
    x: jax.Array, *, epsilon: float = EPSILON, axis_name: AxisName = None
) -> jax.Array:
    """BS: zero mean and unit variance over batch and space, per channel.

    Args:
      x: `(batch, *spatial, channels)`.
      axis_name: the mapped axis over which the batch is split, if any.
    """
    _check(x)
    return standardize(x, tuple(range(x.ndim - 1)), epsilon=epsilon, axis_name=axis_name)


def group_standardize(
    x: jax.Array, *, groups: int = 12, epsilon: float = EPSILON, axis_name: AxisName = None
) -> jax.Array:
    """G-IBS: even channel groups standardized over the batch (BS), odd ones per sample (IS).

    Args:
      x: `(batch, *spatial, channels)`; channels are cut into `groups` equal runs, in order.
      axis_name: the mapped axis over which the batch is split, if any.

    Raises:
      ValueError: if the channels do not divide into the groups.
    """
    _check(x)
    return standardize_groups(
        x, groups, batch_axis=0, channel_axis=-1, epsilon=epsilon, axis_name=axis_name
    )


def _check(x: jax.Array) -> None:
    if x.ndim < 3:
        raise ValueError(f"expected (batch, *spatial, channels), got shape {x.shape}")
