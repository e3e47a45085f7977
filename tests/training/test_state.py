"""Parameters as one vector, and back by their names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from terminator_jax.training.state import pack, split


class Two(nnx.Module):
    """Parameters of several shapes, one of them without axes."""

    def __init__(self, dtype=jnp.float32):
        self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.scalar = nnx.Param(jnp.asarray(5.0, dtype))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))


def test_every_parameter_comes_back_in_its_place():
    structure, params, other = split(Two())
    vector = pack(params)
    assert vector.shape == (2 * 3 + 3 + 1 + 3 + 3,)
    numbered = jnp.arange(vector.size, dtype=vector.dtype)
    found = structure.unpack(numbered)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(found)]
    assert shapes == [(x.shape, x.dtype) for x in jax.tree.leaves(params)]
    np.testing.assert_array_equal(pack(found), numbered)
    model = structure.merge(numbered, other)
    own = model.linear.kernel[...].reshape(-1)
    np.testing.assert_array_equal(jnp.diff(own), 1)
    np.testing.assert_array_equal(model.norm.mean[...], 0)


def test_parameters_of_one_shape_lie_side_by_side():
    """What a model stacks, is one piece of the vector."""
    structure, params, _ = split(Two())
    starts, shapes = structure.starts, [x.shape for x in jax.tree.leaves(params)]
    assert sorted(starts) == [0, 3, 6, 9, 15]
    assert [start for start, shape in zip(starts, shapes, strict=True) if shape == (3,)] == [
        0,
        3,
        6,
    ]
    found = jax.tree.leaves(structure.unpack(jnp.arange(16)))
    assert [int(x.reshape(-1)[0]) for x in found] == starts


def test_lists_parameters_in_the_order_of_their_names():
    structure, _, _ = split(Two())
    vector = np.arange(16)
    listed = structure.listed(vector)
    assert listed.tolist() != vector.tolist()
    expected = [x.reshape(-1) for x in jax.tree.leaves(structure.unpack(vector))]
    np.testing.assert_array_equal(listed, np.concatenate(expected))
    np.testing.assert_array_equal(structure.packed(listed), vector)


def test_arrays_of_numpy_stay_there():
    """As checkpoints take them: nothing is sent to a device."""
    structure, params, _ = split(Two())
    host = structure.unpack(np.asarray(pack(params)))
    assert {type(x) for x in jax.tree.leaves(host)} == {np.ndarray}
    assert type(pack(host)) is np.ndarray


def test_parameters_of_two_dtypes():
    _, params, _ = split(Two(jnp.bfloat16))
    with pytest.raises(TypeError, match=r"one dtype, got \['bfloat16', 'float32'\]"):
        pack(params)
