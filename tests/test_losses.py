"""Losses against the golden vectors, against literal formulas, and their errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import load
from nets import filled

from terminator_jax.convert import terminator_to_release
from terminator_jax.losses import l2, label_smoothing, safe_norm, slow_neural
from terminator_jax.models import Terminator, TerminatorConfig

FACTORS = (4, 2, 2)


def random_kernels(size=(4, 5), channels=(3, 12, 24), dtype=np.float64):
    rng = np.random.default_rng(5)
    return [jnp.asarray(rng.normal(size=(*size, c)), dtype) for c in channels]


def tiled(hyper_kernels):
    """The slow neural loss as written: every tile is made."""
    total = 0.0
    for i, wide in enumerate(hyper_kernels):
        for narrow in hyper_kernels[:i]:
            repeats = wide.shape[-1] // narrow.shape[-1]
            tiles = jnp.tile(narrow, (1,) * (narrow.ndim - 1) + (repeats,))
            total += jnp.mean((tiles - wide) ** 2)
    return total


def test_label_smoothing_follows_the_original(x64):
    golden = load("label_smoothing")
    loss, grad = jax.value_and_grad(label_smoothing)(golden.logits, golden.labels)
    np.testing.assert_allclose(loss, golden.loss, rtol=1e-12)
    np.testing.assert_allclose(grad, golden.grad, rtol=1e-11)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_label_smoothing_is_cross_entropy_with_smooth_labels(x64, epsilon):
    logits = np.random.default_rng(2).normal(size=(2, 3, 4))
    labels = np.array([[0, 1, 2], [3, 3, 1]])
    smooth = (1 - epsilon) * np.eye(4)[labels] + epsilon / 4
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -(smooth * log_p).sum(-1).mean()
    np.testing.assert_allclose(label_smoothing(logits, labels, epsilon), wanted, rtol=1e-12)


def test_label_smoothing_of_soft_labels(x64):
    """The mean of the losses of the classes, each with its probability."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4))
    soft = rng.dirichlet(np.ones(4), 6)
    hard = lambda label: label_smoothing(logits[:1], np.array([label]), 0.1)  # noqa: E731
    expected = sum(soft[0, label] * hard(label) for label in range(4))
    np.testing.assert_allclose(label_smoothing(logits[:1], soft[:1], 0.1), expected, rtol=1e-12)
    labels = rng.integers(0, 4, 6)
    np.testing.assert_allclose(
        label_smoothing(logits, np.eye(4)[labels]), label_smoothing(logits, labels), rtol=1e-12
    )


def test_label_smoothing_of_huge_logits_is_finite():
    loss, grad = jax.value_and_grad(label_smoothing)(jnp.array([[1e30, -1e30]]), jnp.array([0]))
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()


def test_label_smoothing_computes_bfloat16_in_float32():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(64, 10)), jnp.bfloat16)
    labels = jnp.arange(64) % 10
    loss, grad = jax.jit(jax.value_and_grad(label_smoothing))(logits, labels)
    assert loss.dtype == jnp.float32
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, label_smoothing(logits.astype(jnp.float32), labels), rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "epsilon", "error", "message"),
    [
        (np.zeros((2, 3)), np.zeros(2, bool), 0.1, TypeError, "or probabilities, got bool"),
        (np.zeros((2, 3)), np.zeros(2), 0.1, ValueError, "logits (2, 3) and labels (2,)"),
        (np.zeros((2, 3)), np.zeros((2, 4)), 0.1, ValueError, "the labels' shape, got logits (2"),
        (np.zeros((2, 3)), np.zeros(3, int), 0.1, ValueError, "logits (2, 3) and labels (3,)"),
        (np.zeros((2, 3)), np.zeros((2, 1), int), 0.1, ValueError, "labels (2, 1)"),
        (np.zeros(()), np.zeros((), int), 0.1, ValueError, "logits () and labels ()"),
        (np.zeros((2, 3)), np.zeros(2, int), 1.5, ValueError, "[0, 1], got 1.5"),
    ],
)
def test_label_smoothing_errors(logits, labels, epsilon, error, message):
    """Also under jit, where only shapes are known."""
    with pytest.raises(error, match=re.escape(message)):
        jax.jit(label_smoothing, static_argnums=2)(
            jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.result_type(labels)), epsilon
        )


def golden_kernels(golden, group="kernel"):
    """Channels last, without PyTorch's leading 1."""
    arrays = getattr(golden, group)
    return [jnp.moveaxis(jnp.asarray(arrays[str(i)][0]), 0, -1) for i in range(3)]


def test_slow_neural_follows_the_original(x64):
    golden = load("slow_neural_loss")
    factors = tuple(int(f) for f in golden.factors)
    run = jax.jit(jax.value_and_grad(slow_neural), static_argnums=1)
    loss, grads = run(golden_kernels(golden), factors)
    np.testing.assert_allclose(loss, golden.loss, rtol=1e-12)
    for found, wanted in zip(grads, golden_kernels(golden, "grad"), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-14)


def test_slow_neural_channel_sum_follows_the_original(x64):
    golden = load("slow_neural_loss")
    loss = slow_neural(golden_kernels(golden), golden.factors, channel_sum=True)
    np.testing.assert_allclose(loss, golden.loss_channel_sum, rtol=1e-12)


@pytest.mark.parametrize("size", [(7,), (4, 5), (2, 3, 4)])
def test_slow_neural_follows_the_tiles(x64, size):
    kernels = random_kernels(size)
    loss, grads = jax.jit(jax.value_and_grad(slow_neural), static_argnums=1)(kernels, FACTORS)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(tiled))(kernels)
    np.testing.assert_allclose(loss, wanted, rtol=1e-13)
    for found, expected in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-14)


def test_slow_neural_never_makes_the_tiles():
    """No program value but the difference itself is as large as the wide kernel's square."""
    text = str(jax.make_jaxpr(lambda k: slow_neural(k, FACTORS))(random_kernels(dtype="float32")))
    assert "concatenate" not in text
    assert "tile" not in text


def test_slow_neural_is_zero_for_one_block_and_for_copies():
    first = random_kernels(dtype=np.float32)[0]
    copies = [first, jnp.tile(first, (1, 1, 4)), jnp.tile(first, (1, 1, 8))]
    assert slow_neural([first], (4,)) == 0
    assert slow_neural(copies, FACTORS) == 0
    assert slow_neural([first, 1 + copies[1]], (4, 1)) > 0.5


def test_slow_neural_last_factor_may_be_left_out():
    kernels = random_kernels(dtype=np.float32)
    assert slow_neural(kernels, FACTORS[:2]) == slow_neural(kernels, FACTORS)


@pytest.mark.parametrize(
    ("kernels", "factors", "message"),
    [
        (random_kernels(dtype=np.float32), (4, 3, 2), "factor 3 ask for (4, 5, 36) next"),
        (random_kernels(dtype=np.float32), (4,), "got 1 for 3"),
        (random_kernels(dtype=np.float32), (4, 2, 2, 2), "got 4 for 3"),
        ([jnp.zeros((4, 4, 1)), jnp.zeros((4, 5, 2))], (2, 1), "next, got (4, 5, 2)"),
        ([], (), "got 0 for 0"),
    ],
)
def test_slow_neural_errors(kernels, factors, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        slow_neural(kernels, factors)


def test_safe_norm(x64):
    x = np.random.default_rng(1).normal(size=(3, 4))
    value, grad = jax.value_and_grad(safe_norm)(x)
    np.testing.assert_allclose(value, np.linalg.norm(x), rtol=1e-14)
    np.testing.assert_allclose(grad, x / np.linalg.norm(x), rtol=1e-14)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_safe_norm_at_zero(transform):
    value, grad = transform(jax.value_and_grad(safe_norm))(jnp.zeros((2, 3)))
    assert value == 0
    np.testing.assert_array_equal(grad, np.zeros((2, 3)))


def test_safe_norm_of_bfloat16_is_float32():
    norm = safe_norm(jnp.full(1000, 0.1, jnp.bfloat16))
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, np.sqrt(1000) * float(jnp.bfloat16(0.1)), rtol=1e-5)


@pytest.fixture(scope="module")
def network():
    """Two blocks of a Terminator, with parameters drawn at random."""
    config = TerminatorConfig.digits(
        size=(4, 4), factors=(12, 1), skips=((), ()), dropout=(0.0, 0.0), global_layers=(2, 1)
    )
    return filled(lambda: Terminator(config, rngs=nnx.Rngs(0)))


def literal_l2(network, slow_scale):
    """The specification's sum, over the release's names; 1-D networks are `gc`."""
    whole = r"(channel_mixer_mlp|bottleneck_layer|local_interact_conv_\d\.channel_mixer)\.|bias\d$"
    slow = r"(slow_net_(g|gs_hi|l\d)\.Kernel|Fast_Kernel_rgu(_2)?)\.(.*\.)?\w+\.weight$"
    total = 0.0
    for name, array in terminator_to_release(network).items():
        factor = 1.0 if re.search(whole, name) else slow_scale if re.search(slow, name) else 0.0
        total += factor * np.linalg.norm(np.float64(array))
    return 5e-5 * total


@pytest.mark.parametrize("slow_scale", [1e-6, 1.0])
def test_l2_follows_the_specification(network, slow_scale):
    """What counts a millionth is lost in a float32 sum, so once with a larger share."""
    params, expected = nnx.state(network, nnx.Param), literal_l2(network, slow_scale)
    np.testing.assert_allclose(l2(params, slow_scale=slow_scale), expected, rtol=1e-5)
    pure = nnx.to_pure_dict(params)
    np.testing.assert_allclose(l2(pure, 1e-4, slow_scale), 2 * expected, rtol=1e-5)


def test_l2_has_the_releases_factors(network):
    params = nnx.state(network, nnx.Param)
    np.testing.assert_allclose(l2(params), literal_l2(network, 1e-6), rtol=1e-5)


def test_l2_has_a_finite_gradient_where_parameters_are_zero():
    zeros = {"bias": jnp.zeros(3), "kernel": jnp.zeros((3, 3))}
    params = {"a": {"mixer": zeros, "rgu1": {"k": zeros}, "local": {"scalar": jnp.zeros(4)}}}
    value, grads = jax.value_and_grad(l2)(params)
    assert value == 0
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads))


def test_l2_of_something_else():
    with pytest.raises(ValueError, match="none of the parameters belongs to an SFNE block"):
        l2({"layer": {"kernel": jnp.ones(3)}})
