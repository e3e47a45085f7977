"""Convolution by one multiply-add per kernel position: the method `direct`."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops.conv.spectral import kernel_gradients
from terminator_jax.ops.conv.window import Window

# Positions in the matrix products of the gradient.
TILE = 64


def direct(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes the window of the convolution of a `(channels, batch, *spatial)` map."""
    return direct_each((window,), (x,), (kernel,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def direct_each(
    windows: Sequence[Window], maps: Sequence[jax.Array], kernels: Sequence[jax.Array]
) -> jax.Array:
    """Convolves like maps with a kernel each; JAX's own gradient has a pass for each position.

    Returns:
      The windows, joined along channels.
    """
    triples = zip(windows, maps, kernels, strict=True)
    return jnp.concatenate([_taps(x, k, w.start, w.count) for w, x, k in triples])


def _taps(x: jax.Array, kernel: jax.Array, start: Sequence[int], count: Sequence[int]) -> jax.Array:
    """Computes the window as a sum of shifted maps."""
    size = kernel.shape[2:]
    padded = _padded(x, start, count, size)
    kernel = kernel.reshape(*kernel.shape, *(1,) * len(size))
    out = jnp.zeros((*x.shape[:2], *count), x.dtype)
    for row in np.ndindex(*size[:-1]):
        # Summed by rows: short chains of additions run at twice the speed of one long chain.
        taps = [(*row, last) for last in range(size[-1])]
        out += sum(
            _shifted(padded, tap, size, count) * kernel[(slice(None), slice(None), *tap)]
            for tap in taps
        )
    return out


def _padded(
    x: jax.Array, start: Sequence[int], count: Sequence[int], size: Sequence[int]
) -> jax.Array:
    """Pads a map with zeros: its position 0 is the first that the last tap reaches."""
    axes = zip(start, count, x.shape[2:], size, strict=True)
    return jnp.pad(x, [(0, 0), (0, 0), *((k - 1 - s, s + c - n) for s, c, n, k in axes)])


def _shifted(
    padded: jax.Array, tap: Sequence[int], size: Sequence[int], count: Sequence[int]
) -> jax.Array:
    """Returns what one tap of a kernel is multiplied by, for each of the wanted positions."""
    offsets = [k - 1 - r for r, k in zip(tap, size, strict=True)]
    return padded[(..., *(slice(o, o + c) for o, c in zip(offsets, count, strict=True)))]


def _forward(windows, maps, kernels):
    return direct_each(windows, maps, kernels), (maps, kernels)


def _backward(windows, residuals, dy):
    maps, kernels = residuals
    parts = list(zip(windows, maps, kernels, jnp.split(dy, len(maps)), strict=True))
    dmaps = tuple(_input_grad(*part) for part in parts)
    if dy.ndim == 3:
        return dmaps, tuple(_kernel_grad_1d(*part) for part in parts)
    return dmaps, tuple(kernel_gradients(windows, maps, dy, [k.shape for k in kernels]))


direct_each.defvjp(_forward, _backward)


def _input_grad(window: Window, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """Computes the gradient of a map: a convolution with the kernel flipped.

    `dx[i] = Σ_j dy[j] kernel[start + j - i]`.
    """
    flipped = jnp.flip(kernel, range(2, kernel.ndim))
    axes = zip(window.start, kernel.shape[2:], strict=True)
    return _taps(dy, flipped, [k - 1 - s for s, k in axes], x.shape[2:])


def _kernel_grad_1d(window: Window, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """Computes the gradient of a sequence's kernel: windows of x times a band matrix."""
    [count], k = window.count, kernel.shape[2]
    tiles = -(-count // TILE)
    tile = -(-count // tiles)
    whole = tiles * tile
    dy = jnp.pad(dy, [(0, 0), (0, 0), (0, whole - count)]).reshape(*x.shape[:2], tiles, tile)
    windows = _unfold(_padded(x, window.start, [whole], [k]), tiles, tile, tile + k - 1)

    def product(kernel):
        return _batched_einsum(windows, _toeplitz(jnp.flip(kernel, 2), tile), "mw", "tw", "mt")

    return jax.vjp(product, kernel)[1](dy)[0]


def _unfold(x: jax.Array, number: int, step: int, width: int) -> jax.Array:
    """Returns `x[..., n * step : n * step + width]` as row n of the last two axes."""
    shifts = range(0, width, step)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, shifts[-1] + number * step - x.shape[-1])])
    parts = [x[..., s : s + number * step].reshape(*x.shape[:-1], number, step) for s in shifts]
    return jnp.concatenate(parts, -1)[..., :width]


def _toeplitz(kernel: jax.Array, rows: int) -> jax.Array:
    """Returns `(channels, 1 or batch, rows, rows + k - 1)`: row n has the kernel from n on."""
    k = kernel.shape[2]
    width = rows + k - 1
    row = jnp.pad(kernel, [(0, 0), (0, 0), (0, width + 1 - k)])
    flat = jnp.tile(row, rows)[..., : rows * width]
    return flat.reshape(*kernel.shape[:2], rows, width)


def _batched_einsum(
    x: jax.Array, matrix: jax.Array, inputs: str, axes: str, outputs: str
) -> jax.Array:
    """Computes `einsum` over axes besides channels and batch; the matrix may have a batch of 1."""
    batch, matrix = ("", matrix[:, 0]) if matrix.shape[1] == 1 else ("b", matrix)
    formula = f"cb{inputs},c{batch}{axes}->cb{outputs}"
    return jnp.einsum(formula, x, matrix, precision=jax.lax.Precision.HIGHEST)
