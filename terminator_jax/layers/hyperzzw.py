"""HyperZ·Z·W as layers: each owns the slow network that makes its hyper-kernel."""

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.magnet import OMEGA0
from terminator_jax.layers.running import RunningMean
from terminator_jax.layers.slow import GlobalSlowNet, LocalSlowNet
from terminator_jax.ops.channels_first import to_channels_first, to_channels_last
from terminator_jax.ops.conv import fft_conv
from terminator_jax.ops.dtypes import floating
from terminator_jax.ops.hyperzzw import check_operator, operator_named
from terminator_jax.ops.standardize import AxisName, across


class GlobalHyperZZW(nnx.Module):
    """Mixes two maps over their full context: `K̂ = x ⊙ K`, then `K̂ ∘ u`.

    K is the hyper-kernel of a global slow network, as large as the map. With the operator
    `convolution` the layer has gradients but no forward mode, `jax.jvp` and `jax.linearize`.

    Example:
      >>> layer = GlobalHyperZZW((8, 8), 12, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((2, 8, 8, 12))
      >>> layer(x, x).shape
      (2, 8, 8, 12)

    Args:
      size: positions of the maps per axis.
      channels: channels of the maps.
      operator: `∘`, one of `terminator_jax.ops.hyperzzw.OPERATORS`; `dot` needs square 2-D maps.
      causal: for sequences: no result depends on a later position.
      hidden: width of the slow network.
      layers: hidden layers of the slow network.
      omega0: frequency scale of the slow network.
      dtype: dtype of the products; that of x if None. The hyper-kernel itself is computed in
        float32 or wider.
      param_dtype: dtype of the parameters.
      rngs: the source of the initial values.

    Raises:
      ValueError: for an unknown operator or one that the size forbids, or when called with maps of
        other shapes.

    Source: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        channels: int,
        *,
        operator: str = "dot",
        causal: bool = False,
        hidden: int = 64,
        layers: int = 2,
        omega0: float = OMEGA0,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_operator(operator, size, causal)
        self.size, self.channels = tuple(size), channels
        self.operator, self.causal, self.dtype = operator, causal, dtype
        self.slow_net = GlobalSlowNet(
            size, channels, hidden=hidden, layers=layers, omega0=omega0,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: jax.Array, u: jax.Array) -> jax.Array:
        """Applies the layer to x, which makes the kernel, and u: `(batch, *size, channels)`."""
        if x.shape[1:] != (*self.size, self.channels) or u.shape != x.shape:
            raise ValueError(
                f"expected x and u (batch, *{self.size}, {self.channels}), got {x.shape} and"
                f" {u.shape}"
            )
        x, u = floating((x, u))
        dtype = x.dtype if self.dtype is None else self.dtype
        x, u, kernel = (a.astype(dtype) for a in (x, u, self.slow_net()))
        operator = operator_named(self.operator)
        hyper, u = to_channels_first(x * kernel[None]), to_channels_first(u)
        [out] = operator(hyper, [u], causal=self.causal)
        return to_channels_last(out)


class LocalHyperZZW(nnx.Module):
    """Correlates a map with small depthwise kernels that a slow network makes from another map.

    Example:
      >>> layer = LocalHyperZZW(5, 12, rngs=nnx.Rngs(0))
      >>> source, u = jnp.ones((2, 8, 8, 12)), jnp.ones((2, 8, 8, 12))
      >>> layer(source, u).shape
      (2, 8, 8, 12)

    The kernels depend on the mean of `source` over the batch, and are the same for all samples. The
    layer has gradients but no forward mode, `jax.jvp` and `jax.linearize`.

    Args:
      size: the odd size of the kernels, the same on every axis.
      channels: channels of the maps.
      ndim: spatial axes of the maps.
      hidden: width of the slow network.
      layers: hidden layers of the slow network.
      omega0: frequency scale of the slow network.
      causal: for sequences: the kernels reach back only, and depend on the first position alone.
      dtype: dtype of the result; that of u if None. The kernels themselves are computed in float32
        or wider.
      param_dtype: dtype of the parameters.
      axis_name: the mapped axis over which the batch is split, if any.
      use_running_average: whether the kernels are made from the average mean of training rather
        than from the batch's; `train()` and `eval()` set it.
      rngs: the source of the initial values.

    Raises:
      ValueError: for an even size, when called with maps of other shapes, or in evaluation before
        any batch was averaged.

    Source: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024.
    """

    def __init__(
        self,
        size: int,
        channels: int,
        *,
        ndim: int = 2,
        hidden: int = 32,
        layers: int = 2,
        omega0: float = OMEGA0,
        causal: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        axis_name: AxisName = None,
        use_running_average: bool = False,
        rngs: nnx.Rngs,
    ):
        self.causal, self.dtype = causal, dtype
        self.slow_net = LocalSlowNet(
            size, channels, ndim=ndim, hidden=hidden, layers=layers, omega0=omega0, causal=causal,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.context = RunningMean(
            self.slow_net.context_shape, self.slow_net.context_dtype, axis_name=axis_name,
            use_running_average=use_running_average,
        )  # fmt: skip

    def __call__(self, source: jax.Array, u: jax.Array) -> jax.Array:
        """Applies the layer to source and u, `(batch, *spatial, channels)`; returns u's shape."""
        u = floating(u)
        u = u if self.dtype is None else u.astype(self.dtype)
        padding = "causal" if self.causal else "same"
        contexts = across(self.slow_net.contexts((source,)), self.context.reduced_axis)
        kernel = self.slow_net.kernels(self.context(contexts))
        return fft_conv(u, kernel, correlate=True, padding=padding)
