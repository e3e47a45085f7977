"""Iterative parallel decoding: what is kept, in which order, by chance and without."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terminator_jax.models.decoding import cosine_schedule, decode, decode_step

MASK, VOCABULARY, SHAPE = 9, 9, (2, 4, 5)


def predict(tokens):
    """Logits that depend on the position alone: the likeliest token and how sure it is differ."""
    logits = np.random.default_rng(0).normal(size=(1, *SHAPE[1:], VOCABULARY)) * 3
    return jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (*tokens.shape, VOCABULARY))


def start(given=()):
    tokens, hidden = np.zeros(SHAPE, np.int32), np.ones(SHAPE, bool)
    for row, column, token in given:
        tokens[:, row, column], hidden[:, row, column] = token, False
    return jnp.asarray(tokens), jnp.asarray(hidden)


def run(given=(), rounds=5, temperature=1.0, seed=0, model=predict, **options):
    key = jax.random.key(seed)
    return list(
        decode(
            model, *start(given), mask_token=MASK, rounds=rounds, temperature=temperature,
            key=key, **options,
        )
    )  # fmt: skip


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 20, 100])
def test_schedule(rounds):
    for hidden in (1, 5, 20, 1000):
        left = cosine_schedule(hidden, rounds)
        assert left[-1] == 0 and len(left) <= rounds
        assert (np.diff([hidden, *left]) < 0).all()
    # One less each time is more than the cosine asks for in the first of very many rounds.
    cosine = [1000 * np.cos(np.pi / 2 * (n + 1) / rounds) for n in range(rounds)]
    assert np.abs(np.array(left) - cosine).max() < 3


def test_the_prompt_is_kept_and_all_is_filled():
    given = [(1, 2, 8), (1, 3, 0), (3, 4, 5)]
    results = run(given)
    assert len(results) == 5
    before = start(given)[1]
    for (tokens, hidden), left in zip(results, cosine_schedule(17, 5), strict=True):
        assert (hidden.sum((1, 2)) == left).all()
        assert (tokens[hidden] == MASK).all() and (tokens[~hidden] < VOCABULARY).all()
        for row, column, token in given:
            assert (tokens[:, row, column] == token).all()
        assert not (hidden & ~np.asarray(before)).any()
        before = hidden
    # What was filled in once stays.
    for (tokens, hidden), (later, _) in itertools.pairwise(results):
        assert (later[~hidden] == tokens[~hidden]).all()


def test_it_sees_what_is_given_and_the_mask_token_elsewhere():
    seen = []

    def watch(tokens):
        seen.append(np.asarray(tokens))
        return predict(tokens)

    given = [(0, 0, 3)]
    results = run(given, rounds=3, model=watch)
    first = np.full(SHAPE, MASK)
    first[:, 0, 0] = 3
    assert (seen[0] == first).all()
    assert len(seen) == 3
    assert (seen[1] == results[0][0]).all() and (seen[2] == results[1][0]).all()


def test_without_chance_it_takes_the_likeliest_and_the_surest_first():
    logits = np.asarray(predict(start()[0]))
    for rounds in (1, 4):
        results = run(rounds=rounds, temperature=0.0)
        assert (results[-1][0] == logits.argmax(-1)).all()
    sure = np.asarray(jax.nn.log_softmax(logits).max(-1))
    _, hidden = results[0]
    for b in range(2):
        assert sure[b][hidden[b]].max() < sure[b][~hidden[b]].min()


def test_the_seed_decides():
    one, same, other = (run(seed=seed)[-1][0] for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()
    assert (one[0] != one[1]).any()


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    tokens = jnp.zeros((1, 100, 200), jnp.int32)
    hidden = jnp.ones(tokens.shape, bool)
    options = dict(top_k=0, mask_token=3)
    for temperature, expected in ((1.0, [0.1, 0.2, 0.7]), (0.5, np.array([1, 4, 49]) / 54)):
        drawn, _ = decode_step(
            jnp.broadcast_to(logits, (*tokens.shape, 3)), tokens, hidden, 0, jax.random.key(0),
            0.0, temperature, **options,
        )  # fmt: skip
        shares = np.bincount(np.ravel(drawn), minlength=3) / drawn.size
        np.testing.assert_allclose(shares, expected, atol=0.02)


def test_top_k():
    allowed = np.argsort(np.asarray(predict(start()[0])), -1)[..., -2:]
    drawn = np.stack([run(seed=seed, temperature=5.0, top_k=2)[-1][0] for seed in range(8)])
    assert (drawn[..., None] == allowed[None]).any(-1).all()
    assert len(np.unique(drawn[:, 0, 0, 0])) == 2
    assert (run(temperature=1.0, top_k=1)[-1][0] == allowed[..., -1]).all()
    assert run(top_k=100)[-1][0].max() < VOCABULARY


def test_the_order_has_noise_early_and_none_at_the_end():
    """Of the same draws, so that only the order differs."""
    logits, (tokens, hidden) = predict(start()[0]), start()
    stays = [
        decode_step(
            logits, tokens, hidden, 10, jax.random.key(seed), noise, 0.0, top_k=0, mask_token=MASK
        )
        for noise in (0.0, 20.0)
        for seed in (0, 1)
    ]
    calm, again, noisy, other = (np.asarray(left) for _, left in stays)
    assert (calm == again).all() and (noisy != other).any()
    assert all((left.sum((1, 2)) == 10).all() for _, left in stays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rounds=0), "rounds must be 1 or more, got 0"),
        (dict(temperature=-1.0), "temperature and top_k must be 0 or more, got -1.0 and 0"),
        (dict(top_k=-1), "must be 0 or more, got 1.0 and -1"),
        (dict(given=[(r, c, 1) for r in range(4) for c in range(5)]), "at least one, got [0]"),
    ],
)
def test_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**change)


def test_arrays_that_do_not_fit():
    tokens, hidden = start()
    options = dict(mask_token=MASK, rounds=2, key=jax.random.key(0))
    for wrong in (hidden[:, :3], hidden.astype(int)):
        with pytest.raises(ValueError, match="hidden, bool of the same shape"):
            decode(predict, tokens, wrong, **options)
    with pytest.raises(
        ValueError, match=re.escape("as many hidden tokens, at least one, got [19,")
    ):
        decode(predict, tokens, hidden.at[0, 0, 0].set(False), **options)
