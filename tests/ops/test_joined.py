"""A product of maps that are made on the way, against the same in the open."""

import jax
import jax.numpy as jnp
import pytest
from nets import normal, relative

from terminator_jax.ops.channel_major import product
from terminator_jax.ops.joined import Made, joined_product

SHAPE = (2, 5)


def scaled(x, factors):
    a, b = factors
    return x * a * b


def both_ways(kernel, arrays):
    """Maps of 4, 3 and 1 channels: one made of several arrays, one of itself, one as it is."""
    wide, a, b, narrow, single = arrays
    made = [
        Made(scaled, (wide, (a, b))),
        Made(jnp.multiply, (narrow, narrow)),
        Made(None, (single,)),
    ]
    plain = [scaled(wide, (a, b)), narrow * narrow, single]
    return joined_product(kernel, made), product(kernel, jnp.concatenate(plain))


def arrays():
    shapes = [(4, *SHAPE), (4, 1, 1), (1, *SHAPE), (3, *SHAPE), (1, *SHAPE)]
    return [normal(*shape, seed=n) for n, shape in enumerate(shapes)]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_is_the_product_of_the_maps(x64, monkeypatch, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    (found, expected), pullback = jax.vjp(both_ways, normal(8, 6), arrays())
    assert relative(found, expected) < 1e-12
    dy = normal(6, *SHAPE, seed=9)
    for a, b in zip(
        jax.tree.leaves(pullback((dy, 0 * dy))),
        jax.tree.leaves(pullback((0 * dy, dy))),
        strict=True,
    ):
        assert relative(a, b) < 1e-12


def test_keeps_only_what_maps_are_made_of():
    """On a CPU, of maps that are eight times as large as what they are made of."""

    def wide(x):
        return jnp.concatenate([jnp.sin(n * x) for n in range(1, 9)])

    def loss(kernel, x):
        y = joined_product(kernel, [Made(wide, (x,)), Made(None, (x,))])
        return jnp.sum(joined_product(kernel, [Made(wide, (y,)), Made(None, (y,))]) ** 2)

    def plain(kernel, x):
        for _ in range(2):
            x = product(kernel, jnp.concatenate([wide(x), x]))
        return jnp.sum(x**2)

    arguments = jnp.ones((9 * 8, 8)), jnp.ones((8, 4096))
    found, kept = (
        jax.jit(jax.grad(way)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        for way in (loss, plain)
    )
    assert found < 0.8 * kept
