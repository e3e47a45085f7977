"""Iterative parallel decoding: fills a grid of tokens in a few rounds.

Each round predicts every hidden token, draws one for each, and keeps the most confident draws.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np


def cosine_schedule(hidden: int, rounds: int) -> list[int]:
    """Computes how many tokens remain hidden after each round, along a cosine.

    Every round fills at least one token.

    Example:
      >>> cosine_schedule(100, 5)
      [95, 80, 58, 30, 0]
      >>> cosine_schedule(3, 5)
      [2, 1, 0]
    """
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    counts, remaining = [], hidden
    for n in range(1, rounds + 1):
        wanted = 0 if n == rounds else math.floor(hidden * math.cos(math.pi / 2 * n / rounds))
        remaining = max(0, min(wanted, remaining - 1))
        counts.append(remaining)
    return counts[: counts.index(0) + 1]


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
    """Fills grids, and yields the tokens and the mask of hidden tokens after each round.

    Args:
      predict: tokens `(batch, rows, columns)` to logits `(batch, rows, columns, vocabulary)`.
      tokens: integers, `(batch, rows, columns)`; tokens that are not hidden stay as they are.
      hidden: bool, of the same shape, with the same number of True in each sample.
      mask_token: the token that stands for every hidden token.
      rounds: number of rounds; at most one for each hidden token.
      temperature: temperature of the draws, and of the noise on their confidence. At 0, each round
        takes the most likely tokens and keeps the most confident.
      top_k: draws from the k most likely tokens; 0 for all.
      key: random key.

    Raises:
      ValueError: for arrays that do not fit each other, or values out of range.

    Source: Chang et al., "MaskGIT", 2022.

    Example:
      >>> favourite = lambda tokens: jax.nn.one_hot(jnp.full(tokens.shape, 7), 10)
      >>> grid, hidden = jnp.zeros((1, 2, 3), int), jnp.ones((1, 2, 3), bool).at[0, 0, 0].set(False)
      >>> options = dict(mask_token=10, rounds=2, temperature=0.0, key=jax.random.key(0))
      >>> for filled, hidden in decode(favourite, grid, hidden, **options):
      ...     print(filled.tolist(), int(hidden.sum()))
      [[[0, 10, 10], [10, 7, 7]]] 3
      [[[0, 7, 7], [7, 7, 7]]] 0
    """
    counts = cosine_schedule(_check(tokens, hidden, temperature, top_k), rounds)
    tokens = jnp.where(hidden, mask_token, tokens)

    def results(tokens, hidden):
        for n, remaining in enumerate(counts):
            noise = temperature * (1 - (n + 1) / len(counts))
            tokens, hidden = decode_step(
                predict(tokens), tokens, hidden, remaining, jax.random.fold_in(key, n), noise,
                temperature, top_k=top_k, mask_token=mask_token,
            )  # fmt: skip
            yield np.asarray(tokens), np.asarray(hidden)

    return results(tokens, hidden)


@functools.partial(jax.jit, static_argnames=("top_k", "mask_token"))
def decode_step(
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
    """Runs one round: draws all hidden tokens, and hides the `remaining` least confident again.

    Args:
      logits: `(batch, rows, columns, vocabulary)`.
      tokens: `(batch, rows, columns)`.
      hidden: bool, of the same shape.
      remaining: number of positions of each sample that stay hidden.
      key: random key.
      noise: scale of the Gumbel noise that is added to the log-probability of each draw.
      temperature: temperature of the draws; at 0 the most likely token.
      top_k: draws from the k most likely tokens; 0 for all.
      mask_token: the token that stands for every hidden token.

    Returns:
      The tokens and the mask of those still hidden.
    """
    token_key, order_key = jax.random.split(key)
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    drawn = logits + temperature * jax.random.gumbel(token_key, logits.shape, logits.dtype)
    drawn = jnp.argmax(drawn, axis=-1)
    confidence = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)[..., 0]
    confidence += noise * jax.random.gumbel(order_key, confidence.shape, confidence.dtype)
    flat = jnp.where(hidden, confidence, jnp.inf).reshape(len(tokens), -1)
    rank = jnp.argsort(jnp.argsort(flat, axis=-1), axis=-1).reshape(tokens.shape)
    still_hidden = rank < remaining
    filled = jnp.where(hidden, drawn.astype(tokens.dtype), tokens)
    return jnp.where(still_hidden, mask_token, filled), still_hidden


def _check(tokens: jax.Array, hidden: jax.Array, temperature: float, top_k: int) -> int:
    """Returns the number of hidden tokens of each sample; raises ValueError for bad arguments."""
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
