"""The whole network, its losses and gradients against the public release's vectors, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_data import load
from nets import without_optimizations
from numpy.testing import assert_allclose

from terminator_jax import losses
from terminator_jax.convert import terminator_from_release, terminator_to_release
from terminator_jax.optim import kar3


@pytest.fixture(scope="module")
def golden():
    return load("terminator_2d_size8")


@pytest.fixture(scope="module")
def result(golden):
    """Losses, outputs, gradients and the Kar3 trajectory, computed once."""
    with without_optimizations(), jax.enable_x64(True):  # as the fixture x64 has it
        model = terminator_from_release(golden.param, param_dtype=jnp.float64)
        graph, params, other = nnx.split(model, nnx.Param, ...)
        factors = model.config.factors
        labels = jnp.asarray(golden.input["labels"])

        def loss(params, x):
            logits, inter = nnx.merge(graph, params, other, copy=True)(x, intermediates=True)
            parts = dict(
                label_smoothing=losses.label_smoothing(logits, labels),
                slow_neural=losses.slow_neural(inter.hyper_kernels, factors),
                l2=losses.l2(params),
            )
            return sum(parts.values()), (parts, logits, inter.features)

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        x = jnp.moveaxis(jnp.asarray(golden.input["x"]), 1, -1)
        (total, aux), (grads, grad_x) = step(params, x)
        trajectory, solver = [total], optax.flatten(kar3(1e-4))
        state, update, g = solver.init(params), jax.jit(solver.update), grads
        for _ in range(len(golden.kar3_loss_trajectory) - 1):
            updates, state = update(g, state)
            params = optax.apply_updates(params, updates)
            (value, _), (g, _) = step(params, x)
            trajectory.append(value)
        grads = terminator_to_release(nnx.merge(graph, grads, other))
    return model, total, aux, grads, np.moveaxis(grad_x, -1, 1), trajectory


def relative(found, expected):
    return np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected))


def test_outputs(golden, result):
    _, _, (_, logits, features), _, _, _ = result
    assert relative(logits, golden.logits) < 1e-9
    for n, feature in enumerate(features):
        assert relative(np.moveaxis(feature, -1, 1), golden.block_output[str(n)]) < 1e-9


def test_losses(golden, result):
    _, total, (parts, _, _), _, _, _ = result
    assert_allclose(total, golden.loss["total"], rtol=1e-9)
    for name, part in parts.items():
        assert_allclose(part, golden.loss[name], rtol=1e-9, err_msg=name)


def test_gradients(golden, result):
    _, _, _, grads, grad_x, _ = result
    assert relative(grad_x, golden.grad_input["x"]) < 1e-7
    assert grads.keys() == golden.grad.keys()
    largest = max(np.abs(g).max() for g in golden.grad.values())
    for name, expected in golden.grad.items():
        # A bias that a standardization removes has a gradient of rounding noise: compare with the
        # largest gradient of all there.
        scale = np.abs(expected).max()
        scale = scale if scale > 1e-12 * largest else largest
        assert np.abs(grads[name] - expected).max() < 1e-7 * scale, name


def test_kar3_trajectory(golden, result):
    assert_allclose(result[-1], golden.kar3_loss_trajectory, rtol=1e-6)


def test_configuration_is_worked_out(golden, result):
    config, expected = result[0].config, golden.config
    assert config.size == (expected["image_size"],) * 2
    assert config.block_channels[:-1] == tuple(expected["in_channels"])
    assert config.factors == tuple(expected["bottleneck_factors"])
    assert config.global_layers == tuple(expected["global_layers"])
    assert [b.size for b in config.branches] == expected["local_sizes"]
    for name in ("global_hidden", "local_hidden", "channel_hidden", "interaction_spatial_hidden"):
        assert getattr(config, name) == expected[name]


def test_round_trip_is_exact(golden, result):
    back = terminator_to_release(result[0])
    assert back.keys() == golden.param.keys()
    for name, array in golden.param.items():
        np.testing.assert_array_equal(back[name], array)
