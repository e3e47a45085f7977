"""MAGNet: its formulas in NumPy, and how exact its phases are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import normal, relative

from terminator_jax.ops.coordinates import grid
from terminator_jax.ops.magnet import Context, MAGNetParams, context, context_magnet, gabor, magnet

D, HIDDEN, LAYERS, FEATURES, POSITIONS, CHANNELS = 2, 4, 3, 5, 12, 6
ANGULAR = 2 * np.pi * 2000


def random_net(dtype=np.float64):
    shapes = MAGNetParams(
        (LAYERS + 1, D, HIDDEN), (LAYERS + 1, HIDDEN), (LAYERS, HIDDEN, HIDDEN), (LAYERS, HIDDEN),
        (POSITIONS,), (HIDDEN, FEATURES), (FEATURES,),
    )  # fmt: skip
    return MAGNetParams(*(normal(*s, seed=n, dtype=dtype) for n, s in enumerate(shapes)))


def random_context():
    shapes = Context(
        (CHANNELS, HIDDEN), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,),
        (LAYERS, HIDDEN, HIDDEN), (LAYERS, HIDDEN),
    )  # fmt: skip
    return Context(*(normal(*s, seed=n) for n, s in enumerate(shapes, start=10)))


def test_magnet_follows_the_formulas(x64):
    net, c = random_net(), np.asarray(grid((3, 4), jnp.float64))
    w = jax.tree.map(np.asarray, net)
    h = np.sin(c @ w.gabor_weight[0] + w.gabor_bias[0])
    for i in range(LAYERS):
        g = np.sin(c @ w.gabor_weight[i + 1] + w.gabor_bias[i + 1])
        h = g * (h @ w.weight[i] + w.bias[i]) + w.position[:, None]
    assert relative(jax.jit(magnet)(net, c), h @ w.out_weight + w.out_bias) < 1e-13


def test_context_magnet_follows_the_formulas(x64):
    """Without a gradient; what the stopped gradient changes is in the golden vectors."""
    net, mix, pooled = random_net(), random_context(), normal(POSITIONS, CHANNELS, seed=30)
    c, t = np.asarray(grid((3, 4), jnp.float64)), np.asarray(context(mix, pooled))
    w, x = jax.tree.map(np.asarray, net), jax.tree.map(np.asarray, mix)
    h = np.sin(c @ w.gabor_weight[0] + w.gabor_bias[0])
    for i in range(LAYERS):
        g = np.sin(c @ w.gabor_weight[i + 1] + w.gabor_bias[i + 1])
        h = g * (h @ w.weight[i] + w.bias[i]) + w.position[:, None]
        h = h + 0.1 * h / np.linalg.norm(h, axis=0)
        h = h * (t @ x.weight[i] + x.bias[i])
    found = jax.jit(context_magnet)(net, mix, c, pooled, jnp.ones(POSITIONS))
    assert relative(found, h @ w.out_weight + w.out_bias) < 1e-13


def test_positions_outside_change_nothing_inside(x64):
    """And come out as 0, whatever stands there."""
    net, mix, pooled = random_net(), random_context(), normal(POSITIONS, CHANNELS, seed=30)
    c, inside = grid((3, 4), jnp.float64), jnp.arange(POSITIONS) % 3 != 0
    where = np.flatnonzero(inside)
    run = jax.jit(context_magnet)
    found = run(net, mix, c, pooled, inside)
    small = net._replace(position=net.position[where])
    expected = run(small, mix, c[where], pooled[where], jnp.ones(len(where)))
    assert relative(found[where], expected) < 1e-13
    assert (np.delete(np.asarray(found), where, axis=0) == 0).all()


def test_a_layer_of_zeros_has_a_finite_gradient(x64):
    """The norm's gradient at 0: a plain square root would be NaN there."""
    net = random_net()
    net = net._replace(
        weight=0 * net.weight, bias=0 * net.bias, position=jnp.zeros_like(net.position)
    )
    args = random_context(), grid((3, 4), jnp.float64), normal(POSITIONS, CHANNELS, seed=30)
    grads = jax.jit(
        jax.grad(lambda net: jnp.sum(context_magnet(net, *args, jnp.ones(POSITIONS)) ** 2))
    )(net)
    for name, grad in grads._asdict().items():
        assert np.isfinite(grad).all(), name


def fast_waves(dtype):
    """Frequencies as at the start of training, ω0 = 2000: phases up to 1e5 rad."""
    return (ANGULAR * 3 * normal(LAYERS + 1, D, HIDDEN, dtype=np.float32)).astype(dtype)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_phases_are_as_exact_as_float32_can_be(transform):
    """1e5 rad in float32 lie 0.008 apart: three roundings are all that may happen."""
    weight = fast_waves(np.float32)
    bias = normal(LAYERS + 1, HIDDEN, dtype=np.float32)
    c = np.asarray(grid((8, 8)))
    found = transform(gabor)(c, weight, bias)
    phase = np.einsum("nd,ldh->lnh", np.float64(c), np.float64(weight))
    assert np.abs(phase).max() > 5e4
    error = np.abs(found - np.sin(phase + np.float64(bias)[:, None]))
    assert error.max() < 3 * np.spacing(np.float32(np.abs(phase).max()))


def test_phases_of_bfloat16_weights_are_float32():
    weight, bias = fast_waves(jnp.bfloat16), normal(LAYERS + 1, HIDDEN, dtype=jnp.bfloat16)
    c = grid((8, 8))
    found = gabor(c, weight, bias)
    assert found.dtype == jnp.float32
    wide = gabor(c, weight.astype(jnp.float32), bias.astype(jnp.float32))
    np.testing.assert_array_equal(found, wide)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_phases_never_meet_a_matrix_unit(dtype):
    """Which may round its operands to bfloat16, where 1e5 rad are noise."""
    args = grid((8, 8)), fast_waves(dtype), normal(LAYERS + 1, HIDDEN, dtype=dtype)
    assert "dot_general" not in str(jax.make_jaxpr(gabor)(*args))
