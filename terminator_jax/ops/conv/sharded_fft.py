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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rfftn(x: jax.Array, dims: int) -> jax.Array:
    """Computes `jnp.fft.rfftn` over the last `dims` axes.

    Example:
      >>> rfftn(jnp.ones((2, 4, 6)), 1).shape
      (2, 4, 4)
    """
    return _forward(dims)(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def irfftn(z: jax.Array, lengths: Sequence[int]) -> jax.Array:
    """Computes `jnp.fft.irfftn` over the last axes; `lengths`, a tuple, are those of the result.

    Example:
      >>> print(irfftn(rfftn(jnp.arange(5.0), 1), (5,)).round(4))
      [0. 1. 2. 3. 4.]
    """
    return _inverse(lengths)(z)


# With c how often a frequency counts (`conjugate_counts`), N the positions and θ the phases,
#   rfftn y_k = Σ_n x_n exp(-iθ);   irfftn x_n = Re Σ_k c_k z_k exp(iθ) / N.
rfftn.defvjp(
    lambda x, dims: (rfftn(x, dims), _Lengths(x.shape[-dims:])),
    lambda dims, lengths, dy: (
        irfftn(jnp.conj(dy) / _counts_like(dy, lengths[-1]), tuple(lengths)) * math.prod(lengths),
    ),
)
irfftn.defvjp(
    lambda z, lengths: (irfftn(z, lengths), None),
    lambda lengths, _, dx: (
        jnp.conj(rfftn(dx, len(lengths))) * _counts_like(dx, lengths[-1]) / math.prod(lengths),
    ),
)


def conjugate_counts(length: int) -> np.ndarray:
    """Returns how often half an axis counts each frequency: twice, but for those without a twin."""
    counts = np.full(length // 2 + 1, 2.0)
    counts[0] = 1
    if length % 2 == 0:
        counts[-1] = 1
    return counts


def _counts_like(x: jax.Array, length: int) -> jax.Array:
    counts = jnp.asarray(conjugate_counts(length), jnp.finfo(x.dtype).dtype)
    return counts.reshape((1,) * (x.ndim - 1) + (-1,))


@jax.tree_util.register_static
class _Lengths(tuple):
    """Positions per axis, known when tracing."""


@functools.cache
def _forward(dims: int):
    return shared(lambda x: jnp.fft.rfftn(x, axes=range(-dims, 0)), dims)


@functools.cache
def _inverse(lengths: tuple[int, ...]):
    axes = range(-len(lengths), 0)
    return shared(lambda z: jnp.fft.irfftn(z, lengths, axes), len(lengths))
