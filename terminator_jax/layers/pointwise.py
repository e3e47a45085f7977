"""Pointwise layers: the channel mixer, the bottleneck and the head."""

from flax import nnx

from terminator_jax.layers.initializers import kaiming, zeros


def pointwise(inputs: int, outputs: int, **kwargs) -> nnx.Linear:
    """A linear map of the channels at every position: weights `N(0, 2/fan_in)`, bias 0.

    Args:
      inputs: channels in.
      outputs: channels out.
      kwargs: `dtype`, `param_dtype`, `rngs` and what else `nnx.Linear` takes.

    Example:
      >>> import jax.numpy as jnp
      >>> pointwise(12, 24, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 24)
    """
    return nnx.Linear(inputs, outputs, **{"kernel_init": kaiming, "bias_init": zeros, **kwargs})
