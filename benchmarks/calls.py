"""A layer compiled, by itself and with its gradients, as calls to be measured."""

from typing import NamedTuple

import jax
import numpy as np
import timing
from flax import nnx


class Calls(NamedTuple):
    """What a layer does to an array: the result, and the result with all gradients of it."""

    forward: timing.Call
    gradient: timing.Call


def compiled(layer: nnx.Module, x: np.ndarray, dy: np.ndarray) -> Calls:
    """The layer's calls; gradients are those by its parameters and by `x`.

    Running statistics count as inputs: what a call makes of them is computed and dropped.
    """
    graph, params, other = nnx.split(layer, nnx.Param, ...)

    def forward(params, other, x, dy):
        merged = nnx.merge(graph, params, other, copy=True)
        return merged(x), nnx.state(merged, nnx.Not(nnx.Param))

    def both(params, other, x, dy):
        y, pullback, after = jax.vjp(lambda p, x: forward(p, other, x, dy), params, x, has_aux=True)
        return y, after, pullback(dy)

    arrays = jax.device_put((params, other, x, dy))
    programs = [jax.jit(f).lower(*arrays).compile() for f in (forward, both)]
    return Calls(*(lambda p=p: jax.block_until_ready(p(*arrays)) for p in programs))


def parameters(layer: nnx.Module) -> int:
    """How many numbers a layer learns."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
