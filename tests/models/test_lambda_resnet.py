"""LambdaResNet: its variants, a bottleneck written out, its two modes, dtypes and errors."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import filled, normal, relative

from terminator_jax.layers import LambdaLayer
from terminator_jax.models import LambdaResNet, LambdaResNetConfig
from terminator_jax.models.lambda_resnet import Bottleneck, _mean_pool

pytestmark = pytest.mark.usefixtures("unoptimized")

TINY = LambdaResNetConfig(
    size=(6, 5), channels=2, num_classes=3, blocks=(1, 2), widths=(2, 4), strides=(1, 2),
    lambda_stages=(1,), expansion=2, stem_width=3, stem_kernel=3, stem_stride=1, stem_pool=False,
    heads=2, keys=3,
)  # fmt: skip
X = normal(4, 6, 5, 2, dtype=np.float32)


def changed(**fields):
    return LambdaResNetConfig(**{**vars(TINY), **fields})


def abstract(config, **kwargs):
    return nnx.eval_shape(lambda: LambdaResNet(config, rngs=nnx.Rngs(0), **kwargs))


def count(tree):
    leaves = jax.tree.leaves(nnx.state(tree, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


# As the docstrings have them, with the maps of the lambda layers.
VARIANTS = {
    "lambda50": (15_559_880, {}),
    "lambda26": (10_418_856, {}),
    "cifar": (1_005_066, {(16, 16): 2, (8, 8): 2}),
    "mnist": (55_114, {(7, 7): 2}),
    "digits": (68_682, {(4, 4): 2}),
    "plain_cifar": (997_258, {}),
    "plain_mnist": (56_266, {}),
    "plain_digits": (71_754, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    parameters, sizes = VARIANTS[name]
    variant = getattr(LambdaResNetConfig, name)
    assert f"{parameters:,} parameters" in variant.__doc__
    model = abstract(variant())
    assert count(model) == parameters
    contexts = [block.context for block in model.blocks]
    found = [c.size for c in contexts if isinstance(c, LambdaLayer) and c.size]
    assert {size: found.count(size) for size in found} == sizes
    assert ("plain" in name) == (not any(isinstance(c, LambdaLayer) for c in contexts))
    assert variant(num_classes=7).num_classes == 7


@pytest.mark.parametrize(("name", "layers", "late"), [("lambda50", 50, 9), ("lambda26", 26, 4)])
def test_layers_of_the_large_variants(name, layers, late):
    """The stem, three of each bottleneck, the head; the later stages have the lambda layers."""
    model = abstract(getattr(LambdaResNetConfig, name)())
    assert 2 + 3 * len(model.blocks) == layers
    kinds = [isinstance(block.context, LambdaLayer) for block in model.blocks]
    assert kinds == sorted(kinds) and sum(kinds) == late
    assert model.blocks[-1].context.table.shape[:2] == (23, 23)


@pytest.mark.parametrize("name", ["lambda26", "digits", "plain_mnist"])
def test_shapes(name):
    config = getattr(LambdaResNetConfig, name)()
    x = jnp.zeros((2, *config.size, config.channels))
    logits = jax.eval_shape(lambda m, x: m(x), abstract(config), x)
    assert (logits.shape, logits.dtype) == ((2, config.num_classes), jnp.float32)


def convolved(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normed(x, norm):
    mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
    scale, bias = (a[...].reshape(1, 1, 1, -1) for a in (norm.scale, norm.bias))
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


@pytest.mark.parametrize(
    ("stage", "inputs", "stride"), [(0, 4, 1), (0, 3, 2), (1, 3, 2), (1, 8, 1)]
)
def test_a_bottleneck_written_out(stage, inputs, stride):
    config = changed(size=(6, 8), strides=(stride, 1), widths=(2, 4))
    block = filled(lambda: Bottleneck(config, stage, inputs, stride, rngs=nnx.Rngs(0)))
    x = normal(4, 6, 8, inputs, dtype=np.float32)
    y = jax.nn.relu(normed(x @ block.reduce.kernel[...], block.reduce_norm))
    if stage == 1:
        if stride == 2:
            y = y.reshape(4, 3, 2, 4, 2, 4).mean((2, 4))
        y = nnx.clone(block.context)(y)
    else:
        y = convolved(y, block.context.kernel[...], stride)
    y = jax.nn.relu(normed(y, block.context_norm))
    y = normed(y @ block.expand.kernel[...], block.expand_norm)
    if block.outputs != inputs:
        x = normed(
            convolved(x, block.shortcut.kernel[...][None, None], stride), block.shortcut_norm
        )
    found = block(normal(4, 6, 8, inputs, dtype=np.float32))
    assert relative(found, jax.nn.relu(x + y)) < 1e-4


def test_means_at_an_odd_end_are_over_what_there_is():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    expected = [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]
    np.testing.assert_allclose(_mean_pool(x, 2)[0, ..., 0], expected)
    assert _mean_pool(x, 1) is x


def test_a_new_block_is_the_identity():
    block = Bottleneck(changed(widths=(2, 4)), 0, 4, 1, rngs=nnx.Rngs(0))
    x = normal(2, 6, 5, 4, dtype=np.float32)
    np.testing.assert_array_equal(block(x), jax.nn.relu(x))


def test_the_whole_network():
    """Stem, blocks in order, mean and head."""
    model = filled(lambda: LambdaResNet(changed(stem_pool=True), rngs=nnx.Rngs(0)))
    parts = nnx.clone(model)
    y = jax.nn.relu(normed(convolved(X, parts.stem.kernel[...], 1), parts.norm))
    y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for block in parts.blocks:
        y = block(y)
    expected = y.mean((1, 2)) @ parts.head.kernel[...] + parts.head.bias[...][None]
    assert relative(model(X), expected) < 1e-4


def test_evaluation_uses_running_statistics():
    """A picture's logits then do not depend on the batch, and nothing moves."""
    model = filled(lambda: LambdaResNet(TINY, rngs=nnx.Rngs(0)))
    trained = model(X)
    assert relative(model(X), trained) < 1e-5
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    for path, value in jax.tree.leaves_with_path(stats):
        assert (value != float("var" in str(path))).any(), path
    model.eval()
    together = model(X)
    assert relative(together, trained) > 0.01
    one_by_one = jnp.concatenate([model(part) for part in jnp.split(X, 4)])
    assert relative(one_by_one, together) < 1e-5
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, stats, after)


def test_bfloat16():
    dtypes = dict(dtype=jnp.bfloat16)
    model = filled(lambda: LambdaResNet(TINY, rngs=nnx.Rngs(0), **dtypes))
    logits = model(X)
    assert logits.dtype == jnp.float32
    assert relative(logits, filled(lambda: LambdaResNet(TINY, rngs=nnx.Rngs(0)))(X)) < 0.1
    assert {v.dtype for v in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    features = jax.eval_shape(lambda m, x: m.blocks[0](m.norm(m.stem(x))), model, X)
    assert features.dtype == jnp.bfloat16


def test_remat_keeps_less_and_changes_nothing(x64):
    """Neither gradients nor running statistics."""
    found = []
    for remat in (False, True):
        model = filled(
            lambda remat=remat: LambdaResNet(
                TINY, remat=remat, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
            )
        )
        graph, params, other = nnx.split(model, nnx.Param, ...)

        def loss(params, graph=graph, other=other):
            model = nnx.merge(graph, params, other, copy=True)
            return jnp.sum(model(X.astype(jnp.float64)) ** 2), nnx.state(model, nnx.BatchStat)

        residuals = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p, has_aux=True)[1], params)
        kept = sum(x.size for x in jax.tree.leaves(residuals))
        found.append((kept, jax.jit(jax.grad(loss, has_aux=True))(params)))
    (plain, expected), (less, same) = found
    assert less < 0.6 * plain
    assert len(jax.tree.leaves(same)) == len(jax.tree.leaves(expected)) > 20
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(size=(8,)), "size is (8,), and must be (rows, columns)"),
        (dict(widths=(4,)), "widths must have one entry per stage: blocks = (1, 2), widths = (4,)"),
        (dict(strides=()), "strides is (), and must be one or more numbers greater than 0"),
        (dict(strides=(1,)), "strides must have one entry per stage"),
        (dict(lambda_stages=(2,)), "lambda_stages must be from 0 to 1, got (2,)"),
        (dict(heads=3), "heads is 3, and must divide the width of stage 1, 4"),
        (dict(window=4), "window is 4, and must be 0 or an odd number"),
    ],
)
def test_wrong_configurations(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        abstract(changed(**overrides))


def test_wrong_pictures():
    with pytest.raises(ValueError, match=re.escape("(batch, *(6, 5, 2)), got (2, 5, 6, 2)")):
        jax.eval_shape(lambda m, x: m(x), abstract(TINY), jnp.zeros((2, 5, 6, 2)))
    with pytest.raises(TypeError, match="floating-point pictures, got uint8"):
        jax.eval_shape(lambda m, x: m(x), abstract(TINY), jnp.zeros((2, 6, 5, 2), jnp.uint8))
