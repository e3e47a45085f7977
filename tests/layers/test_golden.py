"""Every part of a block against the public release's vectors, and float32 against float64."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import load
from nets import relative

from terminator_jax import convert
from terminator_jax.layers import (
    RGU,
    ChannelSlowNet,
    GlobalSlowNet,
    GroupInstanceBatchStandardization,
    HyperChannelInteraction,
    HyperInteraction,
    LocalSlowNet,
    pointwise,
)
from terminator_jax.ops import batch_standardize, depthwise_correlate


class LocalConvolution(nnx.Module):
    """What follows a local slow network in the release, but for the scalar."""

    def __init__(self, channels, **kwargs):
        self.mixer = pointwise(channels, channels, **kwargs)

    def __call__(self, x, kernel):
        y = self.mixer(depthwise_correlate(x, kernel))
        return jax.nn.gelu(batch_standardize(y), approximate=False)


# From the release's layout to ours.
def channels_last(x):
    return np.moveaxis(x, 1, -1)


def without_batch(kernel):
    return np.moveaxis(kernel[0], 0, -1)


def depthwise(kernel):
    return np.moveaxis(kernel[:, 0], 0, -1)


def vector(kernel):
    return kernel[0, 0]


class Part(NamedTuple):
    """One golden file: the module, where its tensors lie, and the layout of its arrays."""

    file: str
    make: Callable[..., nnx.Module]
    entries: Iterable[convert.Entry] = ()
    inputs: Mapping[str, Callable] = MappingProxyType({})
    output: Callable[[Any], Any] = channels_last


def global_part(file, size, channels, hidden, layers):
    return Part(
        file,
        lambda **kw: GlobalSlowNet((size, size), channels, hidden=hidden, layers=layers, **kw),
        convert.slow_net_entries("Kernel.", (), (size, size), layers),
        output=without_batch,
    )


def local_part(file, size):
    return Part(
        file,
        lambda **kw: LocalSlowNet(size, 4, hidden=6, layers=2, **kw),
        convert.local_net_entries("Kernel.", (), [size], 0, d=2, layers=2),
        {"x": channels_last},
        depthwise,
    )


PARTS = [
    global_part("slow_global_2d", 8, 5, hidden=10, layers=2),
    global_part("slow_global_2d_deep", 11, 3, hidden=7, layers=3),
    Part(
        "slow_channel_1d",
        lambda **kw: ChannelSlowNet(9, hidden=6, layers=2, **kw),
        convert.slow_net_entries("Kernel.", (), (9,), 2),
        output=vector,
    ),
    local_part("slow_local_2d_k3", 3),
    local_part("slow_local_2d_k5", 5),
    local_part("slow_local_2d_k9_larger_than_input", 9),
    Part(
        "group_instance_batch_standardization",
        lambda rngs: GroupInstanceBatchStandardization(24, track_running_stats=False),
        inputs={"x": channels_last},
    ),
    Part(
        "rgu_2d",
        lambda **kw: RGU((8, 8), 6, **kw),
        convert.rgu_entries("", (), (8, 8)),
        {"x": channels_last},
    ),
    Part(
        "local_conv_2d",
        lambda **kw: LocalConvolution(4, **kw),
        convert.linear_entries("channel_mixer.", ("mixer",), 2),
        {"x": channels_last, "kernel": depthwise},
    ),
    Part(
        "hyper_channel_interaction",
        lambda **kw: HyperChannelInteraction(6, hidden=5, layers=2, **kw),
        convert.slow_net_entries("slow_net_gc.Kernel.", ("channel",), (6,), 2),
        {"x": channels_last},
    ),
    Part(
        "hyper_interaction",
        lambda **kw: HyperInteraction(
            (8, 8), 6, channel_hidden=5, spatial_hidden=4, layers=2, **kw
        ),
        [
            *convert.slow_net_entries("slow_net_gc_hi.Kernel.", ("channel",), (6,), 2),
            *convert.slow_net_entries("slow_net_gs_hi.Kernel.", ("spatial",), (8, 8), 2),
        ],
        {"y": channels_last, "x": channels_last},
    ),
]
PARTS = [part._replace(entries=list(part.entries)) for part in PARTS]
every_part = pytest.mark.parametrize("part", PARTS, ids=[part.file for part in PARTS])


def build(part, golden, params, dtype):
    """The graph and state of the golden file's module, and its inputs."""
    kwargs = {"param_dtype": dtype} if part.entries else {}
    model = nnx.eval_shape(lambda: part.make(rngs=nnx.Rngs(0), **kwargs))
    convert.import_entries(model, part.entries, params)
    inputs = [jnp.asarray(to(golden.input[name]), dtype) for name, to in part.inputs.items()]
    return *nnx.split(model), inputs


def gradients(part, golden, graph, state, inputs):
    """Output, and the gradients of Σ w·output for every parameter and every input."""
    cotangent = jnp.asarray(part.output(golden.cotangent))

    @jax.jit
    def run(state, inputs):
        output, pullback = jax.vjp(lambda s, i: nnx.merge(graph, s)(*i), state, inputs)
        return output, *pullback(cotangent)

    output, state_grads, input_grads = run(state, inputs)
    grads = convert.export_entries(nnx.merge(graph, state_grads), part.entries)
    return output, grads, dict(zip(part.inputs, input_grads, strict=True))


@every_part
def test_part_follows_the_original(x64, part):
    golden = load(part.file)
    made = build(part, golden, golden.param, jnp.float64)
    output, grads, input_grads = gradients(part, golden, *made)
    assert output.dtype == jnp.float64
    assert relative(output, part.output(golden.output)) < 1e-9
    assert grads.keys() == golden.grad.keys()
    for name, expected in golden.grad.items():
        assert relative_or_zero(grads[name], expected, golden.grad) < 1e-7, name
    for name, found in input_grads.items():
        assert relative(found, part.inputs[name](golden.grad_input[name])) < 1e-7, name


def relative_or_zero(found, expected, grads):
    """A bias that a standardization removes has a gradient of rounding noise: take the largest."""
    largest = max(np.max(np.abs(g)) for g in grads.values())
    scale = np.max(np.abs(expected))
    scale = scale if scale > 1e-12 * largest else largest
    return np.max(np.abs(found - expected)) / scale


# One of each kind.
@pytest.mark.parametrize(
    "part",
    [p for p in PARTS if "deep" not in p.file and "_k3" not in p.file and "_k9" not in p.file],
    ids=lambda part: part.file,
)
def test_float32_follows_float64(x64, part):
    """With phases of a few rad: at ω0 = 2000, float32 phases are 0.008 rad apart."""
    golden = load(part.file)
    params = {
        name: a / 2000 if ".filters." in name and name.endswith("weight") else a
        for name, a in golden.param.items()
    }
    outputs = {}
    for dtype in (jnp.float64, jnp.float32):
        graph, state, inputs = build(part, golden, params, dtype)
        outputs[dtype] = jax.jit(lambda s, i, graph=graph: nnx.merge(graph, s)(*i))(state, inputs)
    wide, narrow = outputs.values()
    assert narrow.dtype == jnp.float32
    assert relative(narrow, wide) < 1e-4
