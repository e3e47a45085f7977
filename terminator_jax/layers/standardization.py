"""Standardization as modules, without parameters."""

import jax
import jax.numpy as jnp
from flax import nnx

from terminator_jax.layers.running import moments_of
from terminator_jax.ops.standardize import (
    EPSILON,
    AxisName,
    batch_standardize,
    group_standardize,
    instance_standardize,
)


class BatchStandardization(nnx.Module):
    """Standardizes each channel over batch and space (BS).

    Example:
      >>> BatchStandardization()(jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 12)

    Args:
      num_features: channels of the map. If given, averages of the statistics are kept in training
        and used in evaluation, as by `nnx.BatchNorm`; otherwise they are always the batch's own.
      causal: for sequences: by the statistics of the positions so far, without averages.
      epsilon: added to the variance.
      axis_name: the mapped axis (of a `pmap` or `shard_map`) over which the batch is split, if any.
      use_running_average: whether it begins in evaluation mode; `train()` and `eval()` set it.

    Raises:
      ValueError: for causal averages; when called with an array that has no spatial axis, or
        causally more than one.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, less its parameters.
    """

    def __init__(
        self,
        num_features: int | None = None,
        *,
        causal: bool = False,
        epsilon: float = EPSILON,
        axis_name: AxisName = None,
        use_running_average: bool = False,
    ):
        self.causal, self.epsilon, self.axis_name = causal, epsilon, axis_name
        self.averages = _averages(num_features, causal, use_running_average)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Standardizes `(batch, *spatial, channels)`."""
        return batch_standardize(
            x, causal=self.causal, epsilon=self.epsilon, axis_name=self.axis_name,
            track=self.averages and self.averages.track,
        )  # fmt: skip


class InstanceStandardization(nnx.Module):
    """Standardizes each sample and channel over space (IS).

    Example:
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
        """Standardizes `(batch, *spatial, channels)`."""
        return instance_standardize(x, causal=self.causal, epsilon=self.epsilon)


class GroupInstanceBatchStandardization(nnx.Module):
    """Standardizes even channel groups over the batch (BS), odd ones per sample (IS): G-IBS.

    Example:
      >>> GroupInstanceBatchStandardization(groups=12)(jnp.ones((2, 8, 8, 24))).shape
      (2, 8, 8, 24)

    Args:
      groups: into how many equal runs the channels are cut.
      num_features: channels of the map. If given, averages of the batch's statistics are kept in
        training and used in evaluation; otherwise they are always the batch's own.
      causal: for sequences: by the statistics of the positions so far, without averages.
      epsilon: added to the variance.
      axis_name: the mapped axis (of a `pmap` or `shard_map`) over which the batch is split, if any.
      use_running_average: whether it begins in evaluation mode; `train()` and `eval()` set it.

    Raises:
      ValueError: if there are no groups, for causal averages, or when called with channels that
        do not divide into them.

    Source: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024.
    """

    def __init__(
        self,
        groups: int = 12,
        num_features: int | None = None,
        *,
        causal: bool = False,
        epsilon: float = EPSILON,
        axis_name: AxisName = None,
        use_running_average: bool = False,
    ):
        if groups < 1:
            raise ValueError(f"groups must be positive, got {groups}")
        self.groups, self.causal = groups, causal
        self.epsilon, self.axis_name = epsilon, axis_name
        self.averages = _averages(num_features, causal, use_running_average)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Standardizes `(batch, *spatial, channels)`."""
        return group_standardize(
            x, groups=self.groups, causal=self.causal, epsilon=self.epsilon,
            axis_name=self.axis_name, track=self.averages and self.averages.track,
        )  # fmt: skip


def _averages(num_features: int | None, causal: bool, use_running_average: bool):
    """Returns running averages of a mean and a variance; None without a number of features."""
    if num_features is None:
        return None
    if causal:
        raise ValueError(
            f"causal statistics have no averages: leave num_features={num_features} away"
        )
    return moments_of((num_features,), jnp.float32, use_running_average=use_running_average)
