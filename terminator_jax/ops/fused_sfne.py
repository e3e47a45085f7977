"""The SFNE block in fewer and larger operations: what `SFNEBlock(implementation="fused")` computes.

The result is that of the formula in `layers/sfne.py`. A block calls `global_maps`, `mix_local`,
`mix` and `activate`, in this order. Between them it makes the local kernels and normalizes, with
moments of the batch or with running averages. What differs from the formula is mathematics:

- Linear maps of the same input are one: `W_k` and `W_q W_v` of each RGU, the two `W_y`.
- The gate g of the hyper-channel interaction is one factor per sample and channel, so the
  standardization IS(g x) after it follows from the mean and variance of x.
- A skip that is tiled to more channels is multiplied by the sum of its copies' weights.
- The local branches share one call of the convolution, one product with their mixers, one
  standardization and one activation.
- What a standardization cancels is never added: biases, and the local branches' scalars.
  Where averages of statistics are kept, they are those of the formula, with these constants.

Maps are `(channels, batch, *spatial)`, see `channels_first.py`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from terminator_jax.ops import hyperzzw
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.channels_first import (
    broadcast_channels,
    pointwise,
    spatial_axes,
    standardize_space,
    to_channels_first,
)
from terminator_jax.ops.conv.per_map import convolve_per_map
from terminator_jax.ops.dtypes import floating
from terminator_jax.ops.standardize import (
    EPSILON,
    Moments,
    average,
    batch_groups,
    mean_and_square,
    mean_and_variance,
    normalize,
    standardize,
)


class RGUWeights(NamedTuple):
    """The weights of a recursive gated unit, in which `v` is read by `W_q` alone.

    Attributes:
      kernel: `(C, 2C)`, `W_k` beside `W_q W_v`.
      bias: `(2C,)`, the same of the biases.
      position: `(*size,)`, p.
      out: `(C, C)`, `W_y`.
    """

    kernel: jax.Array
    bias: jax.Array
    position: jax.Array
    out: jax.Array


class SFNEWeights(NamedTuple):
    """The weights of a block and the kernels that its slow networks give.

    Attributes:
      k_h: `(C,)`, the kernel of the hyper-channel interaction.
      k_c: `(C,)`, that of the hyper interaction over the channels.
      k_s: `(*size,)`, that of the hyper interaction over the positions.
      hyper_kernel: `(*size, C)`, K.
      rgus: of x and of the hyper-kernel times x.
      mixer: `(C, C)`.
      local_mixer: `(branches, C, C)`.
      local_bias: `(branches * C,)`, the biases of the local mixers.
      bottleneck: by the name of each map, `(C, λC)`.
      output_bias: `(λC,)`, the bottleneck's bias and what it makes of the local scalars.
      bias: the scalar after the last activation.
    """

    k_h: jax.Array
    k_c: jax.Array
    k_s: jax.Array
    hyper_kernel: jax.Array
    rgus: tuple[RGUWeights, RGUWeights]
    mixer: jax.Array
    local_mixer: jax.Array
    local_bias: jax.Array
    bottleneck: Mapping[str, jax.Array]
    output_bias: jax.Array
    bias: jax.Array


class SFNESettings(NamedTuple):
    """What a block is besides its weights; see `SFNEBlock` for each.

    Attributes:
      local: the names of the maps that each local branch convolves.
    """

    operator: str
    operator_scale: float
    causal: bool
    groups: int
    local: tuple[str, ...]


def global_maps(x: jax.Array, weights: SFNEWeights, settings: SFNESettings) -> dict[str, jax.Array]:
    """Computes the maps of a block by their names, without the local branches.

    Args:
      x: `(C, batch, *size)`.
      weights: the block's weights.
      settings: its other properties.

    Returns:
      x, u, h, f, o, o_u, o_h, s and i, in the shape of `x`.
    """
    x, weights = floating((x, weights))
    k_hat = x * broadcast_channels(to_channels_first(weights.hyper_kernel)[:, None], x)
    f = _standardize(_rgu_pair(x, k_hat, weights.rgus, settings), settings)
    u = _standardize(pointwise(x, weights.mixer), settings)
    h = _gate_channels(x, weights.k_h, settings)
    operator = hyperzzw.OPERATORS[settings.operator]
    results = operator(k_hat, [f, u, h], causal=settings.causal)
    o, o_u, o_h = (_scale(result, settings.operator_scale) for result in results)
    i = _interact(o, x, weights, settings)
    return dict(x=x, u=u, h=h, f=f, o=o, o_u=o_u, o_h=o_h, s=jax.nn.silu(o), i=i)


def mix_local(
    maps: Mapping[str, jax.Array],
    kernels: Sequence[jax.Array],
    weights: SFNEWeights,
    settings: SFNESettings,
) -> jax.Array:
    """Computes the local branches up to their standardization, one after the other.

    Args:
      maps: those of `global_maps`.
      kernels: of each branch, `(size, …, size, C)`.
      weights: the block's weights.
      settings: its other properties.

    Returns:
      `(branches * C, batch, *size)`, without the biases of the mixers.
    """
    weights = floating(weights)
    kernels = [to_channels_first(kernel)[:, None] for kernel in kernels]
    padding = "causal" if settings.causal else "same"
    sources = [maps[name] for name in settings.local]
    y = convolve_per_map(sources, kernels, padding=padding, correlate=True)
    branches = y.reshape(len(kernels), len(y) // len(kernels), *y.shape[1:])
    return jax.vmap(pointwise)(branches, weights.local_mixer).reshape(y.shape)


def mix(
    maps: Mapping[str, jax.Array],
    local: jax.Array,
    skips: Mapping[str, jax.Array],
    weights: SFNEWeights,
) -> jax.Array:
    """Computes the bottleneck of all maps up to its standardization.

    Args:
      maps: those of `global_maps`.
      local: the local branches, `(branches * C, batch, *size)`.
      skips: by their names, `(channels, batch, *size)` with channels that divide C.
      weights: the block's weights.

    Returns:
      `(λC, batch, *size)`, without `weights.output_bias`.
    """
    maps, local, skips, weights = floating((dict(maps), local, dict(skips), weights))
    names = ("o", "f", "o_u", "s", "o_h", "i")
    maps = {"local": local, **{name: maps[name] for name in names}, **skips}
    rows = _rows(weights.bottleneck, skips, len(weights.local_mixer))
    return pointwise(
        jnp.concatenate(list(maps.values())), jnp.concatenate([rows[name] for name in maps])
    )


def activate(y: jax.Array, weights: SFNEWeights) -> jax.Array:
    """Computes the end of a block, `GELU(y) + bias`."""
    y = gelu(y)
    return y + broadcast_channels(weights.bias, y)


def fold(
    weights: SFNEWeights, settings: SFNESettings, local: Moments, output: Moments
) -> SFNEWeights:
    """Multiplies the moments of a batch into the weights before them, and scalars into biases.

    Args:
      weights: the block's weights.
      settings: its other properties, not causal.
      local: mean and variance after the local mixers, `(branches * C,)` each.
      output: mean and variance after the bottleneck, `(λC,)` each; those of groups that are
        standardized per sample are not used.

    Returns:
      Weights whose biases are to be added: `local_bias` in the place of the local standardization,
      `output_bias` before that of the samples.
    """
    weights, local, output = floating((weights, local, output))
    scale = jax.lax.rsqrt(local[1] + EPSILON)
    branches, channels, _ = weights.local_mixer.shape
    mixer = weights.local_mixer * scale.reshape(branches, 1, channels)
    # What a standardization per sample cancels may stay.
    by_batch = batch_groups(len(output[0]), settings.groups)
    factor = jnp.where(by_batch, jax.lax.rsqrt(output[1] + EPSILON), 1)
    return weights._replace(
        local_mixer=mixer,
        local_bias=(weights.local_bias - local[0]) * scale,
        bottleneck={name: rows * factor[None] for name, rows in weights.bottleneck.items()},
        output_bias=jnp.where(by_batch, (weights.output_bias - output[0]) * factor, 0),
    )


def _cumulative(settings: SFNESettings) -> int | None:
    """Returns the axis that statistics are cumulative along."""
    return 2 if settings.causal else None


def _space(x: jax.Array, settings: SFNESettings) -> tuple[int, ...]:
    """Returns the axes that statistics of one sample are taken over."""
    return () if settings.causal else spatial_axes(x)


def _standardize(x: jax.Array, settings: SFNESettings) -> jax.Array:
    """Standardizes each sample and channel over its positions (IS)."""
    if settings.causal:
        return standardize(x, (), cumulative=_cumulative(settings))
    return standardize_space(x)


def _scale(x: jax.Array, scale: float) -> jax.Array:
    return x if scale == 1 else x * scale


def _rgu_pair(
    x: jax.Array, k_hat: jax.Array, rgus: Sequence[RGUWeights], settings: SFNESettings
) -> jax.Array:
    """Computes `RGU₁(x) + RGU₂(K̂)`, with one product for both `W_y`."""
    gated = []
    for map_, rgu in zip((x, k_hat), rgus, strict=True):
        k, q = jnp.split(pointwise(map_, rgu.kernel, rgu.bias), 2)
        gate = gelu(_standardize(k * q, settings))
        gated.append(gate + broadcast_channels(rgu.position[None, None], gate))
    return pointwise(jnp.concatenate(gated), jnp.concatenate([rgu.out for rgu in rgus]))


def _gate_channels(x: jax.Array, kernel: jax.Array, settings: SFNESettings) -> jax.Array:
    """Computes h, the standardized hyper-channel interaction."""
    statistics = mean_and_square(x, _space(x, settings), cumulative=_cumulative(settings))
    mean, variance = mean_and_variance(*statistics)
    logit = hyperzzw.quadratic_form(mean, broadcast_channels(kernel, mean))
    gate = jax.nn.sigmoid(logit)
    if settings.causal:
        return _standardize(x * gate.astype(x.dtype), settings)
    # One gate for each sample and channel, so IS(g x) needs the statistics of x alone.
    return normalize(x, mean, variance, EPSILON, gate=gate)


def _interact(
    o: jax.Array, x: jax.Array, weights: SFNEWeights, settings: SFNESettings
) -> jax.Array:
    """Computes i, the hyper interaction of o and x."""
    mean = average(o, _space(o, settings), cumulative=_cumulative(settings))
    channel = hyperzzw.quadratic_form(mean, broadcast_channels(weights.k_c, mean))
    spatial = hyperzzw.quadratic_form(average(o, (0,)), weights.k_s[None, None])
    return x * jax.nn.sigmoid(channel * spatial).astype(x.dtype)


def _rows(
    bottleneck: Mapping[str, jax.Array], skips: Mapping[str, jax.Array], branches: int
) -> dict[str, jax.Array]:
    """Returns the bottleneck's weights of each map, summed over the copies of a tiled one."""
    rows = dict(bottleneck)
    rows["local"] = jnp.concatenate([rows.pop(f"l{n + 1}") for n in range(branches)])
    for name, skip in skips.items():
        rows[name] = sum_copies(rows[name], len(skip))
    return rows


def sum_copies(rows: jax.Array, channels: int) -> jax.Array:
    """Sums the weights `(copies * channels, outputs)` of a tiled map over its copies."""
    return jnp.sum(rows.reshape(-1, channels, rows.shape[1]), axis=0)
