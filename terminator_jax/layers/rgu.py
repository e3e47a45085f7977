"""The recursive gated unit."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.initializers import uniform, zeros
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.dtypes import floating
from terminator_jax.ops.fused_sfne import RGUWeights
from terminator_jax.ops.standardize import instance_standardize


class RGU(nnx.Module):
    """Gates a map by projections of itself: a recursive gated unit.

    `κ = W_k x`, `v = W_v x`, `q = GELU(IS(κ ⊙ W_q v)) + p`, `out = W_y q`.

    Example:
      >>> rgu = RGU((8, 8), 12, rngs=nnx.Rngs(0))
      >>> rgu(jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 12)

    Args:
      size: the map's positions per axis; p has one value for each.
      channels: channels of the map.
      causal: for sequences: each position is standardized by those so far.
      dtype: dtype of the computation; that of input and parameters if None.
      param_dtype: dtype of the parameters.
      rngs: the source of the initial values.

    Source: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        channels: int,
        *,
        causal: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.size, self.channels, self.causal = tuple(size), channels, causal

        def linear():
            return nnx.Linear(
                channels, channels, kernel_init=uniform(math.sqrt(3 / channels)),
                bias_init=zeros, dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.k, self.v, self.q, self.y = linear(), linear(), linear(), linear()
        self.position = nnx.Param(jnp.zeros(self.size, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, *size, channels)` to the same shape."""
        if x.shape[1:] != (*self.size, self.channels):
            raise ValueError(f"expected (batch, *{self.size}, {self.channels}), got {x.shape}")
        x = floating(x)
        k, v = self.k(x), self.v(x)
        q = gelu(instance_standardize(k * self.q(v), causal=self.causal))
        return self.y(q + self.position[...].astype(q.dtype)[None, ..., None])

    def fused_weights(self) -> RGUWeights:
        """Returns the weights with one linear map for κ and `W_q v`: `v` is read by `W_q` alone."""
        inner, outer = self.v, self.q
        both = jnp.concatenate([inner.kernel[...], inner.bias[...][None]]) @ outer.kernel[...]
        return RGUWeights(
            kernel=jnp.concatenate([self.k.kernel[...], both[:-1]], axis=1),
            bias=jnp.concatenate([self.k.bias[...], both[-1] + outer.bias[...]]),
            position=self.position[...],
            out=self.y.kernel[...],
        )
