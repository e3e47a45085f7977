"""The Linen modules against the NNX layers, and what Linen's own rules ask of them."""

import dataclasses
import inspect
import json
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from nets import count_a_batch, filled, normal, relative

from terminator_jax import layers
from terminator_jax.layers import LocalBranch, SlowWidths, linen

pytestmark = pytest.mark.usefixtures("unoptimized")

SIZE, CHANNELS = (4, 4), 4
X, U = (normal(2, *SIZE, CHANNELS, seed=n, dtype=np.float32) for n in (1, 2))
WIDE = normal(2, *SIZE, 16, seed=3, dtype=np.float32)
NET = dict(hidden=3, layers=1)
RUNNING = dict(use_running_average=True)
BRANCHES = (LocalBranch(1, "x", "u"), LocalBranch(3, "u", "x"))
WIDTHS = SlowWidths(**{name: 1 if "layers" in name else 3 for name in SlowWidths.__annotations__})

# Of each module: what it needs, what makes it small, what it is called with.
CASES = {
    "RGU": ((SIZE, CHANNELS), {}, [X]),
    "BatchStandardization": ((CHANNELS,), RUNNING, [X]),
    "ChannelDropout": ((0.5,), {}, [X]),
    "ChannelSlowNet": ((CHANNELS,), NET, []),
    "FeatureSlowNet": ((3, CHANNELS), NET, []),
    "GlobalHyperZZW": ((SIZE, CHANNELS), NET, [X, U]),
    "GlobalSlowNet": ((SIZE, CHANNELS), NET, []),
    "GroupInstanceBatchStandardization": ((CHANNELS, 2), RUNNING, [X]),
    "HyperChannelInteraction": ((CHANNELS,), NET, [X]),
    "HyperInteraction": (
        (SIZE, CHANNELS), dict(channel_hidden=3, spatial_hidden=3, layers=1), [X, U],
    ),
    "HyperZZWGate": ((CHANNELS, 3), NET, [X, U[..., :3]]),
    "InstanceStandardization": ((), {}, [X]),
    "LambdaLayer": (
        (CHANNELS, 8), dict(size=SIZE, heads=2, keys=3) | RUNNING, [X],
    ),
    "LocalAttention2D": ((16, 1), {}, [WIDE]),
    "LocalBranches": ((BRANCHES, CHANNELS), NET | RUNNING, [dict(x=X, u=U)]),
    "LocalHyperZZW": ((3, CHANNELS), NET | RUNNING, [X, U]),
    "LocalSlowNet": ((3, CHANNELS), NET, [X]),
    "LocalSlowNets": (((1, 3), CHANNELS), NET, [(X, U)]),
    "MAGNet": ((SIZE, CHANNELS), NET, []),
    "SFNEBlock": (
        (SIZE, CHANNELS, 3), dict(skips=(2,), branches=BRANCHES[:1], widths=WIDTHS) | RUNNING,
        [X, [U[..., :2]]],
    ),
    "SpatialSlowNet": ((SIZE,), NET, []),
}  # fmt: skip
# Those whose Linen version is made in another way.
SPECIAL = {
    "SlowFast": (
        lambda rngs: layers.SlowFast(nnx.Linear(2, CHANNELS, rngs=rngs), times, SIZE),
        lambda: linen.SlowFast(nn.Dense(CHANNELS), times, SIZE),
        [X],
    ),
    "pointwise": (
        lambda rngs: layers.pointwise(CHANNELS, 6, rngs=rngs), lambda: linen.pointwise(6), [X],
    ),
}  # fmt: skip
WITH_PARAMETERS = [n for n in CASES if "Standard" not in n and n != "ChannelDropout"]


# Those with running averages.
AVERAGING = [name for name, case in CASES.items() if "use_running_average" in case[1]]


def times(kernel, x):
    return x * kernel[None]


def nnx_layer(name, *args, **kwargs):
    layer = getattr(layers, name)
    takes_rngs = name in WITH_PARAMETERS
    return layer(*args, **kwargs, **(dict(rngs=nnx.Rngs(0)) if takes_rngs else {}))


def pair(name):
    """The NNX layer with values, the Linen module, and what to call them with."""
    if name in SPECIAL:
        make, make_linen, inputs = SPECIAL[name]
        return filled(lambda: make(nnx.Rngs(0))), make_linen(), inputs
    args, kwargs, inputs = CASES[name]
    layer = count_a_batch(filled(lambda: nnx_layer(name, *args, **kwargs)))
    return layer, getattr(linen, name)(*args, **kwargs), inputs


def plain(tree, kind=nnx.Param):
    """The parameters of an NNX layer, or their gradients, as Linen has them."""
    if isinstance(tree, dict):
        return tree
    return nnx.to_pure_dict(nnx.state(tree, kind) if isinstance(tree, nnx.Module) else tree)


def everything(layer):
    """All the variables of an NNX layer, as Linen has them."""
    kinds = dict(params=nnx.Param, batch_stats=nnx.BatchStat)
    found = {name: plain(layer, kind) for name, kind in kinds.items()}
    return {name: values for name, values in found.items() if values}


def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


def variables_of(module, *inputs):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)


def test_every_layer_has_a_linen_module():
    modules = {
        name
        for name in layers.__all__
        if inspect.isclass(found := getattr(layers, name)) and issubclass(found, nnx.Module)
    }
    assert set(linen.__all__) == modules | {"pointwise"} == {*CASES, *SPECIAL}
    for name in modules:
        found = getattr(linen, name)
        assert issubclass(found, nn.Module)
        assert (found.__name__, found.__module__) == (name, linen.__name__)


def test_layers_do_not_import_it(run_python):
    out = run_python(
        "import sys, terminator_jax.layers as l; print(f'{l.__name__}.linen' in sys.modules)"
    )
    assert out == "False\n"


@pytest.mark.parametrize("name", [*CASES, *SPECIAL])
def test_computes_what_the_layer_computes(name):
    """Outputs, and gradients of parameters and inputs."""
    layer, module, inputs = pair(name)
    graph, state, other = nnx.split(layer, nnx.Param, ...)
    rest = {name: values for name, values in everything(layer).items() if name != "params"}

    def run(function, params):
        def loss(params, inputs):
            out = function(params, *inputs)
            return sum(jnp.sum(jnp.sin(o)) for o in jax.tree.leaves(out)), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, inputs)
        return dict(out=out, dparams=plain(grads[0]), dinputs=grads[1])

    @jax.jit  # one program for both, which compiles what they share once
    def both(state):
        found = run(lambda p, *args: module.apply({"params": p, **rest}, *args), plain(state))
        return found, run(lambda s, *args: nnx.merge(graph, s, other, copy=True)(*args), state)

    found, expected = both(state)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    largest = {
        k: max((np.abs(a).max() for a in jax.tree.leaves(v)), default=0)
        for k, v in expected.items()
    }
    assert largest["out"] > 0 and max(largest["dparams"], largest["dinputs"]) > 0
    for key, scale in largest.items():
        for a, b in zip(jax.tree.leaves(found[key]), jax.tree.leaves(expected[key]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale, err_msg=key)


@pytest.mark.parametrize("name", [*CASES, *SPECIAL])
def test_collections(name):
    """The variables are the NNX layer's, by name, shape and dtype, and nothing comes along."""
    layer, module, inputs = pair(name)
    variables = everything(layer)
    assert set(variables) <= ({"params", "batch_stats"} if name in AVERAGING else {"params"})
    assert shapes(variables_of(module, *inputs)) == shapes(variables)
    _, changed = jax.eval_shape(lambda v: module.apply(v, *inputs, mutable=True), variables)
    assert set(changed) <= set(variables)


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_the_layers(name):
    args, _, inputs = CASES[name]
    if name == "SFNEBlock":
        inputs = inputs[:1]
    needed = dict(size=SIZE) if name == "LambdaLayer" else {}
    module = getattr(linen, name)(*args, **needed)
    layer = nnx.eval_shape(lambda: nnx_layer(name, *args, **needed))
    assert shapes(variables_of(module, *inputs)) == shapes(everything(layer))
    defaults = {f.name: f.default for f in dataclasses.fields(module)}
    signature = inspect.signature(getattr(layers, name).__init__)
    for field, parameter in signature.parameters.items():
        if parameter.default is not parameter.empty:
            assert defaults[field] == parameter.default, field


def test_initial_values():
    """Drawn as the layer draws them, from Linen's key."""
    module = linen.RGU(SIZE, CHANNELS)
    one, again, other = (
        flatten_dict(module.init(jax.random.key(n), X)["params"], sep="/") for n in (0, 0, 1)
    )
    for name, value in one.items():
        np.testing.assert_array_equal(value, again[name])
        assert bool((value == other[name]).all()) == ("kernel" not in name), name
    bound = np.sqrt(3 / CHANNELS)
    assert 0.8 * bound < np.abs(one["k/kernel"]).max() < bound
    kernel = linen.pointwise(64).init(jax.random.key(0), jnp.ones((1, 64)))["params"]["kernel"]
    assert abs(kernel.std() / np.sqrt(2 / 64) - 1) < 0.05


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_other_parameters_are_refused(name):
    """Missing, left over, of another shape, or none; also where Linen might draw new ones."""
    layer, module, inputs = pair(name)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, *inputs):
            return module.copy(name="inner")(*inputs)

    rest = {name: {"inner": v} for name, v in everything(layer).items() if name != "params"}
    right = flatten_dict(plain(layer), sep="/")
    key = sorted(right)[-1]
    value = right[key]
    less = {k: v for k, v in right.items() if k != key}
    wrong = {
        f"{key} {value.shape} is missing": less,
        f"other/{key} {value.shape} is not one of its parameters": {**right, f"other/{key}": value},
        f"{key} must be {value.shape}, got {(1, *value.shape)}": {**right, key: value[None]},
        "is missing": {},
    }
    for message, flat in wrong.items():
        params = {"inner": unflatten_dict(flat, sep="/")}
        for mutable in (False, ["params"]):
            pattern = "wrong parameters for inner: .*" + re.escape(message)
            with pytest.raises(ValueError, match=pattern):
                jax.eval_shape(
                    lambda p, m=mutable: Net().apply({"params": p, **rest}, *inputs, mutable=m),
                    params,
                )
    jax.eval_shape(Net().apply, {"params": {"inner": plain(layer)}, **rest}, *inputs)


def test_running_statistics():
    """Training updates them where they may change; evaluation uses them; all must be given."""
    layer, module, [x] = pair("LambdaLayer")
    variables = everything(layer)
    module = module.copy(use_running_average=False)
    out, changed = jax.jit(lambda v: module.apply(v, x, mutable=["batch_stats"]))(variables)
    assert relative(out, layer(x, use_running_average=False)) < 1e-5
    now = dict(batch_stats=everything(layer)["batch_stats"])
    assert jax.tree.structure(changed) == jax.tree.structure(now)
    for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(now), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    trained = {**variables, **changed}
    found, same = module.apply(trained, x, use_running_average=True, mutable=["batch_stats"])
    assert relative(found, layer(x, use_running_average=True)) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, same, changed)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        module.apply(trained, x)
    message = r"wrong batch_stats for LambdaLayer: norm_q/mean \(6,\) is missing"
    with pytest.raises(ValueError, match=message):
        module.apply({"params": variables["params"]}, x)


def test_running_statistics_begin_as_in_linen():
    """`init` does not count the batch that it is given."""
    module = linen.LambdaLayer(CHANNELS, 8, size=SIZE)
    variables = jax.jit(module.init)(jax.random.key(0), X + 7)
    for name, value in flatten_dict(variables["batch_stats"], sep="/").items():
        np.testing.assert_array_equal(value, float("var" in name), err_msg=name)


@pytest.mark.parametrize("name", ["ChannelDropout", "SFNEBlock"])
def test_drops_with_a_key_for_dropout(name):
    layer, module, inputs = pair(name)
    module = module.copy(**({"rate": 0.5} if name == "ChannelDropout" else {"dropout": 0.5}))
    variables = everything(layer)

    @jax.jit
    def run(seeds):
        keys = [jax.random.key(0), jax.random.key(seeds)]
        without = module.apply(variables, *inputs)
        return without, [module.apply(variables, *inputs, rngs={"dropout": k}) for k in keys]

    without, (first, second) = run(1)
    again, (same, other) = run(2)
    np.testing.assert_array_equal(without, again)
    assert relative(without, jax.jit(layer)(*inputs)) < 1e-5
    np.testing.assert_array_equal(first, same)
    assert (second != other).any()
    channels = np.asarray(first).reshape(2, 16, -1)
    dropped = (channels == 0).all(1)
    assert 0 < dropped.mean() < 1
    expected = np.asarray(without).reshape(2, 16, -1)
    expected = np.where(dropped[:, None], 0, 2 * expected)
    np.testing.assert_allclose(channels, expected, rtol=1e-5, atol=1e-6)


def test_modules_drop_independently():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.ChannelDropout(0.5)(x), linen.ChannelDropout(0.5)(x)

    one, two = Net().apply({}, jnp.ones((4, 4, 12)), rngs={"dropout": jax.random.key(0)})
    assert (one != two).any()
    # Keys of the old kind, too.
    Net().apply({}, jnp.ones((4, 4, 12)), rngs={"dropout": jax.random.PRNGKey(0)})


def test_one_module_called_twice():
    class Net(nn.Module):
        def setup(self):
            self.rgu = linen.RGU(SIZE, CHANNELS)

        def __call__(self, x):
            return self.rgu(self.rgu(x))

    layer = filled(lambda: layers.RGU(SIZE, CHANNELS, rngs=nnx.Rngs(0)))
    assert shapes(variables_of(Net(), X)) == {"params": {"rgu": shapes(plain(layer))}}
    out = jax.jit(Net().apply)({"params": {"rgu": plain(layer)}}, X)
    assert relative(out, jax.jit(lambda x: layer(layer(x)))(X)) < 1e-5
    variables = jax.jit(Net().init)(jax.random.key(0), X)
    once = jax.jit(Net().apply)(variables, X)
    assert relative(jax.jit(Net().init_with_output)(jax.random.key(0), X)[0], once) < 1e-5


def test_vmap_over_parameters():
    module = linen.HyperChannelInteraction(CHANNELS, **NET)
    many = [
        plain(filled(lambda: nnx_layer("HyperChannelInteraction", CHANNELS, **NET), seed=n))
        for n in range(3)
    ]
    apply = jax.jit(lambda p: module.apply({"params": p}, X))
    found = jax.jit(jax.vmap(apply))(jax.tree.map(lambda *a: jnp.stack(a), *many))
    assert found.shape == (3, *X.shape)
    for n, params in enumerate(many):
        assert relative(found[n], apply(params)) < 1e-5
    assert relative(found[0], found[1]) > 1e-3


def test_dtypes():
    module = linen.GlobalHyperZZW(SIZE, CHANNELS, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    variables = variables_of(module, X, U)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float16)}
    assert jax.eval_shape(module.apply, variables, X, U).dtype == jnp.bfloat16


def test_fields_are_linens():
    """Hashable, comparable, printed, and keyword-only where the layer's are."""
    one, same, other = (linen.SFNEBlock(SIZE, CHANNELS, factor=n, dropout=0.25) for n in (3, 3, 6))
    assert one == same != other
    assert hash(one) == hash(same)
    assert "dropout = 0.25" in repr(one)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rngs'"):
        linen.RGU(SIZE, CHANNELS, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="parent must be"):
        linen.RGU(SIZE, CHANNELS, jnp.bfloat16)


def test_errors_of_the_layer_come_through():
    with pytest.raises(
        ValueError, match=re.escape("expected (batch, *(4, 4), 4), got (2, 4, 4, 3)")
    ):
        variables_of(linen.RGU(SIZE, CHANNELS), X[..., :3])
    with pytest.raises(
        ValueError, match=re.escape("slow must map coordinates (16, 2) to (16, features)")
    ):
        variables_of(linen.SlowFast(lambda c: c[:3], times, SIZE), X)


def test_tabulate():
    table = linen.RGU(SIZE, CHANNELS).tabulate(
        jax.random.key(0), X, console_kwargs={"force_terminal": False, "width": 120}
    )
    assert "Total Parameters: 96" in table


SPLIT = """
import json
import jax, jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec as P
from nets import largest, normal, relative
from terminator_jax.layers import linen

class Net(nn.Module):
    axis_name: str | None

    @nn.compact
    def __call__(self, x):
        x = linen.BatchStandardization(4, axis_name=self.axis_name)(x)
        net = dict(hidden=3, layers=1, param_dtype=jnp.float64)
        x = linen.LocalHyperZZW(3, 4, **net, axis_name=self.axis_name)(x * x, x)
        return linen.ChannelDropout(0.5, axis_name=self.axis_name)(x)

def function(axis_name):
    def loss(params, x, w):
        out, _ = Net(axis_name).apply(
            {"params": params, "batch_stats": statistics}, x, rngs={"dropout": jax.random.key(5)},
            mutable=["batch_stats"],
        )
        return jnp.mean(w * out), out
    return loss

def whole(loss, *args):
    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(*args)
    return out, grads

def with_pmap(params, x, w):
    def step(*args):
        (_, out), grads = jax.value_and_grad(function("batch"), has_aux=True)(*args)
        return out, jax.lax.pmean(grads, "batch")

    split = lambda a: a.reshape(4, -1, *a.shape[1:])
    out, grads = jax.pmap(step, "batch", in_axes=(None, 0, 0))(params, split(x), split(w))
    return out.reshape(w.shape), jax.tree.map(lambda a: a[-1], grads)

def with_shard_map(params, x, w):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))

    def mean_loss(*args):
        value, out = function("batch")(*args)
        return jax.lax.pmean(value, "batch"), out

    sharded = jax.shard_map(
        mean_loss, mesh=mesh, in_specs=(P(), P("batch"), P("batch")), out_specs=(P(), P("batch"))
    )
    return whole(sharded, params, x, w)

assert jax.device_count() == 4
x, w = normal(8, 4, 4, 4), normal(8, 4, 4, 4, seed=9)
statistics = Net(None).init(jax.random.key(0), x)["batch_stats"]
params = jax.eval_shape(Net(None).init, jax.random.key(0), x)["params"]
leaves, tree = jax.tree.flatten(params)
params = tree.unflatten([0.5 * normal(*a.shape, seed=n) for n, a in enumerate(leaves)])
expected = jax.tree.leaves(whole(function(None), params, x, w))
assert (expected[0] == 0).any()
for split in (with_pmap, with_shard_map):
    found = jax.tree.leaves(split(params, x, w))
    print(json.dumps([split.__name__, len(found), largest(map(relative, found, expected))]))
"""


def test_axis_name(run_python):
    """Four devices with a quarter of the batch each are one with all: outputs and gradients."""
    lines = run_python(SPLIT, devices=4, x64=True, optimize=False).splitlines()
    assert len(lines) == 2
    for split, compared, error in map(json.loads, lines):
        assert compared == 14, split
        assert error < 1e-10, split


class Net(nn.Module):
    """Linen's own layers and ours."""

    use_running_average: bool = False

    @nn.compact
    def __call__(self, x):
        x = linen.InstanceStandardization()(nn.Conv(12, (3, 3))(x))
        x = linen.GlobalHyperZZW((8, 8), 12, hidden=8)(x, x)
        block = dict(branches=(LocalBranch(1, "x", "h"),), widths=WIDTHS, dropout=0.1)
        mode = dict(use_running_average=self.use_running_average)
        x = linen.SFNEBlock((8, 8), 12, factor=2, **block, **mode)(x)
        return linen.pointwise(10)(x.mean((1, 2)))


def test_a_linen_model_trains(digits):
    net, optimizer = Net(), optax.adam(0.03)
    variables = jax.jit(net.init)(jax.random.key(0), digits.images[:2])
    params, statistics = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)

    @jax.jit
    def step(params, statistics, state, key, images, labels):
        def loss(params):
            logits, changed = net.apply(
                {"params": params, "batch_stats": statistics}, images, rngs={"dropout": key},
                mutable=["batch_stats"],
            )  # fmt: skip
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), changed["batch_stats"]

        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), statistics, state, value

    losses = []
    for n, batch in enumerate(digits.batches(steps=50)):
        params, statistics, state, loss = step(params, statistics, state, jax.random.key(n), *batch)
        losses.append(float(loss))
    variables = {"params": params, "batch_stats": statistics}
    logits = jax.jit(Net(use_running_average=True).apply)(variables, digits.test_images)
    digits.check(losses, logits)
