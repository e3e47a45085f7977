"""Coordinates of the positions of a map, the input of every slow network."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops.dtypes import floating


def grid(size: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Computes the coordinates in [-1, 1] of every position of a map, row-major.

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


def interpolate(values: jax.Array, size: Sequence[int]) -> jax.Array:
    """Interpolates values on one grid linearly, at the positions of another.

    Args:
      values: `(*old size,)`, as many axes as `size` has.
      size: positions per axis of the new grid; as in `grid`, both go from -1 to 1.

    Example:
      >>> print(interpolate(jnp.array([0.0, 2.0, 4.0]), (5,)))
      [0. 1. 2. 3. 4.]
    """
    if values.ndim != len(size):
        raise ValueError(f"values {values.shape} have not as many axes as the size {tuple(size)}")
    values = floating(values)
    for axis, (n, m) in enumerate(zip(values.shape, size, strict=True)):
        matrix = jnp.asarray(_between(n, m), values.dtype)
        values = jnp.moveaxis(jnp.tensordot(matrix, values, axes=(1, axis)), 0, axis)
    return values


def _between(n: int, m: int) -> np.ndarray:
    """Returns the `(m, n)` matrix of linear interpolation from n positions to m."""
    places = np.linspace(0, n - 1, m) if m > 1 else np.zeros(1)
    return np.maximum(0, 1 - abs(places[:, None] - np.arange(n)))
