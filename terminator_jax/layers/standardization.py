"""Standardization as modules, without parameters."""

import jax
from flax import nnx

from terminator_jax.layers.running import RunningMoments
from terminator_jax.ops.standardize import (
    EPSILON,
    AxisName,
    Moments,
    batch_moments,
    group_moments,
    instance_standardize,
    normalize,
    normalize_groups,
)


class BatchStandardization(nnx.Module):
    """Standardizes each channel over batch and space (BS).

    Example:
      >>> import jax.numpy as jnp
      >>> BatchStandardization(12)(jnp.ones((2, 8, 8, 12))).shape
      (2, 8, 8, 12)

    Args:
      num_features: channels of the map.
      causal: for sequences: by the statistics of the positions so far.
      length: positions of the sequences, needed for causal averages: each position has its own.
      epsilon: added to the variance.
      track_running_stats: whether averages of the batch's statistics are kept in training and used
        in evaluation, as by `nnx.BatchNorm`. Otherwise the statistics are always the batch's own.
      axis_name: the mapped axis (of a `pmap` or `shard_map`) over which the batch is split, if any.
      use_running_average: whether it begins in evaluation mode; `train()` and `eval()` set it.

    Raises:
      ValueError: for causal averages without a length; when called with an array of other channels
        or without a spatial axis, or causally with more than one; in evaluation, if no batch was
        averaged.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, less its parameters.
    """

    def __init__(
        self,
        num_features: int,
        *,
        causal: bool = False,
        length: int | None = None,
        epsilon: float = EPSILON,
        track_running_stats: bool = True,
        axis_name: AxisName = None,
        use_running_average: bool = False,
    ):
        self.num_features, self.causal, self.epsilon = num_features, causal, epsilon
        self.axis_name = axis_name
        if track_running_stats and causal and length is None:
            raise ValueError(
                "causal averages need the length of the sequences: give length, or"
                " track_running_stats=False"
            )
        shape = (length, num_features) if causal else (num_features,)
        running = dict(axis_name=axis_name, use_running_average=use_running_average)
        self.averages = RunningMoments(shape, **running) if track_running_stats else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Standardizes `(batch, *spatial, channels)`."""
        self._check(x)
        moments = batch_moments(x, causal=self.causal, axis_name=self._reduced_axis)
        return normalize(x, *self._average(moments), self.epsilon)

    @property
    def _reduced_axis(self) -> AxisName:
        return self.axis_name if self.averages is None else self.averages.reduced_axis

    def _average(self, moments: Moments) -> Moments:
        return moments if self.averages is None else self.averages(moments)

    def _check(self, x: jax.Array) -> None:
        if x.ndim < 3 or x.shape[-1] != self.num_features:
            raise ValueError(f"expected (batch, *spatial, {self.num_features}), got {x.shape}")


class InstanceStandardization(nnx.Module):
    """Standardizes each sample and channel over space (IS).

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
        """Standardizes `(batch, *spatial, channels)`."""
        return instance_standardize(x, causal=self.causal, epsilon=self.epsilon)


class GroupInstanceBatchStandardization(BatchStandardization):
    """Standardizes even channel groups over the batch (BS), odd ones per sample (IS): G-IBS.

    Example:
      >>> import jax.numpy as jnp
      >>> GroupInstanceBatchStandardization(24, groups=12)(jnp.ones((2, 8, 8, 24))).shape
      (2, 8, 8, 24)

    Args:
      num_features: channels of the map.
      groups: into how many equal runs the channels are cut.
      causal: for sequences: by the statistics of the positions so far.
      length: positions of the sequences, needed for causal averages: each position has its own.
      epsilon: added to the variance.
      track_running_stats: whether averages of the batch's statistics are kept in training and used
        in evaluation, as by `nnx.BatchNorm`. Otherwise the statistics are always the batch's own.
      axis_name: the mapped axis (of a `pmap` or `shard_map`) over which the batch is split, if any.
      use_running_average: whether it begins in evaluation mode; `train()` and `eval()` set it.

    Raises:
      ValueError: if the channels do not divide into the groups, and as `BatchStandardization`.

    Source: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context
    Interaction", 2024.
    """

    def __init__(
        self,
        num_features: int,
        groups: int = 12,
        *,
        causal: bool = False,
        length: int | None = None,
        epsilon: float = EPSILON,
        track_running_stats: bool = True,
        axis_name: AxisName = None,
        use_running_average: bool = False,
    ):
        if groups < 1 or num_features % groups:
            raise ValueError(f"{num_features} channels do not divide into {groups} groups")
        super().__init__(
            num_features, causal=causal, length=length, epsilon=epsilon,
            track_running_stats=track_running_stats, axis_name=axis_name,
            use_running_average=use_running_average,
        )  # fmt: skip
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        """Standardizes `(batch, *spatial, channels)`."""
        self._check(x)
        moments = group_moments(x, causal=self.causal, axis_name=self._reduced_axis)
        moments = moments._replace(batch=self._average(moments.batch))
        return normalize_groups(x, moments, self.groups, self.epsilon)
