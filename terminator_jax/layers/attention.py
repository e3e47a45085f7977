"""Attention on maps: each position attends to the positions around it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax.layers.initializers import uniform
from terminator_jax.ops.attention import local_attention, rotary
from terminator_jax.ops.dtypes import floating

# Each head starts with its attention on one of these neighbours: offsets in rows and columns.
# Further heads start from the first again.
NEIGHBOUR_OFFSETS = ((0, -1), (0, 1), (-1, 0), (1, 0), (0, -2), (0, 2), (-2, 0), (2, 0))
BIAS_SCALE = 4.0  # size of the biases that do so
CONTENT_SCALE = 0.1  # factor on the usual initial kernels of queries and keys


class LocalAttention2D(nnx.Module):
    """Lets every position attend to the `(2 window + 1)²` positions around it, fewer at the border.

    Example:
      >>> layer = LocalAttention2D(16, window=3, heads=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 8, 12, 16))).shape
      (2, 8, 12, 16)

    Args:
      channels: channels of the map.
      window: the largest distance in rows and in columns that a position attends to; None for the
        whole map.
      heads: number of attention heads; they share the channels equally.
      project: whether queries, keys, values and the result are linear projections. Otherwise
        queries, keys and values are the input itself.
      turn: whether to apply the 2-D rotary embedding to queries and keys, so that weights can
        depend on the offset between positions.
      base: the slowest channels take about so many positions to rotate by one rad.
      dtype: dtype of the computation; that of input and parameters if None. Angles and weights are
        computed in float32 or wider.
      param_dtype: dtype of the parameters.
      rngs: the source of the initial values.

    The layer has gradients but no forward mode, `jax.jvp` and `jax.linearize`.

    Raises:
      ValueError: if the channels do not divide into heads, or a head's channels do not divide by 4
        with `turn`; when called, for maps of other shapes.

    Source: Vaswani et al., "Attention Is All You Need", 2017; rotary embedding: Su et al.,
    "RoFormer", 2021, in two dimensions. With `project=False`, `turn=False` and one head, it is the
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
            kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            init = uniform(math.sqrt(3 / channels))
            self.qkv = nnx.Linear(channels, 3 * channels, kernel_init=init, **kwargs)
            self.out = nnx.Linear(channels, channels, kernel_init=init, **kwargs)
            if turn:
                self._init_neighbour_biases()

    def _init_neighbour_biases(self) -> None:
        """Initializes the biases of queries and keys so that each head attends to one neighbour.

        Without them, the weights would stay nearly uniform over the window for a long time.
        """
        both = 2 * self.channels
        kernel, bias = self.qkv.kernel[...], self.qkv.bias[...]
        self.qkv.kernel.set_value(kernel.at[:, :both].multiply(CONTENT_SCALE))
        biases = _neighbour_biases(self.heads, self.channels // self.heads, self.base)
        self.qkv.bias.set_value(bias.at[:both].set(biases.astype(bias.dtype)))

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns an array of the shape of `x`.

        Args:
          x: the map, `(batch, rows, columns, channels)`.
          mask: bool, `(batch, rows, columns)`, False for padding. No position attends to padding,
            and the result there has no meaning.
        """
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(f"expected (batch, rows, columns, {self.channels}), got {x.shape}")
        x, shape = floating(x), (*x.shape[:3], self.heads, -1)
        if self.project:
            q, k, v = (part.reshape(shape) for part in jnp.split(self.qkv(x), 3, axis=-1))
        else:
            q = k = v = jnp.asarray(x, self.dtype).reshape(shape)
        if self.turn:
            q, k = rotary(q, self.base), rotary(k, self.base)
        y = local_attention(q, k, v, self.window, mask=mask).reshape(x.shape)
        return self.out(y) if self.project else y


def _neighbour_biases(heads: int, features: int, base: float) -> np.ndarray:
    """Makes biases of queries and keys whose rotated product is largest at each head's neighbour.

    Queries and keys of a head are the same wave along rows and columns. The wave of the keys is
    shifted by the neighbour's offset.
    """
    pairs = features // 4
    speeds = base ** (-np.arange(pairs) / pairs)
    query, key = np.zeros((2, heads, 2, 2, pairs))
    query[:, :, 0] = BIAS_SCALE
    for head in range(heads):
        for axis, offset in enumerate(NEIGHBOUR_OFFSETS[head % len(NEIGHBOUR_OFFSETS)]):
            angles = speeds * offset
            key[head, axis] = BIAS_SCALE * np.cos(angles), -BIAS_SCALE * np.sin(angles)
    return np.concatenate([query.ravel(), key.ravel()])
