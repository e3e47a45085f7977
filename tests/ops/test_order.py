"""Whether one thing really comes after another, and what else it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import normal

from terminator_jax.ops.order import after, after_product, stored


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_changes_nothing(shape, dtype):
    """Whatever comes first, however large: its sum would be no float16."""
    x = normal(7, dtype=np.float32).astype(dtype)
    np.testing.assert_array_equal(jax.jit(after)(jnp.full(shape, 60000, dtype), x), x)


def test_needs_what_comes_first():
    """What is no number comes through; elsewhere than on CPUs, the compiler is asked."""
    assert np.isnan(after(jnp.array([1, jnp.nan]), jnp.ones(3))).all()


def test_a_product_comes_first_too():
    x = normal(5, 3, dtype=np.float32)
    np.testing.assert_array_equal(jax.jit(after_product)(jnp.ones((2, 3)), x), x)
    assert np.isnan(after_product(jnp.full((2, 3), jnp.nan), x)).all()


@pytest.mark.parametrize("function", [after, after_product])
def test_asks_other_compilers(monkeypatch, function):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    first = jnp.ones((2, 3))
    assert "optimization_barrier" in str(jax.make_jaxpr(function)(first, jnp.ones((4, 3))))
    gradient = jax.grad(lambda x: function(first, x).sum())
    np.testing.assert_array_equal(gradient(jnp.ones((4, 3))), 1)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_what_is_stored_is_the_same(monkeypatch, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = normal(5, 3, dtype=np.float32)
    y, pullback = jax.vjp(jax.jit(stored), x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(pullback(2 * x)[0], 2 * x)


def test_what_is_stored_is_made_once():
    """Of eight maps, of which every product else is given the sum anew."""

    def products(keep, kernel, maps):
        x = keep(sum(maps[1:], maps[0]) * 3)
        return sum(jnp.sum(kernel @ x[:, n:]) for n in range(3)) + jnp.sum(jnp.sin(x))

    def divisions(keep):
        maps = [jnp.ones((8, 1024))] * 8
        program = jax.jit(lambda kernel, maps: products(keep, kernel, maps))
        return program.lower(jnp.ones((8, 8)), maps).compile().as_text().count(" divide(")

    assert (divisions(stored), divisions(lambda x: x)) == (1, 0)
