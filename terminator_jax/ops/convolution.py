"""Depthwise convolution with kernels of any size, up to and beyond the map's.

    fft      real FFTs, lengths with small prime factors
    dft      the transform as matrix products, for matrix units and for the CPU
    direct   one multiply-add per kernel position, for small kernels on large maps
    dense    one matrix per channel, from every position to every other, for small maps
    auto     the one that was measured to be fastest, see `fastest.py`

The first two keep the spectra of map and kernel for the gradient, which then takes one transform
and not three. `convolve_reference` is the definition that all are tested against.

Inside, maps are `(channels, batch, *spatial)`, see `channel_major.py`, and kernels `(channels, 1 or
batch, *size)`. Every case is a window of the full linear convolution, or a circular one.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from terminator_jax.ops import channel_major
from terminator_jax.ops.fastest import Choice, fastest
from terminator_jax.ops.fourier import DFT, FFT, LongDFT, Spectrum, Transform, conjugate, multiply

METHODS = ("auto", "fft", "dft", "direct", "dense")
PADDINGS = ("same", "causal", "valid", "circular")
# `dft` uses one dense matrix per axis up to this length, and folds longer ones.
DENSE_UP_TO = 1024
# Arrays of a transform's size that exist at once, for every map and kernel: by measurement.
SPECTRA = 2
# Positions in the matrix products of `direct`'s gradient.
TILE = 64


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
    kernel = channel_major.enter(kernel[None] if shared else kernel)
    out = convolve(
        channel_major.enter(x), kernel,
        padding=padding, method=method, correlate=correlate, max_bytes=max_bytes,
    )  # fmt: skip
    return channel_major.leave(out)


def depthwise_correlate(x: jax.Array, kernel: jax.Array, *, method: str = "auto") -> jax.Array:
    """`fft_conv(x, kernel, correlate=True)`: what a depthwise layer does, zero 'same' padding.

    Example:
      >>> print(depthwise_correlate(jnp.ones((2, 8, 8, 3)), jnp.ones((5, 5, 3)))[0, 0, 0].round(2))
      [9. 9. 9.]
    """
    return fft_conv(x, kernel, correlate=True, method=method)


def convolve(x: jax.Array, kernel: jax.Array, **options) -> jax.Array:
    """`fft_conv` of channel-major arrays.

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
    method: str = "auto",
    correlate: bool = False,
    max_bytes: int | None = None,
) -> list[jax.Array]:
    """`[convolve(x, kernel, …) for x in maps]` of like maps, with one transform of the kernel."""
    if correlate:
        kernel = jnp.flip(kernel, range(2, kernel.ndim))
    dtype = maps[0].dtype
    start, count = _window(maps[0].shape[2:], kernel.shape[2:], padding, correlate)
    wide = jnp.promote_types(dtype, jnp.float32)
    outs = _chunked(
        functools.partial(_convolve, start=start, count=count, method=method, padding=padding),
        [x.astype(wide) for x in maps],
        kernel.astype(wide),
        max_bytes,
    )
    return [out.astype(dtype) for out in outs]


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
    start, count = _window(spatial, size, padding, correlate)
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


def _window(
    spatial: Sequence[int], size: Sequence[int], padding: str, correlate: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first position wanted of the full convolution, and how many, per axis."""
    starts = {
        "same": lambda k: k // 2 if correlate else (k - 1) // 2,
        "causal": lambda k: 0,
        "valid": lambda k: k - 1,
    }
    starts["circular"] = starts["same"]
    start = tuple(starts[padding](k) for k in size)
    if padding == "valid":
        return start, tuple(n - k + 1 for n, k in zip(spatial, size, strict=True))
    return start, tuple(spatial)


def _convolve(
    maps: list[jax.Array],
    kernel: jax.Array,
    *,
    start: Sequence[int],
    count: Sequence[int],
    method: str,
    padding: str,
) -> list[jax.Array]:
    """The window of the convolution of each map, by one method."""
    spatial, circular = maps[0].shape[2:], padding == "circular"
    if circular:
        kernel = _folded(kernel, spatial)
    else:
        kernel, start = _useful(kernel, spatial, start, count)
    window = Window(tuple(start), tuple(count), circular)
    kernel, *maps = channel_major.vary_alike(kernel, *maps)
    if method != "auto":
        return _by_method(window, method, maps, kernel)
    per_sample = kernel.shape[1] > 1
    choice = fastest(jax.default_backend(), spatial, kernel.shape[2:], per_sample)
    return _by_choice(window, choice, maps, kernel)


def _by_method(
    window: "Window", method: str, maps: list[jax.Array], kernel: jax.Array
) -> list[jax.Array]:
    spatial, size = maps[0].shape[2:], kernel.shape[2:]
    long = len(spatial) == 1 and spatial[0] > DENSE_UP_TO
    if window.circular and (method == "direct" or (method == "dft" and long)):
        # As a linear one, of the map with its end before it.
        before = tuple(k - 1 for k in size)
        margins = [(0, 0), (0, 0), *((b, 0) for b in before)]
        maps = [jnp.pad(x, margins, mode="wrap") for x in maps]
        outs = _by_method(Window(before, window.count, False), method, maps, kernel)
        return [jnp.roll(out, [-s for s in window.start], channel_major.space(out)) for out in outs]
    if method == "direct":
        return [_direct(window, x, kernel) for x in maps]
    if method == "dense":
        matrix = _matrix(window, spatial, kernel)
        return [_applied(x, matrix) for x in maps]
    return _by_spectra(window, method, maps, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_choice(window: "Window", choice: Choice, maps: list[jax.Array], kernel: jax.Array):
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


class Window(NamedTuple):
    """What is wanted of a convolution: positions `start` and on, `count` of them, per axis."""

    start: tuple[int, ...]
    count: tuple[int, ...]
    circular: bool

    def positions(self) -> list[range]:
        """The wanted positions of each axis."""
        return [range(s, s + c) for s, c in zip(self.start, self.count, strict=True)]

    def transform(self, method: str, spatial: Sequence[int], size: Sequence[int]) -> Transform:
        """A transform on circles long enough that what wraps around is not wanted."""
        if self.circular:
            return FFT(spatial, exact=True) if method == "fft" else DFT(spatial)
        axes = zip(self.start, self.count, spatial, size, strict=True)
        lengths = [max(n + k - 1 - s, s + c, n, k) for s, c, n, k in axes]
        if method == "fft":
            return FFT(lengths)
        long = len(lengths) == 1 and lengths[0] > DENSE_UP_TO
        return LongDFT(lengths) if long else DFT(lengths)


def _everywhere(x: jax.Array) -> list[range]:
    """Positions from 0 on, as many as the map has."""
    return [range(n) for n in x.shape[2:]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_spectra(window: Window, method: str, maps: list[jax.Array], kernel: jax.Array):
    return _by_spectra_forward(window, method, maps, kernel)[0]


def _by_spectra_forward(window, method, maps, kernel):
    transform = window.transform(method, maps[0].shape[2:], kernel.shape[2:])
    response = transform.forward(kernel, _everywhere(kernel))
    spectra = [transform.forward(x, _everywhere(x)) for x in maps]
    out = [transform.inverse(multiply(a, response), window.positions()) for a in spectra]
    return out, (spectra, response, _Sizes(maps[0].shape, kernel.shape))


def _by_spectra_backward(window, method, residuals, gradients):
    spectra, response, sizes = residuals
    transform = window.transform(method, sizes.x[2:], sizes.kernel[2:])
    ds = [transform.forward(dy, window.positions()) for dy in gradients]
    back = conjugate(response)
    everywhere = [range(n) for n in sizes.x[2:]]
    products = [multiply(d, conjugate(a)) for d, a in zip(ds, spectra, strict=True)]
    total = Spectrum(*(sum(parts) for parts in zip(*products, strict=True)))
    dxs = [transform.inverse(multiply(d, back), everywhere) for d in ds]
    return dxs, _kernel_part(transform, total, sizes.kernel)


_by_spectra.defvjp(_by_spectra_forward, _by_spectra_backward)


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


def _matrix(window: Window, spatial: Sequence[int], kernel: jax.Array) -> jax.Array:
    """The convolution of each channel as a matrix, `(channels, 1 or batch, *spatial, *count)`.

    The kernel is spread over it by products with zeros and ones, whose gradient is a product too.
    """
    axes = range(len(spatial))
    for axis in axes:
        # Contracts the first axis of the kernel that is left; what it becomes goes to the end.
        spread = jnp.asarray(_spread(window, axis, spatial[axis], kernel.shape[2]), kernel.dtype)
        kernel = jnp.tensordot(kernel, spread, axes=(2, 0), precision=jax.lax.Precision.HIGHEST)
    order = [*(2 + 2 * axis for axis in axes), *(3 + 2 * axis for axis in axes)]
    return jnp.transpose(kernel, (0, 1, *order))


def _spread(window: Window, axis: int, n: int, k: int) -> np.ndarray:
    """`(k, n, count)`: 1 where that kernel position takes a map's position to a result's."""
    wanted = np.array(window.positions()[axis])
    r = wanted - np.arange(n)[:, None]
    return np.arange(k)[:, None, None] == (r % n if window.circular else r)


def _applied(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Every channel's map, or every sample's, through its matrix."""
    inputs, outputs = "ijk"[: x.ndim - 2], "pqr"[: x.ndim - 2]
    return _through(x, matrix, inputs, inputs + outputs, outputs)


def _through(x: jax.Array, matrix: jax.Array, inputs: str, axes: str, outputs: str) -> jax.Array:
    """`einsum` over axes besides channels and batch; the matrix may have a batch of 1."""
    batch, matrix = ("", matrix[:, 0]) if matrix.shape[1] == 1 else ("b", matrix)
    formula = f"cb{inputs},c{batch}{axes}->cb{outputs}"
    return jnp.einsum(formula, x, matrix, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _direct(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _taps(x, kernel, window.start, window.count)


def _taps(x: jax.Array, kernel: jax.Array, start: Sequence[int], count: Sequence[int]) -> jax.Array:
    """The window as a sum of shifted maps."""
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
    """The map with zeros around it: its position 0 is the first that the last tap reaches."""
    axes = zip(start, count, x.shape[2:], size, strict=True)
    margins = [(k - 1 - s, s + c - n, 0) for s, c, n, k in axes]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *margins])


def _shifted(
    padded: jax.Array, tap: Sequence[int], size: Sequence[int], count: Sequence[int]
) -> jax.Array:
    """What the tap of a kernel of this size meets, for each of the wanted positions."""
    offsets = [k - 1 - r for r, k in zip(tap, size, strict=True)]
    return padded[(..., *(slice(o, o + c) for o, c in zip(offsets, count, strict=True)))]


def _direct_forward(window, x, kernel):
    return _direct(window, x, kernel), (x, kernel)


def _direct_backward(window, residuals, dy):
    x, kernel = residuals
    # dx[i] = Σ_j dy[j] kernel[start + j - i]: a convolution with the kernel turned around.
    turned = jnp.flip(kernel, range(2, kernel.ndim))
    axes = zip(window.start, kernel.shape[2:], strict=True)
    dx = _taps(dy, turned, [k - 1 - s for s, k in axes], x.shape[2:])
    if x.ndim == 3:
        return dx, _sequence_part(window, x, kernel, dy)
    transform = window.transform("dft", x.shape[2:], kernel.shape[2:])
    a = transform.forward(x, _everywhere(x))
    d = transform.forward(dy, window.positions())
    return dx, _kernel_part(transform, multiply(d, conjugate(a)), kernel.shape)


_direct.defvjp(_direct_forward, _direct_backward)


def _sequence_part(window: Window, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of a sequence's kernel: that of a product of windows of x with a band matrix."""
    [count], k = window.count, kernel.shape[2]
    tiles = -(-count // TILE)
    tile = -(-count // tiles)
    whole = tiles * tile
    dy = jnp.pad(dy, [(0, 0), (0, 0), (0, whole - count)]).reshape(*x.shape[:2], tiles, tile)
    windows = _windows(_padded(x, window.start, [whole], [k]), tiles, tile, tile + k - 1)

    def product(kernel):
        return _through(windows, _band(jnp.flip(kernel, 2), tile), "mw", "tw", "mt")

    return jax.vjp(product, kernel)[1](dy)[0]


def _windows(x: jax.Array, number: int, step: int, width: int) -> jax.Array:
    """`x[..., n * step : n * step + width]` as row n of the last two axes."""
    shifts = range(0, width, step)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, shifts[-1] + number * step - x.shape[-1])])
    parts = [x[..., s : s + number * step].reshape(*x.shape[:-1], number, step) for s in shifts]
    return jnp.concatenate(parts, -1)[..., :width]


def _band(kernel: jax.Array, rows: int) -> jax.Array:
    """`(channels, 1 or batch, rows, rows + k - 1)`: each row has the kernel, one further along."""
    k = kernel.shape[2]
    width = rows + k - 1
    row = jnp.pad(kernel, [(0, 0), (0, 0), (0, width + 1 - k)])
    flat = jnp.tile(row, rows)[..., : rows * width]
    return flat.reshape(*kernel.shape[:2], rows, width)


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
