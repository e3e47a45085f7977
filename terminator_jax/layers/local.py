"""Local HyperZZW: maps convolved with small kernels that another map generates."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.initializers import kaiming_normal
from terminator_jax.layers.running import RunningMean, RunningMoments
from terminator_jax.layers.slow import LocalSlowNets
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.conv import fft_conv
from terminator_jax.ops.dtypes import at_least_float32, floating
from terminator_jax.ops.standardize import AxisName, across, batch_moments, normalize


@dataclasses.dataclass(frozen=True)
class LocalBranch:
    """One local branch: its kernel's size, the map that makes it, the map it convolves."""

    size: int
    kernel_from: str
    applied_to: str


class LocalBranches(nnx.Module):
    """Computes the local branches: depthwise correlation → pointwise → BS → GELU → + one scalar.

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
      length: positions of the maps; for causal statistics, which each position has its own of.
      use_running_average: whether kernels and statistics are those of the averages of training
        rather than of the batch; `train()` and `eval()` set it.
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
        length: int | None = None,
        use_running_average: bool = False,
        rngs: nnx.Rngs,
    ):
        if causal and length is None:
            raise ValueError("causal branches need the length of the sequences")
        self.branches, self.causal = tuple(branches), causal
        self.dtype, self.axis_name = dtype, axis_name
        self.slow_nets = LocalSlowNets(
            [b.size for b in branches], channels, ndim=ndim, hidden=hidden, layers=layers,
            omega0=omega0, causal=causal, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        running = dict(axis_name=axis_name, use_running_average=use_running_average)
        self.context = RunningMean(
            self.slow_nets.context_shape, self.slow_nets.context_dtype, **running
        )
        n = len(self.branches)
        keys = jax.random.split(rngs.params(), n)
        self.mixer_weight = nnx.Param(
            jnp.stack([kaiming_normal(key, (channels, channels), param_dtype) for key in keys])
        )
        self.mixer_bias = nnx.Param(jnp.zeros((n, channels), param_dtype))
        self.scalar = nnx.Param(jnp.zeros(n, param_dtype))
        self.averages = RunningMoments(
            (length, n * channels) if causal else (n * channels,), at_least_float32(param_dtype),
            **running,
        )  # fmt: skip

    def __call__(self, maps: Mapping[str, jax.Array], *, method: str = "auto") -> list[jax.Array]:
        """Computes one `(batch, *spatial, channels)` map per branch.

        Args:
          maps: `(batch, *spatial, channels)` by their names.
          method: of the convolutions, see `fft_conv`: forward mode needs `lax` or `dense`.
        """
        maps = floating(dict(maps))
        kernels = self.kernels(
            self.slow_nets.contexts([maps[b.kernel_from] for b in self.branches])
        )
        y = [
            self._mix(n, maps[b.applied_to], kernel, method)
            for n, (b, kernel) in enumerate(zip(self.branches, kernels, strict=True))
        ]
        # Standardized together, which is the same: every channel has statistics of its own.
        y = jnp.concatenate(y, axis=-1)
        moments = batch_moments(y, causal=self.causal, axis_name=self.averages.reduced_axis)
        y = gelu(normalize(y, *self.averages(moments)))
        outputs = jnp.split(y, len(self.branches), axis=-1)
        return [out + self.scalar[n].astype(out.dtype) for n, out in enumerate(outputs)]

    def _mix(self, n: int, x: jax.Array, kernel: jax.Array, method: str) -> jax.Array:
        """Convolves a map and mixes its channels."""
        padding = "causal" if self.causal else "same"
        y = fft_conv(x, kernel, correlate=True, padding=padding, method=method)
        weight, bias = (p[n].astype(y.dtype) for p in (self.mixer_weight, self.mixer_bias))
        return y @ weight + bias.reshape((1,) * (y.ndim - 1) + (-1,))

    def kernels(self, contexts: jax.Array) -> list[jax.Array]:
        """Generates the kernel `(size, …, size, channels)` of each branch.

        Args:
          contexts: of this device's batch, see `LocalSlowNets`. In evaluation their averages take
            their place.
        """
        contexts = self.context(across(contexts, self.context.reduced_axis))
        kernels = self.slow_nets.kernels(contexts)
        return [self.slow_nets.crop(kernels, n) for n in range(len(self.branches))]
