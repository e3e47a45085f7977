"""The inverse square root, as statistics need it."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def inverse_root(x: jax.Array, floor: float) -> jax.Array:
    """`1 / sqrt(max(x, floor))`, with derivative 0 from the floor down.

    The derivative is written out: those of the maximum, the root and the quotient one after the
    other are half a dozen small programs to compile.

    Args:
      x: floating-point numbers.
      floor: more than 0.

    Example:
      >>> print(inverse_root(jnp.array([4.0, -1.0]), 0.25))
      [0.5 2. ]
      >>> print(jax.grad(inverse_root)(4.0, 0.25))
      -0.0625
    """
    return jax.lax.rsqrt(jnp.maximum(x, floor))


@inverse_root.defjvp
def _inverse_root_jvp(floor, primals, tangents):
    (x,), (dx,) = primals, tangents
    root = inverse_root(x, floor)
    return root, jnp.where(x > floor, -0.5 * root * root * root, 0) * dx
