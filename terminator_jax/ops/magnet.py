"""MAGNet: generates kernels from coordinates, by products of sine filters (Romero et al. 2021).

    g_l(c) = sin(A_l c + a_l)                                 l = 0..L
    h_0 = g_0(c);   h_i = g_i(c) ⊙ (h_{i-1} W_i + b_i) + p    i = 1..L
    out = h_L W_o + b_o

The variant for the local kernels depends on a context. After every layer it normalizes `h` and
multiplies it by a projection of the context.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from terminator_jax.ops.activation import gelu
from terminator_jax.ops.dtypes import at_least_float32, floating
from terminator_jax.ops.standardize import rsqrt_clamped


class MAGNetParams(NamedTuple):
    """Parameters of a MAGNet with L layers, d input axes and `hidden` channels, stacked by layer.

    `A (L+1, d, hidden)`, `a (L+1, hidden)`, `W (L, hidden, hidden)`, `b (L, hidden)`,
    `p (positions,)`, `W_o (hidden, features)`, `b_o (features,)`.
    """

    gabor_weight: Any
    gabor_bias: Any
    weight: Any
    bias: Any
    position: Any
    out_weight: Any
    out_bias: Any


class Context(NamedTuple):
    """Parameters by which a MAGNet depends on its input: `R`, `F` and, stacked by layer, `X`.

    `R (channels, hidden)`, `F (hidden, hidden)`, `X (L, hidden, hidden)` with their biases.
    """

    reduce_weight: Any
    reduce_bias: Any
    mix_weight: Any
    mix_bias: Any
    weight: Any
    bias: Any


# The release's constants in `h ← α stop_gradient(h) + β h / ‖h‖`.
ALPHA, BETA = 1.0, 0.1
NORM_FLOOR = 1e-12


def gabor(coordinates: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """Computes `sin(A c + a)` of all layers at once.

    The phases reach 1e5 rad. A matrix unit may round the operands of a product to bfloat16, which
    would leave noise. So the phases are elementwise multiplications and additions.

    Args:
      coordinates: `(positions, d)`, float32 or wider.
      weight: `(layers, d, hidden)`.
      bias: `(layers, hidden)`.

    Returns:
      `(layers, positions, hidden)` in the dtype of the phases.
    """
    coordinates, weight, bias = floating((coordinates, weight, bias))
    dtype = at_least_float32(coordinates.dtype, weight.dtype)
    coordinates, weight, bias = (a.astype(dtype) for a in (coordinates, weight, bias))
    phase = bias[:, None]
    for axis in range(coordinates.shape[1]):
        phase = phase + coordinates[None, :, axis, None] * weight[:, axis, None]
    return jnp.sin(phase)


def hidden(net: MAGNetParams, coordinates: jax.Array) -> jax.Array:
    """Computes the last hidden layer: `(positions, d)` to `(positions, hidden)`."""
    g = gabor(coordinates, net.gabor_weight, net.gabor_bias)
    net = _cast(net, g.dtype)
    h = g[0]
    for i in range(len(net.weight)):
        h = g[i + 1] * (h @ net.weight[i] + net.bias[i, None]) + net.position[:, None]
    return h


def magnet(net: MAGNetParams, coordinates: jax.Array) -> jax.Array:
    """Computes the kernel of a MAGNet: `(positions, d)` to `(positions, features)`.

    Source: section 3.1 of Romero et al., "FlexConv", 2021.
    """
    return output(net, hidden(net, coordinates))


def output(net: MAGNetParams, h: jax.Array) -> jax.Array:
    """Computes the last layer, `h W_o + b_o`."""
    h, net = floating(h), _cast(net, floating(h).dtype)
    return h @ net.out_weight + net.out_bias[None]


def _cast(parameters, dtype: jnp.dtype):
    """Casts parameters to the dtype of the phases, which is never narrower."""
    return jax.tree.map(lambda x: x.astype(dtype), floating(parameters))


def context(net: Context, pooled: jax.Array) -> jax.Array:
    """Computes `GELU(F R pooled)`: `(positions, channels)` to `(positions, hidden)`."""
    net, pooled = floating((net, pooled))
    net = _cast(net, at_least_float32(pooled.dtype, net.reduce_weight.dtype))
    pooled = pooled.astype(net.reduce_weight.dtype)
    reduced = pooled @ net.reduce_weight + net.reduce_bias[None]
    return gelu(reduced @ net.mix_weight + net.mix_bias[None])


def context_magnet(
    net: MAGNetParams, mix: Context, coordinates: jax.Array, pooled: jax.Array, inside: jax.Array
) -> jax.Array:
    """Computes the kernel of a MAGNet that depends on its input.

    Args:
      net: the MAGNet.
      mix: the parameters by which it depends on the input.
      coordinates: `(positions, d)`.
      pooled: `(positions, channels)`, the pooled input, averaged over the batch.
      inside: `(positions,)` of 0 and 1. Positions marked 0 are padding: no norm counts them, and
        the kernel is 0 there. So kernels of several sizes can be computed together.

    Returns:
      `(positions, features)`.
    """
    g = gabor(coordinates, net.gabor_weight, net.gabor_bias)
    t = context(mix, pooled).astype(g.dtype)
    net, mix = _cast(net, g.dtype), _cast(mix, g.dtype)
    inside = jnp.asarray(inside)[:, None].astype(g.dtype)
    h = g[0]
    for i in range(len(net.weight)):
        h = g[i + 1] * (h @ net.weight[i] + net.bias[i, None]) + net.position[:, None]
        square = jnp.sum(inside * h * h, axis=0, keepdims=True)
        share = BETA * rsqrt_clamped(square, NORM_FLOOR**2)
        h = ALPHA * jax.lax.stop_gradient(h) + share * h
        h = h * (t @ mix.weight[i] + mix.bias[i, None])
    return output(net, h) * inside
