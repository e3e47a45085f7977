"""Depthwise convolution: every method against the definition, gradients by the adjoint."""

import functools
import math
import re
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from nets import normal, relative

from terminator_jax.ops.channels_first import to_channels_first, to_channels_last
from terminator_jax.ops.conv import (
    METHODS,
    PADDINGS,
    convolve_reference,
    depthwise_correlate,
    fft_conv,
    methods,
)
from terminator_jax.ops.conv.fourier import fast_length
from terminator_jax.ops.conv.methods import convolve, convolve_shared_kernel
from terminator_jax.ops.conv.per_map import convolve_per_map
from terminator_jax.ops.conv.spectral import DENSE_UP_TO

pytestmark = pytest.mark.usefixtures("x64")
every_method = pytest.mark.parametrize("method", METHODS[1:])


class Case(NamedTuple):
    """Sizes of map and kernel per axis, and how they meet."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    padding: str = "same"
    correlate: bool = False
    per_sample: bool = False

    def __str__(self):
        marks = ["correlate"] * self.correlate + ["per sample"] * self.per_sample
        return "-".join([self.padding, str(self.size), str(self.kernel), *marks])


# Odd and even, equal and unequal, one position, beyond the map.
CASES = [
    Case((7,), (4,)),
    Case((1,), (4,), correlate=True),
    Case((7, 6), (3, 4), correlate=True),
    Case((5, 8), (1, 6)),
    Case((3, 4), (9, 8), correlate=True, per_sample=True),
    Case((4, 3, 5), (3, 2, 7)),
    Case((5,), (8,), "causal", per_sample=True),
    Case((8, 7), (3, 7), "valid"),
    Case((7, 6), (4, 3), "circular", correlate=True),
    Case((5,), (12,), "circular", per_sample=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def arrays(case, channels=2, batch=3, dtype=np.float64):
    """A map and a kernel in which nothing is symmetric: a flip or a shift shows."""
    lead = (batch,) if case.per_sample else ()
    x = normal(batch, *case.size, channels, seed=1, dtype=dtype)
    return x, normal(*lead, *case.kernel, channels, seed=2, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(case, method, max_bytes, x, kernel, w):
    """The result, and the gradients of Σ w·result."""

    def convolve(x, kernel):
        return fft_conv(
            x, kernel, padding=case.padding, method=method, correlate=case.correlate,
            max_bytes=max_bytes,
        )  # fmt: skip

    out, pullback = jax.vjp(convolve, x, kernel)
    return out, *pullback(w.astype(out.dtype))


def check(case, method, tolerance=1e-12, max_bytes=None, dtype=np.float64):
    """Against the definition; ⟨gradient, v⟩ must be what the definition makes of v."""
    x, kernel = arrays(case, dtype=dtype)
    define = functools.partial(convolve_reference, padding=case.padding, correlate=case.correlate)
    expected = define(x, kernel)
    w = normal(*expected.shape, seed=3, dtype=dtype)
    out, dx, dkernel = run(case, method, max_bytes, x, kernel, w)
    assert {a.dtype for a in (out, dx, dkernel)} == {np.dtype(dtype)}
    assert relative(out, expected) < tolerance
    for seed in (4, 5):
        vx, vk = normal(*x.shape, seed=seed), normal(*kernel.shape, seed=seed + 9)
        for gradient, v, result in ((dx, vx, define(vx, kernel)), (dkernel, vk, define(x, vk))):
            terms = np.float64(w) * result
            found = np.sum(np.float64(gradient) * v)
            assert abs(found - terms.sum()) < tolerance * np.linalg.norm(terms) * 10


@every_method
@every_case
def test_follows_the_definition(case, method):
    check(case, method)


@pytest.mark.parametrize(
    "case",
    [
        Case((700,), (700,), "causal"),
        Case((DENSE_UP_TO + 3,), (6,), "circular"),
        Case((2**14,), (30,), correlate=True),
    ],
    ids=str,
)
def test_long_sequences(case):
    """Which the matrix products fold, in two steps and in three."""
    check(case, "dft", tolerance=1e-11)


@every_method
def test_float32_is_as_exact_as_float32_can_be(method):
    check(Case((16, 16), (5, 5)), method, tolerance=3e-6, dtype=np.float32)


def brute_force(x, kernel, circular):
    """`Σ_r kernel[r] x[i + r - (k-1)//2]`, one number after the other."""
    out = np.zeros(x.shape)
    for i in np.ndindex(*x.shape[1:-1]):
        for r in np.ndindex(*kernel.shape[:-1]):
            at = [n + o - (k - 1) // 2 for n, o, k in zip(i, r, kernel.shape, strict=False)]
            inside = all(0 <= a < n for a, n in zip(at, x.shape[1:-1], strict=True))
            if inside or circular:
                at = [a % n for a, n in zip(at, x.shape[1:-1], strict=True)]
                out[(slice(None), *i)] += np.asarray(x)[(slice(None), *at)] * kernel[r]
    return out


@pytest.mark.parametrize("padding", ["same", "circular"])
@pytest.mark.parametrize(("size", "kernel"), [((5, 4), (3, 4)), ((3, 4), (7, 6))], ids=str)
def test_the_definition_itself(padding, size, kernel):
    x, k = (np.asarray(a) for a in arrays(Case(size, kernel)))
    found = convolve_reference(x, k, padding=padding, correlate=True)
    assert relative(found, brute_force(x, k, padding == "circular")) < 1e-13


@pytest.mark.parametrize("k", [4, 5])
def test_the_definition_is_numpys(k):
    x, kernel = (np.asarray(a) for a in arrays(Case((9,), (k,)), channels=1, batch=1))
    full = np.convolve(x[0, :, 0], kernel[:, 0])
    for padding, expected in (
        ("same", full[(k - 1) // 2 :][:9]),
        ("causal", full[:9]),
        ("valid", np.convolve(x[0, :, 0], kernel[:, 0], mode="valid")),
    ):
        found = convolve_reference(x, kernel, padding=padding)[0, :, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_depthwise_correlate_does_not_flip():
    x, kernel = (np.asarray(a) for a in arrays(Case((5, 6), (3, 4))))
    assert relative(depthwise_correlate(x, kernel), brute_force(x, kernel, False)) < 1e-12


@every_method
def test_keeps_the_dtypes(method):
    case = Case((6, 6), (3, 3))
    x, kernel = arrays(case, dtype=np.float32)
    expected = run(case, method, None, x, kernel, x)
    found = run(case, method, None, x.astype(jnp.bfloat16), kernel, x)
    assert [a.dtype for a in found] == ["bfloat16", "bfloat16", "float32"]
    for part, wanted in zip(found, expected, strict=True):
        assert relative(part.astype(jnp.float32), wanted) < 0.03


@every_method
def test_a_large_value_leaves_the_other_channels_alone(method):
    """Channels and samples do not mix, not even by rounding."""
    case = Case((8, 8), (5, 5))
    x, kernel = arrays(case, dtype=np.float32)
    out, _, _ = run(case, method, None, x, kernel, x)
    huge, _, _ = run(case, method, None, x.at[0, :, :, 0].mul(1e12), kernel, x)
    assert relative(huge[1:], out[1:]) < 1e-5
    assert relative(huge[0, ..., 1], out[0, ..., 1]) < 1e-5


@pytest.mark.parametrize("case", [Case((6, 5), (3, 3)), Case((9,), (9,), per_sample=True)], ids=str)
@pytest.mark.parametrize("method", ["dft", "direct"])
def test_bounded_memory_changes_nothing(case, method):
    """Six channels divide into two, three and six parts."""
    x, kernel = arrays(case, channels=6)
    whole = run(case, method, None, x, kernel, x)
    for max_bytes in (1, 8_000, 20_000):
        found = run(case, method, max_bytes, x, kernel, x)
        for part, expected in zip(found, whole, strict=True):
            assert relative(part, expected) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_several_maps_with_one_kernel(method, per_sample):
    x, kernel = arrays(Case((6, 5), (6, 5), per_sample=per_sample))
    maps, w = [x, jnp.sin(x), x * x], normal(*x.shape, seed=3)

    def together(maps, kernel):
        kernel = kernel if per_sample else kernel[None]
        maps, kernel = [*map(to_channels_first, maps)], to_channels_first(kernel)
        return map(to_channels_last, convolve_shared_kernel(maps, kernel, method=method))

    def each(maps, kernel):
        return [fft_conv(x, kernel, method="dft") for x in maps]

    def gradients(function):
        def loss(maps, kernel):
            outs = list(function(maps, kernel))
            return sum(jnp.sum(w * n * out) for n, out in enumerate(outs, start=1)), outs

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(maps, kernel)

    pairs = zip(*map(jax.tree.leaves, (gradients(together), gradients(each))), strict=True)
    for found, expected in pairs:
        assert relative(found, expected) < 1e-12


@hypothesis.settings(max_examples=8)
@hypothesis.given(st.data(), st.integers(1, 3), st.sampled_from(METHODS[1:]), st.booleans())
def test_any_shapes(data, dims, method, per_sample):
    lengths = st.tuples(*[st.integers(1, (40, 7, 4)[dims - 1])] * dims)
    size, kernel = data.draw(lengths), data.draw(lengths)
    padding = data.draw(st.sampled_from(PADDINGS))
    hypothesis.assume(padding != "causal" or dims == 1)
    hypothesis.assume(padding != "valid" or all(k <= n for k, n in zip(kernel, size, strict=True)))
    check(Case(size, kernel, padding, data.draw(st.booleans()), per_sample), method)


@every_method
@pytest.mark.parametrize("per_sample", [False, True])
def test_mapped_over_a_further_axis(method, per_sample):
    case = Case((6, 5), (3, 4), per_sample=per_sample)
    x, kernel = arrays(case)
    xs, kernels = jnp.stack([x, jnp.sin(x)]), jnp.stack([kernel, jnp.cos(kernel)])
    w = normal(*x.shape, seed=3)
    for in_axes, k in ((0, kernels), (None, kernel)):
        together = jax.vmap(lambda x, k: run(case, method, None, x, k, w), (0, in_axes))(xs, k)
        for n in range(2):
            each = run(case, method, None, xs[n], kernels[n] if in_axes == 0 else kernel, w)
            for found, expected in zip(together, each, strict=True):
                assert relative(found[n], expected) < 1e-12


@every_method
def test_gradients_of_gradients(method):
    """Σ w sin(x * k): by reverse mode twice, against `lax`, which is plain JAX."""
    x, kernel = arrays(Case((6,), (4,)))
    w = normal(*x.shape, seed=3)

    def penalty(x, kernel, method):
        def loss(x, kernel):
            return jnp.sum(w * jnp.sin(fft_conv(x, kernel, method=method)))

        gradients = jax.grad(loss, (0, 1))(x, kernel)
        return sum(jnp.sum(jnp.sin(g) * g) for g in gradients)

    twice = jax.jit(jax.grad(penalty, (0, 1)), static_argnums=2)
    reference = "lax" if method != "lax" else "direct"
    pairs = zip(twice(x, kernel, method), twice(x, kernel, reference), strict=True)
    for found, expected in pairs:
        assert relative(found, expected) < 1e-11


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_auto_is_a_method_everywhere(platform, dims):
    for n, k in ((4, 3), (4, 9), (1000, 3), (1000, 1000)):
        for per_sample in (False, True):
            method = methods.select_method(platform, (n,) * dims, (k,) * dims, per_sample)
            assert method in METHODS[1:]
            assert k**dims <= 1000 or method not in ("direct", "lax")  # minutes to compile


@pytest.mark.parametrize(
    ("x", "kernel", "kwargs", "message"),
    [
        ((2, 8, 8, 3), (3, 3, 3), dict(method="slow"), "method 'slow' is not one of"),
        ((2, 8, 8, 3), (3, 3, 3), dict(padding="full"), "padding 'full' is not one of"),
        ((2, 8, 8, 3), (3, 3, 4), {}, "got (2, 8, 8, 3) and (3, 3, 4)"),
        ((2, 8, 8, 3), (3, 3), {}, "got (2, 8, 8, 3) and (3, 3)"),
        ((2, 8, 8, 3), (3, 3, 3, 3), {}, "got (2, 8, 8, 3) and (3, 3, 3, 3)"),
        ((8, 3), (3,), {}, "got (8, 3) and (3,)"),
        (
            (2, 8, 8, 3),
            (3, 3, 3),
            dict(padding="causal"),
            "for one spatial axis, got x (2, 8, 8, 3)",
        ),
        ((2, 4, 3), (5, 3), dict(padding="valid"), "no position of x (2, 4, 3) is valid"),
    ],
)
def test_errors_are_raised_at_tracing(x, kernel, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda x, k: fft_conv(x, k, **kwargs), jnp.zeros(x), jnp.zeros(kernel))


def test_fast_lengths_have_small_factors_and_are_the_next():
    smooth = {2**a * 3**b * 5**c for a in range(11) for b in range(8) for c in range(6)}
    for n in range(1, 700):
        assert fast_length(n) == min(m for m in smooth if m >= n)
    assert math.log2(fast_length(2**20)) == 20


@pytest.mark.parametrize("method", ["lax", "direct", "dft"])
@pytest.mark.parametrize("padding, correlate", [("same", True), ("same", False), ("causal", True)])
def test_a_kernel_for_each_map(monkeypatch, method, padding, correlate):
    """Together, as on TPUs, their gradients together, and one after the other."""
    monkeypatch.setattr(methods, "UP_TO", dict.fromkeys(("cpu", "gpu", "tpu"), method))
    size, kernels = (9, 6), ((3, 5), (4, 4), (6, 1))
    if padding == "causal":
        size, kernels = (9,), ((3,), (4,), (6,))
    maps = [normal(2, *size, 2, seed=n) for n in range(3)]
    kernels = [normal(*shape, 2, seed=shape[0]) for shape in kernels]
    options = dict(padding=padding, correlate=correlate)

    def together(maps, kernels):
        joined = convolve_per_map(
            [*map(to_channels_first, maps)],
            [to_channels_first(k[None]) for k in kernels],
            **options,
        )
        return [to_channels_last(part) for part in jnp.split(joined, 3)]

    found = jax.jit(together)(maps, kernels)
    for x, kernel, out in zip(maps, kernels, found, strict=True):
        assert relative(out, convolve_reference(x, kernel, **options)) < 1e-12


def test_gradients_of_a_kernel_for_each_map():
    """Together, one map met twice: as each alone."""
    maps = [normal(3, 2, 9, 6, seed=n) for n in range(2)]
    kernels = [normal(3, 1, *size, seed=size[0]) for size in ((3, 3), (12, 5), (4, 6), (1, 2))]
    dy = normal(4 * 3, 2, 9, 6, seed=7)
    options = dict(padding="same", correlate=True)

    def together(maps, kernels):
        return convolve_per_map([maps[0], maps[1], maps[1], maps[0]], kernels, **options)

    def alone(maps, kernels):
        pairs = zip((maps[0], maps[1], maps[1], maps[0]), kernels, strict=True)
        return jnp.concatenate([convolve(x, k, method="dft", **options) for x, k in pairs])

    found, expected = (jax.vjp(way, maps, kernels) for way in (together, alone))
    assert relative(found[0], expected[0]) < 1e-12
    for a, b in zip(
        *(jax.tree.leaves(pullback(dy)) for _, pullback in (found, expected)), strict=True
    ):
        assert relative(a, b) < 1e-12
