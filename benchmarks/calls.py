"""A layer compiled, by itself and with its gradients, as calls to be measured."""

from collections.abc import Callable
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

    def forward(params, other, x):
        merged = nnx.merge(graph, params, other, copy=True)
        return merged(x), nnx.state(merged, nnx.Not(nnx.Param))

    def both(params, other, x, dy):
        y, pullback, after = jax.vjp(lambda p, x: forward(p, other, x), params, x, has_aux=True)
        return y, after, pullback(dy)

    given = jax.device_put((params, other, x, dy))
    return Calls(_call(forward, *given[:3]), _call(both, *given))


def _call(function: Callable, *arrays) -> timing.Call:
    program = jax.jit(function).lower(*arrays).compile()
    return lambda: jax.block_until_ready(program(*arrays))


def parameters(layer: nnx.Module) -> int:
    """How many numbers a layer learns."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
