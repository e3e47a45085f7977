"""Adaptive average pooling against its definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import normal, relative

from terminator_jax.ops.pooling import adaptive_average, adaptive_average_each, adaptive_matrix


def bins_of(n, bins):
    """`[floor(o n/bins), ceil((o+1) n/bins))` of every bin o."""
    return [
        slice(int(np.floor(o * n / bins)), int(np.ceil((o + 1) * n / bins))) for o in range(bins)
    ]


def definition(x, bins):
    out = np.zeros((len(x), *bins, x.shape[-1]))
    axes = [bins_of(n, k) for n, k in zip(x.shape[1:-1], bins, strict=True)]
    for o in np.ndindex(*bins):
        window = tuple(axis[i] for axis, i in zip(axes, o, strict=True))
        out[(slice(None), *o)] = x[(slice(None), *window)].mean(tuple(range(1, x.ndim - 1)))
    return out


@pytest.mark.parametrize(
    ("size", "bins"),
    [
        ((8,), (3,)),
        ((3,), (9,)),
        ((8, 8), (3, 3)),
        ((7, 5), (3, 4)),
        ((8, 8), (9, 9)),
        ((1, 6), (3, 2)),
        ((4, 6, 5), (2, 3, 7)),
    ],
    ids=str,
)
def test_follows_the_definition(x64, size, bins):
    x = np.asarray(normal(2, *size, 3))
    assert relative(adaptive_average(jnp.asarray(x), bins), definition(x, bins)) < 1e-14


@pytest.mark.parametrize("size", [(8,), (7, 5), (1, 6), (4, 6, 5)], ids=str)
def test_several_maps_at_once(x64, size):
    """Each to its own bins, in the middle of the largest one's; values and gradients."""
    bins, x = (3, 7, 5, 7), normal(4, *size, 3)

    def one_by_one(x):
        results = []
        for one, k in zip(x, bins, strict=True):
            margin = (7 - k) // 2
            pooled = adaptive_average(one[None], (k,) * len(size))[0]
            results.append(jnp.pad(pooled, [(margin, margin)] * len(size) + [(0, 0)]))
        return jnp.stack(results)

    expected, transpose = jax.vjp(one_by_one, x)
    found, mine = jax.vjp(lambda x: adaptive_average_each(x, bins), x)
    assert relative(found, expected) < 1e-14
    dy = normal(*expected.shape, seed=3)
    assert relative(mine(dy)[0], transpose(dy)[0]) < 1e-14


@pytest.mark.parametrize(("n", "bins"), [(32, 3), (32, 9), (3, 9), (7, 7), (5, 1)])
def test_every_bin_is_a_mean(n, bins):
    matrix = adaptive_matrix(n, bins)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-14)
    assert ((matrix > 0).sum(0) >= 1).all()


def test_gradient_is_the_transpose(x64):
    x, w = normal(2, 5, 4, 3), normal(2, 3, 7, 3, seed=2)
    grad = jax.grad(lambda x: jnp.sum(w * adaptive_average(x, (3, 7))))(x)
    rows, columns = adaptive_matrix(5, 3), adaptive_matrix(4, 7)
    assert relative(grad, np.einsum("bijc,ir,js->brsc", w, rows, columns)) < 1e-14


def test_error():
    message = "x of shape (2, 8, 3) has 1 spatial axes, bins (3, 3)"
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda x: adaptive_average(x, (3, 3)), jnp.zeros((2, 8, 3)))


@pytest.mark.parametrize("bins", [(3,), (3, 4)])
def test_error_of_several_maps(bins):
    message = f"x of shape (2, 8, 3) needs as many bins, all even or odd, not {bins}"
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda x: adaptive_average_each(x, bins), jnp.zeros((2, 8, 3)))
