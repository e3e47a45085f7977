"""The non-linear transformer: the public block, its parts, what sees what."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import load
from nets import filled, normal, relative

from terminator_jax.models import (
    NonLinearBlock,
    NonLinearTransformer,
    NonLinearTransformerConfig,
)
from terminator_jax.ops.attention import attention_reference, rotary

pytestmark = pytest.mark.usefixtures("unoptimized")

# The release's names and ours; its weights are (out, in).
NAMES = {
    "mlp.0.weight": ("expand", "kernel"),
    "mlp.0.bias": ("expand", "bias"),
    "mlp.2.weight": ("reduce", "kernel"),
    "mlp.2.bias": ("reduce", "bias"),
}
SMALL = dict(vocabulary=11, channels=8, layers=3, heads=2, window=1, global_every=0)


def make(**options):
    config = NonLinearTransformerConfig(**{**SMALL, **options})
    return filled(lambda: NonLinearTransformer(config, rngs=nnx.Rngs(0)))


def tokens(*shape, seed=5):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 12, shape), jnp.int32)


def test_the_public_block(x64):
    golden = load("nonlinear_block")
    config = NonLinearTransformerConfig.public(channels=8, window=int(golden.window_size))
    block = nnx.eval_shape(
        lambda: NonLinearBlock(config, config.window, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    )
    assert (golden.param["norm.beta"] == 0).all()  # a constant; the file has no scale, it was 1
    values = {("norm", "scale"): np.ones(8)}
    values |= {path: golden.param[name].T for name, path in NAMES.items()}
    for path, variable in nnx.to_flat_state(nnx.state(block, nnx.Param)):
        variable.set_value(jnp.asarray(values.pop(path)))
    assert not values
    graph, state = nnx.split(block)
    x, w = jnp.asarray(golden.input["x"]), jnp.asarray(golden.cotangent)
    output, pullback = jax.vjp(jax.jit(lambda s, x: nnx.merge(graph, s)(x)), state, x)
    assert relative(output, golden.output) < 1e-9
    grads, dx = pullback(w)
    assert relative(dx, golden.grad_input["x"]) < 1e-7
    found = {path: value[...] for path, value in nnx.to_flat_state(grads)}
    for name, path in {**NAMES, "norm.gamma": ("norm", "scale")}.items():
        assert relative(found.pop(path), golden.grad[name].T) < 1e-7, name
    assert not found


def layer_norm(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale[...][None, None, None]


def test_the_model_line_by_line(x64):
    config = NonLinearTransformerConfig(**{**SMALL, "global_every": 2})
    model = filled(lambda: NonLinearTransformer(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    grid = tokens(2, 4, 5)
    x = model.embedding[...][grid]
    for block, window in zip(model.blocks, (1, None, 1), strict=True):
        attention, y = block.attention, layer_norm(x, block.norm.scale)
        q, k, v = jnp.split(y @ attention.qkv.kernel[...], 3, -1)
        q, k, v = (
            (part + bias[None, None, None]).reshape(2, 4, 5, 2, 4)
            for part, bias in zip((q, k, v), jnp.split(attention.qkv.bias[...], 3), strict=True)
        )
        y = attention_reference(rotary(q), rotary(k), v, window).reshape(x.shape)
        x = x + attention.out(y)
        y = block.expand(layer_norm(x, block.mlp_norm.scale))
        x = x + block.reduce(jax.nn.gelu(y, approximate=False))
    assert relative(model(grid), model.head(layer_norm(x, model.norm.scale))) < 1e-12


@pytest.mark.parametrize(("every", "sees"), [(0, 3), (3, 8)])
def test_how_far_a_token_is_seen(every, sees):
    """Three blocks of window 1 see three positions away; a global one all."""
    model = make(global_every=every)
    grid = tokens(1, 9, 9)
    other = grid.at[0, 0, 0].set((grid[0, 0, 0] + 1) % 12)
    changed = np.abs(model(grid) - model(other)).max(-1)[0] > 1e-6
    near = np.arange(9) <= sees
    assert (changed == near[:, None] & near[None]).all()


def test_padding_changes_nothing():
    model = make(global_every=2)
    grid = tokens(2, 4, 5)
    padded = jnp.pad(grid, [(0, 0), (0, 2), (0, 3)])
    mask = jnp.zeros((2, 6, 8), bool).at[:, :4, :5].set(True)
    assert relative(model(padded, mask)[:, :4, :5], model(grid)) < 1e-5
    assert relative(model(padded)[:, :4, :5], model(grid)) > 1e-3


def test_remat_and_dtypes():
    config = NonLinearTransformerConfig(**SMALL)
    grid, results = tokens(2, 4, 5), {}

    def loss(model):
        logits = model(grid)
        assert logits.dtype == jnp.float32
        return jnp.mean(jnp.sin(logits))

    for options in (dict(), dict(remat=True), dict(dtype=jnp.bfloat16)):
        model = filled(lambda o=options: NonLinearTransformer(config, rngs=nnx.Rngs(0), **o))
        value, grads = nnx.jit(nnx.value_and_grad(loss))(model)
        leaves = jax.tree.leaves(grads)
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
        results[str(options)] = np.concatenate([[value], *(np.ravel(leaf) for leaf in leaves)])
    plain, remat, narrow = results.values()
    assert relative(remat, plain) < 1e-5
    assert 1e-5 < relative(narrow, plain) < 0.1


def test_variants():
    sizes = {"shakespeare": 500_000, "tiny": 190_000}
    for name, limit in sizes.items():
        config = getattr(NonLinearTransformerConfig, name)()
        model = nnx.eval_shape(lambda c=config: NonLinearTransformer(c, rngs=nnx.Rngs(0)))
        count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        assert 0.9 * limit < count < limit, (name, count)
    config = NonLinearTransformerConfig.shakespeare(layers=7)
    assert config.windows == (3, 3, 3, None, 3, 3, 3)
    assert config.mask_token == 256


def test_it_starts_with_about_equal_chances():
    config = NonLinearTransformerConfig.tiny(vocabulary=64, channels=32)
    model = NonLinearTransformer(config, rngs=nnx.Rngs(0))
    logits = model(tokens(2, 6, 6))
    assert np.std(logits) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layers=0), "layers is 0, and must be greater than 0"),
        (dict(layers=2**24 + 1), "layers is 16777217, and must be 16,777,216 or less"),
        (dict(global_every=-1), "global_every is -1, and must be 0 or more"),
        (dict(heads=3), "channels is 8, and must be a multiple of heads, 3"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**options)


def test_tokens_that_do_not_fit():
    model = make()
    with pytest.raises(ValueError, match=re.escape("(batch, rows, columns), got (4, 5)")):
        model(tokens(4, 5))
    with pytest.raises(TypeError, match="expected tokens of integers, got float32"):
        model(normal(2, 4, 5, dtype=np.float32))
