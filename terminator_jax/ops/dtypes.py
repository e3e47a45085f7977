"""Names the dtype in which sums are taken."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Returns float64 for float64, and float32 for every other dtype.

    `jnp.promote_types(dtype, jnp.float32)` is the same, but an error where
    `JAX_NUMPY_DTYPE_PROMOTION=strict` is set.

    Example:
      >>> at_least_float32(jnp.bfloat16)
      dtype('float32')
    """
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)
