"""Clipping, gradient accumulation and the moving average of the parameters, in whole runs."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import terminator_jax
from terminator_jax.errors import InputError
from terminator_jax.models import MODELS, make_config
from terminator_jax.training import config as configs
from terminator_jax.training import loop
from terminator_jax.training.evaluation import evaluate_checkpoint, make_evaluate
from terminator_jax.training.meter import Meter
from terminator_jax.training.optimizer import decay_mask, make_optimizer
from terminator_jax.training.setup import make_run
from terminator_jax.training.state import ravel
from terminator_jax.training.step import make_train_step


def evaluations(workdir):
    lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"]


def weights(workdir):
    """The parameters of the file that a run leaves, as one vector."""
    model = terminator_jax.load_model(workdir).model
    return np.concatenate([np.ravel(leaf) for leaf in (model.linear.kernel, model.linear.bias)])


def test_none_of_them_changes_the_state_of_the_optimizer():
    """So that checkpoints without them are read as before."""
    config = configs.default_config()
    tx, _ = make_optimizer(config, 10)
    assert type(tx.init(jnp.ones(3))[0]).__name__ == "ScaleByKar3State"


def test_a_clipped_gradient_has_the_norm_asked_for_and_its_direction():
    flags = ["name=sgd", "momentum=0", "learning_rate=1", "warmup_epochs=0", "clip_norm=0.5"]
    config = configs.override(
        configs.default_config(), [f"--config.optimizer.{flag}" for flag in flags]
    )
    tx, _ = make_optimizer(config, 10)
    params = jnp.zeros(2)
    for grad, expected in (([3.0, 4.0], [-0.3, -0.4]), ([0.1, 0.2], [-0.1, -0.2])):
        update, _ = tx.update(jnp.array(grad), tx.init(params), params)
        np.testing.assert_allclose(update, expected, rtol=1e-6)


BIASES = {"bias", "scalar", "position", "gabor_bias", "out_bias", "mixer_bias", "mix_bias"}
DECAYED = {
    "terminator": (
        {"kernel", "weight", "gabor_weight", "out_weight", "mixer_weight", "mix_weight"}
        | {"context_weight", "reduce_weight"},
        BIASES | {"context_bias", "reduce_bias"},
    ),
    "lambda_resnet": ({"kernel", "table"}, {"bias", "scale"}),
    "nonlinear_transformer": ({"kernel", "embedding"}, {"bias", "scale"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_decay_and_nothing_else(name):
    """By the last part of the names, in some variants; each value where `ravel` puts it."""
    for variant in list(MODELS[name].variants)[::3]:
        model = nnx.eval_shape(
            lambda variant=variant: MODELS[name].module(
                make_config(name, variant, {}), dtype=None, param_dtype=np.float32,
                axis_name=None, remat=False, rngs=nnx.Rngs(0),
            )
        )  # fmt: skip
        params = nnx.state(model, nnx.Param)
        rows = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
        found = {True: set(), False: set()}
        for number, (path, leaf) in enumerate(nnx.to_flat_state(rows)):
            leaf.set_value(np.full(leaf.shape, number, np.float32))
            found[str(path[-1]) in DECAYED[name][0]].add(str(path[-1]))
        assert found[True] <= DECAYED[name][0] and found[False] <= DECAYED[name][1]
        mask, numbers = decay_mask(params), ravel(rows)
        for number, (path, _) in enumerate(nnx.to_flat_state(rows)):
            assert set(mask[numbers == number]) == {str(path[-1]) in DECAYED[name][0]}, path
    gains = nnx.state(nnx.Dict(weight=nnx.Param(jnp.ones(3))))  # as other libraries call a scale
    assert not decay_mask(gains).any()


def test_adamw_is_that_of_optax_with_a_mask(make):
    """Also its state, so that checkpoints of before are read."""
    run = make_run(make("optimizer.weight_decay=0.5", "optimizer.warmup_epochs=0"))
    params, state = run.named_parameters(), run.state
    tree = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    own = jax.tree.map(lambda x: x * 0 + 1, ravel(params))
    mask = jax.tree.map(lambda x: x.ndim > 1, tree)  # of this model, which has nothing stacked
    tx = optax.adamw(run.schedule, weight_decay=0.5, mask=mask)
    grads = jax.tree.map(jnp.sin, tree)
    expected, _ = tx.update(grads, tx.init(tree), tree)
    found, _ = run.tx.update(jnp.sin(own), run.tx.init(own), own)
    np.testing.assert_allclose(found, ravel(expected), rtol=1e-6)
    assert len(set(np.asarray(found))) == 2
    plain = optax.adamw(run.schedule, weight_decay=0.5)  # as in checkpoints of before
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(plain.init(own))


SGD = ["optimizer.name=sgd", "optimizer.learning_rate=0.1", "dtype=float64"]


@pytest.mark.optimized
def test_8_batches_of_8_train_as_one_of_64(make, tmp_path):
    """Whole runs of a model without batch statistics: parameters and evaluations.

    Compiled with optimizations: without them, exponentials of 8 rows and of 64 differ by 1e-8.
    """
    runs = {"whole": ["batch_size=64"], "parts": ["batch_size=8", "accumulate_steps=8"]}
    found = {}
    for name, fields in runs.items():
        config = make(*SGD, *fields, "log_every_steps=1000", normalize=False)
        with jax.enable_x64(True):
            result = loop.train(config, tmp_path / name)
            found[name] = weights(tmp_path / name), result, evaluations(tmp_path / name)
    (whole, one, scores), (parts, eight, same) = found["whole"], found["parts"]
    assert (one.total, eight.total) == (44, 352)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-9)
    assert np.abs(whole).max() > 0.1
    for a, b in zip(scores, same, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9)


def test_batch_statistics_are_those_of_each_part(make, tmp_path):
    """With them, 8 batches of 8 are something else than one of 64."""
    for name, fields in (("whole", []), ("parts", ["batch_size=8", "accumulate_steps=8"])):
        loop.train(make(*SGD[:2], *fields), tmp_path / name)
    assert np.abs(weights(tmp_path / "whole") - weights(tmp_path / "parts")).max() > 1e-3


def test_the_learning_rate_is_that_of_the_update(make):
    config = make("batch_size=8", "accumulate_steps=8")
    _, schedule = make_optimizer(config, 176)
    _, plain = make_optimizer(make("batch_size=64"), 22)
    assert [float(schedule(n)) for n in range(44)] == [float(plain(n)) for n in range(44)]


def test_the_learning_rate_in_the_log_is_that_of_the_update(make):
    """Accumulated steps make none of their own."""
    run = make_run(make("batch_size=8", "accumulate_steps=8"))
    step = run.parallel.compile(
        make_train_step(run.task, run.model_def, run.tx, run.schedule), donate=True
    )
    state, rates = run.state, []
    for n in range(24):
        state, metrics = step(state, run.parallel.shard_batch(run.train_batch(n)))
        rates.append(float(metrics["learning_rate"]))
    expected = np.repeat([float(run.schedule(n)) for n in range(3)], 8)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert rates[-1] > rates[0]


def test_more_pictures_for_an_update_than_there_are(make):
    with pytest.raises(InputError, match=r"1437 pictures, .* also times config.accumulate_steps"):
        make_run(make("accumulate_steps=23"))


EMA = ["ema_decay=0.9", "accumulate_steps=4", "batch_size=16", "optimizer.clip_norm=1.0"]


def test_the_average_is_of_the_parameters_after_each_update(make):
    """Against a literal sum."""
    run = make_run(make("ema_decay=0.8"))
    step = run.parallel.compile(
        make_train_step(run.task, run.model_def, run.tx, run.schedule), donate=False
    )
    batches, seen = run.train_batches(), []
    new = jax.tree.leaves(run.chosen_parameters())  # an average of nothing
    assert all(map(np.array_equal, new, jax.tree.leaves(run.named_parameters())))
    for _ in range(5):
        run.state, _ = step(run.state, run.parallel.shard_batch(next(batches)))
        seen.append(np.asarray(run.state.params))
    shares = 0.8 ** np.arange(4, -1, -1)
    expected = np.average(seen, axis=0, weights=shares)
    found = jax.tree.leaves(run.chosen_parameters())
    found = np.concatenate([np.ravel(leaf) for leaf in found])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert np.abs(found - seen[-1]).max() > 1e-4

    scores = make_evaluate(run)()
    run.state = run.state._replace(params=jnp.asarray(found))
    averaged = make_evaluate(run)()
    for name in ("loss", "accuracy"):
        assert scores[f"ema_{name}"] == pytest.approx(averaged[name], rel=1e-5)
    assert scores["loss"] != pytest.approx(averaged["loss"], rel=1e-5)


@pytest.mark.parametrize(("metric", "averaged"), [("", True), ("accuracy", False)])
def test_the_metric_decides_which_parameters_are_kept(make, tmp_path, metric, averaged, run_main):
    """Those of the best metric are in the file, and are evaluated as the best."""
    config = make("ema_decay=0.9", f"best_metric={metric}")
    result = loop.train(config, tmp_path)
    lines = evaluations(tmp_path)
    name = "ema_accuracy" if averaged else "accuracy"
    assert result.best[name] == max(line[name] for line in lines)
    run = make_run(config)
    images = run.eval_data.load()
    hits = terminator_jax.load_model(tmp_path).logits(images.image).argmax(-1) == images.label
    assert hits.mean() == pytest.approx(result.best[name], abs=1e-6)
    assert result.best["accuracy"] != result.best["ema_accuracy"]
    scores = evaluate_checkpoint(tmp_path).scores
    assert {name: scores[name] for name in result.best} == pytest.approx(result.best, rel=1e-5)
    _, out, _ = run_main("evaluate", f"--workdir={tmp_path}")
    assert f"averages: accuracy {result.best['ema_accuracy']:.4f}" in out
    described = "averages" if averaged else "parameters"
    assert scores["described"] == described and f"of the {described}: top-5 accuracy" in out
    assert np.trace(scores["confusion"]) / scores["count"] == pytest.approx(result.best[name])


def test_a_metric_of_averages_needs_averages(make, tmp_path):
    with pytest.raises(InputError, match=r"'ema_loss', and must be one of accuracy, loss$"):
        loop.train(make("best_metric=ema_loss"), tmp_path)


def test_a_run_goes_on_in_the_middle_of_an_update_as_if_never_stopped(make, tmp_path, monkeypatch):
    config = make(*EMA, dropout=0.5)
    whole = loop.train(config, tmp_path / "whole")
    add, steps = Meter.add, []

    def stop(meter, metrics):
        steps.append(metrics)
        add(meter, metrics)
        if len(steps) == 30:  # 2 of the 4 batches of an update
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "add", stop)
        assert loop.train(config, tmp_path / "parts").step == 30
    assert loop.train(config, tmp_path / "parts") == whole
    assert np.array_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")


def test_accumulation_on_several_devices(run_python, tmp_path):
    """Under `pmap`, with clipping and averages: as on one device."""
    run_python(
        f"""
        import runpy
        from pathlib import Path

        import jax
        import numpy as np

        from terminator_jax.training import config as configs
        from terminator_jax.training.setup import make_run
        from terminator_jax.training.step import make_train_step

        flags = [f"--config.{{field}}" for field in {[*EMA, *SGD[:2]]}]
        config = configs.read("tests/training/small.py", flags)
        found = []
        for devices in (jax.devices()[:1], jax.devices()):
            run = make_run(config, devices)
            step = make_train_step(run.task, run.model_def, run.tx, run.schedule)
            step = run.parallel.compile(step)
            batches = run.train_batches()
            for _ in range(8):
                run.state, _ = step(run.state, run.parallel.shard_batch(next(batches)))
            found.append(run.chosen_parameters())
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        """,
        devices=2,
    )
