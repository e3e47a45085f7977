"""The lambda layer against the vectors of PyTorch's, its two modes, dtypes, devices and errors."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import load
from nets import filled, normal, relative

from terminator_jax.convert_lambda import lambda_layer_from_torch, lambda_layer_to_torch
from terminator_jax.layers import LambdaLayer
from terminator_jax.ops.lambdas import apply_lambdas_reference

pytestmark = pytest.mark.usefixtures("unoptimized")

FILES = ["lambda_global", "lambda_global_u2", "lambda_local", "lambda_local_u3"]


def channels_last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


@pytest.mark.parametrize("method", ["rows", "dft", "fft"])
@pytest.mark.parametrize("file", FILES)
def test_golden(x64, file, method):
    """Output, and the gradients of Σ w·output for every parameter and the input."""
    golden = load(file)
    layer = lambda_layer_from_torch(golden.param, param_dtype=jnp.float64, method=method)
    graph, params, other = nnx.split(layer, nnx.Param, ...)
    cotangent = channels_last(golden.cotangent)

    @jax.jit
    def run(params, x):
        output, pullback = jax.vjp(lambda p, x: nnx.merge(graph, p, other, copy=True)(x), params, x)
        return output, *pullback(cotangent)

    output, grads, dx = run(params, channels_last(golden.input["x"]))
    assert output.dtype == jnp.float64
    assert relative(output, channels_last(golden.output)) < 1e-9
    assert relative(dx, channels_last(golden.grad_input["x"])) < 1e-7
    found = lambda_layer_to_torch(nnx.merge(graph, grads, other))
    assert set(golden.grad) == {name for name in found if "running" not in name}
    for name, expected in golden.grad.items():
        assert relative(found[name], expected) < 1e-7, name


@pytest.mark.parametrize("file", FILES)
def test_running_statistics_follow_the_original(x64, file):
    """From their beginning on; but variances are the biased ones, as Flax has them."""
    golden = load(file)
    layer = lambda_layer_from_torch(golden.param, param_dtype=jnp.float64)
    for norm in (layer.norm_q, layer.norm_v):
        norm.mean.set_value(0 * norm.mean[...])
        norm.var.set_value(0 * norm.var[...] + 1)
    layer(channels_last(golden.input["x"]))
    found, count = lambda_layer_to_torch(layer), golden.input["x"][:, 0].size
    for name in ("norm_q", "norm_v"):
        assert relative(found[f"{name}.running_mean"], golden.param[f"{name}.running_mean"]) < 1e-9
        var = 0.9 + (golden.param[f"{name}.running_var"] - 0.9) * (count - 1) / count
        assert relative(found[f"{name}.running_var"], var) < 1e-9


@pytest.mark.parametrize("file", FILES)
def test_sizes_are_worked_out(file):
    config = load(file).config
    layer = nnx.eval_shape(lambda: lambda_layer_from_torch(load(file).param))
    assert (layer.inputs, layer.heads, layer.keys, layer.depth) == tuple(
        config[name] for name in ("dim", "heads", "dim_k", "dim_u")
    )
    assert layer.size == ((config["n"],) * 2 if "n" in config else None)
    reach = 2 * config["n"] - 1 if "n" in config else config["r"]
    assert layer.table.shape == (reach, reach, config["dim_k"], config["dim_u"])


@pytest.mark.parametrize("file", ["lambda_global_u2", "lambda_local_u3"])
def test_round_trip_is_exact(x64, file):
    """Running statistics too; what counts batches is left out."""
    params = load(file).param
    counted = {**params, "norm_q.num_batches_tracked": np.array(3)}
    layer = lambda_layer_from_torch(counted, param_dtype=jnp.float64)
    back = lambda_layer_to_torch(layer)
    assert back.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rel_pos_emb=None), "missing in the state dict: rel_pos_emb"),
        ({"norm_q.bias": None}, "missing in the state dict: norm_q.bias"),
        ({"to_x.weight": np.zeros(2)}, "unknown in the state dict: to_x.weight"),
        ({"to_k.weight": np.zeros((3, 8, 1, 1))}, "to_k.weight (3, 8, 1, 1), expected (5, 8,"),
        (dict(rel_pos_emb=np.zeros(3)), "misshapen in the state dict: rel_pos_emb (3,)"),
        ({"to_q.weight": np.zeros(15)}, "misshapen in the state dict: to_q.weight (15,)"),
        ({"pos_conv.weight": np.zeros((4, 1, 5))}, "(4, 1, 5), expected (k, u, 1, *window)"),
    ],
)  # fmt: skip
def test_wrong_state_dicts(change, message):
    arrays = {**load("lambda_global").param, **change}
    arrays = {name: a.astype(np.float32) for name, a in arrays.items() if a is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        lambda_layer_from_torch(arrays)


def make(**kwargs):
    kwargs = dict(size=(4, 5), heads=2, keys=3, depth=2) | kwargs
    return filled(lambda: LambdaLayer(6, 8, rngs=nnx.Rngs(0), **kwargs))


def test_training_normalizes_by_the_batch_and_evaluation_by_running_statistics():
    layer, x = make(), 3 * normal(4, 4, 5, 6, dtype=np.float32) + 1
    queries = (x @ layer.to_q.kernel[...]).reshape(-1, 6)
    mean, var = queries.mean(0), queries.var(0)
    trained = layer(x)
    np.testing.assert_allclose(layer.norm_q.mean[...], 0.1 * mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.norm_q.var[...], 0.9 + 0.1 * var, rtol=1e-4)
    layer.eval()
    before = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    evaluated = layer(x)
    assert relative(evaluated, trained) > 0.01
    # One by one as together, and nothing has moved.
    assert relative(jnp.concatenate([layer(part) for part in jnp.split(x, 4)]), evaluated) < 1e-5
    after = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    for norm, part in (
        (layer.norm_q, x @ layer.to_q.kernel[...]),
        (layer.norm_v, x @ layer.to_v.kernel[...]),
    ):
        statistics = part.reshape(-1, part.shape[-1])
        norm.mean.set_value(statistics.mean(0))
        norm.var.set_value(statistics.var(0))
    assert relative(layer(x), trained) < 1e-4
    assert relative(layer(x, use_running_average=False), trained) < 1e-5
    assert make(use_running_average=True).norm_v.use_running_average


@pytest.mark.parametrize("window", [None, (3, 5)])
def test_follows_the_definition(window):
    """Which is what the projections are given to."""
    size = dict(size=None, window=window) if window else {}
    layer, x = make(**size), normal(2, 4, 5, 6, dtype=np.float32)
    layer.eval()

    def parts(y, number):
        return y.reshape(2, 4, 5, number, -1)

    def norm(y, n):
        return y / np.sqrt(1 + 1e-5) * n.scale[...].reshape(1, 1, 1, -1) + n.bias[...].reshape(
            1, 1, 1, -1
        )

    queries = parts(norm(x @ layer.to_q.kernel[...], layer.norm_q), 2)
    values = parts(norm(x @ layer.to_v.kernel[...], layer.norm_v), 2)
    keys = parts(x @ layer.to_k.kernel[...], 2)
    bias = None if layer.bias is None else layer.bias[...]
    assert (bias is None) == (window is None)
    expected = apply_lambdas_reference(queries, keys, values, layer.table[...], bias)
    assert relative(layer(x), expected.reshape(2, 4, 5, 8)) < 1e-5


def test_sequences_and_maps_of_other_sizes():
    x = normal(2, 9, 6, dtype=np.float32)
    assert make(size=(9,))(x).shape == (2, 9, 8)
    local = make(size=None, window=(3,))
    assert local(x).shape == (2, 9, 8)
    assert local(x[:, :4]).shape == (2, 4, 8)


def test_initial_values():
    layer = LambdaLayer(64, 64, size=(16, 16), rngs=nnx.Rngs(0))
    assert abs(layer.table[...].std() - 1) < 0.02
    assert abs(layer.to_q.kernel[...].std() * 8 - 1) < 0.05
    layer = LambdaLayer(64, 64, window=(5, 5), depth=2, rngs=nnx.Rngs(0))
    bound = np.abs(layer.table[...]).max() * np.sqrt(50)
    assert 0.95 < bound <= 1
    assert not layer.bias[...].any()


def test_bfloat16_keeps_statistics_in_float32():
    layer, wide = make(dtype=jnp.bfloat16), make()
    x = normal(4, 4, 5, 6, dtype=np.float32)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    assert relative(y.astype(jnp.float32), wide(x)) < 0.05
    assert {v.dtype for v in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
    # Means that bfloat16 cannot tell apart.
    layer.eval()
    one = layer.norm_q(jnp.full((1, 6), 256.0))
    layer.norm_q.mean.set_value(jnp.full(6, 256.5))
    np.testing.assert_allclose(
        layer.norm_q(jnp.full((1, 6), 256.0)) - layer.norm_q.bias[...][None],
        (-0.5 * layer.norm_q.scale[...] / np.sqrt(layer.norm_q.var[...] + 1e-5))[None], rtol=0.02,
    )  # fmt: skip
    assert one.dtype == jnp.bfloat16


def test_float64_statistics(x64):
    layer = make(param_dtype=jnp.float64)
    layer(normal(4, 4, 5, 6))
    assert {v.dtype for v in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float64")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(size=None), "expected either size or window, got None and None"),
        (dict(window=(3, 3)), "expected either size or window, got (4, 5) and (3, 3)"),
        (dict(size=(2, 2, 2)), "expected 1 or 2 axes, got (2, 2, 2)"),
        (dict(size=None, window=(3, 4)), "the window must be odd on every axis, got (3, 4)"),
        (dict(heads=3), "8 channels do not divide into 3 heads"),
        (dict(method="gather"), "method 'gather' is not one of"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**change)


@pytest.mark.parametrize(
    ("window", "shape", "message"),
    [
        (None, (2, 5, 4, 6), "expected (batch, *(4, 5), 6), got (2, 5, 4, 6)"),
        (None, (2, 4, 5, 7), "got (2, 4, 5, 7)"),
        (None, (4, 5, 6), "got (4, 5, 6)"),
        ((3, 3), (2, 4, 6), "expected (batch, 2 spatial axes, 6), got (2, 4, 6)"),
    ],
)
def test_wrong_maps(window, shape, message):
    layer = make(size=(4, 5) if window is None else None, window=window)
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(jnp.zeros(shape))


SPLIT = """
import json
import jax, jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
from nets import filled, largest, normal, relative
from terminator_jax.layers import LambdaLayer

def function(axis_name, method):
    make = lambda: LambdaLayer(
        6, 8, size=(4, 5), heads=2, keys=3, method=method, param_dtype=jnp.float64,
        axis_name=axis_name, rngs=nnx.Rngs(0),
    )
    graph, params, other = nnx.split(filled(make), nnx.Param, ...)

    def loss(params, x, w):
        layer = nnx.merge(graph, params, other, copy=True)
        out = layer(x)
        return jnp.mean(w * out), (out, nnx.state(layer, nnx.BatchStat))

    return loss, params

def whole(loss, params, x, w):
    (_, (out, stats)), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x, w)
    return out, stats, *grads

def with_pmap(loss, params, x, w):
    def step(params, x, w):
        (_, aux), (grads, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x, w)
        out, stats = aux
        return out, stats, jax.lax.pmean(grads, "batch"), dx / 4

    split = lambda a: a.reshape(4, -1, *a.shape[1:])
    mapped = jax.pmap(step, "batch", in_axes=(None, 0, 0))
    out, stats, grads, dx = mapped(params, split(x), split(w))
    stats, grads = jax.tree.map(lambda a: a[-1], (stats, grads))
    return out.reshape(w.shape), stats, grads, dx.reshape(x.shape)

def with_shard_map(loss, params, x, w):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))

    def mean_loss(*args):
        value, aux = loss(*args)
        return jax.lax.pmean(value, "batch"), aux

    sharded = jax.shard_map(
        mean_loss, mesh=mesh, in_specs=(P(), P("batch"), P("batch")),
        out_specs=(P(), (P("batch"), P())),
    )
    return whole(sharded, params, x, w)

assert jax.device_count() == 4
x, w = normal(8, 4, 5, 6) + 1, normal(8, 4, 5, 8, seed=9)
for method in ("rows", "dft", "fft"):
    expected = jax.tree.leaves(whole(*function(None, method), x, w))
    for split in (with_pmap, with_shard_map):
        found = jax.tree.leaves(split(*function("batch", method), x, w))
        worst = largest(map(relative, found, expected))
        print(json.dumps([method, split.__name__, len(found), worst]))
"""


def test_four_devices_are_one(run_python):
    """A quarter of the batch each: outputs, running statistics, gradients."""
    lines = run_python(SPLIT, devices=4, x64=True, optimize=False).splitlines()
    assert len(lines) == 6
    for method, split, compared, error in map(json.loads, lines):
        assert compared == 1 + 4 + 8 + 1, (method, split)
        assert error < 1e-10, (method, split)
