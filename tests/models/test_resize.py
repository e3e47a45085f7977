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
    size=(15, 15), channels=2, num_classes=3, factors=(2, 2), skips=((), (0,)), dropout=(0.0, 0.0),
    branches=(LocalBranch(1, "u", "h"),), groups=2, global_hidden=3, global_layers=(2, 1),
    local_hidden=3, local_layers=1, channel_hidden=3, channel_layers=1,
    interaction_channel_hidden=3, interaction_spatial_hidden=3, interaction_layers=1,
)  # fmt: skip


def network(config):
    """A network whose tables are smooth: between random values nothing is to be read off."""
    model = filled(
        lambda: Terminator(config, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
        scale=0.3,
    )
    positions = np.prod(config.size)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "position" and variable.size == positions:
            variable.set_value(0.3 * smooth(config.size)[0, ..., 0].reshape(variable.shape))
    return model


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
    size, finer = ((15, 15), (29, 29)) if operator[0] != "1" else ((15,), (29,))
    operator = operator.split()[-1]
    model = network(dataclasses.replace(CONFIG, size=size, operator=operator))
    larger, changes = model.resized(finer)
    _, coarse = run(model, smooth(size))
    _, fine = run(larger, smooth(finer))
    for kernel, expected in zip(fine.hyper_kernels, coarse.hyper_kernels, strict=True):
        assert relative(every_other(kernel, len(size)), expected) < 1e-12
    # Sums over more positions, with smaller weights: equal up to what lies between positions.
    found, expected = every_other(fine.features[0], len(size)), np.asarray(coarse.features[0])
    assert np.std(found - expected) < 0.1 * np.std(expected)
    scale = {"dot": 15 / 29, "product": 1, "convolution": (15 / 29) ** len(size)}[operator]
    assert larger.config.operator_scale == pytest.approx(scale)
    assert any("operator_scale" in change for change in changes) == (scale != 1)
    tables = [change for change in changes if "interpolated" in change]
    assert len(tables) == 8  # of two blocks: two slow networks, two gated units
    assert f"blocks.0.rgu1.position: {size} interpolated to {finer}" in tables


def test_a_rectangle_of_as_many_positions():
    """A table has as many values as before, and another grid."""
    model = network(dataclasses.replace(CONFIG, size=(4, 8), operator="product"))
    table = np.arange(4)[:, None] * 10.0 + np.arange(8)
    model.blocks[0].slow_net.position.set_value(jnp.asarray(table.ravel()))
    resized, changes = model.resized((8, 4))
    found = resized.blocks[0].slow_net.position[...].reshape(8, 4)
    assert relative(found[::7, ::3], table[::3, ::7]) < 1e-12  # the corners stay
    assert relative(np.diff(found, axis=0), np.full((7, 4), 30 / 7)) < 1e-12
    assert "blocks.0.slow_net.position: (4, 8) interpolated to (8, 4)" in changes
    assert len(changes) == 8


def test_it_stays_the_same_model():
    options = dict(implementation="reference", remat=True, dtype=jnp.float64)
    model = filled(lambda: Terminator(CONFIG, **options, rngs=nnx.Rngs(0)))
    resized = model.resized((29, 29)).model
    assert (resized.remat, resized.dtype) == (True, jnp.float64)
    assert {block.implementation for block in resized.blocks} == {"reference"}


def test_the_scale_matters():
    model = network(CONFIG)
    larger, _ = model.resized((29, 29))
    (_, fine), (_, coarse) = run(larger, smooth((29, 29))), run(model, smooth((15, 15)))
    unscaled = nnx.merge(
        nnx.graphdef(network(dataclasses.replace(larger.config, operator_scale=1.0))),
        nnx.state(larger),
    )
    _, wrong = run(unscaled, smooth((29, 29)))
    expected = np.asarray(coarse.features[0])

    def error(inter):
        return np.std(every_other(inter.features[0], 2) - expected)

    assert error(wrong) > 2 * error(fine)


def test_there_and_back():
    model = network(CONFIG)
    back, changes = model.resized((29, 29)).model.resized((15, 15))
    assert back.config.operator_scale == pytest.approx(1)
    assert dataclasses.replace(back.config, operator_scale=1.0) == model.config
    assert changes
    logits, _ = run(model, smooth((15, 15)))
    assert relative(run(back, smooth((15, 15)))[0], logits) < 1e-12
    same, changes = model.resized((15, 15))
    assert changes == ()
    assert relative(run(same, smooth((15, 15)))[0], logits) == 0


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((15,), "size must have 2 axes like (15, 15), got (15,)"),
        ((15, 20), "the operator 'dot' needs square 2-D maps, got size (15, 20)"),
    ],
)
def test_impossible_sizes(size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        network(CONFIG).resized(size)
