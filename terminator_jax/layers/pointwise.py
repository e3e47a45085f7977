"""Pointwise layers: the channel mixer, the bottleneck and the head."""

from flax import nnx

from terminator_jax.layers.initializers import kaiming_normal, zeros


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
    return nnx.Linear(
        inputs, outputs, **{"kernel_init": kaiming_normal, "bias_init": zeros, **kwargs}
    )
