"""Several maps, each convolved with a kernel of its own: the four local branches in one call."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from terminator_jax.ops.channels_first import match_varying_axes
from terminator_jax.ops.conv.direct import direct_each
from terminator_jax.ops.conv.methods import convolve, crop_kernel, select_method
from terminator_jax.ops.conv.window import Window, bounds
from terminator_jax.ops.dtypes import at_least_float32, floating
from terminator_jax.ops.platform import by_platform


def convolve_per_map(
    maps: Sequence[jax.Array], kernels: Sequence[jax.Array], *, padding: str, correlate: bool
) -> jax.Array:
    """Convolves each map with a kernel of its own, and joins them along their channels.

    Args:
      maps: `(channels, batch, *spatial)` each, of one shape.
      kernels: `(channels, 1, *size)` each, of sizes of their own.
      padding: all but `valid`.
      correlate: see `fft_conv`.

    Returns:
      `(len(maps) * channels, batch, *spatial)`.
    """
    maps, kernels = floating((list(maps), list(kernels)))
    options = dict(padding=padding, correlate=correlate)
    spatial = maps[0].shape[2:]

    def choose(platform: str) -> tuple[str, ...]:
        return tuple(select_method(platform, spatial, k.shape[2:], False) for k in kernels)

    def function(methods: tuple[str, ...]):
        if set(methods) == {"lax"}:
            return functools.partial(_grouped, **options)
        if set(methods) == {"direct"} and padding != "circular":
            return functools.partial(_fused_shift_add, **options)
        return functools.partial(_one_by_one, methods, **options)

    return by_platform(choose, function, maps, kernels)


def _one_by_one(
    methods: Sequence[str], maps: Sequence[jax.Array], kernels: Sequence[jax.Array], **options
) -> jax.Array:
    """Computes `convolve_per_map` one after the other, each by its own method."""
    triples = zip(maps, kernels, methods, strict=True)
    return jnp.concatenate([convolve(x, k, method=method, **options) for x, k, method in triples])


def _grouped(
    maps: Sequence[jax.Array], kernels: Sequence[jax.Array], padding: str, correlate: bool
) -> jax.Array:
    """Computes `convolve_per_map` as one grouped convolution, all kernels padded to the largest.

    Its time does not depend on the size of the kernels.
    """
    spatial = maps[0].shape[2:]
    largest = tuple(map(max, zip(*(k.shape[2:] for k in kernels), strict=True)))
    options = dict(padding=padding, correlate=correlate)
    kernels = [_pad_kernel(k, largest, spatial, **options) for k in kernels]
    return convolve(jnp.concatenate(maps), jnp.concatenate(kernels), method="lax", **options)


def _fused_shift_add(
    maps: Sequence[jax.Array], kernels: Sequence[jax.Array], padding: str, correlate: bool
) -> jax.Array:
    """Computes `convolve_per_map` by the method `direct`, with all gradients together."""
    dtype, spatial = maps[0].dtype, maps[0].shape[2:]
    wide = at_least_float32(dtype)
    windows, useful = [], []
    for kernel in kernels:
        kernel = jnp.flip(kernel, range(2, kernel.ndim)) if correlate else kernel
        start, count = bounds(spatial, kernel.shape[2:], padding, correlate)
        kernel, start = crop_kernel(kernel, spatial, start, count)
        windows.append(Window(tuple(start), tuple(count), False))
        useful.append(kernel)
    arrays = match_varying_axes(*(a.astype(wide) for a in (*maps, *useful)))
    maps, useful = arrays[: len(maps)], arrays[len(maps) :]
    return direct_each(tuple(windows), maps, useful).astype(dtype)


def _pad_kernel(
    kernel: jax.Array, size: Sequence[int], spatial: Sequence[int], padding: str, correlate: bool
) -> jax.Array:
    """Pads a kernel to a larger size that gives the same result."""
    own = kernel.shape[2:]
    here, there = (bounds(spatial, s, padding, correlate)[0] for s in (own, size))
    # How many zeros come before it and after it; a correlation flips the kernel.
    before = [b - a for a, b in zip(here, there, strict=True)]
    after = [k - n - b for k, n, b in zip(size, own, before, strict=True)]
    margins = zip(*((after, before) if correlate else (before, after)), strict=True)
    return jnp.pad(kernel, [(0, 0), (0, 0), *margins])
