"""Whether one thing really comes after another, and what else it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import normal

from terminator_jax.ops.order import after


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_changes_nothing(shape, dtype):
    """Whatever comes first, however large: its sum would be no float16."""
    x = normal(7, dtype=np.float32).astype(dtype)
    np.testing.assert_array_equal(jax.jit(after)(jnp.full(shape, 60000, dtype), x), x)


def test_needs_what_comes_first():
    """What is no number comes through; elsewhere than on CPUs, the compiler is asked."""
    assert np.isnan(after(jnp.array([1, jnp.nan]), jnp.ones(3))).all()


def test_asks_other_compilers(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "optimization_barrier" in str(jax.make_jaxpr(after)(jnp.ones(2), jnp.ones(3)))
    gradient = jax.grad(lambda x: after(jnp.ones(2), x).sum())
    np.testing.assert_array_equal(gradient(jnp.ones(3)), 1)
