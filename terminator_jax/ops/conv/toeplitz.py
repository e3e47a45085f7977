"""Convolution by one matrix per channel, from every position to every other: the method `dense`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops.conv.window import Window


def dense(window: Window, maps: Sequence[jax.Array], kernel: jax.Array) -> list[jax.Array]:
    """Computes the window of the convolution of each `(channels, batch, *spatial)` map."""
    matrix = _matrix(window, maps[0].shape[2:], kernel)
    return [_apply_toeplitz(x, matrix) for x in maps]


def _matrix(window: Window, spatial: Sequence[int], kernel: jax.Array) -> jax.Array:
    """Returns each channel's convolution as a matrix, `(channels, 1 or batch, *spatial, *count)`.

    The kernel is spread over it by products with zeros and ones, whose gradient is a product too.
    """
    axes = range(len(spatial))
    for axis in axes:
        # Contracts the first axis of the kernel that is left; what it becomes goes to the end.
        shift = _shift_tensor(window, axis, spatial[axis], kernel.shape[2])
        shift = jnp.asarray(shift, kernel.dtype)
        kernel = jnp.tensordot(kernel, shift, axes=(2, 0), precision=jax.lax.Precision.HIGHEST)
    order = [*(2 + 2 * axis for axis in axes), *(3 + 2 * axis for axis in axes)]
    return jnp.transpose(kernel, (0, 1, *order))


def _shift_tensor(window: Window, axis: int, n: int, k: int) -> np.ndarray:
    """Returns `(k, n, count)`: 1 where a kernel's position takes a map's position to a result's."""
    wanted = np.array(window.positions()[axis])
    r = wanted - np.arange(n)[:, None]
    return np.arange(k)[:, None, None] == (r % n if window.circular else r)


def _apply_toeplitz(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiplies every channel's map, or every sample's, with its matrix."""
    inputs, outputs = "ijk"[: x.ndim - 2], "pqr"[: x.ndim - 2]
    return through(x, matrix, inputs, inputs + outputs, outputs)


def through(x: jax.Array, matrix: jax.Array, inputs: str, axes: str, outputs: str) -> jax.Array:
    """Computes `einsum` over axes besides channels and batch; the matrix may have a batch of 1."""
    batch, matrix = ("", matrix[:, 0]) if matrix.shape[1] == 1 else ("b", matrix)
    formula = f"cb{inputs},c{batch}{axes}->cb{outputs}"
    return jnp.einsum(formula, x, matrix, precision=jax.lax.Precision.HIGHEST)
