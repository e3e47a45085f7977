"""Depthwise correlation of a map with a kernel of any size, zero 'same' padding.

Two ways that agree: `direct` is the definition, one multiply-add per kernel position, which no
small kernel is beaten at; `dft` is the Fourier transform written as products with cosine and sine
matrices, whose cost does not depend on the kernel's size and which suits matrix units.
Either way the gradient of the kernel, a correlation of two large maps, goes through the transform.

Inside, arrays are channel-major, `(channels, batch, *spatial)`: see `channel_major.py`.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

METHODS = ("auto", "dft", "direct")
# `auto` takes `direct` up to so many kernel positions.
DIRECT_UP_TO = 81


def depthwise_correlate(x: jax.Array, kernel: jax.Array, *, method: str = "auto") -> jax.Array:
    """Correlates every channel of a map with its own kernel, zero 'same' padding, no flip.

    `out[b, i, c] = Σ_r x[b, i + r - (k-1)//2, c] kernel[r, c]`

    Args:
      x: `(batch, *spatial, channels)`.
      kernel: `(*kernel size, channels)`, any size per axis, also beyond the map's.
      method: one of `METHODS`.

    Returns:
      `(batch, *spatial, channels)` in the dtype of `x`.

    Raises:
      ValueError: for an unknown method, or shapes that do not fit.

    Example:
      >>> x = jnp.ones((2, 8, 8, 3))
      >>> depthwise_correlate(x, jnp.ones((5, 5, 3)))[0, 0, 0].tolist()
      [9.0, 9.0, 9.0]
    """
    if x.ndim < 3 or kernel.ndim != x.ndim - 1 or kernel.shape[-1] != x.shape[-1]:
        raise ValueError(
            "expected x (batch, *spatial, channels) and kernel (*size, channels) with as many"
            f" axes and channels, got {x.shape} and {kernel.shape}"
        )
    out = correlate(jnp.moveaxis(x, -1, 0), jnp.moveaxis(kernel, -1, 0), method=method)
    return jnp.moveaxis(out, 0, -1)


def correlate(x: jax.Array, kernel: jax.Array, *, method: str = "auto") -> jax.Array:
    """`depthwise_correlate` of channel-major arrays.

    Args:
      x: `(channels, batch, *spatial)`.
      kernel: `(channels, *kernel size)`.
      method: one of `METHODS`.

    Returns:
      The shape and dtype of `x`.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {METHODS}")
    if method == "auto":
        method = "direct" if math.prod(kernel.shape[1:]) <= DIRECT_UP_TO else "dft"
    return {"dft": _dft, "direct": _direct}[method](x, kernel)


@jax.custom_vjp
def _direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _taps(x, kernel, [(k - 1) // 2 for k in kernel.shape[1:]])


def _taps(x: jax.Array, kernel: jax.Array, before: Sequence[int]) -> jax.Array:
    """The sum of shifted maps, with `before` zeros ahead of each axis."""
    sizes, spatial = kernel.shape[1:], x.shape[2:]
    margins = [(b, k - 1 - b) for b, k in zip(before, sizes, strict=True)]
    padded = jnp.pad(x, [(0, 0), (0, 0), *margins])
    kernel = kernel.astype(x.dtype).reshape(*kernel.shape, *(1,) * (x.ndim - 1))
    out = jnp.zeros_like(x)
    for row in np.ndindex(*sizes[:-1]):
        # Summed by rows: short chains of additions run at twice the speed of one long chain.
        taps = [(*row, last) for last in range(sizes[-1])]
        out += sum(_window(padded, tap, spatial) * kernel[(slice(None), *tap)] for tap in taps)
    return out


def _window(padded: jax.Array, start: Sequence[int], size: Sequence[int]) -> jax.Array:
    return padded[(..., *(slice(o, o + n) for o, n in zip(start, size, strict=True)))]


def _direct_forward(x, kernel):
    return _direct(x, kernel), (x, kernel)


def _direct_backward(residuals, dy):
    x, kernel = residuals
    flipped = jnp.flip(kernel, range(1, kernel.ndim))
    dx = _taps(dy, flipped, [k // 2 for k in kernel.shape[1:]])
    return dx, kernel_gradient(x, dy, kernel.shape[1:]).astype(kernel.dtype)


_direct.defvjp(_direct_forward, _direct_backward)


def _dft(x: jax.Array, kernel: jax.Array) -> jax.Array:
    plan = Plan(x.shape[2:], kernel.shape[1:])
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    spectrum = transform(x.astype(dtype), plan.forward)
    response = transform(kernel.astype(dtype)[:, None], plan.kernel)
    return invert(multiply(spectrum, response), plan.inverse).astype(x.dtype)


def kernel_gradient(x: jax.Array, dy: jax.Array, kernel_size: Sequence[int]) -> jax.Array:
    """`Σ_b,i dy[c, b, i] x[c, b, i + r - (k-1)//2]` for every kernel position r.

    Args:
      x: `(channels, batch, *spatial)`, what was correlated.
      dy: the same shape, the gradient of the result.
      kernel_size: positions of the kernel per axis.

    Returns:
      `(channels, *kernel_size)` in float32 or wider.
    """
    plan = Plan(x.shape[2:], kernel_size)
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    a, b = (transform(z.astype(dtype), plan.forward) for z in (x, dy))
    product = Spectrum(
        jnp.sum(a.real * b.real + a.imag * b.imag, axis=1, keepdims=True),
        jnp.sum(a.imag * b.real - a.real * b.imag, axis=1, keepdims=True),
    )
    return invert(product, plan.lags)[:, 0]


class Spectrum(NamedTuple):
    """Real and imaginary part of a half spectrum, spatial axes in reverse order.

    `(channels, batch, *reversed frequencies)` each.
    """

    real: jax.Array
    imag: jax.Array


class Plan:
    """The matrices of one size of map and kernel, one per axis and use.

    A circular transform of length `n + k//2` gives the n wanted outputs of a linear correlation,
    since what wraps around falls on zeros. The last axis keeps half its frequencies.

    Attributes:
      forward: of a map.
      kernel: of a kernel: conjugate, as for a correlation, and delayed by the padding.
      inverse: back to a map.
      lags: back to a kernel's positions.
    """

    def __init__(self, size: Sequence[int], kernel_size: Sequence[int]):
        lengths = [n + k // 2 for n, k in zip(size, kernel_size, strict=True)]
        counts = [*lengths[:-1], lengths[-1] // 2 + 1]
        maps = [range(n) for n in size]
        lags = [range(-((k - 1) // 2), k // 2 + 1) for k in kernel_size]
        self.forward = _matrices(maps, lengths, counts, -1)
        self.kernel = _matrices(lags, lengths, counts, +1)
        self.inverse = _inverses(maps, lengths, counts)
        self.lags = _inverses(lags, lengths, counts)


def _matrices(positions, lengths, counts, sign) -> list[np.ndarray]:
    """`exp(sign 2πi position frequency / length)` of each axis, `(positions, frequencies)`."""
    axes = zip(positions, lengths, counts, strict=True)
    turns = [(np.outer(p, np.arange(f)) % m) / m for p, m, f in axes]
    return [np.exp(sign * 2j * np.pi * t) for t in turns]


def _inverses(positions, lengths, counts) -> list[np.ndarray]:
    """The matrices back, `(frequencies, positions)`; the half axis counts its twins."""
    twins = np.full(counts[-1], 2.0)
    twins[0] = 1
    if lengths[-1] % 2 == 0:
        twins[-1] = 1
    matrices = [
        w.T / m for w, m in zip(_matrices(positions, lengths, counts, +1), lengths, strict=True)
    ]
    return [*matrices[:-1], matrices[-1] * twins[:, None]]


def transform(x: jax.Array, matrices: Sequence[np.ndarray]) -> Spectrum:
    """Real `(channels, batch, *size)` to its half spectrum."""
    spectrum = Spectrum(*_product(x, matrices[-1], -1))
    for axis, matrix in enumerate(reversed(matrices[:-1]), start=2):
        spectrum = _complex_product(spectrum, matrix, -axis)
    return spectrum


def multiply(a: Spectrum, b: Spectrum) -> Spectrum:
    """Complex product, broadcasting over the batch."""
    return Spectrum(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real)


def invert(spectrum: Spectrum, matrices: Sequence[np.ndarray]) -> jax.Array:
    """Half spectrum to the positions that the matrices lead to: `(channels, batch, *size)`."""
    for axis, matrix in enumerate(matrices[:-1], start=1):
        spectrum = _complex_product(spectrum, matrix, -axis)
    last = -len(matrices)
    return _along(spectrum.real, matrices[-1].real, last) - _along(
        spectrum.imag, matrices[-1].imag, last
    )


def _complex_product(x: Spectrum, matrix: np.ndarray, axis: int) -> Spectrum:
    (rr, ri), (ir, ii) = (_product(part, matrix, axis) for part in x)
    return Spectrum(rr - ii, ri + ir)


def _product(x: jax.Array, matrix: np.ndarray, axis: int) -> list[jax.Array]:
    """`x` times the real and the imaginary part of a matrix, in one product."""
    return jnp.split(_along(x, np.concatenate([matrix.real, matrix.imag], 1), axis), 2, axis=-1)


def _along(x: jax.Array, matrix: np.ndarray, axis: int) -> jax.Array:
    """Contracts one axis of `x` with the first of `matrix`, and puts the result last."""
    contract = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)
    return contract(x, jnp.asarray(matrix, x.dtype), axes=(axis, 0))
