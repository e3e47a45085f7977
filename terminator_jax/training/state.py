"""All that changes while a run lasts, as one pytree.

The parameters are one vector: an optimizer then takes a few operations and not a few for each of
hundreds of tensors, and several devices average their gradients in one exchange. In it, those of
one shape lie side by side, so that what a model stacks, to compute it together, is one piece.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class TrainState(NamedTuple):
    """What a step takes and gives back.

    Attributes:
        params: the model's parameters in one vector: see `Structure`.
        other: the model's other variables, such as running averages; often none.
        opt_state: the optimizer's state.
        key: data of the random key that dropout draws from, which stays the same.
        step: steps done.
    """

    params: jax.Array
    other: nnx.State
    opt_state: optax.OptState
    key: jax.Array
    step: jax.Array


class Structure(NamedTuple):
    """What a model is but for its numbers.

    Attributes:
        graph: the model without its variables.
        params: names, shapes and the one dtype of its parameters.

    Example:
        >>> structure, params, other = split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> vector = pack(params)
        >>> vector.shape
        (9,)
        >>> structure.merge(vector, other)(jnp.ones((1, 2))).shape
        (1, 3)
    """

    graph: nnx.GraphDef
    params: nnx.State

    def merge(self, params: jax.Array, other: nnx.State) -> nnx.Module:
        """The model with packed parameters."""
        return nnx.merge(self.graph, self.unpack(params), other, copy=True)

    def unpack(self, vector: jax.Array | np.ndarray) -> nnx.State:
        """The parameters by their names."""
        leaves, tree = jax.tree.flatten(self.params)
        found: list[Any] = [None] * len(leaves)
        start = 0
        for members in _alike(leaves):
            shape = (len(members), *leaves[members[0]].shape)
            stack = vector[start : start + math.prod(shape)].reshape(shape)
            for n, member in enumerate(members):
                found[member] = stack[n : n + 1].reshape(shape[1:])
            start += math.prod(shape)
        return jax.tree.unflatten(tree, found)

    def listed(self, vector: np.ndarray) -> np.ndarray:
        """A vector like that of the parameters, with theirs one after the other by their names.

        As checkpoints have it, which thus do not depend on how parameters are packed.
        """
        return np.concatenate([x.reshape(-1) for x in jax.tree.leaves(self.unpack(vector))])

    def packed(self, listed: np.ndarray) -> np.ndarray:
        """The vector that `listed` is made from."""
        leaves, tree = jax.tree.flatten(self.params)
        parts = np.split(listed, np.cumsum([leaf.size for leaf in leaves])[:-1])
        named = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return pack(jax.tree.unflatten(tree, named))

    @property
    def starts(self) -> list[int]:
        """Where in the vector each parameter begins."""
        leaves = jax.tree.leaves(self.params)
        order = list(itertools.chain(*_alike(leaves)))
        starts = np.cumsum([0] + [math.prod(leaves[n].shape) for n in order])
        return [int(starts[order.index(n)]) for n in range(len(order))]


def _alike(leaves: Sequence[Any]) -> list[list[int]]:
    """Which of the arrays have one shape, for each shape there is."""
    members: dict[tuple[int, ...], list[int]] = {}
    for n, leaf in enumerate(leaves):
        members.setdefault(leaf.shape, []).append(n)
    return list(members.values())


def pack(params: nnx.State) -> jax.Array:
    """Parameters of one dtype as one vector.

    Raises:
        TypeError: if they have several.
    """
    leaves = jax.tree.leaves(params)
    numpy = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
    dtypes = {leaf.dtype for leaf in leaves}
    if len(dtypes) > 1:
        raise TypeError(f"parameters must have one dtype, got {sorted(map(str, dtypes))}")
    stacks = [numpy.stack([leaves[n] for n in members]) for members in _alike(leaves)]
    return numpy.concatenate([stack.reshape(-1) for stack in stacks])


def split(model: nnx.Module) -> tuple[Structure, nnx.State, nnx.State]:
    """A model as its structure, its parameters by their names and its other variables."""
    graph, params, other = nnx.split(model, nnx.Param, ...)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return Structure(graph, shapes), params, other


def new_state(
    params: nnx.State, other: nnx.State, solver: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first step, from a model's variables.

    Example:
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> _, params, other = split(model)
        >>> int(new_state(params, other, optax.sgd(0.1), seed=0).step)
        0
    """
    # Copies, because a step gives up the memory of the state that it is given.
    params, other = pack(params), jax.tree.map(jnp.copy, other)
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(params, other, solver.init(params), key, jnp.zeros((), jnp.int32))
