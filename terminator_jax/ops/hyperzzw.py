"""HyperZ·Z·W: products of a hyper-kernel with activations.

The functions take `(batch, *spatial, channels)`, and `gate` vectors. `OPERATORS` holds the same for
channels-first arrays (see `channels_first.py`), each for several maps that meet one hyper-kernel.
Causal ones, for sequences, give each position what depends on no later one.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from terminator_jax.ops.conv import fft_conv
from terminator_jax.ops.conv.methods import convolve_shared_kernel
from terminator_jax.ops.dtypes import at_least_float32, floating


def dot(hyper: jax.Array, u: jax.Array) -> jax.Array:
    """Multiplies two square maps as matrices, per channel: `Σ_k hyper[b,i,k,c] u[b,k,j,c]`.

    Args:
      hyper: `(batch, n, n, channels)`, a hyper-kernel times its input.
      u: `(batch, n, n, channels)`.

    Raises:
      ValueError: if the maps are not square, 2-D and of equal shape.

    Example:
      >>> eye = jnp.eye(3)[None, :, :, None]
      >>> u = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> bool((dot(eye, u) == u).all())
      True
    """
    if hyper.shape != u.shape or hyper.ndim != 4 or hyper.shape[1] != hyper.shape[2]:
        raise ValueError(
            f"dot needs two equal square maps (batch, n, n, channels), got {hyper.shape} and"
            f" {u.shape}; choose 'product' or 'convolution' for other maps"
        )
    return jnp.einsum("bikc,bkjc->bijc", *floating((hyper, u)))


def product(hyper: jax.Array, u: jax.Array) -> jax.Array:
    """Multiplies a hyper-kernel times its input elementwise with a map of the same shape."""
    if hyper.shape != u.shape:
        raise ValueError(f"product needs equal shapes, got {hyper.shape} and {u.shape}")
    hyper, u = floating((hyper, u))
    return hyper * u


def convolution(
    hyper: jax.Array, u: jax.Array, *, causal: bool = False, method: str = "auto"
) -> jax.Array:
    """Convolves u with each sample's hyper-kernel times its input: linear, 'same' or causal.

    `method` is one of `fft_conv`'s, which says which of them have a forward mode.

    Example:
      >>> u = jnp.ones((2, 9, 3))
      >>> print(convolution(u, u)[0, :, 0].round(2))
      [5. 6. 7. 8. 9. 8. 7. 6. 5.]
    """
    if hyper.shape != u.shape:
        raise ValueError(f"convolution needs equal shapes, got {hyper.shape} and {u.shape}")
    return fft_conv(u, hyper, padding=_padding(causal), method=method)


def operate(
    operator: str, hyper: jax.Array, u: jax.Array, *, causal: bool = False, method: str = "auto"
) -> jax.Array:
    """Computes `hyper ∘ u` for an operator by its name, of maps `(batch, *spatial, channels)`.

    `causal` and `method` are those of `convolution`.

    Example:
      >>> print(operate("product", 2 * jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1))).reshape(2))
      [2. 2.]
    """
    if operator == "convolution":
        return convolution(hyper, u, causal=causal, method=method)
    return {"dot": dot, "product": product}[operator](hyper, u)


def _padding(causal: bool) -> str:
    return "causal" if causal else "same"


def quadratic_form(y: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes `y ⊙ kernel ⊙ y`, elementwise HyperZZW: interactions take the sigmoid of it."""
    y, kernel = floating((y, kernel))
    return y * kernel * y


def gate(x: jax.Array, context: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes `x ⊙ (context @ K)`: each feature times a sum of the context's, for vectors.

    Sums are float32 or wider, and rounded once, after the product.

    Args:
      x: `(..., input_dim)`.
      context: `(..., context_dim)`.
      kernel: K, `(context_dim, input_dim)`.

    Returns:
      `(..., input_dim)`, in the dtype to which the arguments' promote.

    Raises:
      ValueError: if the shapes do not fit.

    Example:
      >>> print(gate(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]), jnp.array([[1.0, 10.0]])))
      [[ 3. 60.]]
    """
    fits = x.ndim and context.ndim and x.shape[:-1] == context.shape[:-1]
    if not fits or kernel.shape != (context.shape[-1], x.shape[-1]):
        raise ValueError(
            "gate needs x (..., input_dim), context (..., context_dim) and a kernel (context_dim,"
            f" input_dim), got {x.shape}, {context.shape} and {kernel.shape}"
        )
    x, context, kernel = floating((x, context, kernel))
    dtype = jnp.result_type(x, context, kernel)
    wide = at_least_float32(dtype)
    factors = jnp.matmul(context, kernel, preferred_element_type=wide)
    return (x.astype(wide) * factors).astype(dtype)


def gate_reference(x: jax.Array, context: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes `gate` as it is written down, `y[..., i] = Σ_m x[..., i] context[..., m] K[m, i]`.

    Example:
      >>> print(gate_reference(jnp.array([[2.0]]), jnp.array([[3.0, 4.0]]), jnp.ones((2, 1))))
      [[14.]]
    """
    x, context, kernel = floating((x, context, kernel))
    return jnp.sum(x[..., None, :] * context[..., :, None] * _like(kernel, x), axis=-2)


def _like(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return kernel.reshape((1,) * (x.ndim - 1) + kernel.shape)


def _dots(hyper: jax.Array, maps: Sequence[jax.Array], *, causal: bool = False) -> list[jax.Array]:
    if causal:
        raise ValueError("dot mixes all positions: choose 'product' or 'convolution' if causal")
    if hyper.ndim != 4 or hyper.shape[2] != hyper.shape[3]:
        raise ValueError(f"dot needs square 2-D maps, got a size of {hyper.shape[2:]}")
    hyper, maps = floating((hyper, list(maps)))
    wide = at_least_float32(hyper.dtype)
    return [jnp.matmul(hyper, u, preferred_element_type=wide).astype(u.dtype) for u in maps]


def _convolutions(
    hyper: jax.Array, maps: Sequence[jax.Array], *, causal: bool = False
) -> list[jax.Array]:
    return convolve_shared_kernel(maps, hyper, padding=_padding(causal))


def _products(
    hyper: jax.Array, maps: Sequence[jax.Array], *, causal: bool = False
) -> list[jax.Array]:
    hyper, maps = floating((hyper, list(maps)))
    return [hyper * u for u in maps]


Operator = Callable[..., list[jax.Array]]
OPERATORS: dict[str, Operator] = {
    "dot": _dots,
    "product": _products,
    "convolution": _convolutions,
}


def check_causal(causal: bool, size: Sequence[int]) -> None:
    """Raises ValueError if what is causal is no sequence."""
    if causal and len(size) != 1:
        raise ValueError(f"only sequences, of size (length,), are causal, not maps {tuple(size)}")


def check_operator(operator: str, size: Sequence[int], causal: bool = False) -> None:
    """Raises ValueError if an operator is unknown, or not defined for maps of a size.

    Example:
      >>> check_operator("dot", (8, 16))
      Traceback (most recent call last):
      ...
      ValueError: the operator 'dot' needs square 2-D maps, got size (8, 16)
    """
    operator_named(operator)
    check_causal(causal, size)
    if operator == "dot" and (len(size) != 2 or size[0] != size[1]):
        raise ValueError(f"the operator 'dot' needs square 2-D maps, got size {tuple(size)}")


def operator_named(name: str) -> Operator:
    """Returns the entry of `OPERATORS`; raises ValueError if there is none."""
    if name not in OPERATORS:
        raise ValueError(f"operator {name!r} is not one of {tuple(OPERATORS)}")
    return OPERATORS[name]
