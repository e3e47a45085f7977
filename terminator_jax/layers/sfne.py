"""The slow-fast neural encoding block (SFNE): its formula is `SFNEBlock.__call__`."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.dropout import ChannelDropout
from terminator_jax.layers.interactions import HyperChannelInteraction, HyperInteraction
from terminator_jax.layers.local import LocalBranch, LocalBranches
from terminator_jax.layers.magnet import OMEGA0, MAGNet, generate_kernels
from terminator_jax.layers.pointwise import pointwise
from terminator_jax.layers.rgu import RGU
from terminator_jax.layers.running import RunningMoments
from terminator_jax.layers.slow import GlobalSlowNet
from terminator_jax.ops import fused_sfne, hyperzzw
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.channels_first import spatial_axes, to_channels_first, to_channels_last
from terminator_jax.ops.dtypes import at_least_float32, floating
from terminator_jax.ops.fused_sfne import SFNESettings, SFNEWeights
from terminator_jax.ops.standardize import (
    AxisName,
    Moments,
    group_moments,
    instance_standardize,
    moments,
    normalize,
    normalize_groups,
)

# XLA's own convolution has derivatives of every kind and order.
REFERENCE_CONVOLUTION = "lax"
IMPLEMENTATIONS = ("auto", "reference", "fused")
BRANCHES = (
    LocalBranch(3, kernel_from="x", applied_to="h"),
    LocalBranch(9, kernel_from="h", applied_to="x"),
    LocalBranch(5, kernel_from="u", applied_to="x"),
    LocalBranch(7, kernel_from="x", applied_to="u"),
)
# What the bottleneck reads, in the release's order; further branches and skips come after.
# `fused_weights` cuts the bottleneck's weights by it, and the fused block takes them by name.
CONCAT_ORDER = ("o", "l2", "skip1", "f", "o_u", "l1", "s", "l3", "o_h", "l4", "skip2", "i")


@dataclasses.dataclass(frozen=True)
class SlowWidths:
    """Widths (`hidden`) and depths (`layers`) of a block's slow networks."""

    global_hidden: int = 64
    global_layers: int = 2
    local_hidden: int = 32
    local_layers: int = 2
    channel_hidden: int = 32
    channel_layers: int = 2
    interaction_channel_hidden: int = 16
    interaction_spatial_hidden: int = 64
    interaction_layers: int = 2


class SlowKernels(NamedTuple):
    """Holds the kernels of the slow networks that do not read the input.

    Attributes:
      k_h: of the hyper-channel interaction, which makes the map h, `(C,)`.
      k_c: of the hyper interaction, which makes the map i, `(C,)`.
      k_s: of the same, `(*size,)`.
      hyper_kernel: K, `(*size, C)`.
    """

    k_h: jax.Array
    k_c: jax.Array
    k_s: jax.Array
    hyper_kernel: jax.Array


def concat_order(branches: int, skips: int) -> tuple[str, ...]:
    """Lists the maps that the bottleneck reads, in order.

    Example:
      >>> concat_order(branches=4, skips=1)
      ('o', 'l2', 'skip1', 'f', 'o_u', 'l1', 's', 'l3', 'o_h', 'l4', 'i')
    """
    extra = [f"l{n + 1}" for n in range(branches)] + [f"skip{n + 1}" for n in range(skips)]
    present = {"o", "f", "o_u", "s", "o_h", "i", *extra}
    ordered = [name for name in CONCAT_ORDER if name in present]
    return tuple(ordered + [name for name in extra if name not in CONCAT_ORDER])


class SFNEBlock(nnx.Module):
    """Mixes the full context of a map with itself: the slow-fast neural encoding block.

    A slow network generates a hyper-kernel as large as the map; the map times it is multiplied
    with three transformed versions of the map, four local branches add small context-dependent
    kernels, and a bottleneck mixes them all.

    Example:
      >>> block = SFNEBlock((8, 8), 12, factor=2, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 24)

    Args:
      size: the map's positions per axis.
      channels: C, channels of the input.
      factor: λ, the output has λC channels.
      skips: channels of each skip input; each divides C and is tiled to it.
      branches: the local branches (sizes and sources), one or more.
      operator: the product of hyper-kernel and map, one of `terminator_jax.ops.hyperzzw.OPERATORS`.
      widths: sizes of the slow networks.
      operator_scale: what the operator's results are multiplied with, see `Terminator.resized`.
      causal: for sequences: no result depends on a later position. Kernels reach back only, means
        and standardizations are those of the positions so far.
      groups: groups of the standardization after the bottleneck; they divide λC.
      dropout: probability of dropping a channel of the output.
      omega0: frequency scale of the slow networks.
      dtype: dtype of the computation; statistics, phases and kernels stay in float32 or wider.
      param_dtype: dtype of the parameters.
      axis_name: the mapped axis over which the batch is split, if any.
      implementation: `"reference"` is the formula as it is written, `"fused"` the same result in
        fewer operations, `"auto"` is fused. The fused one has gradients but no forward mode:
        `jax.jvp`, `jax.hessian` and `jax.linearize` need `"reference"`.
      use_running_average: whether what depends on the batch, its statistics and the local kernels,
        is taken from the averages of training; `train()` and `eval()` set it.
      deterministic: whether nothing is dropped; `train()` and `eval()` set it.
      rngs: the source of the initial values.

    Raises:
      ValueError: for sizes that do not fit, or an unknown implementation; in evaluation, if no
        batch was averaged.

    Source: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024, and its public release.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        channels: int,
        factor: int,
        *,
        skips: Sequence[int] = (),
        branches: Sequence[LocalBranch] = BRANCHES,
        operator: str = "dot",
        operator_scale: float = 1.0,
        causal: bool = False,
        widths: SlowWidths = SlowWidths(),
        groups: int = 12,
        dropout: float = 0.0,
        omega0: float = OMEGA0,
        dtype=None,
        param_dtype=jnp.float32,
        axis_name: AxisName = None,
        implementation: str = "auto",
        use_running_average: bool = False,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation {implementation!r} is not one of {IMPLEMENTATIONS}")
        hyperzzw.check_operator(operator, size, causal)
        if channels * factor % groups:
            raise ValueError(f"{channels} x {factor} channels do not divide into {groups} groups")
        for skip in skips:
            if channels % skip:
                raise ValueError(f"a skip of {skip} channels cannot be tiled to {channels}")
        self.size, self.channels, self.skips = tuple(size), channels, tuple(skips)
        self.operator, self.operator_scale = operator, operator_scale
        self.causal, self.groups = causal, groups
        self.dtype, self.axis_name, self.implementation = dtype, axis_name, implementation
        self.concat_order = concat_order(len(branches), len(skips))
        slow = dict(omega0=omega0, param_dtype=param_dtype, rngs=rngs)
        fast = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.slow_net = GlobalSlowNet(
            size, channels, hidden=widths.global_hidden, layers=widths.global_layers, **slow
        )
        self.rgu1 = RGU(size, channels, causal=causal, **fast)
        self.rgu2 = RGU(size, channels, causal=causal, **fast)
        self.mixer = pointwise(channels, channels, **fast)
        self.channel_interaction = HyperChannelInteraction(
            channels, hidden=widths.channel_hidden, layers=widths.channel_layers, causal=causal,
            **slow,
        )  # fmt: skip
        self.hyper_interaction = HyperInteraction(
            size, channels, layers=widths.interaction_layers,
            channel_hidden=widths.interaction_channel_hidden,
            spatial_hidden=widths.interaction_spatial_hidden, causal=causal, **slow,
        )  # fmt: skip
        self.local = LocalBranches(
            branches, channels, ndim=len(size), hidden=widths.local_hidden,
            layers=widths.local_layers, omega0=omega0, causal=causal, axis_name=axis_name,
            length=size[0] if causal else None, use_running_average=use_running_average, **fast,
        )  # fmt: skip
        self.bottleneck = pointwise(len(self.concat_order) * channels, factor * channels, **fast)
        self.bias = nnx.Param(jnp.zeros((), param_dtype))  # added after the activation
        self.averages = RunningMoments(
            (*size, factor * channels) if causal else (factor * channels,),
            at_least_float32(param_dtype), axis_name=axis_name,
            use_running_average=use_running_average,
        )  # fmt: skip
        self.dropout = ChannelDropout(dropout, axis_name=axis_name, deterministic=deterministic)

    def __call__(
        self,
        x: jax.Array,
        skips: Sequence[jax.Array] = (),
        *,
        kernels: SlowKernels | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Applies the block.

        K, k_h, k_c and k_s are kernels of slow networks, ∘ is the operator, ⊙ the elementwise
        product, σ the sigmoid, IS and G-IBS are standardizations, and m(·) is a mean, over space
        or over channels:

            K̂ = x ⊙ K
            f = IS(RGU₂(K̂) + RGU₁(x))
            u = IS(W x)
            h = IS(x ⊙ σ(m_space(x) ⊙ k_h ⊙ m_space(x)))
            o, o_u, o_h = K̂ ∘ f, K̂ ∘ u, K̂ ∘ h
            s = SiLU(o)
            i = x ⊙ σ((m_channels(o) ⊙ k_s ⊙ m_channels(o)) (m_space(o) ⊙ k_c ⊙ m_space(o)))
            l1, l2 … = the local branches of x, u and h
            out = GELU(G-IBS(W_b [o, f, o_u, s, o_h, i, l1 …, skips] + b)) + bias

        The order in the brackets is `concat_order`. Dropout comes last.

        Args:
          x: `(batch, *size, C)`.
          skips: earlier maps `(batch, *size, channels)`, as announced to the constructor.
          kernels: the outputs of `slow_nets()`, if they are already known.
          rngs: with a `dropout` stream; without it, or after `eval()`, nothing is dropped.

        Returns:
          `(batch, *size, λC)`.
        """
        self._check(x, skips)
        x, skips, kernels = floating((x, list(skips), kernels))
        x, *skips = (a if self.dtype is None else a.astype(self.dtype) for a in (x, *skips))
        if kernels is None:
            nets = self.slow_nets()
            found = generate_kernels(list(nets.values()))
            kernels = SlowKernels(**dict(zip(nets, found, strict=True)))
        if self.implementation != "reference":
            return self._fused(x, skips, kernels, rngs)

        k_hat = x * kernels.hyper_kernel.astype(x.dtype)[None]
        f = self._standardize(self.rgu2(k_hat) + self.rgu1(x))
        u = self._standardize(self.mixer(x))
        h = self._standardize(self.channel_interaction(x, kernels.k_h))
        o, o_u, o_h = (self._operate(k_hat, z) for z in (f, u, h))
        s = jax.nn.silu(o)
        i = self.hyper_interaction(o, x, kernels.k_c, kernels.k_s)
        local = self.local(dict(x=x, u=u, h=h), method=REFERENCE_CONVOLUTION)

        maps = dict(o=o, f=f, o_u=o_u, s=s, o_h=o_h, i=i)
        maps |= {f"l{n}": y for n, y in enumerate(local, start=1)}
        maps |= {f"skip{n}": self._tile(skip) for n, skip in enumerate(skips, start=1)}
        y = self.bottleneck(jnp.concatenate([maps[name] for name in self.concat_order], axis=-1))
        found = group_moments(y, causal=self.causal, axis_name=self.averages.reduced_axis)
        y = normalize_groups(y, found._replace(batch=self.averages(found.batch)), self.groups)
        return self.dropout(gelu(y) + self.bias[...].astype(y.dtype), rngs=rngs)

    def slow_nets(self) -> dict[str, MAGNet]:
        """Returns the slow networks that do not read the input, by the names in `SlowKernels`."""
        interaction = self.hyper_interaction
        return dict(
            k_h=self.channel_interaction.channel, k_c=interaction.channel,
            k_s=interaction.spatial, hyper_kernel=self.slow_net,
        )  # fmt: skip

    def _standardize(self, x: jax.Array) -> jax.Array:
        return instance_standardize(x, causal=self.causal)

    def _operate(self, k_hat: jax.Array, z: jax.Array) -> jax.Array:
        result = hyperzzw.operate(
            self.operator, k_hat, z, causal=self.causal, method=REFERENCE_CONVOLUTION
        )
        return result if self.operator_scale == 1 else self.operator_scale * result

    def _tile(self, skip: jax.Array) -> jax.Array:
        repeats = self.channels // skip.shape[-1]
        return jnp.tile(skip, (1,) * (skip.ndim - 1) + (repeats,))

    def _fused(
        self,
        x: jax.Array,
        skips: Sequence[jax.Array],
        kernels: SlowKernels,
        rngs: nnx.Rngs | None,
    ) -> jax.Array:
        """Computes the formula of `__call__` in fewer operations, see `ops/fused_sfne.py`."""
        weights, settings = fused_weights(self, kernels), fused_settings(self)
        maps = fused_sfne.global_maps(to_channels_first(x), weights, settings)
        y = fused_sfne.mix_local(maps, self._local_kernels(maps), weights, settings)
        axes = (1,) if self.causal else (1, *spatial_axes(y))
        averages, cumulative = self.local.averages, 2 if self.causal else None
        found = moments(y, axes, cumulative=cumulative, axis_name=averages.reduced_axis)
        local = gelu(normalize(y, *_averaged(averages, found, weights.local_bias)))

        first = {f"skip{n}": to_channels_first(skip) for n, skip in enumerate(skips, start=1)}
        y = fused_sfne.mix(maps, local, first, weights)
        found = group_moments(
            y, batch_axis=1, channel_axis=0, causal=self.causal,
            axis_name=self.averages.reduced_axis,
        )  # fmt: skip
        batch = _averaged(self.averages, found.batch, weights.output_bias)
        y = normalize_groups(y, found._replace(batch=batch), self.groups, channel_axis=0)
        y = fused_sfne.activate(y, weights)
        # With channels last the mask would keep XLA from joining this block's last transposition
        # with the next block's first: a training step on a CPU would take 1.25 times as long.
        return to_channels_last(self.dropout(y, rngs=rngs, channels_first=True))

    def _local_kernels(self, maps: dict[str, jax.Array]) -> list[jax.Array]:
        """Generates the kernels of the local branches from maps with their channels first."""
        names = [branch.kernel_from for branch in self.local.branches]
        means = {n: to_channels_last(jnp.mean(maps[n], axis=1)) for n in dict.fromkeys(names)}
        return self.local.kernels(self.local.slow_nets.pool([means[name] for name in names]))

    def _check(self, x: jax.Array, skips: Sequence[jax.Array]) -> None:
        expected = [(*x.shape[:1], *self.size, c) for c in (self.channels, *self.skips)]
        found = [x.shape, *(skip.shape for skip in skips)]
        if found != expected:
            raise ValueError(f"expected x and skips of shapes {expected}, got {found}")


def _averaged(averages: RunningMoments, found: Moments, bias: jax.Array) -> Moments:
    """Puts running averages in the place of moments of a map with its channels first.

    The averages are those of the formula's map, to which its bias is added.
    """
    mean, var = map(to_channels_last, found)
    bias = bias.astype(mean.dtype).reshape((1,) * (mean.ndim - 1) + (-1,))
    mean, var = averages(Moments(mean + bias, var))
    return Moments(to_channels_first(mean - bias), to_channels_first(var))


def fused_weights(block: SFNEBlock, kernels: SlowKernels) -> SFNEWeights:
    """Returns a block's weights as `ops.fused_sfne` takes them."""
    rows = jnp.split(block.bottleneck.kernel[...], len(block.concat_order))
    bottleneck = dict(zip(block.concat_order, rows, strict=True))
    scalars = enumerate(block.local.scalar[...], start=1)
    constants = [scalar * jnp.sum(bottleneck[f"l{n}"], axis=0) for n, scalar in scalars]
    return SFNEWeights(
        **kernels._asdict(),
        rgus=(block.rgu1.fused_weights(), block.rgu2.fused_weights()),
        mixer=block.mixer.kernel[...], local_mixer=block.local.mixer_weight[...],
        local_bias=block.local.mixer_bias[...].reshape(-1), bottleneck=bottleneck,
        output_bias=sum(constants, block.bottleneck.bias[...]), bias=block.bias[...],
    )  # fmt: skip


def fused_settings(block: SFNEBlock) -> SFNESettings:
    """Returns what else `ops.fused_sfne` needs of a block."""
    return SFNESettings(
        block.operator, block.operator_scale, block.causal, block.groups,
        local=tuple(branch.applied_to for branch in block.local.branches),
    )  # fmt: skip
