"""Iterative parallel decoding: a grid is filled in all directions at once, in a few rounds.

Each round predicts every hidden token, draws one for each, and keeps those it is surest of.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np


def schedule(hidden: int, rounds: int) -> list[int]:
    """How many tokens remain hidden after each round: along a cosine, at least one less each time.

    Example:
      >>> schedule(100, 5)
      [95, 80, 58, 30, 0]
      >>> schedule(3, 5)
      [2, 1, 0]
    """
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    left, remaining = [], hidden
    for n in range(1, rounds + 1):
        wanted = 0 if n == rounds else math.floor(hidden * math.cos(math.pi / 2 * n / rounds))
        remaining = max(0, min(wanted, remaining - 1))
        left.append(remaining)
    return left[: left.index(0) + 1]


def decode(
    predict: Callable[[jax.Array], jax.Array],
    tokens: jax.Array,
    hidden: jax.Array,
    *,
    mask_token: int,
    rounds: int,
    temperature: float = 1.0,
    top_k: int = 0,
    key: jax.Array,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Fills grids: gives tokens and what is still hidden, after each round.

    Args:
      predict: tokens `(batch, rows, columns)` to logits `(batch, rows, columns, vocabulary)`.
      tokens: integers, `(batch, rows, columns)`; what is not hidden is kept.
      hidden: bool, of the same shape, as many True in each sample.
      mask_token: what `predict` is given where a token is hidden.
      rounds: how many; fewer where there are fewer tokens to fill in.
      temperature: of the draws and of the noise on the order; at 0 each round takes the likeliest
        tokens and keeps the surest.
      top_k: draws among so many of the likeliest tokens, 0 for all.
      key: the source of the draws.

    Raises:
      ValueError: for arrays that do not fit each other, or values out of range.

    Source: Chang et al., "MaskGIT", 2022.

    Example:
      >>> favourite = lambda tokens: jax.nn.one_hot(jnp.full(tokens.shape, 7), 10)
      >>> grid, hidden = jnp.zeros((1, 2, 3), int), jnp.ones((1, 2, 3), bool).at[0, 0, 0].set(False)
      >>> options = dict(mask_token=10, rounds=2, temperature=0.0, key=jax.random.key(0))
      >>> for filled, left in decode(favourite, grid, hidden, **options):
      ...     print(filled.tolist(), int(left.sum()))
      [[[0, 10, 10], [10, 7, 7]]] 3
      [[[0, 7, 7], [7, 7, 7]]] 0
    """
    left = schedule(_check(tokens, hidden, temperature, top_k), rounds)
    tokens = jnp.where(hidden, mask_token, tokens)

    def results(tokens, hidden):
        for n, remaining in enumerate(left):
            noise = temperature * (1 - (n + 1) / len(left))
            tokens, hidden = fill(
                predict(tokens), tokens, hidden, remaining, jax.random.fold_in(key, n), noise,
                temperature, top_k=top_k, mask_token=mask_token,
            )  # fmt: skip
            yield np.asarray(tokens), np.asarray(hidden)

    return results(tokens, hidden)


@functools.partial(jax.jit, static_argnames=("top_k", "mask_token"))
def fill(
    logits: jax.Array,
    tokens: jax.Array,
    hidden: jax.Array,
    remaining: int | jax.Array,
    key: jax.Array,
    noise: float | jax.Array,
    temperature: float | jax.Array,
    *,
    top_k: int,
    mask_token: int,
) -> tuple[jax.Array, jax.Array]:
    """One round: tokens for all hidden positions but the `remaining` that it is least sure of.

    Args:
      logits: `(batch, rows, columns, vocabulary)`.
      tokens: `(batch, rows, columns)`.
      hidden: bool, of the same shape.
      remaining: how many positions of each sample stay hidden.
      key: the source of the draws.
      noise: of the order: Gumbel noise times this is added to the logarithm of each probability.
      temperature: of the draws; at 0 the likeliest.
      top_k: draws among so many of the likeliest tokens, 0 for all.
      mask_token: what stands where a token stays hidden.

    Returns:
      Tokens and what is hidden now.
    """
    token_key, order_key = jax.random.split(key)
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    drawn = logits + temperature * jax.random.gumbel(token_key, logits.shape, logits.dtype)
    drawn = jnp.argmax(drawn, axis=-1)
    sure = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)[..., 0]
    sure += noise * jax.random.gumbel(order_key, sure.shape, sure.dtype)
    flat = jnp.where(hidden, sure, jnp.inf).reshape(len(tokens), -1)
    place = jnp.argsort(jnp.argsort(flat, axis=-1), axis=-1).reshape(tokens.shape)
    stays = place < remaining
    filled = jnp.where(hidden, drawn.astype(tokens.dtype), tokens)
    return jnp.where(stays, mask_token, filled), stays


def _check(tokens: jax.Array, hidden: jax.Array, temperature: float, top_k: int) -> int:
    """How many tokens of each sample are hidden; raises ValueError if that cannot be filled."""
    if tokens.ndim != 3 or hidden.shape != tokens.shape or hidden.dtype != bool:
        raise ValueError(
            "expected tokens (batch, rows, columns) and hidden, bool of the same shape, got"
            f" {tokens.shape} and {hidden.dtype} {hidden.shape}"
        )
    counts = set(np.asarray(hidden).sum((1, 2)).tolist())
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"each sample must have as many hidden tokens, at least one, got {sorted(counts)}"
        )
    if temperature < 0 or top_k < 0:
        raise ValueError(f"temperature and top_k must be 0 or more, got {temperature} and {top_k}")
    return counts.pop()
