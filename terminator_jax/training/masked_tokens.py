"""The task of predicting hidden tokens: what is hidden, the loss and the scores of a batch.

A batch has `tokens`, `(batch, rows, columns)`, and their `index`, which decides what evaluation
hides: the same positions of the same grid, however grids are put into batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Arrays = dict[str, jax.Array]


def hide(key: jax.Array, share: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Which positions are hidden: each with probability `share`, at least one.

    Example:
      >>> bool(hide(jax.random.key(0), jnp.array(0.0), (3, 4)).sum() == 1)
      True
    """
    noise = jax.random.uniform(key, shape)
    return noise <= jnp.maximum(share, noise.min())


def hidden_in_training(task: Any, rngs: nnx.Rngs, shape: tuple[int, ...]) -> jax.Array:
    """Another share of each sample, from nearly nothing to all: `u²`, u uniform.

    A third on average: from grids with most of it hidden, a model learns least.

    It is drawn from the sample's number in the whole batch, so that devices that share a batch hide
    what one would.
    """
    batch, axis = shape[0], task.axis_name
    first = 0 if axis is None else jax.lax.axis_index(axis) * batch
    key = rngs.dropout()

    def one(n):
        share_key, hide_key = jax.random.split(jax.random.fold_in(key, n))
        share = jnp.square(jax.random.uniform(share_key))
        return hide(hide_key, share, shape[1:])

    return jax.vmap(one)(first + jnp.arange(batch))


def hidden_in_evaluation(
    seed: int, index: jax.Array, share: float, grid: tuple[int, int]
) -> jax.Array:
    """The same positions for the same seed and grid, `(n, *grid)` for `index`, `(n,)`."""
    key = jax.random.key(seed)
    return jax.vmap(lambda n: hide(jax.random.fold_in(key, n), jnp.asarray(share), grid))(index)


def loss(
    task: Any, model: nnx.Module, batch: Arrays, rngs: nnx.Rngs
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The cross-entropy of the hidden tokens, a mean over those of a sample, then over samples."""
    hidden = hidden_in_training(task, rngs, batch["tokens"].shape)
    means = [
        jnp.mean(jnp.sum(values, (1, 2)) / jnp.sum(hidden, (1, 2), dtype=values.dtype))
        for values in _at_hidden(model, batch["tokens"], hidden)
    ]
    return means[0], dict(zip(("loss", "accuracy"), means, strict=True))


def score(task: Any, model: nnx.Module, batch: Arrays) -> dict[str, jax.Array]:
    """Sums over the hidden tokens of an evaluation batch, without its padding."""
    grid, data = batch["tokens"].shape[1:], task.config.data
    hidden = hidden_in_evaluation(data.hidden_seed, batch["index"], data.hidden, grid)
    hidden = hidden & batch["mask"][:, None, None]
    entropy, hits = _at_hidden(model, batch["tokens"], hidden)
    return {"count": jnp.sum(hidden), "loss": jnp.sum(entropy), "accuracy": jnp.sum(hits)}


def _at_hidden(
    model: nnx.Module, tokens: jax.Array, hidden: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and hits, 1 or 0, of each position; 0 for those that are not hidden."""
    tokens = tokens.astype(jnp.int32)
    logits = model(jnp.where(hidden, model.config.mask_token, tokens))
    right = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    entropy = jax.nn.logsumexp(logits, axis=-1) - right
    hits = (jnp.argmax(logits, axis=-1) == tokens).astype(jnp.float32)
    return jnp.where(hidden, entropy, 0), jnp.where(hidden, hits, 0)
