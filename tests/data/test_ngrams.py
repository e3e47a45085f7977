"""The baselines of text against counting by hand."""

from collections import Counter

import numpy as np

from terminator_jax.data import ngrams

TEXT = np.frombuffer(b"the cat sat on the mat\nthat is that\n" * 3, np.uint8)


def test_probabilities():
    found = ngrams.count(TEXT)
    np.testing.assert_allclose(found.unigram.sum(), 1)
    np.testing.assert_allclose(found.bigram.sum(1), 1)
    single = Counter(TEXT.tolist())
    pairs = Counter(zip(TEXT.tolist(), TEXT[1:].tolist(), strict=False))
    for a, b in [(b"t", b"h"), (b"h", b"e"), (b"x", b"t"), (b"t", b"x")]:
        a, b = a[0], b[0]
        own = (single[b] + 1) / (len(TEXT) + 256)
        np.testing.assert_allclose(found.unigram[b], own)
        after = sum(n for (first, _), n in pairs.items() if first == a)
        expected = (pairs[a, b] + ngrams.PRIOR * own) / (after + ngrams.PRIOR)
        np.testing.assert_allclose(found.bigram[a, b], expected)


def test_entropy_of_chosen_bytes():
    found, data = ngrams.count(TEXT), np.frombuffer(b"that mat", np.uint8)
    chosen = np.array([1, 0, 0, 1, 0, 1, 0, 0], bool)
    single = -np.log(found.unigram[[*b"ttm"]]).mean()
    pairs = -np.log([found.bigram[a, b] for a, b in (b"\nt", b"at", b" m")]).mean()
    np.testing.assert_allclose(found.entropy(data, chosen), [single, pairs])
    every = np.ones(len(data), bool)
    np.testing.assert_allclose(found.entropy(data), found.entropy(data, every))
