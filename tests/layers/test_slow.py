"""Slow networks: several local ones together, initial values, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import filled, normal, relative
from numpy.testing import assert_allclose

from terminator_jax.layers import (
    ChannelSlowNet,
    GlobalSlowNet,
    LocalSlowNet,
    LocalSlowNets,
    SpatialSlowNet,
    initializers,
)
from terminator_jax.layers.initializers import gabor_init, kaiming_normal, ones, uniform, zeros
from terminator_jax.layers.magnet import generate_kernels

pytestmark = pytest.mark.usefixtures("unoptimized")

SIZES = (3, 5, 1, 5)


def small(kind, size, ndim):
    return kind(size, 4, ndim=ndim, hidden=3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))


def alone(nets, n):
    """The n-th of several local slow networks, as one of its own."""
    net = filled(lambda: small(LocalSlowNet, nets.sizes[n], nets.ndim))
    start = sum(k**nets.ndim for k in nets.sizes[:n])
    for name, param in nnx.state(net, nnx.Param).items():
        stacked = getattr(nets, name)[...]
        own = slice(start, start + param.size) if name == "position" else slice(n, n + 1)
        getattr(net, name).set_value(stacked[own])
    return net


@pytest.mark.parametrize("ndim", [1, 2])
def test_several_local_networks_are_each_its_own(x64, ndim):
    """Kernels, and gradients of the maps, whatever the other kernels' sizes."""
    nets = filled(lambda: small(LocalSlowNets, SIZES, ndim))
    maps = [normal(2, *(6, 7)[:ndim], 4, seed=n) for n in range(len(SIZES))]
    kernels = nnx.jit(type(nets).__call__)(nets, maps)
    assert kernels.shape == (5,) * ndim + (len(SIZES), 4)
    for n, size in enumerate(SIZES):
        margin = (5 - size) // 2
        own = (slice(margin, 5 - margin),) * ndim
        expected = nnx.jit(LocalSlowNet.__call__)(alone(nets, n), maps[n])
        assert relative(kernels[own][..., n, :], expected) < 1e-12
        assert relative(nets.crop(kernels, n), expected) < 1e-12
        assert (kernels[..., n, :].at[own].set(0) == 0).all()


def test_kernels_depend_on_the_mean_of_the_batch_only(x64):
    net = filled(lambda: small(LocalSlowNet, 3, 2))
    x, run = normal(4, 6, 6, 4), functools.partial(nnx.jit(LocalSlowNet.__call__), net)
    mean = jnp.broadcast_to(x.mean(0, keepdims=True), x.shape)
    assert relative(run(mean), run(x)) < 1e-12
    assert relative(run(2 * x), run(x)) > 1e-3


def test_networks_evaluated_together_are_each_its_own(x64):
    """Values and gradients, of networks of several sizes, depths and dtypes."""

    def make():
        wide = dict(param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        return nnx.List(
            [
                GlobalSlowNet((4, 3), 5, hidden=3, **wide),
                ChannelSlowNet(7, hidden=3, **wide),
                SpatialSlowNet((2, 2), hidden=3, **wide),
                ChannelSlowNet(5, hidden=3, layers=1, **wide),
                ChannelSlowNet(5, hidden=3, rngs=nnx.Rngs(0)),
            ]
        )

    graph, params = nnx.split(filled(make))

    def run(function):
        def loss(params):
            kernels = function(nnx.merge(graph, params))
            return sum(jnp.sum(jnp.sin(k)) for k in kernels), kernels

        (_, kernels), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return jax.tree.leaves((kernels, grads))

    for found, expected in zip(
        run(generate_kernels), run(lambda ns: [n() for n in ns]), strict=True
    ):
        assert found.dtype == expected.dtype
        wide = found.dtype == jnp.float64
        assert relative(found, expected) < (1e-12 if wide else 1e-4)


def test_initial_values():
    """The specification's distributions, by bounds and second moments of many draws."""
    hidden, layers, d = 512, 2, 2
    net = GlobalSlowNet((4, 6), 40, hidden=hidden, layers=layers, rngs=nnx.Rngs(3))
    bound = np.sqrt(3 / hidden)
    for weight, largest in ((net.weight, bound), (net.out_weight, bound / np.sqrt(24))):
        assert_allclose(np.abs(weight[...]).max(), largest, rtol=0.01)
        assert_allclose(np.std(weight[...]), largest / np.sqrt(3), rtol=0.05)
    for layer in range(layers + 1):
        shape = 6 / (layer + 1)
        second_moment = (2 * np.pi * 2000) ** 2 / d / 3 * (shape + shape**2)
        found = np.mean(net.gabor_weight[layer] ** 2)
        assert_allclose(found, second_moment, rtol=0.25)
    assert (net.bias[...] == 1).all()
    for zero in (net.gabor_bias, net.position, net.out_bias):
        assert (zero[...] == 0).all()


def test_initial_values_of_local_networks():
    net = nnx.jit(lambda: LocalSlowNets((3, 9), 30, rngs=nnx.Rngs(0)))()
    hidden = 32
    for n, size in enumerate((3, 9)):
        largest = np.sqrt(3 / hidden) / size
        assert_allclose(np.abs(net.out_weight[n]).max(), largest, rtol=0.02)
    for values, fan_in in (
        (net.reduce_weight, 30), (net.reduce_bias, 30), (net.mix_weight, 32), (net.mix_bias, 32),
    ):  # fmt: skip
        assert_allclose(np.abs(values[...]).max(), fan_in**-0.5, rtol=0.1)
    for values in (net.weight, net.context_weight):
        assert_allclose(np.abs(values[...]).max(), np.sqrt(3 / hidden), rtol=0.01)
    for values, expected in (
        (net.bias, 1), (net.context_bias, 1), (net.position, 0), (net.gabor_bias, 0),
        (net.out_bias, 0),
    ):  # fmt: skip
        assert (values[...] == expected).all()
    # Not one net drawn twice.
    assert relative(net.gabor_weight[0], net.gabor_weight[1]) > 0.1


INITIALIZERS = (
    gabor_init(1.0),
    uniform(0.5),
    initializers.normal(0.5),
    kaiming_normal,
    zeros,
    ones,
)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("init", INITIALIZERS)
def test_initial_values_are_the_same_while_tracing(init, dtype):
    key = jax.random.key(0)
    plain, traced = (f(lambda: init(key, (3, 2, 4), dtype))() for f in (lambda g: g, jax.jit))
    assert plain.shape == (3, 2, 4) and plain.dtype == dtype
    assert isinstance(plain, jax.Array)
    wide = [np.asarray(x, np.float64) for x in (plain, traced)]
    assert_allclose(*wide, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize("init", INITIALIZERS)
def test_initial_values_of_another_shape_need_no_program(init, caplog):
    key = jax.random.key(0)

    def compiled(function, *arguments):
        caplog.clear()
        with jax.log_compiles():
            function(*arguments)
        return [r.message for r in caplog.records if r.message.startswith("Compiling")]

    init(key, (3, 2, 4))
    assert compiled(init, key, (3, 2, 5)) == []
    assert compiled(jax.jit(lambda x: 2 * x), 1.0)  # where one is needed, JAX says so


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: GlobalSlowNet((0, 4), 3, rngs=r), "must be positive, got (0, 4), 3, 64, 2"),
        (lambda r: GlobalSlowNet((4, 4), 3, layers=0, rngs=r), "got (4, 4), 3, 64, 0"),
        (lambda r: ChannelSlowNet(0, rngs=r), "got (0,), 1, 32, 2"),
        (lambda r: LocalSlowNets((3, 4), 3, rngs=r), "must be odd, got (3, 4)"),
        (lambda r: LocalSlowNets((), 3, rngs=r), "must be odd, got ()"),
        (lambda r: LocalSlowNet(-1, 3, rngs=r), "must be odd, got (-1,)"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        nnx.eval_shape(lambda: make(nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 6, 6, 4)], "2 kernels need as many maps, got 1"),
        ([(2, 6, 6, 4), (2, 6, 6, 5)], "expected (batch, 2 spatial axes, 4), got (2, 6, 6, 5)"),
        ([(2, 6, 6, 4), (2, 6, 5, 4)], "of one size, got [(2, 6, 6, 4), (2, 6, 5, 4)]"),
        ([(2, 6, 4), (2, 6, 4)], "expected (batch, 2 spatial axes, 4), got (2, 6, 4)"),
    ],
)
def test_wrong_maps(shapes, message):
    nets = filled(lambda: LocalSlowNets((3, 5), 4, hidden=3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(nets, [jnp.zeros(shape) for shape in shapes])
