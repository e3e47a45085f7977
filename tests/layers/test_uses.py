"""What people do with Flax layers works for every layer and model: a line in `USED` for each."""

import copy
import functools
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from terminator_jax import layers, models
from terminator_jax.layers import LocalBranch, SlowWidths

# Without optimizations, jaxlib 0.10 lacks products of bfloat16 that are summed in float32.
quickly = pytest.mark.usefixtures("unoptimized")

BATCH = 4
WIDTHS = SlowWidths(**{name: 1 if "layers" in name else 3 for name in SlowWidths.__annotations__})
BRANCH = (LocalBranch(3, "x", "h"),)
TERMINATOR = dict(
    factors=(4,), skips=((),), dropout=(0.0,), branches=BRANCH, global_layers=(1,), groups=4,
    **{name: 1 if "layers" in name else 3 for name in SlowWidths.__annotations__
       if name != "global_layers"},
)  # fmt: skip


class Used(NamedTuple):
    """A module, the shapes of its inputs without the batch, and what it does not take part in."""

    make: object
    shapes: tuple
    dtype: object = jnp.float32
    forward_mode: bool = True
    empty_batch: bool = True


def _sfne(size=(4, 4), **kwargs):
    return lambda rngs: layers.SFNEBlock(
        size, 4, factor=2, groups=4, widths=WIDTHS, branches=BRANCH, rngs=rngs, **kwargs
    )


def _terminator(rngs, size=(8, 8), **kwargs):
    config = models.TerminatorConfig(size=size, channels=1, **{**TERMINATOR, **kwargs})
    return models.Terminator(config, rngs=rngs)


MAP = (4, 4, 4)
USED = {
    "GlobalHyperZZW dot": Used(
        lambda rngs: layers.GlobalHyperZZW((4, 4), 4, hidden=3, rngs=rngs), (MAP, MAP)
    ),
    "GlobalHyperZZW convolution": Used(
        lambda rngs: layers.GlobalHyperZZW(
            (4, 3), 4, hidden=3, operator="convolution", rngs=rngs
        ), ((4, 3, 4), (4, 3, 4)), forward_mode=False,
    ),
    "LocalHyperZZW": Used(
        lambda rngs: layers.LocalHyperZZW(3, 4, hidden=3, rngs=rngs), (MAP, MAP),
        forward_mode=False, empty_batch=False,
    ),
    "HyperZZWGate": Used(
        lambda rngs: layers.HyperZZWGate(4, 3, hidden=3, rngs=rngs), ((4,), (3,))
    ),
    "RGU": Used(lambda rngs: layers.RGU((4, 4), 4, rngs=rngs), (MAP,)),
    "HyperChannelInteraction": Used(
        lambda rngs: layers.HyperChannelInteraction(4, hidden=3, rngs=rngs), (MAP,)
    ),
    "HyperInteraction": Used(
        lambda rngs: layers.HyperInteraction(
            (4, 4), 4, channel_hidden=3, spatial_hidden=3, rngs=rngs
        ), (MAP, MAP),
    ),
    "SFNEBlock fused": Used(_sfne(), (MAP,), forward_mode=False, empty_batch=False),
    "SFNEBlock reference": Used(_sfne(implementation="reference"), (MAP,), empty_batch=False),
    "SFNEBlock of sequences": Used(
        _sfne((6,), operator="convolution"), ((6, 4),), forward_mode=False, empty_batch=False,
    ),
    "BatchStandardization": Used(
        lambda rngs: layers.BatchStandardization(), (MAP,), empty_batch=False
    ),
    "InstanceStandardization": Used(lambda rngs: layers.InstanceStandardization(), (MAP,)),
    "GroupInstanceBatchStandardization": Used(
        lambda rngs: layers.GroupInstanceBatchStandardization(4), (MAP,), empty_batch=False
    ),
    "LambdaLayer": Used(
        lambda rngs: layers.LambdaLayer(4, 4, size=(4, 4), heads=2, keys=2, rngs=rngs), (MAP,),
        empty_batch=False,
    ),
    "LocalAttention2D": Used(
        lambda rngs: layers.LocalAttention2D(8, 1, heads=2, rngs=rngs), ((4, 4, 8),),
        forward_mode=False, empty_batch=False,
    ),
    "Terminator": Used(_terminator, ((8, 8, 1),), forward_mode=False, empty_batch=False),
    "Terminator, odd and rectangular": Used(
        functools.partial(_terminator, size=(5, 7), operator="product"), ((5, 7, 1),),
        forward_mode=False, empty_batch=False,
    ),
    "LambdaResNet": Used(
        lambda rngs: models.LambdaResNet(models.LambdaResNetConfig.digits(), rngs=rngs),
        ((8, 8, 1),), empty_batch=False,
    ),
    "NonLinearTransformer": Used(
        lambda rngs: models.NonLinearTransformer(
            models.NonLinearTransformerConfig.tiny(channels=16, layers=1, window=1), rngs=rngs
        ), ((4, 4),), dtype=jnp.int32, forward_mode=False, empty_batch=False,
    ),
    "TabularTerminator": Used(
        lambda rngs: models.TabularTerminator(
            models.TabularConfig(features=5, num_classes=3, widths=(4,)), rngs=rngs
        ), ((5,),),
    ),
}  # fmt: skip


@functools.cache
def made(name):
    module = USED[name].make(nnx.Rngs(0))
    module.eval()
    return module


def inputs(name, batch=BATCH, dtype=None):
    rng, used = np.random.default_rng(0), USED[name]
    if used.dtype == jnp.int32:
        return [
            jnp.asarray(rng.integers(0, 9, (batch, *shape)), jnp.int32) for shape in used.shapes
        ]
    dtype = dtype or used.dtype
    return [jnp.asarray(rng.normal(size=(batch, *shape)), dtype) for shape in used.shapes]


@pytest.fixture(params=USED)
def name(request):
    return request.param


def lowered(function, *arguments):
    """Traces and lowers: what cannot be differentiated or mapped fails there."""
    return jax.jit(function).lower(*arguments)


@quickly
def test_copies_compute_the_same(name):
    """`nnx.split`, `merge`, `clone`, deepcopy and pickle."""
    module = made(name)
    graph, state = nnx.split(module)
    copies = [nnx.merge(graph, state), nnx.clone(module), copy.deepcopy(module)]
    copies.append(pickle.loads(pickle.dumps(module)))
    run = nnx.jit(lambda module, arguments: module(*arguments))
    expected = run(module, inputs(name))
    for other in copies:
        np.testing.assert_array_equal(run(other, inputs(name)), expected)


@quickly
def test_transformations_of_nnx(name):
    """`nnx.remat`, and `nnx.vmap` over a leading axis of the inputs."""
    module, arguments = made(name), inputs(name)
    call = nnx.remat(lambda module, *arguments: module(*arguments))
    assert jax.eval_shape(call, module, *arguments).shape
    stacked = [jnp.stack([a, a]) for a in arguments]
    vmap = nnx.vmap(lambda module, *a: module(*a), in_axes=(None, *[0] * len(stacked)))
    assert nnx.jit(vmap).lower(module, *stacked)


@quickly
def test_tabulate(name):
    arguments = inputs(name)
    assert type(made(name)).__name__ in nnx.tabulate(made(name), *arguments, depth=1)


@quickly
def test_forward_mode(name):
    """`jax.jvp`, `jax.linearize` and `jax.hessian`, where no gradient is written out."""
    if not USED[name].forward_mode:
        return _has_no_forward_mode(name)
    module, arguments = made(name), inputs(name)
    if arguments[0].dtype == jnp.int32:
        return None
    first, rest = arguments[0], arguments[1:]
    call = lambda x: module(x, *rest)  # noqa: E731
    lowered(lambda x: jax.jvp(call, (x,), (x,)), first)
    lowered(lambda x: jax.linearize(call, x)[1](x), first)
    scalar = lambda t: jnp.sum(call(first * t))  # noqa: E731
    lowered(jax.hessian(scalar), 1.0)
    return None


def _has_no_forward_mode(name):
    module, arguments = made(name), inputs(name)
    if arguments[0].dtype == jnp.int32:
        return
    call = lambda *arguments: module(*arguments)  # noqa: E731
    with pytest.raises(Exception, match=r"custom_vjp|custom_lin"):
        lowered(lambda a: jax.jvp(call, tuple(a), tuple(a)), arguments)


@quickly
def test_export_for_every_platform_with_a_batch_of_unknown_size(name):
    graph, state = nnx.split(made(name))
    leaves, tree = jax.tree.flatten(state)
    [batch] = export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in inputs(name)]

    @jax.jit
    def call(leaves, *arguments):
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))(*arguments)

    exported = export.export(call, platforms=["cpu", "cuda", "tpu"])(leaves, *shapes)
    again = export.deserialize(exported.serialize())
    for size in (1, 3):
        arguments = inputs(name, batch=size)
        found, expected = again.call(leaves, *arguments), call(leaves, *arguments)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@quickly
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(name, batch):
    if batch == 0 and not USED[name].empty_batch:
        return  # statistics of nothing
    out = nnx.jit(lambda module, a: module(*a))(made(name), inputs(name, batch=batch))
    assert out.shape[0] == batch
    assert np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_inputs_of_reduced_precision(name, dtype):
    if USED[name].dtype == jnp.int32:
        return
    out = nnx.jit(lambda module, a: module(*a))(made(name), inputs(name, dtype=dtype))
    assert np.isfinite(np.asarray(out, np.float32)).all()
