"""Maps with their channels first, `(channels, batch, *spatial)`: the layout of the fast paths.

A pointwise layer is then one matrix product, and the concatenation of channels a plain copy.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from terminator_jax.ops.dtypes import at_least_float32, floating
from terminator_jax.ops.platform import by_platform
from terminator_jax.ops.standardize import EPSILON, mean_and_variance, rsqrt_clamped


def to_channels_first(x: jax.Array) -> jax.Array:
    """Moves channels from the last axis to the first: `(batch, *spatial, channels)` before."""
    return jnp.moveaxis(x, -1, 0)


def to_channels_last(x: jax.Array) -> jax.Array:
    """Moves channels from the first axis to the last: `(batch, *spatial, channels)` after."""
    return jnp.moveaxis(x, 0, -1)


def spatial_axes(x: jax.Array) -> tuple[int, ...]:
    """Returns the axes of space."""
    return tuple(range(2, x.ndim))


def spatial_mean(x: jax.Array) -> jax.Array:
    """Computes means over space, `(channels, batch)`, in float32 or wider.

    A product with weights, because XLA on a CPU would otherwise compute `x` again inside of the
    reduction. With the gradient of `pointwise`, this halves the time of a training step there.
    """
    x = floating(x)
    wide, spatial = at_least_float32(x.dtype), x.shape[2:]
    weights = jnp.full(spatial, 1 / math.prod(spatial), wide)
    return jnp.tensordot(
        x.astype(wide), weights, axes=len(spatial), precision=jax.lax.Precision.HIGHEST
    )


def standardize_space(x: jax.Array) -> jax.Array:
    """Standardizes each channel and sample over space: IS, `y = (x - m(x)) / σ`.

    Its derivative is `dy = (dx - m(dx) - y m(y dx)) / σ`, for which y is kept in place of x.

    Example:
      >>> print(standardize_space(jnp.array([[[3.0, 5.0, 5.0, 3.0]]])).round(2))
      [[[-1.  1.  1. -1.]]]
    """
    return _standardized(floating(x))


@jax.custom_jvp
def _standardized(x: jax.Array) -> jax.Array:
    return _standardize_space(x)[0]


def _standardize_space(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `y` and `1 / σ`, the latter `(channels, batch)`."""
    wide = x.astype(at_least_float32(x.dtype))
    mean, variance = mean_and_variance(spatial_mean(wide), spatial_mean(wide * wide))
    scale = rsqrt_clamped(variance + EPSILON, EPSILON)
    y = wide * _at_every_position(scale, x) - _at_every_position(mean * scale, x)
    return y.astype(x.dtype), scale


@_standardized.defjvp
def _standardize_space_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y, scale = _standardize_space(x)
    wide_y, wide_dx = y.astype(scale.dtype), dx.astype(scale.dtype)
    mean, mean_y = (_at_every_position(spatial_mean(v), x) for v in (wide_dx, wide_y * wide_dx))
    dy = (wide_dx - mean - wide_y * mean_y) * _at_every_position(scale, x)
    return y, dy.astype(dx.dtype)


def _at_every_position(values: jax.Array, x: jax.Array) -> jax.Array:
    """Repeats values `(channels, batch)` at every position of a map, as a product with ones.

    The sum over space in its gradient is then a product too, see `spatial_mean`. With a broadcast a
    training step on a CPU takes 1.1 times the time and the memory.
    """
    ones = jnp.ones(x.shape[2:], values.dtype)
    return jnp.tensordot(values, ones, axes=0, precision=jax.lax.Precision.HIGHEST)


def broadcast_channels(values: jax.Array, x: jax.Array) -> jax.Array:
    """Broadcasts values to the shape and the dtype of a map.

    Rounded after the broadcast and not before: the gradient is then summed in float32 or wider.

    Args:
      values: `(channels,)`, `(channels, batch)`, or already of the rank of `x`.
      x: `(channels, batch, *spatial)`.
    """
    values, x = floating((values, x))
    values = values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
    wide = values.astype(at_least_float32(values.dtype))
    return jnp.broadcast_to(wide, x.shape).astype(x.dtype)


def match_varying_axes(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Casts arrays to vary over the same mesh axes of a `shard_map`.

    A function with a custom gradient needs this: what is the same on all devices then gets the sum
    of their gradients, as it does elsewhere by itself.
    """
    varying = [_varying_axes(a) for a in arrays]
    missing = [tuple(frozenset().union(*varying) - own) for own in varying]
    return tuple(
        jax.lax.pcast(a, axes, to="varying") if axes else a
        for a, axes in zip(arrays, missing, strict=True)
    )


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """Returns the sharding in an array's type, if its mesh has axes of the type `Explicit`."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _varying_axes(x: jax.Array) -> frozenset[str]:
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying  # jax 0.11 named it anew


def pointwise(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Applies a linear map of the channels at every position.

    It has no forward mode, because its gradient is written out.

    Args:
      x: `(inputs, batch, *spatial)`.
      kernel: `(inputs, outputs)`.
      bias: `(outputs,)`; None where a standardization follows, which takes it away again.

    Returns:
      `(outputs, batch, *spatial)` in the dtype of `x`.

    Example:
      >>> pointwise(jnp.ones((3, 2, 8, 8)), jnp.ones((3, 5)), jnp.zeros(5)).shape
      (5, 2, 8, 8)
    """
    x, kernel, bias = floating((x, kernel, bias))
    out = _matmul(*match_varying_axes(kernel.astype(x.dtype), x))
    return out if bias is None else out + broadcast_channels(bias, out)


@jax.custom_vjp
def _matmul(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Computes `kernelᵀ x` with a gradient written out: JAX's would transpose every large map.

    A training step on a CPU would take 1.4 times as long. The kernel is `(inputs, outputs)`, x is
    `(inputs, *positions)`. Products are summed in float32 or wider.
    """
    return by_platform(_wants_one_axis, _product, kernel, x)


def _wants_one_axis(platform: str) -> bool:
    """Returns whether the positions should be one axis in products.

    A training step on a CPU takes 1.2 times as long with several, and XLA has no such products of
    bfloat16 there. On a TPU a block moves 20 % fewer bytes with several, since its compiler then
    chooses one layout for products and maps.
    """
    return platform == "cpu"


def _product(one_axis: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def product(kernel: jax.Array, x: jax.Array) -> jax.Array:
        transposed, positions = kernel.T, x
        if one_axis:
            # Transposed in memory too, by way of one axis: XLA on a CPU has fast products only of
            # rows with columns. A forward pass takes 1.15 times as long without, 1.4 in bfloat16.
            flat = jax.lax.optimization_barrier(transposed.reshape(-1))
            transposed, positions = flat.reshape(transposed.shape), x.reshape(len(x), -1)
        out = _contract(transposed, positions, (1,), (0,))
        return out.reshape(kernel.shape[1], *x.shape[1:])

    return product


def _gradients(one_axis: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def gradients(kernel: jax.Array, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = x.shape
        if one_axis:
            x, dy = x.reshape(len(x), -1), dy.reshape(len(dy), -1)
        axes = tuple(range(1, x.ndim))
        dkernel = _contract(x, dy, axes, axes, explicit_sharding(kernel))
        return dkernel, _contract(kernel, dy, (1,), (0,)).reshape(shape)

    return gradients


def _contract(
    a: jax.Array,
    b: jax.Array,
    axes_a: tuple[int, ...],
    axes_b: tuple[int, ...],
    sharding: NamedSharding | None = None,
) -> jax.Array:
    dimensions = ((axes_a, axes_b), ((), ()))
    wide = at_least_float32(a.dtype)
    out = jax.lax.dot_general(a, b, dimensions, preferred_element_type=wide, out_sharding=sharding)
    return out.astype(a.dtype)


def _matmul_forward(kernel, x):
    return _matmul(kernel, x), (kernel, x)


def _matmul_backward(residuals, dy):
    return by_platform(_wants_one_axis, _gradients, *residuals, dy)


_matmul.defvjp(_matmul_forward, _matmul_backward)
