"""Interactions: gates from the means of a map, made of a HyperZZW product of vectors."""

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.slow import ChannelSlowNet, SpatialSlowNet
from terminator_jax.ops import hyperzzw


def _means(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.mean(x, axes, dtype=jnp.promote_types(x.dtype, jnp.float32))


def _spatial(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim - 1))


def channel_gate(mean: jax.Array, kernel: jax.Array) -> jax.Array:
    """`sigmoid(m ⊙ k_c ⊙ m)` of means `(batch, channels)` and a channel kernel `(channels,)`."""
    return jax.nn.sigmoid(hyperzzw.twice(mean, kernel[None]))


def exponents(
    over_space: jax.Array, over_channels: jax.Array, channel: jax.Array, spatial: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`m ⊙ k_c ⊙ m` and `s ⊙ k_s ⊙ s`, the sigmoid of whose product is the hyper interaction.

    Args:
      over_space: m, means `(batch, channels)`.
      over_channels: s, means `(batch, *size)`.
      channel: k_c, a channel kernel `(channels,)`.
      spatial: k_s, a spatial kernel `(*size,)`.
    """
    return hyperzzw.twice(over_space, channel[None]), hyperzzw.twice(over_channels, spatial[None])


class HyperChannelInteraction(nnx.Module):
    """`m = mean_space(x)`, `out = x ⊙ sigmoid(m ⊙ k_c ⊙ m)`, k_c from a channel slow network.

    Example:
      >>> layer = HyperChannelInteraction(12, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 12)

    Args:
      channels: channels of the map.
      hidden: width of the slow network.
      layers: hidden layers of the slow network.
      slow: `omega0` and `param_dtype` of the slow network.
      rngs: the source of the initial values.
    """

    def __init__(self, channels: int, *, hidden: int = 32, layers: int = 2, rngs: nnx.Rngs, **slow):
        self.channel = ChannelSlowNet(channels, hidden=hidden, layers=layers, rngs=rngs, **slow)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, *spatial, channels)` to the same."""
        gate = channel_gate(_means(x, _spatial(x)), self.channel())
        return x * jnp.expand_dims(gate, _spatial(x)).astype(x.dtype)


class HyperInteraction(nnx.Module):
    """Gates x by the spatial and channel means of y.

    `m = mean_space(y)`, `s = mean_channels(y)`, `out = x ⊙ sigmoid((s ⊙ k_s ⊙ s)(m ⊙ k_c ⊙ m))`.

    Example:
      >>> layer = HyperInteraction((8, 8), 12, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 8, 8, 12)), jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 12)

    Args:
      size: the maps' positions per axis.
      channels: channels of the maps.
      channel_hidden: width of the channel slow network.
      spatial_hidden: width of the spatial slow network.
      layers: hidden layers of both.
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
        rngs: nnx.Rngs,
        **slow,
    ):
        self.channel = ChannelSlowNet(
            channels, hidden=channel_hidden, layers=layers, rngs=rngs, **slow
        )
        self.spatial = SpatialSlowNet(size, hidden=spatial_hidden, layers=layers, rngs=rngs, **slow)

    def __call__(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """y and x `(batch, *size, channels)`; returns x gated."""
        if y.shape != x.shape:
            raise ValueError(f"y and x must have one shape, got {y.shape} and {x.shape}")
        channel, spatial = exponents(
            _means(y, _spatial(y)), _means(y, (-1,)), self.channel(), self.spatial()
        )
        gate = spatial[..., None] * jnp.expand_dims(channel, _spatial(y))
        return x * jax.nn.sigmoid(gate).astype(x.dtype)
