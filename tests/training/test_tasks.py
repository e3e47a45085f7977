"""Normalization, losses and scores of a task, its optimizer and schedule."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import filled

from terminator_jax import losses
from terminator_jax.data.augment import Process
from terminator_jax.data.pictures import Pictures
from terminator_jax.errors import InputError
from terminator_jax.models import Terminator
from terminator_jax.training import config as configs
from terminator_jax.training.optimizer import OPTIMIZERS, make_optimizer
from terminator_jax.training.tasks import make_task

TINY = "tests/training/tiny.py"


def batch(count=6, seed=0, masked=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, 8, 8, 1), np.uint8),
        "label": rng.integers(0, 10, count).astype(np.int32),
        "mask": np.arange(count) < count - masked,
    }


def test_normalization():
    flags = ["--config.data.mean=(0.1,0.2,0.3)", "--config.data.std=(0.5,0.25,0.125)"]
    task = make_task(configs.override(configs.default_config(), flags))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    expected = (pictures / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 0.125]
    found = task.inputs(jnp.asarray(pictures))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_16_bits_are_scaled_as_8_are():
    flags = ["--config.data.mean=(0.1,0.2,0.3)", "--config.data.std=(0.5,0.25,0.125)"]
    task = make_task(configs.override(configs.default_config(), flags))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    found = task.inputs(jnp.asarray(pictures.astype(np.uint16) * 257))
    np.testing.assert_allclose(found, task.inputs(jnp.asarray(pictures)), rtol=1e-5, atol=1e-5)


def test_sequences_are_rows_of_pixels_in_the_order_asked_for():
    order = (3, 0, 5, 1, 4, 2)
    config = configs.default_config()
    config.data.update(sequence=True, mean=(0.0,), std=(1 / 255,))
    pictures = jnp.arange(24, dtype=jnp.uint8).reshape(2, 2, 3, 2)
    expected = np.arange(24).reshape(2, 6, 2)
    found = make_task(config).inputs(pictures)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    config.data.permutation = order
    found = make_task(config).inputs(pictures)
    np.testing.assert_allclose(found, expected[:, order], atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(sequence=True), r"sequences of \(64,\) pixels, and the model is for \(8, 8\)"),
        (
            dict(sequence=True, permutation=(1, 0)),
            r"permutation has 2 positions, and digits train has sequences of \(64,\)",
        ),
        (dict(permutation=(1, 0)), r"digits train has pictures of \(8, 8\): it orders a sequence"),
    ],
)
def test_sequences_that_do_not_fit(fields, message):
    config = configs.default_config()
    config.model.variant = "digits"
    config.data.update(fields)
    with pytest.raises(InputError, match=message):
        make_task(config).validate_images((8, 8, 1), 10, "digits train")


def test_mixed_pictures_count_by_their_shares():
    """In the loss; a hit is the class of the larger share."""
    task = make_task(configs.read("experiments/lambda_digits.py"))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 10)), jnp.float32)
    soft = np.random.default_rng(1).dirichlet(np.ones(10), 6).astype(np.float32)
    given = {**batch(), "soft_label": jnp.asarray(soft), "label": jnp.asarray(soft.argmax(1))}
    loss, metrics = task.loss(lambda images: logits, given, None)
    np.testing.assert_allclose(loss, losses.label_smoothing(logits, soft, 0.09), rtol=1e-6)
    assert metrics["accuracy"] == np.mean(np.argmax(logits, 1) == soft.argmax(1))


@pytest.mark.parametrize(
    ("fields", "image", "process", "says"),
    [
        (
            dict(mixup_alpha=1.0),
            np.zeros((8, 4, 4, 1), np.uint8),
            Process(0, 64),
            "is 64, and must",
        ),
        (dict(cutmix_alpha=1.0), np.zeros((8, 4, 4, 1), np.uint8), Process(0, 64), "mix pairs"),
        (dict(rand_augment=1), np.zeros((8, 4, 4, 2), np.uint8), Process(), "and own has 2 of 8"),
        (dict(rand_augment=1), np.zeros((8, 4, 4, 3), np.uint16), Process(), "and own has 3 of 16"),
    ],
)
def test_augmentations_that_do_not_fit(fields, image, process, says):
    config = configs.default_config()
    config.data.update(fields)
    pictures = Pictures(image, np.zeros(8, np.int32), "own", 10)
    with pytest.raises(InputError, match=says):
        make_task(config).augmentations(pictures, process)


@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [("bfloat16", jnp.float32), ("float32", jnp.float32)]
)
def test_dtype(dtype, param_dtype):
    task = make_task(configs.read(TINY, [f"--config.dtype={dtype}"]))
    model = nnx.eval_shape(task.make_model)
    assert model.dtype == jnp.dtype(dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
        jnp.dtype(param_dtype)
    }


def test_float64_parameters(x64):
    task = make_task(configs.read(TINY, ["--config.dtype=float64"]))
    model = nnx.eval_shape(task.make_model)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
        jnp.dtype("float64")
    }
    assert task.inputs(jnp.zeros((1, 2, 2, 1), jnp.uint8)).dtype == jnp.float64


def test_initial_values_are_those_of_the_seed(unoptimized):
    task = make_task(configs.read(TINY, ["--config.seed=5"]))
    made = nnx.state(task.make_model())
    other = nnx.state(Terminator(task.model_config, rngs=nnx.Rngs(5)))
    chex.assert_trees_all_close(nnx.to_pure_dict(made), nnx.to_pure_dict(other), rtol=1e-6)


def two_blocks(*flags):
    config = configs.read(TINY, [f"--config.loss.{flag}" for flag in flags])
    two = dict(factors=(12, 1), skips=((), ()), dropout=(0.3, 0.0), global_layers=(1, 1))
    with config.unlocked():
        config.model.options.update(two)
    return make_task(config)


WEIGHTS = {
    "published": [],
    "none": ["slow_neural=0", "l2=0", "label_smoothing=0"],
    "others": ["slow_neural=2", "l2=0.1", "label_smoothing=0.5", "channel_sum=True"],
}


@pytest.fixture(scope="module")
def computed():
    """Logits, hyper-kernels, L2 and, for all choices of weights, loss and metrics: one program."""
    tasks = {name: two_blocks(*flags) for name, flags in WEIGHTS.items()}
    model, data = filled(tasks["none"].make_model), batch()

    @nnx.jit
    def compute(model):
        rngs = lambda: nnx.Rngs(dropout=0)  # noqa: E731
        pictures = tasks["none"].inputs(data["image"])
        logits, inter = model(pictures, rngs=rngs(), intermediates=True)
        l2 = losses.l2(nnx.state(model, nnx.Param), scale=1.0)
        given = {name: task.loss(model, data, rngs()) for name, task in tasks.items()}
        return logits, inter.hyper_kernels, l2, given

    jax.config.update("jax_disable_most_optimizations", True)
    yield data["label"], *compute(model)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(
    ("weights", "epsilon", "slow", "channel_sum", "scale"),
    [
        ("published", 0.09, 1, False, 5e-5),
        ("none", 0, 0, False, 0),
        ("others", 0.5, 2, True, 0.1),
    ],
)
def test_loss_is_the_sum_of_its_weighted_terms(
    computed, weights, epsilon, slow, channel_sum, scale
):
    labels, logits, kernels, l2, given = computed
    loss, metrics = given[weights]
    expected = {
        "cross_entropy": losses.label_smoothing(logits, labels, epsilon),
        "slow_neural": slow * losses.slow_neural(kernels, (12, 1), channel_sum),
        "l2": scale * l2,
    }
    assert weights == "none" or min(expected.values()) > 0
    found = {**metrics}
    assert found.pop("loss") == loss
    assert found.pop("accuracy") == np.mean(np.argmax(logits, -1) == labels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
    np.testing.assert_allclose(loss, sum(expected.values()), rtol=1e-6)


def test_scores_leave_the_padding_out():
    data, logits = batch(masked=2), np.random.default_rng(1).normal(size=(6, 10))
    logits[3, data["label"][3]] = 9
    sums = make_task(configs.read(TINY)).eval_step(lambda pictures: jnp.asarray(logits), data)
    log_p = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(6), data["label"]]
    assert sums["count"] == 4
    np.testing.assert_allclose(sums["loss"], -log_p[:4].sum(), rtol=1e-5)
    assert sums["accuracy"] == (np.argmax(logits, -1) == data["label"])[:4].sum() > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_the_schedule(name):
    config = configs.read(TINY, [f"--config.optimizer.name={name}"])
    tx, schedule = make_optimizer(config, steps_per_epoch=10)
    params = {"x": jnp.ones(3)}
    state, moves = tx.init(params), []
    for _ in range(20):
        updates, state = tx.update({"x": jnp.ones(3)}, state, params)
        moves.append(float(jnp.abs(updates["x"]).max()))
        params = optax.apply_updates(params, updates)
    assert moves[0] == 0.0 and moves[1] > 0
    assert moves[19] < moves[12]
    np.testing.assert_allclose([schedule(5), schedule(10)], [0.0015, 0.003], rtol=1e-6)
    assert schedule(19) < 0.0002 and schedule(20) == 0


@pytest.mark.parametrize("steps", [1, 22])
def test_a_warm_up_of_nearly_all_steps(steps):
    """Rounded to steps it would be all of them, and a cosine of none is an error of optax."""
    config = configs.read(TINY, ["--config.optimizer.warmup_epochs=0.99", "--config.epochs=1"])
    _, schedule = make_optimizer(config, steps_per_epoch=steps)
    assert schedule(steps - 1) == pytest.approx(0.003) and schedule(steps) == 0


def test_no_warm_up():
    config = configs.read(TINY, ["--config.optimizer.warmup_epochs=0"])
    _, schedule = make_optimizer(config, steps_per_epoch=10)
    np.testing.assert_allclose([schedule(0), schedule(10)], [0.003, 0.0015], rtol=1e-6)
