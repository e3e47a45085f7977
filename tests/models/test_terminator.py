"""The Terminator's sizes, dtypes and errors; that it computes the right thing is in the golden."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import count_a_batch, filled, normal

from terminator_jax.layers import LocalBranch
from terminator_jax.models import Terminator, TerminatorConfig

pytestmark = pytest.mark.usefixtures("unoptimized")

TINY = TerminatorConfig(
    size=(4, 4), channels=2, num_classes=3, factors=(2, 2, 1), skips=((), (0,), (1, 0)),
    dropout=(0.0, 0.5, 0.5), branches=(LocalBranch(1, "u", "h"),), groups=2,
    global_hidden=3, global_layers=(2, 1, 1), local_hidden=3, local_layers=1, channel_hidden=3,
    channel_layers=1, interaction_channel_hidden=3, interaction_spatial_hidden=3,
    interaction_layers=1,
)  # fmt: skip


def abstract(config, **kwargs):
    return nnx.eval_shape(lambda: Terminator(config, rngs=nnx.Rngs(0), **kwargs))


def count(tree):
    leaves = jax.tree.leaves(nnx.state(tree, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def slow_nets(block):
    interaction = block.hyper_interaction
    return [
        block.slow_net, block.local.slow_nets, block.channel_interaction.channel,
        interaction.channel, interaction.spatial,
    ]  # fmt: skip


def test_the_published_number_of_parameters():
    model = abstract(TerminatorConfig.cifar())
    assert [count(block) for block in model.blocks] == [53_377, 57_824, 105_188, 253_580, 863_996]
    assert count(model.head) == 2_890
    assert count(model) == 1_336_855
    assert sum(count(net) for block in model.blocks for net in slow_nets(block)) == 318_976


def test_the_published_skips():
    config = TerminatorConfig.cifar()
    assert config.block_channels == (3, 12, 36, 72, 144, 288)
    assert config.skips == ((), (), (0,), (1,), (2, 1))
    assert config.dropout == (0.0, 0.05, 0.05, 0.05, 0.05)


def test_shapes_of_a_variant():
    config = TerminatorConfig.mnist(num_classes=7)
    model = abstract(config)
    x = jnp.zeros((2, *config.size, config.channels))
    logits, inter = jax.eval_shape(lambda m, x: m(x, intermediates=True), model, x)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    channels = config.block_channels
    kernels = [(*config.size, c) for c in channels[:-1]]
    assert [k.shape for k in inter.hyper_kernels] == kernels
    features = [(2, *config.size, c) for c in channels[1:]]
    assert [f.shape for f in inter.features] == features


def test_one_dimension():
    """Sequences, with an operator that needs no square."""
    model = abstract(TerminatorConfig(**{**vars(TINY), "size": (9,), "operator": "product"}))
    assert jax.eval_shape(lambda m, x: m(x), model, jnp.zeros((2, 9, 2))).shape == (2, 3)


def primitives(jaxpr, name):
    """Every equation of a primitive, in inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner, name)


def test_bfloat16_keeps_phases_kernels_and_logits_in_float32():
    dtypes = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = count_a_batch(filled(lambda: Terminator(TINY, rngs=nnx.Rngs(0), **dtypes)))
    model.eval()
    x = jnp.zeros((2, 4, 4, 2))
    jaxpr, (logits, inter) = jax.make_jaxpr(
        lambda x: model(x, intermediates=True), return_shape=True
    )(x)
    phases = [equation.invars[0].aval.dtype for equation in primitives(jaxpr.jaxpr, "sin")]
    assert phases
    assert set(phases) == {jnp.dtype("float32")}
    assert {k.dtype for k in inter.hyper_kernels} == {jnp.dtype("float32")}
    assert {f.dtype for f in inter.features} == {jnp.dtype("bfloat16")}
    assert logits.dtype == jnp.float32


def test_bfloat16_has_the_kernels_of_float32():
    def kernels(**dtypes):
        model = filled(lambda: Terminator(TINY, rngs=nnx.Rngs(0), **dtypes))
        run = nnx.jit(lambda model, x: model(x, intermediates=True)[1].hyper_kernels)
        return run(model, jnp.zeros((2, 4, 4, 2)))

    for narrow, wide in zip(kernels(dtype=jnp.bfloat16), kernels(), strict=True):
        np.testing.assert_array_equal(narrow, wide)


def test_remat_keeps_less_and_changes_nothing(x64):
    """Gradients of the same function, which the program has fewer arrays for between its halves."""
    pictures, key = normal(2, 4, 4, 2), jax.random.key(0)
    one = dict(factors=(2,), skips=((),), dropout=(0.5,), global_layers=(1,))
    config = TerminatorConfig(**{**vars(TINY), **one})
    found = []
    for remat in (False, True):
        model = filled(
            lambda remat=remat: Terminator(
                config, remat=remat, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
            )
        )
        graph, params = nnx.split(model)

        def loss(params, graph=graph):
            return jnp.sum(nnx.merge(graph, params)(pictures, rngs=nnx.Rngs(dropout=key)) ** 2)

        residuals = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        kept = sum(x.size for x in jax.tree.leaves(residuals))
        found.append((kept, jax.jit(jax.grad(loss))(params)))
    (plain, expected), (less, same) = found
    assert less < 0.6 * plain
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_dropout_needs_a_key():
    model, x = abstract(TINY), jnp.zeros((2, 4, 4, 2))
    without = jax.make_jaxpr(lambda m, x: m(x))(model, x)
    key = jax.random.key(0)
    drops = jax.make_jaxpr(lambda m, x, key: m(x, rngs=nnx.Rngs(dropout=key)))(model, x, key)
    assert len(list(primitives(without.jaxpr, "random_bits"))) == 0
    assert len(list(primitives(drops.jaxpr, "random_bits"))) == 2


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((2, 5, 4, 2), "float32", ValueError, "pictures (batch, *(4, 4, 2)), got (2, 5, 4, 2)"),
        ((2, 4, 4, 3), "float32", ValueError, "got (2, 4, 4, 3)"),
        ((4, 4, 2), "float32", ValueError, "got (4, 4, 2)"),
        ((2, 4, 4, 2), "uint8", TypeError, "floating-point pictures, got uint8"),
    ],
)
def test_wrong_pictures(shape, dtype, error, message):
    """At tracing, so under jit, too."""
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(lambda m, x: m(x), abstract(TINY), jnp.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(dropout=(0.1,)), "dropout must have one entry per block: 3 factors"),
        (dict(global_layers=()), "global_layers is (), and must be one or more numbers"),
        (dict(global_layers=(1,)), "global_layers must have one entry per block"),
        (dict(skips=((), (1,), ())), "block 1 can only skip from blocks before it: (1,)"),
        (dict(skips=((), (-1,), ())), "block 1 can only skip from blocks before it: (-1,)"),
        (dict(groups=5), "2 x 2 channels do not divide into 5 groups"),
        (dict(operator="plus"), "'plus' is not one of"),
    ],
)
def test_wrong_configurations(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        abstract(TerminatorConfig(**{**vars(TINY), **overrides}))
