"""Standardization as modules: no parameters, no running averages, always the batch's statistics."""

import jax
from flax import nnx

from terminator_jax.ops.standardize import (
    EPSILON,
    AxisName,
    batch_standardize,
    group_standardize,
    instance_standardize,
)


class BatchStandardization(nnx.Module):
    """BS: zero mean and unit variance over batch and space, per channel.

    Example:
      >>> import jax.numpy as jnp
      >>> BatchStandardization()(jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 12)

    Args:
      causal: for sequences: by the statistics of the positions so far.
      epsilon: added to the variance.
      axis_name: the mapped axis (of a `pmap` or `shard_map`) over which the batch is split, if any.

    Raises:
      ValueError: when called with an array that has no spatial axis, or causally more than one.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, less its parameters and averages.
    """

    def __init__(
        self, *, causal: bool = False, epsilon: float = EPSILON, axis_name: AxisName = None
    ):
        self.causal, self.epsilon, self.axis_name = causal, epsilon, axis_name

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, *spatial, channels)` to the same."""
        return batch_standardize(
            x, causal=self.causal, epsilon=self.epsilon, axis_name=self.axis_name
        )


class InstanceStandardization(nnx.Module):
    """IS: zero mean and unit variance over space, per sample and channel.

    Example:
      >>> import jax.numpy as jnp
      >>> InstanceStandardization()(jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 12)

    Args:
      causal: for sequences: by the statistics of the positions so far.
      epsilon: added to the variance.

    Raises:
      ValueError: when called with an array that has no spatial axis, or causally more than one.

    Source: Ulyanov et al., "Instance Normalization", 2016, less its parameters.
    """

    def __init__(self, *, causal: bool = False, epsilon: float = EPSILON):
        self.causal, self.epsilon = causal, epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, *spatial, channels)` to the same."""
        return instance_standardize(x, causal=self.causal, epsilon=self.epsilon)


class GroupInstanceBatchStandardization(nnx.Module):
    """G-IBS: even channel groups standardized over batch and space (BS), odd ones per sample (IS).

    Example:
      >>> import jax.numpy as jnp
      >>> GroupInstanceBatchStandardization(groups=12)(jnp.ones((2, 8, 8, 24))).shape
      (2, 8, 8, 24)

    Args:
      groups: into how many equal runs the channels are cut.
      causal: for sequences: by the statistics of the positions so far.
      epsilon: added to the variance.
      axis_name: the mapped axis (of a `pmap` or `shard_map`) over which the batch is split, if any.

    Raises:
      ValueError: if there are no groups, or when called with channels that do not divide into them.

    Source: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024.
    """

    def __init__(
        self,
        groups: int = 12,
        *,
        causal: bool = False,
        epsilon: float = EPSILON,
        axis_name: AxisName = None,
    ):
        if groups < 1:
            raise ValueError(f"groups must be positive, got {groups}")
        self.groups, self.causal = groups, causal
        self.epsilon, self.axis_name = epsilon, axis_name

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, *spatial, channels)` to the same."""
        return group_standardize(
            x, groups=self.groups, causal=self.causal, epsilon=self.epsilon,
            axis_name=self.axis_name,
        )  # fmt: skip
