"""In which order a program computes."""

import jax
import jax.numpy as jnp


def after(first: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, but no sooner than `first`; on a CPU, what is infinite in that may make it NaN.

    XLA drops its own barriers on CPUs before it orders a program. There `x` is added to nothing
    times a mean of `first`. The mean is a product, since XLA repeats all that leads to a mere
    element wherever that is used, and of rows, so that it is one also of a map cut up by its batch.

    Example:
      >>> print(after(jnp.ones((2, 3)), jnp.arange(3.0)))
      [0. 1. 2.]
    """
    if jax.default_backend() != "cpu":
        return jax.lax.optimization_barrier((first, x))[1]
    rows = jnp.atleast_2d(first)
    rows = rows.reshape(len(rows), -1)[:2]
    share = jnp.full(rows.shape[1], 1 / rows.shape[1], rows.dtype)
    return x + 0 * (rows @ share)[0].astype(x.dtype)


def after_product(first: jax.Array, x: jax.Array) -> jax.Array:
    """`after` a matrix product, whose elements are none that XLA would repeat: one operation.

    Args:
      first: the product's result, of one dtype with `x` and of its shape but for the first axis.
      x: any array.

    Example:
      >>> print(after_product(jnp.ones((2, 3)), jnp.arange(3.0)[None]))
      [[0. 1. 2.]]
    """
    if jax.default_backend() != "cpu":
        return jax.lax.optimization_barrier((first, x))[1]
    return x + 0 * first[:1]


@jax.custom_vjp
def stored(x: jax.Array) -> jax.Array:
    """`x`, on a CPU once in memory, however little it takes to compute; what is infinite, as NaN.

    XLA computes what is cheap wherever it is used, from all that it is made of, which then has to
    be kept instead. It never repeats a division: here one by 1, unless a factor can replace it.

    Example:
      >>> print(stored(jnp.arange(3.0)))
      [0. 1. 2.]
    """
    return x / (1 + 0 * x) if jax.default_backend() == "cpu" else x


stored.defvjp(lambda x: (stored(x), None), lambda _, dy: (dy,))
