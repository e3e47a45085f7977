"""A layer that joins any slow network to any fast function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.ops import coordinates


class SlowFast(nnx.Module):
    """Computes `fast(K, *inputs)` with a kernel K that `slow` generates from coordinates.

    Example:
      >>> from terminator_jax.ops import fft_conv
      >>> rngs = nnx.Rngs(0)
      >>> slow = nnx.Sequential(
      ...     nnx.Linear(2, 16, rngs=rngs), jnp.sin, nnx.Linear(16, 12, rngs=rngs)
      ... )
      >>> layer = SlowFast(slow, lambda kernel, x: fft_conv(x, kernel), size=(5, 5))
      >>> layer(jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 12)
      >>> layer.kernel().shape, layer.kernel((9, 9)).shape
      ((5, 5, 12), (9, 9, 12))

    Modules given as `slow` or `fast` become submodules.

    Args:
      slow: maps coordinates `(positions, d)` to values `(positions, features)`; the coordinates are
        those of `terminator_jax.ops.grid`, row-major, -1 to 1 along each of the d axes.
      fast: a function of the kernel `(*size, features)` and of the layer's inputs.
      size: positions of the kernel per axis.
      dtype: dtype of the coordinates, float32 or wider: sines of large phases need it.

    Raises:
      TypeError: if `slow` or `fast` is not callable, or hides the parameters of a module, as a
        bound method or a `functools.partial` does.
      ValueError: when called, for a narrower dtype, or if `slow` does not return one row of values
        for each position.

    Source: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024; kernels from SIRENs: Romero et al., "CKConv", 2021.
    """

    def __init__(
        self,
        slow: Callable[[jax.Array], jax.Array],
        fast: Callable[..., Any],
        size: tuple[int, ...],
        *,
        dtype=jnp.float32,
    ):
        for name, function in (("slow", slow), ("fast", fast)):
            _check_callable(name, function)
        self.slow, self.fast = slow, fast
        self.size, self.dtype = tuple(size), dtype

    def __call__(self, *inputs, size: tuple[int, ...] | None = None, **options) -> Any:
        """Returns `fast(kernel, *inputs, **options)`; `size` sets another size of the kernel."""
        return self.fast(self.kernel(size), *inputs, **options)

    def kernel(self, size: tuple[int, ...] | None = None) -> jax.Array:
        """Generates the kernel, `(*size, features)`, by default of the layer's own size."""
        return kernel_from_coordinates(self.slow, self.size if size is None else size, self.dtype)


def kernel_from_coordinates(
    slow: Callable[[jax.Array], jax.Array], size: tuple[int, ...], dtype
) -> jax.Array:
    """Generates a kernel `(*size, features)` by calling `slow` with the coordinates of a grid.

    Example:
      >>> kernel_from_coordinates(lambda c: c * c, (3, 2), jnp.float32)[..., 0].tolist()
      [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    """
    if jnp.finfo(dtype).bits < 32:
        raise ValueError(f"coordinates need float32 or wider, got {jnp.dtype(dtype)}")
    grid = coordinates.grid(size, dtype)
    values = slow(grid)
    if jnp.ndim(values) != 2 or len(values) != len(grid):
        raise ValueError(
            f"slow must map coordinates {grid.shape} to ({len(grid)}, features), got"
            f" {jnp.shape(values)}"
        )
    return values.reshape(*size, values.shape[-1])


def _check_callable(name: str, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"{name} must be callable, got {type(function).__name__}")
    # NNX finds no submodules in a bound method or a partial.
    inner = function.func if isinstance(function, functools.partial) else function
    owner = getattr(inner, "__self__", inner)
    if owner is not function and isinstance(owner, nnx.Module):
        raise TypeError(
            f"{name} is a {type(function).__name__} that hides the parameters of a"
            f" {type(owner).__name__}: give the module itself, or one whose __call__ calls it"
        )
