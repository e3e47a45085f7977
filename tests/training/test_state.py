"""A model as its definition and its variables, and its own random streams."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from terminator_jax.training.state import new_state, split_model


class Dropping(nnx.Module):
    """Running averages and two dropouts, one of which has several keys."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.first, self.second = (nnx.Dropout(0.5, rngs=rngs) for _ in range(2))
        self.stream = rngs.dropout.split(4)

    def __call__(self, x):
        return self.second(self.first(self.norm(self.linear(x))))


@pytest.fixture
def parts():
    return split_model(Dropping(nnx.Rngs(params=0, dropout=1)))


def test_variables_are_parameters_or_others(parts):
    model_def, params, model_state = parts
    assert set(params) == {"linear", "norm"} and set(model_state) == {"norm"}
    model = model_def.merge(params, model_state)
    for a, b in zip(
        jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_random_streams_follow_from_the_key(parts):
    """Each its own, the same for the same key, and none of it is state."""
    model_def, params, model_state = parts

    def draws(seed):
        model = model_def.merge(params, model_state, jax.random.key(seed))
        own = [model.first.rngs(), model.second.rngs(), *model.stream.key[...]]
        return [tuple(np.asarray(jax.random.key_data(key))) for key in own]

    assert draws(0) == draws(0)
    assert len({*draws(0), *draws(1)}) == 12
    state = new_state(params, model_state, optax.adam(0.1), seed=0)
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))


def test_a_merged_model_does_not_change_what_it_was_made_of(parts):
    model_def, params, model_state = parts
    before = jax.tree.map(np.asarray, model_state)
    model_def.merge(params, model_state)(jnp.ones((4, 2)))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(model_state), strict=True):
        np.testing.assert_array_equal(a, b)
