"""Depthwise convolution with kernels of any size, up to and beyond the map's.

    fft      real FFTs, lengths with small prime factors
    dft      the transform as matrix products, for matrix units and for the CPU
    direct   one multiply-add per kernel position, for small kernels on large maps
    dense    one matrix per channel, from every position to every other, for small maps
    lax      XLA's own, a group for each channel, for small kernels on TPUs
    auto     the one that was measured to be fastest, see `fastest.py`

The first two keep the spectra of map and kernel for the gradient, which then takes one transform
and not three. `convolve_reference` is the definition that all are tested against.

Inside, maps are `(channels, batch, *spatial)`, see `channels_first.py`, and kernels
`(channels, 1 or batch, *size)`. Every case is a window of the full linear convolution, or a
circular one.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops.channels_first import (
    match_varying_axes,
    spatial_axes,
    to_channels_first,
    to_channels_last,
)
from terminator_jax.ops.dense import dense
from terminator_jax.ops.dtypes import at_least_float32
from terminator_jax.ops.fastest import Choice, by_platform, fastest
from terminator_jax.ops.grouped import grouped
from terminator_jax.ops.spectral import DENSE_UP_TO, by_spectra
from terminator_jax.ops.taps import direct, direct_each
from terminator_jax.ops.window import Window, bounds

METHODS = ("auto", "fft", "dft", "direct", "dense", "lax")
PADDINGS = ("same", "causal", "valid", "circular")
# Arrays of a transform's size that exist at once, for every map and kernel: by measurement.
SPECTRA = 2


def fft_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    padding: str = "same",
    method: str = "auto",
    correlate: bool = False,
    max_bytes: int | None = None,
) -> jax.Array:
    """Convolves every channel of a map with its own kernel.

    With `full[j] = Σ_r kernel[r] x[j - r]`, zero outside, an axis of n positions and a kernel of k:

    | padding | result | positions |
    |---|---|---|
    | `same` | `full[(k-1)//2 + i]` | n |
    | `causal` (1-D) | `full[i]` | n |
    | `valid` | `full[k-1 + i]` | n - k + 1 |
    | `circular` | as `same`, with x repeated instead of zeros | n |

    Args:
      x: `(batch, *spatial, channels)` with 1, 2 or 3 spatial axes.
      kernel: `(*size, channels)`, shared by the batch, or `(batch, *size, channels)`, one per
        sample.
      padding: one of `PADDINGS`.
      method: one of `METHODS`. Reduced precision is computed in float32.
      correlate: turns the kernel around (no flip, as deep learning's "convolution"); `same` is then
        `Σ_r kernel[r] x[i + r - (k-1)//2]`.
      max_bytes: a bound on temporary memory, with gradient or without; channels are then computed
        in as many parts as that takes, one after the other, and the gradient computes the spectra
        again. It cannot be less than a few copies of map, kernel and result, and what one channel
        takes.

    Returns:
      `(batch, *positions, channels)` in the dtype of `x`.

    Raises:
      ValueError: for unknown names, or shapes that do not fit.

    Example:
      >>> x = jnp.ones((2, 8, 8, 3))
      >>> print(fft_conv(x, jnp.ones((5, 5, 3)))[0, 0, :4, 0].round(2))
      [ 9. 12. 15. 15.]
      >>> fft_conv(jnp.ones((2, 100, 3)), jnp.ones((2, 100, 3)), padding="causal").shape
      (2, 100, 3)
    """
    _check(x, kernel, padding, method)
    shared = kernel.ndim == x.ndim - 1
    kernel = to_channels_first(kernel[None] if shared else kernel)
    out = convolve(
        to_channels_first(x), kernel,
        padding=padding, method=method, correlate=correlate, max_bytes=max_bytes,
    )  # fmt: skip
    return to_channels_last(out)


def depthwise_correlate(x: jax.Array, kernel: jax.Array, *, method: str = "auto") -> jax.Array:
    """`fft_conv(x, kernel, correlate=True)`: what a depthwise layer does, zero 'same' padding.

    Example:
      >>> print(depthwise_correlate(jnp.ones((2, 8, 8, 3)), jnp.ones((5, 5, 3)))[0, 0, 0].round(2))
      [9. 9. 9.]
    """
    return fft_conv(x, kernel, correlate=True, method=method)


def convolve(x: jax.Array, kernel: jax.Array, **options) -> jax.Array:
    """`fft_conv` of arrays with their channels first.

    Args:
      x: `(channels, batch, *spatial)`.
      kernel: `(channels, 1 or batch, *size)`.
      options: `padding`, `method`, `correlate` and `max_bytes`, see `fft_conv`.

    Returns:
      `(channels, batch, *positions)` in the dtype of `x`.
    """
    return convolve_all([x], kernel, **options)[0]


def convolve_all(
    maps: Sequence[jax.Array],
    kernel: jax.Array,
    *,
    padding: str = "same",
    method: str | Choice = "auto",
    correlate: bool = False,
    max_bytes: int | None = None,
) -> list[jax.Array]:
    """`[convolve(x, kernel, …) for x in maps]` of like maps, with one transform of the kernel."""
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


def convolve_each(
    maps: Sequence[jax.Array], kernels: Sequence[jax.Array], *, padding: str, correlate: bool
) -> jax.Array:
    """The maps convolved with a kernel each, joined along their channels.

    Args:
      maps: `(channels, batch, *spatial)` each, of one shape.
      kernels: `(channels, 1, *size)` each, of sizes of their own.
      padding: all but `valid`.
      correlate: see `fft_conv`.

    Returns:
      `(len(maps) * channels, batch, *spatial)`.
    """
    options = dict(padding=padding, correlate=correlate)
    spatial = maps[0].shape[2:]

    def choose(platform: str) -> tuple[Choice, ...]:
        return tuple(fastest(platform, spatial, k.shape[2:], False) for k in kernels)

    def function(choices: tuple[Choice, ...]):
        if set(choices) == {Choice("lax", "lax")}:
            return functools.partial(_lax_each, **options)
        if set(choices) == {Choice("direct", "direct")} and padding != "circular":
            return functools.partial(_direct_each, **options)
        return functools.partial(_each, choices, **options)

    return by_platform(choose, function, list(maps), list(kernels))


def _each(
    choices: Sequence[Choice], maps: Sequence[jax.Array], kernels: Sequence[jax.Array], **options
) -> jax.Array:
    """`convolve_each` one after the other, each by its own methods."""
    triples = zip(maps, kernels, choices, strict=True)
    return jnp.concatenate([convolve(x, k, method=choice, **options) for x, k, choice in triples])


def _lax_each(
    maps: Sequence[jax.Array], kernels: Sequence[jax.Array], padding: str, correlate: bool
) -> jax.Array:
    """`convolve_each` as one convolution of XLA's, each kernel amid zeros.

    Its time does not depend on the size of the kernels.
    """
    spatial, largest = maps[0].shape[2:], max(k.shape[2:] for k in kernels)
    options = dict(padding=padding, correlate=correlate)
    kernels = [_amid_zeros(k, largest, spatial, **options) for k in kernels]
    return convolve(jnp.concatenate(maps), jnp.concatenate(kernels), method="lax", **options)


def _direct_each(
    maps: Sequence[jax.Array], kernels: Sequence[jax.Array], padding: str, correlate: bool
) -> jax.Array:
    """`convolve_each` by the method `direct`, whose gradients are then computed together."""
    dtype, spatial = maps[0].dtype, maps[0].shape[2:]
    wide = at_least_float32(dtype)
    windows, useful = [], []
    for kernel in kernels:
        kernel = jnp.flip(kernel, range(2, kernel.ndim)) if correlate else kernel
        start, count = bounds(spatial, kernel.shape[2:], padding, correlate)
        kernel, start = _useful(kernel, spatial, start, count)
        windows.append(Window(tuple(start), tuple(count), False))
        useful.append(kernel)
    arrays = match_varying_axes(*(a.astype(wide) for a in (*maps, *useful)))
    maps, useful = arrays[: len(maps)], arrays[len(maps) :]
    return direct_each(tuple(windows), maps, useful).astype(dtype)


def _amid_zeros(
    kernel: jax.Array, size: Sequence[int], spatial: Sequence[int], padding: str, correlate: bool
) -> jax.Array:
    """A kernel of a larger size that gives the same result."""
    own = kernel.shape[2:]
    here, there = (bounds(spatial, s, padding, correlate)[0] for s in (own, size))
    # How many zeros come before it and after it; a correlation turns the kernel around.
    before = [b - a for a, b in zip(here, there, strict=True)]
    after = [k - n - b for k, n, b in zip(size, own, before, strict=True)]
    margins = zip(*((after, before) if correlate else (before, after)), strict=True)
    return jnp.pad(kernel, [(0, 0), (0, 0), *margins])


def convolve_reference(
    x: np.ndarray, kernel: np.ndarray, *, padding: str = "same", correlate: bool = False
) -> np.ndarray:
    """The definition of `fft_conv`, in NumPy, one kernel position after the other, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    kernel = kernel[None] if kernel.ndim == x.ndim - 1 else kernel
    spatial, size = x.shape[1:-1], kernel.shape[1:-1]
    axes = tuple(range(1, x.ndim - 1))
    if correlate:
        kernel = np.flip(kernel, axes)
    full = np.zeros((len(x), *(n + k - 1 for n, k in zip(spatial, size, strict=True)), x.shape[-1]))
    for r in np.ndindex(*size):
        place = tuple(slice(o, o + n) for o, n in zip(r, spatial, strict=True))
        full[(slice(None), *place)] += x * kernel[(slice(None), *(slice(o, o + 1) for o in r))]
    start, count = bounds(spatial, size, padding, correlate)
    if padding == "circular":
        for axis, n in zip(axes, spatial, strict=True):
            positions = np.arange(full.shape[axis]) % n
            full = np.stack([full.compress(positions == p, axis).sum(axis) for p in range(n)], axis)
        return np.roll(full, [-s for s in start], axes)
    return full[(slice(None), *(slice(s, s + c) for s, c in zip(start, count, strict=True)))]


def _check(x: jax.Array, kernel: jax.Array, padding: str, method: str) -> None:
    for name, value, known in (("padding", padding, PADDINGS), ("method", method, METHODS)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not one of {known}")
    shared = kernel.ndim == x.ndim - 1
    if (
        not 3 <= x.ndim <= 5
        or not (shared or (kernel.ndim == x.ndim and kernel.shape[0] == x.shape[0]))
        or kernel.shape[-1] != x.shape[-1]
    ):
        raise ValueError(
            "expected x (batch, 1 to 3 spatial axes, channels) and kernel (*size, channels) or"
            f" (batch, *size, channels) with as many axes and channels, got {x.shape} and"
            f" {kernel.shape}"
        )
    if padding == "causal" and x.ndim != 3:
        raise ValueError(f"causal padding is for one spatial axis, got x {x.shape}")
    size = kernel.shape[:-1] if shared else kernel.shape[1:-1]
    if padding == "valid" and any(k > n for k, n in zip(size, x.shape[1:-1], strict=True)):
        raise ValueError(f"no position of x {x.shape} is valid for a kernel {kernel.shape}")


def _convolve(
    maps: list[jax.Array],
    kernel: jax.Array,
    *,
    start: Sequence[int],
    count: Sequence[int],
    method: str | Choice,
    padding: str,
) -> list[jax.Array]:
    """The window of the convolution of each map."""
    spatial, circular = maps[0].shape[2:], padding == "circular"
    if circular:
        kernel = _folded(kernel, spatial)
    else:
        kernel, start = _useful(kernel, spatial, start, count)
    window = Window(tuple(start), tuple(count), circular)
    kernel, *maps = match_varying_axes(kernel, *maps)
    if isinstance(method, Choice):
        return _by_choice(window, method, maps, kernel)
    if method != "auto":
        return _by_method(window, method, maps, kernel)
    size, per_sample = kernel.shape[2:], kernel.shape[1] != 1
    return by_platform(
        lambda platform: fastest(platform, spatial, size, per_sample),
        lambda choice: functools.partial(_by_choice, window, choice),
        maps, kernel,
    )  # fmt: skip


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
        return [grouped(window, x, kernel) for x in maps]
    if method == "dense":
        return dense(window, maps, kernel)
    return by_spectra(window, method, maps, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_choice(window: Window, choice: Choice, maps: list[jax.Array], kernel: jax.Array):
    """By the method that is fastest without a gradient or, if one is taken, with it."""
    return _by_method(window, choice.forward, maps, kernel)


def _by_choice_forward(window, choice, maps, kernel):
    return jax.vjp(functools.partial(_by_method, window, choice.gradient), maps, kernel)


def _by_choice_backward(window, choice, pullback, gradients):
    return pullback(gradients)


_by_choice.defvjp(_by_choice_forward, _by_choice_backward)


def _useful(kernel, spatial, start, count):
    """The kernel without the positions that reach no wanted result; and the new start."""
    axes = list(zip(start, count, spatial, kernel.shape[2:], strict=True))
    low = [max(0, s - n + 1) for s, c, n, k in axes]
    high = [min(k, s + c) for s, c, n, k in axes]
    cut = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return kernel[(..., *cut)], [s - a for s, a in zip(start, low, strict=True)]


def _folded(kernel: jax.Array, spatial: Sequence[int]) -> jax.Array:
    """The kernel with what lies beyond the circle added to what lies on it."""
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
    """`function(maps, kernel)`, in parts along the channels that keep the bound."""
    parts = 1 if max_bytes is None else _parts(maps, kernel, max_bytes)
    if parts == 1:
        return function(maps, kernel)

    arguments = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), (maps, kernel))
    outs = jax.lax.map(jax.checkpoint(lambda part: function(*part)), arguments)
    return [out.reshape(-1, *out.shape[2:]) for out in outs]


def _parts(maps: list[jax.Array], kernel: jax.Array, max_bytes: int) -> int:
    """In how many equal parts the channels keep the bound, as far as there are channels."""
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
