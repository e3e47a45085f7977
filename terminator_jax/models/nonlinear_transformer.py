"""The non-linear transformer: a masked language model of tokens on a two-dimensional grid.

A masked token may stand anywhere. Its prediction depends on the tokens on all sides of it.
`terminator_jax.models.decoding` fills grids with the model's predictions.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from terminator_jax.layers import LocalAttention2D, pointwise
from terminator_jax.layers.initializers import uniform
from terminator_jax.models.fields import NOT_NEGATIVE, POSITIVE, check_fields
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.channels_first import explicit_sharding
from terminator_jax.ops.dtypes import at_least_float32, promote_to_float32
from terminator_jax.ops.standardize import AxisName


@dataclasses.dataclass(frozen=True)
class NonLinearTransformerConfig:
    """Configures a non-linear transformer, which takes grids of any size.

    Attributes:
      vocabulary: tokens are in `[0, vocabulary)`; the number `vocabulary` is the mask token.
      channels: channels of each position.
      layers: number of blocks.
      heads: attention heads of each block.
      window: the largest distance in rows and in columns that a local block attends to.
      global_every: every block whose number, from 1, is a multiple of this attends to the whole
        grid; 0 for none.
      factor: hidden units of a block's MLP, as a multiple of the channels.
      project: whether queries, keys, values and results of attention are linear projections.
      turn: whether to apply the 2-D rotary embedding to queries and keys. The model has no other
        position embedding.
      shared_norm: whether a block's two normalizations share one scale.
    """

    vocabulary: int = 256
    channels: int = 128
    layers: int = 6
    heads: int = 4
    window: int = 4
    global_every: int = 3
    factor: int = 4
    project: bool = True
    turn: bool = True
    shared_norm: bool = False

    def __post_init__(self):
        check_fields(self, RULES)
        if self.channels % self.heads or (self.turn and self.channels // self.heads % 4):
            raise ValueError(
                f"channels is {self.channels}, and must be a multiple of heads, {self.heads}"
                + (", times 4 where positions turn queries and keys" if self.turn else "")
            )

    @property
    def mask_token(self) -> int:
        """The token that stands in a grid for every masked token."""
        return self.vocabulary

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each block; None for the whole grid."""
        every = self.global_every or self.layers + 1
        return tuple(None if n % every == 0 else self.window for n in range(1, self.layers + 1))

    @classmethod
    def shakespeare(cls, **overrides) -> "NonLinearTransformerConfig":
        """Four blocks of 96 channels, the last of which attends to the whole grid."""
        small = dict(channels=96, layers=4, heads=6, window=3, global_every=4)
        return cls(**{**small, **overrides})

    @classmethod
    def tiny(cls, **overrides) -> "NonLinearTransformerConfig":
        """Three blocks of 64 channels."""
        return cls(**{"channels": 64, "layers": 3, **overrides})

    @classmethod
    def public(cls, **overrides) -> "NonLinearTransformerConfig":
        """Configures the blocks of the public `nonlinear-transformer`."""
        plain = dict(heads=1, project=False, turn=False, shared_norm=True, global_every=0)
        return cls(**{**plain, **overrides})


RULES = {
    **dict.fromkeys(("vocabulary", "channels", "layers", "heads", "factor"), POSITIVE),
    **dict.fromkeys(("window", "global_every"), NOT_NEGATIVE),
}


class NonLinearBlock(nnx.Module):
    """Computes `y = x + attention(norm x)`, then `y + MLP(norm y)`; norms have a scale and no bias.

    Example:
      >>> config = NonLinearTransformerConfig.tiny(channels=16)
      >>> block = NonLinearBlock(config, window=1, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((2, 4, 6, 16))).shape
      (2, 4, 6, 16)

    Args:
      config: the configuration of the model.
      window: the window of this block; None for the whole grid.
      dtype: dtype of the computation; statistics and weights stay in float32 or wider.
      param_dtype: dtype of the parameters.
      rngs: the source of the initial values.
    """

    def __init__(
        self,
        config: NonLinearTransformerConfig,
        window: int | None,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        channels = config.channels
        self.norm = _layer_norm(channels, **kwargs)
        self.mlp_norm = None if config.shared_norm else _layer_norm(channels, **kwargs)
        self.attention = LocalAttention2D(
            channels, window, heads=config.heads, project=config.project, turn=config.turn, **kwargs
        )
        hidden = config.factor * channels
        self.expand = pointwise(channels, hidden, **kwargs)
        init = uniform(math.sqrt(3 / hidden / config.layers))
        self.reduce = nnx.Linear(hidden, channels, kernel_init=init, **kwargs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps `(batch, rows, columns, channels)` to the same; `mask` as for `LocalAttention2D`."""
        x = x + self.attention(self.norm(x), mask)
        norm = self.mlp_norm or self.norm
        return x + self.reduce(gelu(self.expand(norm(x))))


class NonLinearTransformer(nnx.Module):
    """Predicts every token of a grid from the unmasked tokens around it.

    Example:
      >>> config = NonLinearTransformerConfig.tiny(vocabulary=10, channels=16)
      >>> def logits(tokens):
      ...     return NonLinearTransformer(config, rngs=nnx.Rngs(0))(tokens)
      >>> tokens = jnp.full((2, 4, 6), config.mask_token)
      >>> jax.eval_shape(logits, tokens).shape
      (2, 4, 6, 10)

    Args:
      config: the configuration of the model.
      dtype: dtype of the computation; statistics, weights of attention and logits stay in float32
        or wider.
      param_dtype: dtype of the parameters.
      axis_name: not used; all models take it. No sample depends on another.
      remat: whether gradients recompute the inside of a block instead of keeping it in memory.
      rngs: the source of the initial values.

    Source: the public `nonlinear-transformer` (HeptaPod). Its text describes heads with
    projections, a rotary embedding in two dimensions and global layers; its code has none of them.
    """

    def __init__(
        self,
        config: NonLinearTransformerConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        axis_name: AxisName = None,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        del axis_name
        self.config, self.dtype, self.remat = config, dtype, remat
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        shape = (config.vocabulary + 1, config.channels)
        self.embedding = nnx.Param(uniform(math.sqrt(3))(rngs.params(), shape, param_dtype))
        self.blocks = nnx.List(
            NonLinearBlock(config, window, **kwargs) for window in config.windows
        )
        self.norm = _layer_norm(config.channels, **kwargs)
        self.head = nnx.Linear(
            config.channels, config.vocabulary, param_dtype=param_dtype, rngs=rngs,
            kernel_init=uniform(0.1 / math.sqrt(config.channels)),
            promote_dtype=promote_to_float32,
        )  # fmt: skip

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns logits `(batch, rows, columns, vocabulary)`.

        Args:
          tokens: integers, `(batch, rows, columns)`, `config.mask_token` for a masked token.
          mask: bool, `(batch, rows, columns)`, False for padding.

        Raises:
          ValueError: for arrays of other shapes.
          TypeError: if the tokens are not integers.
        """
        if tokens.ndim != 3:
            raise ValueError(f"expected tokens (batch, rows, columns), got {tokens.shape}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"expected tokens of integers, got {tokens.dtype}")
        x = _take_rows(self.embedding[...], tokens)
        x = x if self.dtype is None else x.astype(self.dtype)
        apply = nnx.remat(_apply_block) if self.remat else _apply_block
        for block in self.blocks:
            x = apply(block, x, mask)
        return self.head(self.norm(x).astype(at_least_float32(x.dtype)))


class _LayerNorm(nnx.LayerNorm):
    """Lets `nnx.LayerNorm` work where `JAX_NUMPY_DTYPE_PROMOTION=strict` is set."""

    def __call__(self, x: jax.Array, **kwargs) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, **kwargs)


def _layer_norm(channels: int, **kwargs) -> _LayerNorm:
    return _LayerNorm(channels, epsilon=1e-5, use_bias=False, use_fast_variance=False, **kwargs)


def _take_rows(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Computes `jnp.take(table, indices, axis=0)`, for indices on an Explicit mesh too."""
    sharding = explicit_sharding(indices)
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, None))
    return table.at[indices].get(mode="fill", out_sharding=sharding)


def _apply_block(block: NonLinearBlock, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return block(x, mask)
