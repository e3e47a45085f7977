"""Chooses dtypes: of what arrays of integers become, and of sums."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def floating(arrays: Any) -> Any:
    """Converts the integers and bools in a tree of arrays to float32, as Flax's layers do.

    Arrays of a floating-point or complex type keep it. NumPy's arrays become JAX's.

    Example:
      >>> [a.dtype.name for a in floating((jnp.arange(3), jnp.ones(2, jnp.bfloat16)))]
      ['float32', 'bfloat16']
    """
    return jax.tree.map(_floating, arrays)


def _floating(x: Any) -> jax.Array:
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def at_least_float32(*dtypes: DTypeLike) -> jnp.dtype:
    """Returns float64 if that is one of the dtypes, and float32 otherwise.

    `jnp.promote_types` would raise an error with `JAX_NUMPY_DTYPE_PROMOTION=strict`.

    Example:
      >>> at_least_float32(jnp.bfloat16)
      dtype('float32')
    """
    is_double = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def promote_to_float32(
    arrays: tuple[jax.Array | None, ...], *, dtype: DTypeLike | None = None
) -> tuple[jax.Array | None, ...]:
    """Casts arrays to one dtype, float32 or wider: a `promote_dtype` for the layers of Flax.

    Args:
      arrays: inputs and parameters of a layer; None stays None.
      dtype: not used. It is the dtype of the layer's result.

    Example:
      >>> [a.dtype.name for a in promote_to_float32((jnp.ones(2, jnp.bfloat16), jnp.ones(2)))]
      ['float32', 'float32']
    """
    del dtype
    wide = at_least_float32(*(a.dtype for a in arrays if a is not None))
    return tuple(None if a is None else a.astype(wide) for a in arrays)
