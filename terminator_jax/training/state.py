"""The state of a run: everything that a training step reads and replaces, as one pytree.

The parameters are one vector, that of `jax.flatten_util.ravel_pytree`. As named arrays, each of
hundreds would get a kernel of its own in the update, and the step would take a third longer to
compile: for two small blocks 39 s of CPU time instead of 29. Checkpoints have them by their names.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree


class TrainState(NamedTuple):
    """What a training step takes and returns.

    Attributes:
        params: the parameters as one vector; `ModelDef.unravel` names them.
        model_state: the model's other variables, such as running averages, and frozen parameters.
        opt_state: the state of the optimizer.
        key: the data of the random key that every step derives its own from; it stays the same.
        step: the number of steps done.
    """

    params: jax.Array
    model_state: nnx.State
    opt_state: optax.OptState
    key: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """A model without the values of its variables.

    Attributes:
        graphdef: the structure of the model.
        streams: shapes and dtypes of its random streams, such as those of `nnx.Dropout`.
        params: shapes and dtypes of its parameters, by their names.
        trained: the filter of these parameters; others may be frozen.

    Example:
        >>> model_def, params, model_state = split_model(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> model_def.merge(params, model_state)(jnp.ones((1, 2))).shape
        (1, 3)
    """

    graphdef: nnx.GraphDef
    streams: nnx.State
    params: nnx.State
    trained: Any = nnx.Param

    def unravel(self, vector: jax.Array) -> nnx.State:
        """Returns the parameters by their names, from all of them as one vector."""
        leaves, treedef = jax.tree.flatten(self.params)
        sizes = [leaf.size for leaf in leaves]
        if isinstance(vector, np.ndarray):
            parts = np.split(vector, np.cumsum(sizes)[:-1])
        else:
            parts = jax.lax.split(vector, sizes)
        return treedef.unflatten(
            [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        )

    def merge(
        self, params: nnx.State, model_state: nnx.State, key: jax.Array | None = None
    ) -> nnx.Module:
        """Returns the model with these variables.

        Args:
            params: the parameters.
            model_state: the other variables.
            key: seeds the model's own random streams, each differently. A step that derives it
                from the seed and its number needs no stream in a checkpoint. By default a constant,
                for a model that draws nothing.
        """
        key = jax.random.key(0) if key is None else key
        leaves, treedef = jax.tree.flatten(self.streams)
        streams = treedef.unflatten([_stream(leaf, key, n) for n, leaf in enumerate(leaves)])
        return nnx.merge(self.graphdef, params, streams, model_state, copy=True)


def _stream(leaf: jax.ShapeDtypeStruct, key: jax.Array, number: int) -> jax.Array:
    """Returns the key of a random stream, or zeros for its counter."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.zeros(leaf.shape, leaf.dtype)
    key = jax.random.fold_in(key, number)
    return jax.random.split(key, leaf.shape) if leaf.shape else key


def split_model(
    model: nnx.Module, trained: Any = nnx.Param
) -> tuple[ModelDef, nnx.State, nnx.State]:
    """Splits a model into its definition, its parameters and its other variables.

    Args:
        model: the model.
        trained: the filter of the parameters; those that it leaves out are other variables.
    """
    graphdef, params, streams, model_state = nnx.split(model, trained, nnx.RngState, ...)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (streams, params))
    return ModelDef(graphdef, *shapes, trained), params, model_state


def new_state(
    params: nnx.State, model_state: nnx.State, tx: optax.GradientTransformation, seed: int
) -> TrainState:
    """Returns the state before the first step.

    Args:
        params: the initial parameters.
        model_state: the initial values of the other variables.
        tx: the optimizer.
        seed: decides what is random in training.

    Example:
        >>> _, params, model_state = split_model(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> int(new_state(params, model_state, optax.sgd(0.1), seed=0).step)
        0
    """
    key = jax.random.key_data(jax.random.key(seed))
    vector = ravel(params)
    return TrainState(vector, model_state, tx.init(vector), key, jnp.zeros((), jnp.int32))


def ravel(params: nnx.State) -> jax.Array:
    """Returns all parameters as one vector, in the order of their names.

    Raises:
        TypeError: if they have several dtypes.
    """
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
    if len(dtypes) > 1:
        raise TypeError(f"parameters must have one dtype, got {sorted(map(str, dtypes))}")
    leaves = jax.tree.leaves(params)
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):  # no program for each shape
        return np.concatenate([leaf.reshape(-1) for leaf in leaves])
    return ravel_pytree(params)[0]
