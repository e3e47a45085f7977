"""BS, IS and G-IBS against NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import normal, relative

from terminator_jax.ops.standardize import (
    batch_standardize,
    group_standardize,
    instance_standardize,
    rsqrt_clamped,
)

SHAPES = [(3, 10, 6), (2, 4, 5, 6), (2, 3, 2, 4, 6)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def skewed(shape):
    """Every sample and channel has a mean and a scale of its own."""
    x = np.asarray(normal(*shape))
    scale = np.exp(
        np.random.default_rng(7).normal(size=(shape[0], *(1,) * (x.ndim - 2), shape[-1]))
    )
    return jnp.asarray(x * scale + 3 * scale**2)


def standardized(x, axes, epsilon=1e-5):
    x = np.asarray(x)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def so_far(function, x):
    """What `function` makes of the sequence up to each position, there."""
    return np.stack([function(x[:, : t + 1])[:, t] for t in range(x.shape[1])], 1)


def over_batch(x, epsilon=1e-5):
    return standardized(x, tuple(range(np.ndim(x) - 1)), epsilon)


def over_space(x, epsilon=1e-5):
    return standardized(x, tuple(range(1, np.ndim(x) - 1)), epsilon)


def in_groups(x, groups):
    parts = np.split(np.asarray(x), groups, axis=-1)
    return np.concatenate([[over_batch, over_space][n % 2](p) for n, p in enumerate(parts)], -1)


@shapes
def test_batch(x64, shape):
    x = skewed(shape)
    assert relative(batch_standardize(x), over_batch(x)) < 1e-12
    assert relative(batch_standardize(x, epsilon=0.5), over_batch(x, 0.5)) < 1e-12


@shapes
def test_instance(x64, shape):
    x = skewed(shape)
    assert relative(instance_standardize(x), over_space(x)) < 1e-12
    assert relative(instance_standardize(x, epsilon=0.5), over_space(x, 0.5)) < 1e-12


@shapes
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_group(x64, shape, groups):
    x = skewed(shape)
    assert relative(group_standardize(x, groups=groups), in_groups(x, groups)) < 1e-12


@pytest.mark.parametrize("function", [batch_standardize, instance_standardize])
def test_gradients(x64, function):
    """Of a standardization: the cotangent less its parts along 1 and along the output."""
    axes = (0, 1, 2) if function is batch_standardize else (1, 2)
    x, w = skewed((2, 4, 3, 2)), normal(2, 4, 3, 2, seed=5)
    grad = jax.grad(lambda x: jnp.sum(w * function(x, epsilon=0.0)))(x)
    y, sigma = standardized(x, axes, 0.0), np.std(x, axes, keepdims=True)
    along_y = y * np.mean(w * y, axes, keepdims=True)
    assert relative(grad, (w - np.mean(w, axes, keepdims=True) - along_y) / sigma) < 1e-11


@pytest.mark.parametrize("function", [batch_standardize, instance_standardize, group_standardize])
def test_constant_maps_become_zero(function):
    """No division by zero, and no gradient that is not finite."""
    x = jnp.full((2, 4, 4, 12), 3.0)
    value, grad = jax.value_and_grad(lambda x: jnp.sum(function(x) ** 2))(x)
    assert value < 1e-5
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("function", [batch_standardize, instance_standardize, group_standardize])
def test_bfloat16_has_float32_statistics(function):
    """The sum of 4096 values near 1 is far beyond what bfloat16 can count."""
    x = (1 + 0.1 * normal(1, 64, 64, 12, dtype=np.float32)).astype(jnp.bfloat16)
    y = function(x)
    assert y.dtype == jnp.bfloat16
    assert relative(y.astype(jnp.float32), function(x.astype(jnp.float32))) < 0.01


def test_float32_with_a_mean_of_many_deviations(x64):
    x = 30 + normal(2, 16, 16, 3)
    narrow = instance_standardize(x.astype(jnp.float32))
    assert narrow.dtype == jnp.float32
    assert relative(narrow, over_space(x)) < 1e-3


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        (batch_standardize, (4, 3), "expected (batch, *spatial, channels), got shape (4, 3)"),
        (instance_standardize, (4, 3), "got shape (4, 3)"),
        (group_standardize, (4, 3), "got shape (4, 3)"),
        (
            group_standardize,
            (2, 4, 30),
            "30 channels do not divide into 12 groups: x is (2, 4, 30)",
        ),
    ],
)
def test_errors(function, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(function, jnp.zeros(shape))


def test_causal_statistics_are_those_so_far(x64):
    x = skewed((3, 7, 6))
    assert relative(instance_standardize(x, causal=True), so_far(over_space, x)) < 1e-10
    assert relative(batch_standardize(x, causal=True), so_far(over_batch, x)) < 1e-10
    groups = so_far(lambda part: group_standardize(jnp.asarray(part), groups=3), x)
    assert relative(group_standardize(x, groups=3, causal=True), groups) < 1e-10


@pytest.mark.parametrize("function", [instance_standardize, batch_standardize, group_standardize])
def test_only_sequences_are_causal(function):
    with pytest.raises(ValueError, match=r"needs \(batch, length, channels\), got shape \(2, 4, 5"):
        function(jnp.ones((2, 4, 5, 12)), causal=True)


def test_a_clamped_root(x64):
    """Against the definition; nothing flows back from below the minimum."""
    x = jnp.array([4.0, 0.25, 0.01, -1.0])
    value, slope = jax.vmap(jax.value_and_grad(lambda x: rsqrt_clamped(x, 0.1)))(x)
    np.testing.assert_allclose(value, np.maximum(x, 0.1) ** -0.5, rtol=1e-13)
    np.testing.assert_allclose(slope, [-0.0625, -4, 0, 0], rtol=1e-13)
