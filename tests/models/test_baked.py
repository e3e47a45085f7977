"""Models for inference: constants in the place of slow networks, and the same logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import filled, normal, relative

import terminator_jax
from terminator_jax.layers import LocalBranch
from terminator_jax.models import Terminator, TerminatorConfig

TINY = TerminatorConfig(
    size=(4, 4), channels=2, num_classes=3, factors=(2, 2, 1), skips=((), (0,), (1, 0)),
    dropout=(0.0, 0.5, 0.5), branches=(LocalBranch(1, "u", "h"), LocalBranch(3, "h", "x")),
    groups=2, global_hidden=5, global_layers=(2, 1, 1), local_hidden=5, local_layers=1,
    channel_hidden=5, channel_layers=1, interaction_channel_hidden=5,
    interaction_spatial_hidden=5, interaction_layers=1,
)  # fmt: skip
# One block less compiles in half the time.
SMALLER = dict(factors=(2, 1), skips=((), (0,)), dropout=(0.0, 0.5), global_layers=(2, 1))
CASES = {
    "dot, two skips": {},
    "product, odd": dict(SMALLER, size=(5, 3), operator="product"),
    "sequences": dict(SMALLER, size=(6,), operator="convolution", operator_scale=0.5),
    "one group": dict(SMALLER, groups=1),
}
call = nnx.jit(Terminator.__call__)


def make(**changes):
    config = dataclasses.replace(TINY, **changes)
    return filled(lambda: Terminator(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))


def calibrated(**changes):
    model = make(**changes)
    shape = (*model.config.size, model.config.channels)
    terminator_jax.calibrate(model, [normal(6, *shape, seed=n) for n in range(3)])
    return model, normal(4, *shape, seed=9)


@pytest.mark.parametrize("case", CASES)
def test_it_gives_the_same_logits(x64, case):
    model, x = calibrated(**CASES[case])
    baked = model.bake()
    expected = call(model, x)
    assert relative(call(baked, x[:1]), expected[:1]) < 1e-9
    model.train()
    assert relative(call(model.bake(), x), expected) < 1e-9


def test_a_model_in_training_stays_in_training(x64):
    model, x = calibrated(**SMALLER)
    expected = call(model, x)
    model.train()
    assert relative(call(model.bake(), x), expected) < 1e-9
    assert relative(call(model, x), expected) > 1e-3


def test_it_has_no_slow_network_and_less_of_everything(x64):
    """Slow networks are the only ones that take a sine."""
    model, x = calibrated(**SMALLER)
    baked = model.bake()

    def program(model):
        graph, state = nnx.split(model)
        return jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x)

    before, after = program(model), program(baked)
    assert before.as_text().count("stablehlo.sine") > 0
    assert after.as_text().count("stablehlo.sine") == 0
    assert after.cost_analysis()["flops"] < before.cost_analysis()["flops"]
    sizes = [sum(a.size for a in jax.tree.leaves(nnx.state(m))) for m in (model, baked)]
    assert sizes[1] < sizes[0]


def test_it_is_called_like_the_model(x64):
    model, x = calibrated(**SMALLER)
    baked = model.bake()
    (_, expected), (_, found) = (
        nnx.jit(lambda m, x: m(x, rngs=None, intermediates=True))(m, x) for m in (model, baked)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative(a, b) < 1e-9
    assert baked.bake() is baked
    with pytest.raises(ValueError, match=r"one size, \(4, 4\), and cannot become \(8, 8\)"):
        baked.resized((8, 8))
    with pytest.raises(ValueError, match=r"expected pictures \(batch, \*\(4, 4, 2\)\)"):
        baked(x[:, :3])


def test_gradients_and_tables_of_it(x64):
    """As explanations of single predictions need them."""
    model, x = calibrated(**SMALLER)
    baked = model.bake()
    model.eval()
    gradient = nnx.jit(lambda m, x: jax.grad(lambda x: jnp.sum(m(x) ** 2))(x))
    assert relative(gradient(baked, x), gradient(model, x)) < 1e-9
    assert "BakedSFNEBlock" in nnx.tabulate(baked, x)
    assert call(baked, x[:0]).shape == call(model, x[:0]).shape == (0, 3)
    with pytest.raises(ValueError, match=r"outside of jax\.jit: bake it first"):
        jax.jit(lambda x: model.bake()(x))(x)


def test_bfloat16(unoptimized):
    config = dataclasses.replace(TINY, **SMALLER)
    model = filled(lambda: Terminator(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    x = normal(4, 4, 4, 2, dtype=np.float32)
    model.train()
    terminator_jax.calibrate(model, [x])
    found, expected = call(model.bake(), x), call(model, x)
    assert found.dtype == expected.dtype == jnp.float32
    assert relative(found, expected) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"no running averages: train it, or call terminator_jax\.calibrate"),
        (dict(size=(6,), operator="convolution", causal=True), "a causal model cannot be baked"),
    ],
)
def test_what_cannot_be_baked(x64, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes).bake()
