"""Integers and bools are float32, for every op, every layer and every Linen module."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import filled

from terminator_jax import layers
from terminator_jax.layers import LocalBranch, SlowWidths, linen
from terminator_jax.models import Terminator, TerminatorConfig
from terminator_jax.ops import (
    activation,
    attention,
    channels_first,
    conv,
    coordinates,
    fused_sfne,
    hyperzzw,
    lambdas,
    magnet,
    pooling,
    standardize,
)
from terminator_jax.ops.conv import methods, per_map

pytestmark = pytest.mark.usefixtures("x64", "unoptimized")

DTYPES = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.bool_]
RNG = np.random.default_rng(0)


def values(*shape):
    """Whole numbers whose sums and products int8 cannot hold."""
    return RNG.integers(0, 100, shape)


def small(*shape):
    """Weights of networks whose phases float32 has to enough digits."""
    return RNG.integers(0, 3, shape)


MAP = lambda: values(2, 4, 4, 4)  # noqa: E731
FIRST = lambda: values(4, 2, 4, 4)  # noqa: E731
HEADS = lambda: values(2, 4, 4, 2, 4)  # noqa: E731
NET = magnet.MAGNetParams(
    small(3, 2, 5), small(3, 5), small(2, 5, 5), small(2, 5), small(9), small(5, 4), small(4)
)
CONTEXT = magnet.Context(small(4, 5), small(5), small(5, 5), small(5), small(2, 5, 5), small(2, 5))
SETTINGS = fused_sfne.SFNESettings("product", 1.0, False, 2, ("x", "h"))
WEIGHTS = fused_sfne.SFNEWeights(
    k_h=values(4), k_c=values(4), k_s=values(4, 4), hyper_kernel=values(4, 4, 4),
    rgus=tuple(
        fused_sfne.RGUWeights(values(4, 8), values(8), values(4, 4), values(4, 4)) for _ in "12"
    ),
    mixer=values(4, 4), local_mixer=values(2, 4, 4), local_bias=values(8),
    bottleneck={n: values(4, 4) for n in ("o", "f", "o_u", "s", "o_h", "i", "l1", "l2", "skip1")},
    output_bias=values(4), bias=values(),
)  # fmt: skip
MOMENTS = standardize.Moments(values(1, 1, 1, 4), values(1, 1, 1, 4))
GROUP_MOMENTS = standardize.GroupMoments(
    standardize.Moments(values(2, 1, 1, 4), values(2, 1, 1, 4)), MOMENTS
)
LAMBDAS = [HEADS(), values(2, 4, 4, 1, 4), values(2, 4, 4, 1, 3), values(3, 3, 4, 1), values(4)]

# The arrays of each function, and the rest of its arguments.
OPS = {
    "erf": (activation.erf, [MAP()]),
    "gelu": (activation.gelu, [MAP()]),
    "local_attention": (attention.local_attention, [HEADS(), HEADS(), HEADS()], dict(window=1)),
    "attention_reference": (
        attention.attention_reference, [HEADS(), HEADS(), HEADS()], dict(window=1),
    ),
    "rotary": (attention.rotary, [HEADS()]),
    "spatial_mean": (channels_first.spatial_mean, [FIRST()]),
    "standardize_space": (channels_first.standardize_space, [FIRST()]),
    "broadcast_channels": (channels_first.broadcast_channels, [values(4), FIRST()]),
    "pointwise": (channels_first.pointwise, [FIRST(), values(4, 3), values(3)]),
    **{
        f"fft_conv {method}": (conv.fft_conv, [MAP(), values(3, 3, 4)], dict(method=method))
        for method in conv.METHODS
    },
    "depthwise_correlate": (conv.depthwise_correlate, [MAP(), values(3, 3, 4)]),
    "convolve": (methods.convolve, [FIRST(), values(4, 1, 3, 3)]),
    "convolve_shared_kernel": (methods.convolve_shared_kernel, [[FIRST()], values(4, 1, 3, 3)]),
    "convolve_per_map": (
        per_map.convolve_per_map, [[FIRST(), FIRST()], [values(4, 1, 3, 3), values(4, 1, 1, 1)]],
        dict(padding="same", correlate=True),
    ),
    "interpolate": (coordinates.interpolate, [values(4, 4)], dict(size=(5, 7))),
    "global_maps": (fused_sfne.global_maps, [FIRST(), WEIGHTS], dict(settings=SETTINGS)),
    "mix_local": (
        fused_sfne.mix_local,
        [dict(x=FIRST(), h=FIRST()), [values(3, 3, 4), values(1, 1, 4)], WEIGHTS],
        dict(settings=SETTINGS),
    ),
    "mix": (
        fused_sfne.mix,
        [
            {name: FIRST() for name in ("o", "f", "o_u", "s", "o_h", "i")},
            values(8, 2, 4, 4), dict(skip1=values(2, 2, 4, 4)), WEIGHTS,
        ],
    ),
    "activate": (fused_sfne.activate, [FIRST(), WEIGHTS]),
    "fold": (
        lambda weights, local, output: fused_sfne.fold(weights, SETTINGS, local, output),
        [WEIGHTS, (values(8), values(8)), (values(4), values(4))],
    ),
    "dot": (hyperzzw.dot, [MAP(), MAP()]),
    "product": (hyperzzw.product, [MAP(), MAP()]),
    "convolution": (hyperzzw.convolution, [MAP(), MAP()]),
    "operate": (lambda *a: hyperzzw.operate("product", *a), [MAP(), MAP()]),
    **{
        f"OPERATORS {name}": (function, [FIRST(), [FIRST(), FIRST()]])
        for name, function in hyperzzw.OPERATORS.items()
    },
    "quadratic_form": (hyperzzw.quadratic_form, [MAP(), MAP()]),
    "gate": (hyperzzw.gate, [values(2, 4), values(2, 3), values(3, 4)]),
    "gate_reference": (hyperzzw.gate_reference, [values(2, 4), values(2, 3), values(3, 4)]),
    "normalize_keys": (lambdas.normalize_keys, LAMBDAS[1:2]),
    "content_lambdas": (lambdas.content_lambdas, LAMBDAS[1:3]),
    "position_lambdas_reference": (lambdas.position_lambdas_reference, LAMBDAS[2:4]),
    "apply_lambdas_reference": (lambdas.apply_lambdas_reference, LAMBDAS),
    "apply_lambdas": (lambdas.apply_lambdas, LAMBDAS),
    "apply_position_lambdas": (
        lambdas.apply_position_lambdas, [LAMBDAS[0], LAMBDAS[2], LAMBDAS[3]],
    ),
    "gabor": (magnet.gabor, [values(9, 2), NET.gabor_weight, NET.gabor_bias]),
    "magnet hidden": (magnet.hidden, [NET, values(9, 2)]),
    "magnet": (magnet.magnet, [NET, values(9, 2)]),
    "magnet output": (magnet.output, [NET, values(9, 5)]),
    "magnet context": (magnet.context, [CONTEXT, values(9, 4)]),
    "context_magnet": (
        magnet.context_magnet, [NET, CONTEXT, values(9, 2), values(9, 4), np.ones(9, int)],
    ),
    "adaptive_average": (pooling.adaptive_average, [MAP()], dict(bins=(3, 3))),
    "adaptive_average_each": (pooling.adaptive_average_each, [MAP()], dict(bins=(1, 3))),
    "average": (standardize.average, [MAP()], dict(axes=(1, 2))),
    "mean_and_square": (standardize.mean_and_square, [MAP()], dict(axes=(1, 2))),
    "mean_and_variance": (standardize.mean_and_variance, [values(4), values(4)]),
    "normalize": (standardize.normalize, [MAP(), *MOMENTS]),
    "normalize with a gate": (
        lambda *a: standardize.normalize(*a[:3], gate=a[3]), [MAP(), *MOMENTS, MOMENTS.mean],
    ),
    "rsqrt_clamped": (standardize.rsqrt_clamped, [values(4)], dict(minimum=0.5)),
    "moments": (standardize.moments, [MAP()], dict(axes=(0, 1))),
    "standardize": (standardize.standardize, [MAP()], dict(axes=(0, 1))),
    "batch_moments": (standardize.batch_moments, [MAP()]),
    "group_moments": (standardize.group_moments, [MAP()]),
    "normalize_groups": (standardize.normalize_groups, [MAP(), GROUP_MOMENTS], dict(groups=2)),
    "instance_standardize": (standardize.instance_standardize, [MAP()]),
    "batch_standardize": (standardize.batch_standardize, [MAP()]),
    "group_standardize": (standardize.group_standardize, [MAP()], dict(groups=2)),
}  # fmt: skip
# Functions that take no values, that choose, or that only move them.
OTHER_OPS = {
    "across", "adaptive_matrix", "batch_groups", "bounds", "by_platform", "cheapest_tiles",
    "check_causal", "check_operator", "convolve_reference", "explicit_sharding", "grid",
    "match_varying_axes", "operator_named", "spatial_axes", "sum_copies", "to_channels_first",
    "to_channels_last", "crop_kernel", "select_method",
}  # fmt: skip

WIDTHS = SlowWidths(**{name: 1 if "layers" in name else 3 for name in SlowWidths.__annotations__})
BRANCHES = (LocalBranch(1, "x", "u"), LocalBranch(3, "u", "x"))
SLOW = dict(hidden=3, layers=1)
LAYERS = {
    "RGU": (((4, 4), 4), {}, [MAP()]),
    "BatchStandardization": ((4,), {}, [MAP()]),
    "InstanceStandardization": ((), {}, [MAP()]),
    "GroupInstanceBatchStandardization": ((4, 2), {}, [MAP()]),
    "ChannelDropout": ((0.5,), {}, [MAP()]),
    "GlobalHyperZZW": (((4, 4), 4), SLOW, [MAP(), MAP()]),
    "LocalHyperZZW": ((3, 4), SLOW, [MAP(), MAP()]),
    "HyperZZWGate": ((4, 3), SLOW, [values(2, 4), values(2, 3)]),
    "HyperChannelInteraction": ((4,), SLOW, [MAP(), values(4)]),
    "HyperInteraction": (
        ((4, 4), 4), dict(channel_hidden=3, spatial_hidden=3, layers=1),
        [MAP(), MAP(), values(4), values(4, 4)],
    ),
    "LocalBranches": ((BRANCHES, 4), SLOW, [dict(x=MAP(), u=MAP())]),
    "LocalSlowNet": ((3, 4), SLOW, [MAP()]),
    "LocalSlowNets": (((1, 3), 4), SLOW, [[MAP(), MAP()]]),
    "SFNEBlock": (
        ((4, 4), 4, 3), dict(skips=(2,), branches=BRANCHES, widths=WIDTHS),
        [MAP(), [values(2, 4, 4, 2)]],
    ),
    "LambdaLayer": ((4, 8), dict(size=(4, 4), heads=2, keys=3), [MAP()]),
    "LocalAttention2D": ((8, 1), dict(heads=2), [values(2, 4, 4, 8)]),
    "pointwise": ((4, 6), {}, [MAP()]),
}  # fmt: skip
# They take no arrays, or pass them on to a function of the user's.
OTHER_LAYERS = {
    "ChannelSlowNet", "FeatureSlowNet", "GlobalSlowNet", "MAGNet", "SlowFast", "SpatialSlowNet",
}  # fmt: skip


def check(function, arrays):
    """The result of every dtype is that of the same values in float32."""

    def both(dtype):
        cast = jax.tree.map(lambda a: np.asarray(a).astype(dtype), arrays)
        return cast, jax.tree.map(lambda a: a.astype(np.float32), cast)

    with jax.numpy_dtype_promotion("strict"):
        for dtype in DTYPES:
            found, expected = (jax.eval_shape(function, *each) for each in both(dtype))
            assert found == expected, dtype
        run = jax.jit(lambda cast, floats: (function(*cast), function(*floats)))
        found, expected = map(jax.tree.leaves, run(*both(np.int8)))
    for one, other in zip(found, expected, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("name", OPS)
def test_ops(name):
    function, arrays, *options = OPS[name]
    check(lambda *arrays: function(*arrays, **(options[0] if options else {})), arrays)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_and_linen_modules(name):
    args, options, arrays = LAYERS[name]
    kind = getattr(layers, name)
    signature = inspect.signature(kind if inspect.isfunction(kind) else kind.__init__)
    random = any(p.name in ("rngs", "kwargs") for p in signature.parameters.values())
    layer = filled(lambda: kind(*args, **options, **(dict(rngs=nnx.Rngs(0)) if random else {})))
    graph, state = nnx.split(layer)
    key = jax.random.key(1)

    def call(*arrays):
        more = dict(rngs=nnx.Rngs(dropout=key)) if name == "ChannelDropout" else {}
        return nnx.merge(graph, state, copy=True)(*arrays, **more)

    check(call, arrays)
    module = linen.pointwise(6) if name == "pointwise" else getattr(linen, name)(*args, **options)
    kinds = dict(params=nnx.Param, batch_stats=nnx.BatchStat)
    variables = {n: nnx.to_pure_dict(nnx.state(layer, k)) for n, k in kinds.items()}
    apply = functools.partial(module.apply, mutable=["batch_stats"], rngs=dict(dropout=key))
    with jax.numpy_dtype_promotion("strict"):
        for dtype in (np.int8, np.bool_):
            cast = jax.tree.map(lambda a, dtype=dtype: np.asarray(a).astype(dtype), arrays)
            floats = jax.tree.map(lambda a: a.astype(np.float32), cast)
            assert jax.eval_shape(apply, variables, *cast) == jax.eval_shape(
                apply, variables, *floats
            )


def test_everything_is_in_the_tables():
    modules = (
        activation, attention, channels_first, conv.convolution, coordinates, fused_sfne,
        hyperzzw, lambdas, magnet, methods, per_map, pooling, standardize,
    )  # fmt: skip
    listed = {word for name in OPS for word in name.split()} | OTHER_OPS
    for module in modules:
        public = {
            n for n, f in vars(module).items()
            if inspect.isfunction(f) and f.__module__ == module.__name__ and n[0] != "_"
        }  # fmt: skip
        assert public <= listed, module
    public = {n for n in layers.__all__ if callable(getattr(layers, n))}
    assert public == {*LAYERS, *OTHER_LAYERS, "LocalBranch", "SlowWidths"}


def test_pictures_that_were_not_normalized_are_refused():
    config = TerminatorConfig.digits()
    model = nnx.eval_shape(lambda: Terminator(config, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="got uint8: scale them first"):
        nnx.eval_shape(lambda m: m(jnp.zeros((2, 8, 8, 1), jnp.uint8)), model)
