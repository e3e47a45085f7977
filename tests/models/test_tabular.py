"""The model of tables: its formulas, what it accepts, and that it learns real ones."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import filled, normal, relative
from scipy import special
from sklearn.datasets import load_breast_cancer, load_diabetes

from terminator_jax.models import TabularConfig, TabularTerminator
from terminator_jax.models.tabular import PARTS, TabularBlock

SMALL = dict(widths=(6, 4), slow_hidden=3)


def make(dtype=None, param_dtype=jnp.float32, **config):
    config = TabularConfig(5, **{**SMALL, **config})
    return filled(
        lambda: TabularTerminator(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )


def standardized(x):
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


def gelu(x):
    return x * (1 + special.erf(x / np.sqrt(2))) / 2


def literal_block(block, x):
    """The docstring of `TabularBlock`, in NumPy."""
    kernel = np.asarray(block.gate.kernel())

    def linear(layer, x):
        return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])

    def rgu(unit, x):
        return linear(unit.y, gelu(standardized(linear(unit.k, x) * linear(unit.q, x))))

    def gate(context):
        return x * (context @ kernel)

    f = standardized(rgu(block.rgu2, gate(x)) + rgu(block.rgu1, x))
    u = standardized(linear(block.mixer, x))
    h = standardized(x * special.expit(x * np.asarray(block.channel_kernel[...]) * x))
    o, o_u, o_h = gate(f), gate(u), gate(h)
    i = x * special.expit(o * np.asarray(block.interaction_kernel[...]) * o)
    maps = dict(o=o, f=f, o_u=o_u, s=o * special.expit(o), o_h=o_h, i=i)
    y = linear(block.bottleneck, np.concatenate([maps[name] for name in PARTS], 1))
    return gelu(standardized(y)) + float(block.scalar[...])


@pytest.mark.parametrize("slow_hidden", [None, 3])
def test_block_is_its_formulas(x64, slow_hidden):
    block = filled(
        lambda: TabularBlock(
            5, 6, slow_hidden=slow_hidden, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
    )
    x = normal(7, 5)
    assert relative(block(x), literal_block(block, np.asarray(x))) < 1e-12


def test_model_is_its_blocks_and_a_head(x64):
    model, y = make(num_classes=3, param_dtype=jnp.float64), normal(7, 5)
    out = model(y)
    for block in model.blocks:
        y = block(y)
    assert y.shape == (7, 4)
    assert relative(out, y @ model.head.kernel[...] + model.head.bias[...][None]) < 1e-13


def test_every_parameter_has_a_gradient(x64):
    model, x, w = make(num_classes=3, param_dtype=jnp.float64), normal(7, 5), normal(7, 3, seed=2)
    graph, params = nnx.split(model, nnx.Param)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(w * nnx.merge(graph, p)(x))))(params)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize(
    ("heads", "outputs"), [({}, 1), (dict(targets=2), 2), (dict(num_classes=3), 3)]
)
def test_heads(heads, outputs):
    model = make(**heads)
    assert jax.eval_shape(model, jnp.ones((7, 5))).shape == (7, outputs)


def test_a_row_does_not_depend_on_the_others(unoptimized):
    model, x = jax.jit(make()), normal(8, 5, dtype=np.float32)
    out = model(x)
    for rows in (slice(3, 4), slice(2, 8)):
        np.testing.assert_allclose(model(x[rows]), out[rows], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(jnp.isfinite(model(jnp.zeros((1, 5)))), True)


def test_drops_with_a_key():
    model, x = make(dropout=0.5), normal(8, 5, dtype=np.float32)
    run = jax.jit(lambda seed: model(x, rngs=nnx.Rngs(dropout=jax.random.key(seed))))
    np.testing.assert_array_equal(run(1), run(1))
    assert (run(1) != run(2)).any() and (run(1) != model(x)).any()


def test_bfloat16(unoptimized):
    x = normal(64, 5, dtype=np.float32)
    out = jax.jit(make(dtype=jnp.bfloat16))(x)
    assert out.dtype == jnp.float32
    error = np.asarray(out - jax.jit(make())(x))
    assert 0 < error.std() < 0.1 * out.std()


@pytest.mark.parametrize("shape", [(7, 4), (5,), (2, 7, 5)], ids=str)
def test_wrong_rows(shape):
    with pytest.raises(ValueError, match=re.escape(f"expected rows (batch, 5), got {shape}")):
        make()(jnp.ones(shape))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating-point rows, got int32"):
        make()(jnp.ones((7, 5), jnp.int32))


@pytest.mark.parametrize(
    "wrong", [dict(features=0), dict(widths=()), dict(widths=(4, 0)), dict(num_classes=0)], ids=str
)
def test_wrong_config(wrong):
    [(name, value)] = wrong.items()
    says = rf"{name} is {re.escape(str(value))}, and must be .*greater than 0"
    with pytest.raises(ValueError, match=says):
        TabularConfig(**{"features": 5, **wrong})


def trained(config, x, y, loss, *, steps=150):
    """The model after AdamW on all rows at once."""
    graph, params = nnx.split(TabularTerminator(config, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = optax.adamw(optax.cosine_decay_schedule(0.01, steps), weight_decay=0.1)

    def objective(params, key):
        return jnp.mean(loss(nnx.merge(graph, params)(x, rngs=nnx.Rngs(dropout=key)), y))

    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(objective)(params, key)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(functools.partial(jax.lax.scan, step))
    keys = jax.random.split(jax.random.key(1), steps)
    (params, _), losses = run((params, optimizer.init(params)), keys)
    assert losses[-1] < 0.5 * losses[0]
    return nnx.merge(graph, params)


def split(data):
    """Standardized columns and targets of the rows to train and, every fourth, to test."""
    test = np.arange(len(data.target)) % 4 == 0
    x = (data.data - data.data[~test].mean(0)) / data.data[~test].std(0)
    x = x.astype(np.float32)
    return x[~test], data.target[~test], x[test], data.target[test]


def test_learns_to_classify_real_rows():
    x, y, x_test, y_test = split(load_breast_cancer())
    config = TabularConfig(x.shape[1], num_classes=2, widths=(16, 16))
    loss = optax.softmax_cross_entropy_with_integer_labels
    logits = jax.jit(trained(config, x, y, loss))(x_test)
    assert np.mean(np.argmax(logits, 1) == y_test) > 0.94  # always "benign": 0.63


def test_learns_to_predict_real_numbers():
    x, y, x_test, y_test = split(load_diabetes())
    mean, deviation = y.mean(), y.std()
    target = jnp.asarray((y - mean) / deviation, jnp.float32)[:, None]
    config = TabularConfig(x.shape[1], widths=(8, 8), dropout=0.3)
    model = trained(config, x, target, optax.squared_error, steps=80)
    found = np.asarray(jax.jit(model)(x_test))[:, 0] * deviation + mean
    assert 1 - np.mean((found - y_test) ** 2) / np.var(y_test) > 0.3
