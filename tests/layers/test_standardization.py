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
    "BS": (BatchStandardization(24, epsilon=0.1), lambda x: batch_standardize(x, epsilon=0.1)),
    "IS": (InstanceStandardization(epsilon=0.1), lambda x: instance_standardize(x, epsilon=0.1)),
    "G-IBS": (GroupInstanceBatchStandardization(24), group_standardize),
    "three groups": (
        GroupInstanceBatchStandardization(24, 3, epsilon=0.1),
        lambda x: group_standardize(x, groups=3, epsilon=0.1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_is_the_function(case):
    module, function = CASES[case]
    x = 2 + normal(3, 4, 4, 24, dtype=np.float32)
    found = nnx.jit(lambda module, x: module(x))(module, x)
    np.testing.assert_array_equal(found, jax.jit(function)(x))


def test_errors():
    with pytest.raises(ValueError, match="24 channels do not divide into 0 groups"):
        GroupInstanceBatchStandardization(24, 0)
    with pytest.raises(ValueError, match="30 channels do not divide into 12 groups"):
        GroupInstanceBatchStandardization(30)
    for shape in ((2, 12), (2, 4, 4, 11)):
        message = re.escape(f"expected (batch, *spatial, 12), got {shape}")
        for module in (BatchStandardization(12), GroupInstanceBatchStandardization(12)):
            with pytest.raises(ValueError, match=message):
                module(jnp.zeros(shape))
    with pytest.raises(ValueError, match="give length, or track_running_stats=False"):
        BatchStandardization(12, causal=True)
    with pytest.raises(ValueError, match=r"of shape \(6, 12\) cannot take .* \(1, 5, 12\)"):
        BatchStandardization(12, causal=True, length=6)(jnp.zeros((2, 5, 12)))
