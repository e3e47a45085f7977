"""Depthwise convolution with kernels of any size, up to and beyond the map's.

    fft      real FFTs, lengths with small prime factors
    dft      the transform as matrix products, for matrix units and for the CPU
    direct   one multiply-add per kernel position, for small kernels on large maps
    lax      XLA's own, a group for each channel, for small kernels on TPUs
    auto     by platform and size: see `methods.select_method`

The first two keep the spectra of map and kernel for the gradient, which then takes one transform
and not three. `convolve_reference` is the definition that all are tested against.

Inside, maps are `(channels, batch, *spatial)`, see `channels_first.py`, and kernels
`(channels, 1 or batch, *size)`. Every case is a window of the full linear convolution, or a
circular one.
"""

import jax
import numpy as np

from terminator_jax.ops.channels_first import to_channels_first, to_channels_last
from terminator_jax.ops.conv.methods import convolve
from terminator_jax.ops.conv.window import bounds

METHODS = ("auto", "fft", "dft", "direct", "lax")
PADDINGS = ("same", "causal", "valid", "circular")


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

    Forward mode, `jax.jvp` and `jax.linearize`, needs the method `lax` or `dense`, and so does
    `jax.hessian`. Gradients of gradients, `jax.jacrev(jax.grad(f))`, work with every method.

    Args:
      x: `(batch, *spatial, channels)` with 1, 2 or 3 spatial axes. Integers are taken as float32,
        here and in `kernel`.
      kernel: `(*size, channels)`, shared by the batch, or `(batch, *size, channels)`, one per
        sample.
      padding: one of `PADDINGS`.
      method: one of `METHODS`. Reduced precision is computed in float32.
      correlate: cross-correlates, as the "convolution" of deep learning does; `same` is then
        `Σ_r kernel[r] x[i + r - (k-1)//2]`.
      max_bytes: a bound on temporary memory, with gradient or without; channels are then computed
        in as many parts as that takes, one after the other, and the gradient computes the spectra
        again. It cannot be less than a few copies of map, kernel and result, and what one channel
        takes.

    Returns:
      `(batch, *positions, channels)` in the dtype of `x`, or float32 for integers.

    Raises:
      ValueError: for unknown names, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
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
    """Computes `fft_conv(x, kernel, correlate=True)`, as a depthwise layer does with zero padding.

    Example:
      >>> import jax.numpy as jnp
      >>> print(depthwise_correlate(jnp.ones((2, 8, 8, 3)), jnp.ones((5, 5, 3)))[0, 0, 0].round(2))
      [9. 9. 9.]
    """
    return fft_conv(x, kernel, correlate=True, method=method)


def convolve_reference(
    x: np.ndarray, kernel: np.ndarray, *, padding: str = "same", correlate: bool = False
) -> np.ndarray:
    """Computes `fft_conv` by its definition in NumPy: kernel position by position, in float64."""
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
