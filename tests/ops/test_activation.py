"""GELU and the error function against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from terminator_jax.ops.activation import erf, gelu

X = np.linspace(-8, 8, 101)


def test_is_the_exact_one(x64):
    expected = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in X]
    np.testing.assert_allclose(gelu(jnp.asarray(X)), expected, rtol=1e-13, atol=1e-15)


def test_gradient(x64):
    density = np.exp(-(X**2) / 2) / np.sqrt(2 * np.pi)
    expected = [(1 + math.erf(x / math.sqrt(2))) / 2 for x in X] + X * density
    grad = jax.vmap(jax.grad(gelu))(jnp.asarray(X))
    np.testing.assert_allclose(grad, expected, rtol=1e-12, atol=1e-14)


def test_derivatives_of_the_error_function(x64):
    """The first is the bell curve, the second its slope; forwards as backwards."""
    bell = 2 / np.sqrt(np.pi) * np.exp(-(X**2))
    first, second = jax.grad(erf), jax.grad(jax.grad(erf))
    np.testing.assert_allclose(jax.vmap(first)(jnp.asarray(X)), bell, rtol=1e-13)
    np.testing.assert_allclose(jax.vmap(second)(jnp.asarray(X)), -2 * X * bell, rtol=1e-13)
    forwards = jax.jvp(erf, (jnp.asarray(X),), (jnp.ones(len(X)),))[1]
    np.testing.assert_allclose(forwards, bell, rtol=1e-13)


@pytest.mark.parametrize("function", [erf, gelu])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_inside_shard_map(function, dtype):
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    split = PartitionSpec("batch")
    grad = jax.grad(lambda x: jnp.sum(function(x)))
    x = jnp.asarray(X, dtype)
    inside = jax.jit(jax.shard_map(grad, mesh=mesh, in_specs=split, out_specs=split))
    np.testing.assert_array_equal(inside(x), jax.jit(grad)(x))


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_narrow(dtype, rounding):
    """To within the rounding of the result; far to the left the tiny values are lost."""
    x = jnp.asarray(X, dtype)
    expected = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in np.float64(x)]
    assert gelu(x).dtype == dtype
    np.testing.assert_allclose(np.float64(gelu(x)), expected, rtol=1.01 * rounding, atol=1e-6)
