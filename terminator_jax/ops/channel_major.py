"""The layout inside a block: `(channels, batch, *spatial)`.

A pointwise layer is then one matrix product, a concatenation of channels a plain copy, a product
over the two spatial axes a batched matrix product, and a mean over space a sum of neighbours:
nothing has to be transposed on the way. On a CPU this is worth a factor; TPU compilers choose the
layout in memory themselves, whatever the order of the axes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from terminator_jax.ops.dtypes import at_least_float32
from terminator_jax.ops.order import after_product
from terminator_jax.ops.partitioning import shared

Axes = tuple[int, ...]


def enter(x: jax.Array) -> jax.Array:
    """`(batch, *spatial, channels)` to `(channels, batch, *spatial)`."""
    return _in_memory(jnp.moveaxis(x, -1, 0))


def leave(x: jax.Array) -> jax.Array:
    """`(channels, batch, *spatial)` to `(batch, *spatial, channels)`."""
    return jnp.moveaxis(_in_memory(x), 0, -1)


def _in_memory(x: jax.Array) -> jax.Array:
    """The array, on a CPU really in the order of its axes.

    XLA would save the copy and read across memory from there on, at five times the time.
    """
    return _pinned(x) if jax.default_backend() == "cpu" else x


@jax.custom_vjp
def _pinned(x: jax.Array) -> jax.Array:
    return _pin(x)


_pin = shared(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), 0)
_pinned.defvjp(lambda x: (_pinned(x), None), lambda _, dy: (_pinned(dy),))


def space(x: jax.Array) -> tuple[int, ...]:
    """The spatial axes of a channel-major map."""
    return tuple(range(2, x.ndim))


def mean(x: jax.Array) -> jax.Array:
    """Means over space, `(channels, batch)`, in float32 or wider.

    As a product with a vector: what `x` is computed from is then no part of the reduction, which on
    a CPU would spread every scalar in it over a map.
    """
    wide = at_least_float32(x.dtype)
    flat = x.reshape(*x.shape[:2], -1)
    share = jnp.full(flat.shape[2], 1 / flat.shape[2], wide)
    return jnp.dot(flat.astype(wide), share, precision=jax.lax.Precision.HIGHEST)


def statistics(x: jax.Array, causal: bool) -> tuple[tuple[int, ...], int | None]:
    """The axes that statistics over space are taken over, and the one that they run along.

    Of a causal sequence these are none and the only one, else all and none.
    """
    return ((), 2) if causal else (space(x), None)


def like(values: jax.Array, x: jax.Array) -> jax.Array:
    """`values`, one per channel `(channels,)` or `(channels, batch)`, as a map like `x`."""
    return spread(values.reshape(values.shape + (1,) * (x.ndim - values.ndim)), x)


def spread(values: jax.Array, x: jax.Array) -> jax.Array:
    """`values` broadcast to the shape and dtype of `x`.

    Rounded after that and not before: their gradient is then a sum in float32 or wider.
    """
    wide = at_least_float32(values.dtype)
    return jnp.broadcast_to(values.astype(wide), x.shape).astype(x.dtype)


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, all marked as varying over every axis of a `shard_map` that one varies over.

    Functions with a custom gradient need this: what was the same on all devices gets its gradient
    summed over them, as happens by itself elsewhere.
    """
    varying = [_varying(a) for a in arrays]
    missing = [tuple(frozenset().union(*varying) - own) for own in varying]
    return tuple(
        jax.lax.pcast(a, axes, to="varying") if axes else a
        for a, axes in zip(arrays, missing, strict=True)
    )


def _varying(x: jax.Array) -> frozenset[str]:
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying  # jax 0.11, jax 0.10


def pointwise(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """A linear map of the channels at every position.

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
    kernel, x = vary_alike(kernel.astype(x.dtype), x)
    out = product(kernel, positions(x)).reshape(kernel.shape[1], *x.shape[1:])
    return out if bias is None else out + like(bias, out)


def positions(x: jax.Array, axis: int = 1) -> jax.Array:
    """All axes from `axis` on as one, where that is faster for a product: on a CPU.

    The compilers of the others choose the layout in memory, which this would tie to them.
    """
    return x.reshape(*x.shape[:axis], -1) if jax.default_backend() == "cpu" else x


@jax.custom_vjp
def product(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """`kernelᵀ x` of `(inputs, outputs)` and `(inputs, *rest)`, summed in float32 or wider.

    The gradients are written out because those that `jnp.dot` has come out transposed, which costs
    a copy of every large map on a CPU. The kernel is turned first: CPUs with bfloat16 units have
    fast products only of rows with columns.
    """
    return contract(_in_memory(kernel.T), x, (1,), (0,))


def contract(a: jax.Array, b: jax.Array, axes_a: Axes, axes_b: Axes) -> jax.Array:
    """The sum of products over these axes."""
    wide = at_least_float32(a.dtype)
    axes = ((axes_a, axes_b), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=wide).astype(a.dtype)


def _product_forward(kernel, x):
    return product(kernel, x), (kernel, x)


def _product_backward(residuals, dy):
    kernel, x = residuals
    rest = tuple(range(1, x.ndim))
    dkernel = contract(x, dy, rest, rest)
    # The map's gradient second, when nothing needs the map any more: often the largest there is.
    return dkernel, contract(after_product(dkernel, kernel), dy, (1,), (0,))


product.defvjp(_product_forward, _product_backward)


def gather(maps: Sequence[jax.Array]) -> jax.Array:
    """Maps joined along their channels."""
    return jnp.concatenate(maps, axis=0)
