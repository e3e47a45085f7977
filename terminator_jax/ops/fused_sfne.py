"""The SFNE block in fewer and larger operations: what `SFNEBlock(implementation="fused")` computes.

The result is that of the formula in `layers/sfne.py`. What differs is mathematics:

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

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
    to_channels_last,
)
from terminator_jax.ops.conv.per_map import convolve_per_map
from terminator_jax.ops.standardize import (
    EPSILON,
    AxisName,
    Moments,
    Track,
    average,
    batch_groups,
    mean_and_square,
    mean_and_variance,
    normalize,
    standardize,
    standardize_groups,
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
      h_channel: `(C,)`, the kernel of the hyper-channel interaction.
      i_channel: `(C,)`, that of the hyper interaction over the channels.
      i_spatial: `(*size,)`, that of the hyper interaction over the positions.
      kernel: `(*size, C)`, the hyper-kernel.
      rgus: of x and of the hyper-kernel times x.
      mixer: `(C, C)`.
      local_mixer: `(branches, C, C)`.
      local_bias: `(branches * C,)`, the biases of the local mixers.
      bottleneck: by the name of each map, `(C, λC)`.
      output_bias: `(λC,)`, the bottleneck's bias and what it makes of the local scalars.
      bias: the scalar after the last activation.
    """

    h_channel: jax.Array
    i_channel: jax.Array
    i_spatial: jax.Array
    kernel: jax.Array
    rgus: tuple[RGUWeights, RGUWeights]
    mixer: jax.Array
    local_mixer: jax.Array
    local_bias: jax.Array
    bottleneck: Mapping[str, jax.Array]
    output_bias: jax.Array
    bias: jax.Array


@dataclasses.dataclass(frozen=True)
class SFNESettings:
    """What a block is besides its weights; see `SFNEBlock` for each.

    Attributes:
      local: the names of the maps that each local branch convolves.
      make_local_kernels: from the named maps, channels first, to a kernel `(*size, C)` for each
        local branch; in a layer it evaluates the local slow networks, which keep running averages.
      track_local: gives the moments to use after the local mixers, see `batch_standardize`.
      track_output: gives those to use after the bottleneck.
      folded: whether the weights hold what these moments make of them, see `fold`.
    """

    operator: str
    operator_scale: float
    causal: bool
    groups: int
    local: Sequence[str]
    make_local_kernels: Callable[[Mapping[str, jax.Array]], Sequence[jax.Array]]
    axis_name: AxisName = None
    track_local: Track | None = None
    track_output: Track | None = None
    folded: bool = False


def fused_sfne(
    x: jax.Array, skips: Mapping[str, jax.Array], weights: SFNEWeights, settings: SFNESettings
) -> jax.Array:
    """Computes the block before its dropout.

    Args:
      x: `(C, batch, *size)`.
      skips: by their names, `(channels, batch, *size)` with channels that divide C.
      weights: the block's weights.
      settings: its other properties.

    Returns:
      `(λC, batch, *size)`.
    """
    k_hat = x * broadcast_channels(to_channels_first(weights.kernel)[:, None], x)
    f = _standardize(_rgu_pair(x, k_hat, weights.rgus, settings), settings)
    u = _standardize(pointwise(x, weights.mixer), settings)
    h = _gate_channels(x, weights.h_channel, settings)
    operator = hyperzzw.OPERATORS[settings.operator]
    results = operator(k_hat, [f, u, h], causal=settings.causal)
    o, o_u, o_h = (_scale(result, settings.operator_scale) for result in results)
    local = _local_branches({"x": x, "u": u, "h": h}, weights, settings)
    i = _interact(o, x, weights, settings)
    maps = {"local": local, "o": o, "f": f, "o_u": o_u, "s": jax.nn.silu(o), "o_h": o_h, "i": i}
    maps |= skips
    rows = _rows(weights.bottleneck, skips, len(settings.local))
    y = pointwise(
        jnp.concatenate(list(maps.values())), jnp.concatenate([rows[name] for name in maps])
    )
    if settings.folded:
        # The weights hold the moments of the groups of the batch: these are only passed through.
        y = y + broadcast_channels(weights.output_bias, y)
        track = _identity_moments
    else:
        # The output bias is not added: the standardization takes it away.
        track = _track(settings.track_output, weights.output_bias)
    y = standardize_groups(
        y, settings.groups, batch_axis=1, channel_axis=0, cumulative=_cumulative(settings),
        axis_name=settings.axis_name, track=track,
    )  # fmt: skip
    return gelu(y) + broadcast_channels(weights.bias, y)


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
      The weights for `settings` with `folded=True`.
    """
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


def _identity_moments(of_batch: Callable[[], Moments], shape: tuple[int, ...]) -> Moments:
    """Returns moments with which `normalize` changes nothing."""
    dtype = jax.eval_shape(of_batch)[0].dtype
    return jnp.zeros(shape, dtype), jnp.full(shape, 1 - EPSILON, dtype)


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
    channel = hyperzzw.quadratic_form(mean, broadcast_channels(weights.i_channel, mean))
    spatial = hyperzzw.quadratic_form(average(o, (0,)), weights.i_spatial[None, None])
    return x * jax.nn.sigmoid(channel * spatial).astype(x.dtype)


def _local_branches(
    maps: Mapping[str, jax.Array], weights: SFNEWeights, settings: SFNESettings
) -> jax.Array:
    """Computes all local branches, one after the other along the channels."""
    kernels = [to_channels_first(kernel)[:, None] for kernel in settings.make_local_kernels(maps)]
    padding = "causal" if settings.causal else "same"
    sources = [maps[name] for name in settings.local]
    y = convolve_per_map(sources, kernels, padding=padding, correlate=True)
    channels = y.shape[0] // len(kernels)
    branches = y.reshape(len(kernels), channels, *y.shape[1:])
    y = jax.vmap(pointwise)(branches, weights.local_mixer).reshape(y.shape)
    if settings.folded:
        return gelu(y + broadcast_channels(weights.local_bias, y))
    y = standardize(
        y, (1, *_space(y, settings)), cumulative=_cumulative(settings),
        axis_name=settings.axis_name, track=_track(settings.track_local, weights.local_bias),
    )  # fmt: skip
    return gelu(y)


def _track(track: Track | None, bias: jax.Array) -> Track | None:
    """Adapts `track`, for moments of maps with channels last and with their bias, to maps here."""
    if track is None:
        return None

    def tracked(of_batch: Callable[[], Moments], shape: tuple[int, ...]) -> Moments:
        constant = bias.reshape((1,) * (len(shape) - 1) + (-1,))

        def of_formula() -> Moments:
            mean, variance = map(to_channels_last, of_batch())
            return mean + constant.astype(mean.dtype), variance

        mean, variance = track(of_formula, (*shape[1:], shape[0]))
        mean = mean - constant.astype(mean.dtype)
        return to_channels_first(mean), to_channels_first(variance)

    return tracked


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
