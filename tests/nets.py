"""Modules and arrays for tests, drawn by NumPy: JAX's initializers take seconds to compile."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from terminator_jax.layers.running import running_averages


@contextlib.contextmanager
def without_optimizations():
    """Compiles faster, for tests of what is computed."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def filled(make, *, seed=0, scale=0.5):
    """The module that `make` builds, its parameters normal with deviation `scale`.

    Gabor weights come out small, too: phases of a few rad, as with ω0 = 1. Running statistics are
    those before the first step.
    """
    rng = np.random.default_rng(seed)
    model = nnx.eval_shape(make)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = scale * rng.normal(size=variable.shape)
        variable.set_value(jnp.asarray(value, variable.dtype))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
        variable.set_value(jnp.full(variable.shape, path[-1] == "var", variable.dtype))
    return model


def count_a_batch(model):
    """Makes a model's running averages those of a batch, whatever their values are."""
    for averages in running_averages(model):
        averages.count.set_value(jnp.float32(1))
    return model


def normal(*shape, seed=1, dtype=np.float64):
    """Normal values."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def largest(values):
    """The largest value, NaN if one is NaN: Python's `max` leaves NaN out."""
    return float(np.max([*values]))


def relative(found, expected):
    """The largest difference, relative to the largest value expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return np.max(np.abs(found - expected)) / np.max(np.abs(expected))
