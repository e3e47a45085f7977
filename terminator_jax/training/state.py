"""All that changes while a run lasts, as one pytree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class TrainState(NamedTuple):
    """What a step takes and gives back.

    Attributes:
        params: the model's parameters.
        other: the model's other variables, such as running averages; often none.
        opt_state: the optimizer's state.
        key: data of the random key that dropout draws from, which stays the same.
        step: steps done.
    """

    params: nnx.State
    other: nnx.State
    opt_state: optax.OptState
    key: jax.Array
    step: jax.Array


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """A model as its structure, its parameters and its other variables."""
    return nnx.split(model, nnx.Param, ...)


def new_state(
    params: nnx.State, other: nnx.State, solver: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first step.

    Example:
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> _, params, other = split(model)
        >>> int(new_state(params, other, optax.sgd(0.1), seed=0).step)
        0
    """
    # Copies, because a step gives up the memory of the state that it is given.
    params, other = jax.tree.map(jnp.copy, (params, other))
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(params, other, solver.init(params), key, jnp.zeros((), jnp.int32))
