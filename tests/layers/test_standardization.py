"""The modules BS, IS and G-IBS are the functions, with nothing to learn or to remember."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import normal

from terminator_jax.layers import (
    BatchStandardization,
    GroupInstanceBatchStandardization,
    InstanceStandardization,
)
from terminator_jax.ops.standardize import (
    batch_standardize,
    group_standardize,
    instance_standardize,
)

CASES = {
    "BS": (BatchStandardization(epsilon=0.1), lambda x: batch_standardize(x, epsilon=0.1)),
    "IS": (InstanceStandardization(epsilon=0.1), lambda x: instance_standardize(x, epsilon=0.1)),
    "G-IBS": (GroupInstanceBatchStandardization(), group_standardize),
    "three groups": (
        GroupInstanceBatchStandardization(3, epsilon=0.1),
        lambda x: group_standardize(x, groups=3, epsilon=0.1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_is_the_function(case):
    module, function = CASES[case]
    x = 2 + normal(3, 4, 4, 24, dtype=np.float32)
    np.testing.assert_array_equal(jax.jit(module)(x), jax.jit(function)(x))
    assert jax.tree.leaves(nnx.state(module)) == []


def test_errors():
    with pytest.raises(ValueError, match="groups must be positive, got 0"):
        GroupInstanceBatchStandardization(0)
    with pytest.raises(ValueError, match=re.escape("30 channels do not divide into 12 groups")):
        jax.eval_shape(GroupInstanceBatchStandardization(), jnp.zeros((2, 4, 4, 30)))
    with pytest.raises(ValueError, match=re.escape("got shape (2, 12)")):
        jax.eval_shape(BatchStandardization(), jnp.zeros((2, 12)))
