"""The slow-fast neural encoding block (SFNE): its formula is `SFNEBlock.__call__`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.dropout import ChannelDropout
from terminator_jax.layers.interactions import HyperChannelInteraction, HyperInteraction
from terminator_jax.layers.local import LocalBranch, LocalBranches
from terminator_jax.layers.magnet import OMEGA0, generate_kernels
from terminator_jax.layers.pointwise import pointwise
from terminator_jax.layers.rgu import RGU
from terminator_jax.layers.running import moments_of
from terminator_jax.layers.slow import GlobalSlowNet
from terminator_jax.ops import hyperzzw
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.channels_first import to_channels_first, to_channels_last
from terminator_jax.ops.dtypes import at_least_float32
from terminator_jax.ops.fused_sfne import SFNESettings, SFNEWeights, fused_sfne
from terminator_jax.ops.standardize import AxisName, group_standardize, instance_standardize

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
    """Holds, for each slow network that does not read the input, its kernel.

    Where all networks of a model are evaluated together, it holds the networks themselves first.

    Attributes:
      h_channel: of the hyper-channel interaction, which makes the map h, `(C,)`.
      i_channel: of the hyper interaction, which makes the map i, `(C,)`.
      i_spatial: of the same, `(*size,)`.
      kernel: the hyper-kernel K, `(*size, C)`.
    """

    h_channel: Any
    i_channel: Any
    i_spatial: Any
    kernel: Any


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
      rngs: the source of the initial values.

    Raises:
      ValueError: for sizes that do not fit, or an unknown implementation.

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
        self.averages = moments_of(
            (*size, factor * channels) if causal else (factor * channels,),
            at_least_float32(param_dtype), use_running_average=use_running_average,
        )  # fmt: skip
        self.dropout = ChannelDropout(dropout, axis_name=axis_name)

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
          kernels: what the networks of `slow_nets()` give, if that is already at hand.
          rngs: with a `dropout` stream; without it nothing is dropped.

        Returns:
          `(batch, *size, λC)`.
        """
        self._check(x, skips)
        x, *skips = (a if self.dtype is None else a.astype(self.dtype) for a in (x, *skips))
        kernels = kernels or SlowKernels(*generate_kernels(self.slow_nets()))
        if self.implementation != "reference":
            return self._fused(x, skips, kernels, rngs)

        k_hat = x * kernels.kernel.astype(x.dtype)[None]
        f = self._standardize(self.rgu2(k_hat) + self.rgu1(x))
        u = self._standardize(self.mixer(x))
        h = self._standardize(self.channel_interaction(x, kernels.h_channel))
        o, o_u, o_h = (self._operate(k_hat, z) for z in (f, u, h))
        s = jax.nn.silu(o)
        i = self.hyper_interaction(o, x, kernels.i_channel, kernels.i_spatial)
        local = self.local(dict(x=x, u=u, h=h), method=REFERENCE_CONVOLUTION)

        maps = dict(o=o, f=f, o_u=o_u, s=s, o_h=o_h, i=i)
        maps |= {f"l{n}": y for n, y in enumerate(local, start=1)}
        maps |= {f"skip{n}": self._tile(skip) for n, skip in enumerate(skips, start=1)}
        y = self.bottleneck(jnp.concatenate([maps[name] for name in self.concat_order], axis=-1))
        y = group_standardize(
            y, groups=self.groups, causal=self.causal, axis_name=self.axis_name,
            track=self.averages.track,
        )  # fmt: skip
        return self.dropout(gelu(y) + self.bias[...].astype(y.dtype), rngs=rngs)

    def slow_nets(self) -> SlowKernels:
        """Returns the slow networks that do not depend on the input."""
        interaction = self.hyper_interaction
        return SlowKernels(
            h_channel=self.channel_interaction.channel, i_channel=interaction.channel,
            i_spatial=interaction.spatial, kernel=self.slow_net,
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
        """Computes the formula of `__call__` in fewer operations.

        `fused_sfne` calls the local slow networks with the maps that they read. In training this
        also updates their running averages.
        """
        first = {f"skip{n}": to_channels_first(skip) for n, skip in enumerate(skips, start=1)}
        weights, settings = fused_weights(self, kernels), fused_settings(self)
        y = fused_sfne(to_channels_first(x), first, weights, settings)
        # With channels last the mask would keep XLA from joining this block's last transposition
        # with the next block's first: a training step on a CPU would take 1.25 times as long.
        return to_channels_last(self.dropout(y, rngs=rngs, channels_first=True))

    def _check(self, x: jax.Array, skips: Sequence[jax.Array]) -> None:
        expected = [(*x.shape[:1], *self.size, c) for c in (self.channels, *self.skips)]
        found = [x.shape, *(skip.shape for skip in skips)]
        if found != expected:
            raise ValueError(f"expected x and skips of shapes {expected}, got {found}")


def fused_weights(block: SFNEBlock, kernels: SlowKernels) -> SFNEWeights:
    """Returns a block's weights as `fused_sfne` takes them."""
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
    """Returns what else `fused_sfne` needs of a block."""
    return SFNESettings(
        block.operator, block.operator_scale, block.causal, block.groups,
        local=tuple(branch.applied_to for branch in block.local.branches),
        make_local_kernels=block.local.kernels, axis_name=block.axis_name,
        track_local=block.local.averages.track,
        track_output=block.averages.track,
    )  # fmt: skip
