"""HyperZZW of vectors: the formula, its gradients, and the slow network that makes the kernel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import filled, normal, relative

from terminator_jax.layers import FeatureSlowNet, HyperZZWGate
from terminator_jax.ops import hyperzzw

HIDDEN = [None, 4]


def make(input_dim=3, context_dim=5, **kwargs):
    return filled(lambda: HyperZZWGate(input_dim, context_dim, **kwargs, rngs=nnx.Rngs(0)))


def vectors(*batch, dtype=np.float64):
    return normal(*batch, 3, seed=1, dtype=dtype), normal(*batch, 5, seed=2, dtype=dtype)


@pytest.mark.parametrize("batch", [(), (7,), (2, 4)], ids=str)
def test_gate_is_the_formula_with_its_gradients(x64, batch):
    arrays, w = (*vectors(*batch), normal(5, 3, seed=3)), normal(*batch, 3, seed=4)

    def run(function):
        return jax.value_and_grad(lambda a: jnp.sum(w * function(*a)))(arrays)

    x, context, kernel = (np.asarray(a) for a in arrays)
    expected = np.empty_like(x)
    for n in np.ndindex(*batch, 3):
        expected[n] = x[n] * sum(context[(*n[:-1], m)] * kernel[m, n[-1]] for m in range(5))
    assert relative(hyperzzw.gate(*arrays), expected) < 1e-13
    assert relative(hyperzzw.gate_reference(*arrays), expected) < 1e-13
    found, reference = run(hyperzzw.gate), run(hyperzzw.gate_reference)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), found, reference)


def test_bfloat16_rounds_once():
    """And its gradients keep their sums in float32 until the end."""
    arrays = [normal(*s, seed=n, dtype=jnp.bfloat16) for n, s in enumerate([(64, 9), (64, 300)])]
    arrays.append(normal(300, 9, seed=2, dtype=jnp.bfloat16))
    wide = [a.astype(jnp.float32) for a in arrays]
    out, pull = jax.vjp(hyperzzw.gate, *arrays)
    expected, pull_wide = jax.vjp(hyperzzw.gate, *wide)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_less(np.abs(out - expected), 2.0**-8 * np.abs(expected))
    ones = jnp.ones_like(out)
    for grad, exact in zip(pull(ones), pull_wide(ones.astype(jnp.float32)), strict=True):
        assert grad.dtype == jnp.bfloat16
        assert relative(grad.astype(jnp.float32), exact) < 2.0**-8


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3), (2, 5), (3, 5)),
        ((2, 3), (1, 5), (5, 3)),
        ((2, 1), (2, 5), (5, 3)),
        ((), (5,), (5, 3)),
        ((2, 3), (2, 5), (2, 5, 3)),
    ],
    ids=str,
)
def test_gate_refuses_what_does_not_fit(shapes):
    message = re.escape("got {}, {} and {}".format(*shapes))
    with pytest.raises(ValueError, match=message):
        hyperzzw.gate(*map(jnp.ones, shapes))


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("batch", [(7,), (2, 4)], ids=str)
def test_layer_is_the_gate_of_its_kernel(x64, hidden, batch):
    layer, (x, context) = make(hidden=hidden, param_dtype=jnp.float64), vectors(*batch)
    assert layer.kernel().shape == (5, 3)
    assert relative(layer(x, context), x * (np.asarray(context) @ layer.kernel())) < 1e-13


@pytest.mark.parametrize("layers", [1, 2])
def test_the_slow_network_is_a_relu_mlp(x64, layers):
    net = filled(
        lambda: FeatureSlowNet(
            5, 3, hidden=4, layers=layers, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
    )
    h = np.asarray(net.code[...])
    assert h.shape == (5, 4)
    for n in range(layers):
        h = np.maximum(h @ net.weight[n] + net.bias[n][None], 0)
    expected = h @ np.asarray(net.out_weight[...]) + np.asarray(net.out_bias[...])
    assert relative(net(), expected) < 1e-13


def test_the_first_kernels_are_glorots():
    bound = np.sqrt(6 / (60 + 40))
    learned = HyperZZWGate(40, 60, rngs=nnx.Rngs(0)).kernel()
    assert 0.99 * bound < np.abs(learned).max() <= bound
    assert abs(learned.std() * np.sqrt(3) / bound - 1) < 0.05
    for layers in (1, 3):
        made = HyperZZWGate(40, 60, hidden=64, layers=layers, rngs=nnx.Rngs(0)).kernel()
        assert 0.6 < made.std() * np.sqrt(3) / bound < 1.5


@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_parameter_and_both_vectors_have_gradients(x64, hidden):
    layer, (x, context) = make(hidden=hidden, param_dtype=jnp.float64), vectors(7)
    graph, params = nnx.split(layer, nnx.Param)
    w = normal(7, 3, seed=3)

    @jax.jit
    @jax.grad
    def gradients(arguments):
        params, x, context = arguments
        return jnp.sum(w * nnx.merge(graph, params)(x, context))

    for path, grad in jax.tree.leaves_with_path(gradients((params, x, context))):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(
    ("dtype", "inputs", "expected"),
    [
        (None, "float32", "float32"),
        (None, "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
    ],
)
def test_dtypes(hidden, dtype, inputs, expected):
    x, context = vectors(7, dtype=np.float32)
    layer = make(hidden=hidden, dtype=dtype)
    out = layer(x.astype(inputs), context.astype(inputs))
    assert (out.shape, out.dtype) == (x.shape, expected)
    assert layer.kernel().dtype == jnp.float32
    assert relative(out.astype(jnp.float32), make(hidden=hidden)(x, context)) < 0.03


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 4), (2, 5)], "expected x (..., 3) and context (..., 5), got (2, 4) and (2, 5)"),
        ([(2, 3), (2, 3)], "got (2, 3) and (2, 3)"),
        ([(2, 3), (4, 5)], "got (2, 3) and (4, 5)"),
    ],
)
def test_wrong_vectors(shapes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()(*map(jnp.ones, shapes))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(input_dim=0), "input_dim and context_dim must be positive, got 0, 5"),
        (dict(hidden=0), "hidden and layers must be positive, got 5, 3, 0, 1"),
        (dict(hidden=4, layers=0), "hidden and layers must be positive, got 5, 3, 4, 0"),
    ],
)
def test_wrong_sizes(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**kwargs)
