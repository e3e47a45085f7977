"""Convolution by products of spectra: the methods `fft` and `dft`.

The spectra of map and kernel are kept for the gradient, which then takes one transform and not
three.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops.conv.fourier import (
    DFT,
    FFT,
    LongDFT,
    Spectrum,
    Transform,
    conjugate,
    multiply,
)
from terminator_jax.ops.conv.window import Window, all_positions

# `dft` uses one dense matrix per axis up to this length, and folds longer ones.
DENSE_UP_TO = 1024


@jax.tree_util.register_static
class _Sizes(NamedTuple):
    """Shapes of map and kernel, known when tracing."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fft_convolve(window: Window, method: str, maps: list[jax.Array], kernel: jax.Array):
    """Convolves each map by its spectrum, which the gradient uses again: a transform, not three.

    Args:
      window: what is wanted of the results.
      method: `fft` or `dft`.
      maps: `(channels, batch, *spatial)` each, of one shape.
      kernel: `(channels, 1 or batch, *size)`.
    """
    return _forward(window, method, maps, kernel)[0]


def _forward(window, method, maps, kernel):
    transform = _transform(window, method, maps[0].shape[2:], kernel.shape[2:])
    response = transform.forward(kernel, all_positions(kernel))
    spectra = [transform.forward(x, all_positions(x)) for x in maps]
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
    return dxs, _kernel_grad(transform, total, sizes.kernel)


fft_convolve.defvjp(_forward, _backward)


def _kernel_grad(transform: Transform, product: Spectrum, shape: Sequence[int]) -> jax.Array:
    """Computes the kernel's gradient: summed over the batch if the batch shares it."""
    if shape[1] == 1:
        product = Spectrum(*(jnp.sum(part, 1, keepdims=True) for part in product))
    return transform.inverse(product, [range(k) for k in shape[2:]])


def kernel_gradients(
    windows: Sequence[Window],
    maps: Sequence[jax.Array],
    dy: jax.Array,
    shapes: Sequence[Sequence[int]],
) -> list[jax.Array]:
    """Computes the gradients of kernels that convolved a map each, by `dft`, on equal circles.

    Args:
      windows: of the results, of one count.
      maps: `(channels, batch, *spatial)` each, of one shape.
      dy: gradients of the results, joined along their channels.
      shapes: of the kernels, `(channels, 1 or batch, *size)`.

    Returns:
      A gradient for each kernel.
    """
    common, size = _common(windows, [shape[2:] for shape in shapes])
    transform = _transform(common, "dft", maps[0].shape[2:], size)
    batch = shapes[0][1]

    def part(x, dy):
        a = transform.forward(x, all_positions(x))
        d = transform.forward(dy, common.positions())
        return _kernel_grad(transform, multiply(d, conjugate(a)), (len(x), batch, *size))

    pairs = zip(maps, jnp.split(dy, len(maps)), strict=True)
    gradients = [part(*pair) for pair in pairs]
    own = []
    for window, shape, gradient in zip(windows, shapes, gradients, strict=True):
        margins = [s - t for s, t in zip(common.start, window.start, strict=True)]
        cut = (slice(m, m + k) for m, k in zip(margins, shape[2:], strict=True))
        own.append(gradient[(..., *cut)])
    return own


def _common(
    windows: Sequence[Window], sizes: Sequence[Sequence[int]]
) -> tuple[Window, tuple[int, ...]]:
    """Returns a window and a size of kernel among whose positions are those of all the kernels."""
    starts = np.array([w.start for w in windows])
    start = starts.max(0)
    size = (start - starts + np.array(sizes)).max(0)
    return Window(tuple(map(int, start)), windows[0].count, False), tuple(map(int, size))


def _transform(
    window: Window, method: str, spatial: Sequence[int], size: Sequence[int]
) -> Transform:
    """Returns a transform on circles long enough that what wraps around is not wanted."""
    if window.circular:
        return FFT(spatial, exact=True) if method == "fft" else DFT(spatial)
    axes = zip(window.start, window.count, spatial, size, strict=True)
    lengths = [max(n + k - 1 - s, s + c, n, k) for s, c, n, k in axes]
    if method == "fft":
        return FFT(lengths)
    long = len(lengths) == 1 and lengths[0] > DENSE_UP_TO
    return LongDFT(lengths) if long else DFT(lengths)
