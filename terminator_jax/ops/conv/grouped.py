"""Convolution by XLA's own, a group for each channel: the method `lax`.

On TPUs it reads and writes each map once, whatever the kernel's size, where `direct` moves it for
every row of the kernel. On CPUs and GPUs its gradients are slow.
"""

import jax
import jax.numpy as jnp

from terminator_jax.ops.conv.window import Window


def grouped(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes the window of the linear convolution of a `(channels, batch, *spatial)` map."""
    if kernel.shape[1] != 1:  # one per sample: samples are channels then
        lead, rest = x.shape[:2], x.shape[2:]
        x, kernel = x.reshape(-1, 1, *rest), kernel.reshape(-1, 1, *kernel.shape[2:])
        return grouped(window, x, kernel).reshape(*lead, *window.count)
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
