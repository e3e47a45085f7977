"""Depthwise correlation: every method against its definition in NumPy, and its gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import normal, relative

from terminator_jax.ops.convolution import DIRECT_UP_TO, METHODS, depthwise_correlate

pytestmark = pytest.mark.usefixtures("x64")

# Of map and kernel, per axis: odd and even, unequal, one position, kernels beyond the map.
SIZES = [
    ((7,), (4,)),
    ((8,), (1,)),
    ((1,), (4,)),
    ((6, 6), (5, 5)),
    ((7, 6), (3, 4)),
    ((5, 8), (1, 6)),
    ((3, 4), (9, 8)),
    ((4, 3, 5), (3, 2, 7)),
]
methods = pytest.mark.parametrize("method", ["dft", "direct"])
sizes = pytest.mark.parametrize(("size", "kernel_size"), SIZES, ids=str)


def definition(x, kernel):
    """`out[b, i, c] = Σ_r x[b, i + r - (k-1)//2, c] kernel[r, c]`, x zero outside."""
    x, kernel = np.asarray(x), np.asarray(kernel)
    out = np.zeros_like(x)
    for i in np.ndindex(*x.shape[1:-1]):
        for r in np.ndindex(*kernel.shape[:-1]):
            at = [n + o - (k - 1) // 2 for n, o, k in zip(i, r, kernel.shape, strict=False)]
            if all(0 <= a < n for a, n in zip(at, x.shape[1:-1], strict=True)):
                out[(slice(None), *i)] += x[(slice(None), *at)] * kernel[r]
    return out


def definition_gradients(x, kernel, w):
    """Of Σ w·out: the same sums, read the other way."""
    x, kernel, w = map(np.asarray, (x, kernel, w))
    dx, dkernel = np.zeros_like(x), np.zeros_like(kernel)
    for i in np.ndindex(*x.shape[1:-1]):
        for r in np.ndindex(*kernel.shape[:-1]):
            at = [n + o - (k - 1) // 2 for n, o, k in zip(i, r, kernel.shape, strict=False)]
            if all(0 <= a < n for a, n in zip(at, x.shape[1:-1], strict=True)):
                here = w[(slice(None), *i)]
                dx[(slice(None), *at)] += here * kernel[r]
                dkernel[r] += (here * x[(slice(None), *at)]).sum(0)
    return dx, dkernel


def random_case(size, kernel_size, channels=2, batch=3, dtype=np.float64):
    """Nothing is symmetric here: a flip or a shift shows."""
    x = normal(batch, *size, channels, seed=1, dtype=dtype)
    kernel = normal(*kernel_size, channels, seed=2, dtype=dtype)
    return x, kernel, normal(*x.shape, seed=3, dtype=dtype)


@functools.partial(jax.jit, static_argnums=0)
def run(method, x, kernel, w):
    """The result, and the gradients of Σ w·result."""
    out, pullback = jax.vjp(lambda *a: depthwise_correlate(*a, method=method), x, kernel)
    return out, *pullback(w.astype(out.dtype))


@methods
@sizes
def test_follows_the_definition(method, size, kernel_size):
    x, kernel, w = random_case(size, kernel_size)
    out, dx, dkernel = run(method, x, kernel, w)
    assert relative(out, definition(x, kernel)) < 1e-12
    expected_dx, expected_dkernel = definition_gradients(x, kernel, w)
    assert relative(dx, expected_dx) < 1e-12
    assert relative(dkernel, expected_dkernel) < 1e-12


@methods
def test_is_a_convolution_with_the_flipped_kernel(method):
    """As NumPy's own, for an odd kernel: the definition above is not wrong in the same way."""
    x, kernel, _ = random_case((9,), (5,), channels=1, batch=1)
    expected = np.convolve(x[0, :, 0], kernel[::-1, 0], mode="same")
    assert relative(depthwise_correlate(x, kernel, method=method)[0, :, 0], expected) < 1e-12


@methods
def test_float32_is_as_exact_as_float32_can_be(method):
    x, kernel, w = random_case((16, 16), (5, 5), dtype=np.float32)
    found = run(method, x, kernel, w)
    wide = [np.float64(a) for a in (x, kernel, w)]
    for part, expected in zip(
        found, [definition(*wide[:2]), *definition_gradients(*wide)], strict=True
    ):
        assert part.dtype == jnp.float32
        assert relative(part, expected) < 2e-6


@methods
def test_keeps_the_dtypes(method):
    x, kernel, w = random_case((6, 6), (3, 3), dtype=np.float32)
    out, dx, dkernel = run(method, x.astype(jnp.bfloat16), kernel, w)
    assert (out.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = definition(x, kernel), *definition_gradients(x, kernel, w)
    for part, wanted in zip((out, dx, dkernel), expected, strict=True):
        assert relative(part.astype(jnp.float32), wanted) < 0.03


@pytest.mark.parametrize("positions", [DIRECT_UP_TO, DIRECT_UP_TO + 1])
def test_auto_is_one_of_the_methods(positions):
    assert set(METHODS) == {"auto", "dft", "direct"}
    x, kernel, w = random_case((6,), (positions,))
    for found, wanted in zip(run("auto", x, kernel, w), run("dft", x, kernel, w), strict=True):
        assert relative(found, wanted) < 1e-12


@methods
def test_a_large_value_leaves_the_other_channels_alone(method):
    """Channels and samples do not mix, not even by rounding."""
    x, kernel, _ = random_case((8, 8), (5, 5), dtype=np.float32)
    out, _, _ = run(method, x, kernel, x)
    huge, _, _ = run(method, x.at[0, :, :, 0].mul(1e12), kernel, x)
    assert relative(huge[1:], out[1:]) < 1e-6
    assert relative(huge[0, ..., 1], out[0, ..., 1]) < 1e-6


@pytest.mark.parametrize(
    ("x", "kernel", "method", "message"),
    [
        ((2, 8, 8, 3), (3, 3, 3), "fft", "method 'fft' is not one of"),
        ((2, 8, 8, 3), (3, 3, 4), "auto", "got (2, 8, 8, 3) and (3, 3, 4)"),
        ((2, 8, 8, 3), (3, 3), "auto", "got (2, 8, 8, 3) and (3, 3)"),
        ((8, 3), (3,), "auto", "got (8, 3) and (3,)"),
    ],
)
def test_errors_are_raised_at_tracing(x, kernel, method, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(
            lambda x, k: depthwise_correlate(x, k, method=method), jnp.zeros(x), jnp.zeros(kernel)
        )
