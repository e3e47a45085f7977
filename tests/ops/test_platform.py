"""Choices by platform: what is traced for one platform stays in its block."""

import jax
import jax.numpy as jnp
import pytest

from terminator_jax.ops.channels_first import pointwise
from terminator_jax.ops.platform import by_platform, only


def lowered(platform, size):
    """Returns the program of a product and its gradients."""

    def loss(x, kernel):
        return jnp.sum(pointwise(x, kernel) ** 2)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 2, *size), (3, 4))]
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*shapes)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_what_was_traced_for_one_platform_is_not_used_for_another():
    size = (5, 7)  # of no other test, whose programs JAX keeps
    with only("cpu"):
        for_cpu = lowered("tpu", size)
    kept = lowered("tpu", size)
    jax.clear_caches()
    assert kept == lowered("tpu", size)
    assert kept != for_cpu


@pytest.mark.parametrize(
    ("platform", "choice"), [("cpu", 0), ("gpu", 1), ("tpu", 2), ("another", 0)]
)
def test_one_platform(platform, choice):
    """A platform that the library does not know counts as a CPU, as when a program is lowered."""
    choices = {"cpu": 0, "gpu": 1, "tpu": 2}
    with only(platform):
        assert by_platform(choices.__getitem__, lambda n: lambda: n) == choice
