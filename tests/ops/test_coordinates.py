"""Coordinates of the positions of a map."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terminator_jax.ops.coordinates import grid


@pytest.mark.parametrize("size", [(1,), (2,), (9,), (4, 7), (1, 3), (2, 3, 4)], ids=str)
def test_row_major_from_end_to_end(x64, size):
    found = grid(size, jnp.float64)
    assert found.shape == (np.prod(size), len(size))
    for position, at in zip(found, np.ndindex(*size), strict=True):
        expected = [-1 + (2 * i / (n - 1) if n > 1 else 0) for i, n in zip(at, size, strict=True)]
        np.testing.assert_allclose(position, expected, rtol=1e-14, atol=1e-15)


def test_dtype():
    assert grid((3,)).dtype == jnp.float32
    np.testing.assert_array_equal(jax.jit(lambda: grid((5, 3)))(), grid((5, 3)))


@pytest.mark.parametrize("size", [(), (3, 0), (-1,)])
def test_errors(size):
    with pytest.raises(ValueError, match=re.escape(f"positive numbers of positions, got {size}")):
        grid(size)
