"""Maps with their channels first, `(channels, batch, *spatial)`: the layout of the fast paths.

A pointwise layer is then one matrix product, and the concatenation of channels a plain copy.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from terminator_jax.ops.dtypes import at_least_float32


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

    A product with a vector, because XLA on a CPU would otherwise compute `x` again inside of the
    reduction. With the gradient of `pointwise`, this halves the time of a training step there.
    """
    wide = at_least_float32(x.dtype)
    flat = x.reshape(*x.shape[:2], -1)
    weights = jnp.full(flat.shape[2], 1 / flat.shape[2], wide)
    return jnp.dot(flat.astype(wide), weights, precision=jax.lax.Precision.HIGHEST)


def spatial_mean_and_square(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the mean and the mean square over space, `(channels, batch, 1 …)` each."""
    shape = (*x.shape[:2], *(1,) * (x.ndim - 2))
    wide = x.astype(at_least_float32(x.dtype))
    return spatial_mean(wide).reshape(shape), spatial_mean(wide * wide).reshape(shape)


def broadcast_channels(values: jax.Array, x: jax.Array) -> jax.Array:
    """Broadcasts values to the shape and the dtype of a map.

    Rounded after the broadcast and not before: the gradient is then summed in float32 or wider.

    Args:
      values: `(channels,)`, `(channels, batch)`, or already of the rank of `x`.
      x: `(channels, batch, *spatial)`.
    """
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
    # One axis of positions: jaxlib has no products of bfloat16 on a CPU that keep several.
    flat = x.reshape(x.shape[0], -1)
    out = _matmul(*match_varying_axes(kernel.astype(x.dtype), flat))
    out = out.reshape(kernel.shape[1], *x.shape[1:])
    return out if bias is None else out + broadcast_channels(bias, out)


@jax.custom_vjp
def _matmul(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Computes `kernelᵀ x` in float32 or wider; JAX's own gradient would copy every large map.

    It is transposed. A training step on a CPU takes 1.4 times as long with that. The kernel is
    `(inputs, outputs)`, x is `(inputs, positions)`.
    """
    return _contract(kernel.T, x, 1, 0)


def _contract(
    a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, sharding: NamedSharding | None = None
) -> jax.Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    wide = at_least_float32(a.dtype)
    out = jax.lax.dot_general(a, b, dimensions, preferred_element_type=wide, out_sharding=sharding)
    return out.astype(a.dtype)


def _matmul_forward(kernel, x):
    return _matmul(kernel, x), (kernel, x)


def _matmul_backward(residuals, dy):
    kernel, x = residuals
    dkernel = _contract(x, dy, 1, 1, explicit_sharding(kernel))
    return dkernel, _contract(kernel, dy, 1, 0)


_matmul.defvjp(_matmul_forward, _matmul_backward)
