"""SlowFast: what each part is given, other sizes, parameters, and what it refuses."""

import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import filled, normal, relative

from terminator_jax.layers import SlowFast
from terminator_jax.ops import fft_conv

pytestmark = pytest.mark.usefixtures("unoptimized")


class Slow(nnx.Module):
    def __init__(self, features, rngs):
        self.inner = nnx.Linear(2, 5, rngs=rngs)
        self.outer = nnx.Linear(5, features, rngs=rngs)

    def __call__(self, coordinates):
        return self.outer(jnp.sin(self.inner(coordinates)))


class Fast(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, kernel, x, *, padding="same"):
        return self.scale[...] * fft_conv(x, kernel, padding=padding, method="direct")


def make():
    return filled(lambda: SlowFast(Slow(3, nnx.Rngs(0)), Fast(), size=(3, 4)))


def kernel_of(net, size):
    """The kernel, one position after the other."""
    inner, outer = net.inner, net.outer
    kernel = np.zeros((*size, 3))
    for r, c in np.ndindex(*size):
        at = np.array([2 * r / (size[0] - 1) - 1, 2 * c / (size[1] - 1) - 1])
        h = np.sin(at @ np.asarray(inner.kernel[...]) + np.asarray(inner.bias[...]))
        kernel[r, c] = h @ np.asarray(outer.kernel[...]) + np.asarray(outer.bias[...])
    return kernel


@pytest.mark.parametrize("size", [None, (5, 2)])
def test_the_kernel_position_by_position(size):
    layer = make()
    assert relative(layer.kernel(size), kernel_of(layer.slow, size or (3, 4))) < 1e-5


def test_fast_gets_the_kernel_and_what_the_layer_gets():
    layer, x = make(), normal(2, 6, 6, 3, dtype=np.float32)
    scale = layer.fast.scale[...]
    expected = scale * fft_conv(x, layer.kernel(), padding="valid")
    assert relative(layer(x, padding="valid"), expected) < 1e-5
    expected = scale * fft_conv(x, layer.kernel((6, 6)))
    assert relative(layer(x, size=x.shape[1:-1]), expected) < 1e-5


def test_parameters_of_both_are_found():
    """And nothing else is state; all of them have a gradient."""
    layer, x = make(), normal(2, 6, 6, 3, dtype=np.float32)
    drawn = SlowFast(Slow(3, nnx.Rngs(0)), Fast(), size=(3, 4))
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(drawn))}
    linear = {("slow", a, b) for a in ("inner", "outer") for b in ("kernel", "bias")}
    assert paths == {*linear, ("fast", "scale")}
    grads = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(x) ** 2)))(layer)
    for path, grad in nnx.to_flat_state(grads):
        assert jnp.abs(grad[...]).max() > 1e-3, path


@pytest.mark.parametrize("size", [(5,), (2, 3, 4)])
def test_functions_and_any_number_of_axes(size):
    layer = SlowFast(lambda c: c, functools.partial(jnp.tensordot, axes=1), size)
    out = layer(jnp.ones((len(size), 2)))
    assert out.shape == (*size, 2)
    assert out.ravel()[0] == -len(size) and out.ravel()[-1] == len(size)


def test_coordinates_are_wide(x64):
    def dtype_of(**kwargs):
        return SlowFast(lambda c: c, lambda k: k, (3,), **kwargs).kernel().dtype

    assert (dtype_of(), dtype_of(dtype=jnp.float64)) == (jnp.float32, jnp.float64)
    for dtype in (jnp.bfloat16, jnp.float16):
        with pytest.raises(ValueError, match=f"float32 or wider, got {jnp.dtype(dtype)}"):
            dtype_of(dtype=dtype)


@pytest.mark.parametrize(
    ("slow", "shape"),
    [
        (lambda c: c[:-1], "(5, 2)"),
        (lambda c: c[:, 0], "(6,)"),
        (lambda c: c.reshape(2, 3, 2), "(2, 3, 2)"),
        (lambda c: 1.0, "()"),
    ],
)
def test_a_wrong_number_of_positions(slow, shape):
    layer = SlowFast(slow, lambda kernel: kernel, (2, 3))
    message = f"slow must map coordinates (6, 2) to (6, features), got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer()


def test_what_cannot_be_called_or_hides_parameters():
    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="fast must be callable, got float"):
        SlowFast(jnp.sin, 1.0, (2, 3))
    for hiding in (linear.__call__, functools.partial(linear), functools.partial(linear.__call__)):
        with pytest.raises(TypeError, match=r"slow is a \w+ that hides the parameters of a Linear"):
            SlowFast(hiding, jnp.add, (2, 3))
    with pytest.raises(ValueError, match=re.escape("positive numbers of positions, got (2, 0)")):
        SlowFast(linear, jnp.add, (2, 0)).kernel()
