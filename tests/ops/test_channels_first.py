"""Maps with their channels first: each function against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import normal, relative

from terminator_jax.ops import channels_first


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
def test_moments(x64, size):
    x = normal(3, 2, *size)
    axes = channels_first.spatial_axes(x)
    mean, square = channels_first.spatial_mean_and_square(x)
    assert relative(mean, x.mean(axes, keepdims=True)) < 1e-12
    assert relative(square, (x**2).mean(axes, keepdims=True)) < 1e-12
    assert channels_first.spatial_mean(x.astype(jnp.float32)).dtype == jnp.float32
