"""Local attention as a layer: the public one, heads and projections, masks, dtypes, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import load
from nets import filled, normal, relative

from terminator_jax.layers import LocalAttention2D
from terminator_jax.layers.attention import NEIGHBOUR_OFFSETS
from terminator_jax.ops.attention import attention_reference, rotary

pytestmark = pytest.mark.usefixtures("unoptimized")


def make(channels=16, window=2, **kwargs):
    return filled(lambda: LocalAttention2D(channels, window, rngs=nnx.Rngs(0), **kwargs))


def test_the_public_layer(x64):
    golden = load("local_attention_2d")
    layer = make(8, int(golden.window_size), heads=1, project=False, turn=False)
    assert not nnx.state(layer)
    x, w = jnp.asarray(golden.input["x"]), jnp.asarray(golden.cotangent)
    output, pullback = jax.vjp(jax.jit(layer), x)
    assert relative(output, golden.output) < 1e-9
    assert relative(pullback(w)[0], golden.grad_input["x"]) < 1e-7


@pytest.mark.parametrize("window", [1, None])
def test_heads_and_projections(x64, window):
    """Each head by itself, its channels next to each other."""
    layer = make(16, window, heads=2, base=30.0, param_dtype=jnp.float64)
    x = normal(2, 5, 7, 16)
    mask = jnp.asarray(np.random.default_rng(3).random((2, 5, 7)) > 0.3)
    kernel, bias = layer.qkv.kernel[...], layer.qkv.bias[...]
    assert (kernel.shape, bias.shape) == ((16, 48), (48,))
    maps = jnp.split(x @ kernel + bias[None, None, None], 3, axis=-1)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        q, k, v = (part[..., None, head] for part in maps)
        q, k = rotary(q, 30.0), rotary(k, 30.0)
        heads.append(attention_reference(q, k, v, window, mask=mask)[..., 0, :])
    expected = layer.out(jnp.concatenate(heads, -1))
    assert relative(layer(x, mask), expected) < 1e-12


def test_it_works_on_any_grid_and_follows_a_shift():
    """Rectangles of any size; what lies far enough from the border is moved with its map."""
    layer, x = make(8, 1, heads=2), normal(1, 6, 11, 8, dtype=np.float32)
    out, moved = layer(x), layer(jnp.roll(x, (1, 2), (1, 2)))
    assert out.shape == x.shape
    assert relative(moved[:, 2:5, 3:10], out[:, 1:4, 1:8]) < 1e-5


def test_the_padding_changes_nothing():
    layer, x = make(8, 2, heads=2), normal(1, 5, 6, 8, dtype=np.float32)
    padded = jnp.pad(x, [(0, 0), (0, 2), (0, 3), (0, 0)], constant_values=5)
    mask = jnp.zeros((1, 7, 9), bool).at[:, :5, :6].set(True)
    assert relative(layer(padded, mask)[:, :5, :6], layer(x)) < 1e-5
    assert relative(layer(padded)[:, :5, :6], layer(x)) > 1e-3


def test_dtypes():
    layer = make(16, 2, heads=2, dtype=jnp.bfloat16)
    wide = make(16, 2, heads=2)
    x = normal(2, 5, 6, 16, dtype=np.float32)
    out = layer(x)
    assert layer.qkv.kernel[...].dtype == jnp.float32 and out.dtype == jnp.bfloat16
    assert relative(out.astype(jnp.float32), wide(x)) < 0.03
    narrow = make(16, 2, project=False, dtype=jnp.bfloat16)
    assert narrow(x).dtype == jnp.bfloat16


def test_initial_values():
    """Values and results keep the deviation; without turns, queries and keys do as well."""
    layer, still = (LocalAttention2D(64, 2, turn=turn, rngs=nnx.Rngs(0)) for turn in (True, False))
    for kernel in (still.qkv.kernel, still.out.kernel, layer.out.kernel):
        assert abs(np.std(kernel[...]) * 8 - 1) < 0.05
    assert abs(np.std(layer.qkv.kernel[...][:, 128:]) * 8 - 1) < 0.05
    assert abs(np.std(layer.qkv.kernel[...][:, :128]) * 80 - 1) < 0.05
    for bias in (still.qkv.bias, still.out.bias, layer.out.bias):
        assert (bias[...] == 0).all()


def test_heads_begin_with_neighbours():
    """Each looks one or two positions away, half of its weight or more at the one it is to see."""
    layer = LocalAttention2D(128, 2, heads=8, rngs=nnx.Rngs(0))
    q, k, _ = jnp.split(jnp.broadcast_to(layer.qkv.bias[...], (1, 9, 9, 384)), 3, axis=-1)
    q, k = (rotary(x.reshape(1, 9, 9, 8, 16)) for x in (q, k))
    scores = jnp.einsum("hd,rchd->hrc", q[0, 4, 4], k[0, 2:7, 2:7]) / 4
    weights = jax.nn.softmax(scores.reshape(8, 25), axis=-1).reshape(8, 5, 5)
    for (row, column), own in zip(NEIGHBOUR_OFFSETS, weights, strict=True):
        assert own[2 + row, 2 + column] == own.max() > 0.5


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((16, 2), dict(heads=3), "16 channels do not divide into 3 heads"),
        ((16, 2), dict(heads=0), "16 channels do not divide into 0 heads"),
        ((12, 2), dict(heads=2), "must divide by 4 to turn, got 12 channels in 2 heads"),
        ((16, -1), {}, "window must be 0 or more, or None for all positions, got -1"),
    ],
)
def test_what_does_not_fit(arguments, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LocalAttention2D(*arguments, **options, rngs=nnx.Rngs(0))


def test_maps_that_do_not_fit():
    layer = make()
    for shape in ((2, 5, 6, 8), (5, 6, 16)):
        message = f"expected (batch, rows, columns, 16), got {shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            layer(jnp.zeros(shape))
    with pytest.raises(ValueError, match=re.escape("expected a mask of bool (2, 5, 6)")):
        layer(jnp.zeros((2, 5, 6, 16)), jnp.ones((2, 5), bool))
