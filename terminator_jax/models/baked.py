"""A trained Terminator with constants in the place of its slow networks, for inference."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.running import is_calibrated
from terminator_jax.layers.sfne import SFNEBlock, SlowKernels, fused_settings, fused_weights
from terminator_jax.models.terminator import Terminator
from terminator_jax.ops import fused_sfne
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.channels_first import (
    broadcast_channels,
    standardize_space,
    to_channels_first,
    to_channels_last,
)
from terminator_jax.ops.dtypes import floating
from terminator_jax.ops.fused_sfne import RGUWeights, SFNEWeights, fold, sum_copies
from terminator_jax.ops.standardize import Moments, batch_groups


class BakedSFNEBlock(nnx.Module):
    """Computes what an `SFNEBlock` computes after `eval()`, with constant kernels.

    Args:
      block: the block, with running averages; not causal.
      kernels: what its slow networks give.
    """

    def __init__(self, block: SFNEBlock, kernels: SlowKernels):
        self.dtype = block.dtype
        channels = {f"skip{n}": c for n, c in enumerate(block.skips, start=1)}
        self.skips = tuple(channels)  # names, in the order of the arguments
        nets = block.local.slow_nets
        kernels_of_all = nets.kernels(block.local.context.mean[...])
        self.local_kernels = nnx.List(
            nnx.Param(nets.crop(kernels_of_all, n)) for n in range(len(nets.sizes))
        )
        self.settings = fused_settings(block)
        local, output = (
            Moments(averages.mean[...], averages.var[...])
            for averages in (block.local.averages, block.averages)
        )
        weights = fold(fused_weights(block, kernels), self.settings, local, output)
        # A skip that is tiled to more channels is multiplied by the sum of its copies' weights.
        tiled = {name: sum_copies(weights.bottleneck[name], c) for name, c in channels.items()}
        weights = weights._replace(bottleneck={**weights.bottleneck, **tiled})
        rgus = weights.rgus
        self.rgus = nnx.data([_params(rgu._asdict()) for rgu in rgus])
        self.bottleneck = nnx.data(_params(weights.bottleneck))
        rest = {k: v for k, v in weights._asdict().items() if k not in ("rgus", "bottleneck")}
        self.weights = nnx.data(_params(rest))

    def __call__(
        self,
        x: jax.Array,
        skips: Sequence[jax.Array] = (),
        *,
        kernels: SlowKernels | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Applies the block: `(batch, *size, C)` to `(batch, *size, λC)`; nothing is dropped."""
        del kernels, rngs
        x, skips = floating((x, list(skips)))
        if self.dtype is not None:
            x, *skips = (a.astype(self.dtype) for a in (x, *skips))
        first = dict(zip(self.skips, map(to_channels_first, skips), strict=True))
        weights = SFNEWeights(
            rgus=tuple(RGUWeights(**_values(rgu)) for rgu in self.rgus),
            bottleneck=_values(self.bottleneck), **_values(self.weights),
        )  # fmt: skip
        maps = fused_sfne.global_maps(to_channels_first(x), weights, self.settings)
        kernels = [kernel[...] for kernel in self.local_kernels]
        y = fused_sfne.mix_local(maps, kernels, weights, self.settings)
        local = gelu(y + broadcast_channels(weights.local_bias, y))
        y = fused_sfne.mix(maps, local, first, weights)
        y = y + broadcast_channels(weights.output_bias, y)
        # The weights hold the moments of the groups of the batch: only the samples' are left.
        by_batch = batch_groups(len(y), self.settings.groups).reshape(-1, *[1] * (y.ndim - 1))
        y = jnp.where(by_batch, y, standardize_space(y))
        return to_channels_last(fused_sfne.activate(y, weights))


class BakedTerminator(Terminator):
    """Computes what a trained Terminator computes, without slow networks; made by `bake`.

    It is called like the model that it was made of, and gives the same logits as that after
    `eval()`. It holds no slow networks, and cannot be trained or resized.
    """

    def __init__(self, model: Terminator):
        self.config, self.dtype = model.config, model.dtype
        self.axis_name, self.remat, self.implementation = None, False, model.implementation
        self.blocks = nnx.List(
            BakedSFNEBlock(block, kernels)
            for block, kernels in zip(model.blocks, model._slow_kernels(), strict=True)
        )
        self.head = nnx.clone(model.head)

    def _slow_kernels(self) -> list[SlowKernels]:
        """Returns the constants that the slow networks of every block gave."""
        return [
            SlowKernels(*(block.weights[name][...] for name in SlowKernels._fields))
            for block in self.blocks
        ]

    def resized(self, size: tuple[int, ...]):
        """Raises ValueError: constants have one size."""
        raise ValueError(
            f"a baked model has one size, {self.config.size}, and cannot become {tuple(size)}: "
            "resize the model that it was made of, and bake that"
        )

    def bake(self) -> "BakedTerminator":
        """Returns the model itself."""
        return self


def bake(model: Terminator) -> BakedTerminator:
    """Makes the inference model of a Terminator; see `Terminator.bake`."""
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise ValueError(
            "a model is baked outside of jax.jit: bake it first, and call what that gives"
        )
    if model.config.causal:
        raise ValueError("a causal model cannot be baked: its statistics change along a sequence")
    if not is_calibrated(model):
        raise ValueError(
            "the model has no running averages: train it, or call terminator_jax.calibrate(model, "
            "batches) first"
        )
    with jax.default_matmul_precision("highest"):
        return nnx.jit(BakedTerminator)(model)


def _params(arrays: dict[str, jax.Array]) -> dict[str, nnx.Param]:
    return {name: nnx.Param(array) for name, array in arrays.items()}


def _values(params: dict[str, nnx.Param]) -> dict[str, jax.Array]:
    return {name: param[...] for name, param in params.items()}
