"""Local attention against its definition, and the turning of queries and keys."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import normal, relative

from terminator_jax.ops import attention
from terminator_jax.ops.attention import (
    attention_reference,
    cheapest_tiles,
    local_attention,
    rotary,
)

SHAPE = (2, 6, 7, 3, 4)


def inputs(shape, dtype=np.float64):
    return [normal(*shape, seed=n, dtype=dtype) for n in range(3)]


def results(function, arrays, window, mask):
    """The output and the gradients of q, k and v."""
    weights = normal(*arrays[0].shape, seed=9, dtype=np.float32)

    def run(*arrays):
        out, pullback = jax.vjp(lambda *a: function(*a, window, mask=mask), *arrays)
        return out, *pullback(weights.astype(out.dtype))

    return jax.jit(run)(*arrays)


@pytest.mark.parametrize("features", [4, 128])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "window"),
    [(6, 7, 2), (1, 9, 1), (17, 5, 3), (5, 40, 4), (7, 7, 0), (4, 6, 20), (6, 5, None)],
)
def test_it_is_its_definition(x64, rows, columns, window, masked, features):
    """Also where the gradient finds the weights kept: with more features than keys."""
    arrays = inputs((2, rows, columns, 3, features))
    mask = jnp.asarray(np.random.default_rng(3).random((2, rows, columns)) > 0.4)
    mask = mask if masked else None
    found, expected = (
        results(f, arrays, window, mask) for f in (local_attention, attention_reference)
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float64
        # A window of one position leaves queries and keys without a gradient.
        assert np.abs(one - other).max() < 1e-12 * max(np.abs(other).max(), 1e-3)


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (4, 7), (6, 7), (5, 2)])
def test_it_does_not_depend_on_the_tiles(x64, monkeypatch, tile):
    """Also where the last ones reach over the map's end."""
    mask = jnp.asarray(np.random.default_rng(3).random(SHAPE[:3]) > 0.4)
    monkeypatch.setattr(
        attention,
        "cheapest_tiles",
        lambda *size: attention.Tiles(*size, height=tile[0], width=tile[1]),
    )
    monkeypatch.setattr(attention, "KEY_COLUMN_MULTIPLE", 1)
    arrays = inputs(SHAPE)
    found, expected = (results(f, arrays, 1, mask) for f in (local_attention, attention_reference))
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-12


def test_keys_that_are_the_values_too(x64):
    """Their gradient is the sum of both."""
    q, k, _ = inputs(SHAPE)

    def shared(q, k, window, mask):
        return local_attention(q, k, k, window, mask=mask)

    out, dq, dk = results(shared, [q, k], 1, None)
    expected = results(attention_reference, [q, k, k], 1, None)
    for one, other in zip((out, dq, dk), (*expected[:2], sum(expected[2:])), strict=True):
        assert relative(one, other) < 1e-12


def test_the_definition_position_by_position(x64):
    q, k, v = map(np.asarray, inputs(SHAPE))
    mask = np.random.default_rng(3).random(SHAPE[:3]) > 0.4
    expected = np.zeros(SHAPE)
    for b, r, c, h in np.ndindex(*SHAPE[:4]):
        near = np.zeros(SHAPE[1:3], bool)
        near[max(r - 2, 0) : r + 3, max(c - 2, 0) : c + 3] = True
        seen = near & mask[b]
        weights = np.exp(k[b, seen, h] @ q[b, r, c, h] / 2)
        expected[b, r, c, h] = weights @ v[b, seen, h] / weights.sum()
    assert relative(attention_reference(q, k, v, 2, mask=jnp.asarray(mask)), expected) < 1e-12


def test_what_is_masked_has_no_influence_and_seeing_nothing_gives_zero(x64):
    q, k, v = inputs(SHAPE)
    mask = jnp.zeros(SHAPE[:3], bool).at[:, :3].set(True)
    out = local_attention(q, k, v, 1, mask=mask)
    hidden = ~mask[..., None, None]
    other = local_attention(q, jnp.where(hidden, 1e6, k), jnp.where(hidden, -7.0, v), 1, mask=mask)
    assert (out == other).all()
    assert (out[:, 4:] == 0).all() and (out[:, :4] != 0).all()
    grads = jax.grad(lambda *a: jnp.sum(local_attention(*a, 1, mask=mask) ** 2), (0, 1, 2))(q, k, v)
    for grad in grads:
        assert jnp.isfinite(grad).all() and (grad[:, 4:] == 0).all()


def test_large_scores(x64):
    q, k, v = inputs(SHAPE)
    out = local_attention(1e4 * q, k, v, 2)
    assert relative(out, attention_reference(1e4 * q, k, v, 2)) < 1e-12


def test_bfloat16_weighs_in_float32(unoptimized):
    """Values that bfloat16 holds exactly leave but the roundings of weights and result."""
    arrays = [x.astype(jnp.bfloat16) for x in inputs((2, 9, 12, 2, 8), np.float32)]
    wide = [x.astype(jnp.float32) for x in arrays]
    found = results(local_attention, arrays, 2, None)
    expected = results(attention_reference, wide, 2, None)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert relative(one.astype(jnp.float32), other) < 0.01
    # Sums of 400 weights: in bfloat16 they would stand still at 256.
    ones = jnp.ones((1, 20, 20, 1, 4), jnp.bfloat16)
    assert (local_attention(ones, ones, ones, None) == 1).all()


def test_nothing_as_large_as_all_pairs_is_made():
    """Neither positions times positions nor positions times a window's."""
    shape = (1, 64, 64, 1, 32)
    q = jax.ShapeDtypeStruct(shape, jnp.float32)
    run = jax.jit(jax.grad(lambda *a: jnp.sum(local_attention(*a, 3)), (0, 1, 2)))
    memory = run.lower(q, q, q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 49 * 4 * 64 * 64 * 32 / 4


def test_tiles_reach_as_far_as_windows_do():
    for rows, columns, window in [(32, 32, 3), (9, 40, 4), (1, 100, 2), (64, 64, 64)]:
        tiles = cheapest_tiles(rows, columns, window)
        assert all(
            reach >= min(size, tile + 2 * window)
            for reach, size, tile in zip(
                tiles.key_block, (rows, columns), (tiles.height, tiles.width), strict=True
            )
        )
    tiles = cheapest_tiles(64, 64, 3)
    pairs = math.prod(tiles.grid) * tiles.height * tiles.width * math.prod(tiles.key_block)
    assert pairs < 6 * 49 * 64 * 64


def turned(x, base):
    """One pair after the other."""
    out = np.array(x)
    pairs = x.shape[-1] // 4
    for _, r, c, _, i in np.ndindex(1, *x.shape[1:3], 1, pairs):
        for at, first in ((r, 0), (c, 2 * pairs)):
            angle = at * base ** (-i / pairs)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            pair = [first + i, first + i + pairs]
            out[:, r, c][..., pair] = np.asarray(x)[:, r, c][..., pair] @ turn.T
    return out


def test_rotary_turns_pairs(x64):
    x = normal(2, 5, 6, 3, 8)
    assert relative(rotary(x, 30.0), turned(x, 30.0)) < 1e-12


def test_products_of_what_is_turned_depend_on_the_distance_alone(x64):
    q, k = (
        rotary(jnp.broadcast_to(normal(8, seed=n), (1, 9, 9, 1, 8)))[0, :, :, 0] for n in (1, 2)
    )
    products = jnp.einsum("rcd,uvd->rcuv", q, k)
    np.testing.assert_allclose(products[1, 2, 4, 3], products[4, 7, 7, 8], rtol=1e-12)
    for other in (products[1, 2, 5, 3], products[1, 2, 4, 4], products[4, 3, 1, 2]):
        assert abs(other - products[1, 2, 4, 3]) > 1e-3


def test_angles_are_in_float32():
    """In bfloat16, positions beyond 256 could not be told apart."""
    x = normal(1, 1, 400, 1, 4, dtype=np.float32).astype(jnp.bfloat16)
    found, expected = rotary(x), turned(np.asarray(x, np.float64), 100.0)
    assert found.dtype == jnp.bfloat16
    assert relative(found.astype(jnp.float32), expected) < 0.01


@pytest.mark.parametrize(
    ("shapes", "window", "mask", "message"),
    [
        ([SHAPE, SHAPE, (2, 6, 7, 3, 5)], 2, None, "of one shape (batch, rows, columns, heads"),
        ([SHAPE[1:]] * 3, 2, None, "got (6, 7, 3, 4), (6, 7, 3, 4) and (6, 7, 3, 4)"),
        ([SHAPE] * 3, -1, None, "window must be 0 or more, or None for all positions, got -1"),
        ([SHAPE] * 3, 2, np.ones((2, 7, 6), bool), "expected a mask of bool (2, 6, 7) for q"),
        ([SHAPE] * 3, 2, np.ones((2, 6, 7)), "got float64 (2, 6, 7)"),
    ],
)
def test_what_does_not_fit(shapes, window, mask, message):
    for function in (local_attention, attention_reference):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(*map(jnp.zeros, shapes), window, mask=mask)


def test_features_that_cannot_turn():
    with pytest.raises(ValueError, match="features divisible by 4, got \\(1, 2, 2, 1, 6\\)"):
        rotary(jnp.zeros((1, 2, 2, 1, 6)))


SHARED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from nets import normal, relative
from terminator_jax.ops.attention import attention_reference, local_attention

mesh = jax.make_mesh((4, 2), ("b", "h"), axis_types=(AxisType.{kind},) * 2)
q, k, v = (normal(8, 9, 11, 4, 4, seed=n) for n in range(3))
mask = jnp.asarray(np.random.default_rng(3).random((8, 9, 11)) > 0.4)


def all_of(function, q, k, v, mask):
    out, pullback = jax.vjp(lambda *a: function(*a, 2, mask=mask), q, k, v)
    return out, *pullback(out)


expected = jax.jit(lambda *a: all_of(attention_reference, *a))(q, k, v, mask)
spec = NamedSharding(mesh, P("b", None, None, "h"))
put = [jax.device_put(a, spec) for a in (q, k, v)]
put.append(jax.device_put(mask, NamedSharding(mesh, P("b"))))
program = jax.jit(lambda *a: all_of(local_attention, *a)).lower(*put).compile()
moves = re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", program.as_text())
assert not moves, moves
for one, other in zip(program(*put), expected):
    assert relative(one, other) < 1e-12
    assert one.sharding.is_equivalent_to(spec, one.ndim), one.sharding
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_devices_share_batch_and_heads(run_python, kind):
    """Nothing is gathered."""
    run_python(SHARED.format(kind=kind), devices=8, x64=True)


MAPPED = """
import functools
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from nets import normal, relative
from terminator_jax.ops.attention import local_attention

mesh = jax.make_mesh((2,), ("d",), (AxisType.Explicit,))
q, w = normal(4, 5, 6, 2, 4), normal(8, 8, seed=2)


def gradients(axis, q, w):
    def loss(q, w):
        keys = (q.reshape(*q.shape[:3], 8) @ w).reshape(q.shape)
        return jnp.sum(jnp.sin(local_attention(q, keys, q, 1)))
    dq, dw = jax.grad(loss, (0, 1))(q, w)
    return dq, dw if axis is None else jax.lax.psum(dw, axis)


expected = jax.jit(functools.partial(gradients, None))(q, w)
split = jax.pmap(functools.partial(gradients, "d"), "d", in_axes=(0, None), out_axes=(0, None))
dq, dw = split(q.reshape(2, 2, *q.shape[1:]), w)
assert relative(dq.reshape(q.shape), expected[0]) < 1e-12
assert relative(dw, expected[1]) < 1e-12
split = jax.jit(jax.shard_map(
    functools.partial(gradients, None), mesh=mesh, in_specs=(P("d"), P()), out_specs=(P("d"), P()),
))
for found, one in zip(split(jax.device_put(q, jax.NamedSharding(mesh, P("d"))), w), expected):
    assert relative(found, one) < 1e-12
"""


def test_inside_pmap_and_shard_map(run_python):
    run_python(MAPPED, devices=2, x64=True)
