"""Depthwise correlation of a map with a kernel of any size, zero 'same' padding.

Three ways that agree: `direct` is the definition, one multiply-add per kernel position; `dft` the
Fourier transform written as products with cosine and sine matrices, whose cost does not depend on
the kernel's size and which suits matrix units and the CPU; `auto` chooses.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

METHODS = ("auto", "dft", "direct")


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
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {METHODS}")
    if x.ndim < 3 or kernel.ndim != x.ndim - 1 or kernel.shape[-1] != x.shape[-1]:
        raise ValueError(
            "expected x (batch, *spatial, channels) and kernel (*size, channels) with as many"
            f" axes and channels, got {x.shape} and {kernel.shape}"
        )
    if method == "auto":
        method = "direct" if math.prod(kernel.shape[:-1]) <= 3 else "dft"
    return {"dft": _dft, "direct": _direct}[method](x, kernel)


def _direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
    sizes, spatial = kernel.shape[:-1], x.shape[1:-1]
    before = [((k - 1) // 2, k // 2) for k in sizes]
    padded = jnp.pad(x, [(0, 0), *before, (0, 0)])
    out = jnp.zeros_like(x)
    for offset in np.ndindex(*sizes):
        window = tuple(slice(o, o + n) for o, n in zip(offset, spatial, strict=True))
        out += padded[(slice(None), *window)] * kernel[offset].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return out


def _dft(x: jax.Array, kernel: jax.Array) -> jax.Array:
    plan = Plan(x.shape[1:-1], kernel.shape[:-1])
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    spectrum = transform(x.astype(dtype), plan.forward)
    response = transform(kernel.astype(dtype)[None], plan.kernel)
    return invert(multiply(spectrum, response), plan).astype(x.dtype)


class Spectrum(NamedTuple):
    """Real and imaginary part of a half spectrum, `(batch, *frequencies, channels)` each."""

    real: jax.Array
    imag: jax.Array


class Plan:
    """The lengths and matrices of one size of map and kernel.

    A circular transform of length `n + max padding` gives the n wanted outputs of a linear
    correlation, since what wraps around falls on zeros. The last axis keeps half its frequencies.
    """

    def __init__(self, size: Sequence[int], kernel_size: Sequence[int]):
        self.lengths = [n + k // 2 for n, k in zip(size, kernel_size, strict=True)]
        counts = [*self.lengths[:-1], self.lengths[-1] // 2 + 1]
        axes = list(zip(size, kernel_size, self.lengths, counts, strict=True))
        self.forward = [_waves(range(n), m, f, -1) for n, _, m, f in axes]
        # Conjugate (a correlation), and delayed by the padding.
        self.kernel = [
            _waves(range(-((k - 1) // 2), k // 2 + 1), m, f, +1) for _, k, m, f in axes
        ]
        self.inverse = [_waves(range(n), m, f, +1) / m for n, _, m, f in axes]
        m = self.lengths[-1]
        weight = np.full(m // 2 + 1, 2.0)
        weight[0] = 1
        if m % 2 == 0:
            weight[-1] = 1
        self.inverse[-1] = self.inverse[-1] * weight


def _waves(positions: range, length: int, frequencies: int, sign: int) -> np.ndarray:
    """`exp(sign 2πi position frequency / length)`, `(positions, frequencies)`, exact phases."""
    turns = np.outer(positions, np.arange(frequencies)) % length
    return np.exp(sign * 2j * np.pi * turns / length)


def transform(x: jax.Array, waves: Sequence[np.ndarray]) -> Spectrum:
    """Real `(batch, *size, channels)` to its half spectrum, last spatial axis first."""
    last = x.ndim - 2
    real, imag = (_along(x, part, last) for part in _parts(waves[-1], x.dtype))
    for axis, wave in enumerate(waves[:-1], start=1):
        cos, sin = _parts(wave, x.dtype)
        real, imag = (
            _along(real, cos, axis) - _along(imag, sin, axis),
            _along(real, sin, axis) + _along(imag, cos, axis),
        )
    return Spectrum(real, imag)


def multiply(a: Spectrum, b: Spectrum) -> Spectrum:
    """Complex product, broadcasting over the batch."""
    return Spectrum(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real)


def invert(spectrum: Spectrum, plan: Plan) -> jax.Array:
    """Half spectrum to the wanted positions of the real map."""
    real, imag = spectrum
    for axis, wave in enumerate(plan.inverse[:-1], start=1):
        cos, sin = (part.T for part in _parts(wave, real.dtype))
        real, imag = (
            _along(real, cos, axis) - _along(imag, sin, axis),
            _along(real, sin, axis) + _along(imag, cos, axis),
        )
    cos, sin = (part.T for part in _parts(plan.inverse[-1], real.dtype))
    last = real.ndim - 2
    return _along(real, cos, last) - _along(imag, sin, last)


def _parts(wave: np.ndarray, dtype) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(wave.real, dtype), jnp.asarray(wave.imag, dtype)


def _along(x: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """Contracts one axis of `x` with the first of `matrix`, leaving the result in its place."""
    out = jnp.tensordot(x, matrix, axes=(axis, 0), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(out, -1, axis)
