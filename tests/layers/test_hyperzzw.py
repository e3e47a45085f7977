"""Global and local HyperZZW: literally what their slow network and the operator make."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import filled, normal, relative

from terminator_jax.layers import GlobalHyperZZW, LocalHyperZZW
from terminator_jax.ops import depthwise_correlate, hyperzzw
from terminator_jax.ops.conv import convolve_reference

SMALL = dict(hidden=4, layers=1)


def make_global(size=(4, 4), **kwargs):
    return filled(lambda: GlobalHyperZZW(size, 3, **{**SMALL, **kwargs}, rngs=nnx.Rngs(0)))


def make_local(size=5, **kwargs):
    return filled(lambda: LocalHyperZZW(size, 3, **{**SMALL, **kwargs}, rngs=nnx.Rngs(0)))


def maps(size, dtype=np.float64):
    return normal(2, *size, 3, seed=1, dtype=dtype), normal(2, *size, 3, seed=2, dtype=dtype)


def test_dot_contracts_columns_with_rows(x64):
    layer, (x, u) = make_global(param_dtype=jnp.float64), maps((4, 4))
    kernel = np.asarray(layer.slow_net())
    assert kernel.shape == (4, 4, 3)
    expected = np.einsum("bikc,ikc,bkjc->bijc", x, kernel, u)
    assert relative(layer(x, u), expected) < 1e-13


@pytest.mark.parametrize("size", [(6,), (2, 3, 4)], ids=str)
def test_product_takes_maps_of_any_shape(x64, size):
    layer = make_global(size, operator="product", param_dtype=jnp.float64)
    x, u = maps(size)
    assert relative(layer(x, u), x * layer.slow_net()[None] * u) < 1e-13


@pytest.mark.parametrize("size", [(6,), (4, 5)], ids=str)
def test_convolution_takes_maps_of_any_shape(x64, size):
    layer = make_global(size, operator="convolution", param_dtype=jnp.float64)
    x, u = maps(size)
    expected = convolve_reference(u, x * layer.slow_net()[None])
    assert relative(layer(x, u), expected) < 1e-12


@pytest.mark.parametrize(("ndim", "size"), [(1, (6,)), (2, (5, 4))])
def test_local_correlates_with_the_kernel_of_the_source(x64, ndim, size):
    layer = make_local(ndim=ndim, param_dtype=jnp.float64)
    source, u = maps(size)
    kernel = layer.slow_net(source)
    assert kernel.shape == (5,) * ndim + (3,)
    assert relative(layer(source, u), depthwise_correlate(u, kernel)) < 1e-13
    # The same kernel for every sample, and another one for another source.
    flipped = layer(source[::-1], u)
    assert relative(flipped, layer(source, u)) < 1e-12
    assert relative(layer(source + 1, u), layer(source, u)) > 1e-3


@pytest.mark.parametrize("make", [make_global, make_local])
def test_every_parameter_and_both_maps_have_gradients(x64, make):
    layer, (x, u) = make(param_dtype=jnp.float64), maps((4, 4))
    graph, params, other = nnx.split(layer, nnx.Param, ...)
    w = normal(*u.shape, seed=3)

    @jax.jit
    @jax.grad
    def gradients(args):
        params, x, u = args
        return jnp.sum(w * nnx.merge(graph, params, other, copy=True)(x, u))

    for path, grad in jax.tree.leaves_with_path(gradients((params, x, u))):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("make", [make_global, make_local])
@pytest.mark.parametrize(
    ("dtype", "inputs", "expected"),
    [
        (None, "float32", "float32"),
        (None, "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
    ],
)
def test_dtypes(make, dtype, inputs, expected):
    x, u = maps((4, 4), np.float32)
    run = nnx.jit(lambda layer, x, u: layer(x, u))
    out = run(make(dtype=dtype), x.astype(inputs), u.astype(inputs))
    assert (out.shape, out.dtype) == (u.shape, expected)
    assert relative(out.astype(jnp.float32), run(make(), x, u)) < 0.03


@pytest.mark.parametrize(
    ("make", "shapes", "message"),
    [
        (make_global, [(2, 4, 4, 3), (2, 4, 4, 1)], "got (2, 4, 4, 3) and (2, 4, 4, 1)"),
        (make_global, [(2, 4, 5, 3), (2, 4, 5, 3)], "expected x and u (batch, *(4, 4), 3)"),
        (make_local, [(2, 4, 4, 5), (2, 4, 4, 3)], "got (2, 4, 4, 5)"),
        (make_local, [(2, 4, 4, 3), (2, 4, 4, 5)], "got (2, 4, 4, 5) and (5, 5, 3)"),
    ],
)
def test_wrong_maps(make, shapes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        nnx.eval_shape(lambda layer, *a: layer(*a), make(), *map(jnp.zeros, shapes))


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (make_global, dict(operator="plus"), f"'plus' is not one of {tuple(hyperzzw.OPERATORS)}"),
        (make_global, dict(size=(4, 5)), "'dot' needs square 2-D maps, got size (4, 5)"),
        (make_global, dict(size=(4,)), "'dot' needs square 2-D maps, got size (4,)"),
        (make_local, dict(size=4), "sizes of local kernels must be odd, got (4,)"),
    ],
)
def test_wrong_arguments(make, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**kwargs)
