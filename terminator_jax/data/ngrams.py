"""How likely a byte is on average, and after the one before it: what a model has to surpass."""

from typing import NamedTuple

import numpy as np

BYTES = 256
# How many observations a byte's average is worth beside those after one byte.
PRIOR = 5.0


class Ngrams(NamedTuple):
    """Probabilities of bytes, counted in a text; none is 0.

    Attributes:
        unigram: of each byte, `(256,)`.
        bigram: of each byte (second axis) after each (first axis), `(256, 256)`.
    """

    unigram: np.ndarray
    bigram: np.ndarray

    def entropy(self, data: np.ndarray, chosen: np.ndarray | None = None) -> tuple[float, float]:
        """Computes the mean `-log p` of a text's bytes in nats, by the unigram and by the bigram.

        The bigram is always told the right byte before, which for the first byte is taken to be a
        newline.

        Args:
            data: the text, uint8 `(n,)`.
            chosen: bool `(n,)`: which bytes count; all if None.
        """
        before = np.concatenate([[ord("\n")], data[:-1]])
        values = (-np.log(self.unigram[data]), -np.log(self.bigram[before, data]))
        first, second = (float(np.mean(v if chosen is None else v[chosen])) for v in values)
        return first, second


def count(data: np.ndarray) -> Ngrams:
    """Counts the bytes and pairs of a text, uint8 `(n,)`, and returns their probabilities.

    Each byte counts once more than it occurs; after each byte, the averages count as `PRIOR`
    observations.

    Example:
        >>> ngrams = count(np.frombuffer(b"abababac" * 100, np.uint8))
        >>> [f"{entropy:.2f}" for entropy in ngrams.entropy(np.frombuffer(b"abab", np.uint8))]
        ['1.11', '0.39']
    """
    single = np.bincount(data, minlength=BYTES) + 1.0
    single /= single.sum()
    pairs = np.zeros((BYTES, BYTES))
    np.add.at(pairs, (data[:-1], data[1:]), 1)
    pairs += PRIOR * single
    return Ngrams(single, pairs / pairs.sum(1, keepdims=True))
