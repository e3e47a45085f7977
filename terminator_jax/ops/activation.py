"""The activation functions of the fast network."""

import math

import jax
import jax.numpy as jnp


@jax.custom_jvp
def erf(x: jax.Array) -> jax.Array:
    """Computes the error function.

    Its derivative is written out because jax 0.12 cannot differentiate `jax.lax.erf` inside a
    `shard_map`.

    Example:
      >>> print(erf(jnp.array([-1.0, 0.0, 1.0])).round(2))
      [-0.84  0.    0.84]
    """
    return jax.lax.erf(x)


erf.defjvps(lambda dx, _, x: dx * jnp.exp(-x * x) * (2 / math.sqrt(math.pi)))


def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact GELU, `x Φ(x)`, by one error function, in float32 or wider.

    `jax.nn.gelu(x, approximate=False)` takes the complementary one, which keeps the tiny values
    far to the left exact in relative terms and costs several times as much. jax 0.12 cannot
    differentiate it inside a `shard_map`.

    Example:
      >>> print(gelu(jnp.array([-1.0, 0.0, 1.0])).round(2))
      [-0.16  0.    0.84]
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * (0.5 * erf(wide * math.sqrt(0.5)) + 0.5)).astype(x.dtype)


def gelu_slope(x: jax.Array) -> jax.Array:
    """The derivative of `gelu`, `Φ(x) + x φ(x)`.

    Example:
      >>> [f"{y:.2f}" for y in gelu_slope(jnp.array([-1.0, 0.0, 1.0]))]
      ['-0.08', '0.50', '1.08']
    """
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * erf(x * math.sqrt(0.5)) + 0.5 + x * density


@jax.custom_vjp
def gated(x: jax.Array, gate: jax.Array) -> jax.Array:
    """`x σ(gate)` of equal shapes, in the dtype of `x`.

    A gradient keeps the arguments and nothing else.

    Example:
      >>> [f"{y:.2f}" for y in gated(jnp.ones(3), jnp.array([-1.0, 0.0, 1.0]))]
      ['0.27', '0.50', '0.73']
    """
    return (x * jax.nn.sigmoid(gate)).astype(x.dtype)


def _gated_forward(x, gate):
    return gated(x, gate), (x, gate)


def _gated_backward(residuals, dy):
    x, gate = residuals
    # σ(gate) is 1 less this: asked for itself, XLA would keep what the forward pass has.
    closed = jax.nn.sigmoid(-gate)
    dx, dgate = dy * (1 - closed), dy * x * closed * (1 - closed)
    return dx.astype(x.dtype), dgate.astype(gate.dtype)


gated.defvjp(_gated_forward, _gated_backward)
