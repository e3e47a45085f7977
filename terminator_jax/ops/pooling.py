"""Adaptive average pooling as a matrix per axis."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def adaptive_matrix(n: int, bins: int) -> np.ndarray:
    """`(bins, n)` matrix that averages n positions into `bins` adaptive bins.

    Bin `o` covers `[floor(o n / bins), ceil((o + 1) n / bins))`, also when `bins > n`, where bins
    overlap (the rule of PyTorch's `AdaptiveAvgPool`).

    Example:
      >>> adaptive_matrix(4, 2).tolist()
      [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    matrix = np.zeros((bins, n))
    for o in range(bins):
        start, stop = o * n // bins, -(-(o + 1) * n // bins)
        matrix[o, start:stop] = 1 / (stop - start)
    return matrix


def adaptive_average(x: jax.Array, bins: Sequence[int]) -> jax.Array:
    """Adaptive average pooling of the spatial axes.

    Args:
      x: `(batch, *spatial, channels)`.
      bins: the number of bins of each spatial axis.

    Returns:
      `(batch, *bins, channels)`.

    Example:
      >>> adaptive_average(jnp.ones((2, 8, 6, 3)), (3, 5)).shape
      (2, 3, 5, 3)
    """
    if x.ndim != len(bins) + 2:
        raise ValueError(f"x of shape {x.shape} has {x.ndim - 2} spatial axes, bins {tuple(bins)}")
    for axis, k in enumerate(bins, start=1):
        matrix = jnp.asarray(adaptive_matrix(x.shape[axis], k), x.dtype)
        x = jnp.moveaxis(jnp.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return x
