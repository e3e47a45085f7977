"""A network asked for another size: the same functions of the same coordinates."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import filled, relative

from terminator_jax.layers import LocalBranch
from terminator_jax.models import Terminator, TerminatorConfig

pytestmark = pytest.mark.usefixtures("x64")

# Kernels of one position see no grid; small weights make kernels vary slowly.
CONFIG = TerminatorConfig(
    size=(16, 16), channels=2, num_classes=3, factors=(2, 2), skips=((), (0,)), dropout=(0.0, 0.0),
    branches=(LocalBranch(1, "u", "h"),), groups=2, global_hidden=3, global_layers=(2, 1),
    local_hidden=3, local_layers=1, channel_hidden=3, channel_layers=1,
    interaction_channel_hidden=3, interaction_spatial_hidden=3, interaction_layers=1,
)  # fmt: skip


def network(config):
    return filled(
        lambda: Terminator(config, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
        scale=0.3,
    )


def smooth(size):
    """Two samples of two channels, functions of the coordinates."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in size], indexing="ij")
    total = sum((n + 1) * a for n, a in enumerate(axes))
    maps = [[np.sin(total), np.cos(2 * total)], [np.cos(total + 1), np.sin(total) ** 2]]
    return jnp.asarray(np.moveaxis(np.array(maps), 1, -1))


@jax.jit
def run(model, x):
    return model(x, intermediates=True)


def every_other(x, dims):
    """What a map on the finer grid has at the coarser one's positions."""
    return x[(..., *[slice(None, None, 2)] * dims, slice(None))]


@pytest.mark.parametrize("operator", ["dot", "product", "convolution", "1-D convolution"])
def test_a_finer_grid_sees_the_same_functions(operator):
    size, finer = ((16, 16), (31, 31)) if operator[0] != "1" else ((16,), (31,))
    operator = operator.split()[-1]
    model = network(dataclasses.replace(CONFIG, size=size, operator=operator))
    larger, changes = model.resized(finer)
    _, coarse = run(model, smooth(size))
    _, fine = run(larger, smooth(finer))
    for kernel, expected in zip(fine.hyper_kernels, coarse.hyper_kernels, strict=True):
        assert relative(every_other(kernel, len(size)), expected) < 1e-12
    # Sums over more positions, with smaller weights: equal up to what lies between positions.
    found, expected = every_other(fine.features[-1], len(size)), np.asarray(coarse.features[-1])
    assert np.std(found - expected) < 0.1 * np.std(expected)
    scale = {"dot": 16 / 31, "product": 1, "convolution": (16 / 31) ** len(size)}[operator]
    assert larger.config.operator_scale == pytest.approx(scale)
    assert any("operator_scale" in change for change in changes) == (scale != 1)
    tables = [change for change in changes if "interpolated" in change]
    assert len(tables) == 8  # of two blocks: two slow networks, two gated units
    assert f"blocks.0.rgu1.position: {size} interpolated to {finer}" in tables


@pytest.mark.parametrize("operator", ["dot", "convolution"])
def test_the_scale_matters(operator):
    model = network(dataclasses.replace(CONFIG, operator=operator))
    larger, _ = model.resized((31, 31))
    (_, fine), (_, coarse) = run(larger, smooth((31, 31))), run(model, smooth((16, 16)))
    unscaled = nnx.merge(
        nnx.graphdef(network(dataclasses.replace(larger.config, operator_scale=1.0))),
        nnx.state(larger),
    )
    _, wrong = run(unscaled, smooth((31, 31)))
    expected = np.asarray(coarse.features[-1])

    def error(inter):
        return np.std(every_other(inter.features[-1], 2) - expected)

    assert error(wrong) > 3 * error(fine)


def test_there_and_back():
    model = network(CONFIG)
    back, changes = model.resized((31, 31)).model.resized((16, 16))
    assert back.config == model.config
    assert changes
    logits, _ = run(model, smooth((16, 16)))
    assert relative(run(back, smooth((16, 16)))[0], logits) < 1e-12
    same, changes = model.resized((16, 16))
    assert changes == ()
    assert relative(run(same, smooth((16, 16)))[0], logits) == 0


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16,), "size must have 2 axes like (16, 16), got (16,)"),
        ((16, 20), "the operator 'dot' needs square maps, got size (16, 20)"),
    ],
)
def test_impossible_sizes(size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        network(CONFIG).resized(size)
