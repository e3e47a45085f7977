"""What the gradient of a block keeps in memory, in a program compiled as users have it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers import SFNEBlock


def test_a_gradient_keeps_few_maps():
    """At once, of the size of the input: 49 if it does not compute the bottleneck's again."""
    channels, shape = 24, (16, 32, 32)
    block = nnx.eval_shape(lambda: SFNEBlock(shape[1:], channels, factor=2, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(block)

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params).channel_major(x) ** 2)

    x = jax.ShapeDtypeStruct((channels, *shape), jnp.float32)
    program = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
    maps = program.memory_analysis().temp_size_in_bytes / (4 * math.prod(x.shape))
    assert maps < 46
