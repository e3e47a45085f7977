"""Coordinates of the positions of a map, the input of every slow network."""

import math

import jax
import jax.numpy as jnp


def grid(size: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Coordinates in [-1, 1] of every position of a map, row-major.

    Args:
      size: positions per spatial axis, e.g. `(rows, columns)`.
      dtype: floating dtype of the result; float32 or wider keeps phases exact enough.

    Returns:
      `(prod(size), len(size))`; the last axis is `(row, column, …)`, both ends included.

    Example:
      >>> grid((2, 3)).tolist()
      [[-1.0, -1.0], [-1.0, 0.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    if not size or any(n < 1 for n in size):
        raise ValueError(f"size must hold positive numbers of positions, got {size}")
    axes = [jnp.linspace(-1, 1, n, dtype=dtype) for n in size]
    mesh = jnp.meshgrid(*axes, indexing="ij")
    return jnp.stack(mesh, axis=-1).reshape(math.prod(size), len(size))
