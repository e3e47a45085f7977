"""Batch normalization as the models here use it."""

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.ops.dtypes import at_least_float32


def batch_norm(features: int, *, param_dtype=jnp.float32, momentum: float = 0.9, **kwargs):
    """An `nnx.BatchNorm` whose statistics are in float32 or wider, whatever it computes in.

    Flax casts the running ones to `dtype` and keeps them in float32, which is too little for
    bfloat16 and for float64.

    Args:
      features: channels of the map.
      param_dtype: dtype of scale and bias; the running statistics are at least as wide.
      momentum: share of the running statistics that one batch leaves.
      kwargs: `dtype`, `axis_name`, `rngs` and what else `nnx.BatchNorm` takes.

    Example:
      >>> norm = batch_norm(12, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
      >>> norm(jnp.ones((2, 8, 8, 12))).dtype, norm.mean.dtype
      (dtype(bfloat16), dtype('float32'))
    """
    norm = nnx.BatchNorm(
        features, momentum=momentum, param_dtype=param_dtype, promote_dtype=_wide, **kwargs
    )
    wide = at_least_float32(param_dtype)
    for statistic in (norm.mean, norm.var):
        statistic.set_value(statistic[...].astype(wide))
    return norm


def _wide(arrays: tuple[jax.Array | None, ...], *, dtype=None) -> tuple[jax.Array | None, ...]:
    """All arrays in one dtype, float32 or wider; the result's `dtype` comes later."""
    del dtype
    wide = jnp.result_type(jnp.float32, *(a for a in arrays if a is not None))
    return tuple(None if a is None else a.astype(wide) for a in arrays)
