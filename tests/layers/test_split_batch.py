"""Layers with an `axis_name`: four devices with a quarter of the batch each are one with all.

Outputs, gradients of the parameters and of the maps, under `pmap` (differentiated on each device,
as in training) and under `shard_map` (differentiated from outside).
"""

import json

import pytest

CASES = ["BS", "G-IBS", "RGU", "LocalBranches", "ChannelDropout", "SFNEBlock", "causal SFNEBlock"]

CODE = """
import json
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
from nets import filled, largest, normal, relative
from terminator_jax.layers import (
    BatchStandardization, ChannelDropout, GroupInstanceBatchStandardization, LocalBranch,
    LocalBranches, RGU, SFNEBlock, SlowWidths,
)

BRANCHES = [LocalBranch(1, "x", "h"), LocalBranch(3, "u", "x")]
WIDTHS = SlowWidths(**{name: 1 if "layers" in name else 3 for name in SlowWidths.__annotations__})
NET = dict(hidden=3, layers=1, param_dtype=jnp.float64)

def key():
    return nnx.Rngs(dropout=jax.random.key(5))

def init():
    return nnx.Rngs(0)

def maps(x):
    return dict(x=x, u=x * x, h=jnp.sin(x))

CASES = {
    "BS": (lambda a: BatchStandardization(4, axis_name=a), lambda m, x: m(x)),
    "G-IBS": (lambda a: GroupInstanceBatchStandardization(4, 2, axis_name=a), lambda m, x: m(x)),
    "RGU": (lambda a: RGU((4, 4), 4, param_dtype=jnp.float64, rngs=init()), lambda m, x: m(x)),
    "LocalBranches": (
        lambda a: LocalBranches(BRANCHES, 4, axis_name=a, rngs=init(), **NET),
        lambda m, x: jnp.concatenate(m(maps(x)), -1),
    ),
    "ChannelDropout": (
        lambda a: ChannelDropout(0.5, axis_name=a), lambda m, x: m(x, rngs=key()),
    ),
    "SFNEBlock": (
        lambda a: SFNEBlock(
            (4, 4), 4, 2, branches=BRANCHES, widths=WIDTHS, groups=2, dropout=0.3,
            param_dtype=jnp.float64, axis_name=a, rngs=init(),
        ),
        lambda m, x: m(x, rngs=key()),
    ),
    "causal SFNEBlock": (
        lambda a: SFNEBlock(
            (16,), 4, 2, branches=BRANCHES, widths=WIDTHS, groups=2, operator="convolution",
            causal=True, param_dtype=jnp.float64, axis_name=a, rngs=init(),
        ),
        lambda m, x: m(x.reshape(len(x), 16, 4)),
    ),
}

def function(make, call, axis_name):
    graph, params = nnx.split(filled(lambda: make(axis_name)))

    def loss(params, x, w):
        out = call(nnx.merge(graph, params), x)
        return jnp.mean(w * out), out

    return loss, params

def whole(loss, params, x, w):
    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x, w)
    return out, *grads

def with_pmap(loss, params, x, w):
    n = jax.device_count()

    def step(params, x, w):
        (_, out), (grads, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x, w)
        return out, jax.lax.pmean(grads, "batch"), dx / n

    split = lambda a: a.reshape(n, -1, *a.shape[1:])
    out, grads, dx = jax.pmap(step, "batch", in_axes=(None, 0, 0))(params, split(x), split(w))
    return out.reshape(w.shape), jax.tree.map(lambda a: a[-1], grads), dx.reshape(x.shape)

def with_shard_map(loss, params, x, w):
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))

    def mean_loss(params, x, w):
        value, out = loss(params, x, w)
        return jax.lax.pmean(value, "batch"), out

    split = P("batch")
    sharded = jax.shard_map(
        mean_loss, mesh=mesh, in_specs=(P(), split, split), out_specs=(P(), split)
    )
    return whole(sharded, params, x, w)

def errors(split, expected, *args):
    found = jax.tree.leaves(split(*args))
    # A bias that a standardization removes has a gradient of rounding noise.
    return [
        relative(f, e) if np.abs(e).max() > 1e-12 else np.abs(f).max()
        for f, e in zip(found, expected, strict=True)
    ]

assert jax.device_count() == 4
x = normal(8, 4, 4, 4)
for name, (make, call) in CASES.items():
    loss, params = function(make, call, None)
    shape = jax.eval_shape(loss, params, x, 1.0)[1].shape
    w = normal(*shape, seed=9)
    expected = jax.tree.leaves(whole(loss, params, x, w))
    loss, params = function(make, call, "batch")
    for split in (with_pmap, with_shard_map):
        try:
            found = errors(split, expected, loss, params, x, w)
            result = len(found), largest(found)
        except Exception as error:
            result = 0, repr(error)
        print(json.dumps([name, split.__name__, *result]), flush=True)
"""


@pytest.fixture(scope="module")
def errors(run_python):
    """By case and mapping: how many arrays were compared, and the largest relative error."""
    lines = run_python(CODE, devices=4, x64=True, optimize=False).splitlines()
    return {(case, split): rest for case, split, *rest in map(json.loads, lines)}


@pytest.mark.parametrize("split", ["with_pmap", "with_shard_map"])
@pytest.mark.parametrize("case", CASES)
def test_four_devices_are_one(errors, case, split):
    compared, error = errors[case, split]
    assert compared >= 2, error
    assert error < 1e-10
