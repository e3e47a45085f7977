"""Convolution of maps with their channels first, by a method that is named or chosen.

`METHODS` in `convolution.py` names them.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from terminator_jax.ops.channels_first import match_varying_axes, spatial_axes
from terminator_jax.ops.conv.direct import direct
from terminator_jax.ops.conv.spectral import DENSE_UP_TO, fft_convolve
from terminator_jax.ops.conv.window import Window, bounds
from terminator_jax.ops.dtypes import at_least_float32, floating
from terminator_jax.ops.platform import by_platform

# Up to so many kernel positions one method, beyond them another. On a CPU by measurement:
# docs/performance.md; elsewhere by what the compiled programs move.
SMALL = 81
UP_TO = {"tpu": "lax", "gpu": "direct", "cpu": "direct"}
BEYOND = {"tpu": "dft", "gpu": "fft", "cpu": "fft"}
# Positions per axis up to which a CPU is faster by `dft`.
SHORT = 64

# Arrays of a transform's size that exist at once, for every map and kernel: by measurement.
SPECTRA = 2


def convolve(x: jax.Array, kernel: jax.Array, **options) -> jax.Array:
    """Computes `fft_conv` of arrays with their channels first.

    Args:
      x: `(channels, batch, *spatial)`.
      kernel: `(channels, 1 or batch, *size)`.
      options: `padding`, `method`, `correlate` and `max_bytes`, see `fft_conv`.

    Returns:
      `(channels, batch, *positions)` in the dtype of `x`.
    """
    return convolve_shared_kernel([x], kernel, **options)[0]


def convolve_shared_kernel(
    maps: Sequence[jax.Array],
    kernel: jax.Array,
    *,
    padding: str = "same",
    method: str = "auto",
    correlate: bool = False,
    max_bytes: int | None = None,
) -> list[jax.Array]:
    """Computes `[convolve(x, kernel, …) for x in maps]` with one transform of the kernel."""
    maps, kernel = floating((list(maps), kernel))
    if correlate:
        kernel = jnp.flip(kernel, range(2, kernel.ndim))
    dtype = maps[0].dtype
    start, count = bounds(maps[0].shape[2:], kernel.shape[2:], padding, correlate)
    wide = at_least_float32(dtype)
    outs = _chunked(
        functools.partial(_convolve, start=start, count=count, method=method, padding=padding),
        [x.astype(wide) for x in maps],
        kernel.astype(wide),
        max_bytes,
    )
    return [out.astype(dtype) for out in outs]


def _convolve(
    maps: list[jax.Array],
    kernel: jax.Array,
    *,
    start: Sequence[int],
    count: Sequence[int],
    method: str,
    padding: str,
) -> list[jax.Array]:
    """Computes the window of the convolution of each map."""
    spatial, circular = maps[0].shape[2:], padding == "circular"
    if circular:
        kernel = _wrap_kernel(kernel, spatial)
    else:
        kernel, start = crop_kernel(kernel, spatial, start, count)
    window = Window(tuple(start), tuple(count), circular)
    kernel, *maps = match_varying_axes(kernel, *maps)
    if method != "auto":
        return _by_method(window, method, maps, kernel)
    size, per_sample = kernel.shape[2:], kernel.shape[1] != 1
    return by_platform(
        lambda platform: select_method(platform, spatial, size, per_sample),
        lambda chosen: functools.partial(_by_method, window, chosen),
        maps, kernel,
    )  # fmt: skip


def select_method(
    platform: str, spatial: Sequence[int], size: Sequence[int], per_sample: bool
) -> str:
    """Returns what `auto` takes.

    Args:
      platform: `"cpu"`, `"gpu"` or `"tpu"`.
      spatial: positions of the map per axis.
      size: positions of the kernel per axis.
      per_sample: whether each sample has a kernel of its own.

    Example:
      >>> [select_method("cpu", (n, n), (k, k), False) for n, k in ((32, 9), (32, 32), (512, 512))]
      ['direct', 'dft', 'fft']
    """
    # XLA's convolution cannot have as many groups as a batch of unknown size has samples.
    if math.prod(size) <= SMALL and not (per_sample and UP_TO[platform] == "lax"):
        return UP_TO[platform]
    return "dft" if platform == "cpu" and max(spatial) <= SHORT else BEYOND[platform]


def _by_method(
    window: Window, method: str, maps: list[jax.Array], kernel: jax.Array
) -> list[jax.Array]:
    spatial, size = maps[0].shape[2:], kernel.shape[2:]
    long = len(spatial) == 1 and spatial[0] > DENSE_UP_TO
    if window.circular and (method in ("direct", "lax") or (method == "dft" and long)):
        # As a linear one, of the map with its end before it.
        before = tuple(k - 1 for k in size)
        margins = [(0, 0), (0, 0), *((b, 0) for b in before)]
        maps = [jnp.pad(x, margins, mode="wrap") for x in maps]
        outs = _by_method(Window(before, window.count, False), method, maps, kernel)
        return [jnp.roll(out, [-s for s in window.start], spatial_axes(out)) for out in outs]
    if method == "direct":
        return [direct(window, x, kernel) for x in maps]
    if method == "lax":
        return [_lax(window, x, kernel) for x in maps]
    return fft_convolve(window, method, maps, kernel)


def _lax(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes the window of the linear convolution by XLA's own, a group for each channel.

    On TPUs it reads and writes each map once, whatever the kernel's size, where `direct` moves it
    for every row of the kernel. On CPUs and GPUs its gradients are slow.
    """
    if kernel.shape[1] != 1:  # one per sample: samples are channels then
        lead, rest = x.shape[:2], x.shape[2:]
        x, kernel = x.reshape(-1, 1, *rest), kernel.reshape(-1, 1, *kernel.shape[2:])
        return _lax(window, x, kernel).reshape(*lead, *window.count)
    axes = zip(window.start, window.count, x.shape[2:], kernel.shape[2:], strict=True)
    spatial = "HWD"[: x.ndim - 2]
    # XLA takes the transpositions into its convolution.
    out = jax.lax.conv_general_dilated(
        x.swapaxes(0, 1),
        jnp.flip(kernel, range(2, kernel.ndim)),
        window_strides=(1,) * len(spatial),
        padding=[(k - 1 - s, s + c - n) for s, c, n, k in axes],
        dimension_numbers=(f"NC{spatial}", f"OI{spatial}", f"NC{spatial}"),
        feature_group_count=len(x),
        precision=jax.lax.Precision.HIGHEST,
    )
    return out.swapaxes(0, 1)


def crop_kernel(kernel, spatial, start, count):
    """Cuts off what of a kernel reaches no wanted result; returns it and the new start."""
    axes = list(zip(start, count, spatial, kernel.shape[2:], strict=True))
    low = [max(0, s - n + 1) for s, c, n, k in axes]
    high = [min(k, s + c) for s, c, n, k in axes]
    cut = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return kernel[(..., *cut)], [s - a for s, a in zip(start, low, strict=True)]


def _wrap_kernel(kernel: jax.Array, spatial: Sequence[int]) -> jax.Array:
    """Adds what of a kernel lies beyond the circle to what lies on it."""
    for axis, n in enumerate(spatial, start=2):
        k = kernel.shape[axis]
        if k > n:
            pad = [(0, 0)] * kernel.ndim
            pad[axis] = (0, -k % n)
            shape = (*kernel.shape[:axis], -1, n, *kernel.shape[axis + 1 :])
            kernel = jnp.sum(jnp.pad(kernel, pad).reshape(shape), axis)
    return kernel


def _chunked(
    function, maps: list[jax.Array], kernel: jax.Array, max_bytes: int | None
) -> list[jax.Array]:
    """Computes `function(maps, kernel)` in parts along the channels that keep the bound."""
    parts = 1 if max_bytes is None else _parts(maps, kernel, max_bytes)
    if parts == 1:
        return function(maps, kernel)

    arguments = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), (maps, kernel))
    outs = jax.lax.map(jax.checkpoint(lambda part: function(*part)), arguments)
    return [out.reshape(-1, *out.shape[2:]) for out in outs]


def _parts(maps: list[jax.Array], kernel: jax.Array, max_bytes: int) -> int:
    """Returns in how many equal parts the channels keep the bound, as far as there are channels."""
    x = maps[0]
    itemsize, channels = x.dtype.itemsize, len(x)
    # Maps, kernel and results in the layout inside; with a gradient as much again.
    copies = 2 * itemsize * (2 * len(maps) * x.size + kernel.size)
    axes = zip(x.shape[2:], kernel.shape[2:], strict=True)
    circle = math.prod(n + k for n, k in axes)
    samples = len(maps) * x.shape[1] + kernel.shape[1]
    each = SPECTRA * itemsize * circle * samples
    at_once = max(1, (max_bytes - copies) // each)
    return next(n for n in range(1, channels + 1) if channels % n == 0 and channels // n <= at_once)
