"""All that changes while a run lasts, as one pytree.

The parameters are one vector: an optimizer then takes a few operations and not a few for each of
hundreds of tensors, and several devices average their gradients in one exchange.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class TrainState(NamedTuple):
    """What a step takes and gives back.

    Attributes:
        params: the model's parameters, one after the other: see `Structure`.
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
        shapes, tree = jax.tree.flatten(self.params)
        ends = np.cumsum([math.prod(shape.shape) for shape in shapes])
        starts = [0, *ends[:-1]]
        places = zip(starts, ends, shapes, strict=True)
        return jax.tree.unflatten(tree, [vector[a:b].reshape(s.shape) for a, b, s in places])


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
    return numpy.concatenate([leaf.reshape(-1) for leaf in leaves])


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
