"""The slow-fast neural encoding block (SFNE)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.dropout import ChannelDropout
from terminator_jax.layers.interactions import HyperChannelInteraction, HyperInteraction
from terminator_jax.layers.local import LocalBranch, LocalBranches
from terminator_jax.layers.magnet import OMEGA0, evaluate
from terminator_jax.layers.pointwise import pointwise
from terminator_jax.layers.rgu import RGU
from terminator_jax.layers.slow import GlobalSlowNet
from terminator_jax.ops import channel_major, hyperzzw
from terminator_jax.ops.activation import gated
from terminator_jax.ops.joined import Made, joined_product
from terminator_jax.ops.order import stored
from terminator_jax.ops.rematerialize import rematerialized_on_cpu
from terminator_jax.ops.standardize import (
    EPSILON,
    AxisName,
    average,
    moments,
    normalize,
    standardize,
    standardize_groups,
    standardize_maps,
)

BRANCHES = (
    LocalBranch(3, kernel_from="x", applied_to="h"),
    LocalBranch(9, kernel_from="h", applied_to="x"),
    LocalBranch(5, kernel_from="u", applied_to="x"),
    LocalBranch(7, kernel_from="x", applied_to="u"),
)
# What the bottleneck reads, in the release's order; further branches and skips come after.
ORDER = ("o", "l2", "skip1", "f", "o_u", "l1", "s", "l3", "o_h", "l4", "skip2", "i")


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
    """What a block's slow networks give (or the networks) that do not depend on the input.

    Attributes:
      gate: of the hyper-channel interaction, `(C,)`.
      channel: of the hyper interaction, `(C,)`.
      spatial: of the hyper interaction, `(*size,)`.
      hyper: the hyper-kernel, `(*size, C)`.
    """

    gate: Any
    channel: Any
    spatial: Any
    hyper: Any


def bottleneck_order(branches: int, skips: int) -> tuple[str, ...]:
    """Names of the maps that the bottleneck reads, in order.

    Example:
      >>> bottleneck_order(branches=4, skips=1)
      ('o', 'l2', 'skip1', 'f', 'o_u', 'l1', 's', 'l3', 'o_h', 'l4', 'i')
    """
    extra = [f"l{n + 1}" for n in range(branches)] + [f"skip{n + 1}" for n in range(skips)]
    present = {"o", "f", "o_u", "s", "o_h", "i", *extra}
    ordered = [name for name in ORDER if name in present]
    return tuple(ordered + [name for name in extra if name not in ORDER])


class SFNEBlock(nnx.Module):
    """Slow-fast neural encoding block: full-context interaction of a map with itself.

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
      operator: how the hyper-kernel meets a map, one of `terminator_jax.ops.hyperzzw.OPERATORS`.
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
      rngs: the source of the initial values.

    Raises:
      ValueError: for sizes that do not fit.

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
        rngs: nnx.Rngs,
    ):
        hyperzzw.check_operator(operator, size, causal)
        if channels * factor % groups:
            raise ValueError(f"{channels} x {factor} channels do not divide into {groups} groups")
        for skip in skips:
            if channels % skip:
                raise ValueError(f"a skip of {skip} channels cannot be tiled to {channels}")
        self.size, self.channels, self.skips = tuple(size), channels, tuple(skips)
        self.operator, self.operator_scale = operator, operator_scale
        self.causal, self.groups = causal, groups
        self.dtype, self.axis_name = dtype, axis_name
        self.order = bottleneck_order(len(branches), len(skips))
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
            layers=widths.local_layers, omega0=omega0, causal=causal, axis_name=axis_name, **fast,
        )  # fmt: skip
        self.bottleneck = pointwise(len(self.order) * channels, factor * channels, **fast)
        self.bias = nnx.Param(jnp.zeros((), param_dtype))
        self.dropout = ChannelDropout(dropout, axis_name=axis_name)

    def __call__(
        self,
        x: jax.Array,
        skips: Sequence[jax.Array] = (),
        *,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Applies the block.

        Args:
          x: `(batch, *size, C)`.
          skips: earlier maps `(batch, *size, channels)`, as announced to the constructor.
          rngs: with a `dropout` stream; without it nothing is dropped.

        Returns:
          `(batch, *size, λC)`.
        """
        skips = [channel_major.enter(skip) for skip in skips]
        return channel_major.leave(self.channel_major(channel_major.enter(x), skips, rngs=rngs))

    def slow_nets(self) -> SlowKernels:
        """The slow networks that do not depend on the input."""
        interaction = self.hyper_interaction
        gate = self.channel_interaction.channel
        return SlowKernels(gate, interaction.channel, interaction.spatial, self.slow_net)

    def channel_major(
        self,
        x: jax.Array,
        skips: Sequence[jax.Array] = (),
        *,
        kernels: SlowKernels | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """The same of channel-major maps: `(C, batch, *size)` to `(λC, batch, *size)`.

        `kernels` are what `slow_nets()` give, if that is already at hand.
        """
        self._check(x, skips)
        x = x if self.dtype is None else x.astype(self.dtype)
        kernels = kernels or SlowKernels(*evaluate(self.slow_nets()))
        skips = {f"skip{n}": s.astype(x.dtype) for n, s in enumerate(skips, start=1)}
        _, running = channel_major.statistics(x, self.causal)
        y = standardize_groups(
            stored(self._mixed(x, skips, kernels)), self.groups, batch_axis=1,
            channel_axis=0, running=running, axis_name=self.axis_name, activate=True,
        )  # fmt: skip
        return stored(self.dropped(y + channel_major.spread(self.bias[...], y), rngs))

    def dropped(self, y: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """The channel-major result with channels dropped, if there are `rngs`."""
        scale = self.dropout.scale(y.shape[1], y.shape[0], rngs)
        return y if scale is None else y * channel_major.like(scale.T, y)

    def _mixed(self, x: jax.Array, skips: dict[str, jax.Array], kernels: SlowKernels) -> jax.Array:
        """The result before its standardization."""
        hyper = stored(x * channel_major.spread(channel_major.enter(kernels.hyper)[:, None], x))
        f, u = self._projected(x, hyper)
        h = self._gated(x, kernels.gate)
        operator = hyperzzw.operator_named(self.operator)
        results = operator(hyper, [f, u, h], causal=self.causal)
        o, o_u, o_h = (self._scaled(result) for result in results)
        local = self.local.mixed(dict(x=x, u=u, h=h))
        maps = {name: Made(None, (m,)) for name, m in dict(o=o, o_u=o_u, o_h=o_h, f=f).items()}
        maps |= {name: Made(None, (skip,)) for name, skip in skips.items()}
        maps["s"] = Made(gated, (o, o))
        maps["i"] = Made(_interaction, (x, self._exponents(o, kernels)))
        maps["local"] = Made(self.local.activated, (local, self.local.statistics(local)))
        rows = self._rows(skips)
        order = sorted(rows, key=lambda name: (-len(rows[name]), name))
        # Without its bias, which the standardization that follows takes away.
        return joined_product(
            jnp.concatenate([rows[name] for name in order]).astype(x.dtype),
            [maps[name] for name in order],
        )

    def _standardize(self, x: jax.Array, *, activate: bool = False) -> jax.Array:
        """IS."""
        if not (self.causal or activate):
            return standardize_maps(x)
        space, running = channel_major.statistics(x, self.causal)
        return standardize(x, space, running=running, activate=activate)

    def _gated(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """IS of the hyper-channel interaction."""
        space, running = channel_major.statistics(x, self.causal)
        mean, square = moments(x, space, running=running)
        gate = jax.nn.sigmoid(hyperzzw.twice(mean, channel_major.like(kernel, mean)))
        if self.causal:
            return self._standardize(x * gate.astype(x.dtype))
        # One gate per sample and channel: IS(g x) needs no statistics but those of x.
        return normalize(x, mean, square, EPSILON, gate=gate)

    def _scaled(self, x: jax.Array) -> jax.Array:
        return x if self.operator_scale == 1 else x * self.operator_scale

    def _projected(self, x: jax.Array, hyper: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`f` and `u`, from one product of x and one of the hyper-kernel."""
        of_x = channel_major.pointwise(x, *self.rgu1.projections())
        of_hyper = channel_major.pointwise(hyper, *self.rgu2.projections())
        # Without its bias, which would be standardized away.
        u = channel_major.pointwise(x, self.mixer.kernel[...])
        kernel = jnp.concatenate([self.rgu1.y.kernel[...], self.rgu2.y.kernel[...]])
        positions = [rgu.position[...] for rgu in (self.rgu1, self.rgu2)]
        f = rematerialized_on_cpu(self._units)((of_x, of_hyper), positions, kernel)
        return self._standardize(f), self._standardize(u)

    def _units(
        self,
        projections: tuple[jax.Array, jax.Array],
        positions: list[jax.Array],
        kernel: jax.Array,
    ) -> jax.Array:
        """Both recursive gated units, from their projections on.

        The projections come as they were computed, joined, and so no part of them is copied.
        """
        pairs = [jnp.split(projection, 2) for projection in projections]
        activated = [
            self._standardize(k * q, activate=True) + channel_major.spread(position, k)
            for (k, q), position in zip(pairs, positions, strict=True)
        ]
        return channel_major.pointwise(channel_major.gather(activated), kernel)

    def _exponents(self, o: jax.Array, kernels: SlowKernels) -> tuple[jax.Array, jax.Array]:
        """Of the hyper interaction of (o, x): by channel and by position."""
        space, running = channel_major.statistics(o, self.causal)
        mean = average(o, space, running=running)
        channel = hyperzzw.twice(mean, channel_major.like(kernels.channel, mean))
        return channel, hyperzzw.twice(average(o, (0,)), kernels.spatial[None, None])

    def _rows(self, skips: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The bottleneck's weights of each map.

        A tiled map counts once, with the sum of its copies' weights.
        """
        kernels = jnp.split(self.bottleneck.kernel[...], len(self.order))
        rows = dict(zip(self.order, kernels, strict=True))
        branches = [rows.pop(f"l{n + 1}") for n in range(len(self.local.branches))]
        for name, skip in skips.items():
            rows[name] = jnp.sum(rows[name].reshape(-1, len(skip), rows[name].shape[1]), axis=0)
        return rows | {"local": jnp.concatenate(branches)}

    def _check(self, x: jax.Array, skips: Sequence[jax.Array]) -> None:
        expected = [(c, *x.shape[1:2], *self.size) for c in (self.channels, *self.skips)]
        found = [x.shape, *(skip.shape for skip in skips)]
        if found != expected:
            last = [(*shape[1:], shape[0]) for shape in expected], [(*s[1:], *s[:1]) for s in found]
            raise ValueError(f"expected x and skips of shapes {last[0]}, got {last[1]}")


def _interaction(x: jax.Array, exponents: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The hyper interaction: `x` gated by a product of what channels and positions give."""
    channel, spatial = exponents
    return gated(x, channel * spatial)
