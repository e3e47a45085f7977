"""The block against its literal reference, which is compared with the formulas' order here."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import filled, normal, relative

from terminator_jax.layers import BRANCHES, LocalBranch, SFNEBlock, SlowWidths
from terminator_jax.layers.sfne import SlowKernels, concat_order

pytestmark = pytest.mark.usefixtures("unoptimized")

SMALL = SlowWidths(**{name: 1 if "layers" in name else 3 for name in SlowWidths.__annotations__})


def make(size=(4, 4), channels=4, factor=3, dtype=None, param_dtype=jnp.float32, **kwargs):
    return filled(
        lambda: SFNEBlock(
            size, channels, factor, widths=SMALL, dtype=dtype, param_dtype=param_dtype,
            rngs=nnx.Rngs(0), **kwargs,
        )
    )  # fmt: skip


# A kernel of one position is the cheapest branch to compile.
ONE = (LocalBranch(1, "u", "h"),)
CASES = {
    "2-D": dict(skips=(2, 4), dropout=0.5, branches=(*ONE, LocalBranch(3, "x", "x"))),
    "1-D": dict(
        size=(6,), factor=2, groups=4, skips=(1,), operator="product",
        branches=(*ONE, LocalBranch(5, "h", "x"), LocalBranch(3, "x", "u")),
    ),
    "causal": dict(
        size=(6,), factor=3, groups=4, skips=(1,), operator="convolution", causal=True,
        operator_scale=0.7,
        branches=(*ONE, LocalBranch(5, "h", "x"), LocalBranch(3, "x", "u")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_follows_the_reference(x64, case):
    """Outputs, and gradients of every parameter and every map."""
    block = make(**CASES[case], param_dtype=jnp.float64)
    graph, params, other = nnx.split(block, nnx.Param, ...)
    maps = [normal(2, *block.size, c, seed=c) for c in (block.channels, *block.skips)]
    w = normal(2, *block.size, len(block.bottleneck.bias), seed=9)

    def run(implementation):
        def loss(params, maps):
            rngs = nnx.Rngs(dropout=jax.random.key(1))
            block = nnx.merge(graph, params, other, copy=True)
            block.implementation = implementation
            out = block(*maps[:1], maps[1:], rngs=rngs)
            return jnp.sum(w * out), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, maps)
        return out, grads

    out, grads = run("fused")
    expected, expected_grads = run("reference")
    assert relative(out, expected) < 1e-11
    pairs = zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_grads))
    for (path, found), wanted in pairs:
        # A bias that a standardization removes has a gradient of rounding noise, which the first
        # position's, of one value only, multiplies by 1 / sqrt(epsilon).
        scale = np.abs(wanted).max()
        noise = 1e-10 if block.causal else 1e-12
        scale = scale if scale > noise * largest else largest
        assert np.abs(found - wanted).max() < 1e-9 * scale, jax.tree_util.keystr(path)


@pytest.mark.parametrize("operator", ["convolution", "product"])
def test_nothing_causal_depends_on_what_comes_later(x64, operator):
    case = CASES["causal"] | dict(operator=operator, dropout=0.0)
    block = make(**case, param_dtype=jnp.float64)
    x, skip = normal(3, 6, 4), normal(3, 6, 1, seed=2)
    run = functools.partial(nnx.jit(lambda block, x, skip: block(x, [skip])), block)
    before = run(x, skip)
    for t in range(6):
        after = run(x.at[1, t, 2].add(0.5), skip.at[1, t].add(0.5))
        assert t == 0 or relative(after[:, :t], before[:, :t]) < 1e-12
        assert relative(after[1, t], before[1, t]) > 1e-3, t
        # What comes later sees it, in the other samples through the batch's statistics.
        assert t == 5 or relative(after[1, 5], before[1, 5]) > 1e-3, t


def test_concat_order():
    """As the specification has it; what it does not name comes last."""
    order = ["o", "l2", "skip1", "f", "o_u", "l1", "s", "l3", "o_h", "l4", "skip2", "i"]
    assert list(concat_order(4, 2)) == order
    assert list(concat_order(4, 0)) == [n for n in order if "skip" not in n]
    assert list(concat_order(6, 3))[-3:] == ["l5", "l6", "skip3"]
    assert set(concat_order(0, 0)) == {"o", "f", "o_u", "s", "o_h", "i"}


def test_branches_are_those_of_the_release():
    expected = [(3, "x", "h"), (9, "h", "x"), (5, "u", "x"), (7, "x", "u")]
    assert [(b.size, b.kernel_from, b.applied_to) for b in BRANCHES] == expected


def test_given_kernels_take_the_slow_networks_place():
    """As whole networks call it; each of the four kernels matters.

    The gate of the channels is one of them only where it closes: a standardization follows.
    """
    block, x = make(branches=ONE), normal(3, 4, 4, 4, dtype=np.float32)
    kernels = SlowKernels(**{name: net() for name, net in block.slow_nets().items()})
    run = functools.partial(nnx.jit(lambda block, kernels: block(x, kernels=kernels)), block)
    expected = run(kernels)
    assert relative(expected, nnx.jit(SFNEBlock.__call__)(block, x)) < 1e-4
    for name, kernel in kernels._asdict().items():
        assert relative(run(kernels._replace(**{name: kernel - 100})), expected) > 1e-3, name


def test_bfloat16():
    case, x = dict(branches=ONE, skips=(2,)), normal(2, 4, 4, 4, dtype=np.float32)
    run = nnx.jit(SFNEBlock.__call__)
    out = run(make(**case, dtype=jnp.bfloat16), x, [x[..., :2]])
    expected = run(make(**case), x, [x[..., :2]])
    assert (out.dtype, expected.dtype) == (jnp.bfloat16, jnp.float32)
    assert np.std(np.asarray(out, np.float32) - expected) < 0.1 * np.std(expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(implementation="fast"), "implementation 'fast' is not one of ('auto', 'reference'"),
        (dict(operator="plus"), "'plus' is not one of ('dot', 'product'"),
        (dict(causal=True), "only sequences, of size (length,), are causal, not maps (4, 4)"),
        (dict(groups=5), "4 x 3 channels do not divide into 5 groups"),
        (dict(skips=(3,)), "a skip of 3 channels cannot be tiled to 4"),
        (dict(dropout=1.0), "rate must be in [0, 1), got 1.0"),
        (dict(branches=[LocalBranch(4, "x", "x")]), "must be odd, got (4,)"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**kwargs)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 4, 5, 4), (2, 4, 4, 2)], "[(2, 4, 4, 4), (2, 4, 4, 2)], got [(2, 4, 5, 4), "),
        ([(2, 4, 4, 4)], "got [(2, 4, 4, 4)]"),
        ([(2, 4, 4, 4), (3, 4, 4, 2)], "(3, 4, 4, 2)]"),
        ([(2, 4, 4, 3), (2, 4, 4, 2)], "got [(2, 4, 4, 3), (2, 4, 4, 2)]"),
    ],
)
def test_wrong_maps(shapes, message):
    x, *skips = map(jnp.zeros, shapes)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(make(skips=(2,), branches=ONE), x, skips)


@pytest.fixture
def optimized():
    """Compiles as users do, for a test of a program and not of a formula."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.1)])
def test_the_program_that_users_run(optimized, dtype, bound):
    """Fused and optimized, with all its gradients, against the formula in float64."""
    skips, size = (2, 4), (8, 8)

    def block(implementation, dtype, param_dtype):
        # A low frequency, whose phases float32 has to enough digits.
        return make(
            size, skips=skips, implementation=implementation, omega0=5.0, dtype=dtype,
            param_dtype=param_dtype,
        )  # fmt: skip

    def run(block, maps):
        graph, params, other = nnx.split(block, nnx.Param, ...)

        def loss(params, maps):
            out = nnx.merge(graph, params, other, copy=True)(maps[0], maps[1:])
            return jnp.sum(out.astype(params.bias.dtype) * w), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, maps)
        return out, grads

    with jax.enable_x64(True):
        maps = [normal(3, *size, c, seed=c) for c in (4, *skips)]
        w = normal(3, *size, 12, seed=9)
        expected, wanted = run(block("reference", jnp.float64, jnp.float64), maps)
        expected, wanted, maps, w = jax.tree.map(np.asarray, (expected, wanted[1], maps, w))
    maps, w = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (maps, w))
    out, (_, found) = run(block("fused", dtype, jnp.float32), maps)
    assert np.std(np.asarray(out, np.float64) - expected) < bound * np.std(expected)
    for grad, right in zip(found, wanted, strict=True):
        assert np.std(np.asarray(grad, np.float64) - right) < 2 * bound * np.std(right)


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_an_infinity_stays_where_it_can_be_seen(implementation):
    """Nothing turns what is not finite into a number."""
    block = make(implementation=implementation, branches=ONE)
    x = normal(2, 4, 4, 4, dtype=np.float32)
    out = nnx.jit(SFNEBlock.__call__)(block, jnp.asarray(x).at[1, 2, 2, 0].set(jnp.inf))
    assert not np.isfinite(np.asarray(out[1])).any()


def test_forward_mode_of_the_reference_agrees_with_its_gradients(x64):
    block = make(**CASES["1-D"] | dict(implementation="reference"), param_dtype=jnp.float64)
    x, dx, skip = (normal(2, 6, c, seed=n) for n, c in enumerate((4, 4, 1)))
    call = lambda x: nnx.clone(block)(x, [skip])  # noqa: E731
    out, tangent = jax.jit(lambda x: jax.jvp(call, (x,), (dx,)))(x)
    dy = normal(*out.shape, seed=5)
    (gradient,) = jax.jit(lambda x: jax.vjp(call, x)[1](dy))(x)
    assert relative(jnp.sum(tangent * dy), jnp.sum(gradient * dx)) < 1e-9
