"""Lambdas by every method against the gather, gradients too; memory; what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import normal, relative

from terminator_jax.ops import lambdas
from terminator_jax.ops.lambdas import (
    apply_lambdas,
    apply_lambdas_reference,
    normalize_keys,
    position_lambdas_reference,
)

METHODS = [method for method in lambdas.METHODS if method != "auto"]
every_method = pytest.mark.parametrize("method", METHODS)

# Spatial axes, window, heads, k, u, v: even and odd sides, rectangles, windows within the map,
# beyond it on one axis and on both, global ones, sequences.
CASES = {
    "global square": ((5, 5), (9, 9), 2, 3, 1, 4),
    "global rectangle, u 2": ((4, 7), (7, 13), 3, 2, 2, 1),
    "local": ((6, 5), (3, 3), 2, 3, 2, 2),
    "local, one row of the window": ((5, 6), (1, 5), 1, 2, 1, 2),
    "larger than half the map": ((5, 4), (7, 5), 2, 2, 1, 3),
    "larger than the map": ((3, 4), (9, 3), 1, 3, 2, 2),
    "global sequence": ((9,), (17,), 2, 3, 2, 2),
    "local sequence": ((8,), (5,), 2, 2, 1, 3),
    "one position": ((1, 1), (1, 1), 1, 2, 1, 2),
}
every_case = pytest.mark.parametrize("case", CASES)


def arrays(case, dtype=np.float64):
    spatial, window, heads, k, u, v = CASES[case]
    maps = [(2, *spatial, *shape) for shape in ((heads, k), (u, k), (u, v))]
    shapes = [*maps, (*window, k, u), (k,)]
    return [normal(*shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes)]


def with_gradients(function, inputs):
    out = jax.eval_shape(function, *inputs)
    weights = normal(*out.shape, seed=9)

    def loss(*inputs):
        out = function(*inputs)
        return jnp.sum(weights * out), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, range(len(inputs)), has_aux=True))(*inputs)
    return out, *grads


def test_the_definition(x64):
    """The gather itself, one pair of positions after the other."""
    values, table = np.array(normal(2, 3, 4, 2, 5)), np.array(normal(3, 5, 6, 2))
    expected = np.zeros((2, 3, 4, 6, 5))
    for n in np.ndindex(3, 4):
        for m in np.ndindex(3, 4):
            r, c = m[0] - n[0] + 1, m[1] - n[1] + 2
            if 0 <= r < 3 and 0 <= c < 5:
                expected[(slice(None), *n)] += np.einsum(
                    "ku,buv->bkv", table[r, c], values[(slice(None), *m)]
                )
    assert relative(position_lambdas_reference(values, table), expected) < 1e-12


def test_keys_are_shares_of_the_positions(x64):
    """For each key of each sample, whatever is added to all."""
    keys = normal(2, 3, 4, 2, 5)
    found = normalize_keys(keys)
    expected = np.exp(keys) / np.exp(keys).sum((1, 2), keepdims=True)
    assert relative(found, expected) < 1e-12
    assert relative(normalize_keys(keys + 1000), expected) < 1e-10


@every_method
@every_case
def test_follows_the_definition(x64, case, method):
    """Outputs, and gradients of queries, keys, values, table and bias."""
    inputs = arrays(case)
    expected = with_gradients(apply_lambdas_reference, inputs)
    found = with_gradients(lambda *a: apply_lambdas(*a, method=method), inputs)
    for name, a, b in zip(("y", "q", "k", "v", "table", "bias"), found, expected, strict=True):
        if case == "one position" and name == "k":  # its softmax is always 1
            assert np.abs(a).max() < 1e-12
        else:
            assert relative(a, b) < 1e-12, name


@pytest.mark.parametrize("method", ["dft", "fft"])
@pytest.mark.parametrize("case", ["global rectangle, u 2", "global sequence"])
def test_keys_one_after_the_other(x64, monkeypatch, case, method):
    inputs = arrays(case)
    monkeypatch.setattr(lambdas, "SPECTRA_BYTES", 1)
    found = with_gradients(lambda *a: apply_lambdas(*a, method=method), inputs)
    jaxpr = str(jax.make_jaxpr(lambda *a: apply_lambdas(*a, method=method))(*inputs))
    assert "scan" in jaxpr
    for a, b in zip(found, with_gradients(apply_lambdas_reference, inputs), strict=True):
        assert relative(a, b) < 1e-12


@every_method
def test_gradients_keep_no_lambdas(monkeypatch, method):
    """Less than these would be is kept for them of a large batch."""
    monkeypatch.setattr(lambdas, "SPECTRA_BYTES", 1)
    shapes = [(8, 9, 7, 1, 5), (8, 9, 7, 1, 5), (8, 9, 7, 1, 6), (17, 13, 5, 1)]
    inputs = [jnp.zeros(shape) for shape in shapes]
    residuals = jax.eval_shape(
        lambda *a: jax.vjp(lambda *a: apply_lambdas(*a, method=method), *a)[1], *inputs
    )
    assert max(leaf.size for leaf in jax.tree.leaves(residuals)) < 8 * 63 * 5 * 6


@pytest.mark.parametrize(("keys", "bytes_each", "at_once"), [
    (16, lambdas.SPECTRA_BYTES // 16, 16), (16, lambdas.SPECTRA_BYTES // 7, 4),
    (15, lambdas.SPECTRA_BYTES // 7, 5), (7, 2 * lambdas.SPECTRA_BYTES, 1),
])  # fmt: skip
def test_as_many_keys_as_the_bound_lets(keys, bytes_each, at_once):
    assert lambdas._keys_per_chunk(keys, bytes_each) == at_once


def test_a_long_sequence():
    """Longer than the transform does in one step."""
    q, v, table = (normal(1, 1500, 1, n, seed=n, dtype=np.float32) for n in (2, 3, 4))
    table = normal(2999, 2, 1, dtype=np.float32)
    found, expected = (
        jax.jit(lambda *a, m=m: lambdas.apply_position_lambdas(*a, method=m))(q, v, table)
        for m in ("dft", "fft")
    )
    assert relative(found, expected) < 1e-5


@every_method
def test_reduced_precision(method):
    """Bfloat16 in and out; what is summed over positions has more."""
    narrow = arrays("global square", jnp.bfloat16)
    exact = jax.jit(apply_lambdas_reference)(*(a.astype(jnp.float32) for a in narrow))
    found = jax.jit(lambda *a: apply_lambdas(*a, method=method))(*narrow)
    assert found.dtype == jnp.bfloat16
    assert relative(found.astype(jnp.float32), exact) < 0.02
    assert normalize_keys(narrow[1]).dtype == jnp.float32


@pytest.mark.parametrize(
    ("shape", "window", "method"),
    [
        ((1, 64, 64, 1, 8), (127, 127, 16, 1), "spectra"),
        ((64, 8, 8, 1, 16), (15, 15, 16, 1), "rows"),
        ((64, 64, 64, 1, 16), (127, 127, 16, 1), "spectra"),
        ((1, 14, 14, 1, 16), (27, 27, 16, 1), "spectra"),
        ((1, 14, 14, 1, 16), (1, 27, 16, 1), "rows"),
        ((64, 30, 1, 16), (59, 16, 1), "rows"),
    ],
)
def test_the_method_taken(shape, window, method):
    assert lambdas._select_method(jnp.zeros(shape), jnp.zeros(window)) == method


def temporary_bytes(function, *inputs):
    return jax.jit(function).lower(*inputs).compile().memory_analysis().temp_size_in_bytes


def test_memory():
    """The published layer's gather takes 1.07 GB at 64×64 with 16 keys; its lambdas 2 MB."""
    shapes = [(1, 64, 64, 4, 16), (1, 64, 64, 1, 16), (1, 64, 64, 1, 8), (127, 127, 16, 1)]
    inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]

    def loss(*inputs):
        return jnp.sum(apply_lambdas(*inputs) ** 2)

    assert temporary_bytes(apply_lambdas, *inputs) < 20e6
    assert temporary_bytes(jax.grad(loss, range(4)), *inputs) < 45e6


def test_large_batches_take_less_than_their_lambdas():
    """Of all positions these take batch × N × k × v numbers."""
    shapes = [(64, 12, 12, 2, 32), (64, 12, 12, 1, 32), (64, 12, 12, 1, 32), (23, 23, 32, 1)]
    inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    for_all = 4 * 64 * 144 * 32 * 32
    assert temporary_bytes(lambda *a: apply_lambdas(*a, method="rows"), *inputs) < 0.5 * for_all


def test_vmap(x64):
    """Over another axis before the batch, as over models with tables of their own."""
    many = [arrays("global square") for _ in range(2)]
    many[1] = [2 * a for a in many[1]]
    stacked = [jnp.stack(a) for a in zip(*many, strict=True)]
    for method in METHODS:
        found = jax.jit(jax.vmap(lambda *a, m=method: apply_lambdas(*a, method=m)))(*stacked)
        for out, inputs in zip(found, many, strict=True):
            assert relative(out, apply_lambdas_reference(*inputs)) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="gather"), "method 'gather' is not one of ('auto', 'rows', 'dft', 'fft')"),
        (dict(queries=(2, 4, 4, 3)), "expected queries (batch, 1 or 2 spatial axes, heads, k)"),
        (dict(keys=(2, 4, 4, 2, 3)), "(2, 4, 4, 2, 3)"),
        (dict(values=(2, 4, 5, 1, 5)), "(2, 4, 5, 1, 5)"),
        (dict(table=(7, 6, 3, 1)), "(7, 6, 3, 1)"),
        (dict(table=(7, 3, 1)), "(7, 3, 1)"),
        (dict(table=(7, 7, 1, 3)), "(7, 7, 1, 3)"),
        (dict(bias=(4,)), "(4,)"),
    ],
)
def test_what_does_not_fit(change, message):
    shapes = dict(
        queries=(2, 4, 4, 2, 3), keys=(2, 4, 4, 1, 3), values=(2, 4, 4, 1, 5), table=(7, 7, 3, 1),
        bias=(3,),
    )  # fmt: skip
    method = change.get("method", "auto")
    shapes |= {name: shape for name, shape in change.items() if name != "method"}
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_lambdas(*map(jnp.zeros, shapes.values()), method=method)
