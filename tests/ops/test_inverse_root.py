"""The inverse square root against its formula, with first and second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
from nets import relative

from terminator_jax.ops.inverse_root import inverse_root

FLOOR = 0.5


def plain(x):
    """The formula, for JAX to differentiate."""
    return 1 / jnp.sqrt(jnp.maximum(x, FLOOR))


def test_follows_the_formula(x64):
    x = jnp.array([-3.0, 0.0, 0.4, 0.6, 1.0, 7.0, 1e12])
    assert relative(inverse_root(x, FLOOR), plain(x)) < 1e-15
    for order in (1, 2):
        mine, theirs = (lambda x: inverse_root(x, FLOOR)), plain
        for _ in range(order):
            mine, theirs = jax.grad(mine), jax.grad(theirs)
        expected = jax.vmap(theirs)(x)
        assert np.any(expected != 0) and np.all(expected[:3] == 0)
        assert relative(jax.vmap(mine)(x), expected) < 1e-14


def test_has_forward_mode(x64):
    x, dx = jnp.array([0.1, 2.0]), jnp.array([3.0, 5.0])
    _, tangent = jax.jvp(lambda x: inverse_root(x, FLOOR), (x,), (dx,))
    np.testing.assert_allclose(tangent, [0, -0.5 * 2**-1.5 * 5], rtol=1e-14)


def test_is_finite_at_a_tiny_floor():
    """As of norms that may be 0."""
    value, grad = jax.value_and_grad(inverse_root)(0.0, 1e-24)
    np.testing.assert_allclose(value, 1e12, rtol=1e-6)
    assert grad == 0
