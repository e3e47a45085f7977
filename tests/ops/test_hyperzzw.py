"""The products of a hyper-kernel with a map, against NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import normal, relative

from terminator_jax.ops import hyperzzw
from terminator_jax.ops.channels_first import to_channels_first, to_channels_last
from terminator_jax.ops.conv import convolve_reference


def test_dot(x64):
    hyper, u = normal(2, 5, 5, 3), normal(2, 5, 5, 3, seed=2)
    out = hyperzzw.dot(hyper, u)
    for b, c in np.ndindex(2, 3):
        assert relative(out[b, :, :, c], np.asarray(hyper)[b, :, :, c] @ u[b, :, :, c]) < 1e-13


def test_dot_gradients(x64):
    hyper, u, w = (normal(2, 4, 4, 3, seed=n) for n in range(3))
    grads = jax.grad(lambda *a: jnp.sum(w * hyperzzw.dot(*a)), (0, 1))(hyper, u)
    assert relative(grads[0], np.einsum("bijc,bkjc->bikc", w, u)) < 1e-13
    assert relative(grads[1], np.einsum("bikc,bijc->bkjc", hyper, w)) < 1e-13


def test_product_and_twice():
    hyper, u = normal(2, 7, 3, dtype=np.float32), normal(2, 7, 3, seed=2, dtype=np.float32)
    np.testing.assert_array_equal(hyperzzw.product(hyper, u), np.asarray(hyper) * u)
    np.testing.assert_allclose(
        hyperzzw.quadratic_form(u, hyper), np.asarray(u) ** 2 * hyper, rtol=1e-6
    )


@pytest.mark.parametrize("name", hyperzzw.OPERATORS)
def test_operators_are_the_functions_channel_major(x64, name):
    hyper, *maps = (normal(2, 4, 4, 3, seed=n) for n in range(3))
    found = hyperzzw.OPERATORS[name](to_channels_first(hyper), [to_channels_first(u) for u in maps])
    for out, u in zip(found, maps, strict=True):
        assert relative(to_channels_last(out), getattr(hyperzzw, name)(hyper, u)) < 1e-12


@pytest.mark.parametrize("size", [(7,), (4, 5)], ids=str)
def test_convolution(x64, size):
    """Each sample has its own kernel, as large as the map."""
    hyper, u = normal(2, *size, 3), normal(2, *size, 3, seed=2)
    assert relative(hyperzzw.convolution(hyper, u), convolve_reference(u, hyper)) < 1e-12


@pytest.mark.parametrize(
    ("function", "hyper", "u", "message"),
    [
        (hyperzzw.dot, (2, 4, 5, 3), (2, 4, 5, 3), "got (2, 4, 5, 3) and (2, 4, 5, 3)"),
        (hyperzzw.dot, (2, 4, 4, 3), (2, 4, 4, 1), "got (2, 4, 4, 3) and (2, 4, 4, 1)"),
        (hyperzzw.dot, (2, 4, 3), (2, 4, 3), "choose 'product' or 'convolution' for other maps"),
        (hyperzzw.convolution, (2, 4, 3), (1, 4, 3), "got (2, 4, 3) and (1, 4, 3)"),
        (hyperzzw.product, (2, 4, 3), (1, 4, 3), "equal shapes, got (2, 4, 3) and (1, 4, 3)"),
    ],
)
def test_errors(function, hyper, u, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(function, jnp.zeros(hyper), jnp.zeros(u))
