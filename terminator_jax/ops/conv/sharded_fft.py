"""Real FFTs of the last axes that devices can share along the others.

XLA's own partitioner gathers whatever an FFT reads, on every device, although each map has a
transform of its own. These tell it so; they are differentiable any number of times (in reverse)
and can be mapped.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops.conv.partitioning import shared


def rfftn(x: jax.Array, dims: int) -> jax.Array:
    """Computes `jnp.fft.rfftn` over the last `dims` axes.

    Example:
      >>> rfftn(jnp.ones((2, 4, 6)), 1).shape
      (2, 4, 4)
    """
    return _transform(x.shape[-dims:], False, x)


def irfftn(z: jax.Array, lengths: Sequence[int]) -> jax.Array:
    """Computes `jnp.fft.irfftn` over the last axes, to as many positions as `lengths` says.

    Example:
      >>> print(irfftn(rfftn(jnp.arange(5.0), 1), (5,)).round(4))
      [0. 1. 2. 3. 4.]
    """
    return _transform(tuple(lengths), True, z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _transform(lengths: tuple[int, ...], inverse: bool, x: jax.Array) -> jax.Array:
    """Computes a real FFT or its inverse. Its gradient is written out: `shared` gives none."""
    return _inverse(lengths)(x) if inverse else _forward(len(lengths))(x)


def _transform_backward(lengths, inverse, _, dy):
    # With c how often a frequency counts (`conjugate_counts`), N the positions and θ the phases,
    #   rfftn y_k = Σ_n x_n exp(-iθ);   irfftn x_n = Re Σ_k c_k z_k exp(iθ) / N.
    scale = conjugate_counts(lengths[-1]) / math.prod(lengths)
    scale = jnp.asarray(scale, jnp.finfo(dy.dtype).dtype).reshape((1,) * (dy.ndim - 1) + (-1,))
    if inverse:
        return (jnp.conj(_transform(lengths, False, dy)) * scale,)
    return (_transform(lengths, True, jnp.conj(dy) / scale),)


def _transform_forward(lengths, inverse, x):
    return _transform(lengths, inverse, x), None


_transform.defvjp(_transform_forward, _transform_backward)


def conjugate_counts(length: int) -> np.ndarray:
    """Returns how often half an axis counts each frequency: twice, but for those without a twin."""
    counts = np.full(length // 2 + 1, 2.0)
    counts[0] = 1
    if length % 2 == 0:
        counts[-1] = 1
    return counts


@functools.cache
def _forward(dims: int):
    return shared(lambda x: jnp.fft.rfftn(x, axes=range(-dims, 0)), dims)


@functools.cache
def _inverse(lengths: tuple[int, ...]):
    axes = range(-len(lengths), 0)
    return shared(lambda z: jnp.fft.irfftn(z, lengths, axes), len(lengths))
