"""Pointwise layers: the channel mixer, the bottleneck and the head."""

from flax import nnx
from flax.nnx.nn import dtypes

from terminator_jax.layers.initializers import kaiming_normal, zeros
from terminator_jax.ops.dtypes import floating


def pointwise(inputs: int, outputs: int, **kwargs) -> nnx.Linear:
    """Makes a linear layer over the channels, with weights `N(0, 2/fan_in)` and bias 0.

    Args:
      inputs: channels in.
      outputs: channels out.
      kwargs: further arguments of `nnx.Linear`, as `dtype`, `param_dtype` and `rngs`.

    Example:
      >>> import jax.numpy as jnp
      >>> pointwise(12, 24, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 24)
    """
    defaults = dict(kernel_init=kaiming_normal, bias_init=zeros, promote_dtype=promote_dtype)
    return nnx.Linear(inputs, outputs, **defaults | kwargs)


def promote_dtype(arrays, **options):
    """Promotes arrays to one dtype as Flax does, integers also where promotion is strict."""
    return dtypes.promote_dtype(floating(arrays), **options)
