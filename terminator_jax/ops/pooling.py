"""Adaptive average pooling as a matrix per axis."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops.dtypes import floating


def adaptive_matrix(n: int, bins: int) -> np.ndarray:
    """Returns the `(bins, n)` matrix that averages n positions into `bins` adaptive bins.

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
    """Pools the spatial axes by adaptive averages.

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
    x = floating(x)
    for axis, k in enumerate(bins, start=1):
        matrix = jnp.asarray(adaptive_matrix(x.shape[axis], k), x.dtype)
        x = jnp.moveaxis(jnp.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return x


def adaptive_average_each(x: jax.Array, bins: Sequence[int]) -> jax.Array:
    """Pools several maps by adaptive averages, each to its own bins, the same on every axis.

    Each result lies in the middle of the largest one's bins, zero around it.

    Args:
      x: `(number, *spatial, channels)`.
      bins: the number of bins of each map, all even or all odd.

    Returns:
      `(number, *[max(bins)] * axes, channels)`.

    Example:
      >>> print(adaptive_average_each(jnp.arange(8.0).reshape(2, 4, 1), (1, 3))[..., 0])
      [[0.  1.5 0. ]
       [4.5 5.5 6.5]]
    """
    if len(x) != len(bins) or any((max(bins) - k) % 2 for k in bins):
        raise ValueError(f"x of shape {x.shape} needs as many bins, all even or odd, not {bins}")
    x, axes = floating(x), x.ndim - 2
    for size in reversed(x.shape[1:-1]):
        margins = [(max(bins) - k) // 2 for k in bins]
        matrices = np.stack(
            [
                np.pad(adaptive_matrix(size, k), [(margin, margin), (0, 0)])
                for k, margin in zip(bins, margins, strict=True)
            ]
        )
        # The last axis that is not yet pooled; what comes of it goes to the front.
        contract = (((2,), (axes,)), ((0,), (0,)))
        x = jax.lax.dot_general(jnp.asarray(matrices, x.dtype), x, contract)
    return x
