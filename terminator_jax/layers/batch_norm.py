"""Batch normalization as the models here use it."""

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.ops.dtypes import at_least_float32, promote_to_float32


class _BatchNorm(nnx.BatchNorm):
    """Lets `nnx.BatchNorm` work where `JAX_NUMPY_DTYPE_PROMOTION=strict` is set."""

    def __call__(self, x: jax.Array, **kwargs) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, **kwargs)


def batch_norm(features: int, *, param_dtype=jnp.float32, momentum: float = 0.9, **kwargs):
    """Makes an `nnx.BatchNorm` whose statistics are in float32 or wider, for every `dtype`.

    Flax casts the running statistics to `dtype` and stores them in float32. That is not enough for
    bfloat16 and for float64.

    Args:
      features: channels of the map.
      param_dtype: dtype of scale and bias; the running statistics are at least as wide.
      momentum: weight of the old running statistics in an update.
      kwargs: further arguments of `nnx.BatchNorm`, as `dtype`, `axis_name` and `rngs`.

    Example:
      >>> norm = batch_norm(12, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
      >>> norm(jnp.ones((2, 8, 8, 12))).dtype, norm.mean.dtype
      (dtype(bfloat16), dtype('float32'))
    """
    norm = _BatchNorm(
        features, momentum=momentum, param_dtype=param_dtype, promote_dtype=promote_to_float32,
        **kwargs,
    )  # fmt: skip
    wide = at_least_float32(param_dtype)
    for statistic in (norm.mean, norm.var):
        statistic.set_value(statistic[...].astype(wide))
    return norm
