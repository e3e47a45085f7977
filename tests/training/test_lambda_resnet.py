"""A network with running statistics in training: two devices as one, and evaluation."""

import json

import numpy as np
import pytest

from terminator_jax import losses
from terminator_jax.training import config as configs
from terminator_jax.training.tasks import make_task

# Prints, for each way to run them, the losses of ten steps, then every running statistic, and the
# evaluation's loss with batches of 40 and of 120.
STEPS = """
import dataclasses, itertools, json
import jax, numpy as np
from nets import filled
from terminator_jax.training import config as configs
from terminator_jax.training.evaluation import make_evaluate
from terminator_jax.training.setup import make_run
from terminator_jax.training.state import new_state, split_model
from terminator_jax.training.step import make_train_step

OPTIONS = dict(blocks=(1, 1), widths=(4, 4), stem_width=4, heads=2, keys=3)

def results(parallel, devices):
    flags = ["dtype=float64", "compilation_cache=False", "batch_size=16", f"parallel={parallel}"]
    config = configs.read("experiments/lambda_digits.py", [f"--config.{flag}" for flag in flags])
    with config.unlocked():
        config.model.options = OPTIONS

    def run_of(size):
        config.eval_batch_size = size
        return make_run(config, jax.devices()[:devices])

    run = run_of(40)
    step = run.parallel.compile(
        make_train_step(run.task, run.model_def, run.tx, run.schedule), donate=True
    )
    _, params, model_state = split_model(filled(run.task.make_model))
    state = run.parallel.replicate(new_state(params, model_state, run.tx, seed=0))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state.model_state)
    found = []
    for batch in itertools.islice(run.train_batches(), 10):
        state, metrics = step(state, run.parallel.shard_batch(batch))
        found.append(float(metrics["loss"]))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state.model_state) == shapes
    stats = [np.asarray(x).ravel() for x in jax.tree.leaves(state.model_state)]
    runs = [dataclasses.replace(run_of(size), state=state) for size in (40, 120)]
    scores = [make_evaluate(run)()["loss"] for run in runs]
    return found, np.concatenate(stats).tolist(), scores

print(json.dumps([results(*way) for way in (("pmap", 1), ("pmap", 2), ("jit", 2))]))
"""


@pytest.fixture(scope="module")
def results(run_python):
    return json.loads(run_python(STEPS, devices=2, x64=True, optimize=False))


@pytest.mark.parametrize("way", [1, 2], ids=["pmap", "jit"])
def test_two_devices_train_as_one_does(results, way):
    """Losses, running statistics and evaluation."""
    one, two = results[0], results[way]
    assert len(set(one[0])) == 10
    for expected, found in zip(one, two, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_evaluation_does_not_depend_on_the_batches(results):
    for _, _, (by_40, by_120) in results:
        np.testing.assert_allclose(by_40, by_120, rtol=1e-10)


def test_the_loss_is_label_smoothing():
    task = make_task(configs.read("experiments/lambda_digits.py"))
    logits = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
    labels = np.arange(6)
    batch = dict(image=np.zeros((6, 8, 8, 1), np.uint8), label=labels)
    loss, metrics = task.loss(lambda pictures: logits, batch, None)
    assert loss == metrics["cross_entropy"] == losses.label_smoothing(logits, labels, 0.09)
    assert set(metrics) == {"loss", "accuracy", "cross_entropy"}
