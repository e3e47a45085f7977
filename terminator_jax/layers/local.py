"""Local HyperZZW: maps convolved with small kernels that another map generates."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.initializers import kaiming
from terminator_jax.layers.slow import LocalSlowNets
from terminator_jax.ops import channel_major
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.convolution import convolve_each, fft_conv
from terminator_jax.ops.standardize import (
    EPSILON,
    AxisName,
    across,
    batch_standardize,
    moments,
    normalize,
)


@dataclasses.dataclass(frozen=True)
class LocalBranch:
    """One local branch: its kernel's size, the map the kernel is made from, the map it meets."""

    size: int
    kernel_from: str
    applied_to: str


class LocalBranches(nnx.Module):
    """Local branches: depthwise correlation → pointwise C→C → BS → GELU → + one scalar.

    Example:
      >>> layer = LocalBranches([LocalBranch(3, "x", "h")], 12, rngs=nnx.Rngs(0))
      >>> [out] = layer({"x": jnp.ones((2, 8, 8, 12)), "h": jnp.ones((2, 8, 8, 12))})
      >>> out.shape
      (2, 8, 8, 12)

    Args:
      branches: sizes and sources.
      channels: channels of every map.
      ndim: spatial axes of the maps.
      hidden: width of the slow networks.
      layers: hidden layers of the slow networks.
      omega0: frequency scale of the slow networks.
      causal: for sequences: kernels reach back only, and statistics are those of the positions so
        far.
      dtype: dtype of the computation; statistics and kernels stay in float32 or wider.
      param_dtype: dtype of the parameters.
      axis_name: the mapped axis over which the batch is split, if any.
      rngs: the source of the initial values.
    """

    def __init__(
        self,
        branches: Sequence[LocalBranch],
        channels: int,
        *,
        ndim: int = 2,
        hidden: int = 32,
        layers: int = 2,
        omega0: float = 2000.0,
        causal: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        axis_name: AxisName = None,
        rngs: nnx.Rngs,
    ):
        self.branches, self.causal = tuple(branches), causal
        self.dtype, self.axis_name = dtype, axis_name
        self.slow_nets = LocalSlowNets(
            [b.size for b in branches], channels, ndim=ndim, hidden=hidden, layers=layers,
            omega0=omega0, causal=causal, param_dtype=param_dtype, axis_name=axis_name, rngs=rngs,
        )  # fmt: skip
        n = len(self.branches)
        keys = jax.random.split(rngs.params(), n)
        self.mixer_weight = nnx.Param(
            jnp.stack([kaiming(key, (channels, channels), param_dtype) for key in keys])
        )
        self.mixer_bias = nnx.Param(jnp.zeros((n, channels), param_dtype))
        self.scalar = nnx.Param(jnp.zeros(n, param_dtype))

    def __call__(self, maps: Mapping[str, jax.Array]) -> list[jax.Array]:
        """One `(batch, *spatial, channels)` map per branch, from the named maps."""
        kernels = self.slow_nets([maps[b.kernel_from] for b in self.branches])
        return [
            self._branch(n, maps[b.applied_to], self.slow_nets.crop(kernels, n))
            for n, b in enumerate(self.branches)
        ]

    def _branch(self, n: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = fft_conv(x, kernel, correlate=True, padding=self._padding)
        weight, bias, scalar = (
            p[n].astype(y.dtype) for p in (self.mixer_weight, self.mixer_bias, self.scalar)
        )
        y = y @ weight + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        y = batch_standardize(y, causal=self.causal, axis_name=self.axis_name)
        return gelu(y) + scalar

    @property
    def _padding(self) -> str:
        return "causal" if self.causal else "same"

    def mixed(self, maps: Mapping[str, jax.Array]) -> jax.Array:
        """Channel-major, `(channels, batch, *spatial)`: the maps before `activated`, joined.

        All branches are computed together: a quarter of the operations to compile.
        """
        means = {b.kernel_from: jnp.mean(maps[b.kernel_from], axis=1) for b in self.branches}
        kernels = self.slow_nets.from_mean(
            [jnp.moveaxis(means[b.kernel_from], 0, -1) for b in self.branches]
        )
        y = convolve_each(
            [maps[b.applied_to] for b in self.branches],
            [
                channel_major.enter(self.slow_nets.crop(kernels, n))[:, None]
                for n in range(len(self.branches))
            ],
            padding=self._padding,
            correlate=True,
        )
        return self._mixed(y)

    def statistics(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the joined maps, for `activated`: the moments of BS."""
        space, running = channel_major.statistics(y, self.causal)
        return across(moments(y, (1, *space), running=running), self.axis_name)

    @staticmethod
    def activated(y: jax.Array, statistics: tuple[jax.Array, jax.Array]) -> jax.Array:
        """BS and GELU, without each branch's scalar: the same everywhere.

        What follows in a block, a linear map and a standardization over space, takes that away.
        """
        return normalize(y, *statistics, EPSILON, activate=True)

    def _mixed(self, y: jax.Array) -> jax.Array:
        """Each branch's map, one after the other along the channels, through its own mixer.

        Without the mixers' biases, which the standardization that follows takes away.
        """
        n = len(self.branches)
        weight, y = channel_major.vary_alike(self.mixer_weight[...].astype(y.dtype), y)
        each = channel_major.positions(y.reshape(n, len(y) // n, *y.shape[1:]), axis=2)
        return jax.vmap(channel_major.product)(weight, each).reshape(y.shape)
