"""The recursive gated unit."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.initializers import uniform, zeros
from terminator_jax.ops.activation import gelu
from terminator_jax.ops.standardize import instance_standardize


class RGU(nnx.Module):
    """Recursive gated unit: a map gated by projections of itself.

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
        """`(batch, *size, channels)` to the same."""
        if x.shape[1:] != (*self.size, self.channels):
            raise ValueError(f"expected (batch, *{self.size}, {self.channels}), got {x.shape}")
        return self.y(self.gate(self.k(x), self.q(self.v(x))))

    def gate(self, k: jax.Array, q: jax.Array) -> jax.Array:
        """`GELU(IS(k ⊙ q)) + p`."""
        gated = gelu(instance_standardize(k * q, causal=self.causal))
        return gated + self.position[...].astype(gated.dtype)[None, ..., None]

    def projections(self) -> tuple[jax.Array, jax.Array]:
        """Kernel `(C, 2C)` and bias `(2C,)` of the one linear map to κ and to `W_q v`.

        `v` is read by `W_q` alone, so the two linear maps in a row are one.
        """
        inner, outer = self.v, self.q
        both = jnp.concatenate([inner.kernel[...], inner.bias[...][None]]) @ outer.kernel[...]
        return (
            jnp.concatenate([self.k.kernel[...], both[:-1]], axis=1),
            jnp.concatenate([self.k.bias[...], both[-1] + outer.bias[...]]),
        )
