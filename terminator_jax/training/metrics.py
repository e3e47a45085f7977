"""The metrics: what an evaluation averages. A new one is a function and a line in `METRICS`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from terminator_jax.ops.dtypes import at_least_float32

# On the devices, and read from them.
Metrics = dict[str, jax.Array]
Scalars = dict[str, float]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each label, `(...)`, of logits `(..., classes)`."""
    logits = logits.astype(at_least_float32(logits.dtype))
    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - right


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns 1 where the largest logit is that of the label, else 0; shapes as `cross_entropy`."""
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


# What an evaluation averages, of logits `(..., classes)` and labels `(...)` to values `(...)`.
METRICS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "accuracy": is_correct,
    "loss": cross_entropy,
}
# Those of which the smallest value is the best; of others it is the largest.
LOWER_IS_BETTER = {"loss"}


def sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Metrics:
    """Returns `count` and the sum of each metric where `mask` is True."""
    values = {name: metric(logits, labels) for name, metric in METRICS.items()}
    sums = {name: jnp.sum(jnp.where(mask, value, 0)) for name, value in values.items()}
    return {"count": jnp.sum(mask, dtype=jnp.int32), **sums}
