"""Attention on maps: each position and those around it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax.layers.initializers import uniform
from terminator_jax.ops.attention import local_attention, rotary

# Rows and columns from a position to where a head begins to look; heads beyond begin anew.
NEIGHBOURS = ((0, -1), (0, 1), (-1, 0), (1, 0), (0, -2), (0, 2), (-2, 0), (2, 0))
SHARPNESS = 4.0  # of that look: the biases' size
CONTENTS = 0.1  # the kernels' size for queries and keys then, beside the usual


class LocalAttention2D(nnx.Module):
    """Every position attends to the `(2 window + 1)²` positions around it, cut at the border.

    Example:
      >>> layer = LocalAttention2D(16, window=3, heads=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 8, 12, 16))).shape
      (2, 8, 12, 16)

    Args:
      channels: channels of the map.
      window: how many rows and columns away a position sees; None for all there are.
      heads: into how many equal parts the channels are cut, each with weights of its own.
      project: whether queries, keys, values and the result are linear maps of the channels; else
        queries, keys and values are the input itself.
      turn: whether queries and keys turn with their position (2-D rotary embedding), so that
        weights can depend on how far apart positions are.
      base: about how many positions the slowest channels take to turn by one rad.
      dtype: dtype of the computation; that of input and parameters if None. Angles and weights are
        computed in float32 or wider.
      param_dtype: dtype of the parameters.
      rngs: the source of the initial values.

    Raises:
      ValueError: if the channels do not divide into heads, or a head's into two halves of pairs
        where they are to turn; when called, for maps of other shapes.

    Source: Vaswani et al., "Attention Is All You Need", 2017; rotary embedding: Su et al.,
    "RoFormer", 2021, in two dimensions. Without projections and turns, and with one head, it is the
    layer of the public `nonlinear-transformer`.
    """

    def __init__(
        self,
        channels: int,
        window: int | None,
        *,
        heads: int = 4,
        project: bool = True,
        turn: bool = True,
        base: float = 100.0,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or channels % heads:
            raise ValueError(f"{channels} channels do not divide into {heads} heads")
        if turn and channels // heads % 4:
            raise ValueError(
                f"a head's channels must divide by 4 to turn, got {channels} channels in {heads}"
                " heads"
            )
        if window is not None and window < 0:
            raise ValueError(f"window must be 0 or more, or None for all positions, got {window}")
        self.channels, self.window, self.heads = channels, window, heads
        self.project, self.turn, self.base, self.dtype = project, turn, base, dtype

        if project:
            kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            init = uniform(math.sqrt(3 / channels))
            self.qkv = nnx.Linear(channels, 3 * channels, kernel_init=init, **kinds)
            self.out = nnx.Linear(channels, channels, kernel_init=init, **kinds)
            if turn:
                self._look_around()

    def _look_around(self) -> None:
        """Lets each head begin by looking at one neighbour of every position, whatever is there.

        From queries and keys of the contents alone a model would stay for long where every position
        in the window counts alike.
        """
        both = 2 * self.channels
        kernel, bias = self.qkv.kernel[...], self.qkv.bias[...]
        self.qkv.kernel.set_value(kernel.at[:, :both].multiply(CONTENTS))
        looks = _looks(self.heads, self.channels // self.heads, self.base)
        self.qkv.bias.set_value(bias.at[:both].set(looks.astype(bias.dtype)))

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """`(batch, rows, columns, channels)` to the same.

        Args:
          x: the map.
          mask: bool, `(batch, rows, columns)`, False where the map is only filled up: nothing
            attends to these positions, and what is computed there means nothing.
        """
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(f"expected (batch, rows, columns, {self.channels}), got {x.shape}")
        shape = (*x.shape[:3], self.heads, -1)
        if self.project:
            q, k, v = (part.reshape(shape) for part in jnp.split(self.qkv(x), 3, axis=-1))
        else:
            q = k = v = jnp.asarray(x, self.dtype).reshape(shape)
        if self.turn:
            q, k = rotary(q, self.base), rotary(k, self.base)
        y = local_attention(q, k, v, self.window, mask=mask).reshape(x.shape)
        return self.out(y) if self.project else y


def _looks(heads: int, features: int, base: float) -> np.ndarray:
    """Biases of queries and keys whose product, turned, is largest where each head is to look.

    Queries and keys of a head are the same wave along rows and columns, the keys' moved by how far
    away it looks.
    """
    pairs = features // 4
    speeds = base ** (-np.arange(pairs) / pairs)
    query, key = np.zeros((2, heads, 2, 2, pairs))
    query[:, :, 0] = SHARPNESS
    for head in range(heads):
        for axis, away in enumerate(NEIGHBOURS[head % len(NEIGHBOURS)]):
            key[head, axis] = SHARPNESS * np.cos(speeds * away), -SHARPNESS * np.sin(speeds * away)
    return np.concatenate([query.ravel(), key.ravel()])
