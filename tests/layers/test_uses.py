"""What people do with Flax layers works for every layer and model: a line in `USED` for each."""

import copy
import functools
import inspect
import json
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from nets import count_a_batch

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
    """A module, the shapes of its inputs without the batch, and what it does not take part in.

    `make` is called with `rngs`. It takes `**kwargs` if the module has a `dtype`; the others
    compute in the dtype of their input.
    """

    make: object
    shapes: tuple
    dtype: object = jnp.float32
    forward_mode: bool = True
    empty_batch: bool = True


def _sfne(size=(4, 4), factor=1, **options):
    return lambda rngs, **kwargs: layers.SFNEBlock(
        size, 4, factor, groups=4, widths=WIDTHS, branches=BRANCH, rngs=rngs, **options, **kwargs
    )


def _terminator(size=(8, 8), **options):
    config = models.TerminatorConfig(size=size, channels=1, **TERMINATOR, **options)
    return lambda rngs, **kwargs: models.Terminator(config, rngs=rngs, **kwargs)


def _multiply(kernel, x):
    return x * kernel[None].astype(x.dtype)


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
        lambda rngs, **kwargs: layers.HyperZZWGate(4, 3, hidden=3, rngs=rngs, **kwargs),
        ((4,), (3,)),
    ),
    "RGU": Used(lambda rngs, **kwargs: layers.RGU((4, 4), 4, rngs=rngs, **kwargs), (MAP,)),
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
        _sfne((6,), 2, operator="convolution"), ((6, 4),), forward_mode=False, empty_batch=False,
    ),
    "BatchStandardization": Used(
        lambda rngs: layers.BatchStandardization(4), (MAP,), empty_batch=False
    ),
    "InstanceStandardization": Used(lambda rngs: layers.InstanceStandardization(), (MAP,)),
    "GroupInstanceBatchStandardization": Used(
        lambda rngs: layers.GroupInstanceBatchStandardization(4, 4), (MAP,), empty_batch=False
    ),
    "LambdaLayer": Used(
        lambda rngs, **kwargs: layers.LambdaLayer(
            4, 4, size=(4, 4), heads=2, keys=2, rngs=rngs, **kwargs
        ), (MAP,),
        empty_batch=False,
    ),
    "LocalAttention2D": Used(
        lambda rngs, **kwargs: layers.LocalAttention2D(8, 1, heads=2, rngs=rngs, **kwargs),
        ((4, 4, 8),),
        forward_mode=False, empty_batch=False,
    ),
    "SlowFast": Used(
        lambda rngs: layers.SlowFast(
            nnx.Linear(2, 4, dtype=jnp.float32, rngs=rngs), _multiply, (4, 4)
        ), (MAP,),
    ),
    "Terminator": Used(_terminator(), ((8, 8, 1),), forward_mode=False, empty_batch=False),
    "Terminator, odd and rectangular": Used(
        _terminator((5, 7), operator="product"), ((5, 7, 1),),
        forward_mode=False, empty_batch=False,
    ),
    "LambdaResNet": Used(
        lambda rngs, **kwargs: models.LambdaResNet(
            models.LambdaResNetConfig.digits(), rngs=rngs, **kwargs
        ),
        ((8, 8, 1),), empty_batch=False,
    ),
    "NonLinearTransformer": Used(
        lambda rngs, **kwargs: models.NonLinearTransformer(
            models.NonLinearTransformerConfig.tiny(channels=16, layers=1, window=1),
            rngs=rngs, **kwargs,
        ), ((4, 4),), dtype=jnp.int32, forward_mode=False, empty_batch=False,
    ),
    "TabularTerminator": Used(
        lambda rngs, **kwargs: models.TabularTerminator(
            models.TabularConfig(features=5, num_classes=3, widths=(4,)), rngs=rngs, **kwargs
        ), ((5,),),
    ),
}  # fmt: skip


@functools.cache
def made(name):
    module = USED[name].make(nnx.Rngs(0))
    module.eval()
    return count_a_batch(module)


@functools.cache
def made_abstractly(name, dtype=None):
    """Makes a module without values, that computes in `dtype` if it has a dtype of its own."""
    make = USED[name].make
    kwargs = dict(dtype=dtype) if "kwargs" in inspect.signature(make).parameters else {}
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0), **kwargs))
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


def test_every_public_layer_and_model_is_in_the_table():
    """As a line of its own, or as a part of one."""
    used = {type(part) for name in USED for _, part in nnx.iter_modules(made(name))}
    public = [getattr(package, n) for package in (layers, models) for n in package.__all__]
    modules = [c for c in public if isinstance(c, type) and issubclass(c, nnx.Module)]
    assert len(modules) > 20
    assert [c.__name__ for c in modules if not any(issubclass(u, c) for u in used)] == []


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
    module, arguments = made(name), inputs(name)
    if not USED[name].forward_mode or arguments[0].dtype == jnp.int32:
        return
    first, rest = arguments[0], arguments[1:]
    call = lambda x: module(x, *rest)  # noqa: E731
    lowered(lambda x: jax.jvp(call, (x,), (x,)), first)
    lowered(lambda x: jax.linearize(call, x)[1](x), first)
    scalar = lambda t: jnp.sum(call(first * t))  # noqa: E731
    lowered(jax.hessian(scalar), 1.0)


@quickly
def test_gradients_of_gradients(name):
    """Where there is no forward mode, as its docstring says."""
    module, arguments = made(name), inputs(name)
    if USED[name].forward_mode or arguments[0].dtype == jnp.int32:
        return
    first, rest = arguments[0], arguments[1:]
    scalar = lambda t: jnp.sum(module(first * t, *rest))  # noqa: E731
    jax.eval_shape(jax.grad(jax.grad(scalar)), 1.0)


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


@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16)],
)
def test_strict_promotion_of_dtypes(name, dtype, param_dtype):
    """In training, with the gradient: no two dtypes meet without a cast."""
    module = made_abstractly(name, dtype)
    module.train()
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, param_dtype), params)
    with jax.numpy_dtype_promotion("strict"):
        loss, (gradient, _) = jax.eval_shape(
            jax.value_and_grad(functools.partial(total, graph), (0, 1)),
            params, rest, inputs(name, dtype=dtype),
        )  # fmt: skip
    assert loss.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(gradient)} <= {jnp.dtype(param_dtype)}


def total(graph, params, rest, arguments):
    return jnp.sum(nnx.merge(graph, params, rest)(*arguments).astype(jnp.float32))


def test_to_linen(name):
    """`nnx.bridge.ToLinen`, in training: parameters and running averages become Linen's."""
    module, arguments = made(name), inputs(name)
    linen = nnx.bridge.ToLinen(USED[name].make)
    variables = jax.eval_shape(linen.init, jax.random.key(0), *arguments)
    apply = functools.partial(linen.apply, mutable=["batch_stats"])
    out, changed = jax.eval_shape(apply, variables, *arguments)
    assert out.shape == jax.eval_shape(module, *arguments).shape
    for collection, found, kind in (
        ("params", variables, nnx.Param), ("batch_stats", changed, nnx.BatchStat),
    ):  # fmt: skip
        expected = sorted(a.shape for a in jax.tree.leaves(nnx.state(module, kind)))
        assert sorted(a.shape for a in jax.tree.leaves(found.get(collection, {}))) == expected


def test_scan_over_stacked_blocks(name):
    """`nnx.scan` over modules that `nnx.vmap` made, in training."""
    first, *rest = inputs(name)
    out = jax.eval_shape(made(name), first, *rest)
    if (out.shape, out.dtype) != (first.shape, first.dtype):
        return

    def run(key, x):
        make = nnx.split_rngs(splits=2)(nnx.vmap(USED[name].make))
        apply = nnx.scan(
            lambda x, block: block(x, *rest), length=2, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        blocks = make(nnx.Rngs(key))
        return apply(x, blocks), nnx.state(blocks)

    scanned, state = jax.eval_shape(run, jax.random.key(0), first)
    assert scanned.shape == first.shape
    assert all(len(a) == 2 for a in jax.tree.leaves(state))


# Two devices with half of the batch each: traced, with the gradient by the parameters.
ON_DEVICES = """
import functools, json
import jax, jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from layers.test_uses import USED, inputs, made_abstractly

def pmap(call, state, arguments):
    halves = [a.reshape(2, -1, *a.shape[1:]) for a in arguments]
    out = jax.eval_shape(jax.pmap(call, "batch", in_axes=(None, 0)), state, halves)
    return jax.ShapeDtypeStruct((2 * out.shape[1], *out.shape[2:]), out.dtype)

def shard_map(call, state, arguments):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    return with_gradient(jax.shard_map(
        call, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P("batch")
    ), state, arguments)

def explicit(call, state, arguments):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        def place(spec):
            sharding = NamedSharding(mesh, spec)
            return lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        state = jax.tree.map(place(P()), state)
        arguments = jax.tree.map(place(P("batch")), arguments)
        out = with_gradient(call, state, arguments)
        assert out.sharding.spec[0] == "batch", out.sharding
        return out

def with_gradient(call, state, arguments):
    def total(state, arguments):
        out = call(state, arguments)
        return jnp.sum(out.astype(jnp.float32)), out
    gradient = jax.value_and_grad(total, has_aux=True)
    return jax.jit(gradient).trace(state, arguments).out_info[0][1]

assert jax.device_count() == 2
for name in USED:
    graph, state = nnx.split(made_abstractly(name))
    call = lambda state, arguments: nnx.merge(graph, state)(*arguments)
    for use in (pmap, shard_map, explicit):
        try:
            shape, error = use(call, state, inputs(name)).shape, ""
        except Exception as e:
            shape, error = (), repr(e)
        print(json.dumps([name, use.__name__, shape, error]), flush=True)
"""


@pytest.fixture(scope="module")
def on_devices(run_python):
    """By module and use: the shape of the result, and the error if there is one."""
    lines = run_python(ON_DEVICES, devices=2, optimize=False).splitlines()
    return {(name, use): result for name, use, *result in map(json.loads, lines)}


@pytest.mark.parametrize("use", ["pmap", "shard_map", "explicit"])
def test_a_batch_on_two_devices(on_devices, name, use):
    """`jax.pmap`, `jax.shard_map`, and inputs on a mesh with an axis of the type `Explicit`."""
    shape, error = on_devices[name, use]
    assert not error
    assert tuple(shape) == jax.eval_shape(made(name), *inputs(name)).shape
