"""Functions that XLA's partitioner would gather for, although they act on each map alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp  # noqa: F401  of the examples
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def shared(function: Callable[[jax.Array], jax.Array], dims: int) -> Callable:
    """Makes `function` act on an array's last `dims` axes, so that devices may share the others.

    It keeps the other axes as they are. The result has no derivative of its own.

    Example:
      >>> total = shared(lambda x: x.sum(-1, keepdims=True), 1)
      >>> jax.vmap(total)(jnp.ones((3, 2, 5))).shape
      (3, 2, 1)
    """
    partitioned = custom_partitioning(function)

    def partition(mesh, arguments, result):
        sharding, rank = arguments[0].sharding, len(result.shape)
        lead = (*sharding.spec, *[None] * rank)[: rank - dims]
        own = NamedSharding(sharding.mesh, PartitionSpec(*lead, *[None] * dims))
        return mesh, function, own, (own,)

    def rule(mesh, arguments, results):
        lead = [f"l{n}" for n in range(len(arguments[0].shape) - dims)]
        before, after = ([f"{name}{n}" for n in range(dims)] for name in "ab")
        text = f"{' '.join(lead + before)} -> {' '.join(lead + after)}"
        return text, dict(need_replication_factors=(*before, *after))

    partitioned.def_partition(partition, sharding_rule=rule)
    mapped = custom_vmap(partitioned)

    @mapped.def_vmap
    def with_one_more_axis(axis_size, is_mapped, x):
        return mapped(x), True  # custom_vmap puts the axis first

    return mapped
