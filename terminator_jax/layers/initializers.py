"""Initializers of the layers' weights.

XLA compiles a random generator for every size of array, which takes a CPU most of a second, and a
network has dozens of sizes. So the number of draws is rounded up to a few sizes, and the rest is
cut off. Outside of a trace, NumPy does the cutting and makes the constants: nothing is compiled.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# The number of proposals for each draw by rejection sampling.
NUM_TRIES = 16


def uniform(bound: float):
    """Makes an initializer: uniform in `±bound`."""

    def init(key, shape, dtype=jnp.float32):
        return _take_shape(_draw_uniform(key, bound, _rounded_count(shape), dtype), shape)

    return init


def normal(deviation: float):
    """Makes an initializer: `N(0, deviation²)`."""

    def init(key, shape, dtype=jnp.float32):
        return _take_shape(_draw_normal(key, deviation, _rounded_count(shape), dtype), shape)

    return init


def constant(value: float):
    """Makes an initializer: `value` everywhere."""

    def init(key, shape, dtype=jnp.float32):
        del key
        return jax.device_put(np.full(shape, value, dtype))

    return init


zeros, ones = constant(0.0), constant(1.0)


def kaiming_normal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Draws `N(0, 2 / fan_in)` for a weight `(inputs, outputs)` or `(*window, inputs, outputs)`."""
    deviation = math.sqrt(2 / math.prod(shape[:-1]))
    return _take_shape(_draw_normal(key, deviation, _rounded_count(shape), dtype), shape)


def gabor_init(omega0: float):
    """Makes an initializer of the Gabor weights, `(layers, d, hidden)`.

    `U(±1/√d) · 2π ω0 γ`, with `γ ~ Gamma(6/(l+1), rate 1)` drawn per entry of layer l, up to 5.
    """

    def init(key, shape, dtype=jnp.float32):
        if shape[-3] > 6:
            raise ValueError(f"a slow network has at most 5 hidden layers, got {shape[-3] - 1}")
        wave_key, scale_key = jax.random.split(key)
        count = _rounded_count(shape)
        wave = _draw_uniform(wave_key, 2 * math.pi * omega0 / math.sqrt(shape[-2]), count, dtype)
        layers = np.arange(1, shape[-3] + 1)[:, None, None]
        alphas = np.ones(count)
        alphas[: math.prod(shape)] = np.broadcast_to(6 / layers, shape).ravel()
        return _take_shape(wave * gamma(scale_key, jnp.asarray(alphas, dtype)), shape)

    return init


@jax.jit
def gamma(key: jax.Array, alphas: jax.Array) -> jax.Array:
    """Draws from Gamma(alpha, rate 1), one for each of `alphas`, all at least 1.

    This is the rejection sampling of Marsaglia and Tsang, with `NUM_TRIES` proposals for each draw.
    All are rejected less than once in 1e20 draws. `jax.random.gamma` loops until it succeeds, which
    takes longer to compile.

    Example:
      >>> draws = gamma(jax.random.key(0), jnp.full(10_000, 3.0))
      >>> print(f"{draws.mean():.1f}")
      3.0
    """
    normal_key, uniform_key = jax.random.split(key)
    tries = (NUM_TRIES, *alphas.shape)
    d = (alphas - 1 / 3)[None]
    x = jax.random.normal(normal_key, tries, alphas.dtype)
    v = jnp.maximum(1 + x / jnp.sqrt(9 * d), 0) ** 3
    bound = x * x / 2 + d - d * v + d * jnp.log(v)  # -inf where v is 0
    accepted = jnp.log1p(-jax.random.uniform(uniform_key, tries, alphas.dtype)) < bound
    first = jnp.argmax(accepted, axis=0)[None]
    return (d * jnp.take_along_axis(v, first, axis=0))[0]


def _rounded_count(shape: tuple[int, ...]) -> int:
    """Rounds the size up to the next of 1024, 4096, 16384, …"""
    return max(1024, 4 ** math.ceil(math.log(max(math.prod(shape), 1), 4)))


def _take_shape(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Takes the first values and gives them a shape."""
    count = math.prod(shape)
    if isinstance(values, jax.core.Tracer):
        return values[:count].reshape(shape)
    return jax.device_put(np.asarray(values)[:count].reshape(shape))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw_uniform(key, bound, count, dtype):
    return jax.random.uniform(key, (count,), dtype, -1, 1) * jnp.asarray(bound, dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw_normal(key, scale, count, dtype):
    return jax.random.normal(key, (count,), dtype) * jnp.asarray(scale, dtype)
