"""Gradients of what is computed again, against those of the function itself."""

import jax
import jax.numpy as jnp
from nets import normal, relative

from terminator_jax.ops.rematerialize import rematerialized


def test_gradients_of_several_results(x64):
    def function(x, more):
        return jnp.sin(x) * more["a"], jnp.exp(x[:2]) + more["b"]

    arguments = normal(4, 3), dict(a=normal(4, 3, seed=1), b=normal(2, 3, seed=2))
    ways = [jax.vjp(way, *arguments) for way in (rematerialized(function), function)]
    dy = normal(4, 3, seed=3), normal(2, 3, seed=4)
    for found, expected in zip(*(jax.tree.leaves((y, back(dy))) for y, back in ways), strict=True):
        assert relative(found, expected) < 1e-12
