"""Interactions: gates from the means of a map, made of a HyperZZW product of vectors."""

import jax
from flax import nnx

from terminator_jax.layers.slow import ChannelSlowNet, SpatialSlowNet
from terminator_jax.ops import hyperzzw
from terminator_jax.ops.dtypes import floating
from terminator_jax.ops.standardize import average


def _over_space(x: jax.Array, causal: bool) -> jax.Array:
    """Averages over space: `(batch, 1 …, channels)`, or causally `(batch, length, channels)`."""
    if causal and x.ndim != 3:
        raise ValueError(f"causal needs (batch, length, channels), got {x.shape}")
    if causal:
        return average(x, (), cumulative=1)
    return average(x, tuple(range(1, x.ndim - 1)))


def _channel_logit(mean: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes `m ⊙ k ⊙ m`."""
    return hyperzzw.quadratic_form(mean, kernel.reshape((1,) * (mean.ndim - 1) + (-1,)))


class HyperChannelInteraction(nnx.Module):
    """Gates x by its channel means, with a kernel from a channel slow network.

    `m = mean_space(x)`, `out = x ⊙ sigmoid(m ⊙ k_h ⊙ m)`.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = HyperChannelInteraction(12, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 12)

    Args:
      channels: channels of the map.
      hidden: width of the slow network.
      layers: hidden layers of the slow network.
      causal: for sequences: means over the positions so far.
      slow: `omega0` and `param_dtype` of the slow network.
      rngs: the source of the initial values.
    """

    def __init__(
        self,
        channels: int,
        *,
        hidden: int = 32,
        layers: int = 2,
        causal: bool = False,
        rngs: nnx.Rngs,
        **slow,
    ):
        self.causal = causal
        self.channel = ChannelSlowNet(channels, hidden=hidden, layers=layers, rngs=rngs, **slow)

    def __call__(self, x: jax.Array, k_h: jax.Array | None = None) -> jax.Array:
        """Gates x `(batch, *spatial, channels)`; `k_h` is the kernel, if it is already known."""
        x, k_h = floating((x, self.channel() if k_h is None else k_h))
        logit = _channel_logit(_over_space(x, self.causal), k_h)
        return x * jax.nn.sigmoid(logit).astype(x.dtype)


class HyperInteraction(nnx.Module):
    """Gates x by the spatial and channel means of y.

    `m = mean_space(y)`, `s = mean_channels(y)`, `out = x ⊙ sigmoid((s ⊙ k_s ⊙ s)(m ⊙ k_c ⊙ m))`.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = HyperInteraction((8, 8), 12, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 8, 8, 12)), jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 12)

    Args:
      size: the maps' positions per axis.
      channels: channels of the maps.
      channel_hidden: width of the channel slow network.
      spatial_hidden: width of the spatial slow network.
      layers: hidden layers of both.
      causal: for sequences: means over the positions so far.
      slow: `omega0` and `param_dtype` of both.
      rngs: the source of the initial values.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        channels: int,
        *,
        channel_hidden: int = 16,
        spatial_hidden: int = 64,
        layers: int = 2,
        causal: bool = False,
        rngs: nnx.Rngs,
        **slow,
    ):
        self.causal = causal
        self.channel = ChannelSlowNet(
            channels, hidden=channel_hidden, layers=layers, rngs=rngs, **slow
        )
        self.spatial = SpatialSlowNet(size, hidden=spatial_hidden, layers=layers, rngs=rngs, **slow)

    def __call__(
        self,
        y: jax.Array,
        x: jax.Array,
        k_c: jax.Array | None = None,
        k_s: jax.Array | None = None,
    ) -> jax.Array:
        """Gates x by y, `(batch, *size, channels)` both; with the kernels, if already known."""
        if y.shape != x.shape:
            raise ValueError(f"y and x must have one shape, got {y.shape} and {x.shape}")
        k_c = self.channel() if k_c is None else k_c
        k_s = self.spatial() if k_s is None else k_s
        y, x, k_c, k_s = floating((y, x, k_c, k_s))
        channel = _channel_logit(_over_space(y, self.causal), k_c)
        spatial = hyperzzw.quadratic_form(average(y, (-1,)), k_s[None, ..., None])
        return x * jax.nn.sigmoid(channel * spatial).astype(x.dtype)
