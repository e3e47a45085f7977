"""Convolution by products of spectra: the methods `fft` and `dft`.

The spectra of map and kernel are kept for the gradient, which then takes one transform and not
three.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from terminator_jax.ops.fourier import DFT, FFT, LongDFT, Spectrum, Transform, conjugate, multiply
from terminator_jax.ops.window import Window, everywhere

# `dft` uses one dense matrix per axis up to this length, and folds longer ones.
DENSE_UP_TO = 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def by_spectra(window: Window, method: str, maps: list[jax.Array], kernel: jax.Array):
    """The window of the convolution of each `(channels, batch, *spatial)` map."""
    return _forward(window, method, maps, kernel)[0]


def _forward(window, method, maps, kernel):
    transform = _transform(window, method, maps[0].shape[2:], kernel.shape[2:])
    response = transform.forward(kernel, everywhere(kernel))
    spectra = [transform.forward(x, everywhere(x)) for x in maps]
    out = [transform.inverse(multiply(a, response), window.positions()) for a in spectra]
    return out, (spectra, response, _Sizes(maps[0].shape, kernel.shape))


def _backward(window, method, residuals, gradients):
    spectra, response, sizes = residuals
    transform = _transform(window, method, sizes.x[2:], sizes.kernel[2:])
    ds = [transform.forward(dy, window.positions()) for dy in gradients]
    back = conjugate(response)
    whole = [range(n) for n in sizes.x[2:]]
    products = [multiply(d, conjugate(a)) for d, a in zip(ds, spectra, strict=True)]
    total = Spectrum(*(sum(parts) for parts in zip(*products, strict=True)))
    dxs = [transform.inverse(multiply(d, back), whole) for d in ds]
    return dxs, _kernel_part(transform, total, sizes.kernel)


by_spectra.defvjp(_forward, _backward)


def _kernel_part(transform: Transform, product: Spectrum, shape: Sequence[int]) -> jax.Array:
    """The kernel's gradient: summed over the batch if the batch shares it."""
    if shape[1] == 1:
        product = Spectrum(*(jnp.sum(part, 1, keepdims=True) for part in product))
    return transform.inverse(product, [range(k) for k in shape[2:]])


@jax.tree_util.register_static
class _Sizes(NamedTuple):
    """Shapes of map and kernel, known when tracing."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]


def kernel_gradient(window: Window, x: jax.Array, dy: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The gradient of a kernel of this shape, `(channels, 1 or batch, *size)`, by `dft`."""
    transform = _transform(window, "dft", x.shape[2:], shape[2:])
    a = transform.forward(x, everywhere(x))
    d = transform.forward(dy, window.positions())
    return _kernel_part(transform, multiply(d, conjugate(a)), shape)


def _transform(
    window: Window, method: str, spatial: Sequence[int], size: Sequence[int]
) -> Transform:
    """A transform on circles long enough that what wraps around is not wanted."""
    if window.circular:
        return FFT(spatial, exact=True) if method == "fft" else DFT(spatial)
    axes = zip(window.start, window.count, spatial, size, strict=True)
    lengths = [max(n + k - 1 - s, s + c, n, k) for s, c, n, k in axes]
    if method == "fft":
        return FFT(lengths)
    long = len(lengths) == 1 and lengths[0] > DENSE_UP_TO
    return LongDFT(lengths) if long else DFT(lengths)
