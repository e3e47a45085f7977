"""Maps with their channels first: each function against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import normal, relative

from terminator_jax.ops import channels_first
from terminator_jax.ops.standardize import standardize


@pytest.mark.parametrize("size", [(), (5,), (4, 3)])
def test_pointwise(x64, size):
    x, kernel, bias, dy = normal(3, 2, *size), normal(3, 6), normal(6), normal(6, 2, *size)
    y, pullback = jax.vjp(channels_first.pointwise, x, kernel, bias)
    assert (
        relative(y, jnp.tensordot(kernel, x, (0, 0)) + channels_first.broadcast_channels(bias, y))
        < 1e-12
    )
    dx, dkernel, dbias = pullback(dy)
    rest = tuple(range(1, x.ndim))
    assert relative(dx, jnp.tensordot(kernel, dy, (1, 0))) < 1e-12
    assert relative(dkernel, jnp.tensordot(x, dy, (rest, rest))) < 1e-12
    assert relative(dbias, dy.sum(rest)) < 1e-12


def test_sums_of_bfloat16_are_wide():
    """1 + 256 ones: bfloat16 would stop counting at 256."""
    x, kernel = jnp.ones((512, 1, 1), jnp.bfloat16), jnp.ones((512, 1), jnp.bfloat16)
    assert float(channels_first.pointwise(x, kernel)[0, 0, 0]) == 512
    np.testing.assert_array_equal(
        jax.grad(lambda k: channels_first.pointwise(x, k).sum())(kernel), 1
    )


def test_gradients_of_spread_values_are_wide():
    """A sum of 4097 ones, which bfloat16 would round to 4096."""
    y = jnp.ones((3, 17, 241), jnp.bfloat16)
    for values in (jnp.ones(3), jnp.ones((3, 17))):
        out, pullback = jax.vjp(lambda v: channels_first.broadcast_channels(v, y), values)
        assert (out.shape, out.dtype) == (y.shape, y.dtype)
        (gradient,) = pullback(y)
        np.testing.assert_array_equal(gradient, y.size / values.size)


@pytest.mark.parametrize("size", [(5,), (4, 3)])
def test_spatial_mean(x64, size):
    x = normal(3, 2, *size)
    mean = channels_first.spatial_mean(x)
    assert relative(mean, x.mean(channels_first.spatial_axes(x))) < 1e-12
    assert channels_first.spatial_mean(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("size", [(7,), (4, 3)])
def test_standardize_space(x64, size):
    """Value and derivatives, the second too, against those that JAX finds of the formula."""

    def formula(x):
        return standardize(x, channels_first.spatial_axes(x))

    x, dx, dy = normal(3, 2, *size), normal(3, 2, *size), normal(3, 2, *size)
    results = []
    for function in (formula, channels_first.standardize_space):
        y, tangent = jax.jvp(function, (x,), (dx,))
        gradient = jax.grad(lambda x, f=function: jnp.sum(f(x) * dy))
        results.append([y, tangent, gradient(x), *jax.jvp(gradient, (x,), (dx,))])
    for expected, found in zip(*results, strict=True):
        assert relative(found, expected) < 1e-10


def test_a_constant_map_is_standardized_to_zeros_with_finite_gradients():
    x = jnp.full((1, 1, 5), 3.0)
    y, pullback = jax.vjp(channels_first.standardize_space, x)
    np.testing.assert_array_equal(y, 0)
    assert bool(jnp.isfinite(pullback(jnp.arange(5.0).reshape(1, 1, 5))[0]).all())


def test_standardize_space_keeps_the_dtype():
    x = normal(3, 2, 5, dtype=np.float32).astype(jnp.bfloat16)
    y, pullback = jax.vjp(channels_first.standardize_space, x)
    assert y.dtype == pullback(y)[0].dtype == jnp.bfloat16
